//! What the agent says of itself over HTTP: readiness, liveness, metrics, mode.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use axum::{
    Router,
    extract::State,
    http::{HeaderName, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use jiff::Timestamp;
use prometheus_client::metrics::{counter::Counter, family::Family};
use serde::Serialize;
use tokio::sync::watch;

use crate::{
    metrics::{CodeLabel, KubeProxyMetrics},
    sync::{Inbox, SyncStatus},
};

pub mod checks;
mod listen;
mod metering;

pub use listen::{Place, Unbound, serve};
pub use metering::{Metering, OURS, metrics_router};

/// Result of the self-test of a layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SelfTest {
    /// Not run yet.
    #[default]
    Pending,
    /// A connection to the canary address was translated.
    Passed,
    /// It was not; says why.
    Failed(String),
}

/// What the health of a layer is judged by.
#[derive(Clone, Debug)]
pub struct Watched {
    /// What it says.
    pub status: watch::Receiver<SyncStatus>,
    /// What it is given, and how it gets on with that.
    pub inbox: Arc<Inbox>,
}

/// What health is judged by.
#[derive(Clone, Debug)]
pub struct Health {
    /// The loops of the layers.
    pub layers: Vec<Watched>,
    /// Self-test of the socket layer; passed where there is none.
    pub self_test: watch::Receiver<SelfTest>,
    /// What is wrong with the source of Services, if anything is.
    pub trouble: watch::Receiver<Option<String>>,
    /// Whether the Node is one that load balancers may send traffic; none while there has been no Node.
    pub eligible: watch::Receiver<Option<bool>>,
    /// Without a Node, the node may get traffic: the source of Services need not have one.
    pub needs_no_node: bool,
    /// A layer that is behind for this long is not healthy: kube-proxy's 2 × syncPeriod.
    pub patience: Duration,
    /// Start of the agent.
    pub started: Instant,
}

impl Health {
    /// Why this node should not get traffic yet; none when ready.
    pub fn unready(&self) -> Option<String> {
        for layer in &self.layers {
            let status = layer.status.borrow();
            if !status.is_synced {
                let trouble = self.trouble.borrow();
                let why = match (&status.last_error, &*trouble) {
                    (Some(error), _) => error.clone(),
                    (None, Some(trouble)) => format!("waiting for the sources: {trouble}"),
                    (None, None) => "waiting for the sources".to_owned(),
                };
                let layer = status.layer;
                return Some(format!(
                    "the {layer} layer has had no complete sync yet: {why}"
                ));
            }
        }
        match &*self.self_test.borrow() {
            SelfTest::Passed => None,
            SelfTest::Pending => Some("the self-test has not run yet".to_owned()),
            SelfTest::Failed(why) => Some(format!("the self-test failed: {why}")),
        }
    }

    /// Why load balancers should take another node; none when what they send is served as it should be.
    pub fn stuck(&self, now: Instant) -> Option<String> {
        self.stuck_layers(now).next()
    }

    /// Whether the Node is one that load balancers may send traffic.
    pub fn is_eligible(&self) -> bool {
        self.eligible.borrow().unwrap_or(self.needs_no_node)
    }

    /// Why the agent should be restarted; none when it is alive. One layer that fails is no reason: the other one would go
    /// without an agent, the longer the more often kubelet has to restart it. One that hangs is.
    pub fn dead(&self, now: Instant) -> Option<String> {
        if let Some(hung) = self.layers.iter().find_map(|layer| self.hung(layer, now)) {
            return Some(hung);
        }
        let stuck: Vec<String> = self.stuck_layers(now).collect();
        let is_dead = !stuck.is_empty() && stuck.len() == self.layers.len();
        is_dead.then(|| stuck.join("; "))
    }

    /// A layer that does not come back from what it does. Its first sync may take as long as it wants, as kube-proxy's.
    fn hung(&self, layer: &Watched, now: Instant) -> Option<String> {
        let status = layer.status.borrow();
        let busy = now.saturating_duration_since(layer.inbox.progress().busy_since?);
        let is_hung = status.last_success.is_some() && busy >= self.patience;
        let layer = status.layer;
        is_hung.then(|| format!("the {layer} layer hangs for {} s", busy.as_secs()))
    }

    /// What is wrong with each layer that has failed, or has been behind, for too long.
    fn stuck_layers(&self, now: Instant) -> impl Iterator<Item = String> {
        self.layers.iter().filter_map(move |layer| {
            let status = layer.status.borrow();
            let behind = layer.inbox.progress().behind_since;
            let (since, why) = match &status.last_error {
                Some(error) => (status.last_success.unwrap_or(self.started), error.as_str()),
                None => (behind?, "it is behind"),
            };
            let age = now.saturating_duration_since(since);
            let layer = status.layer;
            (age >= self.patience).then(|| {
                format!(
                    "no sync of the {layer} layer for {} s: {why}",
                    age.as_secs()
                )
            })
        })
    }

