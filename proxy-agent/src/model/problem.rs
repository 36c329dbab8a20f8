//! What is wrong with an object, and what was done about it.

use std::fmt;

/// Kind of an API object that the model understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// v1 Service.
    Service,
    /// discovery.k8s.io/v1 EndpointSlice.
    EndpointSlice,
    /// v1 Node.
    Node,
    /// v1 Pod.
    Pod,
    /// networking.k8s.io/v1 ServiceCIDR.
    ServiceCidr,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
            Self::Pod => "Pod",
            Self::ServiceCidr => "ServiceCIDR",
        })
    }
}

/// What becomes of the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Effect {
    /// Refused whole; its last good version stays.
    Refused,
    /// Left out because it has no ClusterIP; without an earlier version nothing of it can be in the kernel.
    Skipped,
    /// Ports, endpoints or networks of it are left out; the rest is used.
    Trimmed,
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Refused => "the object is refused, its last good version stays in use",
            Self::Skipped => "the Service is skipped, an earlier version with one stays in use",
            Self::Trimmed => "left out, the rest is used",
        })
    }
}

/// Something impossible in an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
#[error("{kind} {object}: {field}: {what}; {effect}")]
pub struct Problem {
    /// Kind of the object.
    pub kind: Kind,
    /// "namespace/name", shortened if it is absurdly long.
    pub object: String,
    /// Path of the field: `spec.ports[0].port`.
    pub field: String,
    /// What is wrong with it.
    pub what: String,
    /// What was done.
    pub effect: Effect,
}

/// Where problems of one object are made: knows its kind and name.
#[derive(Clone, Debug)]
pub(super) struct Blame {
    kind: Kind,
    object: String,
}

impl Blame {
    pub(super) fn new(kind: Kind, namespace: Option<&str>, name: &str) -> Self {
        let object = match namespace {
            Some(namespace) => format!("{}/{}", shorten(namespace), shorten(name)),
            None => shorten(name),
        };
        Self { kind, object }
    }

    pub(super) fn refuse(&self, field: impl Into<String>, what: impl Into<String>) -> Problem {
        self.problem(field.into(), what.into(), Effect::Refused)
    }

    pub(super) fn skip(&self, field: impl Into<String>, what: impl Into<String>) -> Problem {
        self.problem(field.into(), what.into(), Effect::Skipped)
    }

    pub(super) fn trim(&self, field: impl Into<String>, what: impl Into<String>) -> Problem {
        self.problem(field.into(), what.into(), Effect::Trimmed)
    }

    fn problem(&self, field: String, what: String, effect: Effect) -> Problem {
        Problem {
            kind: self.kind,
            object: self.object.clone(),
            field,
            what,
            effect,
        }
    }
}

/// Characters of somebody else's text that a message repeats.
const SHOWN: usize = 80;

/// `text` as far as a message should repeat it, without control characters.
pub(super) fn shorten(text: &str) -> String {
    let shown: String = text
        .chars()
        .take(SHOWN)
        .flat_map(char::escape_debug)
        .collect();
    let bytes = text.len();
    if text.chars().nth(SHOWN).is_some() {
        format!("{shown}... ({bytes} bytes)")
    } else {
        shown
    }
}
