//! What the API server is asked, with client-go's names, texts, labels and buckets (k8s.io/component-base,
//! metrics/prometheus/restclient, v0.36): what dashboards for kube-proxy ask for.

use std::time::Duration;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::Registry,
};

/// Labels of an answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AnswerLabels {
    /// Its status, or `<error>` for none.
    code: String,
    method: String,
    host: String,
}

/// Labels of a request.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    verb: String,
    host: String,
}

/// A clone counts into the same.
#[derive(Clone, Debug)]
pub struct RestClientMetrics {
    requests: Family<AnswerLabels, Counter>,
    durations: Family<RequestLabels, Histogram, fn() -> Histogram>,
}

impl Default for RestClientMetrics {
    fn default() -> Self {
        Self {
            requests: Family::default(),
            durations: Family::new_with_constructor(duration),
        }
    }
}

fn duration() -> Histogram {
    Histogram::new([
        0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0,
    ])
}

impl RestClientMetrics {
    /// A request was answered with a status, or not at all. `elapsed` is none for a watch, which lasts.
    pub fn answered(&self, method: &str, host: &str, code: Option<u16>, elapsed: Option<Duration>) {
        let answer = AnswerLabels {
            code: code.map_or_else(|| "<error>".to_owned(), |code| code.to_string()),
            method: method.to_owned(),
            host: host.to_owned(),
        };
        self.requests.get_or_create(&answer).inc();
        if let Some(elapsed) = elapsed {
            let request = RequestLabels {
                verb: method.to_owned(),
                host: host.to_owned(),
            };
            let durations = self.durations.get_or_create(&request);
            durations.observe(elapsed.as_secs_f64());
        }
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("rest_client");
        registry.register(
            "requests",
            "[ALPHA] Number of HTTP requests, partitioned by status code, method, and host.",
            self.requests.clone(),
        );
        registry.register(
            "request_duration_seconds",
            "[ALPHA] Request latency in seconds. Broken down by verb, and host.",
            self.durations.clone(),
        );
    }
}
