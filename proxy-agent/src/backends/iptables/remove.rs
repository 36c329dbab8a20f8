//! Taking the rules of a packet layer away: `cleanup`, and an agent that runs without one.

use super::{IptablesBackend, Key, Rules, tables::Tables};
use crate::{
    backends::{Backend as _, Error},
    plan::Plan,
    state::DesiredState,
};

/// What a clean-up did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// How many entries went.
    pub entries: usize,
    /// Chains that rules of somebody else lead to: emptied, and still there.
    pub kept: Vec<Key>,
}

/// Which chains go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Those that no kube-proxy makes: one that shares the others with us runs.
    OursAlone,
    /// Those that kube-proxy has too as well; beside a canary, as if one ran, and none where no agent left any.
    Ours,
    /// The same, whoever left them.
    Everything,
}

/// Removes chains, what leads to them, and the address sets.
///
/// # Errors
/// A table could not be read or changed.
pub fn remove<T: Tables>(tables: T, extent: Extent) -> Result<Removed, Error> {
    let rules = Rules {
        families: tables.families(),
        ..Rules::any()
    };
    let mut backend = IptablesBackend::new(tables, rules);
    let found = backend.observe()?;
    if extent != Extent::Everything && !found.keys().any(Key::is_ours_alone) {
        return Ok(Removed::default());
    }
    let is_beside = match extent {
        Extent::OursAlone => true,
        Extent::Ours => backend.has_canaries(),
        Extent::Everything => false,
    };
    let mut plan = Plan {
        upserts: Vec::new(),
        deletions: found
            .keys()
            .filter(|key| !is_beside || is_spare(key))
            .cloned()
            .collect(),
    };
    let kept = plan.deletions.iter();
    let kept = kept.filter(|key| backend.is_referenced(key)).cloned();
    let kept = kept.collect();
    backend.spare_referenced(&found, &mut plan);
    backend.apply(&plan, &DesiredState::default())?;
    Ok(Removed {
        entries: plan.deletions.len(),
        kept,
    })
}

/// Whether it may go beside a kube-proxy. Sets may be used by rules that it has not replaced yet.
fn is_spare(key: &Key) -> bool {
    matches!(key, Key::Chain(..)) && key.is_ours_alone()
}
