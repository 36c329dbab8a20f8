//! Where the model comes from: the Kubernetes API ([`kubernetes`]) or a folder of manifests ([`file`]), and the node's own
//! addresses ([`node`]).
//!
//! Each source sends [`Update`]s, the first of them everything that it has.

use std::{collections::BTreeSet, fmt, path::PathBuf};

use tokio::sync::{mpsc, watch};

use crate::{
    events::Events,
    metrics::RestClientMetrics,
    model::{NodeName, Update},
};

pub mod file;
pub mod kubernetes;
pub mod node;

/// Where Services come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A folder of manifests.
    Manifests(PathBuf),
    /// The API server.
    Kubernetes(kubernetes::Access),
}

/// Why Services cannot be followed at all.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The folder of manifests cannot.
    #[error(transparent)]
    Manifests(#[from] file::Error),
    /// The API server cannot.
    #[error(transparent)]
    Kubernetes(#[from] kubernetes::Error),
}

/// What is followed beside Services, EndpointSlices and the own Node. Of files everything is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Pods of this node.
    pub pods: bool,
    /// ServiceCIDRs.
    pub service_cidrs: bool,
}

impl Origin {
    /// Starts to follow it, and what else is `wanted`. The first update is everything that is there. What is wrong with it is
    /// also logged, once.
    ///
    /// # Errors
    /// It cannot be followed.
    pub fn start(
        &self,
        here: NodeName,
        updates: mpsc::Sender<Update>,
        wanted: Wanted,
        metrics: &RestClientMetrics,
    ) -> Result<Followed, Error> {
        Ok(match self {
            Self::Manifests(folder) => Followed {
                problems: file::start(folder, here, updates)?,
                events: Events::default(),
                opted_out: None,
            },
            Self::Kubernetes(access) => kubernetes::start(access, here, updates, wanted, metrics)?,
        })
    }
}

/// What belongs to a source that is followed.
#[derive(Debug)]
pub struct Followed {
    /// What is wrong with it now.
    pub problems: watch::Receiver<Vec<Problem>>,
    /// Takes what the cluster is to be told; files tell nobody.
    pub events: Events,
    /// The unique ids of this node's pods that ask for their sockets to be left alone, if that was wanted.
    pub opted_out: Option<watch::Receiver<BTreeSet<String>>>,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Manifests(_) => f.write_str("manifests"),
            Self::Kubernetes(_) => f.write_str("Kubernetes API"),
        }
    }
}

/// Something in a source that is not as it should be. Goes away when it is mended.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// The file or folder, the object of the API, or its kind.
    pub place: String,
    /// Line in the file, from 1.
    pub line: Option<usize>,
    /// What is wrong, in which field, and what was done.
    pub what: String,
}

impl fmt::Display for Problem {
    /// "place:line: what".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { place, line, what } = self;
        f.write_str(place)?;
        if let Some(line) = line {
            write!(f, ":{line}")?;
        }
        write!(f, ": {what}")
    }
}
