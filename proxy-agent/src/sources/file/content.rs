//! What one file holds: its text, read into objects of the model.

use std::{collections::BTreeMap, fmt, sync::Arc};

use super::{locate, object::Object};
use crate::model::{
    self, Effect, Node, NodeName, Service, ServiceCidr, ServiceCidrName, ServiceName, Slice,
    SliceName,
};

/// Identity of an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Key {
    Service(ServiceName),
    Slice(SliceName),
    /// The own one.
    Node,
    ServiceCidr(ServiceCidrName),
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(name) => write!(f, "Service {name}"),
            Self::Slice(name) => write!(f, "EndpointSlice {name}"),
            Self::Node => f.write_str("this Node"),
            Self::ServiceCidr(name) => write!(f, "ServiceCIDR {name}"),
        }
    }
}

/// An object that a file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    Service(Arc<Service>),
    Slice(Arc<Slice>),
    Node(Arc<Node>),
    ServiceCidr(Arc<ServiceCidr>),
    /// There, but not for this proxy.
    Excluded,
}

impl Value {
    pub(super) fn service(&self) -> Option<Arc<Service>> {
        if let Self::Service(service) = self {
            Some(Arc::clone(service))
        } else {
            None
        }
    }

    pub(super) fn slice(&self) -> Option<Arc<Slice>> {
        if let Self::Slice(slice) = self {
            Some(Arc::clone(slice))
        } else {
            None
        }
    }

    pub(super) fn node(&self) -> Option<Arc<Node>> {
        if let Self::Node(node) = self {
            Some(Arc::clone(node))
        } else {
            None
        }
    }

    pub(super) fn service_cidr(&self) -> Option<Arc<ServiceCidr>> {
        if let Self::ServiceCidr(cidr) = self {
            Some(Arc::clone(cidr))
        } else {
            None
        }
    }
}

/// Encoding of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Yaml,
    Json,
}

/// Something wrong in a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) line: Option<usize>,
    pub(super) what: String,
}

/// What a well-formed text says.
#[derive(Debug, Default)]
pub(super) struct Parsed {
    /// The objects, or why one is not used.
    pub(super) objects: BTreeMap<Key, Result<Value, Effect>>,
    pub(super) faults: Vec<Fault>,
    /// An object that could not even be named is missing.
    pub(super) has_nameless: bool,
    /// Kinds that the proxy does not use.
    pub(super) others: Vec<String>,
}

/// Reads a whole file.
///
/// # Errors
/// It is not well-formed, or a field has the wrong type.
pub(super) fn parse(text: &str, format: Format, here: &NodeName) -> Result<Parsed, Fault> {
    let mut reader = Reader {
        text,
        format,
        here,
        document: 0,
        parsed: Parsed::default(),
    };
    match format {
        Format::Yaml => {
            for document in serde_yaml_ng::Deserializer::from_str(text) {
                let object = serde_path_to_error::deserialize(document).map_err(|error| {
                    let line = error.inner().location().map(|location| location.line());
                    fault(&error, line)
                })?;
                reader.read(object, "")?;
                reader.document += 1;
            }
        }
        Format::Json => {
            let mut documents = serde_json::Deserializer::from_str(text);
            // Anything but white space is another document.
            while documents.end().is_err() {
                let object = serde_path_to_error::deserialize(&mut documents)
                    .map_err(|error| fault(&error, Some(error.inner().line())))?;
                reader.read(object, "")?;
                reader.document += 1;
            }
        }
    }
    Ok(reader.parsed)
}

fn fault<E: fmt::Display>(error: &serde_path_to_error::Error<E>, line: Option<usize>) -> Fault {
    let path = error.path().to_string();
    let text = error.inner().to_string();
    // Both parsers append the place, and one prepends the path.
    let text = text
        .strip_prefix(&path)
        .map_or(text.as_str(), |rest| rest.trim_start_matches(": "));
    let text = text.rsplit_once(" at line ").map_or(text, |(text, _)| text);
    let what = if path == "." {
        text.to_owned()
    } else {
        format!("{path}: {text}")
    };
    Fault {
        line: line.filter(|line| *line > 0),
        what: format!("{what}; the file's last good content stays in use"),
    }
}

