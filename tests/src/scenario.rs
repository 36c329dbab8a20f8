//! What most scenarios need: two nodes, a client, a server on each node, and the agent of the client's node.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::{
    Agent, Endpoint, Manifests, Node, Peer, Pod, Service, Topology,
    marker::{MARKER, Marker, find},
    wait_for,
};

/// Where the pods serve TCP.
pub const TCP_TARGET: u16 = 8080;
/// Where the pods say over TCP, UDP and SCTP which address they see, if they are asked to serve there.
pub const SOURCES: u16 = 8081;
/// Networks of the pods in both families, for `--cluster-cidr`.
pub const POD_NETWORKS: &str = "10.244.0.0/16,fd00:10:244::/48";
/// Where the pods serve UDP.
pub const UDP_TARGET: u16 = 5353;
/// Port of a Service for TCP.
pub const TCP: u16 = 80;
/// Port of a Service for UDP.
pub const UDP: u16 = 53;
/// Port of a Service for SCTP.
pub const SCTP: u16 = 3868;
/// Asked this often, each of two endpoints answers, except once in 500 billion times.
pub const OFTEN: usize = 40;
/// How long a change of a file may take until the kernel holds it, on a busy machine.
pub const SOON: Duration = Duration::from_secs(30);

/// Arguments for an agent in this mode that tells pods from others, and whose rules follow a change at once.
pub const fn in_mode(mode: &str) -> [&str; 6] {
    [
        "--mode",
        mode,
        "--cluster-cidr",
        POD_NETWORKS,
        "--iptables-min-sync-period",
        "100ms",
    ]
}

/// A small cluster in which one node has an agent.
#[derive(Debug)]
pub struct Scenario {
    /// Which family this run is about.
    pub v6: bool,
    /// The agent of `a`.
    pub agent: Agent,
    /// What the agent follows.
    pub manifests: Manifests,
    /// The node with the agent, zone "zone-a".
    pub a: Node,
    /// The other node, zone "zone-b".
    pub b: Node,
    /// A client on `a`.
    pub client: Pod,
    /// A server on `a`.
    pub near: Pod,
    /// A server on `b`.
    pub far: Pod,
    marker: Marker,
    /// The whole cluster.
    pub topology: Topology,
}

/// Runs `body` in IPv4 and in IPv6, each time in a cluster of its own. The agent is ready and knows no Service.
pub fn each_family(name: &str, body: impl Fn(&mut Scenario) -> anyhow::Result<()>) {
    each_family_with(name, &[], body);
}

/// As [`each_family`], with more arguments for the agent.
pub fn each_family_with(
    name: &str,
    args: &[&str],
    body: impl Fn(&mut Scenario) -> anyhow::Result<()>,
) {
    for v6 in [false, true] {
        in_family(name, v6, args, &body);
    }
}

/// As [`each_family_with`], in one family.
pub fn in_family(
    name: &str,
    v6: bool,
    args: &[&str],
    body: impl Fn(&mut Scenario) -> anyhow::Result<()>,
) {
    let family = if v6 { "IPv6" } else { "IPv4" };
    let mut scenario = Scenario::start(name, v6, args)
        .unwrap_or_else(|error| panic!("{name}, {family}: {error:?}"));
    let result = body(&mut scenario);
    // The scenario is dropped by the panic, and so prints the agent's log.
    result.unwrap_or_else(|error| panic!("{name}, {family}: {error:?}"));
}

impl Scenario {
    /// The cluster; its agent is ready.
    ///
    /// # Errors
    /// The kernel refuses, or the agent does.
    pub fn start(name: &str, v6: bool, args: &[&str]) -> anyhow::Result<Self> {
        let mut scenario = Self::without_agent(name, v6, args)?;
        scenario.agent.spawn()?;
        scenario.agent.wait_ready()?;
        Ok(scenario)
    }

