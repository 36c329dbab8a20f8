//! Addresses of ServiceCIDRs that no Service has, with kube-proxy's mode nftables: from a pod, the node and outside.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    thread,
    time::Duration,
};

use anyhow::{Context, ensure};
use proxy_tests::{
    Peer, Pod, Scenario,
    scenario::{POD_NETWORKS, SOON, TCP, UDP, each_family_with},
    wait_for,
};
use serde_json::json;

/// Without a word on our own mode the agent chooses the best: sockets and packets.
const AUTO: [&str; 6] = [
    "--proxy-mode",
    "nftables",
    "--cluster-cidr",
    POD_NETWORKS,
    "--iptables-min-sync-period",
    "100ms",
];
const RULES_ALONE: [&str; 2] = ["--mode", "iptables"];
/// How long nothing may come until it counts as dropped: less than until the next SYN.
const SILENCE: Duration = Duration::from_millis(400);

/// What comes of connections to addresses in or beside a ServiceCIDR.
struct Ground<'a> {
    s: &'a Scenario,
    clients: [(&'static str, Peer); 3],
}

impl<'a> Ground<'a> {
    /// What this node does not translate it sends to the other one, which has these addresses: "elsewhere" answers there.
    fn new(s: &'a Scenario, outsider: &Pod) -> anyhow::Result<Self> {
        let length = if s.v6 { "128 nodad" } else { "32" };
        for address in [s.vip(9), beside(s.v6)] {
            s.b.ip(&format!("addr add {address}/{length} dev lo\n"))?;
            let peer = s.b.peer()?;
            peer.serve_tcp((address, TCP).into(), "elsewhere")?;
            peer.serve_udp((address, UDP).into(), "elsewhere")?;
        }
        let (a, b) = (s.a.address(s.v6), s.b.address(s.v6));
        for network in [cidr(s.v6), format!("{}/{length}", beside(s.v6))] {
            let network = network.trim_end_matches(" nodad");
            s.a.ip(&format!("route add {network} via {b}\n"))?;
            outsider.ip(&format!("route add {network} via {a}\n"))?;
        }
        let clients = [
            ("pod", s.client.peer()?),
            ("node", s.a.peer()?),
            ("outside", outsider.peer()?),
        ];
        Ok(Self { s, clients })
    }

    /// Asks from everywhere over TCP and UDP: the same has to come of all.
    fn all(&self, to: IpAddr, expected: &str) -> anyhow::Result<()> {
        for (name, client) in &self.clients {
            let tcp = tcp(client, (to, TCP).into());
            let tcp = outcome(tcp).with_context(|| format!("{name} to {to}"))?;
            ensure!(tcp == expected, "{name} to {to} over TCP: {tcp}");
            let udp = udp(client, (to, UDP).into());
            let udp = outcome(udp).with_context(|| format!("{name} to {to}"))?;
            ensure!(udp == expected, "{name} to {to} over UDP: {udp}");
        }
        Ok(())
    }

    fn wait_all(&self, to: IpAddr, expected: &str) -> anyhow::Result<()> {
        let what = format!("{to} is {expected}");
        wait_for(&what, SOON, || self.all(to, expected))
    }

    /// Packets that the rule for the ServiceCIDR has dropped.
    fn dropped(&self) -> anyhow::Result<u64> {
        let save = ["iptables-save", "ip6tables-save"][usize::from(self.s.v6)];
        let rules = self.s.a.output(save, &["-c", "-t", "filter"])?;
        let rule = format!("-A KUBE-SERVICES -d {} ", cidr(self.s.v6));
        let drops = |line: &&str| line.contains(&rule) && line.ends_with("-j DROP");
        let counted = rules.lines().find(drops);
        let counted = counted.with_context(|| format!("no {rule}in\n{rules}"))?;
        let count = counted.trim_start_matches('[').split(':').next();
        Ok(count.unwrap_or_default().parse()?)
    }

    fn put_cidr(&self) -> anyhow::Result<()> {
        let cidr = json!({
            "apiVersion": "networking.k8s.io/v1",
            "kind": "ServiceCIDR",
            "metadata": {"name": "kubernetes"},
            "spec": {"cidrs": [cidr(false), cidr(true)]},
        });
        self.s.manifests.write("cidr.json", &cidr.to_string())?;
        wait_for("the rule is there", SOON, || self.dropped().map(drop))
    }
}

/// The ServiceCIDR: [`Scenario::vip`] is in it.
fn cidr(v6: bool) -> String {
    ["10.96.0.0/16", "fd00:10:96::/112"][usize::from(v6)].to_owned()
}

/// An address beside it.
fn beside(v6: bool) -> IpAddr {
    match v6 {
        true => Ipv6Addr::new(0xfd00, 0x10, 0x97, 0, 0, 0, 0, 9).into(),
        false => Ipv4Addr::new(10, 97, 0, 9).into(),
    }
}

fn tcp(client: &Peer, to: SocketAddr) -> io::Result<String> {
    let socket = client.connect_tcp_from(to, None, SILENCE)?;
    Ok(socket.receive(SILENCE)?.0)
}

fn udp(client: &Peer, to: SocketAddr) -> io::Result<String> {
    let socket = client.open_udp_for(to)?;
    // EPERM: a rule stopped the node's own datagram.
    match socket.send_to("?", to) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            return Err(io::Error::from_raw_os_error(libc::ETIMEDOUT));
        }
        other => other?,
    }
    Ok(socket.receive(SILENCE)?.0)
}

