//! Random Services, what clients get from them, and how two proxies' answers compare.
//!
//! A seed makes a [`World`], which changes some times; [`World::ask`] asks everything of it at one moment, and what comes out of
//! two proxies has to be the same, but for what the table of differences ([`crate::flows::DIFFERENCES`]) says.

mod chance;
mod claims;
mod life;
mod plan;
mod questions;
mod shrink;
mod unallocated;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
pub use questions::{Answer, Answers, Asked};
pub use unallocated::serve_unallocated;

use self::{chance::Chance, plan::Plan};
use crate::{
    Pod, Scenario, Service,
    flows::{Client, DIFFERENCES, Target},
    kube::{Mode, SERVICE_NETWORKS},
    peer::Transport,
};

/// Services at some moments, over the pods of a scenario, all of which serve [`crate::scenario::SOURCES`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct World {
    moments: Vec<Vec<Plan>>,
}

impl World {
    /// The world of a seed.
    pub fn new(seed: u64) -> Self {
        Self {
            moments: life::moments(&mut Chance::new(seed)),
        }
    }

    /// How many moments it has.
    pub fn moments(&self) -> usize {
        self.moments.len()
    }

    /// The Services at one moment.
    pub fn services(&self, moment: usize, s: &Scenario) -> Vec<Service> {
        self.moments[moment]
            .iter()
            .map(|plan| plan.service(s))
            .collect()
    }

    /// The names of the Services at one moment, and which of that name each is: with another number it was made again.
    pub fn made(&self, moment: usize) -> BTreeMap<String, u8> {
        let plans = self.moments[moment].iter();
        plans.map(|plan| (plan.name(), plan.made)).collect()
    }

    /// Asks everything at one moment: a pod of the node, the node itself, and a machine outside, side by side.
    ///
    /// # Errors
    /// A helper is gone, or an answer is none of those that there are.
    pub fn ask(&self, moment: usize, s: &Scenario, outsider: &Pod) -> anyhow::Result<Answers> {
        questions::ask(self, moment, s, outsider)
    }

    /// The Services at each moment as YAML, for who looks for the cause.
    ///
    /// # Errors
    /// None that is known.
    pub fn to_yaml(&self, s: &Scenario) -> anyhow::Result<String> {
        let mut text = String::new();
        for moment in 0..self.moments() {
            let made = self.made(moment);
            let made = made.iter().map(|(name, made)| format!("{name} ({made})"));
            let made = made.collect::<Vec<_>>().join(", ");
            // A number that changes: it is deleted and made again.
            text.push_str(&format!("# moment {moment}: {made}\n"));
            for service in self.services(moment, s) {
                text.push_str(&service.to_yaml()?);
            }
        }
        Ok(text)
    }
}

/// A question that kube-proxy has answered, and what bears on the answer here.
#[derive(Debug)]
pub struct Met<'a> {
    asked: &'a Asked,
    /// The agent's socket layer serves the node.
    has_sockets: bool,
    /// Which kube-proxy answered.
    mode: Mode,
    /// All that it answered.
    its: &'a Answers,
    /// What it answered where nobody claimed the ClusterIP of another, if somebody does.
    undisputed: &'a Answers,
    /// What the agent answered.
    ours: &'a Answer,
}

