//! Random Services, what clients get from them, and how two proxies' answers compare.
//!
//! A seed makes a [`World`]; [`World::ask`] asks every frontend of it, in every way, and what comes out of two proxies has to be
//! the same, but for what [`agree`] lets pass.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, bail};
use serde_json::json;

use crate::{Endpoint, Peer, Pod, Scenario, Service, flows::Client, scenario::SOURCES};

/// Endpoints that serve answer one after the other by chance: of three each, except once in ten million times.
const OFTEN: usize = 45;
/// A rejection that comes while `connect()` still has the socket is heard at the second SYN, a second later.
const TCP_PATIENCE: Duration = Duration::from_millis(1_300);
const UDP_PATIENCE: Duration = Duration::from_millis(400);
/// At which no Service listens.
const WRONG_PORT: u16 = 999;

/// Numbers by chance, the same for the same seed (SplitMix64).
#[derive(Clone, Debug)]
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn one_in(&mut self, of: u64) -> bool {
        self.next().is_multiple_of(of)
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        let length = choices.len() as u64;
        let at = usize::try_from(self.next() % length).expect("an index");
        choices[at]
    }
}

/// Services, and where to ask for them.
#[derive(Debug)]
pub struct World {
    /// The Services.
    pub services: Vec<Service>,
    probes: Vec<Probe>,
}

/// One question.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Probe {
    service: String,
    what: &'static str,
    is_udp: bool,
    to: SocketAddr,
}

/// What comes back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// These answer; of the client they see its own address, or another one.
    Served {
        /// Their names.
        by: BTreeSet<String>,
        /// Whether its own; both, if some see that and some do not.
        sees_client: BTreeSet<bool>,
    },
    /// ECONNREFUSED.
    Refused,
    /// Nothing, or that there is no way.
    Silent,
}

/// Every question with its answer.
pub type Answers = BTreeMap<String, (Client, Answer)>;

impl World {
    /// The world of a seed, over the pods of a scenario, all of which serve [`SOURCES`].
    pub fn new(seed: u64, s: &Scenario) -> Self {
        let mut chance = Chance(seed);
        let mut world = Self {
            services: Vec::new(),
            probes: Vec::new(),
        };
        for number in 1..=6 {
            world.add(number, &mut chance, s);
        }
        world
    }