/// Who answers, "refused" or "dropped".
fn outcome(answer: io::Result<String>) -> io::Result<String> {
    match answer {
        Ok(text) => Ok(text
            .split_whitespace()
            .next()
            .unwrap_or_default()
            .to_owned()),
        Err(error) => match error.raw_os_error() {
            Some(libc::ECONNREFUSED) => Ok("refused".to_owned()),
            Some(libc::ETIMEDOUT | libc::EAGAIN) => Ok("dropped".to_owned()),
            _ => Err(error),
        },
    }
}

/// Runs `body` with sockets and packets, then with packets alone.
fn each(name: &str, body: impl Fn(&mut Scenario, &Pod, &[&str]) -> anyhow::Result<()>) {
    for args in [&AUTO[..], &[&AUTO[..], &RULES_ALONE].concat()] {
        each_family_with(name, args, |s| {
            let outsider = s.topology.outsider()?;
            body(s, &outsider, args)
        });
    }
}

#[test]
#[ignore = "needs root and eBPF"]
fn what_no_service_has_is_dropped_while_the_service_cidr_is_there() {
    each("service-cidrs", |s, outsider, _| {
        let ground = Ground::new(s, outsider)?;
        let near = s.endpoint(&s.near);
        s.manifests
            .put(&s.service("web", 1).endpoint(near.clone()))?;
        s.settle_rules()?;
        ground.all(s.vip(1), "near")?;
        for address in [s.vip(9), beside(s.v6)] {
            ground.all(address, "elsewhere")?;
        }
        ground.put_cidr()?;
        ground.all(s.vip(9), "dropped")?;
        ground.all(s.vip(1), "near")?;
        ground.all(beside(s.v6), "elsewhere")?;

        // Clients are not told, and try again: they are served once the Service has come.
        let late = SocketAddr::from((s.vip(2), TCP));
        let before = ground.dropped()?;
        let places = [s.client.place(), s.a.place(), outsider.place()];
        let connects = places.map(|place| -> anyhow::Result<_> {
            let peer = Peer::start(place)?;
            Ok(thread::spawn(move || {
                let socket = peer.connect_tcp_from(late, None, SOON)?;
                Ok::<_, io::Error>(socket.receive(SOON)?.0)
            }))
        });
        wait_for("their first SYNs are dropped", SOON, || {
            let dropped = ground.dropped()? - before;
            ensure!(dropped >= 3, "{dropped}");
            Ok(())
        })?;
        s.manifests.put(&s.service("late", 2).endpoint(near))?;
        for connect in connects {
            let answer = connect?.join().expect("the thread does not panic");
            ensure!(outcome(answer)? == "near");
        }
        ground.wait_all(s.vip(2), "near")?;
        s.manifests.remove("late")?;
        ground.wait_all(s.vip(2), "dropped")?;

        std::fs::remove_file(s.manifests.dir().join("cidr.json"))?;
        ground.wait_all(s.vip(9), "elsewhere")?;
        ground.all(s.vip(1), "near")
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn explain_plan_and_the_next_mode_know_of_service_cidrs() {
    each("service-cidrs-told", |s, outsider, args| {
        let ground = Ground::new(s, outsider)?;
        ground.put_cidr()?;
        s.wait_idle()?;
        let nobodys = format!("{}/TCP", SocketAddr::from((s.vip(9), TCP)));
        for client in [s.client.address(s.v6), outsider.address(s.v6)] {
            let why = s.agent.json(&["explain", &client.to_string(), &nobodys])?;
            let reason = why["reason"].to_string();
            let says_why = reason.contains("a ServiceCIDR has this address");
            ensure!(
                says_why && why["verdict"] == "drop" && why["layer"] == "packet",
                "{why}"
            );
        }
        let others = format!("{}/TCP", SocketAddr::from((beside(s.v6), TCP)));
        let why = s.agent.json(&["explain", "host", &others])?;
        ensure!(why["verdict"] == "pass", "{why}");
        let plan = |more: &[&str]| -> anyhow::Result<(Option<i32>, String)> {
            let folder = s.manifests.dir().display().to_string();
            let plan = ["plan", "--manifests", &folder];
            let output = s.agent.run(&[&plan, args, more].concat())?;
            Ok((output.status.code(), String::from_utf8(output.stdout)?))
        };
        let (code, text) = plan(&[])?;
        ensure!(code == Some(0), "{code:?} {text}");
        let (code, text) = plan(&["--proxy-mode="])?;
        let chain = format!(
            "chain filter KUBE-SERVICES {}",
            ["IPv4", "IPv6"][usize::from(s.v6)]
        );
        ensure!(code == Some(2) && text.contains(&chain), "{code:?} {text}");
        let clients = ground.clients;
        s.agent.add_flag("--proxy-mode=");
        s.agent.restart()?;
        s.agent.wait_ready()?;
        Ground { s, clients }.wait_all(s.vip(9), "elsewhere")
    });
}
