//! What the sources ask for now: read once, by the code that `run` follows them with.

use std::time::Duration;

use tokio::{sync::mpsc, time::timeout};

use super::Error;
use crate::{
    cli::{Global, Layers, Sources},
    compile::{self, Compiler},
    daemon::{
        self,
        place::{self, node_name},
    },
    metrics::RestClientMetrics,
    sources::{self, Origin, Wanted, node},
    state::DesiredState,
};

/// An API server is waited for this long; files are there at once.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the sources ask for.
#[derive(Debug)]
pub struct Desired {
    /// The state of the whole node.
    pub state: DesiredState,
    /// Nothing is missing: `run` would also delete.
    pub is_complete: bool,
    /// What is wrong in the source of Services.
    pub broken: Vec<sources::Problem>,
    /// What of the Services is not carried out.
    pub problems: Vec<compile::Problem>,
}

/// Reads a source of Services and the node's addresses, and compiles them.
///
/// # Errors
/// A source cannot be read, or does not answer in time.
pub fn read(
    global: &Global,
    sources: &Sources,
    layers: &Layers,
    origin: &Origin,
) -> Result<Desired, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|source| daemon::Error::Process {
        what: "the runtime",
        source,
    })?;
    runtime.block_on(async {
        let here = node_name(global)?;
        let mut model = place::model(here.clone(), sources);
        let (updates, mut received) = mpsc::channel(1);
        let wanted = Wanted {
            pods: false,
            service_cidrs: layers.drops_unallocated(),
        };
        let broken = origin.start(here, updates.clone(), wanted, &RestClientMetrics::default());
        let broken = broken.map_err(daemon::Error::from)?.problems;
        node::start(updates).map_err(daemon::Error::from)?;
        let read = async {
            while !model.is_synced() {
                let update = received.recv().await;
                model.apply(update.ok_or(daemon::Error::Ended("sources"))?);
            }
            Ok::<(), Error>(())
        };
        let in_time = timeout(PATIENCE, read).await;
        in_time.map_err(|_| Error::Silent {
            origin: origin.clone(),
            patience: PATIENCE,
            problems: broken.borrow().iter().map(|of| format!("; {of}")).collect(),
        })??;
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
