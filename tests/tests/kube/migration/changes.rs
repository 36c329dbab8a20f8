//! Endpoints that come and go all the time, in the steps of a real EndpointSlice controller.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use proxy_tests::{
    Endpoint, Pod, Service,
    kube::ControlPlane,
    let_run,
    load::{Record, now_ns},
};

/// How long a pod is ready, and afterwards away.
const READY: Duration = Duration::from_millis(1_500);
const AWAY: Duration = Duration::from_secs(3);
/// Between two looks at what is to change.
const TICK: Duration = Duration::from_millis(50);

/// Pods that are endpoints for a while, again and again.
pub struct Changes<'a> {
    /// Of which cluster.
    pub control: &'a ControlPlane,
    /// The Service, without endpoints.
    pub service: Service,
    /// Endpoints that stay.
    pub staying: Vec<(Pod, &'static str)>,
    /// Endpoints that come and go, and their nodes.
    pub passing: Vec<(Pod, &'static str)>,
    /// How long a pod that is told to end goes on serving: its slice says `terminating` meanwhile. Afterwards it is gone, and
    /// a connection to it would fail.
    pub grace: Duration,
}

/// One pod's time as an endpoint.
#[derive(Clone, Copy, Debug)]
pub struct Life {
    /// Who.
    pub identity: [u8; 8],
    /// Before the API server knew, [`now_ns`].
    pub from_ns: u64,
    /// After the API server had its slice say `terminating`.
    pub told_ns: u64,
    /// When it is gone.
    pub ended_ns: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Away,
    Ready,
    Terminating,
}

impl Changes<'_> {
    /// Changes endpoints until it is told to stop: the lives that there were.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn run(&self, stop: &AtomicBool) -> anyhow::Result<Vec<Life>> {
        let start = Instant::now();
        let mut lives: Vec<Life> = Vec::new();
        let mut before = vec![State::Away; self.passing.len()];
        while !stop.load(Ordering::Relaxed) {
            let now = self.states(start.elapsed());
            if now != before {
                let begins = now_ns();
                self.apply(&now)?;
                let told = now_ns();
                for (((pod, _), state), old) in self.passing.iter().zip(&now).zip(&before) {
                    let identity = Record::identity_of(pod.name());
                    if (*old, *state) == (State::Away, State::Ready) {
                        lives.push(Life {
                            identity,
                            from_ns: begins,
                            told_ns: u64::MAX,
                            ended_ns: u64::MAX,
                        });
                    }
                    let last = lives.iter_mut().rev().find(|it| it.identity == identity);
                    if let Some(life) = last
                        && *state != State::Ready
                        && life.told_ns == u64::MAX
                    {
                        life.told_ns = told;
                        life.ended_ns = told + nanos(self.grace);
                    }
                }
                before = now;
            }
            let_run(TICK);
        }
        Ok(lives)
    }

    /// Every endpoint that there is at the start, and none that goes.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn begin(&self) -> anyhow::Result<()> {
        self.apply(&vec![State::Away; self.passing.len()])
    }

    /// One after the other, so that something changes all the time.
    fn states(&self, elapsed: Duration) -> Vec<State> {
        let cycle = READY + self.grace + AWAY;
        let count = u32::try_from(self.passing.len()).unwrap_or(u32::MAX);
        let state = |number: u32| {
            let offset = cycle * number / count;
            match elapsed.checked_sub(offset) {
                None => State::Away,
                Some(since) => match nanos(since) % nanos(cycle) {
                    at if at < nanos(READY) => State::Ready,
                    at if at < nanos(READY + self.grace) => State::Terminating,
                    _ => State::Away,
                },
            }
        };
        (0..count).map(state).collect()
    }

    fn apply(&self, states: &[State]) -> anyhow::Result<()> {
        let both =
            |pod: &Pod, node: &str| [false, true].map(|v6| Endpoint::new(pod.address(v6), node));
        let staying = self.staying.iter().flat_map(|(pod, node)| both(pod, node));
        let passing = self.passing.iter().zip(states);
        let passing = passing.flat_map(|((pod, node), state)| match state {
            State::Away => Vec::new(),
            State::Ready => both(pod, node).to_vec(),
            State::Terminating => both(pod, node).map(Endpoint::terminating).to_vec(),
        });
        let service = self.service.clone().endpoints(staying.chain(passing));
        self.control.apply(&service)
    }
}

/// As [`now_ns`] counts.
pub fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
