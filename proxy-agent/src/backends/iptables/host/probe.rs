//! What the tools and the kernel can do: tried, because nothing says so.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
    thread,
};

use nix::sched::{CloneFlags, unshare};

use super::{
    AddressSet, Features, Host, Owner, RestoreError, Table, Tables, accounts, refusal,
    restore_with, run, variant::SHORT,
};
use crate::{
    backends::{Error, iptables::names::INVALID_DROPPED},
    state::Family,
};

/// `MASQUERADE --random-fully` came with this version of the tools, and with Linux 3.13.
const RANDOM_FULLY: [u32; 3] = [1, 6, 2];

/// The families that fail in `trial`, and what the tools say.
///
/// # Errors
/// Both do.
pub fn lacks(
    trial: impl Fn(Family) -> Result<(), Error>,
) -> Result<BTreeMap<Family, String>, Error> {
    let lacks = failing([Family::V4, Family::V6], trial);
    match lacks.len() {
        2 => Err(Error::Unusable(
            lacks.into_values().next().unwrap_or_default(),
        )),
        _ => Ok(lacks),
    }
}

/// Those of `families` that fail in `trial`, and what the tools say.
pub fn failing(
    families: impl IntoIterator<Item = Family>,
    trial: impl Fn(Family) -> Result<(), Error>,
) -> BTreeMap<Family, String> {
    let tried = families.into_iter().map(|family| (family, trial(family)));
    tried
        .filter_map(|(family, result)| Some((family, format!("{:#}", result.err()?))))
        .collect()
}

/// Whether the kernel knows a family at all (`ipv6.disable=1`).
pub fn is_in_kernel(family: Family) -> bool {
    match family {
        Family::V4 => true,
        Family::V6 => Path::new("/proc/sys/net/ipv6").exists(),
    }
}

/// Whether the tools of a family read a table. To the nft variant all tables are alike, and it takes half a minute for the rules
/// of 250,000 endpoints; the legacy one asks the kernel for the very table that it reads.
///
/// # Errors
/// What the tool says.
pub fn reads(host: &Host, family: Family) -> Result<(), Error> {
    let table = match host.variant().is_nft() {
        true => SHORT,
        false => "nat",
    };
    host.read_of(family, table, &mut |_| {})
}

/// Whether a family can be served: its tools read a table and write it.
///
/// # Errors
/// What the tool says.
pub fn serves(host: &Host, family: Family) -> Result<(), Error> {
    reads(host, family)?;
    let restore = host.tool(family, "restore")?;
    let output = restore_with(&restore, "nat", "*nat\nCOMMIT\n")?;
    // Who keeps the tables for now does not keep them for good.
    match output.success || refusal::is_locked(&output) {
        true => Ok(()),
        false => Err(run::failed(&restore, &output)),
    }
}

/// Tries. While somebody keeps the tables nothing can be tried: then there is what session affinity needs, and no counters.
/// Rules that are refused are told and tried again; affinity that is not asked for would be missing until the next start.
pub fn features(host: &mut Host) -> Features {
    const RECENT: &str =
        "-m recent --rcheck --seconds 1 --reap --name KUBE-SEP-TRIAL --rsource -j RETURN";
    let ipset = has_sets(host);
    // One wait for the tables is enough.
    let recent = ipset.and_then(|_| takes(host, RECENT));
    let nfacct = recent.and_then(|_| has_accounts(host));
    Features {
        random_fully: numbers(host.version()) >= RANDOM_FULLY,
        ipset: ipset.unwrap_or(true),
        recent: recent.unwrap_or(true),
        nfacct: nfacct.unwrap_or(false),
    }
}

/// These tools with what they and the kernel can do, tried in a new network namespace, on a thread of its own: the tables of
/// this one are not written.
///
/// # Errors
/// No namespace to be had; no family can be served.
pub fn elsewhere(host: &Host) -> Result<Host, Error> {
    let work = || {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| Error::Kernel {
            action: "make",
            object: "a network namespace for trying out iptables".to_owned(),
            cause: errno.into(),
            hint: "; this needs root (CAP_SYS_ADMIN)",
        })?;
        let mut trial = Host {
            owner: Some(Arc::new(Owner::take()?)),
            ..host.clone()
        };
        Ok(Host {
            lacks: lacks(|family| serves(&trial, family))?,
            features: features(&mut trial),
            ..host.clone()
        })
    };
    thread::scope(|scope| scope.spawn(work).join()).unwrap_or_else(|_| {
        let ended = "trying out iptables ended early: this is a bug";
        Err(Error::Unusable(ended.to_owned()))
    })
}

fn numbers(version: &str) -> [u32; 3] {
    let mut parts = version.split('.').map(|part| part.parse().unwrap_or(0));
    [(); 3].map(|()| parts.next().unwrap_or(0))
}

/// Whether a rule can add to a packet counter. Makes kube-proxy's.
fn has_accounts(host: &mut Host) -> Option<bool> {
    if let Err(error) = accounts::create() {
        tracing::debug!(%error, "no packet counters");
        return Some(false);
    }
    let rule = format!("-m nfacct --nfacct-name {INVALID_DROPPED} -j RETURN");
    takes(host, &rule)
}

/// Whether a rule can look into an address set and add to it.
fn has_sets(host: &mut Host) -> Option<bool> {
    let name = format!("KUBE-SEP-TRIAL{}", std::process::id());
    let sets = BTreeSet::from([AddressSet {
        name: name.clone(),
        family: trial_family(host),
        timeout_seconds: 1,
    }]);
    if let Err(error) = host.create_sets(&sets) {
        tracing::debug!(%error, "no address sets");
        return Some(false);
    }
    let rule =
        format!("-m set --match-set {name} src -j SET --add-set {name} src --exist --timeout 1");
    let is_taken = takes(host, &rule);
    if let Err(error) = host.destroy_sets(&sets) {
        tracing::debug!(%error, "the set of a trial goes with the first sync");
    }
    is_taken
}

/// What one family can, the other one can as well.
fn trial_family(host: &Host) -> Family {
    host.families().first().copied().unwrap_or(Family::V4)
}

/// Whether the tables take a rule, tried in a chain that leads nowhere; none if somebody else keeps them. Its name is one that
/// an agent, and kube-proxy, removes when the trial is cut short.
fn takes(host: &mut Host, rule: &str) -> Option<bool> {
    let chain = format!("KUBE-SVC-TRIAL{}", std::process::id());
    let text = format!("*nat\n:{chain} - [0:0]\n-A {chain} {rule}\nCOMMIT\n");
    let family = trial_family(host);
    match host.restore(family, Table::Nat, &text) {
        Ok(()) => {}
        Err(error @ RestoreError::Refused { .. }) => {
            tracing::debug!(%error, rule, "the tables do not take it");
            return Some(false);
        }
        Err(RestoreError::Failed(error)) => {
            tracing::warn!(%error, rule, "cannot try whether the tables take it");
            return None;
        }
    }
    let undo = format!("*nat\n-F {chain}\n-X {chain}\nCOMMIT\n");
    if let Err(error) = host.restore(family, Table::Nat, &undo) {
        tracing::debug!(%error, "the chain of a trial goes with the first sync");
    }
    Some(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_number() {
        assert!(numbers("1.8.10") > numbers("1.8.9"));
        assert!(numbers("1.8") >= RANDOM_FULLY);
        assert!(numbers("1.6.1") < RANDOM_FULLY);
    }
}
