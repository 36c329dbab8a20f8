//! What the tools and the kernel can do: tried, because nothing says so.

use std::{collections::BTreeSet, sync::Arc, thread};

use nix::sched::{CloneFlags, unshare};

use super::{AddressSet, Features, Host, Owner, Table, Tables, accounts};
use crate::{
    backends::{Error, iptables::names::INVALID_DROPPED},
    state::Family,
};

/// `MASQUERADE --random-fully` came with this version of the tools, and with Linux 3.13.
const RANDOM_FULLY: [u32; 3] = [1, 6, 2];

/// Tries.
///
/// # Errors
/// What was made for the trial cannot be removed.
pub fn features(host: &mut Host) -> Result<Features, Error> {
    Ok(Features {
        random_fully: numbers(host.version()) >= RANDOM_FULLY,
        ipset: has_sets(host)?,
        recent: takes(
            host,
            "-m recent --rcheck --seconds 1 --reap --name KUBE-SEP-TRIAL --mask 255.255.255.255 --rsource -j RETURN",
        )?,
        nfacct: has_accounts(host)?,
    })
}

/// As [`features`], in a new network namespace, on a thread of its own: the tables of this one are not written.
///
/// # Errors
/// As for [`features`]; no namespace to be had.
pub fn features_elsewhere(host: &Host) -> Result<Features, Error> {
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
        features(&mut trial)
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
fn has_accounts(host: &mut Host) -> Result<bool, Error> {
    if let Err(error) = accounts::create() {
        tracing::debug!(%error, "no packet counters");
        return Ok(false);
    }
    let name = INVALID_DROPPED;
    takes(host, &format!("-m nfacct --nfacct-name {name} -j RETURN"))
}

/// Whether a rule can look into an address set and add to it.
fn has_sets(host: &mut Host) -> Result<bool, Error> {
    let name = format!("KUBE-SEP-TRIAL{}", std::process::id());
    let sets = BTreeSet::from([AddressSet {
        name: name.clone(),
        family: Family::V4,
        timeout_seconds: 1,
    }]);
    if let Err(error) = host.create_sets(&sets) {
        tracing::debug!(%error, "no address sets");
        return Ok(false);
    }
    let rule =
        format!("-m set --match-set {name} src -j SET --add-set {name} src --exist --timeout 1");
    let taken = takes(host, &rule)?;
    host.destroy_sets(&sets)?;
    Ok(taken)
}

/// Whether the tables take a rule, tried in a chain that leads nowhere. Its name is one that an agent, and kube-proxy, removes
/// when the trial is cut short.
fn takes(host: &mut Host, rule: &str) -> Result<bool, Error> {
    let chain = format!("KUBE-SVC-TRIAL{}", std::process::id());
    let text = format!("*nat\n:{chain} - [0:0]\n-A {chain} {rule}\nCOMMIT\n");
    if let Err(error) = host.restore(Family::V4, Table::Nat, &text) {
        tracing::debug!(%error, rule, "the tables do not take it");
        return Ok(false);
    }
    let undo = format!("*nat\n-F {chain}\n-X {chain}\nCOMMIT\n");
    host.restore(Family::V4, Table::Nat, &undo)
        .map_err(|error| Error::Unusable(error.to_string()))?;
    Ok(true)
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