/// Faults of one file that are given a line: each costs another reading of the text.
const LOCATED: usize = 20;

struct Reader<'a> {
    text: &'a str,
    format: Format,
    here: &'a NodeName,
    /// Number of the document being read.
    document: usize,
    parsed: Parsed,
}

impl Reader<'_> {
    /// What is used of an object; what of it is left out is reported.
    fn value<V>(
        &mut self,
        read: Result<Option<(V, Vec<model::Problem>)>, model::Problem>,
        kind: fn(Arc<V>) -> Value,
        path: &str,
    ) -> Result<Value, model::Problem> {
        let Some((value, trimmed)) = read? else {
            return Ok(Value::Excluded);
        };
        for problem in trimmed {
            self.report(&problem, path);
        }
        Ok(kind(Arc::new(value)))
    }

    /// Reads one object, found at `path` of its document.
    fn read(&mut self, object: Object, path: &str) -> Result<(), Fault> {
        match object {
            Object::Service(object) => {
                let name = Service::name(&object);
                let value = self.value(Service::parse(&object), Value::Service, path);
                self.add(name.map(Key::Service), value, path);
            }
            Object::EndpointSlice(object) => {
                let name = Slice::name(&object);
                let value = self.value(Slice::parse(&object, self.here), Value::Slice, path);
                self.add(name.map(Key::Slice), value, path);
            }
            Object::Node(object) => match Node::name(&object) {
                Ok(name) if name == *self.here => {
                    let node = Value::Node(Arc::new(Node::parse(&object)));
                    self.add(Ok(Key::Node), Ok(node), path);
                }
                Ok(_) => {}
                Err(problem) => self.report(&problem, path),
            },
            Object::ServiceCidr(object) => {
                let name = ServiceCidr::name(&object);
                let value = ServiceCidr::parse(&object).map(|(cidr, left_out)| {
                    for problem in left_out {
                        self.report(&problem, path);
                    }
                    Value::ServiceCidr(Arc::new(cidr))
                });
                self.add(name.map(Key::ServiceCidr), value, path);
            }
            Object::List(items) => {
                for (index, item) in items.into_iter().enumerate() {
                    self.read(item, &format!("{path}items[{index}]."))?;
                }
            }
            Object::Other(kind) => self.parsed.others.push(kind),
            Object::Bare(_) => return Err(self.kindless(path)),
            Object::Empty => {}
        }
        Ok(())
    }

    fn add(
        &mut self,
        key: Result<Key, model::Problem>,
        value: Result<Value, model::Problem>,
        path: &str,
    ) {
        let key = match key {
            Ok(key) => key,
            Err(problem) => {
                self.parsed.has_nameless = true;
                return self.report(&problem, path);
            }
        };
        if self.parsed.objects.contains_key(&key) {
            let line = self.line(&format!("{path}metadata.name"));
            let what = format!("{key} is in this file twice; this one is ignored");
            return self.parsed.faults.push(Fault { line, what });
        }
        if let Err(problem) = &value {
            self.report(problem, path);
        }
        let value = value.map_err(|problem| problem.effect);
        self.parsed.objects.insert(key, value);
    }

    fn report(&mut self, problem: &model::Problem, path: &str) {
        let line = self.line(&format!("{path}{}", problem.field));
        self.parsed.faults.push(Fault {
            line,
            what: problem.to_string(),
        });
    }

    fn line(&self, path: &str) -> Option<usize> {
        if self.parsed.faults.len() >= LOCATED {
            return None;
        }
        locate::line(self.text, self.format, self.document, path)
    }

    fn kindless(&self, path: &str) -> Fault {
        Fault {
            line: self.line(path),
            what: format!(
                "{path}apiVersion, {path}kind: one of them is missing; the file's last good content stays in use"
            ),
        }
    }
}

#[cfg(test)]
mod tests;
