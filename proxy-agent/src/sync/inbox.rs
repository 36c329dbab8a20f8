//! Where changes wait for their layer.

use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use prometheus_client::metrics::gauge::Gauge;

use crate::model::Dirty;

/// What has to be compiled and compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Everything.
    All,
    /// What changed.
    Part(Dirty),
}

impl From<Dirty> for Scope {
    fn from(dirty: Dirty) -> Self {
        match dirty.networks {
            true => Self::All,
            false => Self::Part(dirty),
        }
    }
}

impl Default for Scope {
    fn default() -> Self {
        Self::Part(Dirty::default())
    }
}

impl Scope {
    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::All => false,
            Self::Part(dirty) => dirty.is_empty(),
        }
    }

    /// Adds another scope.
    pub fn merge(&mut self, other: Self) {
        match (&mut *self, other) {
            (Self::All, _) => {}
            (_, Self::All) => *self = Self::All,
            (Self::Part(dirty), Self::Part(more)) => dirty.merge(more),
        }
    }
}

/// What a layer gets to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// What changed since the last one; empty when only time has passed.
    pub scope: Scope,
    /// How many changes that were.
    pub changes: i64,
    /// What was seen to change while [`Turn::complete`] does not hold.
    pub touched: Dirty,
    /// Every source has delivered its first snapshot.
    pub synced: bool,
    /// Nothing that the sources should hold is missing: deletions are allowed.
    pub complete: bool,
    /// The backend wants tending.
    pub nudged: bool,
    /// The agent stops.
    pub stop: bool,
}

/// How a layer gets on with what it is given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Since when the oldest change waits that the kernel does not hold; none while it holds everything.
    pub behind_since: Option<Instant>,
    /// Since when the layer has been at work without coming back for more; none while it waits.
    pub busy_since: Option<Instant>,
}

/// Where changes wait for their layer. One producer or several, one consumer.
#[derive(Debug)]
pub struct Inbox {
    turn: Mutex<Turn>,
    wake: Condvar,
    pending: Gauge,
    clocks: Mutex<Clocks>,
}

#[derive(Debug, Default)]
struct Clocks {
    /// Of the oldest change that is still here.
    here: Option<Instant>,
    /// Of the oldest one that the layer has taken, and the kernel does not hold.
    taken: Option<Instant>,
    busy: Option<Instant>,
}

impl Inbox {
    /// An empty one; `pending` follows the number of changes in it.
    pub fn new(pending: Gauge) -> Self {
        Self {
            turn: Mutex::default(),
            wake: Condvar::new(),
            pending,
            clocks: Mutex::default(),
        }
    }

    /// How the layer gets on.
    pub fn progress(&self) -> Progress {
        let clocks = self.clocks();
        let behind = [clocks.here, clocks.taken].into_iter().flatten().min();
        Progress {
            behind_since: behind,
            busy_since: clocks.busy,
        }
    }

    /// Adds a change.
    pub fn push(&self, scope: Scope) {
        if scope.is_empty() {
            return;
        }
        let mut turn = self.lock();
        turn.scope.merge(scope);
        turn.changes += 1;
        self.pending.inc();
        if turn.synced {
            self.clocks().here.get_or_insert_with(Instant::now);
        }
        drop(turn);
        self.wake.notify_one();
    }

    /// Says that this has changed since its source's first snapshot: it may be brought level even while something else is
    /// missing.
    pub fn touch(&self, dirty: &Dirty) {
        let mut turn = self.lock();
        if !turn.complete {
            turn.touched.merge(dirty.clone());
        }
    }

    /// Says how far the sources are. Reaching either milestone asks for everything to be compared.
    pub fn sources(&self, synced: bool, complete: bool) {
        let mut turn = self.lock();
        let news = (synced && !turn.synced) || (complete && !turn.complete);
        turn.synced = synced;
        turn.complete = complete;
        if news {
            turn.scope = Scope::All;
            self.clocks().here.get_or_insert_with(Instant::now);
            drop(turn);
            self.wake.notify_one();
        }
    }

    /// Has the backend tended soon.
    pub fn nudge(&self) {
        self.lock().nudged = true;
        self.wake.notify_one();
    }

    /// Ends the layer's loop after the turn it is in.
    pub fn stop(&self) {
        self.lock().stop = true;
        self.wake.notify_one();
    }

    /// Waits for the next turn: at once when something is there and `not_before` has passed, at the latest at `until`.
    /// What has to wait longer stays here.
    pub fn wait(&self, not_before: Option<Instant>, until: Instant) -> Turn {
        self.clocks().busy = None;
        let turn = self.next(not_before, until);
        self.clocks().busy = Some(Instant::now());
        turn
    }

