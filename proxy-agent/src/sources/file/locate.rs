//! Finds the line of a field, by reading the text again up to there.

use std::fmt;

use serde::{
    Deserializer,
    de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use super::content::Format;

/// Line of the field at `path` ("spec.ports[0].port") in the document numbered `document`, or of what is there of it.
pub(super) fn line(text: &str, format: Format, document: usize, path: &str) -> Option<usize> {
    let path = segments(path);
    let seek = Seek { path: &path };
    let line = match format {
        Format::Yaml => {
            let mut documents = serde_yaml_ng::Deserializer::from_str(text);
            let found = seek.deserialize(documents.nth(document)?).err()?;
            found.location()?.line()
        }
        Format::Json => {
            let mut documents = serde_json::Deserializer::from_str(text);
            for _ in 0..document {
                documents.deserialize_any(IgnoredAny).ok()?;
            }
            seek.deserialize(&mut documents).err()?.line()
        }
    };
    (line > 0).then_some(line)
}

/// `a.b[0].c[d.e/f]` as a, b, 0, c, d.e/f.
fn segments(path: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = path;
    while !rest.is_empty() {
        let (segment, after) = match rest.strip_prefix('[') {
            Some(inner) => inner.split_once(']').unwrap_or((inner, "")),
            None => rest.split_at(rest.find(['.', '[']).unwrap_or(rest.len())),
        };
        if !segment.is_empty() {
            found.push(segment);
        }
        rest = after.strip_prefix('.').unwrap_or(after);
    }
    found
}

/// Fails at the field, so that the error carries its place.
#[derive(Clone, Copy)]
struct Seek<'a> {
    path: &'a [&'a str],
}

impl<'de> DeserializeSeed<'de> for Seek<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        match self.path.split_first() {
            Some((first, path)) => deserializer.deserialize_any(Step {
                first,
                rest: Seek { path },
            }),
            None => deserializer.deserialize_any(Arrived),
        }
    }
}

/// Refuses whatever is there.
struct Arrived;

impl Visitor<'_> for Arrived {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nothing")
    }
}

struct Step<'a> {
    first: &'a str,
    rest: Seek<'a>,
}

impl<'de> Visitor<'de> for Step<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "something with {}", self.first)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            if key == self.first {
                map.next_value_seed(self.rest)?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Err(A::Error::missing_field("field"))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let index = self.first.parse::<usize>().map_err(A::Error::custom)?;
        for _ in 0..index {
            items.next_element::<IgnoredAny>()?;
        }
        items.next_element_seed(self.rest)?;
        Err(A::Error::missing_field("item"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const YAML: &str =
        "kind: A\n---\nkind: B\nspec:\n  ports:\n  - name: a\n  - name: b\n    port: 0\n";

    #[test]
    fn the_line_of_a_field_is_found_in_yaml() {
        let line = |path| line(YAML, Format::Yaml, 1, path);
        assert_eq!(line("kind"), Some(3));
        assert_eq!(line("spec.ports[1].port"), Some(8));
        assert_eq!(
            line("spec.ports[0].port"),
            Some(6),
            "an absent field is where its parent is"
        );
    }

    #[test]
    fn the_line_of_a_field_is_found_in_json() {
        let text = "{}\n{\n\"metadata\": {\n\"labels\": {\n\"a.b/c\": 1 }}}";
        let line = |path| line(text, Format::Json, 1, path);
        assert_eq!(line("metadata.labels[a.b/c]"), Some(5));
    }
}