impl Met<'_> {
    /// Whether the socket layer serves it: no packet to a Service leaves the client.
    pub fn by_socket(&self) -> bool {
        let Asked {
            client,
            transport,
            has_ranges,
            ..
        } = self.asked;
        self.has_sockets
            && *client != Client::Outside
            && *transport != Transport::Sctp
            && !has_ranges
    }

    /// Whether the socket layer knows what the connection is to, and says so; a UDP `connect()` is never refused.
    pub fn asks_frontend_by_socket(&self) -> bool {
        self.by_socket() && self.asked.is_frontend && self.asked.transport == Transport::Tcp
    }

    /// Whether it is to a ClusterIP.
    pub fn is_to_cluster_ip(&self) -> bool {
        self.asked.target == Some(Target::ClusterIp)
    }

    /// Whether it is a connection to a port of a ClusterIP that the Service does not have.
    pub fn is_to_unknown_port(&self) -> bool {
        self.is_to_cluster_ip() && !self.asked.is_frontend && self.asked.transport == Transport::Tcp
    }

    /// Whether kube-proxy rejects it in mode nftables, and not in mode iptables.
    pub fn is_rejected_by_nftables_alone(&self) -> bool {
        let Asked {
            client,
            own,
            target,
            to,
            is_frontend,
            ..
        } = self.asked;
        let is_external = matches!(target, Some(Target::ExternalIp | Target::LoadBalancer));
        // What goes there is looked at whoever sends it.
        let is_in = |network: &str| network.parse().is_ok_and(|it: IpNet| it.contains(&to.ip()));
        let is_external = is_external && !SERVICE_NETWORKS.into_iter().any(is_in);
        let leaves_node = *client == Client::Node && is_external && !own.contains(&to.ip());
        let its = self.its.get(&self.asked.to_string());
        self.mode == Mode::Nftables
            && its.is_some_and(|(_, its)| *its == Answer::Refused)
            && (self.is_to_cluster_ip() && !is_frontend || leaves_node && *is_frontend)
    }

    /// What kube-proxy answers at the same node port of the node's address, if this is one of a loopback address that the
    /// socket layer serves.
    pub fn at_node_port_of_address(&self) -> Option<Answer> {
        let Asked {
            target,
            to,
            transport,
            ..
        } = self.asked;
        if !self.by_socket() || *target != Some(Target::LocalhostNodePort) {
            return None;
        }
        let is_it = |other: &&(Asked, Answer)| {
            let (other, _) = other;
            other.client == Client::Node
                && other.target == Some(Target::NodePort)
                && other.transport == *transport
                && (other.to.port(), other.to.is_ipv6()) == (to.port(), to.is_ipv6())
        };
        let (_, answer) = self.its.values().find(is_it)?;
        Some(answer.clone())
    }

    /// What kube-proxy answers where nobody disputes it: at a ClusterIP without the other claims, and else at an address that
    /// the Service that has this one here has alone.
    pub fn undisputed(&self) -> Option<Answer> {
        if self.asked.is_disputed {
            let (_, answer) = self.undisputed.get(&self.asked.to_string())?;
            return Some(answer.clone());
        }
        let to = self.asked.owns_alone?;
        let own = Asked {
            to,
            ..self.asked.clone()
        };
        let (_, answer) = self.its.get(&own.to_string())?;
        Some(answer.clone())
    }

    /// What endpoints see of a client whose packets nobody translates: addresses of its own, as its routes choose.
    pub fn own_addresses(&self) -> BTreeSet<IpAddr> {
        let own = &self.asked.own;
        match self.ours {
            Answer::Served { sees, .. } if sees.iter().all(|it| own.contains(it)) => sees.clone(),
            _ => own.iter().copied().collect(),
        }
    }
}

/// Which two proxies are compared.
#[derive(Clone, Copy, Debug)]
pub struct Comparison {
    /// The agent has its socket layer.
    pub has_sockets: bool,
    /// kube-proxy's mode.
    pub mode: Mode,
}

