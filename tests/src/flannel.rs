//! The rules that flannel makes on a node, and a firewall that forwards nothing else.
//!
//! reference: flannel-io/flannel, pkg/trafficmngr/iptables/iptables.go

use anyhow::Context;

use crate::Node;

/// Makes them, in both families, and sets the policy of FORWARD to DROP.
///
/// # Errors
/// iptables is missing, or refuses.
pub fn make_rules(node: &Node) -> anyhow::Result<()> {
    let (number, four, six) = (node.number(), "10.244.0.0/16", "fd00:10:244::/48");
    let families = [
        (
            "iptables",
            four,
            format!("10.244.{number}.0/24"),
            "224.0.0.0/4",
        ),
        (
            "ip6tables",
            six,
            format!("fd00:10:244:{number}::/64"),
            "ff00::/8",
        ),
    ];
    for (tool, cluster, own, multicast) in families {
        let rules = [
            "-t nat -N FLANNEL-POSTRTG".to_owned(),
            "-t nat -A POSTROUTING -j FLANNEL-POSTRTG".to_owned(),
            "-t nat -A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -j RETURN".to_owned(),
            format!("-t nat -A FLANNEL-POSTRTG -s {own} -d {cluster} -j RETURN"),
            format!("-t nat -A FLANNEL-POSTRTG -s {cluster} -d {own} -j RETURN"),
            format!("-t nat -A FLANNEL-POSTRTG ! -s {cluster} -d {own} -j RETURN"),
            format!(
                "-t nat -A FLANNEL-POSTRTG -s {cluster} ! -d {multicast} -j MASQUERADE --random-fully"
            ),
            format!(
                "-t nat -A FLANNEL-POSTRTG ! -s {cluster} -d {cluster} -j MASQUERADE --random-fully"
            ),
            "-N FLANNEL-FWD".to_owned(),
            "-A FORWARD -j FLANNEL-FWD".to_owned(),
            format!("-A FLANNEL-FWD -s {cluster} -j ACCEPT"),
            format!("-A FLANNEL-FWD -d {cluster} -j ACCEPT"),
            "-P FORWARD DROP".to_owned(),
        ];
        for rule in rules {
            let args: Vec<&str> = rule.split(' ').collect();
            node.output(tool, &args)
                .with_context(|| format!("cannot make flannel's rules on {}", node.name()))?;
        }
    }
    Ok(())
}
