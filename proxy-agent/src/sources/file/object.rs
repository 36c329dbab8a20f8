//! One YAML or JSON document as a Kubernetes object: looks at `apiVersion` and `kind`, then reads the typed object.
//!
//! Reads in one pass where both come first, as they do in nearly every file; what comes before them is kept aside.

use std::{collections::VecDeque, fmt};

use k8s_openapi::api::{core::v1, discovery::v1 as discovery, networking::v1 as networking};
use serde::{
    Deserialize, Deserializer,
    de::{
        DeserializeSeed, Error, IgnoredAny, IntoDeserializer, MapAccess, Visitor,
        value::MapAccessDeserializer,
    },
};
use serde_json::Value;

/// A document, or an item of a list.
#[derive(Debug)]
pub(super) enum Object {
    Service(Box<v1::Service>),
    EndpointSlice(Box<discovery::EndpointSlice>),
    Node(Box<v1::Node>),
    ServiceCidr(Box<networking::ServiceCIDR>),
    List(Vec<Object>),
    /// A kind that the proxy does not use: "apiVersion kind".
    Other(String),
    /// An item without kind, in a list that comes to its own kind later or says it for all.
    Bare(serde_json::Map<String, Value>),
    /// Nothing between two separators.
    Empty,
}

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ObjectVisitor)
    }
}

struct ObjectVisitor;

impl<'de> Visitor<'de> for ObjectVisitor {
    type Value = Object;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a Kubernetes object")
    }

    fn visit_unit<E: Error>(self) -> Result<Object, E> {
        Ok(Object::Empty)
    }

    fn visit_none<E: Error>(self) -> Result<Object, E> {
        Ok(Object::Empty)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Object, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
        let mut head = Head::default();
        let mut aside = VecDeque::new();
        let mut items = None;
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "apiVersion" => head.api_version = Some(map.next_value()?),
                "kind" => head.kind = Some(map.next_value()?),
                // A list may name its kind after its items (`kubectl get -o yaml`).
                "items" => items = Some(map.next_value::<Vec<Object>>()?),
                _ => match head.known() {
                    Some(kind) => {
                        let rest = Resumed {
                            aside,
                            value: None,
                            key: Some(key),
                            rest: map,
                        };
                        return kind.read(rest, items);
                    }
                    None => aside.push_back((key, map.next_value::<Value>()?)),
                },
            }
        }
        match head.known() {
            Some(kind) => kind.read(
                Resumed {
                    aside,
                    value: None,
                    key: None,
                    rest: map,
                },
                items,
            ),
            None if items.is_some() => Err(A::Error::custom("kind: is missing")),
            None => Ok(Object::Bare(head.give_back(aside))),
        }
    }
}

#[derive(Default)]
struct Head {
    api_version: Option<String>,
    kind: Option<String>,
}

impl Head {
    fn known(&self) -> Option<ObjectKind> {
        let both = (self.api_version.as_deref()?, self.kind.as_deref()?);
        Some(match both {
            ("v1", "Service") => ObjectKind::Service,
            ("discovery.k8s.io/v1", "EndpointSlice") => ObjectKind::EndpointSlice,
            ("v1", "Node") => ObjectKind::Node,
            ("networking.k8s.io/v1", "ServiceCIDR") => ObjectKind::ServiceCidr,
            ("v1", "List") => ObjectKind::List,
            ("v1", "ServiceList") => ObjectKind::ListOf(Items::Service),
            ("discovery.k8s.io/v1", "EndpointSliceList") => {
                ObjectKind::ListOf(Items::EndpointSlice)
            }
            ("v1", "NodeList") => ObjectKind::ListOf(Items::Node),
            ("networking.k8s.io/v1", "ServiceCIDRList") => ObjectKind::ListOf(Items::ServiceCidr),
            (api_version, kind) => ObjectKind::Other(format!("{api_version} {kind}")),
        })
    }

    fn give_back(self, aside: VecDeque<(String, Value)>) -> serde_json::Map<String, Value> {
        let Self { api_version, kind } = self;
        let head = [("apiVersion", api_version), ("kind", kind)];
        let head = head
            .into_iter()
            .filter_map(|(key, value)| Some((key.to_owned(), value?.into())));
        head.chain(aside).collect()
    }
}