    fn add(&mut self, number: u8, chance: &mut Chance, s: &Scenario) {
        let families: &[bool] = chance.of(&[&[false][..], &[true], &[false, true], &[true, false]]);
        let vip = |v6: &bool| -> IpAddr {
            match v6 {
                true => {
                    Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x100 + u16::from(number)).into()
                }
                false => Ipv4Addr::new(10, 96, 1, number).into(),
            }
        };
        let nobodys = |v6: bool, last: u8| -> IpAddr {
            match v6 {
                true => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last.into()).into(),
                false => Ipv4Addr::new(203, 0, 113, last).into(),
            }
        };
        let vips: Vec<IpAddr> = families.iter().map(vip).collect();
        let name = format!("web-{number}");
        let mut service = Service::new(&name, &vips);
        let protocols: &[bool] = chance.of(&[&[false][..], &[true], &[false, true]]);
        let has_node_ports = chance.one_in(2);
        let node_port = |is_udp: bool| 30_100 + 2 * u16::from(number) + u16::from(is_udp);
        for &is_udp in protocols {
            let (port, protocol) = if is_udp {
                ("dns", "UDP")
            } else {
                ("http", "TCP")
            };
            service = service.port(port, protocol, 80, SOURCES);
            if has_node_ports {
                service = service.node_port(node_port(is_udp));
            }
        }
        let (mut external, mut balancer) = (Vec::new(), Vec::new());
        if chance.one_in(3) {
            external.extend(families.iter().map(|v6| nobodys(*v6, 100 + number)));
            service = service.spec("externalIPs", json!(external));
        }
        let is_balanced = has_node_ports && chance.one_in(2);
        if is_balanced {
            let mode = if chance.one_in(5) { "Proxy" } else { "VIP" };
            for v6 in families {
                let address = nobodys(*v6, 200 + number);
                balancer.push(address);
                service = service.load_balancer(address, mode);
            }
            if chance.one_in(2) {
                let ranges = chance.of(&[
                    &["10.244.0.0/16", "fd00:10:244::/48"][..],
                    &["192.0.2.0/24", "2001:db8:1::/64"],
                    &["0.0.0.0/0", "::/0"],
                ]);
                service = service.spec("loadBalancerSourceRanges", json!(ranges));
            }
        }
        if chance.one_in(3) {
            service = service.spec("internalTrafficPolicy", "Local");
        }
        if (has_node_ports || is_balanced) && chance.one_in(2) {
            service = service.spec("externalTrafficPolicy", "Local");
            if is_balanced {
                service = service.spec("healthCheckNodePort", 31_000 + u16::from(number));
            }
        }
        let service = populate(service, families, chance, s);
        let mut add = |what, is_udp, to| {
            self.probes.push(Probe {
                service: name.clone(),
                what,
                is_udp,
                to,
            });
        };
        for (v6, vip) in families.iter().zip(&vips) {
            add("wrong port", false, (*vip, WRONG_PORT).into());
            // Of the other protocol, too, which may not be served.
            for is_udp in [false, true] {
                add("ClusterIP", is_udp, (*vip, 80).into());
            }
            for &is_udp in protocols {
                if has_node_ports {
                    add(
                        "node port",
                        is_udp,
                        (s.a.address(*v6), node_port(is_udp)).into(),
                    );
                }
            }
        }
        for &is_udp in protocols {
            for (what, addresses) in [("external IP", &external), ("load balancer", &balancer)] {
                for address in addresses {
                    add(what, is_udp, (*address, 80).into());
                }
            }
        }
        self.services.push(service);
    }

    /// The same with other endpoints.
    #[must_use]
    pub fn changed(mut self, seed: u64, s: &Scenario) -> Self {
        let mut chance = Chance(seed);
        let services = self.services.into_iter();
        self.services = services
            .map(|service| {
                let families = families(&self.probes, service.name());
                populate(service, &families, &mut chance, s)
            })
            .collect();
        self
    }

    /// Asks everything: a pod of the node, the node itself, and a machine outside, side by side.
    ///
    /// # Errors
    /// A helper is gone, or an answer is none of those that there are.
    pub fn ask(&self, s: &Scenario, outsider: &Pod) -> anyhow::Result<Answers> {
        let own = |pod: &Pod| [false, true].map(|v6| pod.address(v6)).to_vec();
        let clients = [
            (Client::Pod, s.client.peer()?, own(&s.client)),
            (Client::Node, s.a.peer()?, Vec::new()),
            (Client::Outside, outsider.peer()?, own(outsider)),
        ];
        std::thread::scope(|scope| {
            let asking: Vec<_> = clients
                .iter()
                .map(|(client, peer, own)| {
                    scope.spawn(move || {
                        let ask = |probe: &Probe| {
                            let answer = probe
                                .ask(peer, own)
                                .with_context(|| format!("{client:?}, {probe}"))?;
                            Ok((format!("{probe}, from {client:?}"), (*client, answer)))
                        };
                        self.probes
                            .iter()
                            .map(ask)
                            .collect::<anyhow::Result<Answers>>()
                    })
                })
                .collect();
            let mut all = Answers::new();
            for one in asking {
                all.extend(
                    one.join()
                        .map_err(|_| anyhow::anyhow!("a client panicked"))??,
                );
            }
            Ok(all)
        })
    }

    /// The Services as YAML, for who looks for the cause.
    ///
    /// # Errors
    /// None that is known.
    pub fn to_yaml(&self, names: &BTreeSet<&str>) -> anyhow::Result<String> {
        let services = self.services.iter();
        let wanted = services.filter(|service| names.contains(service.name()));
        wanted.map(Service::to_yaml).collect()
    }
}

fn families(probes: &[Probe], service: &str) -> Vec<bool> {
    let own = probes.iter().filter(|probe| probe.service == service);
    let found: BTreeSet<bool> = own.map(|probe| probe.to.is_ipv6()).collect();
    found.into_iter().collect()
}

/// Endpoints in any state, or none.
fn populate(service: Service, families: &[bool], chance: &mut Chance, s: &Scenario) -> Service {
    let mut endpoints = Vec::new();
    for pod in [&s.near, &s.far, &s.client] {
        let state = chance.next() % 6;
        let hint = chance.one_in(4);
        for v6 in families {
            let node = s.endpoint(pod).node().to_owned();
            let endpoint = Endpoint::new(pod.address(*v6), &node);
            let endpoint = match state {
                0 | 1 => continue,
                2 => endpoint.not_ready(),
                3 => endpoint.terminating(),
                _ => endpoint,
            };
            endpoints.push(if hint {
                endpoint.for_node(&node)
            } else {
                endpoint
            });
        }
    }
    service.endpoints(endpoints)
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = if self.is_udp { "UDP" } else { "TCP" };
        write!(f, "{}: {} {}/{protocol}", self.service, self.what, self.to)
    }
}