    fn report(&self, now: Instant, wrong: Option<String>, is_eligible: Option<bool>) -> Report {
        let current = SystemTime::now();
        let layers = self.layers.iter();
        // The layer that is furthest behind; none before each has synced.
        let oldest = layers.map(|layer| layer.status.borrow().last_success);
        let updated = oldest.min().flatten();
        let updated = updated.map(|at| time(current - now.saturating_duration_since(at)));
        let is_healthy = wrong.is_none();
        let last_updated = match is_healthy && is_eligible != Some(false) {
            // As of old: whoever is healthy has just been updated.
            true => time(current),
            false => updated
                .clone()
                .unwrap_or_else(|| "0001-01-01T00:00:00Z".to_owned()),
        };
        let family = |updated: &String| OfFamily {
            last_updated: updated.clone(),
            healthy: self.stuck(now).is_none(),
        };
        Report {
            last_updated,
            current_time: time(current),
            node_eligible: is_eligible,
            healthy: is_healthy,
            status: updated.map(|updated| Families {
                v4: family(&updated),
                v6: family(&updated),
            }),
            reason: wrong,
        }
    }
}

/// kube-proxy's answer, in its order of fields (pkg/proxy/healthcheck/proxy_health.go, v1.36), and a reason of ours.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    last_updated: String,
    current_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<Families>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// Both are served by the same syncs.
#[derive(Debug, Serialize)]
struct Families {
    #[serde(rename = "IPv4")]
    v4: OfFamily,
    #[serde(rename = "IPv6")]
    v6: OfFamily,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct OfFamily {
    last_updated: String,
    healthy: bool,
}

/// As Go writes it: RFC 3339 with nanoseconds as far as they say something.
fn time(time: SystemTime) -> String {
    Timestamp::try_from(time).map_or_else(|_| String::new(), |time| time.to_string())
}

/// `/readyz`, `/livez`, `/healthz`.
pub fn health_router(health: Health, counted: KubeProxyMetrics) -> Router {
    Router::new()
        .route("/readyz", get(readyz))
        .route("/livez", get(livez))
        .route("/healthz", get(healthz))
        .with_state((health, counted))
}

type Asked = State<(Health, KubeProxyMetrics)>;

/// kube-proxy has none.
async fn readyz(State((health, _)): Asked) -> Response {
    let headers = [NOSNIFF];
    match health.unready() {
        None => (StatusCode::OK, headers, "ok\n".to_owned()),
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, headers, format!("{why}\n")),
    }
    .into_response()
}

async fn livez(State((health, counted)): Asked) -> Response {
    let now = Instant::now();
    let report = health.report(now, health.dead(now), None);
    reported(report.healthy, &report, &counted.livez)
}

async fn healthz(State((health, counted)): Asked) -> Response {
    let now = Instant::now();
    let is_eligible = health.is_eligible();
    let report = health.report(now, health.stuck(now), Some(is_eligible));
    reported(report.healthy && is_eligible, &report, &counted.healthz)
}

/// As kube-proxy: nobody shall guess a type from the body.
const NOSNIFF: (HeaderName, &str) = (header::X_CONTENT_TYPE_OPTIONS, "nosniff");

