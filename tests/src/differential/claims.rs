//! Addresses that more than one Service claims: who has them.

use std::net::IpAddr;

use super::{World, plan::Plan};
use crate::{flows::Target, peer::Transport};

impl World {
    /// The same world in which nobody claims the ClusterIP of another, if somebody does at this moment and both serve one port.
    #[must_use]
    pub fn undisputed(&self, moment: usize) -> Option<Self> {
        let plans = &self.moments[moment];
        let is_disputed = plans.iter().any(|plan| {
            plan.served()
                .any(|(v6, transport)| is_disputed(plan, plans, v6, transport))
        });
        is_disputed.then(|| {
            let mut world = self.clone();
            for plan in world.moments.iter_mut().flatten() {
                plan.claims_cluster_ip = None;
            }
            world
        })
    }
}

/// Whether others are served at its ClusterIP, too.
pub(super) fn is_disputed(plan: &Plan, plans: &[Plan], v6: bool, transport: Transport) -> bool {
    let address = plan.vip(v6);
    plans.iter().any(|other| {
        let is_there = |(_, claimed, is_frontend): (Target, IpAddr, bool)| {
            claimed == address && is_frontend && other.transports.contains(&transport)
        };
        other.families.contains(&v6) && other.claimed(v6).is_some_and(is_there)
    })
}

/// Whose ClusterIP it is.
pub(super) fn owner(address: IpAddr, plans: &[Plan]) -> Option<&Plan> {
    let v6 = address.is_ipv6();
    plans
        .iter()
        .find(|plan| plan.families.contains(&v6) && plan.vip(v6) == address)
}

/// Whether it is the oldest of those that claim the shared address; `plans` has the oldest first.
pub(super) fn is_owner(plan: &Plan, plans: &[Plan], v6: bool, transport: Transport) -> bool {
    let claims = |other: &&Plan| {
        other.claims_shared && other.families.contains(&v6) && other.transports.contains(&transport)
    };
    plans.iter().find(claims) == Some(plan)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::differential::chance::Chance;

    fn plan(number: u8, transports: &'static [Transport]) -> Plan {
        let mut plan = Plan::new(number, 1, number, number, &mut Chance::new(1));
        plan.families = &[false];
        plan.transports = transports;
        plan.claims_cluster_ip = None;
        plan
    }

    #[test]
    fn a_cluster_ip_is_disputed_where_both_serve_one_port() {
        let mut claimant = plan(2, &[Transport::Tcp]);
        claimant.claims_cluster_ip = Some(Target::ExternalIp);
        let dispute = |owner: &Plan| {
            let plans = vec![claimant.clone(), owner.clone()];
            let world = World {
                moments: vec![plans],
            };
            world.undisputed(0)
        };
        let both = dispute(&plan(5, &[Transport::Tcp, Transport::Udp])).unwrap();
        let mut claims = both.moments[0].iter().map(|plan| plan.claims_cluster_ip);
        assert!(claims.all(|claim| claim.is_none()));
        assert_eq!(dispute(&plan(5, &[Transport::Udp])), None);
        assert_eq!(dispute(&plan(6, &[Transport::Tcp])), None);
    }

    #[test]
    fn some_worlds_have_disputes() {
        let worlds = (0..50).map(World::new);
        let disputed = worlds.filter(|world| {
            let mut moments = 0..world.moments();
            moments.any(|moment| world.undisputed(moment).is_some())
        });
        assert!(disputed.count() > 5);
    }
}
