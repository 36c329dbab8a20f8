//! What a kube-proxy leaves that no agent uses: `cleanup --kube-proxy`, also beside a running agent.
//!
//! Only names that kube-proxy had in one of its modes: other projects have chains and sets called `KUBE-…` too. Chains that
//! it shares with us are not among them: whatever of those our rules do not use, an agent removes by its own diff.

use std::{collections::BTreeSet, process::Command};

use super::{
    host::Host,
    rival::{CANARY, CANARY_TABLES, nft},
    rules::tree::Root,
    tables::{RestoreError, Table, Tables as _},
};
use crate::{backends::Error, state::Family};

/// Chains of the modes ipvs (pkg/proxy/ipvs/proxier.go, `iptablesChains`) and userspace (`iptablesContainerPortalChain` and
/// its siblings, before 1.26), by table.
const CHAINS: [(&str, &[&str]); 2] = [
    (
        "nat",
        &[
            "KUBE-LOAD-BALANCER",
            "KUBE-NODE-PORT",
            "KUBE-FIREWALL",
            "KUBE-PORTALS-CONTAINER",
            "KUBE-PORTALS-HOST",
            "KUBE-NODEPORT-CONTAINER",
            "KUBE-NODEPORT-HOST",
        ],
    ),
    (
        "filter",
        &[
            "KUBE-NODE-PORT",
            "KUBE-SOURCE-RANGES-FIREWALL",
            "KUBE-IPVS-FILTER",
            "KUBE-IPVS-OUT-FILTER",
            "KUBE-NODEPORT-NON-LOCAL",
        ],
    ),
];

/// How the names of ipvs mode's sets begin, after `KUBE-` or, for IPv6, `KUBE-6-` (pkg/proxy/ipvs/ipset.go).
const SETS: [&str; 7] = [
    "LOOP-BACK",
    "CLUSTER-IP",
    "EXTERNAL-IP",
    "LOAD-BALANCER",
    "NODE-PORT",
    "HEALTH-CHECK-NODE-PORT",
    "IPVS-IPS",
];

/// Chains that our rules in the filter table lead to, and no kube-proxy's.
fn leads_to_us(line: &str) -> bool {
    let target = format!("-j {}", Root::NodePortsRefused.chain());
    line.starts_with("-A KUBE-EXTERNAL-SERVICES ") && line.ends_with(&target)
}

/// Makes sure that rules of an agent serve the node: else what kube-proxy left may be what does.
///
/// # Errors
/// No rules of an agent are in force; a tool failed.
pub fn ensure_served(host: &mut Host) -> Result<(), Error> {
    let filter = host.save(Family::V4, Table::Filter)?;
    if !filter.lines().any(leads_to_us) {
        return Err(Error::Unusable(
            "no rules of proxy-agent are in force on this node: removing kube-proxy's would cut its traffic; run the agent \
             first, or, to have no proxy at all, kube-proxy --cleanup"
                .to_owned(),
        ));
    }
    Ok(())
}

/// Removes it; says what, for people.
///
/// # Errors
/// A tool failed.
pub fn remove(host: &mut Host) -> Result<Vec<String>, Error> {
    let mut removed = Vec::new();
    let is_there = nft::remove().map_err(|cause| Error::Kernel {
        action: "remove",
        object: "table kube-proxy of nftables".to_owned(),
        cause,
        hint: "",
    })?;
    removed.extend(is_there.then(|| "table kube-proxy of nftables".to_owned()));
    for family in host.families() {
        for table in CANARY_TABLES {
            remove_chains(host, family, table, &mut removed)?;
        }
    }
    // Rules that used them are gone now.
    for set in host.names_of_sets()? {
        if is_of_ipvs(&set) && host.destroy_set(&set)? {
            removed.push(format!("set {set}"));
        }
    }
    Ok(removed)
}

fn is_of_ipvs(set: &str) -> bool {
    let Some(name) = set.strip_prefix("KUBE-") else {
        return false;
    };
    let name = name.strip_prefix("6-").unwrap_or(name);
    SETS.iter().any(|known| name.starts_with(known))
}

/// Removes the chains of one table, in one transaction.
fn remove_chains(
    host: &mut Host,
    family: Family,
    table: &str,
    removed: &mut Vec<String>,
) -> Result<(), Error> {
    let text = host.save_of(family, table)?;
    let (transaction, chains) = removal(table, &text);
    if chains.is_empty() {
        return Ok(());
    }
    let failed = |error: RestoreError| Error::Unusable(error.to_string());
    host.restore_in(family, table, &transaction)
        .map_err(failed)?;
    removed.extend(
        chains
            .iter()
            .map(|chain| format!("chain {table} {chain} {family}")),
    );
    Ok(())
}

