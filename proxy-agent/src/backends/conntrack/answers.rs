//! Which endpoint may answer for which address.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
};

use crate::state::{Family, FrontendKind, Protocol, ServiceState};

/// A UDP flow: what the client addressed, and who answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Flow {
    /// Destination of the client's packets.
    pub to: SocketAddr,
    /// Source of the answers, as they come.
    pub answered_by: SocketAddr,
}

/// Who may answer for the frontends of UDP Services.
#[derive(Clone, Debug, Default)]
pub struct Answers {
    frontends: HashMap<SocketAddr, Index>,
    node_ports: HashMap<(Family, u16), Index>,
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
        let udp = services.into_iter();
        let udp = udp.filter(|service| service.key.protocol == Protocol::Udp);
        for (index, service) in (0..).zip(udp) {
            for frontend in &service.frontends {
                match frontend.kind {
                    FrontendKind::NodePort => {
                        let port = (service.key.family, frontend.port);
                        answers.node_ports.insert(port, index);
                    }
                    FrontendKind::ClusterIp
                    | FrontendKind::LoadBalancer
                    | FrontendKind::ExternalIp => {
                        let address = SocketAddr::new(frontend.address, frontend.port);
                        answers.frontends.insert(address, index);
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

    /// Whether a flow of this family can be stale.
    pub(super) fn has(&self, family: Family) -> bool {
        let is_in = |address: &SocketAddr| Family::of(address.ip()) == family;
        self.frontends.keys().any(is_in) || self.node_ports.keys().any(|(of, _)| *of == family)
    }

    /// Whether the flow belongs to one of the Services, and whoever answers no longer serves it. A flow that was let through
    /// untranslated, from a time without endpoints, is one of these: its VIP does not serve.
    pub(super) fn is_stale(&self, flow: &Flow) -> bool {
        let of_node_port = || {
            let Flow { to, answered_by: _ } = flow;
            let is_own = to.ip().is_loopback() || self.own.contains(&to.ip());
            let port = (Family::of(to.ip()), to.port());
            self.node_ports.get(&port).filter(|_| is_own)
        };
        let service = self.frontends.get(&flow.to).or_else(of_node_port);
        service.is_some_and(|service| !self.serving.contains(&(*service, flow.answered_by)))
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::udp_service, *};

    fn flow(to: &str, answered_by: &str) -> Flow {
        Flow {
            to: to.parse().unwrap(),
            answered_by: answered_by.parse().unwrap(),
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
            let flow = flow(to, answered_by);
            assert_eq!(answers.is_stale(&flow), expected, "{flow:?}");
        }
    }

    #[test]
    fn services_that_are_not_udp_have_no_say() {
        let mut service = udp_service("web", "10.96.0.10:80", 30080, &[]);
        service.key.protocol = Protocol::Tcp;
        let answers = Answers::of([&service], []);
        assert!(!answers.has(Family::V4) && !answers.has(Family::V6));
    }
}
