//! The links, addresses and routes of a topology, made with iproute2.

use std::{
    fs,
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, ensure};

use super::{Node, Pod, hextet};
use crate::{names, names::Suffix, place::Place};

/// Below the smallest of both tunnels: 1500 bytes less the headers of Ethernet, IPv6, UDP and VXLAN.
const POD_MTU: u16 = 1430;
const SWITCH_MAC: &str = "02:42:c0:a8:4d:01";

/// The network between the nodes.
pub(super) fn make_switch(suffix: &Suffix) -> anyhow::Result<()> {
    let netns = suffix.netns("switch");
    make_namespace(&netns)?;
    // What nobody translated ends here at once, with an error that no proxy would give.
    let lines = format!(
        "link set lo up
link add br0 address {SWITCH_MAC} type bridge
link set br0 up
addr add 192.168.77.1/24 dev br0
addr add fd00:192:168:77::1/64 dev br0 nodad
route add unreachable 0.0.0.0/0
route add unreachable ::/0
"
    );
    batch("ip", &netns, &lines)
}

/// The namespace of a node, with its bridge and tunnels.
pub(super) fn make_node(suffix: &Suffix, node: &Node) -> anyhow::Result<()> {
    let netns = suffix.netns(node.name());
    make_namespace(&netns)?;
    let (v4, v6, number) = (node.v4(), node.v6(), node.number());
    let block = hextet(number);
    // The routes are for the errors that the switch sends back.
    let lines = format!(
        "link add v-{number} type veth peer name eth0 netns {netns}
link set v-{number} master br0
link set v-{number} up
route add 10.244.{number}.0/24 via {v4}
route add fd00:10:244:{block:x}::/64 via {v6}
"
    );
    batch("ip", &suffix.netns("switch"), &lines)?;
    let mac = tunnel_mac(node);
    // As the CNI plugin `bridge` does it: else it is the lowest of its ports, which come and go, and IPv6 neighbours go on
    // with the former one for seconds.
    let gateway_mac = format!("02:42:0a:f4:{number:02x}:01");
    let lines = format!(
        "link set lo up
addr add {v4}/24 dev eth0
addr add {v6}/64 dev eth0 nodad
link set eth0 up
route add 0.0.0.0/0 via 192.168.77.1
route add ::/0 via fd00:192:168:77::1
link add cni0 address {gateway_mac} mtu {POD_MTU} type bridge
addr add 10.244.{number}.1/24 dev cni0
addr add fd00:10:244:{block:x}::1/64 dev cni0 nodad
link set cni0 up
link add flannel.1 address {mac} type vxlan id 1 dev eth0 local {v4} dstport 8472 nolearning
addr add 10.244.{number}.0/32 dev flannel.1
link set flannel.1 up
link add flannel-v6.1 address {mac} type vxlan id 1 dev eth0 local {v6} dstport 8472 nolearning
addr add fd00:10:244:{block:x}::/128 dev flannel-v6.1 nodad
link set flannel-v6.1 up
"
    );
    batch("ip", &netns, &lines)
}

/// A machine beside the cluster, on the same switch as its nodes. It knows no pod network.
pub(super) fn make_outsider(suffix: &Suffix, outsider: &Pod) -> anyhow::Result<()> {
    let netns = namespace_name(outsider.place());
    make_namespace(&netns)?;
    let lines = format!(
        "link add v-out type veth peer name eth0 netns {netns}
link set v-out master br0
link set v-out up
"
    );
    batch("ip", &suffix.netns("switch"), &lines)?;
    let lines = format!(
        "link set lo up
addr add {}/24 dev eth0
addr add {}/64 dev eth0 nodad
link set eth0 up
route add 0.0.0.0/0 via 192.168.77.1
route add ::/0 via fd00:192:168:77::1
",
        outsider.v4(),
        outsider.v6()
    );
    batch("ip", &netns, &lines)
}

