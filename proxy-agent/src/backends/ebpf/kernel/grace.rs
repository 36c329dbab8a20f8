//! Grace periods: when no program can still hold what was in a map.

use std::{
    collections::VecDeque,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use aya_obj::generated::bpf_map_type;

use super::super::{
    refused::refused,
    sys::{self, MapSpec},
};
use crate::backends::Error;

/// How long after the kernel's RCU: for whoever copied an index out of a map and uses it outside of a program.
const SETTLE: Duration = Duration::from_secs(1);

#[derive(Default)]
struct State {
    requested: u64,
    /// Grace periods whose RCU is over, and when they are.
    settling: VecDeque<(u64, Instant)>,
    over: u64,
    stop: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Numbered grace periods. A thread waits for the kernel; the one who asks does not.
pub struct Grace {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Grace {
    /// Starts the thread.
    ///
    /// # Errors
    /// The kernel has no maps of maps, or no memory.
    pub fn new() -> Result<Self, Error> {
        let failed = |error| {
            refused(
                "create",
                "the map of maps that grace periods wait with",
                error,
            )
        };
        let inner = MapSpec {
            name: "grace_inner".to_owned(),
            map_type: bpf_map_type::BPF_MAP_TYPE_ARRAY as u32,
            key_size: 4,
            value_size: 4,
            max_entries: 1,
            ..MapSpec::default()
        };
        let outer = MapSpec {
            name: "grace".to_owned(),
            map_type: bpf_map_type::BPF_MAP_TYPE_ARRAY_OF_MAPS as u32,
            ..inner.clone()
        };
        let inner = sys::map_create(&inner, None, None).map_err(failed)?;
        let outer = sys::map_create(&outer, Some(inner.as_fd()), None).map_err(failed)?;
        let shared = Arc::new(Shared::default());
        let work = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("grace".to_owned())
            .spawn(move || wait_for_kernel(&work, &outer, &inner))
            .map_err(|error| refused("start", "the thread that waits for grace periods", error))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Starts one and returns its number.
    pub fn start(&self) -> u64 {
        let mut state = self.shared.lock();
        state.requested += 1;
        self.shared.changed.notify_all();
        state.requested
    }

    /// The highest that is over.
    pub fn over(&self) -> u64 {
        settle(&mut self.shared.lock())
    }

    /// Waits for number `number`.
    pub fn wait(&self, number: u64) {
        let mut state = self.shared.lock();
        while settle(&mut state) < number.min(state.requested) {
            let next = state
                .settling
                .front()
                .map(|(_, at)| at.saturating_duration_since(Instant::now()));
            let timeout = next.unwrap_or(SETTLE);
            state = match self.shared.changed.wait_timeout(state, timeout) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}

impl Drop for Grace {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // It only fails by panicking, which the panic itself reports.
            let _ = thread.join();
        }
    }
}

fn settle(state: &mut State) -> u64 {
    let now = Instant::now();
    while let Some((number, _)) = state.settling.front().filter(|(_, at)| *at <= now) {
        state.over = *number;
        state.settling.pop_front();
    }
    state.over
}

fn wait_for_kernel(shared: &Shared, outer: &OwnedFd, inner: &OwnedFd) {
    let mut done = 0;
    let mut state = shared.lock();
    while !state.stop {
        if state.requested == done {
            state = shared
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        let number = state.requested;
        drop(state);
        // An update of a map of maps returns when every program that may still use what was there before has ended
        // (v4.20, 1ae80cf31938).
        let value = (inner.as_raw_fd() as u32).to_ne_bytes();
        if let Err(error) = sys::map_update(outer, &0_u32.to_ne_bytes(), &value) {
            // Then only time helps: these programs run for microseconds.
            tracing::warn!(error = %error, "cannot wait for the kernel's grace period; waiting for a second more");
            thread::sleep(SETTLE);
        }
        state = shared.lock();
        state.settling.push_back((number, Instant::now() + SETTLE));
        done = number;
        shared.changed.notify_all();
    }
}