impl Probe {
    fn ask(&self, peer: &Peer, own: &[IpAddr]) -> anyhow::Result<Answer> {
        let (mut by, mut sees_client) = (BTreeSet::new(), BTreeSet::new());
        for _ in 0..OFTEN {
            match self.once(peer) {
                Ok(text) => {
                    let (who, seen) = text
                        .trim()
                        .split_once(' ')
                        .with_context(|| format!("{text:?}"))?;
                    let seen: IpAddr = seen.parse().with_context(|| format!("{text:?}"))?;
                    by.insert(who.to_owned());
                    sees_client.insert(own.contains(&seen.to_canonical()));
                }
                Err(error) if by.is_empty() => return of_error(&error),
                Err(error) => bail!("{by:?} answered, and then {error}"),
            }
        }
        Ok(Answer::Served { by, sees_client })
    }

    fn once(&self, peer: &Peer) -> io::Result<String> {
        match self.is_udp {
            false => {
                let socket = peer.connect_tcp_from(self.to, None, TCP_PATIENCE)?;
                Ok(socket.receive(TCP_PATIENCE)?.0)
            }
            true => {
                let socket = peer.open_udp_for(self.to)?;
                socket.connect(self.to)?;
                socket.send("?")?;
                Ok(socket.receive(UDP_PATIENCE)?.0)
            }
        }
    }
}

fn of_error(error: &io::Error) -> anyhow::Result<Answer> {
    match error.raw_os_error() {
        Some(libc::ECONNREFUSED) => Ok(Answer::Refused),
        // Or a rule drops it where it is made, of which a datagram's sender is told.
        Some(
            libc::ETIMEDOUT
            | libc::EAGAIN
            | libc::EHOSTUNREACH
            | libc::ENETUNREACH
            | libc::EINPROGRESS
            | libc::EPERM,
        ) => Ok(Answer::Silent),
        _ => bail!("{error}"),
    }
}

/// Whether an answer of ours stands beside kube-proxy's. Rules alone answer the same. What a socket of this node asks the
/// socket layer is refused at once instead of getting nothing, and nothing is masqueraded (README, "Different from kube-proxy
/// on purpose").
pub fn agree(client: Client, ours: &Answer, kube_proxys: &Answer, has_sockets: bool) -> bool {
    if !has_sockets || client == Client::Outside {
        return ours == kube_proxys;
    }
    match (ours, kube_proxys) {
        (Answer::Served { by: ours, .. }, Answer::Served { by: its, .. }) => ours == its,
        (Answer::Refused | Answer::Silent, Answer::Refused | Answer::Silent) => true,
        (Answer::Served { .. }, _) | (_, Answer::Served { .. }) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn served(by: &[&str], sees_client: bool) -> Answer {
        Answer::Served {
            by: by.iter().map(|&by| by.to_owned()).collect(),
            sees_client: [sees_client].into(),
        }
    }

    #[test]
    fn rules_alone_have_to_agree_in_everything() {
        let (near, masqueraded) = (served(&["near"], true), served(&["near"], false));
        assert!(agree(Client::Pod, &near, &near, false));
        assert!(!agree(Client::Pod, &near, &masqueraded, false));
        assert!(!agree(
            Client::Pod,
            &Answer::Refused,
            &Answer::Silent,
            false
        ));
    }

    #[test]
    fn sockets_of_the_node_may_be_refused_and_are_not_masqueraded() {
        let (near, masqueraded) = (served(&["near"], true), served(&["near"], false));
        assert!(agree(Client::Pod, &near, &masqueraded, true));
        assert!(agree(Client::Node, &Answer::Refused, &Answer::Silent, true));
        assert!(!agree(
            Client::Outside,
            &Answer::Refused,
            &Answer::Silent,
            true
        ));
        assert!(!agree(Client::Pod, &near, &served(&["far"], true), true));
        assert!(!agree(Client::Pod, &near, &Answer::Silent, true));
    }

    #[test]
    fn a_seed_says_what_comes() {
        let numbers = |seed| {
            let mut chance = Chance(seed);
            [chance.next(), chance.next()]
        };
        assert_eq!(numbers(7), numbers(7));
        assert_ne!(numbers(7), numbers(8));
    }
}
