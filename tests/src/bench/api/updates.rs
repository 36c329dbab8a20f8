//! One endpoint changes in the API server; a client on the proxy's node tries new connections until one shows it.

use std::{
    io,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::{
    super::report::percentile,
    world::{World, address},
};
use crate::{Pod, let_run};

/// Between a connection that showed the change and the next change: longer than both sides wait by default from one change of
/// the rules to the next, so it is the work that is measured.
const PAUSE: Duration = Duration::from_millis(1_200);
/// Between two attempts to connect.
const AGAIN: Duration = Duration::from_millis(1);
/// All changes of one proxy; those that fit in it count.
const CHANGING: Duration = Duration::from_secs(240);
/// One change.
const PATIENCE: Duration = Duration::from_secs(120);

/// How long changes took; milliseconds, ascending once all are there.
#[derive(Default)]
struct Times {
    /// From the patch that is sent to the end of the connection that shows it.
    shown: Vec<f64>,
    /// The same from the API server's answer, which is often later than the event.
    after_answer: Vec<f64>,
    /// From the patch that is sent to its event in a watch without a proxy.
    seen: Vec<f64>,
}

/// What was found.
#[derive(Default)]
pub(super) struct Updates {
    /// Another endpoint, or the first one: a new connection lands there.
    served: Times,
    /// No endpoint any more: a new connection is refused.
    refused: Times,
    /// Connections that failed while one endpoint took another's place.
    failed: u32,
}

impl World {
    /// Changes endpoints one after the other: another one, none, the first one again; this often, or until the time is up.
    pub(super) fn update(&self, client: &Pod, rounds: u32) -> Result<Updates> {
        let mut updates = Updates::default();
        let services = self.cluster.changing();
        let start = Instant::now();
        for (_, service) in (0..rounds).zip(services.iter().cycle()) {
            let_run(PAUSE);
            updates.failed += self.change(client, *service, Some(1), &mut updates)?;
            let_run(PAUSE);
            self.change(client, *service, None, &mut updates)?;
            let_run(PAUSE);
            // Until then all are refused.
            self.change(client, *service, Some(0), &mut updates)?;
            if start.elapsed() > CHANGING {
                break;
            }
        }
        for times in [&mut updates.served, &mut updates.refused] {
            for list in [&mut times.shown, &mut times.after_answer, &mut times.seen] {
                list.sort_by(f64::total_cmp);
            }
        }
        Ok(updates)
    }

    /// One change, measured; how many connections failed before.
    pub(super) fn change(
        &self,
        client: &Pod,
        service: u32,
        wanted: Option<usize>,
        updates: &mut Updates,
    ) -> Result<u32> {
        let names = self.servers.each_ref().map(|pod| pod.name());
        let mut failed = 0;
        let begin = Instant::now();
        let pending = self.wire.patch(&self.leading_to(service, wanted));
        loop {
            match (client.ask_tcp(address(service)), wanted) {
                (Ok(who), Some(server)) if who == names[server] => break,
                (Err(error), None) if error.kind() == io::ErrorKind::ConnectionRefused => break,
                (Err(_), _) => failed += 1,
                (Ok(_), _) => {}
            }
            ensure!(
                begin.elapsed() < PATIENCE,
                "no connection shows a change of service-{service} within {PATIENCE:?}"
            );
            let_run(AGAIN);
        }
        let shown = Instant::now();
        let patched = self.wire.wait(pending)?;
        let times = match wanted {
            Some(_) => &mut updates.served,
            None => &mut updates.refused,
        };
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        times.shown.push(ms(shown - patched.sent));
        times
            .after_answer
            .push(ms(shown.saturating_duration_since(patched.answered)));
        times.seen.push(ms(patched.seen - patched.sent));
        Ok(failed)
    }
}

impl Updates {
    /// Milliseconds from a patch that is sent to a connection that lands.
    pub fn served_ms(&self, percent: f64) -> f64 {
        percentile(&self.served.shown, percent)
    }

    /// Milliseconds from a patch that is sent to a connection that is refused.
    pub fn refused_ms(&self, percent: f64) -> f64 {
        percentile(&self.refused.shown, percent)
    }

    /// For the report.
    pub fn rows(&self, side: &str) -> [Value; 2] {
        let row = |what: &str, times: &Times| {
            json!({
                "side": side, "what": what, "changes": times.shown.len(),
                "p50_ms": percentile(&times.shown, 50.0),
                "p99_ms": percentile(&times.shown, 99.0),
                "of_it_until_a_bare_watch_sees_it_p50_ms": percentile(&times.seen, 50.0),
                "of_it_until_a_bare_watch_sees_it_p99_ms": percentile(&times.seen, 99.0),
                "after_the_servers_answer_p50_ms": percentile(&times.after_answer, 50.0),
            })
        };
        let mut served = row("slice patched to first new connection there", &self.served);
        served["failed_connections"] = self.failed.into();
        let refused = row("last endpoint removed to first refused", &self.refused);
        [served, refused]
    }
}
