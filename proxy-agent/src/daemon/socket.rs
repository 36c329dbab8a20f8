//! The thread on which the socket layer lives, and what it does there beside syncing.

use std::{
    io,
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
};

use super::{exclude::Exclusions, lock, reaper::Reaper, self_test};
use crate::{
    backends::ebpf::{EbpfBackend, kernel::KernelStore},
    compile::Compiler,
    metrics::Metrics,
    model::{Dirty, Model},
    sync::{Compiled, Inbox, Layer, Moment, Scope, SyncStatus},
};

/// What the kernel needs beside the entries of its maps.
#[derive(Debug)]
pub struct Tending {
    /// Cgroups to leave alone.
    pub exclusions: Exclusions,
    /// Ends UDP sockets of dead backends.
    pub reaper: Reaper,
}

/// Starts the thread.
///
/// # Errors
/// There is none to be had.
pub fn start(
    layer: Layer<EbpfBackend<KernelStore>>,
    tending: Tending,
    inbox: Arc<Inbox>,
    model: Arc<Mutex<Model>>,
    metrics: Arc<Metrics>,
) -> io::Result<JoinHandle<()>> {
    let mut compiler = Compiler::default();
    let compile = move |scope: &Scope| {
        let compiled = compile(&mut compiler, &lock(&model), scope);
        let count = compiler.problems().count();
        metrics
            .problems
            .set(i64::try_from(count).unwrap_or(i64::MAX));
        compiled
    };
    let work = move || {
        layer.run(&inbox, compile, |backend, status, moment| {
            tend(backend, status, moment, &tending);
        });
    };
    thread::Builder::new()
        .name("socket-layer".to_owned())
        .spawn(work)
}

/// Compiles what changed and logs each problem once, when it comes up.
fn compile(compiler: &mut Compiler, model: &Model, scope: &Scope) -> Compiled {
    let compiled = match scope {
        Scope::All => compiler.compile_all(model),
        Scope::Part(dirty) => compiler.compile(model, dirty),
    };
    for problem in &compiled.problems {
        tracing::warn!(service = %problem.service(), error = %problem, "not carried out");
    }
    let mut state = compiled.state;
    let scope = match scope {
        Scope::All => {
            self_test::add_canary(&mut state);
            Scope::All
        }
        Scope::Part(_) => Scope::Part(Dirty {
            services: compiled.services_in_scope,
            addresses: compiled.addresses_in_scope,
        }),
    };
    Compiled { scope, state }
}

fn tend(
    backend: &mut EbpfBackend<KernelStore>,
    status: &SyncStatus,
    moment: Moment,
    tending: &Tending,
) {
    let Tending { exclusions, reaper } = tending;
    match moment {
        Moment::Turn => {
            if backend.take_udp_retired() {
                reaper.ask();
            }
        }
        Moment::Second => {
            // The heartbeat vouches for a complete state, so it waits for the first one (docs/ARCHITECTURE.md).
            if status.is_synced {
                backend.store().heartbeat();
            }
            if !exclusions.is_empty()
                && let Err(error) = backend.store_mut().set_opt_out(&exclusions.cgroups())
            {
                tracing::warn!(error = format!("{error:#}"), "cannot exclude cgroups");
            }
        }
    }
}
