//! `plan`: what `run` would change.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
};

use serde::Serialize;

use super::print::{Report, columns};
use crate::plan::Plan;

/// One change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    /// "socket" or "packet".
    pub layer: &'static str,
    /// "add", "change" or "remove".
    pub action: &'static str,
    /// What it is about.
    pub object: String,
}

/// `plan`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Changes(pub Vec<Change>);

/// What a plan does in one layer to what was observed, in the order of the plan.
pub fn changes<K: Ord + Display, V>(
    layer: &'static str,
    plan: &Plan<K, V>,
    observed: &BTreeMap<K, V>,
) -> Vec<Change> {
    let known: BTreeSet<&K> = observed.keys().collect();
    let upserts = plan.upserts.iter().map(|(key, _)| Change {
        layer,
        action: if known.contains(key) { "change" } else { "add" },
        object: key.to_string(),
    });
    let deletions = plan.deletions.iter().map(|key| Change {
        layer,
        action: "remove",
        object: key.to_string(),
    });
    upserts.chain(deletions).collect()
}

impl Report for Changes {
    fn table(&self) -> String {
        if self.0.is_empty() {
            return "nothing would change".to_owned();
        }
        let row = |change: &Change| {
            [
                change.layer.to_owned(),
                change.action.to_owned(),
                change.object.clone(),
            ]
        };
        columns(
            ["LAYER", "ACTION", "WHAT"],
            &self.0.iter().map(row).collect::<Vec<_>>(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::diff;

    #[test]
    fn a_plan_tells_additions_from_changes() {
        let observed = BTreeMap::from([(1, 'a'), (2, 'b'), (3, 'c')]);
        let desired = BTreeMap::from([(2, 'x'), (3, 'c'), (4, 'd')]);
        let changes = changes("socket", &diff(&observed, &desired), &observed);
        assert_eq!(
            Changes(changes).table(),
            "LAYER   ACTION  WHAT\nsocket  change  2\nsocket  add     4\nsocket  remove  1\n"
        );
        assert_eq!(Changes(Vec::new()).table(), "nothing would change");
    }
}
