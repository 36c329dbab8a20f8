//! Address sets as `ipset` reads and writes them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use super::AddressSet;
use crate::state::Family;

/// Clients that one endpoint is remembered for: 65,536, as the socket layer's map of all.
pub const MAX_ENTRIES: u32 = 65_536;

/// Sets of `ipset list -terse -output save` that could be ours: `hash:ip` with a timeout, called `KUBE-…`.
pub fn parse(text: &str) -> BTreeSet<AddressSet> {
    text.lines().filter_map(set).collect()
}

/// `create KUBE-SEP-X hash:ip family inet hashsize 1024 maxelem 65536 timeout 600 bucketsize 12 initval 0x1`
fn set(line: &str) -> Option<AddressSet> {
    let mut words = line.split_whitespace();
    let (verb, name, kind) = (words.next()?, words.next()?, words.next()?);
    if verb != "create" || kind != "hash:ip" || !name.starts_with("KUBE-") {
        return None;
    }
    let rest: Vec<&str> = words.collect();
    let (pairs, _) = rest.as_chunks::<2>();
    let options: BTreeMap<&str, &str> = pairs.iter().map(|[key, value]| (*key, *value)).collect();
    Some(AddressSet {
        name: name.to_owned(),
        family: match *options.get("family")? {
            "inet6" => Family::V6,
            _ => Family::V4,
        },
        timeout_seconds: options.get("timeout")?.parse().ok()?,
    })
}

/// Text for `ipset restore`.
pub fn creation(sets: &BTreeSet<AddressSet>) -> String {
    let mut text = String::new();
    for set in sets {
        let family = match set.family {
            Family::V4 => "inet",
            Family::V6 => "inet6",
        };
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "create {} hash:ip family {family} timeout {} maxelem {MAX_ENTRIES}",
            set.name, set.timeout_seconds
        );
    }
    text
}

/// Text for `ipset restore`.
pub fn destruction(sets: &BTreeSet<AddressSet>) -> String {
    sets.iter()
        .map(|set| format!("destroy {}\n", set.name))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_ours_are_read_and_others_left_alone() {
        let text = "create KUBE-SEP-A hash:ip family inet hashsize 1024 maxelem 65536 timeout 600 bucketsize 12 initval 0x1\n\
            create KUBE-GRP-B hash:ip family inet6 hashsize 1024 maxelem 65536 timeout 60\n\
            create KUBE-X hash:net family inet timeout 60\n\
            create KUBE-Y hash:ip family inet hashsize 1024 maxelem 65536\n\
            create other hash:ip family inet timeout 60\n";
        let set = |name: &str, family, timeout_seconds| AddressSet {
            name: name.to_owned(),
            family,
            timeout_seconds,
        };
        let expected = [
            set("KUBE-SEP-A", Family::V4, 600),
            set("KUBE-GRP-B", Family::V6, 60),
        ];
        let sets = BTreeSet::from(expected);
        assert_eq!(parse(text), sets);
        assert_eq!(parse(&creation(&sets)), sets);
        assert_eq!(
            destruction(&sets),
            "destroy KUBE-GRP-B\ndestroy KUBE-SEP-A\n"
        );
    }
}
