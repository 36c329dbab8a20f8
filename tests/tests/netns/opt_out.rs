//! Sockets and addresses that the socket layer leaves alone on request.

use std::net::SocketAddr;

use anyhow::ensure;
use proxy_tests::{
    Peer,
    scenario::{SOON, Scenario, TCP, UDP, each_family, each_family_with, reaches},
    wait_for,
};

/// Sockets that the socket layer left alone so far.
fn left_alone(s: &Scenario) -> anyhow::Result<f64> {
    s.agent
        .metric("proxy_agent_passed_total", "reason=\"opted_out\"")
}

#[test]
#[ignore = "needs root and eBPF"]
fn an_excluded_cgroup_is_left_alone_and_the_others_are_not() {
    each_family_with(
        "excluded-cgroup",
        &["--socket-exclude-cgroup", "pod-cl*"],
        |s| {
            s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.far)))?;
            s.settle_packets()?;
            reaches(&s.near.peer()?, s.vip(1), &["far"])?;
            reaches(&s.a.peer()?, s.vip(1), &["far"])?;
            ensure!(left_alone(s)? == 0.0);
            // Whoever handles its packets sees the ClusterIP; then they are the packet layer's.
            reaches(&s.client.peer()?, s.vip(1), &["far"])?;
            ensure!(left_alone(s)? >= 2.0);
            Ok(())
        },
    );
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_cgroup_that_comes_later_is_excluded_too() {
    each_family_with(
        "later-cgroup",
        &["--socket-exclude-cgroup", "mesh/*"],
        |s| {
            s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.far)))?;
            let peer = Peer::start(&s.a.place_in("mesh/sidecar")?)?;
            wait_for("the new cgroup is excluded", SOON, || {
                reaches(&peer, s.vip(1), &["far"])?;
                ensure!(left_alone(s)? > 0.0);
                Ok(())
            })?;
            reaches(&s.a.peer()?, s.vip(1), &["far"])
        },
    );
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_cluster_ip_on_a_local_link_is_left_to_its_server() {
    each_family("node-local-dns", |s| {
        let prefix = if s.v6 { "128 nodad" } else { "32" };
        s.a.ip(&format!("addr add {}/{prefix} dev cni0\n", s.vip(1)))?;
        let (tcp, udp): (SocketAddr, SocketAddr) = ((s.vip(1), TCP).into(), (s.vip(1), UDP).into());
        s.a.peer()?.serve_tcp(tcp, "cache")?;
        s.a.peer()?.serve_udp(udp, "cache")?;
        s.apply(&s.service("dns", 1).endpoint(s.endpoint(&s.far)))?;
        s.settle_packets()?;
        for client in [s.client.peer()?, s.a.peer()?] {
            reaches(&client, s.vip(1), &["cache"])?;
        }
        let client = s.client.address(s.v6).to_string();
        let why = s.agent.json(&["explain", &client, &format!("{udp}/UDP")])?;
        ensure!(why["verdict"] == "pass", "{why}");
        ensure!(
            why["reason"]
                .as_str()
                .is_some_and(|reason| reason.contains("link")),
            "{why}"
        );

        s.a.ip(&format!(
            "addr del {}/{} dev cni0\n",
            s.vip(1),
            &prefix[..prefix.len().min(3)]
        ))?;
        wait_for("the Service serves again", SOON, || {
            reaches(&s.client.peer()?, s.vip(1), &["far"])
        })
    });
}
