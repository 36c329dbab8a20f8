//! What the sources ask for now: read once, by the code that `run` follows them with.

use std::path::Path;

use tokio::sync::mpsc;

use super::Error;
use crate::{
    cli::{Global, Sources},
    compile::{self, Compiler},
    daemon::{
        self,
        place::{node_name, node_ports},
    },
    model::Model,
    sources::{self, file, node},
    state::DesiredState,
};

/// What the sources ask for.
#[derive(Debug)]
pub struct Desired {
    /// The state of the whole node.
    pub state: DesiredState,
    /// Nothing is missing: `run` would also delete.
    pub is_complete: bool,
    /// Broken manifests.
    pub broken: Vec<sources::Problem>,
    /// What of the Services is not carried out.
    pub problems: Vec<compile::Problem>,
}

/// Reads manifests and the node's addresses, and compiles them.
///
/// # Errors
/// A source cannot be read.
pub fn read(global: &Global, sources: &Sources, manifests: &Path) -> Result<Desired, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|source| daemon::Error::Process {
        what: "the runtime",
        source,
    })?;
    runtime.block_on(async {
        let here = node_name(global)?;
        let mut model = Model::new(here.clone()).with_node_ports(node_ports(sources));
        let (updates, mut received) = mpsc::channel(1);
        let broken = file::start(manifests, here, updates.clone()).map_err(daemon::Error::from)?;
        node::start(updates).map_err(daemon::Error::from)?;
        while !model.is_synced() {
            let update = received
                .recv()
                .await
                .ok_or(daemon::Error::Ended("sources"))?;
            model.apply(update);
        }
        let mut compiler = Compiler::default();
        let state = compiler.compile_all(&model).state;
        Ok(Desired {
            state,
            is_complete: model.is_complete(),
            broken: broken.borrow().clone(),
            problems: compiler.problems().cloned().collect(),
        })
    })
}
