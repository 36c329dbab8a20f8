//! Steps from outside: a machine beside the cluster reaches node ports, external and load-balancer IPs.

use std::collections::BTreeSet;

use anyhow::Context;

use super::{
    Seen,
    cluster::Cluster,
    inside,
    traffic::{self, Counts},
};
use crate::Node;

/// Requests to one address; that one of three pods gets none happens once in ten billion times.
const REQUESTS: u64 = 60;
const ALL: [&str; 3] = ["web-1", "web-2", "web-3"];
const ON_A: [&str; 1] = ["web-1"];
const ON_B: [&str; 2] = ["web-2", "web-3"];

/// What one address must give.
struct Expected<'a> {
    /// Host and port of a URL.
    address: String,
    /// The node that the packets go to.
    through: &'a Node,
    /// Who answers.
    pods: &'a [&'a str],
    /// Whether they see the client's own address; otherwise it is one of the node's.
    is_kept: bool,
}

/// What the pods that answered saw.
#[derive(Debug, Default)]
struct Sources {
    pods: BTreeSet<String>,
    addresses: BTreeSet<String>,
}

impl Sources {
    /// From answers as "web-1@192.168.77.100".
    fn of(counts: &Counts) -> anyhow::Result<Self> {
        let mut sources = Self::default();
        for answer in counts.answers.keys() {
            let (pod, address) = answer.split_once('@').context("no source in an answer")?;
            sources.pods.insert(pod.to_owned());
            sources.addresses.insert(address.to_owned());
        }
        Ok(sources)
    }
}

/// Tries each address, which all have the same policy.
fn reach(cluster: &Cluster, expected: &[Expected<'_>]) -> Seen {
    let client = &cluster.outsider;
    let own = BTreeSet::from([client.v4().to_string(), client.v6().to_string()]);
    let (mut seen, mut failed, mut passed) = (Vec::new(), 0, true);
    for one in expected {
        let url = format!("http://{}/cgi-bin/source?[1-{REQUESTS}]", one.address);
        let counts = traffic::curl(client.place(), &url)?;
        println!("# {}", counts.summary());
        let sources = Sources::of(&counts)?;
        let node = one.through.output("ip", &["-o", "addr", "show"])?;
        let is_source = |address: &String| {
            if one.is_kept {
                own.contains(address)
            } else {
                node.contains(&format!(" {address}/"))
            }
        };
        let is_expected = sources.pods.iter().eq(one.pods)
            && sources.addresses.iter().all(is_source)
            && counts.failures.is_empty()
            && counts.total() == REQUESTS;
        failed += counts.failures.len();
        passed &= is_expected;
        let pods = Vec::from_iter(sources.pods).join(" ");
        let text = format!("{}: {pods}", one.through.name());
        if !is_expected {
            let addresses = Vec::from_iter(sources.addresses).join(" ");
            seen.push(format!("{text}, who saw {addresses}, not as expected"));
        } else if !seen.contains(&text) {
            seen.push(text);
        }
    }
    let seen = format!("through {}", seen.join("; "));
    let source = if expected.iter().all(|one| one.is_kept) {
        "source kept"
    } else {
        "source is the node"
    };
    let seen = if passed {
        format!("{seen}; {source}; 0 failed")
    } else {
        format!("{seen}; {failed} failed")
    };
    Ok((seen, passed))
}

fn node_ports(cluster: &Cluster, port: u16, pods: [&[&str]; 2], is_kept: bool) -> Seen {
    let mut expected = Vec::new();
    for (through, pods) in [&cluster.node_a, &cluster.node_b].into_iter().zip(pods) {
        for address in [
            format!("{}:{port}", through.v4()),
            format!("[{}]:{port}", through.v6()),
        ] {
            expected.push(Expected {
                address,
                through,
                pods,
                is_kept,
            });
        }
    }
    reach(cluster, &expected)
}

fn vips(cluster: &Cluster, through: &Node, vips: [&str; 2], pods: &[&str], is_kept: bool) -> Seen {
    let expected = vips.map(|vip| Expected {
        address: vip.to_owned(),
        through,
        pods,
        is_kept,
    });
    reach(cluster, &expected)
}

pub(super) fn node_port(cluster: &mut Cluster) -> Seen {
    node_ports(cluster, 30_082, [&ALL, &ALL], false)
}

pub(super) fn node_port_local(cluster: &mut Cluster) -> Seen {
    node_ports(cluster, 30_083, [&ON_A, &ON_B], true)
}

pub(super) fn external_ip(cluster: &mut Cluster) -> Seen {
    let addresses = ["203.0.113.82", "[2001:db8:1::82]"];
    vips(cluster, &cluster.node_a, addresses, &ALL, false)
}

pub(super) fn external_ip_local(cluster: &mut Cluster) -> Seen {
    let addresses = ["203.0.113.83", "[2001:db8:1::83]"];
    vips(cluster, &cluster.node_a, addresses, &ON_A, true)
}

pub(super) fn load_balancer(cluster: &mut Cluster) -> Seen {
    let addresses = ["198.51.100.82", "[2001:db8:2::82]"];
    vips(cluster, &cluster.node_b, addresses, &ALL, false)
}

pub(super) fn load_balancer_local(cluster: &mut Cluster) -> Seen {
    let addresses = ["198.51.100.83", "[2001:db8:2::83]"];
    vips(cluster, &cluster.node_b, addresses, &ON_B, true)
}

pub(super) fn dns(cluster: &mut Cluster) -> Seen {
    let options = ["+notcp", "-p", "30053"];
    let place = cluster.outsider.place();
    let (v4, passed_v4) = inside::dns(place, &cluster.node_a.v4().to_string(), &options)?;
    let (v6, passed_v6) = inside::dns(place, &cluster.node_b.v6().to_string(), &options)?;
    Ok((format!("IPv4: {v4}; IPv6: {v6}"), passed_v4 && passed_v6))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_and_the_sources_they_saw_are_told_apart() -> anyhow::Result<()> {
        let mut counts = Counts::default();
        for line in [
            "web-2@10.244.1.0",
            "200 ",
            "web-1@10.244.1.1",
            "web-2@10.244.1.1",
        ] {
            counts.take(line);
        }
        let sources = Sources::of(&counts)?;
        assert!(sources.pods.iter().eq(["web-1", "web-2"]));
        assert!(sources.addresses.iter().eq(["10.244.1.0", "10.244.1.1"]));
        Ok(())
    }

    #[test]
    fn an_answer_without_a_source_is_an_error() {
        let mut counts = Counts::default();
        counts.take("web-1");
        assert!(Sources::of(&counts).is_err());
    }
}
