//! Every row of the flow matrix by packets: who answers, and which source address it sees.

use std::{
    collections::BTreeSet,
    fs, io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, ensure};
use proxy_tests::{
    Peer, Pod, Scenario, Service, flannel,
    flows::{
        Client, Flow, Kind, Outcome, Reached, Setting, Target, exists, expected, expected_of_sctp,
    },
    kube::Variant,
    left_untranslated,
    peer::PATIENCE,
    scenario::{POD_NETWORKS, SCTP, SOON, SOURCES, TCP, TCP_TARGET, UDP},
    wait_for,
};
use serde_json::json;

/// Asked this often, each of two endpoints answers, except once in 100 million times.
const OFTEN: usize = 28;
/// A dropped packet is sent again after a second.
const SILENCE: Duration = Duration::from_millis(400);
/// An INIT is sent once, and answered within a millisecond.
const SILENCE_OF_SCTP: Duration = Duration::from_millis(80);

/// What the nodes are like before the agent starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ground {
    /// Without a rule.
    Bare,
    /// With flannel's rules, and a firewall that forwards nothing else.
    Flannel,
    /// kubelet keeps its rules in the legacy tables.
    Legacy,
}

#[test]
#[ignore = "needs root and eBPF"]
fn base_behind_flannels_rules() {
    run("flows-base", Ground::Flannel, true, false);
}

#[test]
#[ignore = "needs root and eBPF"]
fn without_a_detector() {
    run("flows-no-detector", Ground::Bare, false, false);
}

#[test]
#[ignore = "needs root and eBPF"]
fn masquerade_all_in_legacy_tables() {
    run("flows-all", Ground::Legacy, true, true);
}

#[test]
#[ignore = "needs root and eBPF"]
fn masquerade_all_without_a_detector() {
    run("flows-all-no-detector", Ground::Bare, false, true);
}

fn run(name: &str, ground: Ground, detector: bool, masquerade_all: bool) {
    for (ebpf, v6) in [(true, false), (true, true), (false, false), (false, true)] {
        let setting = Setting {
            ebpf,
            v6,
            detector,
            masquerade_all,
        };
        let mut args = vec!["--iptables-min-sync-period", "50ms"];
        args.extend(["--mode", if ebpf { "ebpf" } else { "iptables" }]);
        if detector {
            args.extend(["--cluster-cidr", POD_NETWORKS]);
        }
        if masquerade_all {
            args.push("--masquerade-all");
        }
        let body = |s: &mut Scenario| -> anyhow::Result<()> {
            prepare(s, ground)?;
            s.agent.spawn()?;
            s.agent.wait_ready()?;
            matrix(s, setting)
        };
        let mut s = Scenario::without_agent(name, v6, &args).expect("a cluster");
        body(&mut s).unwrap_or_else(|error| panic!("{ground:?}: {error:?}"));
    }
}

fn prepare(s: &Scenario, ground: Ground) -> anyhow::Result<()> {
    match ground {
        Ground::Bare => Ok(()),
        Ground::Flannel => [&s.a, &s.b].into_iter().try_for_each(flannel::make_rules),
        Ground::Legacy => Variant::Legacy.hint(&s.a),
    }
}

fn number(kind: Kind) -> u8 {
    kind as u8 + 1
}

fn node_port(kind: Kind) -> u16 {
    30_080 + u16::from(number(kind))
}

/// A Service of each kind, with every kind of address.
fn service(s: &Scenario, kind: Kind) -> Service {
    let number = number(kind);
    let service = Service::new(&format!("web-{number}"), &[s.vip(number)])
        .port("http", "TCP", TCP, SOURCES)
        .node_port(node_port(kind))
        .port("dns", "UDP", UDP, SOURCES)
        .node_port(node_port(kind))
        .port("diameter", "SCTP", SCTP, SOURCES)
        .node_port(node_port(kind))
        .load_balancer(s.outside(number), "VIP")
        .spec("externalIPs", json!([s.outside(100 + number)]));
    let (near, far) = (s.endpoint(&s.near), s.endpoint(&s.far));
    let local = |service: Service, policy| service.spec(policy, "Local");
    match kind {
        Kind::Cluster => service.endpoints([near, far]),
        Kind::ExternalLocal => local(service, "externalTrafficPolicy").endpoints([near, far]),
        Kind::InternalLocal => local(service, "internalTrafficPolicy").endpoints([near, far]),
        Kind::Elsewhere => {
            let service = local(service, "externalTrafficPolicy");
            local(service, "internalTrafficPolicy").endpoint(far)
        }
        Kind::Empty => service,
    }
}

fn matrix(s: &Scenario, setting: Setting) -> anyhow::Result<()> {
    s.serve_sources()?;
    let outsider = s.topology.outsider()?;
    join(s, &outsider)?;
    // The node tells of each refusal, however many there are a second.
    s.a.place().inside(|| -> io::Result<()> {
        fs::write("/proc/sys/net/ipv4/icmp_ratelimit", "0")?;
        fs::write("/proc/sys/net/ipv6/icmp/ratelimit", "0")
    })??;
    for kind in Kind::ALL {
        s.manifests.put(&service(s, kind))?;
    }
    settle(s)?;
    let peers = [s.client.peer()?, s.a.peer()?, outsider.peer()?];
    for (client, peer) in Client::ALL.into_iter().zip(&peers) {
        // The node has several addresses, and each is its own.
        let own = match client {
            Client::Pod => Some(s.client.address(s.v6)),
            Client::Node => None,
            Client::Outside => Some(outsider.address(s.v6)),
        };
        for kind in Kind::ALL {
            for target in Target::ALL {
                let flow = Flow {
                    client,
                    target,
                    kind,
                };
                if exists(flow) {
                    let context = || format!("{flow:?} {setting:?}");
                    probe(s, peer, own, flow, setting).with_context(context)?;
                }
            }
        }
    }
    Ok(())
}