/// The transaction that removes them from `saved`, the text of a table, and which they are: those that are there, and that
/// only built-in chains or others of them lead to.
fn removal(table: &str, saved: &str) -> (String, BTreeSet<String>) {
    let known = CHAINS.iter().filter(|(of, _)| *of == table);
    let mut known: Vec<&str> = known
        .flat_map(|(_, chains)| chains.iter().copied())
        .collect();
    known.push(CANARY);
    let declared = |line: &&str| line.starts_with(':');
    let name = |line: &str| -> String {
        let name = line.trim_start_matches(':').split(' ').next();
        name.unwrap_or_default().to_owned()
    };
    let is_builtin = |line: &&str| !line.contains(" - [");
    let lines = || saved.lines().filter(declared);
    let builtin: BTreeSet<String> = lines().filter(is_builtin).map(name).collect();
    let mut chains: BTreeSet<String> = lines().map(name).collect();
    chains.retain(|chain| known.contains(&chain.as_str()));
    // One that somebody else's rule leads to stays, and so do those that it leads to.
    loop {
        let used = rules(saved).find_map(|(chain, target, _)| {
            let by_others = !chains.contains(chain) && !builtin.contains(chain);
            (by_others && chains.contains(target)).then(|| target.to_owned())
        });
        match used {
            Some(used) => chains.remove(&used),
            None => break,
        };
    }
    let jumps = rules(saved)
        .filter(|(chain, target, _)| builtin.contains(*chain) && chains.contains(*target));
    let jumps: String = jumps.map(|(_, _, rule)| format!("-D {rule}\n")).collect();
    let list = |verb: &str, end: &str| -> String {
        let lines = chains.iter().map(|chain| format!("{verb}{chain}{end}\n"));
        lines.collect()
    };
    let (empty, gone) = (list(":", " - [0:0]"), list("-X ", ""));
    (format!("*{table}\n{empty}{jumps}{gone}COMMIT\n"), chains)
}

/// Chain, target and text of each rule that has a target.
fn rules(saved: &str) -> impl Iterator<Item = (&str, &str, &str)> {
    saved.lines().filter_map(|line| {
        let rule = line.strip_prefix("-A ")?;
        let mut words = rule.split(' ');
        let chain = words.next()?;
        words.find(|word| *word == "-j" || *word == "-g")?;
        Some((chain, words.next()?, rule))
    })
}

/// Removes the link to which kube-proxy's ipvs mode assigns every ClusterIP; says whether there was one.
///
/// # Errors
/// `ip` is missing, or refuses.
pub fn remove_link() -> Result<bool, Error> {
    const LINK: &str = "kube-ipvs0";
    if !std::path::Path::new("/sys/class/net").join(LINK).exists() {
        return Ok(false);
    }
    let failed = |cause: std::io::Error| Error::Kernel {
        action: "remove",
        object: format!("link {LINK}"),
        cause,
        hint: "; ip is part of the package iproute2",
    };
    let output = Command::new("ip")
        .args(["link", "delete", LINK])
        .output()
        .map_err(failed)?;
    match output.status.success() {
        true => Ok(true),
        false => Err(failed(std::io::Error::other(
            String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAT: &str = r#"*nat
:PREROUTING ACCEPT [5:300]
:OUTPUT ACCEPT [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-LOAD-BALANCER - [0:0]
:KUBE-NODE-PORT - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-ROUTER-INPUT - [0:0]
:MINE - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -m comment --comment "of another time" -j KUBE-LOAD-BALANCER
-A KUBE-LOAD-BALANCER -j KUBE-NODE-PORT
-A MINE -j KUBE-FIREWALL
COMMIT
"#;

    #[test]
    fn only_chains_of_kube_proxy_that_nobody_else_uses_are_removed() {
        let (transaction, chains) = removal("nat", NAT);
        let expected = ["KUBE-LOAD-BALANCER", "KUBE-NODE-PORT", CANARY];
        assert_eq!(chains, expected.map(str::to_owned).into());
        let expected = "*nat
:KUBE-LOAD-BALANCER - [0:0]
:KUBE-NODE-PORT - [0:0]
:KUBE-PROXY-CANARY - [0:0]
-D PREROUTING -m comment --comment \"of another time\" -j KUBE-LOAD-BALANCER
-X KUBE-LOAD-BALANCER
-X KUBE-NODE-PORT
-X KUBE-PROXY-CANARY
COMMIT
";
        assert_eq!(transaction, expected);
    }

    #[test]
    fn sets_of_others_are_told_apart() {
        for (set, expected) in [
            ("KUBE-CLUSTER-IP", true),
            ("KUBE-6-NODE-PORT-LOCAL-TCP", true),
            ("KUBE-SEP-ABC", false),
            ("KUBE-GRP-ABC", false),
            ("KUBE-SRC-ABC", false),
            ("CLUSTER-IP", false),
        ] {
            assert_eq!(is_of_ipvs(set), expected, "{set}");
        }
    }

    #[test]
    fn our_rules_are_told_from_kube_proxys() {
        let theirs = "-A KUBE-EXTERNAL-SERVICES -p tcp -m comment --comment \"default/web has no endpoints\" -j REJECT";
        assert!(!leads_to_us(theirs));
        assert!(leads_to_us(
            "-A KUBE-EXTERNAL-SERVICES -m addrtype --dst-type LOCAL -j PROXY-AGENT-P"
        ));
    }
}
