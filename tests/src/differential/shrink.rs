//! A smaller world that still fails.

use std::collections::BTreeSet;

use super::World;

impl World {
    /// Leaves away what it can, one thing at a time: moments, Services, endpoints. What is left still `fails`.
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
        assert_eq!(small.moments[0][0].endpoints.len(), 1);
    }
}
