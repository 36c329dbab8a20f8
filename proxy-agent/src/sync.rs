//! The one loop that makes the kernel hold what is desired, run once per layer on a thread of its own.
//!
//! Idle, it syncs at the first change; busy, it takes what has come meanwhile in one batch. After an error it waits,
//! reads the kernel and plans everything again. Now and then it reads the kernel anyway and repairs what drifted.
//! Nothing is written before every source has delivered its first snapshot, nothing is deleted while a source lacks a
//! part of what it should hold.
//!
//! An object is gone only when its source says so; here nothing is concluded from silence. The Kubernetes API as a source
//! has to keep that up: a lost watch must not empty `default/kubernetes`, through which it would be mended.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::watch;

use crate::{
    backends::{Backend, Bounds, Error, Part},
    metrics::LayerMetrics,
    model::Dirty,
    plan::{Plan, diff},
};

mod compiled;
mod inbox;
mod pauses;
mod quarrel;
mod status;

pub use compiled::Compiled;
pub use inbox::{Inbox, Progress, Scope, Turn};
use pauses::{AUDIT_EVERY, audit_after, retry_after};
use quarrel::Quarrel;
pub use status::SyncStatus;

/// A backend is tended at least this often: what somebody else changes has to be back within a second.
const TEND_EVERY: Duration = Duration::from_millis(500);

/// One layer: a backend, and what is known of the kernel behind it.
#[derive(Debug)]
pub struct Layer<B: Backend> {
    name: &'static str,
    backend: B,
    /// What the kernel holds; none when it has to be read.
    observed: Option<BTreeMap<B::Key, B::Value>>,
    /// The hooks are known to serve what was applied.
    is_published: bool,
    /// Somebody else keeps what this layer would.
    stands_by: bool,
    /// Changed since the start while a source was incomplete: only these may differ from what was found.
    touched: Dirty,
    /// Taken from the inbox, not yet in the kernel.
    changes: i64,
    failures: u32,
    /// How often what the kernel refuses was tried again, while there is such a part.
    left_out: Option<u32>,
    audit_at: Instant,
    quarrel: Quarrel,
    /// Shortest time from the end of one change of the kernel to the next.
    pace: Duration,
    status: watch::Sender<SyncStatus>,
    metrics: LayerMetrics,
}

/// When the next turn is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Due {
    /// Changes wait until then (after an error).
    pub not_before: Option<Instant>,
    /// Without any change, a turn is due then.
    pub until: Instant,
}

impl<B: Backend> Layer<B> {
    /// A layer that has not looked at its kernel yet, and says in `status` how it is doing.
    pub fn new(
        status: watch::Sender<SyncStatus>,
        backend: B,
        metrics: LayerMetrics,
        now: Instant,
    ) -> Self {
        let name = status.borrow().layer;
        Self {
            name,
            backend,
            observed: None,
            is_published: false,
            stands_by: false,
            touched: Dirty::default(),
            changes: 0,
            failures: 0,
            left_out: None,
            audit_at: now + AUDIT_EVERY,
            quarrel: Quarrel::default(),
            pace: Duration::ZERO,
            status,
            metrics,
        }
    }

    /// Waits at least this long from the end of one change of the kernel to the next, for tools that are slow. kube-proxy does
    /// so too (`pkg/proxy/runner/bounded_frequency_runner.go`).
    #[must_use]
    pub fn with_pace(mut self, pace: Duration) -> Self {
        self.pace = pace;
        self
    }

    /// Follows how the layer is doing: wakes for the first sync, for errors and for their end.
    pub fn status(&self) -> watch::Receiver<SyncStatus> {
        self.status.subscribe()
    }

