//! Taking the rules of a packet layer away: `cleanup`, and an agent that runs without one.

use super::{
    IptablesBackend, Key, Rules,
    tables::{Table, Tables},
};
use crate::{
    backends::{Backend as _, Error},
    plan::Plan,
    state::{DesiredState, Family},
};

/// A chain that kube-proxy keeps to learn when somebody flushes its rules (pkg/util/iptables/monitor.go).
const CANARY: &str = ":KUBE-PROXY-CANARY ";

/// Removes every chain of ours, those that kube-proxy has too among them, what leads to them, and the address sets; nothing
/// where no agent left any. Beside a kube-proxy only chains that no kube-proxy makes. Says how many entries that were.
///
/// # Errors
/// A table could not be read or changed.
pub fn remove_own<T: Tables>(tables: T) -> Result<usize, Error> {
    let mut backend = IptablesBackend::new(tables, Rules::any());
    let found = backend.observe()?;
    if !found.keys().any(Key::is_ours_alone) {
        return Ok(0);
    }
    let nat = backend.tables.save(Family::V4, Table::Nat)?;
    let is_beside = nat.contains(CANARY);
    let mut plan = Plan {
        upserts: Vec::new(),
        deletions: found
            .keys()
            .filter(|key| !is_beside || is_spare(key))
            .cloned()
            .collect(),
    };
    let removed = plan.deletions.len();
    backend.spare_referenced(&found, &mut plan);
    backend.apply(&plan, &DesiredState::default())?;
    Ok(removed)
}

/// Whether it may go beside a kube-proxy. Sets may be used by rules that it has not replaced yet.
fn is_spare(key: &Key) -> bool {
    matches!(key, Key::Chain(..)) && key.is_ours_alone()
}