    /// The cluster; its agent is not started.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn without_agent(name: &str, v6: bool, args: &[&str]) -> anyhow::Result<Self> {
        let mut topology = Topology::new(name)?;
        let (a, b) = (topology.node("node-a")?, topology.node("node-b")?);
        let (client, near, far) = (a.pod("client")?, a.pod("near")?, b.pod("far")?);
        for server in [&near, &far] {
            server.serve_tcp(TCP_TARGET)?;
            server.serve_udp(UDP_TARGET)?;
        }
        let manifests = Manifests::new(&topology.state_dir(), "manifests")?;
        manifests.put_node("node-a", "zone-a")?;
        manifests.put_node("node-b", "zone-b")?;
        let agent = Agent::new(&a, &manifests, args)?;
        Ok(Self {
            v6,
            agent,
            manifests,
            a,
            b,
            client,
            near,
            far,
            marker: Marker::default(),
            topology,
        })
    }

    /// A ClusterIP of this run's family.
    pub fn vip(&self, number: u8) -> IpAddr {
        if self.v6 {
            Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, number.into()).into()
        } else {
            Ipv4Addr::new(10, 96, 0, number).into()
        }
    }

    /// An address that nobody has, of this run's family.
    pub fn outside(&self, number: u8) -> IpAddr {
        if self.v6 {
            Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, number.into()).into()
        } else {
            Ipv4Addr::new(203, 0, 113, number).into()
        }
    }

    /// The loopback address of this run's family.
    pub fn loopback(&self) -> IpAddr {
        if self.v6 {
            Ipv6Addr::LOCALHOST.into()
        } else {
            Ipv4Addr::LOCALHOST.into()
        }
    }

    /// The unspecified address of this run's family.
    pub fn unspecified(&self) -> IpAddr {
        if self.v6 {
            Ipv6Addr::UNSPECIFIED.into()
        } else {
            Ipv4Addr::UNSPECIFIED.into()
        }
    }

    /// A Service at `vip(number)` with TCP port 80 and UDP port 53, without endpoints.
    pub fn service(&self, name: &str, number: u8) -> Service {
        Service::new(name, &[self.vip(number)])
            .port("http", "TCP", TCP, TCP_TARGET)
            .port("dns", "UDP", UDP, UDP_TARGET)
    }

    /// A pod of this cluster as a ready endpoint.
    pub fn endpoint(&self, pod: &Pod) -> Endpoint {
        let node = if pod.v4().octets()[2] == self.a.number() {
            "node-a"
        } else {
            "node-b"
        };
        Endpoint::new(pod.address(self.v6), node)
    }

    /// Writes a Service, and waits until the kernel holds it.
    ///
    /// # Errors
    /// It did not get there.
    pub fn apply(&self, service: &Service) -> anyhow::Result<()> {
        self.manifests.put(service)?;
        self.settle()
    }

    /// Waits until the kernel holds everything that the files said when this was called.
    ///
    /// # Errors
    /// It did not get there.
    pub fn settle(&self) -> anyhow::Result<()> {
        self.marker.settle(&self.agent, &self.manifests)
    }

    /// As [`Scenario::settle`]; the rules of the packet layer, too.
    ///
    /// # Errors
    /// It did not get there.
    pub fn settle_packets(&self) -> anyhow::Result<()> {
        self.settle()?;
        self.wait_idle()
    }

    /// Waits until the rules hold everything that the files said when this was called; for agents without maps to ask, too.
    ///
    /// # Errors
    /// They did not get there.
    pub fn settle_rules(&self) -> anyhow::Result<()> {
        let port = self.marker.put(&self.manifests, self.vip(250))?;
        self.wait_rules(&format!(
            r#"-m tcp --dport {port} -m comment --comment "{MARKER} has no endpoints""#
        ))
    }

    /// Waits until no layer has anything left to write.
    ///
    /// # Errors
    /// One has, for long.
    pub fn wait_idle(&self) -> anyhow::Result<()> {
        let pending = "proxy_agent_changes_pending";
        self.agent
            .wait_metric(pending, "", |pending| pending == 0.0)
    }

    /// Waits until the rules hold `text`, in the family of this run, and all that came with it.
    ///
    /// # Errors
    /// They do not in time.
    pub fn wait_rules(&self, text: &str) -> anyhow::Result<()> {
        let save = if self.v6 {
            "ip6tables-save"
        } else {
            "iptables-save"
        };
        wait_for("the rules are there", SOON, || {
            let rules = self.a.output(save, &[])?;
            ensure!(
                rules.contains(text),
                "no {text} in\n{rules}\n{}",
                self.agent.log()
            );
            Ok(())
        })?;
        // One table is written before the other.
        self.wait_idle()
    }

    /// Has both servers answer at [`SOURCES`] which address they see.
    ///
    /// # Errors
    /// The port is taken.
    pub fn serve_sources(&self) -> anyhow::Result<()> {
        for pod in [&self.near, &self.far] {
            pod.peer()?.serve_sources(SOURCES, pod.name())?;
        }
        Ok(())
    }

    /// `dump services`.
    ///
    /// # Errors
    /// The agent's binary cannot say.
    pub fn services(&self) -> anyhow::Result<Value> {
        self.agent.json(&["dump", "services"])
    }

    /// One element of `dump services`, by its "namespace/name:port".
    ///
    /// # Errors
    /// There is none.
    pub fn dumped(&self, service: &str) -> anyhow::Result<Value> {
        let services = self.services()?;
        find(&services, service)
            .cloned()
            .with_context(|| format!("no {service} in {services}"))
    }
}

