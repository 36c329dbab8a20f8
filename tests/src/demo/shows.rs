//! The steps of the demonstration.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::Context;

use super::{
    Seen,
    cluster::Cluster,
    traffic::{self, Traffic},
};
use crate::{Place, let_run};

const WEB: &str = "http://10.96.0.80/";
/// Requests of a count; a fair share of each of three pods is 100.
const REQUESTS: u64 = 300;
/// Less happens to a pod once in 100 million times (binomial, 300 × 1/3).
const SHARE: u64 = 55;

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
    let (v6, fair_v6) = balance(cluster.node_a.place(), "http://[::1]:30080/")?;
    Ok((format!("127.0.0.1: {v4}; ::1: {v6}"), fair_v4 && fair_v6))
}

/// Asks who answers until both DNS pods did, and for the address of a Service.
fn dns(place: &Place, server: &str, options: &[&str]) -> Seen {
    let at = format!("@{server}");
    let shown = options.join(" ");
    println!(
        "{}$ dig {at} +short {shown} web.default.svc.cluster.local A",
        place.name
    );
    let ask = |query: [&str; 2]| -> anyhow::Result<String> {
        let mut command = place.command("dig")?;
        command
            .args([&at, "+short", "+tries=1", "+timeout=3"])
            .args(options)
            .args(query);
        let output = command.output().context("cannot run dig")?;
        Ok(String::from_utf8_lossy(&output.stdout)
            .trim()
            .trim_matches('"')
            .to_owned())
    };
    let address = ask(["web.default.svc.cluster.local", "A"])?;
    println!("{address}");
    println!(
        "{}$ dig {at} +short {shown} whoami.cluster.local TXT   # 20 times",
        place.name
    );
    let mut answers = BTreeMap::<String, u32>::new();
    for _ in 0..20 {
        *answers
            .entry(ask(["whoami.cluster.local", "TXT"])?)
            .or_default() += 1;
    }
    let known = answers.keys().all(|name| name.starts_with("dns-"));
    let list: Vec<_> = answers
        .iter()
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    let passed = address == "10.96.0.80" && known && answers.len() == 2;
    Ok((
        format!("web is {address}; answered by {}", list.join(", ")),
        passed,
    ))
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

pub(super) fn change_under_load(cluster: &mut Cluster) -> Seen {
    let traffic = Traffic::start(cluster.client.place(), WEB, 4)?;
    traffic.wait("all three pods answer", |counts| counts.answers.len() == 3)?;
    println!("# web.yaml: endpoint web-3 removed");
    let removed = Instant::now();
    cluster.edit_web(Some("web-3"))?;
    traffic.wait("web-3 answers no more", |counts| {
        counts
            .last("web-3")
            .is_some_and(|last| last.elapsed() > Duration::from_secs(1))
    })?;
    let last = traffic.counts().last("web-3").unwrap_or(removed);
    let after = last.saturating_duration_since(removed);
    println!("# its last answer: {} ms later", after.as_millis());
    println!("# web.yaml: endpoint web-3 added");
    let added = Instant::now();
    cluster.edit_web(None)?;
    traffic.wait("web-3 answers again", |counts| {
        counts.last("web-3").is_some_and(|last| last > added)
    })?;
    let back = traffic
        .counts()
        .last("web-3")
        .unwrap_or(added)
        .saturating_duration_since(added);
    println!("# its first answer: {} ms later", back.as_millis());
    traffic.wait_more(500)?;
    let counts = traffic.stop();
    // Quiet for 20 ms, then at most 100 ms; curl's own lines come late on a busy machine.
    let passed = counts.failures.is_empty() && after < Duration::from_millis(500);
    let seen = format!("{} failed of {}", counts.failures.len(), counts.total());
    Ok((
        format!(
            "{seen}; gone after {} ms, back after {} ms",
            after.as_millis(),
            back.as_millis()
        ),
        passed,
    ))
}

pub(super) fn kill_under_load(cluster: &mut Cluster) -> Seen {
    let traffic = Traffic::start(cluster.client.place(), WEB, 4)?;
    traffic.wait_more(300)?;
    println!("node-a$ kill -9 (the agent)");
    cluster.agent_a.kill9()?;
    let before = traffic.counts().total();
    let_run(Duration::from_secs(2));
    let without = traffic.counts().total() - before;
    println!("# {without} answers in 2 s without an agent");
    println!("node-a$ proxy-agent run ...   # again");
    cluster.agent_a.spawn()?;
    cluster.agent_a.wait_ready()?;
    traffic.wait_more(300)?;
    let counts = traffic.stop();
    let passed = counts.failures.is_empty() && without > 0;
    let seen = format!("{} failed of {}", counts.failures.len(), counts.total());
    Ok((format!("{seen}; {without} while it was dead"), passed))
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
        passed && count == 7,
    ))
}