    /// Works until the inbox says stop. `compile` is given what changed; `tend` the backend: first of all, after each turn,
    /// when the inbox is nudged, and twice a second. It says whether somebody else may have changed what the kernel holds:
    /// then the audit does not wait.
    pub fn run(
        mut self,
        inbox: &Inbox,
        mut compile: impl FnMut(&Scope) -> Compiled,
        mut tend: impl FnMut(&mut B, &SyncStatus) -> bool,
    ) {
        let mut due = Due {
            not_before: None,
            until: self.audit_at,
        };
        loop {
            let status = self.status.borrow().clone();
            let is_disturbed = tend(&mut self.backend, &status);
            let now = Instant::now();
            if is_disturbed {
                due = self.hasten(now, due);
            }
            let yields = self.backend.yields();
            if std::mem::replace(&mut self.stands_by, yields) != yields {
                due = Due {
                    not_before: None,
                    until: now,
                };
            }
            let tend_at = now + TEND_EVERY;
            let turn = inbox.wait(due.not_before, due.until.min(tend_at));
            if turn.stop {
                return;
            }
            let start = Instant::now();
            let had_work = !turn.scope.is_empty();
            let is_full = turn.scope == Scope::All;
            if had_work || start >= due.until {
                let taken = self.changes + turn.changes;
                due = self.turn(start, turn, &mut compile);
                inbox.done(taken - self.changes, self.failures == 0);
            }
            if had_work {
                let elapsed = start.elapsed();
                self.metrics.sync_duration.observe(elapsed.as_secs_f64());
                if let Some(kube_proxy) = &self.metrics.kube_proxy {
                    kube_proxy.synced(is_full, elapsed);
                }
                tracing::debug!(layer = self.name, ?elapsed, "synced");
            }
        }
    }

    /// Has the audit come first of all, unless somebody undoes every repair. What was not read yet, or will be after an
    /// error, needs none.
    fn hasten(&mut self, now: Instant, due: Due) -> Due {
        if self.observed.is_none() {
            return due;
        }
        self.audit_at = self.audit_at.min(self.quarrel.next(now));
        Due {
            not_before: due.not_before,
            until: due.until.min(self.audit_at),
        }
    }

    /// One turn at `now`; says when the next is due.
    pub fn turn(
        &mut self,
        now: Instant,
        turn: Turn,
        compile: &mut impl FnMut(&Scope) -> Compiled,
    ) -> Due {
        let Turn {
            mut scope,
            changes,
            touched,
            synced,
            complete,
            nudged: _,
            stop: _,
        } = turn;
        self.changes += changes;
        self.touched.merge(touched);
        if !synced {
            self.audit_at = now + AUDIT_EVERY;
            return Due {
                not_before: None,
                until: self.audit_at,
            };
        }
        let result = self.read(now, &mut scope).and_then(|yields| {
            if yields {
                return Ok(None);
            }
            if scope.is_empty() {
                return Ok(Some(0));
            }
            let compiled = compile(&scope);
            self.sync(compiled, complete).map(Some)
        });
        match result {
            Ok(Some(applied)) => self.succeeded(now, applied, complete),
            Ok(None) => self.stand_by(now, complete),
            Err(error) => self.failed(now, &error),
        }
    }

    /// Reads the kernel where that is due, and widens `scope` by what it takes. Says whether somebody else keeps what this
    /// layer would: what was just read may show it.
    fn read(&mut self, now: Instant, scope: &mut Scope) -> Result<bool, Error> {
        if self.backend.yields() {
            return Ok(true);
        }
        // What was left out counts as written: it is told from what is there only by reading.
        let tries_again = self.left_out.is_some() && *scope == Scope::All;
        if self.observed.is_some() && now < self.audit_at && !tries_again {
            return Ok(false);
        }
        self.audit_at = now + AUDIT_EVERY;
        let begun = Instant::now();
        let found = self.backend.observe()?;
        self.audit_at = now + audit_after(begun.elapsed());
        if self.backend.yields() {
            return Ok(true);
        }
        match (&self.observed, &mut self.left_out) {
            (Some(_), Some(retries)) => {
                // What was left out counts as written: that it is missing is nobody's doing.
                *retries += 1;
                *scope = Scope::All;
            }
            (Some(believed), None) => {
                let drift = diff(&found, believed).len();
                if drift > 0 {
                    self.quarrel.repaired(now);
                    self.metrics.drift_repairs.inc_by(drift as u64);
                    tracing::warn!(
                        layer = self.name,
                        entries = drift,
                        "somebody else changed what the kernel holds; repairing it"
                    );
                    *scope = Scope::All;
                }
            }
            (None, _) => *scope = Scope::All,
        }
        self.observed = Some(found);
        Ok(false)
    }

