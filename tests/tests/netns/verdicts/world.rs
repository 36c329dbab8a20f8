//! A cluster with a client in each place, and what they are told.

use std::{
    collections::BTreeSet,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, ensure};
use proxy_tests::{
    Peer, Pod, Scenario, Service, flannel,
    peer::{PATIENCE, Socket},
    scenario::{OFTEN, SOURCES, TCP, UDP, UDP_TARGET, in_mode},
};
use serde_json::json;

/// How long nothing may come until it counts as dropped.
const SILENCE: Duration = Duration::from_millis(250);
/// More than the 100 that xt_recent remembers.
const CLIENTS: u16 = 150;
const NODE_PORT: u16 = 30_100;

pub(super) struct World {
    pub(super) mode: Mode,
    pub(super) outsider: Pod,
    pub(super) s: Scenario,
}

/// How the agent serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// The socket layer beside the packet layer.
    Ebpf,
    /// The packet layer alone.
    Iptables,
}

/// Who connects, to what, and what has to come of it; where it differs, "of TCP/of UDP".
pub(super) type Probe = (Client, Kind, &'static str);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Client {
    Pod,
    Node,
    Outside,
}

pub(super) const ALL: [Client; 3] = [Client::Pod, Client::Node, Client::Outside];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    ClusterIp,
    NodePort,
    /// The node port on 127.0.0.1 or ::1.
    Loopback,
    LoadBalancer,
    ExternalIp,
    /// A port of the ClusterIP that no Service has.
    Unknown,
}

pub(super) const EXTERNAL: [Kind; 3] = [Kind::NodePort, Kind::LoadBalancer, Kind::ExternalIp];

/// Runs `body` with an agent in each mode and family.
pub(super) fn each(body: impl Fn(&World) -> anyhow::Result<()>) {
    for (mode, v6) in [
        (Mode::Ebpf, false),
        (Mode::Ebpf, true),
        (Mode::Iptables, false),
        (Mode::Iptables, true),
    ] {
        let run = || -> anyhow::Result<()> {
            let (mut s, outsider) = cluster(v6, mode)?;
            s.agent.spawn()?;
            s.agent.wait_ready()?;
            body(&World { mode, outsider, s })
        };
        run().unwrap_or_else(|error| panic!("{mode:?}, IPv6 {v6}: {error:?}"));
    }
}

/// A cluster, a machine outside that sends what is for Services through the node, and flannel's rules on both nodes. The
/// agent is not started.
fn cluster(v6: bool, mode: Mode) -> anyhow::Result<(Scenario, Pod)> {
    let mode = match mode {
        Mode::Ebpf => "ebpf",
        Mode::Iptables => "iptables",
    };
    let s = Scenario::without_agent("verdicts", v6, &in_mode(mode))?;
    s.serve_sources()?;
    for node in [&s.a, &s.b] {
        flannel::make_rules(node)?;
        node.place().inside(answer_every_packet)??;
    }
    s.topology.switch_place()?.inside(answer_every_packet)??;
    let outsider = s.topology.outsider()?;
    let (v4, v6) = (s.a.v4(), s.a.v6());
    outsider.ip(&format!(
        "route add 203.0.113.0/24 via {v4}\nroute add 2001:db8::/64 via {v6}\n\
         route add 10.96.0.0/16 via {v4}\nroute add fd00:10:96::/64 via {v6}\n"
    ))?;
    Ok((s, outsider))
}

/// Otherwise one rejection a second reaches a client, less where the node also tells it of a shorter way.
fn answer_every_packet() -> io::Result<()> {
    fs::write("/proc/sys/net/ipv4/icmp_ratelimit", "0")?;
    fs::write("/proc/sys/net/ipv6/icmp/ratelimit", "0")?;
    fs::write("/proc/sys/net/ipv4/conf/all/send_redirects", "0")?;
    fs::write("/proc/sys/net/ipv4/conf/eth0/send_redirects", "0").or_else(|error| {
        // The switch has none.
        (error.kind() == io::ErrorKind::NotFound)
            .then_some(())
            .ok_or(error)
    })
}

impl World {
    /// A Service with every kind of address, and without endpoints.
    pub(super) fn service(&self, number: u8) -> Service {
        let port = NODE_PORT + 2 * u16::from(number);
        Service::new(&format!("web-{number}"), &[self.s.vip(number)])
            .port("http", "TCP", TCP, SOURCES)
            .node_port(port)
            .port("dns", "UDP", UDP, UDP_TARGET)
            .node_port(port + 1)
            .load_balancer(self.s.outside(number), "VIP")
            .spec("externalIPs", json!([self.s.outside(100 + number)]))
    }

    /// Writes Services, and waits until the kernel serves them.
    pub(super) fn apply(&self, services: &[Service]) -> anyhow::Result<()> {
        for service in services {
            self.s.manifests.put(service)?;
        }
        self.s.settle_rules()
    }

    pub(super) fn peer(&self, client: Client) -> anyhow::Result<Peer> {
        match client {
            Client::Pod => self.s.client.peer(),
            Client::Node => self.s.a.peer(),
            Client::Outside => self.outsider.peer(),
        }
    }

