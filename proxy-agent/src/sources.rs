//! Where the model comes from: folders of Kubernetes manifests ([`file`]) and the node's own addresses ([`node`]).
//!
//! Each source sends [`Update`](crate::model::Update)s, the first of them everything that it has.

use std::{fmt, path::PathBuf};

pub mod file;
pub mod node;

/// Something in a source that is not as it should be. Goes away when it is mended.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// The file or folder.
    pub path: PathBuf,
    /// Line in the file, from 1.
    pub line: Option<usize>,
    /// What is wrong, in which field, and what was done.
    pub what: String,
}

impl fmt::Display for Problem {
    /// "path:line: what".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, line, what } = self;
        write!(f, "{}", path.display())?;
        if let Some(line) = line {
            write!(f, ":{line}")?;
        }
        write!(f, ": {what}")
    }
}
