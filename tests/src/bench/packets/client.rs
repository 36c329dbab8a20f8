//! The client process of `packets`: short rounds of all sides in turn, several connections in flight.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Barrier,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::super::connect::{exchange, pin};
use crate::wait_for;

/// Connections in flight.
pub(super) const AT_ONCE: usize = 8;
const ROUND: Duration = Duration::from_millis(20);

/// What the client does.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    /// Whom it connects to.
    pub sides: Vec<Side>,
    /// Rounds of each.
    pub rounds: usize,
}

/// An address with one or more ports, of which each connection takes one at random.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Side {
    pub address: IpAddr,
    pub first_port: u16,
    pub ports: u16,
}

impl Side {
    fn pick(&self, random: u64) -> SocketAddr {
        let offset = random % u64::from(self.ports);
        SocketAddr::new(self.address, self.first_port + offset as u16)
    }
}

/// For each round connections per second of every side, in the order of the plan.
pub(super) type Rounds = Vec<Vec<f64>>;

/// Runs the plan, which is JSON; prints the [`Rounds`] as JSON.
///
/// # Errors
/// A connection failed.
pub fn run(plan: &str) -> Result<()> {
    let plan: Plan = serde_json::from_str(plan).context("no plan")?;
    pin(0)?;
    for side in &plan.sides {
        for port in [0, u64::from(side.ports) - 1] {
            wait_for("the server answers", Duration::from_secs(10), || {
                exchange(side.pick(port))
            })?;
        }
    }
    let (barrier, failed) = (Barrier::new(AT_ONCE), AtomicBool::new(false));
    let (barrier, failed, plan) = (&barrier, &failed, &plan);
    let parts: Vec<Result<Rounds>> = thread::scope(|scope| {
        let workers: Vec<_> = (1..=AT_ONCE)
            .map(|seed| scope.spawn(move || work(plan, seed as u64, barrier, failed)))
            .collect();
        let join = |worker: thread::ScopedJoinHandle<'_, _>| {
            worker
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        workers.into_iter().map(join).collect()
    });
    let mut total = vec![vec![0.0; plan.sides.len()]; plan.rounds];
    for part in parts {
        for (sums, rates) in total.iter_mut().zip(part?) {
            for (sum, rate) in sums.iter_mut().zip(rates) {
                *sum += rate;
            }
        }
    }
    println!("{}", serde_json::to_string(&total)?);
    Ok(())
}

/// One connection at a time, through all rounds, which all workers begin together. After a failure of one of them the
/// others only keep step.
fn work(plan: &Plan, seed: u64, barrier: &Barrier, failed: &AtomicBool) -> Result<Rounds> {
    let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let mut outcome = Ok(());
    let mut rounds = vec![vec![0.0; plan.sides.len()]; plan.rounds];
    for (number, rates) in rounds.iter_mut().enumerate() {
        for at in order(number, plan.sides.len()) {
            barrier.wait();
            if failed.load(Ordering::Relaxed) {
                continue;
            }
            match round(|| plan.sides[at].pick(next())) {
                Ok(rate) => rates[at] = rate,
                Err(error) => {
                    failed.store(true, Ordering::Relaxed);
                    outcome = Err(error);
                }
            }
        }
    }
    outcome.map(|()| rounds)
}

/// The order of the sides in a round: each comes first, and before and after each other, equally often.
fn order(round: usize, sides: usize) -> impl Iterator<Item = usize> {
    (0..sides).map(move |at| {
        let at = if (round / sides).is_multiple_of(2) {
            at
        } else {
            sides - 1 - at
        };
        (round + at) % sides
    })
}

fn round(mut next: impl FnMut() -> SocketAddr) -> Result<f64> {
    let start = Instant::now();
    let mut count = 0.0;
    while start.elapsed() < ROUND {
        exchange(next())?;
        count += 1.0;
    }
    Ok(count / start.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_side_comes_first_in_turn_and_then_the_other_way_round() {
        let orders: Vec<Vec<usize>> = (0..6).map(|round| order(round, 3).collect()).collect();
        let expected = [
            [0, 1, 2],
            [1, 2, 0],
            [2, 0, 1],
            [2, 1, 0],
            [0, 2, 1],
            [1, 0, 2],
        ];
        assert_eq!(orders, expected);
    }

    #[test]
    fn ports_of_a_side_are_all_taken() {
        let side = Side {
            address: [192, 0, 2, 1].into(),
            first_port: 20_000,
            ports: 10_000,
        };
        assert_eq!(side.pick(9_999).port(), 29_999);
        assert_eq!(side.pick(10_000).port(), 20_000);
    }
}
