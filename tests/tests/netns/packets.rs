//! `--mode iptables`: what arrives as a packet, from pods, from the node and from outside.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proxy_tests::{
    Scenario, Service,
    scenario::{SOURCES, TCP, UDP, in_family, in_mode},
};
use serde_json::json;

const NODE_PORT: u16 = 30_081;
const ARGS: [&str; 6] = in_mode("iptables");

/// A Service at `vip(1)` and `outside(1)`, port 80, whose pods say which address they see; and port 53 for datagrams.
fn seen(s: &Scenario) -> Service {
    Service::new("web", &[s.vip(1)])
        .port("http", "TCP", TCP, SOURCES)
        .node_port(NODE_PORT)
        .port("dns", "UDP", UDP, 5353)
        .load_balancer(s.outside(1), "VIP")
}

#[test]
#[ignore = "needs root"]
fn pods_are_those_of_the_nodes_own_networks_which_are_followed() {
    for v6 in [false, true] {
        let args = [&ARGS[..2], &ARGS[4..], &["--detect-local-mode", "NodeCIDR"]].concat();
        in_family("ipt-node-cidr", v6, &args, |s| {
            s.serve_sources()?;
            let node = |networks: [&str; 2]| {
                let node = json!({
                    "apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-a"},
                    "spec": {"podCIDR": networks[0], "podCIDRs": networks},
                });
                s.manifests.write("node-node-a.yaml", &node.to_string())
            };
            s.manifests.put(&seen(s).endpoint(s.endpoint(&s.far)))?;
            s.wait_rules(&s.vip(1).to_string())?;
            let (client, own) = (s.client.peer()?, s.client.address(v6));
            // The client is a pod of the node, and later of nobody that the node knows.
            for (networks, is_kept) in [
                (["10.244.1.0/24", "fd00:10:244:1::/64"], true),
                (["10.9.1.0/24", "fd00:10:9:1::/64"], false),
            ] {
                node(networks)?;
                s.wait_rules(&format!("! -s {}", networks[usize::from(v6)]))?;
                let answer = client.ask_tcp((s.vip(1), TCP).into())?;
                let (_, source) = answer.split_once(' ').context("no source")?;
                let is_own = source.parse::<IpAddr>()? == own;
                ensure!(is_own == is_kept, "{networks:?}: {source}");
            }
            Ok(())
        });
    }
}

#[test]
#[ignore = "needs root"]
fn kube_proxys_counters_count() {
    const ACCEPTED: &str = "kubeproxy_iptables_localhost_nodeports_accepted_packets_total";
    in_family("ipt-counters", false, &ARGS, |s| {
        s.serve_sources()?;
        s.manifests.put(&seen(s).endpoint(s.endpoint(&s.near)))?;
        s.wait_rules(&s.vip(1).to_string())?;
        let accepted = || s.agent.metric(ACCEPTED, "");
        let node = s.a.peer()?;
        node.ask_tcp((s.a.v4(), NODE_PORT).into())?;
        ensure!(accepted()? == 0.0, "that was no loopback address");
        for _ in 0..3 {
            node.ask_tcp((s.loopback(), NODE_PORT).into())?;
        }
        // The first packet of each.
        ensure!(accepted()? == 3.0, "{}", accepted()?);
        let rules = s.a.output("iptables-save", &[])?;
        ensure!(rules.contains("ct_state_invalid_dropped_pkts"), "{rules}");
        Ok(())
    });
}

#[test]
#[ignore = "needs root"]
fn without_what_ebpf_needs_mode_auto_takes_iptables_and_says_why() {
    in_family("ipt-auto", false, &[], |s| {
        s.serve_sources()?;
        s.agent.stop()?;
        s.agent.text(&["cleanup"])?;
        s.manifests.put(&seen(s).endpoint(s.endpoint(&s.near)))?;
        let log = s.topology.state_dir().join("auto.log");
        let mut command = s.a.place().command("unshare")?;
        let preparation = "umount -l /sys/fs/bpf\nexec \"$@\"";
        command.args(["--mount", "sh", "-e", "-c", preparation, "sh"]);
        command.arg(proxy_tests::agent::agent_binary()?);
        command
            .args(s.agent.global_args())
            .args(["run", "--manifests"]);
        command
            .arg(s.manifests.dir())
            .stderr(std::fs::File::create(&log)?);
        let mut agent = command.spawn()?;
        let served = s
            .wait_rules(&s.vip(1).to_string())
            .and_then(|()| Ok(s.client.peer()?.ask_tcp((s.vip(1), TCP).into())?));
        kill(Pid::from_raw(agent.id().try_into()?), Signal::SIGTERM)?;
        agent.wait()?;
        let log = std::fs::read_to_string(log)?;
        served.with_context(|| log.clone())?;
        ensure!(
            log.contains("no socket layer") && log.contains("mount -t bpf"),
            "{log}"
        );
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn the_mode_changes_on_a_live_node_and_cleanup_leaves_nothing() {
    in_family("ipt-mode", false, &[], |s| {
        s.serve_sources()?;
        let [near, far] = [&s.near, &s.far].map(|pod| s.endpoint(pod));
        s.apply(&seen(s).endpoint(near).endpoint(far))?;
        let vip: SocketAddr = (s.vip(1), TCP).into();
        let ours = |s: &Scenario| -> anyhow::Result<bool> {
            Ok(s.a.output("iptables-save", &[])?.contains("KUBE-SERVICES"))
        };
        ensure!(ours(s)?);
        s.agent.stop()?;
        let mut packets = proxy_tests::Agent::new(&s.a, &s.manifests, &ARGS)?;
        packets.spawn()?;
        packets.wait_ready()?;
        ensure!(ours(s)?);
        ensure!(!s.a.bpf_dir().join("links/connect4").exists());
        ensure!(s.a.bpf_dir().join("links/getpeername4").exists());
        s.client.peer()?.ask_tcp(vip)?;
        let refused = packets.run(&["cleanup"])?;
        ensure!(refused.status.code() == Some(1), "{refused:?}");
        packets.stop()?;
        s.client.peer()?.ask_tcp(vip).context("without an agent")?;
        s.agent.spawn()?;
        s.agent.wait_ready()?;
        s.client.peer()?.ask_tcp(vip)?;
        ensure!(ours(s)? && s.a.bpf_dir().join("links/connect4").exists());
        s.agent.stop()?;
        packets.spawn()?;
        packets.wait_ready()?;
        packets.stop()?;
        packets.text(&["cleanup"])?;
        ensure!(!ours(s)? && !s.a.bpf_dir().exists());
        Ok(())
    });
}
