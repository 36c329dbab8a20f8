//! What a layer says of itself.

use std::time::Instant;

use tokio::sync::watch;

/// How a layer is doing.
#[derive(Clone, Debug, Default)]
pub struct SyncStatus {
    /// Which layer: "socket", "packet".
    pub layer: &'static str,
    /// The kernel has held a complete desired state since the agent started, or somebody else's that is only observed.
    pub is_synced: bool,
    /// The kernel holds a complete desired state that this layer keeps: not somebody else, whom it observes.
    pub is_serving: bool,
    /// Why not, or what went wrong last; none after a success.
    pub last_error: Option<String>,
    /// End of the last sync without an error.
    pub last_success: Option<Instant>,
    /// Counts syncs that changed something.
    pub generation: u64,
    /// Service ports and addresses that the kernel holds.
    pub entries: usize,
}

impl SyncStatus {
    /// Where the layer called `layer` will say how it is doing.
    pub fn channel(layer: &'static str) -> watch::Sender<Self> {
        watch::Sender::new(Self {
            layer,
            ..Self::default()
        })
    }
}
