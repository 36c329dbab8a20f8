//! The demonstration for somebody who has never seen the agent: each step says what it does, shows the real command and
//! what came out of it.

mod cluster;
mod shows;
mod traffic;

use std::time::Instant;

use crate::{janitor, names::Suffix};
use cluster::Cluster;

/// Name of the cluster that `--keep` leaves.
const KEPT: &str = "demo";

/// What was tried, what was seen, whether that is what it should be.
#[derive(Debug)]
struct Row {
    what: &'static str,
    seen: String,
    passed: bool,
}

/// What a step saw, and whether it is what it should be.
type Seen = anyhow::Result<(String, bool)>;
type Show = fn(&mut Cluster) -> Seen;

const SHOWS: [(&str, Show); 13] = [
    ("load balancing over three pods, IPv4", shows::balance_v4),
    ("load balancing over three pods, IPv6", shows::balance_v6),
    ("a client on the other node", shows::other_node),
    ("DNS over UDP through the DNS Service", shows::dns_udp),
    ("DNS over TCP through the DNS Service", shows::dns_tcp),
    ("DNS over UDP, IPv6", shows::dns_v6),
    ("session affinity", shows::affinity),
    ("node port on the node's own address", shows::node_port),
    ("node port on localhost", shows::node_port_localhost),
    ("a port that the Service does not have", shows::unknown_port),
    (
        "an endpoint removed and added under load",
        shows::change_under_load,
    ),
    (
        "the agent killed with traffic going on",
        shows::kill_under_load,
    ),
    (
        "what the kernel holds, and why it decides so",
        shows::dump_and_explain,
    ),
];

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
    for (what, show) in SHOWS {
        println!("\n## {what}");
        let (seen, passed) = show(&mut cluster).unwrap_or_else(|e| (format!("{e:#}"), false));
        println!("-> {seen}");
        rows.push(Row { what, seen, passed });
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
    println!("\n{:what$}  {:seen$}  ", "tried", "seen");
    for row in rows {
        let verdict = if row.passed { "pass" } else { "FAIL" };
        println!(
            "{:what$}  {:seen$}  {verdict}",
            row.what,
            first_line(&row.seen)
        );
    }
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}
