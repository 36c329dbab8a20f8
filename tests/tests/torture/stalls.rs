//! Times in which a core ran nobody: a hypervisor gave it to another machine. No agent can do anything in them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::Context as _;
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use proxy_tests::load::now_ns;

const TICK: Duration = Duration::from_millis(2);
/// The real-time thread of [`Watch`] wakes within microseconds where the core is there.
const LATE_NS: u64 = 3_000_000;

/// From, until: CLOCK_MONOTONIC.
type Stall = (u64, u64);

/// Sorted, without overlaps.
#[derive(Debug, Default)]
pub struct Stalls(Vec<Stall>);

/// Watches every core from a real-time thread, which everything else has to make way for.
#[derive(Debug)]
pub struct Watch {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<anyhow::Result<Vec<Stall>>>>,
}

impl Watch {
    /// Starts.
    ///
    /// # Errors
    /// No thread.
    pub fn start() -> anyhow::Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        let cores = std::thread::available_parallelism()?.get();
        let threads = (0..cores)
            .map(|core| {
                let over = Arc::clone(&over);
                std::thread::spawn(move || watch(core, &over))
            })
            .collect();
        Ok(Self { over, threads })
    }

    /// Stops, and says when a core was away.
    ///
    /// # Errors
    /// A core could not be watched.
    pub fn finish(self) -> anyhow::Result<Stalls> {
        self.over.store(true, Ordering::Relaxed);
        let mut found = Vec::new();
        for thread in self.threads {
            let stalls = thread.join();
            found.extend(stalls.map_err(|_| anyhow::anyhow!("a watching thread ended early"))??);
        }
        Ok(Stalls::of(found))
    }
}

fn watch(core: usize, over: &AtomicBool) -> anyhow::Result<Vec<Stall>> {
    let mut cores = CpuSet::new();
    cores.set(core)?;
    sched_setaffinity(Pid::from_raw(0), &cores).context("cannot bind to a core")?;
    let priority = libc::sched_param { sched_priority: 1 };
    // SAFETY: the kernel reads one struct of this type.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const priority) };
    anyhow::ensure!(
        result == 0,
        "SCHED_FIFO: {}",
        std::io::Error::last_os_error()
    );
    let tick = u64::try_from(TICK.as_nanos())?;
    let mut stalls = Vec::new();
    while !over.load(Ordering::Relaxed) {
        let due = now_ns() + tick;
        std::thread::sleep(TICK);
        let now = now_ns();
        if now > due + LATE_NS {
            stalls.push((due, now));
        }
    }
    Ok(stalls)
}

impl Stalls {
    fn of(mut found: Vec<Stall>) -> Self {
        found.sort_unstable();
        let mut merged: Vec<Stall> = Vec::new();
        for (from, until) in found {
            match merged.last_mut() {
                Some(last) if from <= last.1 => last.1 = last.1.max(until),
                _ => merged.push((from, until)),
            }
        }
        Self(merged)
    }

    /// How much of this time a core was away.
    pub fn within(&self, from: u64, until: u64) -> u64 {
        let first = self.0.partition_point(|stall| stall.1 <= from);
        let stalls = self.0.iter().skip(first);
        stalls
            .take_while(|stall| stall.0 < until)
            .map(|stall| stall.1.min(until).saturating_sub(stall.0.max(from)))
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stalls_of_several_cores_count_once() {
        let stalls = Stalls::of(vec![(30, 40), (10, 20), (15, 25)]);
        assert_eq!(stalls.0, [(10, 25), (30, 40)]);
        assert_eq!(stalls.within(0, 100), 25);
        assert_eq!(stalls.within(12, 35), 18);
        assert_eq!(stalls.within(25, 30), 0);
        assert_eq!(stalls.within(35, 12), 0);
        assert_eq!(Stalls::default().within(0, 100), 0);
    }
}
