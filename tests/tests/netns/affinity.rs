//! Session affinity: one client, one endpoint.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use anyhow::ensure;
use proxy_tests::{
    Endpoint, Scenario, let_run,
    scenario::{
        OFTEN, TCP, TCP_TARGET, UDP, each_family, each_family_with, in_mode, who_tcp, who_udp,
    },
};

/// Enough that a client rarely finds the same one again by chance.
const ENDPOINTS: u16 = 16;

/// Serves as many endpoints on the near pod, each at a port of its own.
fn many(s: &Scenario) -> anyhow::Result<Vec<Endpoint>> {
    (0..ENDPOINTS)
        .map(|number| {
            let port = TCP_TARGET + 100 + number;
            let address = SocketAddr::from((s.near.address(s.v6), port));
            s.near.peer()?.serve_tcp(address, &format!("e{number}"))?;
            s.near.peer()?.serve_udp(address, &format!("e{number}"))?;
            Ok(s.endpoint(&s.near).at_port(port))
        })
        .collect()
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_client_stays_with_its_endpoint() {
    each_family("affinity", |s| {
        s.apply(&s.service("web", 1).affinity(600).endpoints(many(s)?))?;
        let mut chosen = BTreeSet::new();
        for client in [s.client.peer()?, s.a.peer()?, s.near.peer()?] {
            let who = who_tcp(&client, (s.vip(1), TCP).into(), OFTEN)?;
            ensure!(who.len() == 1, "TCP: {who:?}");
            ensure!(who_udp(&client, (s.vip(1), UDP).into(), OFTEN)?.len() == 1);
            chosen.extend(who);
        }
        println!("three clients chose {chosen:?}");
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn affinity_is_shared_by_the_frontends_of_a_port() {
    each_family("affinity-shared", |s| {
        let web = proxy_tests::Service::new("web", &[s.vip(1)])
            .port("http", "TCP", TCP, TCP_TARGET)
            .node_port(30080)
            .affinity(600)
            .endpoints(many(s)?);
        s.apply(&web)?;
        let client = s.client.peer()?;
        let mut who = who_tcp(&client, (s.vip(1), TCP).into(), 1)?;
        who.extend(who_tcp(&client, (s.a.address(s.v6), 30080).into(), OFTEN)?);
        ensure!(who.len() == 1, "{who:?}");
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_removed_endpoint_loses_its_clients() {
    each_family("affinity-removed", |s| {
        let web = s.service("web", 1).affinity(600);
        s.apply(&web.clone().endpoint(s.endpoint(&s.near)))?;
        let (client, to) = (s.client.peer()?, SocketAddr::from((s.vip(1), TCP)));
        assert_eq!(client.ask_tcp(to)?, "near");
        s.apply(&web.clone().endpoint(s.endpoint(&s.far)))?;
        assert_eq!(client.ask_tcp(to)?, "far");
        // Coming back does not take the client back.
        s.apply(
            &web.endpoint(s.endpoint(&s.far))
                .endpoint(s.endpoint(&s.near)),
        )?;
        assert_eq!(
            who_tcp(&client, to, OFTEN)?,
            BTreeSet::from(["far".to_owned()])
        );
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn affinity_ends_when_the_client_was_idle_for_long() {
    for mode in ["ebpf", "iptables"] {
        each_family_with("affinity-timeout", &in_mode(mode), times_out);
    }
}

fn times_out(s: &mut Scenario) -> anyhow::Result<()> {
    let web = s.service("web", 1).affinity(1).endpoints(many(s)?);
    s.manifests.put(&web)?;
    s.settle_rules()?;
    let (client, to) = (s.client.peer()?, SocketAddr::from((s.vip(1), TCP)));
    let mut who = BTreeSet::new();
    // The same by chance each time: once in 16^5.
    for _ in 0..6 {
        who.insert(client.ask_tcp(to)?);
        let_run(Duration::from_millis(1200));
    }
    ensure!(who.len() > 1, "always {who:?}");
    // Each connection renews it.
    let first = client.ask_tcp(to)?;
    for _ in 0..6 {
        let_run(Duration::from_millis(400));
        ensure!(
            client.ask_tcp(to)? == first,
            "left {first} though it was not idle"
        );
    }
    Ok(())
}