    fn next(&self, not_before: Option<Instant>, until: Instant) -> Turn {
        let mut turn = self.lock();
        loop {
            let now = Instant::now();
            let held_back = not_before.filter(|at| now < *at);
            let has_work = turn.synced && !turn.scope.is_empty() && held_back.is_none();
            if has_work {
                let mut clocks = self.clocks();
                let here = clocks.here.take();
                clocks.taken = clocks.taken.or(here);
                let rest = turn.without_work();
                return std::mem::replace(&mut *turn, rest);
            }
            if turn.stop || turn.nudged || now >= until {
                let rest = turn.without_work();
                return Turn {
                    nudged: std::mem::take(&mut turn.nudged),
                    ..rest
                };
            }
            let wake_at = held_back.unwrap_or(until).min(until);
            turn = self
                .wake
                .wait_timeout(turn, wake_at - now)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Lets everything wait until `until`; says whether the agent stops, which ends the wait.
    pub fn rest(&self, until: Instant) -> bool {
        self.clocks().busy = None;
        let mut turn = self.lock();
        while !turn.stop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.wake.wait_timeout(turn, left);
            turn = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        turn.stop
    }

    /// Takes note that `changes` are in the kernel, and whether that is all that was taken.
    pub fn done(&self, changes: i64, is_level: bool) {
        self.pending.dec_by(changes);
        if is_level {
            self.clocks().taken = None;
        }
    }

    fn clocks(&self) -> MutexGuard<'_, Clocks> {
        self.clocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A poisoned lock holds nothing half-written: every critical section above only sets fields.
    fn lock(&self) -> MutexGuard<'_, Turn> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Turn {
    fn without_work(&self) -> Self {
        let Self {
            scope: _,
            changes: _,
            touched: _,
            synced,
            complete,
            nudged: _,
            stop,
        } = *self;
        Self {
            scope: Scope::default(),
            changes: 0,
            touched: Dirty::default(),
            synced,
            complete,
            nudged: false,
            stop,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::state::ServiceName;

    fn part(name: &str) -> Scope {
        Scope::Part(Dirty {
            services: [ServiceName::new("default", name)].into(),
            ..Dirty::default()
        })
    }

    #[test]
    fn changes_are_merged_and_wait_for_the_first_snapshot() {
        let inbox = Inbox::new(Gauge::default());
        inbox.push(part("a"));
        let now = Instant::now();
        assert!(inbox.wait(None, now).scope.is_empty());
        inbox.push(part("b"));
        inbox.sources(true, true);
        let turn = inbox.wait(None, now + Duration::from_secs(60));
        assert_eq!(
            (turn.scope, turn.synced, turn.complete),
            (Scope::All, true, true)
        );
        inbox.push(part("a"));
        inbox.push(part("b"));
        let turn = inbox.wait(None, now + Duration::from_secs(60));
        let Scope::Part(Dirty {
            services,
            addresses: false,
            networks: false,
        }) = turn.scope
        else {
            panic!("{:?}", turn.scope);
        };
        assert_eq!((services.len(), turn.changes), (2, 2));
    }

    #[test]
    fn a_change_before_the_first_sync_counts_as_seen() {
        let inbox = Inbox::new(Gauge::default());
        inbox.push(part("a"));
        inbox.touch(&Dirty {
            services: [ServiceName::new("default", "b")].into(),
            ..Dirty::default()
        });
        inbox.push(part("b"));
        inbox.sources(true, false);
        let turn = inbox.wait(None, Instant::now() + Duration::from_secs(60));
        assert_eq!(turn.scope, Scope::All);
        assert_eq!(Scope::Part(turn.touched), part("b"));
    }

    #[test]
    fn what_comes_during_a_rest_stays_and_a_stop_ends_it() {
        let inbox = Inbox::new(Gauge::default());
        inbox.sources(true, true);
        inbox.push(part("a"));
        assert!(!inbox.rest(Instant::now()));
        let turn = inbox.wait(None, Instant::now());
        assert_eq!((turn.scope, turn.changes), (Scope::All, 1));
        std::thread::scope(|scope| {
            let rest = || inbox.rest(Instant::now() + Duration::from_secs(60));
            let waiter = scope.spawn(rest);
            inbox.push(part("a"));
            inbox.stop();
            assert!(waiter.join().unwrap());
        });
    }

    #[test]
    fn the_oldest_change_counts_until_the_kernel_holds_what_was_taken() {
        let inbox = Inbox::new(Gauge::default());
        let behind = || inbox.progress().behind_since;
        let take = || inbox.wait(None, Instant::now());
        inbox.push(part("a"));
        assert_eq!(behind(), None, "nobody may write yet");
        inbox.sources(true, true);
        let first = behind();
        assert!(first.is_some());
        take();
        inbox.push(part("b"));
        inbox.done(0, false);
        assert_eq!(behind(), first, "the sync failed");
        take();
        inbox.push(part("c"));
        inbox.done(2, true);
        assert!(behind() > first, "one has come meanwhile");
        take();
        inbox.done(1, true);
        assert_eq!(behind(), None);
    }

    #[test]
    fn a_layer_is_busy_between_two_waits() {
        let inbox = Inbox::new(Gauge::default());
        assert_eq!(inbox.progress().busy_since, None);
        let before = Instant::now();
        inbox.wait(None, before);
        assert!(inbox.progress().busy_since >= Some(before));
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| inbox.wait(None, Instant::now() + Duration::from_secs(60)));
            while inbox.progress().busy_since.is_some() {
                std::thread::yield_now();
            }
            inbox.stop();
            waiter.join().unwrap();
        });
    }

    #[test]
    fn a_change_wakes_the_layer_at_once() {
        let inbox = Inbox::new(Gauge::default());
        inbox.sources(true, true);
        inbox.wait(None, Instant::now() + Duration::from_secs(60));
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| inbox.wait(None, Instant::now() + Duration::from_secs(60)));
            inbox.push(part("a"));
            assert_eq!(waiter.join().unwrap().scope, part("a"));
        });
    }
}
