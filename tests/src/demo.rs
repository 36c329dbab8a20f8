//! The demonstration for somebody who has never seen the agent: each step says what it does, shows the real command and
//! what came out of it.

mod cluster;
mod inside;
mod life;
mod outside;
mod servers;
mod traffic;

use std::time::Instant;

use crate::{janitor, names::Suffix};
use cluster::Cluster;

/// Name of the cluster that `--keep` leaves.
const KEPT: &str = "demo";

/// What was tried, what was seen, whether that is what it should be.
#[derive(Debug)]
struct Row {
    /// What the agents ran with at its end.
    mode: Mode,
    what: &'static str,
    seen: String,
    passed: bool,
}

/// What a step saw, and whether it is what it should be.
type Seen = anyhow::Result<(String, bool)>;
type Show = fn(&mut Cluster) -> Seen;

/// What both agents run with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// The socket layer, and the packet layer beside it.
    Ebpf,
    /// The packet layer alone.
    Iptables,
}

/// A step: what it tries, whether it makes sense with iptables alone, how it is done.
type Step = (&'static str, bool, Show);

const TOUR: [Step; 22] = [
    (
        "load balancing over three pods, IPv4",
        true,
        inside::balance_v4,
    ),
    (
        "load balancing over three pods, IPv6",
        true,
        inside::balance_v6,
    ),
    ("a client on the other node", true, inside::other_node),
    (
        "DNS over UDP through the DNS Service",
        true,
        inside::dns_udp,
    ),
    (
        "DNS over TCP through the DNS Service",
        true,
        inside::dns_tcp,
    ),
    ("DNS over UDP, IPv6", true, inside::dns_v6),
    ("session affinity", true, inside::affinity),
    (
        "node port on the node's own address",
        true,
        inside::node_port,
    ),
    ("node port on localhost", true, inside::node_port_localhost),
    // Rules leave such a packet to routing.
    (
        "a port that the Service does not have",
        false,
        inside::unknown_port,
    ),
    (
        "an endpoint removed and added under load",
        true,
        life::change_under_load,
    ),
    (
        "the agent killed with traffic going on",
        true,
        life::kill_under_load,
    ),
    // From the eBPF maps.
    (
        "what the kernel holds, and why it decides so",
        false,
        inside::dump_and_explain,
    ),
    (
        "outside: node port, policy Cluster",
        true,
        outside::node_port,
    ),
    (
        "outside: node port, policy Local",
        true,
        outside::node_port_local,
    ),
    (
        "outside: external IP, policy Cluster",
        true,
        outside::external_ip,
    ),
    (
        "outside: external IP, policy Local",
        true,
        outside::external_ip_local,
    ),
    (
        "outside: load-balancer IP, policy Cluster",
        true,
        outside::load_balancer,
    ),
    (
        "outside: load-balancer IP, policy Local",
        true,
        outside::load_balancer_local,
    ),
    ("outside: DNS over UDP by node port", true, outside::dns),
    (
        "outside: an endpoint replaced under load",
        true,
        life::replace_under_load,
    ),
    (
        "outside: the agent killed under load",
        true,
        life::kill_under_load_outside,
    ),
];
const TO_IPTABLES: Step = (
    "both agents go to iptables under load",
    true,
    life::to_iptables,
);
const TO_EBPF: Step = (
    "both agents go back to ebpf under load",
    true,
    life::to_ebpf,
);

/// All steps in their order: the tour in both modes, and the ways between them under load.
fn steps() -> impl Iterator<Item = Step> {
    let iptables = TOUR
        .into_iter()
        .filter(|(_, also_iptables, _)| *also_iptables);
    TOUR.into_iter()
        .chain([TO_IPTABLES])
        .chain(iptables)
        .chain([TO_EBPF])
}

/// Runs the demonstration; whether everything was as it should be.
///
/// # Errors
/// The cluster could not be built.
pub fn run(keep: bool) -> anyhow::Result<bool> {
    let start = Instant::now();
    println!(
        "A cluster of two nodes on this machine: network namespaces, joined by VXLAN as flannel does."
    );
    let mut cluster = Cluster::start(keep.then_some(KEPT))?;
    cluster.introduce();
    let mut rows = Vec::new();
    for (what, _, show) in steps() {
        println!("\n## {what}");
        let (seen, passed) = show(&mut cluster).unwrap_or_else(|e| (format!("{e:#}"), false));
        println!("-> {seen}");
        let mode = cluster.mode;
        rows.push(Row {
            mode,
            what,
            seen,
            passed,
        });
    }
    let failed = rows.iter().filter(|row| !row.passed).count();
    if failed > 0 {
        cluster.print_logs();
    }
    if keep {
        cluster.keep();
    } else {
        drop(cluster);
    }
    print_table(&rows);
    println!("{:.0} s", start.elapsed().as_secs_f32());
    println!("demo: {} passed, {failed} failed", rows.len() - failed);
    Ok(failed == 0)
}

/// Removes what `--keep` left.
///
/// # Errors
/// Something could not be removed.
pub fn remove() -> anyhow::Result<()> {
    janitor::remove(&Suffix::parse(KEPT)?)
}

fn print_table(rows: &[Row]) {
    let width = |text: fn(&Row) -> &str| rows.iter().map(|row| text(row).chars().count()).max();
    let (what, seen) = (width(|row| row.what), width(|row| first_line(&row.seen)));
    let (what, seen) = (what.unwrap_or(0), seen.unwrap_or(0));
    println!("\n{:8}  {:what$}  {:seen$}  ", "mode", "tried", "seen");
    for row in rows {
        let verdict = if row.passed { "pass" } else { "FAIL" };
        println!(
            "{:8}  {:what$}  {:seen$}  {verdict}",
            row.mode,
            row.what,
            first_line(&row.seen)
        );
    }
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}
