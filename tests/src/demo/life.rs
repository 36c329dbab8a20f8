//! Steps with traffic going on: endpoints change, an agent dies, both agents change their mode.

use std::time::{Duration, Instant};

use super::{
    Mode, Seen,
    cluster::Cluster,
    traffic::{Counts, Traffic, WEB},
};
use crate::{Place, let_run};

/// The external IP of the Service for clients outside.
const PUBLIC: &str = "http://203.0.113.82/";

/// How soon a change must be seen. Sockets: quiet for 20 ms, then at most 100 ms, and curl's own lines come late on a busy
/// machine. Rules: at most one write a second, and the tools take their time.
fn soon(mode: Mode) -> Duration {
    match mode {
        Mode::Ebpf => Duration::from_millis(500),
        Mode::Iptables => RULES_SOON,
    }
}

const RULES_SOON: Duration = Duration::from_secs(3);

/// How long after `since` a pod answered; nothing if it did not.
fn delay(counts: &Counts, pod: &str, since: Instant) -> Duration {
    let last = counts.last(pod).unwrap_or(since);
    last.saturating_duration_since(since)
}

fn wait_gone(traffic: &Traffic, pod: &str) -> anyhow::Result<()> {
    traffic.wait(&format!("{pod} answers no more"), |counts| {
        counts
            .last(pod)
            .is_some_and(|last| last.elapsed() > Duration::from_secs(1))
    })
}

fn wait_answer(traffic: &Traffic, pod: &str, since: Instant) -> anyhow::Result<Duration> {
    traffic.wait(&format!("{pod} answers"), |counts| {
        counts.last(pod).is_some_and(|last| last > since)
    })?;
    Ok(since.elapsed())
}

pub(super) fn change_under_load(cluster: &mut Cluster) -> Seen {
    let traffic = Traffic::start(cluster.client.place(), WEB, 4)?;
    traffic.wait("all three pods answer", |counts| counts.answers.len() == 3)?;
    println!("# web.yaml: endpoint web-3 removed");
    let removed = Instant::now();
    cluster.edit_web(Some("web-3"))?;
    wait_gone(&traffic, "web-3")?;
    let after = delay(&traffic.counts(), "web-3", removed);
    println!("# its last answer: {} ms later", after.as_millis());
    println!("# web.yaml: endpoint web-3 added");
    let added = Instant::now();
    cluster.edit_web(None)?;
    let back = wait_answer(&traffic, "web-3", added)?;
    println!("# its first answer: {} ms later", back.as_millis());
    traffic.wait_more(500)?;
    let counts = traffic.stop()?;
    let passed = counts.failures.is_empty() && after < soon(cluster.mode);
    let (after, back) = (after.as_millis(), back.as_millis());
    let seen = counts.verdict();
    Ok((
        format!("{seen}; gone after {after} ms, back after {back} ms"),
        passed,
    ))
}

pub(super) fn replace_under_load(cluster: &mut Cluster) -> Seen {
    let traffic = Traffic::start(cluster.outsider.place(), PUBLIC, 4)?;
    traffic.wait("all three pods answer", |counts| counts.answers.len() == 3)?;
    println!("# public.yaml: pod web-4 in the place of web-3");
    let replaced = Instant::now();
    cluster.replace_public(true)?;
    let new = wait_answer(&traffic, "web-4", replaced)?;
    wait_gone(&traffic, "web-3")?;
    let old = delay(&traffic.counts(), "web-3", replaced);
    let (new_ms, old_ms) = (new.as_millis(), old.as_millis());
    println!("# first answer of web-4 {new_ms} ms later, last one of web-3 {old_ms} ms later");
    println!("# public.yaml: as before");
    let restored = Instant::now();
    cluster.replace_public(false)?;
    wait_answer(&traffic, "web-3", restored)?;
    let counts = traffic.stop()?;
    let passed = counts.failures.is_empty() && new < RULES_SOON && old < RULES_SOON;
    let seen = counts.verdict();
    Ok((
        format!("{seen}; new pod after {new_ms} ms, old one gone after {old_ms} ms"),
        passed,
    ))
}

fn kill_under(cluster: &mut Cluster, place: &Place, url: &str) -> Seen {
    let traffic = Traffic::start(place, url, 4)?;
    traffic.wait_more(300)?;
    println!("node-a$ kill -9 (the agent)");
    cluster.agent_a.kill9()?;
    let before = traffic.counts().total();
    let_run(Duration::from_secs(1));
    let without = traffic.counts().total() - before;
    println!("# {without} answers in 1 s without an agent");
    println!("node-a$ proxy-agent run ...   # again");
    cluster.agent_a.spawn()?;
    cluster.agent_a.wait_ready()?;
    traffic.wait_more(300)?;
    let counts = traffic.stop()?;
    let passed = counts.failures.is_empty() && without > 0;
    let seen = counts.verdict();
    Ok((format!("{seen}; {without} while it was dead"), passed))
}

pub(super) fn kill_under_load(cluster: &mut Cluster) -> Seen {
    let place = cluster.client.place().clone();
    kill_under(cluster, &place, WEB)
}

pub(super) fn kill_under_load_outside(cluster: &mut Cluster) -> Seen {
    let place = cluster.outsider.place().clone();
    kill_under(cluster, &place, PUBLIC)
}

fn switch(cluster: &mut Cluster, mode: Mode) -> Seen {
    let inside = Traffic::start(cluster.client.place(), WEB, 2)?;
    let outside = Traffic::start(cluster.outsider.place(), PUBLIC, 2)?;
    for traffic in [&inside, &outside] {
        traffic.wait_more(200)?;
    }
    cluster.switch(mode)?;
    for traffic in [&inside, &outside] {
        traffic.wait_more(200)?;
    }
    let (inside, outside) = (inside.stop()?, outside.stop()?);
    let passed = inside.failures.is_empty() && outside.failures.is_empty();
    let (inside, outside) = (inside.verdict(), outside.verdict());
    Ok((
        format!("from a pod {inside}; from outside {outside}"),
        passed,
    ))
}

pub(super) fn to_iptables(cluster: &mut Cluster) -> Seen {
    switch(cluster, Mode::Iptables)
}

pub(super) fn to_ebpf(cluster: &mut Cluster) -> Seen {
    switch(cluster, Mode::Ebpf)
}