    /// Makes the kernel hold `compiled`; returns the number of changes that took.
    fn sync(&mut self, compiled: Compiled, complete: bool) -> Result<usize, Error> {
        let Compiled { scope, state } = compiled;
        let Some(observed) = &mut self.observed else {
            return Ok(0);
        };
        if complete {
            self.touched = Dirty::default();
        }
        let bounds = Bounds {
            scope: match &scope {
                Scope::All => None,
                Scope::Part(dirty) => Some(part(dirty)),
            },
            touched: (!complete).then(|| part(&self.touched)),
        };
        let plan = self.backend.plan(observed, &state, bounds);
        if self.is_published && plan.is_empty() {
            return Ok(0);
        }
        self.backend.apply(&plan, &state)?;
        let changes = plan.len();
        record(observed, plan);
        if !self.is_published {
            self.backend.publish()?;
            self.is_published = true;
        }
        Ok(changes)
    }

    fn succeeded(&mut self, now: Instant, applied: usize, complete: bool) -> Due {
        self.changes = 0;
        self.left_out = self
            .backend
            .has_left_out()
            .then(|| self.left_out.unwrap_or(0));
        if let Some(retries) = self.left_out {
            self.audit_at = self.audit_at.min(now + retry_after(retries));
        }
        if self.failures > 0 {
            tracing::info!(layer = self.name, failures = self.failures, "synced again");
            self.failures = 0;
        }
        if let Some(kube_proxy) = &self.metrics.kube_proxy {
            kube_proxy.succeeded(SystemTime::now());
        }
        let entries = self.observed.as_ref().map_or(0, BTreeMap::len);
        // Nobody is woken by one more success: at 20,000 changes a second that would cost as much as the syncs.
        self.status.send_if_modified(|status| {
            let is_first = complete && !status.is_synced;
            status.is_serving |= complete;
            let is_news = is_first || status.last_error.is_some();
            if is_first {
                status.is_synced = true;
                tracing::info!(
                    layer = self.name,
                    entries,
                    changes = applied,
                    "first complete sync"
                );
            }
            status.last_error = None;
            status.last_success = Some(now);
            status.generation += u64::from(applied > 0);
            status.entries = entries;
            is_news
        });
        Due {
            not_before: (applied > 0 && !self.pace.is_zero()).then(|| Instant::now() + self.pace),
            until: self.audit_at,
        }
    }

    /// Forgets the kernel: whoever keeps it now changes it. Taking over begins with reading it.
    fn stand_by(&mut self, now: Instant, complete: bool) -> Due {
        self.observed = None;
        self.is_published = false;
        self.changes = 0;
        self.failures = 0;
        if let Some(kube_proxy) = &self.metrics.kube_proxy {
            // Nothing waits for this layer.
            kube_proxy.succeeded(SystemTime::now());
        }
        self.status.send_if_modified(|status| {
            let is_news = (complete && !status.is_synced) || status.last_error.is_some();
            status.is_synced |= complete;
            status.is_serving = false;
            status.last_error = None;
            status.last_success = Some(now);
            is_news
        });
        Due {
            not_before: None,
            until: now + AUDIT_EVERY,
        }
    }

    fn failed(&mut self, now: Instant, error: &Error) -> Due {
        self.observed = None;
        self.is_published = false;
        self.metrics.sync_errors.inc();
        if let Some(kube_proxy) = &self.metrics.kube_proxy {
            kube_proxy.failed();
        }
        let wait = retry_after(self.failures);
        self.failures += 1;
        tracing::warn!(layer = self.name, error = format!("{error:#}"), retry = ?wait, "sync failed");
        self.status
            .send_modify(|status| status.last_error = Some(format!("{error:#}")));
        Due {
            not_before: Some(now + wait),
            until: now + wait,
        }
    }
}

fn part(dirty: &Dirty) -> Part<'_> {
    let Dirty {
        services,
        addresses,
        // Everything is in scope then.
        networks: _,
    } = dirty;
    Part {
        services,
        addresses: *addresses,
    }
}

fn record<K: Ord, V>(observed: &mut BTreeMap<K, V>, plan: Plan<K, V>) {
    for key in &plan.deletions {
        observed.remove(key);
    }
    observed.extend(plan.upserts);
}

#[cfg(test)]
mod tests;