/// Tells `node` the way to the pods of `other`.
pub(super) fn join(suffix: &Suffix, node: &Node, other: &Node) -> anyhow::Result<()> {
    let (number, block, mac) = (other.number(), hextet(other.number()), tunnel_mac(other));
    let lines = format!(
        "neigh replace 10.244.{number}.0 lladdr {mac} dev flannel.1 nud permanent
route add 10.244.{number}.0/24 via 10.244.{number}.0 dev flannel.1 onlink
neigh replace fd00:10:244:{block:x}:: lladdr {mac} dev flannel-v6.1 nud permanent
route add fd00:10:244:{block:x}::/64 via fd00:10:244:{block:x}:: dev flannel-v6.1 onlink
"
    );
    let netns = suffix.netns(node.name());
    batch("ip", &netns, &lines)?;
    let (v4, v6) = (other.v4(), other.v6());
    let lines = format!(
        "fdb append {mac} dev flannel.1 dst {v4}
fdb append {mac} dev flannel-v6.1 dst {v6}
"
    );
    batch("bridge", &netns, &lines)
}

/// The namespace of a pod, on its node's bridge.
pub(super) fn make_pod(node: &Node, pod: &Pod, last: u8) -> anyhow::Result<()> {
    let netns = namespace_name(pod.place());
    make_namespace(&netns)?;
    let lines = format!(
        "link add v-{last} mtu {POD_MTU} type veth peer name eth0 mtu {POD_MTU} netns {netns}
link set v-{last} master cni0
link set v-{last} type bridge_slave hairpin on
link set v-{last} up
"
    );
    batch("ip", &namespace_name(node.place()), &lines)?;
    let (number, block) = (node.number(), hextet(node.number()));
    let lines = format!(
        "link set lo up
addr add {}/24 dev eth0
addr add {}/64 dev eth0 nodad
link set eth0 up
route add 0.0.0.0/0 via 10.244.{number}.1
route add ::/0 via fd00:10:244:{block:x}::1
",
        pod.v4(),
        pod.v6()
    );
    batch("ip", &netns, &lines)
}

pub(super) fn namespace_name(place: &Place) -> String {
    place
        .netns
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

fn tunnel_mac(node: &Node) -> String {
    format!("02:42:0a:f4:{:02x}:00", node.number())
}

fn make_namespace(netns: &str) -> anyhow::Result<()> {
    let output = Command::new("ip").args(["netns", "add", netns]).output();
    let output = output.context("cannot run ip (package iproute2)")?;
    let reason = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "cannot make network namespace {netns}: {}",
        reason.trim()
    );
    let place = Place {
        name: netns.to_owned(),
        netns: Path::new(names::NETNS_DIR).join(netns),
        cgroup: Path::new("").into(),
    };
    place.inside(set_sysctls)?
}

/// The settings of the current network namespace: a router, and addresses usable at once.
fn set_sysctls() -> anyhow::Result<()> {
    let settings = [
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv6/conf/default/forwarding", "1"),
        ("ipv6/conf/all/accept_dad", "0"),
        ("ipv6/conf/default/accept_dad", "0"),
        // Each rejection is told, however many there are at once.
        ("ipv4/icmp_ratemask", "0"),
        ("ipv6/icmp/ratemask", "255"),
        // What kubeadm asks of a node: rules see what a bridge forwards.
        ("bridge/bridge-nf-call-iptables", "1"),
        ("bridge/bridge-nf-call-ip6tables", "1"),
    ];
    for (name, value) in settings {
        let path = format!("/proc/sys/net/{name}");
        fs::write(&path, value).with_context(|| format!("cannot set {path} to {value}"))?;
    }
    Ok(())
}

/// Runs one command per line of `lines` in a namespace, with the batch mode of `ip` or `bridge`.
pub(super) fn batch(program: &str, netns: &str, lines: &str) -> anyhow::Result<()> {
    let mut child = Command::new(program)
        .args(["-n", netns, "-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {program} (package iproute2)"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(lines.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    let reason = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{program} -n {netns}: {}; of:\n{lines}",
        reason.trim()
    );
    Ok(())
}
