//! Steps inside the cluster: pods and nodes reach Services.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::Context;

use super::{
    Mode, Seen,
    cluster::Cluster,
    traffic::{self, WEB},
};
use crate::Place;

/// Requests of a count; a fair share of each of three pods is 100.
const REQUESTS: u64 = 300;
/// Less happens to a pod once in 100 million times (binomial, 300 × 1/3).
const SHARE: u64 = 55;
/// Questions to DNS, each from a socket of its own; that one of two pods gets none happens once in 500 million times.
const QUESTIONS: usize = 30;

fn balance(place: &Place, url: &str) -> Seen {
    let counts = traffic::curl(place, &format!("{url}?[1-{REQUESTS}]"))?;
    let fair = counts.answers.len() == 3 && counts.answers.values().all(|count| *count >= SHARE);
    Ok((
        counts.summary(),
        fair && counts.total() == REQUESTS && counts.failures.is_empty(),
    ))
}

pub(super) fn balance_v4(cluster: &mut Cluster) -> Seen {
    balance(cluster.client.place(), WEB)
}

pub(super) fn balance_v6(cluster: &mut Cluster) -> Seen {
    balance(cluster.client.place(), "http://[fd00:10:96::80]/")
}

pub(super) fn other_node(cluster: &mut Cluster) -> Seen {
    balance(cluster.other_client.place(), WEB)
}

pub(super) fn node_port(cluster: &mut Cluster) -> Seen {
    balance(
        cluster.node_a.place(),
        &format!("http://{}:30080/", cluster.node_a.v4()),
    )
}

pub(super) fn node_port_localhost(cluster: &mut Cluster) -> Seen {
    let (v4, fair_v4) = balance(cluster.node_a.place(), "http://127.0.0.1:30080/")?;
    // As with kube-proxy, whose rules cannot translate what comes from ::1.
    if cluster.mode == Mode::Iptables {
        return Ok((format!("127.0.0.1: {v4}"), fair_v4));
    }
    let (v6, fair_v6) = balance(cluster.node_a.place(), "http://[::1]:30080/")?;
    Ok((format!("127.0.0.1: {v4}; ::1: {v6}"), fair_v4 && fair_v6))
}

/// Asks who answers until both DNS pods did, and for the address of a Service.
pub(super) fn dns(place: &Place, server: &str, options: &[&str]) -> Seen {
    let at = format!("@{server}");
    let shown = options.join(" ");
    println!(
        "{}$ dig {at} +short {shown} web.default.svc.cluster.local A",
        place.name
    );
    let ask = |queries: &[&str]| -> anyhow::Result<String> {
        let mut command = place.command("dig")?;
        command
            .args([&at, "+short", "+tries=1", "+timeout=3"])
            .args(options)
            .args(queries);
        let output = command.output().context("cannot run dig")?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let address = ask(&["web.default.svc.cluster.local", "A"])?;
    println!("{address}");
    println!(
        "{}$ dig {at} +short {shown} whoami.cluster.local TXT ...   # {QUESTIONS} times the same question",
        place.name
    );
    let mut answers = BTreeMap::<String, usize>::new();
    for line in ask(&["whoami.cluster.local", "TXT"].repeat(QUESTIONS))?.lines() {
        *answers
            .entry(line.trim_matches('"').to_owned())
            .or_default() += 1;
    }
    let known = answers.keys().all(|name| name.starts_with("dns-"));
    let list: Vec<_> = answers
        .iter()
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    let is_complete = answers.len() == 2 && answers.values().sum::<usize>() == QUESTIONS;
    let passed = address == "10.96.0.80" && known && is_complete;
    Ok((format!("web is {address}, say {}", list.join(", ")), passed))
}

pub(super) fn dns_udp(cluster: &mut Cluster) -> Seen {
    dns(cluster.client.place(), "10.96.0.10", &["+notcp"])
}

pub(super) fn dns_tcp(cluster: &mut Cluster) -> Seen {
    dns(cluster.client.place(), "10.96.0.10", &["+tcp"])
}

pub(super) fn dns_v6(cluster: &mut Cluster) -> Seen {
    dns(cluster.client.place(), "fd00:10:96::10", &["+notcp"])
}

pub(super) fn affinity(cluster: &mut Cluster) -> Seen {
    let counts = traffic::curl(cluster.client.place(), "http://10.96.0.81/?[1-50]")?;
    let one = counts.answers.len() == 1 && counts.total() == 50 && counts.failures.is_empty();
    Ok((format!("always the same pod: {}", counts.summary()), one))
}

pub(super) fn unknown_port(cluster: &mut Cluster) -> Seen {
    let start = Instant::now();
    let counts = traffic::curl(cluster.client.place(), "http://10.96.0.80:81/")?;
    let elapsed = start.elapsed();
    let error = counts.failures.first().cloned().unwrap_or_default();
    let refused = error.contains("refused") || error.contains("Couldn't connect");
    let passed = counts.total() == 0 && refused && elapsed < Duration::from_secs(1);
    Ok((format!("refused after {} ms", elapsed.as_millis()), passed))
}

pub(super) fn dump_and_explain(cluster: &mut Cluster) -> Seen {
    println!("node-a$ proxy-agent dump services");
    let services = cluster.agent_a.text(&["dump", "services"])?;
    print!("{services}");
    let client = cluster.client.v4().to_string();
    let args = ["explain", &client, "10.96.0.80:80/TCP"];
    println!("node-a$ proxy-agent {}", args.join(" "));
    let why = cluster.agent_a.text(&args)?;
    print!("{why}");
    let dump = cluster.agent_a.json(&["dump", "services"])?;
    let count = dump.as_array().map_or(0, Vec::len);
    let passed = services.contains("default/web:http")
        && why.contains("10.244.1.3:8080")
        && why.contains("10.244.2.3:8080");
    Ok((
        format!("{count} service ports; three candidates for 10.96.0.80:80"),
        passed && count == 11,
    ))
}
