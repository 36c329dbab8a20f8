//! What the metrics server answers.

use std::sync::Arc;

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, HeaderName, header},
    response::{IntoResponse, Response},
    routing::get,
};

use super::NOSNIFF;
use crate::metrics::{Kernel, Metrics};

/// Header that tells our answer to `/proxyMode` from another proxy's; its value is our version.
pub const OURS: HeaderName = HeaderName::from_static("x-proxy-agent");

/// What the metrics server answers from.
#[derive(Clone)]
pub struct Metering {
    /// Everything that is counted here.
    pub metrics: Arc<Metrics>,
    /// Reads what is counted in the kernel, at each scrape.
    pub kernel: Arc<dyn Fn() -> Kernel + Send + Sync>,
    /// Answer of `/proxyMode`.
    pub mode: &'static str,
    /// Answer of `/configz`.
    pub config: Arc<serde_json::Value>,
}

/// `/metrics`, `/proxyMode`, `/configz`, `/healthz`.
pub fn metrics_router(metering: Metering) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/proxyMode", get(proxy_mode))
        .route("/configz", get(configz))
        .route("/healthz", get(async || ([NOSNIFF], "ok")))
        // Of SLIs of checks, of which kube-proxy has none.
        .route("/metrics/slis", get(async || ""))
        .with_state(metering)
}

async fn metrics(State(metering): State<Metering>, headers: HeaderMap) -> Response {
    metering.metrics.update(&(metering.kernel)());
    let accepted = headers.get(header::ACCEPT);
    let accepted = accepted.and_then(|accepted| accepted.to_str().ok());
    let is_open =
        accepted.is_some_and(|accepted| accepted.contains("application/openmetrics-text"));
    let (kind, text) = match is_open {
        true => (
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            metering.metrics.open_metrics(),
        ),
        false => (
            "text/plain; version=0.0.4; charset=utf-8",
            metering.metrics.text(),
        ),
    };
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

async fn proxy_mode(State(metering): State<Metering>) -> Response {
    let headers = [NOSNIFF, (OURS, env!("CARGO_PKG_VERSION"))];
    (headers, metering.mode).into_response()
}

async fn configz(State(metering): State<Metering>) -> Response {
    let json = (header::CONTENT_TYPE, "application/json");
    ([json, NOSNIFF], metering.config.to_string()).into_response()
}