enum ObjectKind {
    Service,
    EndpointSlice,
    Node,
    ServiceCidr,
    List,
    ListOf(Items),
    Other(String),
}

#[derive(Clone, Copy)]
enum Items {
    Service,
    EndpointSlice,
    Node,
    ServiceCidr,
}

impl ObjectKind {
    fn read<'de, A: MapAccess<'de>>(
        self,
        map: Resumed<A>,
        items: Option<Vec<Object>>,
    ) -> Result<Object, A::Error> {
        match self {
            Self::Service => typed(map).map(Object::Service),
            Self::EndpointSlice => typed(map).map(Object::EndpointSlice),
            Self::Node => typed(map).map(Object::Node),
            Self::ServiceCidr => typed(map).map(Object::ServiceCidr),
            Self::List => read_items(map, items).map(Object::List),
            Self::ListOf(kind) => {
                let items = read_items(map, items)?.into_iter();
                let items = items
                    .enumerate()
                    .map(|(index, item)| kind.typed(index, item));
                Ok(Object::List(items.collect::<Result<_, _>>()?))
            }
            Self::Other(kind) => {
                skip(map)?;
                Ok(Object::Other(kind))
            }
        }
    }
}

impl Items {
    /// Items of a typed list need not say their kind.
    fn typed<E: Error>(self, index: usize, item: Object) -> Result<Object, E> {
        fn read<T: for<'de> Deserialize<'de>, E: Error>(
            index: usize,
            map: serde_json::Map<String, Value>,
        ) -> Result<Box<T>, E> {
            serde_path_to_error::deserialize(Value::Object(map))
                .map(Box::new)
                .map_err(|error| {
                    E::custom(format!(
                        "items[{index}].{}: {}",
                        error.path(),
                        error.inner()
                    ))
                })
        }
        match (item, self) {
            (Object::Bare(map), Self::Service) => read(index, map).map(Object::Service),
            (Object::Bare(map), Self::EndpointSlice) => read(index, map).map(Object::EndpointSlice),
            (Object::Bare(map), Self::Node) => read(index, map).map(Object::Node),
            (Object::Bare(map), Self::ServiceCidr) => read(index, map).map(Object::ServiceCidr),
            (item, _) => Ok(item),
        }
    }
}

fn typed<'de, T: Deserialize<'de>, A: MapAccess<'de>>(map: Resumed<A>) -> Result<Box<T>, A::Error> {
    T::deserialize(MapAccessDeserializer::new(map)).map(Box::new)
}

fn read_items<'de, A: MapAccess<'de>>(
    mut map: Resumed<A>,
    found: Option<Vec<Object>>,
) -> Result<Vec<Object>, A::Error> {
    let mut found = found;
    while let Some(key) = map.next_key::<String>()? {
        if key == "items" {
            found = map.next_value()?;
        } else {
            map.next_value::<IgnoredAny>()?;
        }
    }
    Ok(found.unwrap_or_default())
}

fn skip<'de, A: MapAccess<'de>>(mut map: Resumed<A>) -> Result<(), A::Error> {
    while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
    Ok(())
}

/// A map of which some entries were read already: those put aside, then a key whose value is still to come, then the rest.
struct Resumed<A> {
    aside: VecDeque<(String, Value)>,
    /// Value of the key given out last, if it was put aside.
    value: Option<(String, Value)>,
    key: Option<String>,
    rest: A,
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Resumed<A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, A::Error> {
        if let Some((key, value)) = self.aside.pop_front() {
            self.value = Some((key.clone(), value));
            return seed.deserialize(key.into_deserializer()).map(Some);
        }
        match self.key.take() {
            Some(key) => seed.deserialize(key.into_deserializer()).map(Some),
            None => self.rest.next_key_seed(seed),
        }
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, A::Error> {
        let Some((key, value)) = self.value.take() else {
            return self.rest.next_value_seed(seed);
        };
        let mut track = serde_path_to_error::Track::new();
        let value = serde_path_to_error::Deserializer::new(value, &mut track);
        seed.deserialize(value)
            .map_err(|error| A::Error::custom(format!("{key}.{}: {error}", track.path())))
    }
}
