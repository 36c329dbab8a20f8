//! Which endpoint may answer for which address.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
};

use crate::state::{Family, FrontendKind, Protocol, ServiceState};

/// A flow: what the client addressed, and who answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Flow {
    pub protocol: Protocol,
    /// Destination of the client's packets.
    pub to: SocketAddr,
    /// Source of the answers, as they come.
    pub answered_by: SocketAddr,
    /// One has come.
    pub is_answered: bool,
}

/// Who may answer for the frontends of Services.
#[derive(Clone, Debug, Default)]
pub struct Answers {
    frontends: HashMap<(Protocol, SocketAddr), Index>,
    node_ports: HashMap<(Protocol, Family, u16), Index>,
    own: HashSet<IpAddr>,
    serving: HashSet<(Index, SocketAddr)>,
}

/// Stands for a service port.
type Index = u32;

impl Answers {
    /// Those of `services`, whatever their policies and topology: flows that go on are not moved. `own` are the addresses
    /// of this node.
    pub fn of<'a>(
        services: impl IntoIterator<Item = &'a ServiceState>,
        own: impl IntoIterator<Item = IpAddr>,
    ) -> Self {
        let mut answers = Self {
            own: own.into_iter().collect(),
            ..Self::default()
        };
        for (index, service) in (0..).zip(services) {
            let protocol = service.key.protocol;
            // Who serves a local link is not translated to.
            let frontends = service.frontends.iter().filter(|of| !of.on_local_link);
            for frontend in frontends {
                match frontend.kind {
                    FrontendKind::NodePort => {
                        let port = (protocol, service.key.family, frontend.port);
                        answers.node_ports.insert(port, index);
                    }
                    FrontendKind::ClusterIp
                    | FrontendKind::LoadBalancer
                    | FrontendKind::ExternalIp => {
                        let address = SocketAddr::new(frontend.address, frontend.port);
                        answers.frontends.insert((protocol, address), index);
                    }
                }
            }
            let backends = service.backends.iter();
            let serving = backends.map(|backend| SocketAddr::new(backend.address, backend.port));
            answers
                .serving
                .extend(serving.map(|backend| (index, backend)));
        }
        answers
    }

    /// Of which kinds a flow can be stale.
    pub(super) fn kinds(&self) -> BTreeSet<(Family, Protocol)> {
        let frontends = self.frontends.keys();
        let frontends = frontends.map(|(protocol, of)| (Family::of(of.ip()), *protocol));
        let node_ports = self.node_ports.keys();
        let node_ports = node_ports.map(|(protocol, family, _)| (*family, *protocol));
        frontends.chain(node_ports).collect()
    }

    /// Whether the flow belongs to one of the Services, and leads nowhere: it was let through untranslated, from a time
    /// without rules or endpoints, or whoever answers no longer serves it.
    pub(super) fn is_stale(&self, flow: &Flow) -> bool {
        let Flow {
            protocol,
            to,
            answered_by,
            is_answered,
        } = *flow;
        let of_node_port = || {
            let is_own = to.ip().is_loopback() || self.own.contains(&to.ip());
            let port = (protocol, Family::of(to.ip()), to.port());
            self.node_ports.get(&port).filter(|_| is_own)
        };
        let service = self.frontends.get(&(protocol, to)).or_else(of_node_port);
        service.is_some_and(|service| match protocol {
            Protocol::Udp => !self.serving.contains(&(*service, answered_by)),
            Protocol::Tcp | Protocol::Sctp => !is_answered && answered_by == to,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::udp_service, *};

    fn flow(protocol: Protocol, to: &str, answered_by: &str) -> Flow {
        Flow {
            protocol,
            to: to.parse().unwrap(),
            answered_by: answered_by.parse().unwrap(),
            is_answered: false,
        }
    }

    #[test]
    fn a_flow_is_stale_when_nobody_who_serves_answers_it() {
        let services = [
            udp_service("dns", "10.96.0.10:53", 30053, &["10.244.0.2:5353"]),
            udp_service("empty", "10.96.0.11:53", 30054, &[]),
            udp_service("dns6", "[fd00:96::a]:53", 30053, &["[fd00::2]:5353"]),
        ];
        let own = ["192.168.0.1", "fd00:1::1"].map(|own| own.parse().unwrap());
        let answers = Answers::of(&services, own);
        for (to, answered_by, expected) in [
            ("10.96.0.10:53", "10.244.0.2:5353", false),
            ("10.96.0.10:53", "10.244.0.3:5353", true),
            ("10.96.0.10:53", "10.244.0.2:53", true),
            // Let through untranslated.
            ("10.96.0.10:53", "10.96.0.10:53", true),
            ("10.96.0.11:53", "10.244.0.2:5353", true),
            // Another port, another Service's business.
            ("10.96.0.10:54", "10.244.0.3:5353", false),
            ("10.244.0.3:5353", "10.244.0.3:5353", false),
            // Node ports, on own addresses and loopback.
            ("192.168.0.1:30053", "10.244.0.2:5353", false),
            ("192.168.0.1:30053", "10.244.0.3:5353", true),
            ("127.0.0.1:30053", "10.244.0.3:5353", true),
            ("192.168.0.1:30054", "10.244.0.3:5353", true),
            ("192.0.2.1:30053", "192.0.2.1:30053", false),
            ("[fd00:96::a]:53", "[fd00::2]:5353", false),
            ("[fd00:96::a]:53", "[fd00::3]:5353", true),
            ("[fd00:1::1]:30053", "[fd00::3]:5353", true),
            ("[fd00:1::1]:30054", "[fd00::3]:5353", false),
        ] {
            let flow = flow(Protocol::Udp, to, answered_by);
            assert_eq!(answers.is_stale(&flow), expected, "{flow:?}");
            let tcp = Flow {
                protocol: Protocol::Tcp,
                ..flow
            };
            assert!(!answers.is_stale(&tcp), "{tcp:?}");
        }
    }

    #[test]
    fn a_connection_is_stale_while_nobody_answers_and_nobody_translated_it() {
        let (vip, backend) = ("10.96.0.10:80", "10.244.0.2:8080");
        for protocol in [Protocol::Tcp, Protocol::Sctp] {
            let mut service = udp_service("web", vip, 30080, &[backend]);
            service.key.protocol = protocol;
            let answers = Answers::of([&service], ["192.168.0.1".parse().unwrap()]);
            assert_eq!(answers.kinds(), [(Family::V4, protocol)].into());
            for (to, answered_by, expected) in [
                (vip, vip, true),
                ("192.168.0.1:30080", "192.168.0.1:30080", true),
                // Translated, whether or not that endpoint is still one.
                (vip, backend, false),
                (vip, "10.244.0.3:8080", false),
                ("10.96.0.10:81", "10.96.0.10:81", false),
                ("192.0.2.1:30080", "192.0.2.1:30080", false),
            ] {
                let flow = flow(protocol, to, answered_by);
                assert_eq!(answers.is_stale(&flow), expected, "{flow:?}");
                let answered = Flow {
                    is_answered: true,
                    ..flow
                };
                assert!(!answers.is_stale(&answered), "{answered:?}");
            }
        }
    }

    #[test]
    fn what_a_local_link_serves_is_nobodys_business() {
        let mut service = udp_service("dns", "10.96.0.10:53", 30053, &["10.244.0.2:5353"]);
        service.frontends.truncate(1);
        service.frontends[0].on_local_link = true;
        assert!(Answers::of([&service], []).kinds().is_empty());
    }
}