/// Who answers `times` connections; none may fail.
///
/// # Errors
/// One failed.
pub fn who_tcp(client: &Peer, to: SocketAddr, times: usize) -> anyhow::Result<BTreeSet<String>> {
    let ask = |_| client.ask_tcp(to).with_context(|| format!("TCP to {to}"));
    (0..times).map(ask).collect()
}

/// Who answers `times` datagrams, each from a new socket; none may fail.
///
/// # Errors
/// One failed.
pub fn who_udp(client: &Peer, to: SocketAddr, times: usize) -> anyhow::Result<BTreeSet<String>> {
    let ask = |_| client.ask_udp(to).with_context(|| format!("UDP to {to}"));
    (0..times).map(ask).collect()
}

/// Asserts that TCP and UDP both reach exactly these pods.
///
/// # Errors
/// Another pod answered, or nobody.
pub fn reaches(client: &Peer, to: IpAddr, pods: &[&str]) -> anyhow::Result<()> {
    let wanted: BTreeSet<String> = pods.iter().map(|&pod| pod.to_owned()).collect();
    let tcp = who_tcp(client, (to, TCP).into(), OFTEN)?;
    ensure!(
        tcp == wanted,
        "TCP to {to} reaches {tcp:?} instead of {wanted:?}"
    );
    let udp = who_udp(client, (to, UDP).into(), OFTEN)?;
    ensure!(
        udp == wanted,
        "UDP to {to} reaches {udp:?} instead of {wanted:?}"
    );
    Ok(())
}

/// Asserts that a result is this error of the operating system.
///
/// # Errors
/// It is another one, or a success.
pub fn fails_with<T: std::fmt::Debug>(result: io::Result<T>, errno: i32) -> anyhow::Result<()> {
    let wanted = io::Error::from_raw_os_error(errno);
    match result {
        Err(error) if error.raw_os_error() == Some(errno) => Ok(()),
        other => anyhow::bail!("{other:?} instead of {wanted}"),
    }
}

/// Asserts that both TCP and UDP are refused.
///
/// # Errors
/// They are not.
pub fn refuses(client: &Peer, to: IpAddr, tcp: u16, udp: u16) -> anyhow::Result<()> {
    fails_with(client.ask_tcp((to, tcp).into()), libc::ECONNREFUSED)
        .with_context(|| format!("TCP to {to}:{tcp}"))?;
    let socket = client.open_udp_for((to, udp).into())?;
    fails_with(socket.send_to("?", (to, udp).into()), libc::ECONNREFUSED)
        .with_context(|| format!("sendmsg to {to}:{udp}"))
}

/// Asserts that a connection leaves the node untranslated.
///
/// # Errors
/// It was answered or refused.
pub fn passes(client: &Peer, to: SocketAddr) -> anyhow::Result<()> {
    match client.ask_tcp(to) {
        Err(error) if crate::left_untranslated(&error) => Ok(()),
        other => anyhow::bail!("{other:?} from {to} instead of an error of the network"),
    }
}
