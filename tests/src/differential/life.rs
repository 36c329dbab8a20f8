//! Which Services there are at each moment: some come late, some go, and some are made again as another.

use std::collections::BTreeMap;

use super::{World, chance::Chance, plan::Plan};

const SERVICES: u8 = 6;
const MOMENTS: usize = 3;
/// Few more than there are Services: what one leaves another has soon.
const SLOTS: u8 = SERVICES + 2;

/// The Services at each moment, in the order of their numbers.
pub(super) fn moments(chance: &mut Chance) -> Vec<Vec<Plan>> {
    let mut made = BTreeMap::new();
    let mut moments: Vec<Vec<Plan>> = Vec::new();
    for _ in 0..MOMENTS {
        let next = next(moments.last(), &mut made, chance);
        moments.push(next);
    }
    moments
}

/// What follows. `made` tells how often each was made so far.
fn next(last: Option<&Vec<Plan>>, made: &mut BTreeMap<u8, u8>, chance: &mut Chance) -> Vec<Plan> {
    let stay = last.into_iter().flatten().filter_map(|plan| {
        let is_deleted = chance.one_in(3);
        (!is_deleted).then(|| plan.changed(chance))
    });
    let mut plans: Vec<Plan> = stay.collect();
    for number in 1..=SERVICES {
        let is_there = plans.iter().any(|plan| plan.number == number);
        let is_made = match last {
            None => !chance.one_in(4),
            Some(_) => chance.one_in(2),
        };
        if is_there || !is_made {
            continue;
        }
        let made = made.entry(number).or_insert(0);
        *made += 1;
        let address = slot(number, plans.iter().map(|plan| plan.address), chance);
        let ports = slot(number, plans.iter().map(|plan| plan.ports), chance);
        plans.push(Plan::new(number, *made, address, ports, chance));
    }
    plans.sort_by_key(|plan| plan.number);
    plans
}

/// One that nobody has: each Service has its own favourite.
fn slot(favourite: u8, taken: impl Iterator<Item = u8>, chance: &mut Chance) -> u8 {
    let taken: Vec<u8> = taken.collect();
    let free: Vec<u8> = (1..=SLOTS).filter(|slot| !taken.contains(slot)).collect();
    match free.contains(&favourite) && chance.one_in(2) {
        true => favourite,
        false => chance.of(&free),
    }
}

impl World {
    /// The Services at one moment, the oldest first, after the moments were gone through to the last and from there back.
    pub(super) fn by_age(&self, moment: usize) -> Vec<Plan> {
        let last = self.moments.len() - 1;
        let way = (0..=last).chain((moment..last).rev());
        let mut since: BTreeMap<(u8, u8), usize> = BTreeMap::new();
        for (step, at) in way.enumerate() {
            let there = self.moments[at].iter().map(Plan::identity);
            since = there
                .map(|it| (it, since.get(&it).copied().unwrap_or(step)))
                .collect();
        }
        let mut plans = self.moments[moment].clone();
        // Those of one step are made one after the other, and the first by name is the oldest of one second.
        plans.sort_by_key(|plan| (since.get(&plan.identity()).copied(), plan.number));
        plans
    }

    /// What Services are or were at other moments.
    pub(super) fn others(&self, moment: usize) -> impl Iterator<Item = &Plan> {
        let moments = self.moments.iter().enumerate();
        moments
            .filter(move |(at, _)| *at != moment)
            .flat_map(|(_, plans)| plans)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn worlds() -> impl Iterator<Item = World> {
        (0..50).map(World::new)
    }

    #[test]
    fn services_come_go_and_are_made_again() {
        let (mut late, mut gone, mut again, mut moved) = (0, 0, 0, 0);
        for world in worlds() {
            assert_eq!(world.moments(), MOMENTS);
            for pair in world.moments.windows(2) {
                let before = |plan: &Plan| pair[0].iter().find(|it| it.number == plan.number);
                for plan in &pair[1] {
                    late += usize::from(before(plan).is_none() && plan.made == 1);
                    again += usize::from(before(plan).is_some_and(|it| it.made != plan.made));
                    let others = pair[0].iter().filter(|it| it.number != plan.number);
                    moved += others.filter(|it| it.address == plan.address).count();
                }
                let is_gone = |plan: &&Plan| pair[1].iter().all(|it| it.number != plan.number);
                gone += pair[0].iter().filter(is_gone).count();
            }
        }
        assert!(late > 10 && gone > 10 && again > 10 && moved > 10);
    }

    #[test]
    fn no_two_services_have_one_cluster_ip_or_node_port() {
        for plans in worlds().flat_map(|world| world.moments) {
            let addresses: BTreeSet<u8> = plans.iter().map(|plan| plan.address).collect();
            let ports: BTreeSet<u8> = plans.iter().map(|plan| plan.ports).collect();
            assert_eq!((addresses.len(), ports.len()), (plans.len(), plans.len()));
        }
    }

    #[test]
    fn who_was_made_again_is_younger() {
        let plan = |number, made| Plan::new(number, made, number, number, &mut Chance::new(1));
        let moments = vec![
            vec![plan(1, 1), plan(2, 1), plan(3, 1)],
            vec![plan(2, 1)],
            vec![plan(1, 2), plan(2, 1)],
        ];
        let world = World { moments };
        let ages = [0, 1, 2].map(|moment| {
            let plans = world.by_age(moment).into_iter();
            plans.map(|plan| plan.number).collect::<Vec<_>>()
        });
        assert_eq!(ages, [vec![2, 1, 3], vec![2], vec![2, 1]]);
    }
}
