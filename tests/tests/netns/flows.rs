//! Every row of the flow matrix by packets: who answers, and which source address it sees.

use std::{
    collections::BTreeSet,
    fs, io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, ensure};
use proxy_tests::{
    Peer, Pod, Scenario, Service,
    flows::{Client, Flow, Kind, Outcome, Setting, Target, exists, expected},
    left_untranslated,
    peer::PATIENCE,
    scenario::{POD_NETWORKS, SOURCES, TCP, UDP, UDP_TARGET, in_family},
};
use serde_json::json;

/// Asked this often, each of two endpoints answers, except once in 100 million times.
const OFTEN: usize = 28;
/// A dropped packet is sent again after a second.
const SILENCE: Duration = Duration::from_millis(400);

#[test]
#[ignore = "needs root and eBPF"]
fn base() {
    run("flows-base", true, false);
}

#[test]
#[ignore = "needs root and eBPF"]
fn without_a_detector() {
    run("flows-no-detector", false, false);
}

#[test]
#[ignore = "needs root and eBPF"]
fn masquerade_all() {
    run("flows-all", true, true);
}

#[test]
#[ignore = "needs root and eBPF"]
fn masquerade_all_without_a_detector() {
    run("flows-all-no-detector", false, true);
}

fn run(name: &str, detector: bool, masquerade_all: bool) {
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
        in_family(name, v6, &args, |s| matrix(s, setting));
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
        .port("dns", "UDP", UDP, UDP_TARGET)
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
    s.settle_rules()?;
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
                    let wanted = expected(flow, setting);
                    let context = || format!("{flow:?} {setting:?}: wanted {wanted}");
                    probe(s, peer, own, flow, wanted).with_context(context)?;
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
    wanted: Outcome,
) -> anyhow::Result<()> {
    let (tcp, udp) = (address(s, flow, TCP), address(s, flow, UDP));
    let connect = |patience| peer.connect_tcp_from(tcp, None, patience);
    match wanted {
        Outcome::Served { by, masqueraded } => {
            let pods: BTreeSet<&str> = by.pods().iter().copied().collect();
            let mut answered = BTreeSet::new();
            for _ in 0..OFTEN {
                let answer = peer.ask_tcp(tcp).with_context(|| format!("TCP to {tcp}"))?;
                let (pod, source) = answer.split_once(' ').context("no source")?;
                let source: IpAddr = source.parse()?;
                if let Some(own) = own {
                    ensure!((source != own) == masqueraded, "{pod} sees {source}");
                }
                answered.insert(pod.to_owned());
            }
            ensure!(answered.iter().eq(&pods), "TCP to {tcp}: {answered:?}");
            let mut answered = BTreeSet::new();
            for _ in 0..OFTEN {
                answered.insert(peer.ask_udp(udp).with_context(|| format!("UDP to {udp}"))?);
            }
            ensure!(answered.iter().eq(&pods), "UDP to {udp}: {answered:?}");
            Ok(())
        }
        // A refusal that comes while connect() still holds the socket is heard at the second attempt, a second later.
        Outcome::Refused => fails(connect(PATIENCE), |error| {
            error.raw_os_error() == Some(libc::ECONNREFUSED)
        }),
        Outcome::Dropped => fails(connect(SILENCE), |error| {
            error.raw_os_error() == Some(libc::ETIMEDOUT)
        }),
        Outcome::Untouched => fails(connect(PATIENCE), left_untranslated),
    }
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
