//! A backend in memory that fails one write in ten: the second implementation of the trait, for tests of whatever drives
//! one.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash, Hasher},
};

use crate::{
    backends::{Backend, Bounds, Error, Key},
    plan::Plan,
    state::DesiredState,
};

/// Holds digests of what was applied.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// What a kernel would hold.
    pub entries: BTreeMap<Key, u64>,
    /// Somebody else keeps them.
    pub yields: bool,
    /// Somebody else is seen by reading.
    pub yields_once_read: bool,
    /// Left out of whatever is applied.
    pub refused: BTreeSet<Key>,
    /// Writes that went in.
    pub writes: u64,
    /// One write in so many fails; 0 = none.
    fault_rate: u64,
    seed: u64,
    /// The next so many writes fail.
    failing: u64,
}

impl Memory {
    /// Fails one write in ten, as drawn from `seed`.
    pub fn faulty(seed: u64) -> Self {
        Self {
            fault_rate: 10,
            seed,
            ..Self::default()
        }
    }

    /// Lets the next `writes` writes fail.
    pub fn fail_next(&mut self, writes: u64) {
        self.failing = writes;
    }

    /// The entries that `state` asks for.
    pub fn render(&self, state: &DesiredState) -> BTreeMap<Key, u64> {
        let services = state.services.iter();
        let services = services.map(|(key, value)| (Key::Service(key.clone()), digest(value)));
        let addresses = state.addresses.iter();
        let addresses = addresses.map(|(key, value)| (Key::Address(*key), digest(value)));
        services.chain(addresses).collect()
    }

    fn write(&mut self) -> Result<(), Error> {
        if self.failing > 0 {
            self.failing -= 1;
            return Err(Error::Injected);
        }
        // splitmix64: enough for faults.
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.seed ^ (self.seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        if self.fault_rate > 0 && (mixed >> 32).is_multiple_of(self.fault_rate) {
            return Err(Error::Injected);
        }
        self.writes += 1;
        Ok(())
    }
}

fn digest(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

impl Backend for Memory {
    type Key = Key;
    type Value = u64;

    fn plan(
        &mut self,
        observed: &BTreeMap<Key, u64>,
        state: &DesiredState,
        bounds: Bounds<'_>,
    ) -> Plan<Key, u64> {
        Key::plan(observed, &self.render(state), bounds)
    }

    fn observe(&mut self) -> Result<BTreeMap<Key, u64>, Error> {
        self.yields |= self.yields_once_read;
        Ok(self.entries.clone())
    }

    fn apply(&mut self, plan: &Plan<Key, u64>, state: &DesiredState) -> Result<(), Error> {
        for (key, value) in &plan.upserts {
            let held = match key {
                Key::Service(port) => state.services.contains_key(port),
                Key::Address(address) => state.addresses.contains_key(address),
                Key::Strays => false,
            };
            if !held {
                return Err(Error::Unusable(format!(
                    "the plan wants {key}, the state lacks it"
                )));
            }
            if self.refused.contains(key) {
                continue;
            }
            self.write()?;
            self.entries.insert(key.clone(), *value);
        }
        for key in &plan.deletions {
            self.write()?;
            self.entries.remove(key);
        }
        Ok(())
    }

    fn publish(&mut self) -> Result<(), Error> {
        self.write()
    }

    fn has_left_out(&self) -> bool {
        !self.refused.is_empty()
    }

    fn yields(&mut self) -> bool {
        self.yields
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::{plan::diff, state::NodeAddress};

    #[test]
    fn a_plan_goes_in_however_many_writes_fail() {
        for seed in 0..5 {
            let mut memory = Memory::faulty(seed);
            let mut failed = 0;
            for round in 0..20_u8 {
                let address = |n: u8| {
                    (
                        IpAddr::from([10, 0, round, n]),
                        NodeAddress { node_ports: true },
                    )
                };
                let state = DesiredState {
                    addresses: (0..20).map(address).collect(),
                    ..DesiredState::default()
                };
                let desired = memory.render(&state);
                loop {
                    let plan = diff(&memory.observe().unwrap(), &desired);
                    if plan.is_empty() {
                        break;
                    }
                    failed += usize::from(memory.apply(&plan, &state).is_err());
                }
                assert_eq!(memory.entries, desired);
            }
            assert!(
                failed > 20,
                "one write in ten fails, but only {failed} applies did"
            );
        }
    }
}