/// Routes that the world outside has: the ways to Services lead to `a`, and the way back from the other node does too,
/// where nothing is masqueraded.
fn join(s: &Scenario, outsider: &Pod) -> anyhow::Result<()> {
    let (v4, v6) = (s.a.v4(), s.a.v6());
    outsider.ip(&format!(
        "route add 10.96.0.0/16 via {v4}
route add fd00:10:96::/64 via {v6}
route add 203.0.113.0/24 via {v4}
route add 2001:db8::/64 via {v6}
"
    ))?;
    let (own_v4, own_v6) = (outsider.v4(), outsider.v6());
    s.b.ip(&format!(
        "route add {own_v4}/32 via {v4}\nroute add {own_v6}/128 via {v6}\n"
    ))
}

/// What is written last is the last to be served.
fn settle(s: &Scenario) -> anyhow::Result<()> {
    let marker = Service::new("marker", &[s.vip(200)]).port("marker", "TCP", TCP, TCP_TARGET);
    s.manifests.put(&marker.endpoint(s.endpoint(&s.near)))?;
    let client = s.client.peer()?;
    wait_for("the marker is served", SOON, || {
        Ok(client.ask_tcp((s.vip(200), TCP).into())?)
    })?;
    s.wait_idle()
}

fn address(s: &Scenario, flow: Flow, port: u16) -> SocketAddr {
    let number = number(flow.kind);
    let address = match flow.target {
        Target::ClusterIp => (s.vip(number), port),
        Target::NodePort => (s.a.address(s.v6), node_port(flow.kind)),
        Target::LocalhostNodePort => (s.loopback(), node_port(flow.kind)),
        Target::LoadBalancer => (s.outside(number), port),
        Target::ExternalIp => (s.outside(100 + number), port),
    };
    address.into()
}

fn probe(
    s: &Scenario,
    peer: &Peer,
    own: Option<IpAddr>,
    flow: Flow,
    setting: Setting,
) -> anyhow::Result<()> {
    let (tcp, udp) = (address(s, flow, TCP), address(s, flow, UDP));
    let sctp = address(s, flow, SCTP);
    let (wanted, of_sctp) = (expected(flow, setting), expected_of_sctp(flow, setting));
    let context = |protocol, to, wanted| format!("{protocol} to {to}, wanted {wanted}");
    let served = |ask: &dyn Fn() -> io::Result<String>, by: Reached, masqueraded: bool| {
        let mut answered = BTreeSet::new();
        for _ in 0..OFTEN {
            let answer = ask()?;
            let (pod, source) = answer.trim_end().split_once(' ').context("no source")?;
            let source: IpAddr = source.parse()?;
            if let Some(own) = own {
                ensure!((source != own) == masqueraded, "{pod} sees {source}");
            }
            answered.insert(pod.to_owned());
        }
        ensure!(answered.iter().eq(by.pods()), "{answered:?}");
        Ok(())
    };
    let connect = |patience| peer.connect_tcp_from(tcp, None, patience);
    match wanted {
        Outcome::Served { by, masqueraded } => {
            let ask = || peer.ask_tcp(tcp);
            served(&ask, by, masqueraded).with_context(|| context("TCP", tcp, wanted))?;
            let ask = || {
                let socket = peer.open_udp_for(udp)?;
                socket.send_to("?", udp)?;
                Ok(socket.receive(PATIENCE)?.0)
            };
            served(&ask, by, masqueraded).with_context(|| context("UDP", udp, wanted))
        }
        // A refusal that comes while connect() still holds the socket is heard at the second attempt, a second later.
        Outcome::Refused => fails(connect(PATIENCE), is_refused),
        Outcome::Dropped => fails(connect(SILENCE), is_silence),
        Outcome::Untouched => fails(connect(PATIENCE), left_untranslated),
    }
    .with_context(|| context("TCP", tcp, wanted))?;
    let ask = |patience| peer.ask_sctp(sctp, patience);
    match of_sctp {
        Outcome::Served { by, masqueraded } => served(&|| ask(PATIENCE), by, masqueraded),
        Outcome::Refused => fails(ask(PATIENCE), is_refused),
        Outcome::Dropped => fails(ask(SILENCE_OF_SCTP), is_silence),
        Outcome::Untouched => fails(ask(SILENCE_OF_SCTP), left_untranslated),
    }
    .with_context(|| context("SCTP", sctp, of_sctp))
}

fn is_refused(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ECONNREFUSED)
}

fn is_silence(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ETIMEDOUT)
}

fn fails<T: std::fmt::Debug>(
    result: io::Result<T>,
    wanted: impl Fn(&io::Error) -> bool,
) -> anyhow::Result<()> {
    match result {
        Err(error) if wanted(&error) => Ok(()),
        other => anyhow::bail!("{other:?}"),
    }
}
