//! Generation swaps: growth, repair, another ABI. What sockets and clients have stays.

use std::{collections::BTreeSet, net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context, ensure};
use proxy_tests::{
    Scenario, Service,
    peer::{PATIENCE, Socket},
    scenario::{TCP, UDP, each_family, reaches},
    wait_for,
};

/// Sockets that were open before, and the endpoint that a client with affinity had chosen.
struct Before {
    tcp: Socket,
    unconnected: Socket,
    connected: Socket,
    chosen: String,
}

fn web(s: &Scenario) -> Service {
    s.service("web", 1)
        .endpoint(s.endpoint(&s.near))
        .endpoint(s.endpoint(&s.far))
}

impl Before {
    /// Opens them. The Service "sticky" has affinity.
    fn open(s: &Scenario) -> anyhow::Result<Self> {
        s.manifests.put(&web(s))?;
        let sticky = s.service("sticky", 2).affinity(600);
        s.apply(
            &sticky
                .endpoint(s.endpoint(&s.near))
                .endpoint(s.endpoint(&s.far)),
        )?;
        let (peer, udp) = (s.client.peer()?, SocketAddr::from((s.vip(1), UDP)));
        let tcp = peer.connect_tcp((s.vip(1), TCP).into())?;
        tcp.receive(PATIENCE)?;
        let (unconnected, connected) = (peer.open_udp_for(udp)?, peer.open_udp_for(udp)?);
        unconnected.ask_to(udp)?;
        connected.connect(udp)?;
        connected.ask()?;
        let chosen = peer.ask_tcp((s.vip(2), TCP).into())?;
        Ok(Self {
            tcp,
            unconnected,
            connected,
            chosen,
        })
    }

    fn check(&self, s: &Scenario) -> anyhow::Result<()> {
        let (tcp, udp): (SocketAddr, SocketAddr) = ((s.vip(1), TCP).into(), (s.vip(1), UDP).into());
        ensure!(
            self.tcp.peer_address()? == tcp,
            "TCP: {:?}",
            self.tcp.peer_address()
        );
        self.tcp.ask()?;
        let (_, from) = self.unconnected.ask_to(udp)?;
        ensure!(from == udp, "a datagram of {udp} came from {from}");
        ensure!(
            self.connected.peer_address()? == udp,
            "UDP: {:?}",
            self.connected.peer_address()
        );
        self.connected.ask().context("the connected UDP socket")?;
        reaches(&s.client.peer()?, s.vip(1), &["near", "far"])
    }

    /// Affinity names members by index: it survives wherever indices do.
    fn check_affinity(&self, s: &Scenario) -> anyhow::Result<()> {
        let to = SocketAddr::from((s.vip(2), TCP));
        let who = proxy_tests::scenario::who_tcp(&s.client.peer()?, to, 20)?;
        ensure!(
            who == BTreeSet::from([self.chosen.clone()]),
            "{} became {who:?}",
            self.chosen
        );
        Ok(())
    }
}

/// Names of the generations in the agent's directory.
fn generations(s: &Scenario) -> anyhow::Result<BTreeSet<String>> {
    let entries = std::fs::read_dir(s.a.bpf_dir())?.flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    Ok(names.filter(|name| name.starts_with("abi-")).collect())
}

#[test]
#[ignore = "needs root and eBPF"]
fn maps_grow_with_the_cluster_and_sockets_notice_nothing() {
    each_family("grow", |s| {
        let before = Before::open(s)?;
        let old = generations(s)?;
        // More than any map holds at first, in one file.
        let many: Vec<_> = (0..3000_u16)
            .flat_map(|number| {
                let [high, low] = number.to_be_bytes();
                let vip = match s.vip(0) {
                    std::net::IpAddr::V4(_) => std::net::Ipv4Addr::new(10, 97, high, low).into(),
                    std::net::IpAddr::V6(v6) => {
                        let mut segments = v6.segments();
                        segments[6] = number + 1;
                        std::net::IpAddr::from(segments)
                    }
                };
                Service::new(&format!("many{number}"), &[vip])
                    .port("http", "TCP", TCP, 8080)
                    .endpoint(s.endpoint(&s.far))
                    .objects()
            })
            .collect();
        let list = serde_json::json!({"apiVersion": "v1", "kind": "List", "items": many});
        s.manifests.write("many.json", &list.to_string())?;
        s.settle()?;
        ensure!(generations(s)? != old, "no new generation: {old:?}");
        before.check(s)?;
        before.check_affinity(s)?;
        ensure!(s.dumped("default/many2999:http")?["backends"][0]["port"] == 8080);
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_repair_leaves_sockets_alone() {
    each_family("repair", |s| {
        let before = Before::open(s)?;
        let old = generations(s)?;
        s.agent.kill9()?;
        for generation in &old {
            std::fs::remove_file(s.a.bpf_dir().join(generation).join("SLOTS"))?;
        }
        s.agent.spawn()?;
        s.agent.wait_ready()?;
        ensure!(generations(s)? != old, "no new generation: {old:?}");
        before.check(s)
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_repair_that_loses_the_indices_leaves_sockets_alone() {
    each_family("lost-ids", |s| {
        let before = Before::open(s)?;
        let log = s.agent.log().len();
        s.agent.kill9()?;
        for generation in generations(s)? {
            std::fs::remove_file(s.a.bpf_dir().join(generation).join("MEMBERS"))?;
        }
        // Endpoints whose indices come first now.
        let [near, far] = [&s.near, &s.far].map(|pod| s.endpoint(pod));
        s.manifests
            .put(&s.service("another", 3).endpoint(near).endpoint(far))?;
        s.agent.spawn()?;
        s.agent.wait_ready()?;
        before.check(s)?;
        wait_for(
            "sockets know their backends",
            Duration::from_secs(5),
            || {
                let log = s.agent.log().split_off(log);
                ensure!(log.contains("by the new indices"), "{log}");
                Ok(())
            },
        )?;
        before.check(s)?;
        ensure!(!s.a.bpf_dir().join("links/bind_udp").exists());
        // And an endpoint that goes now is noticed.
        s.manifests.put(&s.service("web", 1))?;
        s.settle()?;
        wait_for("an error", Duration::from_secs(1), || {
            let answer = before.connected.ask();
            ensure!(answer.is_err(), "{answer:?}");
            Ok(())
        })
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn an_upgrade_and_a_downgrade_leave_sockets_and_affinity_alone() {
    each_family("another-abi", |s| {
        let binary = |name: &str| -> anyhow::Result<PathBuf> {
            let path = std::env::var_os(name);
            Ok(path
                .with_context(|| format!("{name} is not set: run cargo xtask test"))?
                .into())
        };
        let before = Before::open(s)?;
        for (name, abi) in [("PROXY_AGENT_NEXT", "abi-2-"), ("PROXY_AGENT", "abi-1-")] {
            s.agent.kill9()?;
            s.agent.use_binary(&binary(name)?);
            s.agent.spawn()?;
            s.agent.wait_ready()?;
            let now = generations(s)?;
            ensure!(now.iter().any(|name| name.starts_with(abi)), "{now:?}");
            before.check(s)?;
            before.check_affinity(s)?;
        }
        Ok(())
    });
}
