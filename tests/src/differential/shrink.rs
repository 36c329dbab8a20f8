//! A smaller world that still fails.

use std::collections::BTreeSet;

use super::{World, plan::Plan};
use crate::flows::Target;

/// What a Service can do without, at all its moments at once: the API lets some of it not change.
const SIMPLER: [fn(&mut Plan); 13] = [
    |plan| plan.families = &plan.families[..1],
    |plan| plan.transports = &plan.transports[..1],
    |plan| plan.has_node_ports &= plan.balancer.is_some(),
    |plan| {
        plan.balancer = None;
        plan.ranges = None;
        plan.claims_cluster_ip
            .take_if(|target| *target == Target::LoadBalancer);
    },
    |plan| plan.is_external = false,
    |plan| plan.claims_shared = false,
    |plan| plan.claims_node = false,
    |plan| plan.claims_cluster_ip = None,
    |plan| plan.ranges = None,
    |plan| plan.internal_local = false,
    |plan| plan.external_local = false,
    |plan| plan.is_sticky = false,
    |plan| plan.distribution = None,
];

impl World {
    /// Leaves away what it can, one thing at a time: moments, Services, endpoints, what a Service or an endpoint has. What is
    /// left still `fails`.
    #[must_use]
    pub fn shrink(mut self, mut fails: impl FnMut(&Self) -> bool) -> Self {
        loop {
            let smaller = self.smaller().into_iter().find(|world| fails(world));
            match smaller {
                Some(world) => self = world,
                None => return self,
            }
        }
    }

    /// Every world that lacks one thing of this one.
    fn smaller(&self) -> Vec<Self> {
        let mut found = Vec::new();
        if self.moments.len() > 1 {
            for moment in 0..self.moments.len() {
                let mut world = self.clone();
                world.moments.remove(moment);
                found.push(world);
            }
        }
        let plans = self.moments.iter().flatten();
        let numbers: BTreeSet<u8> = plans.map(|plan| plan.number).collect();
        for number in numbers.iter().filter(|_| numbers.len() > 1) {
            let mut world = self.clone();
            for plans in &mut world.moments {
                plans.retain(|plan| plan.number != *number);
            }
            found.push(world);
        }
        for (moment, plans) in self.moments.iter().enumerate() {
            for (service, plan) in plans.iter().enumerate() {
                for endpoint in 0..plan.endpoints.len() {
                    let mut world = self.clone();
                    world.moments[moment][service].endpoints.remove(endpoint);
                    found.push(world);
                }
            }
        }
        let for_a_service = SIMPLER.iter().flat_map(|simplify| {
            let numbers = numbers.iter();
            numbers.map(move |number| (*simplify, *number))
        });
        for (simplify, number) in for_a_service {
            let mut world = self.clone();
            let plans = world.moments.iter_mut().flatten();
            plans
                .filter(|plan| plan.number == number)
                .for_each(simplify);
            found.push(world);
        }
        for (moment, plans) in self.moments.iter().enumerate() {
            for (service, plan) in plans.iter().enumerate() {
                for (endpoint, planned) in plan.endpoints.iter().enumerate() {
                    let mut world = self.clone();
                    world.moments[moment][service].endpoints[endpoint] = planned.plain();
                    found.push(world);
                }
            }
        }
        found.retain(|world| world != self);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_nothing_to_do_with_the_failure_goes() {
        let world = World::new(1);
        let sticky = world.moments[1]
            .iter()
            .find(|plan| plan.endpoints.len() > 1)
            .unwrap()
            .number;
        // Fails while that Service is there with an endpoint, at any moment.
        let fails = |world: &World| {
            let mut plans = world.moments.iter().flatten();
            plans.any(|plan| plan.number == sticky && !plan.endpoints.is_empty())
        };
        let small = world.shrink(fails);
        assert!(fails(&small));
        assert_eq!((small.moments.len(), small.moments[0].len()), (1, 1));
        let plan = &small.moments[0][0];
        assert_eq!(plan.endpoints, [plan.endpoints[0].plain()]);
        for simplify in SIMPLER {
            let mut simpler = plan.clone();
            simplify(&mut simpler);
            assert_eq!(simpler, *plan);
        }
    }

    #[test]
    fn what_the_failure_takes_stays() {
        let world = World::new(1);
        let fails = |world: &World| {
            let mut plans = world.moments.iter().flatten();
            plans.any(|plan| plan.balancer.is_some() && plan.internal_local)
        };
        assert!(fails(&world), "seed 1 has such a Service");
        let small = world.shrink(fails);
        let plan = &small.moments[0][0];
        assert!(plan.balancer.is_some() && plan.has_node_ports && plan.internal_local);
        assert!(plan.endpoints.is_empty() && !plan.external_local && plan.ranges.is_none());
    }
}