    pub(super) fn address(&self, number: u8, kind: Kind) -> (IpAddr, [u16; 2]) {
        let port = NODE_PORT + 2 * u16::from(number);
        match kind {
            Kind::ClusterIp => (self.s.vip(number), [TCP, UDP]),
            Kind::Unknown => (self.s.vip(number), [81, 54]),
            Kind::NodePort => (self.s.a.address(self.s.v6), [port, port + 1]),
            Kind::Loopback => (self.s.loopback(), [port, port + 1]),
            Kind::LoadBalancer => (self.s.outside(number), [TCP, UDP]),
            Kind::ExternalIp => (self.s.outside(100 + number), [TCP, UDP]),
        }
    }

    /// Probes the Service with this number, over TCP and UDP.
    pub(super) fn check(
        &self,
        what: &str,
        number: u8,
        probes: impl IntoIterator<Item = Probe>,
    ) -> anyhow::Result<()> {
        for (client, kind, expected) in probes {
            let peer = self.peer(client)?;
            let (ip, [tcp, udp]) = self.address(number, kind);
            let (by_tcp, by_udp) = expected.split_once('/').unwrap_or((expected, expected));
            // Datagram sockets hear of "port unreachable" only: what leaves the node is silence to them.
            let by_udp = match by_udp {
                "passed" => "dropped",
                verdict => verdict,
            };
            let patience = |expected| match expected {
                "dropped" => SILENCE,
                _ => PATIENCE,
            };
            let tcp = verdict(|| {
                peer.connect_tcp_from((ip, tcp).into(), None, patience(by_tcp))?
                    .receive(PATIENCE)
            });
            let udp = verdict(|| {
                let socket = peer.open_udp_for((ip, udp).into())?;
                socket.connect((ip, udp).into())?;
                // EPERM: a rule stopped the node's own datagram. Whether it was rejected, the socket hears next.
                socket
                    .send("?")
                    .or_else(|error| match error.raw_os_error() {
                        Some(libc::EPERM) => Ok(()),
                        _ => Err(error),
                    })?;
                socket.receive(patience(by_udp))
            });
            for (protocol, expected, found) in [("TCP", by_tcp, tcp), ("UDP", by_udp, udp)] {
                let found = found.with_context(|| format!("{what}: {client:?} to {kind:?}"))?;
                ensure!(
                    found == expected,
                    "{what}: {client:?} to {kind:?} over {protocol}: {found}, not {expected}"
                );
            }
        }
        Ok(())
    }

    /// For processes of this node: `sockets` where the socket layer serves, else `packets`.
    pub(super) fn here(&self, sockets: &'static str, packets: &'static str) -> &'static str {
        match self.mode {
            Mode::Ebpf => sockets,
            Mode::Iptables => packets,
        }
    }

    /// Many client addresses outside.
    pub(super) fn clients(&self) -> anyhow::Result<Vec<IpAddr>> {
        let (out4, out6) = (self.outsider.v4(), self.outsider.v6());
        let local =
            "route add local 198.18.0.0/16 dev lo\nroute add local 2001:db8:5::/64 dev lo\n";
        self.outsider.ip(local)?;
        self.s.a.ip(&format!(
            "route add 198.18.0.0/16 via {out4}\nroute add 2001:db8:5::/64 via {out6}\n"
        ))?;
        let bind_any = || fs::write("/proc/sys/net/ipv6/ip_nonlocal_bind", "1");
        self.outsider.place().inside(bind_any)??;
        let client = |number: u16| -> IpAddr {
            let [high, low] = number.to_be_bytes();
            match self.s.v6 {
                true => Ipv6Addr::new(0x2001, 0xdb8, 5, 0, 0, 0, 1, number).into(),
                false => Ipv4Addr::new(198, 18, 1 + high, low).into(),
            }
        };
        Ok((1..=CLIENTS).map(client).collect())
    }
}

/// Who answers, or what becomes of the first try that nobody answers.
fn verdict(
    mut ask: impl FnMut() -> io::Result<(String, Option<SocketAddr>)>,
) -> io::Result<String> {
    let mut pods = BTreeSet::new();
    for _ in 0..OFTEN {
        match ask() {
            Ok((answer, _)) => pods.insert(name(&answer)),
            Err(error) => {
                return match error.raw_os_error() {
                    Some(libc::ECONNREFUSED) => Ok("refused".to_owned()),
                    Some(libc::ETIMEDOUT | libc::EAGAIN) => Ok("dropped".to_owned()),
                    Some(libc::EHOSTUNREACH | libc::ENETUNREACH) => Ok("passed".to_owned()),
                    _ => Err(error),
                };
            }
        };
    }
    Ok(Vec::from_iter(pods).join(" "))
}

/// Of "pod address" or "pod datagram".
pub(super) fn name(answer: &str) -> String {
    answer.split(' ').next().unwrap_or_default().to_owned()
}

/// Asks over a connection that stays, and says who answers.
pub(super) fn ask(socket: &Socket) -> io::Result<String> {
    socket.send("?\n")?;
    Ok(name(&socket.receive(SILENCE)?.0))
}
