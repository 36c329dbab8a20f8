//! A host of the tests, and the evaluator on its tables.

use std::{collections::BTreeSet, net::IpAddr};

use super::{
    super::{
        tables::Table,
        walk::{self, End, Packet, World},
    },
    simulated::Simulated,
};
use crate::state::Family;

/// What a host knows beside its rules.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// Its own addresses.
    pub addresses: BTreeSet<IpAddr>,
    /// Clients by the name of a set or list.
    pub clients: BTreeSet<(String, IpAddr)>,
}

struct Inside<'a> {
    tables: &'a Simulated,
    host: &'a Host,
    family: Family,
}

impl World for Inside<'_> {
    fn rules(&self, table: Table, chain: &str) -> Option<Vec<&str>> {
        let chains = self.tables.chains(self.family, table);
        Some(chains.get(chain)?.iter().map(String::as_str).collect())
    }

    fn drops(&self, _: Table, _: &str) -> bool {
        false
    }

    fn is_own(&self, address: IpAddr) -> bool {
        self.host.addresses.contains(&address)
    }

    fn is_in_set(&self, set: &str, client: IpAddr) -> bool {
        self.host.clients.contains(&(set.to_owned(), client))
    }

    fn is_recent(&self, list: &str, client: IpAddr) -> bool {
        self.host.clients.contains(&(list.to_owned(), client))
    }
}

/// All ends of a packet, which meets rules of ours alone.
pub fn walk(tables: &Simulated, host: &Host, packet: &Packet<'_>) -> Vec<End> {
    let family = Family::of(packet.source);
    let inside = Inside {
        tables,
        host,
        family,
    };
    let walked = walk::walk(&inside, packet);
    assert!(walked.foreign.is_empty(), "{:?}", walked.foreign);
    walked.ends
}
