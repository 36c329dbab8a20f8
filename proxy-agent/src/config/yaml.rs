//! YAML or JSON into one value, as kube-proxy reads it leniently: of a key that is there twice the last one counts.

use std::{cell::RefCell, fmt};

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// The value, and the paths of the keys that were there more than once.
///
/// # Errors
/// The text is no YAML, is empty, or holds several documents.
pub fn read(text: &str) -> Result<(Value, Vec<String>), serde_yaml_ng::Error> {
    let twice = RefCell::default();
    let seed = Node {
        path: String::new(),
        twice: &twice,
    };
    let value = seed.deserialize(serde_yaml_ng::Deserializer::from_str(text))?;
    Ok((value, twice.into_inner()))
}

/// One value of the tree.
struct Node<'a> {
    path: String,
    twice: &'a RefCell<Vec<String>>,
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value of YAML with text for keys")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        let number = Number::from_f64(value);
        let number =
            number.ok_or_else(|| E::custom(format!("{}: {value} is no number", self.path)));
        number.map(Value::Number)
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        loop {
            let node = Node {
                path: format!("{}[{}]", self.path, values.len()),
                twice: self.twice,
            };
            match seq.next_element_seed(node)? {
                Some(value) => values.push(value),
                None => return Ok(Value::Array(values)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut values = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let path = match self.path.is_empty() {
                true => key.clone(),
                false => format!("{}.{key}", self.path),
            };
            let value = map.next_value_seed(Node {
                path: path.clone(),
                twice: self.twice,
            })?;
            if values.insert(key, value).is_some() {
                self.twice.borrow_mut().push(path);
            }
        }
        Ok(Value::Object(values))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_last_of_two_equal_keys_counts_and_is_told() {
        let (value, twice) = read("a: 1\nb: {c: [x, {d: null, d: 2}]}\na: 'y'").unwrap();
        assert_eq!(value, json!({"a": "y", "b": {"c": ["x", {"d": 2}]}}));
        assert_eq!(twice, ["b.c[1].d", "a"]);
    }

    #[test]
    fn what_is_no_single_document_is_refused() {
        for text in ["a: [", "a: 1\n---\nb: 2", "{a: 1"] {
            assert!(read(text).is_err(), "{text:?}");
        }
    }
}
