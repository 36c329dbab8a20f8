//! The tools of the packet layer: where they come from, and what there is to say of them.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::watch;

use super::Place;
use crate::{
    backends::iptables::{
        IptablesBackend,
        host::{Host, Owner, affinity::AffinityRoom, is_in_kernel},
        tables::Tables as _,
        watch::Watched,
    },
    metrics::Metrics,
    sync::{Inbox, SyncStatus},
};

/// After the first time that the tools did not work; doubles with each.
const FIRST_TRY: Duration = Duration::from_secs(1);
/// Longest wait between two tries of tools that do not work.
const LAST_TRY: Duration = Duration::from_secs(30);

/// Between two tries of a family whose tools do not work, while the other one's do.
const TRY_FAMILIES: Duration = Duration::from_secs(5);

/// Where the layer's tools come from.
#[derive(Debug)]
pub enum Tools {
    /// They are here: nothing else serves the node.
    Found(Host),
    /// Looked for on the layer's own thread until they work: whatever they lack or wait for is not the socket layer's trouble.
    Awaited(Arc<Owner>),
}

impl Tools {
    pub(super) fn place(&self) -> Place {
        match self {
            Self::Found(_) => Place::Alone,
            Self::Awaited(_) => Place::BesideSockets,
        }
    }

    /// Waits until they work. None if the agent stops first.
    pub(super) fn wait(self, inbox: &Inbox, status: &watch::Sender<SyncStatus>) -> Option<Host> {
        let owner = match self {
            Self::Found(host) => return Some(host),
            Self::Awaited(owner) => owner,
        };
        let mut wait = FIRST_TRY;
        loop {
            let error = match Host::open(Arc::clone(&owner)) {
                Ok(host) => return Some(host),
                Err(error) => Some(format!("{error:#}")),
            };
            if status.borrow().last_error != error {
                tracing::error!(
                    error,
                    "no packet layer yet: what arrives from outside this node is not served, or as a former agent left it; trying again"
                );
                status.send_modify(|status| status.last_error = error);
            }
            if inbox.rest(Instant::now() + wait) {
                return None;
            }
            wait = (2 * wait).min(LAST_TRY);
        }
    }
}

/// Families whose tools do not work, while the other one's do.
#[derive(Debug)]
pub(super) struct LateFamilies {
    try_at: Instant,
}

impl Default for LateFamilies {
    fn default() -> Self {
        Self {
            try_at: Instant::now() + TRY_FAMILIES,
        }
    }
}

impl LateFamilies {
    /// Tries them now and then. Has those served whose tools work, and says whether there is one: then everything has to be
    /// planned again.
    pub(super) fn tend(
        &mut self,
        backend: &mut IptablesBackend<Watched<Host>>,
        metrics: &Metrics,
    ) -> bool {
        if Instant::now() < self.try_at {
            return false;
        }
        self.try_at = Instant::now() + TRY_FAMILIES;
        let is_news = backend.tables_mut().try_again();
        if is_news {
            let host = backend.tables().host();
            let families = host.families();
            tracing::info!(?families, "the tools of one more family work: it is served");
            tell_families(host, metrics);
            backend.serve(families);
        }
        is_news
    }
}

/// Says what was found.
pub(super) fn tell_tools(host: &Host, metrics: &Metrics) {
    tracing::info!(variant = %host.variant(), why = host.why(), version = host.version(), features = ?host.features(), "iptables");
    if let Some(stale) = host.choice().stale {
        tracing::warn!("{stale}");
    }
    let room = AffinityRoom::of(host.features());
    metrics.affinity_clients.set(room.clients().into());
    if room != AffinityRoom::Sets {
        tracing::warn!("session affinity: {room}");
    }
    tell_families(host, metrics);
}

/// Says which families are not served, and counts those that should be.
fn tell_families(host: &Host, metrics: &Metrics) {
    let mut failed = 0;
    for (family, error) in host.lacks() {
        if is_in_kernel(*family) {
            failed += 1;
            tracing::error!(%family, error, "what arrives over this family is not served; trying again");
        } else {
            tracing::info!(%family, "this kernel has no such addresses: nothing of the kind arrives");
        }
    }
    metrics.families_failed.set(failed);
}
