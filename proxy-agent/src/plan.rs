//! The difference between what the kernel holds and what it should hold.

use std::collections::BTreeMap;

/// What has to change. Keys ascend; a backend applies all upserts before the first deletion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan<K, V> {
    /// Missing or different.
    pub upserts: Vec<(K, V)>,
    /// Present, but not desired.
    pub deletions: Vec<K>,
}

impl<K, V> Plan<K, V> {
    /// Whether nothing has to change.
    pub fn is_empty(&self) -> bool {
        self.upserts.is_empty() && self.deletions.is_empty()
    }

    /// Number of changes.
    pub fn len(&self) -> usize {
        self.upserts.len() + self.deletions.len()
    }
}

/// What turns `observed` into `desired`.
pub fn diff<K: Ord + Clone, V: Eq + Clone>(
    observed: &BTreeMap<K, V>,
    desired: &BTreeMap<K, V>,
) -> Plan<K, V> {
    let changed = |(key, value): &(&K, &V)| observed.get(*key) != Some(*value);
    Plan {
        upserts: desired
            .iter()
            .filter(changed)
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect(),
        deletions: observed
            .keys()
            .filter(|key| !desired.contains_key(*key))
            .cloned()
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_holds_what_differs_and_nothing_else() {
        let observed = BTreeMap::from([(1, 'a'), (2, 'b'), (3, 'c')]);
        let desired = BTreeMap::from([(2, 'b'), (3, 'x'), (4, 'd')]);
        assert_eq!(
            diff(&observed, &desired),
            Plan {
                upserts: vec![(3, 'x'), (4, 'd')],
                deletions: vec![1]
            }
        );
        assert!(diff(&desired, &desired).is_empty());
    }
}