impl Comparison {
    /// Every question that the agent answers otherwise than kube-proxy and the table of differences say.
    ///
    /// `undisputed` is what kube-proxy answers in [`World::undisputed`], if there is such a world.
    pub fn differences(self, its: &Answers, undisputed: &Answers, ours: &Answers) -> Vec<String> {
        let mut found = Vec::new();
        for (question, (asked, ours)) in ours {
            let Some((_, answer)) = its.get(question) else {
                found.push(format!("{question} was not asked"));
                continue;
            };
            let met = Met {
                asked,
                has_sockets: self.has_sockets,
                mode: self.mode,
                its,
                undisputed,
                ours,
            };
            let differences = DIFFERENCES.iter().filter_map(|it| it.answers);
            let expected = differences.fold(answer.clone(), |answer, difference| {
                difference(&met, answer)
            });
            if *ours != expected || matches!(ours, Answer::Unsteady(_)) {
                found.push(format!(
                    "{question}: {ours:?}, expected {expected:?}, kube-proxy {answer:?}"
                ));
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube::Variant;

    #[test]
    fn a_seed_makes_one_world_which_changes() {
        assert_eq!(World::new(7), World::new(7));
        assert_ne!(World::new(7), World::new(8));
        let world = World::new(7);
        assert_ne!(world.moments[0], world.moments[1]);
    }

    const IPTABLES: Mode = Mode::Iptables(Variant::Nft);
    const OWN: &str = "10.244.1.2";

    fn served(by: &str, sees: &str) -> Answer {
        Answer::Served {
            by: [by.to_owned()].into(),
            sees: [sees.parse().unwrap()].into(),
        }
    }

    /// One question to a frontend over TCP.
    fn asked(client: Client, target: Target, to: &str) -> Asked {
        Asked {
            client,
            own: vec![OWN.parse().unwrap()],
            service: "web-1".to_owned(),
            target: Some(target),
            to: to.parse().unwrap(),
            transport: Transport::Tcp,
            is_frontend: true,
            has_ranges: false,
            sticks_to_one_of: None,
            owns_alone: None,
            is_disputed: false,
        }
    }

    fn agree(mode: Mode, has_sockets: bool, asked: &Asked, its: Answer, ours: Answer) -> bool {
        let answers = |answer| Answers::from([(asked.to_string(), (asked.clone(), answer))]);
        let comparison = Comparison { has_sockets, mode };
        comparison
            .differences(&answers(its), &Answers::new(), &answers(ours))
            .is_empty()
    }

    #[test]
    fn rules_alone_have_to_agree_in_everything() {
        let pod = asked(Client::Pod, Target::NodePort, "192.168.77.11:30100");
        let (direct, masqueraded) = (served("near", OWN), served("near", "10.244.1.1"));
        let agree = |its, ours| agree(IPTABLES, false, &pod, its, ours);
        assert!(agree(masqueraded.clone(), masqueraded.clone()));
        assert!(!agree(masqueraded, direct));
        assert!(!agree(Answer::Silent, Answer::Refused));
    }

    #[test]
    fn sockets_of_the_node_are_refused_and_not_masqueraded() {
        let to = "192.168.77.11:30100";
        let (direct, masqueraded) = (served("near", OWN), served("near", "10.244.1.1"));
        let pod = asked(Client::Pod, Target::NodePort, to);
        assert!(agree(
            IPTABLES,
            true,
            &pod,
            masqueraded.clone(),
            direct.clone()
        ));
        assert!(!agree(
            IPTABLES,
            true,
            &pod,
            masqueraded.clone(),
            masqueraded.clone()
        ));
        assert!(!agree(
            IPTABLES,
            true,
            &pod,
            masqueraded.clone(),
            served("far", OWN)
        ));
        assert!(agree(IPTABLES, true, &pod, Answer::Silent, Answer::Refused));
        assert!(!agree(IPTABLES, true, &pod, Answer::Silent, Answer::Silent));
        let outsider = asked(Client::Outside, Target::NodePort, to);
        assert!(!agree(IPTABLES, true, &outsider, masqueraded, direct));
        assert!(!agree(
            IPTABLES,
            true,
            &outsider,
            Answer::Silent,
            Answer::Refused
        ));
    }

    #[test]
    fn sockets_reach_node_ports_of_loopback_as_those_of_the_nodes_address() {
        let port = asked(Client::Node, Target::NodePort, "192.168.77.11:30100");
        let loopback = asked(Client::Node, Target::LocalhostNodePort, "127.0.0.1:30100");
        let answers = |at_address, at_loopback| -> Answers {
            [(&port, at_address), (&loopback, at_loopback)]
                .map(|(asked, answer)| (asked.to_string(), (asked.clone(), answer)))
                .into()
        };
        let masqueraded = || served("near", "10.244.1.1");
        let its = answers(masqueraded(), Answer::Refused);
        let agree = |has_sockets, its: &Answers, ours: Answers| {
            let mode = IPTABLES;
            let comparison = Comparison { has_sockets, mode };
            let differences = comparison.differences(its, &Answers::new(), &ours);
            differences.is_empty()
        };
        let direct = || served("near", OWN);
        assert!(agree(true, &its, answers(direct(), direct())));
        assert!(!agree(true, &its, answers(direct(), Answer::Refused)));
        assert!(agree(false, &its, its.clone()));
        assert!(!agree(false, &its, answers(masqueraded(), masqueraded())));
        let silent = answers(Answer::Silent, Answer::Silent);
        assert!(agree(
            true,
            &silent,
            answers(Answer::Refused, Answer::Refused)
        ));
    }

    #[test]
    fn what_only_nftables_rejects_is_silent_by_rules() {
        let node = asked(Client::Node, Target::ExternalIp, "203.0.113.101:80");
        assert!(agree(
            Mode::Nftables,
            false,
            &node,
            Answer::Refused,
            Answer::Silent
        ));
        // Of the ServiceCIDRs.
        let inside = asked(Client::Node, Target::ExternalIp, "10.96.1.5:80");
        let its = Answer::Refused;
        assert!(agree(
            Mode::Nftables,
            false,
            &inside,
            its.clone(),
            its.clone()
        ));
        assert!(!agree(Mode::Nftables, false, &inside, its, Answer::Silent));
        assert!(!agree(
            IPTABLES,
            false,
            &node,
            Answer::Refused,
            Answer::Silent
        ));
    }

    #[test]
    fn who_owns_a_contested_address_is_served_there_as_elsewhere() {
        let own = asked(Client::Pod, Target::ExternalIp, "203.0.113.101:80");
        let mut contested = asked(Client::Pod, Target::ExternalIp, "203.0.113.50:80");
        contested.owns_alone = Some(own.to);
        let answers = |at_contested| {
            [(&own, served("near", OWN)), (&contested, at_contested)]
                .map(|(asked, answer)| (asked.to_string(), (asked.clone(), answer)))
                .into()
        };
        let comparison = Comparison {
            has_sockets: false,
            mode: IPTABLES,
        };
        let its = answers(served("far", OWN));
        assert!(
            comparison
                .differences(&its, &Answers::new(), &answers(served("near", OWN)))
                .is_empty()
        );
        assert!(
            !comparison
                .differences(&its, &Answers::new(), &its)
                .is_empty()
        );
    }

    #[test]
    fn who_has_a_disputed_cluster_ip_is_served_there_as_if_nobody_else_claimed_it() {
        let mut disputed = asked(Client::Pod, Target::ClusterIp, "10.96.1.5:80");
        disputed.is_disputed = true;
        let answers = |answer| Answers::from([(disputed.to_string(), (disputed.clone(), answer))]);
        let comparison = Comparison {
            has_sockets: false,
            mode: IPTABLES,
        };
        let (its, undisputed) = (answers(served("far", OWN)), answers(served("near", OWN)));
        let differences = |ours| comparison.differences(&its, &undisputed, ours);
        assert!(differences(&undisputed).is_empty());
        assert!(!differences(&its).is_empty());
    }

    #[test]
    fn an_answer_and_then_an_error_is_right_for_nobody() {
        let pod = asked(Client::Pod, Target::ClusterIp, "10.96.1.1:80");
        let unsteady = Answer::Unsteady("near, then refused".to_owned());
        assert!(!agree(IPTABLES, false, &pod, unsteady.clone(), unsteady));
    }
}
