//! One UDP socket across many replaced endpoints.

use std::{
    collections::BTreeSet,
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::ensure;
use proxy_tests::{
    Peer, Scenario, let_run,
    load::{LoadPlan, Talk},
    scenario::{UDP, each_family},
};

const REPLACEMENTS: u16 = 20;

/// A server that dies with the returned handle, and the Service with it as its only endpoint.
fn replacement(s: &Scenario, number: u16) -> anyhow::Result<(Peer, proxy_tests::Service)> {
    let (pod, port) = (
        if number.is_multiple_of(2) {
            &s.near
        } else {
            &s.far
        },
        20_000 + number,
    );
    let peer = Peer::start(pod.place())?;
    peer.serve_udp((s.unspecified(), port).into(), &format!("u{number}"))?;
    let service = s.service("dns", 1).endpoint(s.endpoint(pod).at_port(port));
    Ok((peer, service))
}

#[test]
#[ignore = "needs root and eBPF"]
fn an_unconnected_socket_loses_nothing_across_twenty_replaced_endpoints() {
    each_family("udp-unconnected", |s| {
        let (mut server, service) = replacement(s, 0)?;
        s.apply(&service)?;
        let mut plan = LoadPlan::new(Talk::Udp, vec![(s.vip(1), UDP).into()]);
        plan.pause = Duration::from_millis(1);
        let load = s.client.peer()?.start_load(plan)?;
        for number in 1..=REPLACEMENTS {
            let (next, service) = replacement(s, number)?;
            s.apply(&service)?;
            // The change is in the kernel: the old one may die.
            drop(std::mem::replace(&mut server, next));
            let_run(Duration::from_millis(50));
        }
        let report = load.stop()?;
        ensure!(
            report.failed == 0,
            "{} of {} lost: {:#?}",
            report.failed,
            report.answered(),
            report.failures
        );
        let who: BTreeSet<_> = report.answers.keys().collect();
        ensure!(
            who.len() == usize::from(REPLACEMENTS) + 1,
            "answered by {who:?}"
        );
        println!("{} datagrams, 0 lost", report.answered());
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_connected_socket_hears_of_each_of_twenty_replaced_endpoints() {
    each_family("udp-connected", |s| {
        let (mut server, service) = replacement(s, 0)?;
        s.apply(&service)?;
        let to = SocketAddr::from((s.vip(1), UDP));
        let mut slowest = Duration::ZERO;
        for number in 1..=REPLACEMENTS {
            let socket = s.client.peer()?.open_udp_for(to)?;
            socket.connect(to)?;
            ensure!(
                socket.ask()? == format!("u{}", number - 1),
                "the wrong server"
            );
            let (next, service) = replacement(s, number)?;
            let start = Instant::now();
            s.manifests.put(&service)?;
            let error = socket.receive(Duration::from_secs(2)).unwrap_err();
            let elapsed = start.elapsed();
            ensure!(
                error.kind() != io::ErrorKind::WouldBlock,
                "{number}: no error in {elapsed:?}"
            );
            slowest = slowest.max(elapsed);
            drop(std::mem::replace(&mut server, next));
        }
        println!("{REPLACEMENTS} errors, the slowest {slowest:?} after the file was changed");
        // 100 ms, and the 20 ms of quiet that the agent waits for.
        ensure!(
            slowest < Duration::from_millis(120),
            "the slowest error came after {slowest:?}"
        );
        Ok(())
    });
}
