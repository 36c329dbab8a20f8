//! A pod's answer that conntrack calls invalid: it must not reach the client with the pod's address, which would reset the
//! connection (kubernetes#74839).

use std::{io, net::IpAddr, time::Duration};

use anyhow::{Context, ensure};
use proxy_tests::{
    Scenario, Service,
    peer::PATIENCE,
    raw::RawSocket,
    scenario::{SOURCES, TCP, in_family, in_mode},
};

const INVALID_DROPPED: &str = "kubeproxy_iptables_ct_state_invalid_dropped_packets_total";
const CLIENT_PORT: u16 = 40_000;
const RST: u8 = 4;
const ACK: u8 = 16;
/// Far outside of every window.
const FAR: u32 = 1 << 30;
/// What is sent arrives within a millisecond.
const SHORTLY: Duration = Duration::from_millis(100);

/// What a TCP header says.
#[derive(Debug)]
struct Segment {
    ports: [u16; 2],
    sequence: u32,
    acknowledged: u32,
    flags: u8,
}

impl Segment {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let short = |at: usize| Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let word = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        Some(Self {
            ports: [short(0)?, short(2)?],
            sequence: word(4)?,
            acknowledged: word(8)?,
            flags: *bytes.get(13)?,
        })
    }

    /// Without data. RFC 9293, section 3.1.
    fn write(&self, from: IpAddr, to: IpAddr) -> Vec<u8> {
        let mut bytes = self.ports.map(u16::to_be_bytes).concat();
        bytes.extend(self.sequence.to_be_bytes());
        bytes.extend(self.acknowledged.to_be_bytes());
        bytes.extend([5 << 4, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
        let octets = |ip| match ip {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        // Length and protocol, of the pseudo header.
        let summed = [octets(from), octets(to), vec![0, 20, 0, 6], bytes.clone()].concat();
        bytes[16..18].copy_from_slice(&checksum(&summed).to_be_bytes());
        bytes
    }
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let (words, _) = bytes.as_chunks::<2>();
    let words = words.iter().map(|word| u16::from_be_bytes(*word));
    !words.fold(0, |sum: u16, word| {
        let (sum, carry) = sum.overflowing_add(word);
        sum + u16::from(carry)
    })
}

/// A connection from outside that keeps its source address, and a segment of the pod far out of its window; the connection
/// goes on, and nobody resets it.
fn answer_out_of_window(s: &Scenario, dropped: bool) -> anyhow::Result<()> {
    s.serve_sources()?;
    let outsider = s.topology.outsider()?;
    let (v4, v6) = (s.a.v4(), s.a.v6());
    outsider.ip(&format!(
        "route add 203.0.113.0/24 via {v4}\nroute add 2001:db8::/64 via {v6}\n"
    ))?;
    let service = Service::new("web", &[s.vip(1)])
        .port("http", "TCP", TCP, SOURCES)
        .node_port(30_080)
        .load_balancer(s.outside(1), "VIP")
        .spec("externalTrafficPolicy", "Local");
    s.manifests.put(&service.endpoint(s.endpoint(&s.near)))?;
    s.wait_rules(&s.outside(1).to_string())?;
    let (client, pod) = (outsider.address(s.v6), s.near.address(s.v6));
    let v6 = s.v6;
    let raw = move || RawSocket::open(v6, libc::IPPROTO_TCP);
    let (at_client, at_pod) = (outsider.place().inside(raw)??, s.near.place().inside(raw)??);
    let stream = outsider.peer()?.connect_tcp_from(
        (s.outside(1), TCP).into(),
        Some((client, CLIENT_PORT).into()),
        PATIENCE,
    )?;
    let (answer, _) = stream.receive(PATIENCE)?;
    ensure!(answer == format!("near {client}\n"), "{answer}");
    let is_from_client = |it: &Segment| it.ports[0] == CLIENT_PORT;
    let seen = at_pod.find(PATIENCE, |bytes, _| {
        Segment::parse(bytes).filter(|it| is_from_client(it) && it.flags == ACK)
    })?;
    let late = Segment {
        ports: [SOURCES, CLIENT_PORT],
        sequence: seen.acknowledged.wrapping_add(FAR),
        acknowledged: seen.sequence,
        flags: ACK,
    };
    at_pod.send(&late.write(pod, client), client)?;
    let count = |wanted: f64| s.agent.wait_metric(INVALID_DROPPED, "", |it| it == wanted);
    if dropped {
        count(1.0).context("the rule saw nothing")?;
    } else {
        let from = at_client.find(PATIENCE, |bytes, from| {
            let is_it = Segment::parse(bytes)?.sequence == late.sequence;
            is_it.then_some(from)
        })?;
        ensure!(from == s.outside(1), "it came from {from}");
    }
    ensure!(stream.ask()? == "near");
    let reset = at_pod.find(SHORTLY, |bytes, _| {
        Segment::parse(bytes).filter(|it| is_from_client(it) && it.flags & RST != 0)
    });
    ensure!(is_silence(&reset), "{reset:?}");
    if !dropped {
        return count(0.0);
    }
    // The end of a connection that nobody knows is invalid, too. Who is no pod may have sent the rest by another way.
    let stray = Segment {
        ports: [CLIENT_PORT + 1, 9],
        sequence: 1,
        acknowledged: 0,
        flags: RST,
    };
    let is_stray = |bytes: &[u8], _| Segment::parse(bytes).filter(|it| it.ports == stray.ports);
    at_client.send(&stray.write(client, pod), pod)?;
    at_pod.find(PATIENCE, is_stray).context("from outside")?;
    at_pod.send(&stray.write(pod, client), client)?;
    count(2.0).context("from a pod")?;
    let arrived = at_client.find(SHORTLY, is_stray);
    ensure!(is_silence(&arrived), "{arrived:?}");
    Ok(())
}

fn is_silence<T>(result: &io::Result<T>) -> bool {
    matches!(result, Err(error) if error.raw_os_error() == Some(libc::ETIMEDOUT))
}

#[test]
#[ignore = "needs root and eBPF"]
fn an_invalid_answer_of_a_pod_is_dropped_and_resets_no_connection() {
    for mode in ["ebpf", "iptables"] {
        for v6 in [false, true] {
            in_family(&format!("invalid-{mode}"), v6, &in_mode(mode), |s| {
                answer_out_of_window(s, true)
            });
        }
    }
}

#[test]
#[ignore = "needs root"]
fn where_conntrack_is_liberal_an_answer_out_of_its_window_is_translated() {
    let args = [&in_mode("iptables")[..], &["--conntrack-tcp-be-liberal"]].concat();
    for v6 in [false, true] {
        in_family("invalid-liberal", v6, &args, |s| {
            answer_out_of_window(s, false)?;
            let rules = s.a.output("iptables-save", &[])?;
            ensure!(!rules.contains("INVALID"), "{rules}");
            Ok(())
        });
    }
}
