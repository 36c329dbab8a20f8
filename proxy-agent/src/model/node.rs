//! The node that the agent runs on.

use std::{fmt, sync::Arc};

use k8s_openapi::api::core::v1;

use super::{
    problem::{Blame, Kind, Problem},
    text,
};

const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// A Node's name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeName(Arc<str>);

impl NodeName {
    /// The node called `name`.
    pub fn new(name: &str) -> Self {
        Self(name.into())
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What the proxy needs of its Node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// The zone label, if it is there and not empty.
    pub zone: Option<Arc<str>>,
}

impl Node {
    /// The name of `object`.
    ///
    /// # Errors
    /// It is no possible name.
    pub fn name(object: &v1::Node) -> Result<NodeName, Problem> {
        let name = object.metadata.name.as_deref().unwrap_or_default();
        let blame = Blame::new(Kind::Node, None, name);
        text::subdomain(name).map_err(|what| blame.refuse("metadata.name", what))?;
        Ok(NodeName::new(name))
    }

    /// Reads a Node.
    pub fn parse(object: &v1::Node) -> Self {
        let labels = object.metadata.labels.as_ref();
        let zone = labels.and_then(|labels| labels.get(ZONE_LABEL));
        Self {
            zone: zone
                .filter(|zone| !zone.is_empty())
                .map(|zone| zone.as_str().into()),
        }
    }
}