fn reported(is_good: bool, report: &Report, counted: &Family<CodeLabel, Counter>) -> Response {
    let status = match is_good {
        true => StatusCode::OK,
        false => StatusCode::SERVICE_UNAVAILABLE,
    };
    let code = status.as_u16();
    counted.get_or_create(&CodeLabel { code }).inc();
    let headers = [(header::CONTENT_TYPE, "application/json"), NOSNIFF];
    let body = serde_json::to_string(report).expect("text and booleans are JSON");
    (status, headers, body).into_response()
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::gauge::Gauge;

    use super::*;
    use crate::sync::Scope;

    fn watched(status: SyncStatus) -> Watched {
        Watched {
            status: watch::channel(status).1,
            inbox: Arc::new(Inbox::new(Gauge::default())),
        }
    }

    /// A node with a healthy socket layer, and a packet layer that is doing like this.
    fn health(packets: SyncStatus, self_test: SelfTest, started: Instant) -> Health {
        let sockets = SyncStatus {
            layer: "socket",
            ..synced()
        };
        let (_, self_test) = watch::channel(self_test);
        Health {
            layers: [sockets, packets].map(watched).into(),
            self_test,
            trouble: watch::channel(None).1,
            eligible: watch::channel(Some(true)).1,
            needs_no_node: false,
            patience: Duration::from_secs(60),
            started,
        }
    }

    fn starting() -> SyncStatus {
        SyncStatus {
            layer: "packet",
            ..SyncStatus::default()
        }
    }

    fn synced() -> SyncStatus {
        SyncStatus {
            is_synced: true,
            ..starting()
        }
    }

    #[test]
    fn a_node_is_ready_when_every_layer_has_synced_and_the_self_test_passed() {
        let now = Instant::now();
        let failed = SelfTest::Failed("not translated".to_owned());
        for (status, test, expected) in [
            (
                starting(),
                SelfTest::Passed,
                Some("the packet layer has had no complete sync yet: waiting for the sources"),
            ),
            (
                synced(),
                SelfTest::Pending,
                Some("the self-test has not run yet"),
            ),
            (
                synced(),
                failed,
                Some("the self-test failed: not translated"),
            ),
            (synced(), SelfTest::Passed, None),
        ] {
            assert_eq!(health(status, test, now).unready().as_deref(), expected);
        }
        let mut health = health(starting(), SelfTest::Passed, now);
        health.trouble = watch::channel(Some("no answer".to_owned())).1;
        let expected =
            "the packet layer has had no complete sync yet: waiting for the sources: no answer";
        assert_eq!(health.unready().as_deref(), Some(expected));
    }

    #[test]
    fn a_restart_waits_until_every_layer_has_failed_for_a_minute() {
        let now = Instant::now();
        let long_ago = now.checked_sub(Duration::from_secs(61)).unwrap();
        let failing = SyncStatus {
            last_error: Some("no memory".to_owned()),
            ..starting()
        };
        let mut health = health(failing, SelfTest::Passed, long_ago);
        assert_eq!(health.dead(now), None);
        health.layers.remove(0);
        assert_eq!(
            health.dead(now).as_deref(),
            Some("no sync of the packet layer for 61 s: no memory")
        );
        health.layers.clear();
        assert_eq!(health.dead(now), None);
    }

    #[test]
    fn a_layer_that_fails_for_a_minute_is_stuck() {
        let now = Instant::now();
        let failing = |last_success| SyncStatus {
            last_error: Some("no memory".to_owned()),
            last_success,
            ..starting()
        };
        let stuck = |status, started| health(status, SelfTest::Passed, started).stuck(now);
        let long_ago = now.checked_sub(Duration::from_secs(61)).unwrap();
        assert_eq!(stuck(starting(), long_ago), None);
        assert_eq!(stuck(failing(Some(now)), long_ago), None);
        assert_eq!(stuck(failing(None), now), None);
        assert_eq!(
            stuck(failing(None), long_ago).as_deref(),
            Some("no sync of the packet layer for 61 s: no memory")
        );
    }

    #[test]
    fn a_layer_that_does_not_come_back_is_stuck_and_needs_a_restart() {
        let start = Instant::now();
        let mut health = health(synced(), SelfTest::Passed, start);
        let inbox = Arc::clone(&health.layers[1].inbox);
        inbox.sources(true, true);
        inbox.wait(None, start);
        inbox.push(Scope::All);
        let soon = start + Duration::from_secs(59);
        let late = start + Duration::from_secs(61);
        assert_eq!((health.stuck(soon), health.dead(soon)), (None, None));
        let stuck = health.stuck(late).unwrap();
        assert!(
            stuck.starts_with("no sync of the packet layer for 6")
                && stuck.ends_with("it is behind"),
            "{stuck}"
        );
        assert_eq!(health.dead(late), None, "its first sync may take long");
        health.layers[1].status = watch::channel(SyncStatus {
            last_success: Some(start),
            ..synced()
        })
        .1;
        let dead = health.dead(late).unwrap();
        assert!(dead.starts_with("the packet layer hangs for 6"), "{dead}");
    }

    #[test]
    fn the_reports_are_kube_proxys() {
        let now = Instant::now();
        let status = SyncStatus {
            last_success: Some(now),
            ..synced()
        };
        let mut health = health(status.clone(), SelfTest::Passed, now);
        health.layers[0] = watched(status);
        let text = |health: &Health, wrong: Option<&str>, eligible| {
            let report = health.report(now, wrong.map(str::to_owned), eligible);
            let current = report.current_time.clone();
            let text = serde_json::to_string(&report).unwrap();
            text.replace(&current, "NOW")
        };
        let families = r#""status":{"IPv4":{"lastUpdated":"NOW","healthy":true},"IPv6":{"lastUpdated":"NOW","healthy":true}}"#;
        let begin = r#"{"lastUpdated":"NOW","currentTime":"NOW","#;
        assert_eq!(
            text(&health, None, Some(true)),
            format!(r#"{begin}"nodeEligible":true,"healthy":true,{families}}}"#)
        );
        assert_eq!(
            text(&health, None, None),
            format!(r#"{begin}"healthy":true,{families}}}"#)
        );
        health.layers.truncate(1);
        health.layers[0] = watched(starting());
        assert_eq!(
            text(&health, Some("no memory"), Some(false)),
            r#"{"lastUpdated":"0001-01-01T00:00:00Z","currentTime":"NOW","nodeEligible":false,"healthy":false,"reason":"no memory"}"#
        );
        let at = SystemTime::UNIX_EPOCH + Duration::from_nanos(1_767_225_600_120_000_000);
        assert_eq!(time(at), "2026-01-01T00:00:00.12Z");
    }

    #[test]
    fn a_node_is_eligible_unless_it_leaves_or_was_never_seen() {
        for (node, needs_no_node, expected) in [
            (Some(true), false, true),
            (Some(false), true, false),
            (None, false, false),
            (None, true, true),
        ] {
            let mut health = health(synced(), SelfTest::Passed, Instant::now());
            health.eligible = watch::channel(node).1;
            health.needs_no_node = needs_no_node;
            assert_eq!(health.is_eligible(), expected, "{node:?} {needs_no_node}");
        }
    }
}
