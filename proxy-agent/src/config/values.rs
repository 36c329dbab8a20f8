//! How values of the file are read and written: text that may be a number, Go's durations, numbers with a range.

use std::{fmt, marker::PhantomData, net::SocketAddr, str::FromStr, time::Duration};

use ipnet::IpNet;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{Error as _, MapAccess, Visitor, value::MapAccessDeserializer},
};
use serde_json::Value;

use crate::cli::{HEALTHZ_PORT, Listen, METRICS_PORT, duration, duration_text};

/// Whether a field says nothing.
pub fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// null is the default.
pub fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// A section of the file: fields, or null for none of them. serde would also take a list for a struct.
pub fn section<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    struct Fields<T>(PhantomData<T>);

    impl<'de, T: Default + Deserialize<'de>> Visitor<'de> for Fields<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("fields")
        }

        fn visit_unit<E>(self) -> Result<T, E> {
            Ok(T::default())
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
            T::deserialize(MapAccessDeserializer::new(map))
        }
    }

    deserializer.deserialize_any(Fields(PhantomData))
}

/// Text; numbers and booleans without quotes too, as kube-proxy takes them.
pub fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    match Value::deserialize(deserializer)? {
        Value::Null => Ok(String::new()),
        Value::String(text) => Ok(text),
        Value::Bool(value) => Ok(value.to_string()),
        Value::Number(number) => Ok(number.to_string()),
        Value::Array(_) | Value::Object(_) => Err(D::Error::custom("expected text")),
    }
}

/// A boolean; its words of YAML 1.1 too, as kube-proxy takes them.
pub fn perhaps_boolean<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<bool>, D::Error> {
    let text = match Value::deserialize(deserializer)? {
        Value::Null => return Ok(None),
        Value::Bool(value) => return Ok(Some(value)),
        Value::String(text) => text.to_lowercase(),
        Value::Number(_) | Value::Array(_) | Value::Object(_) => String::new(),
    };
    match text.as_str() {
        "yes" | "on" | "y" => Ok(Some(true)),
        "no" | "off" | "n" => Ok(Some(false)),
        _ => Err(D::Error::custom("expected true or false")),
    }
}

/// As [`perhaps_boolean`]; null is false.
pub fn boolean<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    Ok(perhaps_boolean(deserializer)?.unwrap_or_default())
}

/// Text that stands for something; empty text and null are none.
pub mod parsed {
    use super::*;

    /// As text.
    pub fn serialize<S, T>(value: &Option<T>, serializer: S) -> Result<S::Ok, S::Error>
    where
        S: Serializer,
        T: fmt::Display,
    {
        match value {
            Some(value) => serializer.collect_str(value),
            None => serializer.serialize_str(""),
        }
    }

    /// From text.
    pub fn deserialize<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
    where
        D: Deserializer<'de>,
        T: FromStr<Err: fmt::Display>,
    {
        let text = text(deserializer)?;
        match text.is_empty() {
            true => Ok(None),
            false => text
                .parse()
                .map(Some)
                .map_err(|error| wrong::<D, T>(&text, error)),
        }
    }
}

fn wrong<'de, D: Deserializer<'de>, T: FromStr<Err: fmt::Display>>(
    text: &str,
    error: T::Err,
) -> D::Error {
    let error = error.to_string();
    D::Error::custom(match error.contains(text) {
        true => error,
        false => format!("{text:?}: {error}"),
    })
}

/// Go's durations; null is none at all.
pub mod perhaps_time {
    use super::*;

    /// As text.
    pub fn serialize<S: Serializer>(
        value: &Option<Duration>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        value.map(duration_text).serialize(serializer)
    }

    /// From text.
    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Duration>, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::Null => Ok(None),
            Value::String(text) => duration(&text).map(Some).map_err(D::Error::custom),
            Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => Err(
                D::Error::custom("expected a duration in quotes or with a unit, like 30s"),
            ),
        }
    }
}

/// Go's durations; null is zero.
pub mod time {
    use super::*;

    /// As text.
    pub fn serialize<S: Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        duration_text(*value).serialize(serializer)
    }

    /// From text.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        Ok(perhaps_time::deserialize(deserializer)?.unwrap_or_default())
    }
}

/// A whole number from `LEAST` to `MOST`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Within<const LEAST: i64, const MOST: i64>(i64);

impl<const LEAST: i64, const MOST: i64> Within<LEAST, MOST> {
    /// The number; `None` if it is out of range.
    pub fn new(number: i64) -> Option<Self> {
        (LEAST..=MOST).contains(&number).then_some(Self(number))
    }

    /// As whatever has room for the range.
    ///
    /// # Panics
    /// It has not.
    pub fn to<T: TryFrom<i64, Error: fmt::Debug>>(self) -> T {
        T::try_from(self.0).expect("the type has room for the range")
    }
}

impl<'de, const LEAST: i64, const MOST: i64> Deserialize<'de> for Within<LEAST, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = i64::deserialize(deserializer)?;
        Self::new(number).ok_or_else(|| {
            D::Error::custom(format!(
                "{number} must be within the range [{LEAST}, {MOST}]"
            ))
        })
    }
}

/// Something that is written as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Text<T>(pub T);

impl<T: fmt::Display> Serialize for Text<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de, T: FromStr<Err: fmt::Display>> Deserialize<'de> for Text<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = text(deserializer)?;
        let parsed = text.parse();
        parsed
            .map(Self)
            .map_err(|error| wrong::<D, T>(&text, error))
    }
}

/// Where a server listens; the port may be missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenAt<const PORT: u16>(pub SocketAddr);

/// Address of the health server.
pub type Healthz = ListenAt<HEALTHZ_PORT>;
/// Address of the metrics server.
pub type Metrics = ListenAt<METRICS_PORT>;

impl<const PORT: u16> FromStr for ListenAt<PORT> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let listen = Listen::parse(text, PORT)?;
        listen.0.map(Self).ok_or_else(|| "it is empty".to_owned())
    }
}

impl<const PORT: u16> fmt::Display for ListenAt<PORT> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Networks with commas between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Networks(pub Vec<IpNet>);

impl FromStr for Networks {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let networks = text.split(',').map(|network| {
            let network = network.trim();
            let parsed = network.parse();
            parsed.map_err(|_| format!("{network:?} is no network like 10.244.0.0/16"))
        });
        networks.collect::<Result<_, _>>().map(Self)
    }
}

impl fmt::Display for Networks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, network) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str(",")?;
            }
            network.fmt(f)?;
        }
        Ok(())
    }
}

/// A lease: 3 s to a day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease(pub Duration);

impl FromStr for Lease {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let lease = duration(text)?;
        let is_possible = (3..=86_400).contains(&lease.as_secs());
        let wrong = || format!("{text:?} must be 3s to 24h: the agent renews it every second");
        is_possible.then_some(Self(lease)).ok_or_else(wrong)
    }
}

impl fmt::Display for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&duration_text(self.0))
    }
}
