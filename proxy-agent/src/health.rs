//! What the agent says of itself over HTTP: readiness, liveness, metrics, mode.

use std::{
    fmt::Write as _,
    io,
    net::{Ipv6Addr, SocketAddr},
    os::fd::AsRawFd,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket,
    sockopt,
};
use tokio::{net::TcpListener, sync::watch};

use crate::{
    metrics::{Kernel, Metrics},
    sync::SyncStatus,
};

pub mod checks;

/// How often a taken port is tried again: kube-proxy's interval (cmd/kube-proxy/app/server.go, v1.36).
const BIND_RETRY: Duration = Duration::from_secs(5);
/// A layer that has failed for longer than this is not alive: kube-proxy's 2 × syncPeriod.
const STUCK_AFTER: Duration = Duration::from_secs(60);

/// Header that tells our answer to `/proxyMode` from another proxy's; its value is our version.
pub const OURS: &str = "x-proxy-agent";

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

/// What health is judged by.
#[derive(Clone, Debug)]
pub struct Health {
    /// The loops of the layers.
    pub layers: Vec<watch::Receiver<SyncStatus>>,
    /// Self-test of the socket layer; passed where there is none.
    pub self_test: watch::Receiver<SelfTest>,
    /// Start of the agent.
    pub started: Instant,
}

impl Health {
    /// Why this node should not get traffic yet; none when ready.
    pub fn unready(&self) -> Option<String> {
        for layer in &self.layers {
            let status = layer.borrow();
            if !status.is_synced {
                let why = status.last_error.as_deref();
                return Some(format!(
                    "the {} layer has had no complete sync yet: {}",
                    status.layer,
                    why.unwrap_or("waiting for the sources")
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

    /// Why the agent should be restarted; none when it is alive. One layer that fails is no reason: the other one would go
    /// without an agent, the longer the more often kubelet has to restart it.
    pub fn dead(&self, now: Instant) -> Option<String> {
        let stuck: Vec<String> = self.stuck_layers(now).collect();
        let is_dead = !stuck.is_empty() && stuck.len() == self.layers.len();
        is_dead.then(|| stuck.join("; "))
    }

    /// What is wrong with each layer that has failed for too long.
    fn stuck_layers(&self, now: Instant) -> impl Iterator<Item = String> {
        self.layers.iter().filter_map(move |layer| {
            let status = layer.borrow();
            let error = status.last_error.as_deref()?;
            let since = status.last_success.unwrap_or(self.started);
            let age = now.saturating_duration_since(since).as_secs();
            let is_stuck = age > STUCK_AFTER.as_secs();
            is_stuck.then(|| {
                let layer = status.layer;
                format!("no sync of the {layer} layer for {age} s: {error}")
            })
        })
    }
}

/// `/readyz`, `/livez`, `/healthz`.
pub fn health_router(health: Health) -> Router {
    Router::new()
        .route(
            "/readyz",
            get(|State(health): State<Health>| async move { answer(health.unready()) }),
        )
        .route(
            "/livez",
            get(|State(health): State<Health>| async move { answer(health.dead(Instant::now())) }),
        )
        .route(
            "/healthz",
            get(|State(health): State<Health>| async move { answer(health.stuck(Instant::now())) }),
        )
        .with_state(health)
}

fn answer(trouble: Option<String>) -> Response {
    // As kube-proxy: nobody shall guess a type from the body.
    let headers = [(header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
    match trouble {
        None => (StatusCode::OK, headers, "ok\n".to_owned()),
        Some(mut why) => {
            let _ = writeln!(why);
            (StatusCode::SERVICE_UNAVAILABLE, headers, why)
        }
    }
    .into_response()
}

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
        .route("/healthz", get(async || "ok"))
        .with_state(metering)
}

async fn metrics(State(metering): State<Metering>) -> Response {
    metering.metrics.update(&(metering.kernel)());
    let text = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, text)], metering.metrics.text()).into_response()
}

async fn proxy_mode(State(metering): State<Metering>) -> Response {
    ([(OURS, env!("CARGO_PKG_VERSION"))], metering.mode).into_response()
}

async fn configz(State(metering): State<Metering>) -> Response {
    let json = (header::CONTENT_TYPE, "application/json");
    ([json], metering.config.to_string()).into_response()
}

/// Where a server listens, and what becomes of a port that cannot be had.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// What is served, for the log.
    pub name: &'static str,
    /// Nowhere without one.
    pub address: Option<SocketAddr>,
    /// Not to be tried again.
    pub is_final: bool,
}

/// A server that has no port, and shall not wait for it.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot serve {name} at {address}: {cause}; is another proxy or agent on this port? bindAddressHardFail is set"
)]
pub struct Unbound {
    /// What is served.
    pub name: &'static str,
    address: SocketAddr,
    cause: io::Error,
}

/// Serves `router` for ever. By default a port that cannot be had is no reason to stop serving the node: it is tried again.
/// While `give_way` is true the port is left to others.
pub async fn serve(place: Place, router: Router, give_way: watch::Receiver<bool>) -> Unbound {
    let Place {
        name,
        address: Some(address),
        is_final,
    } = place
    else {
        return std::future::pending().await;
    };
    let mut told = false;
    loop {
        until(give_way.clone(), false).await;
        let error = match listen_at(address) {
            Ok(listener) => {
                tracing::info!(server = name, %address, "serving");
                let server = axum::serve(listener, router.clone());
                let gives_way = until(give_way.clone(), true);
                match server.with_graceful_shutdown(gives_way).await {
                    Ok(()) => {
                        tracing::info!(server = name, %address, "the port is left to another proxy");
                        continue;
                    }
                    Err(error) => error,
                }
            }
            Err(error) => error,
        };
        if is_final {
            return Unbound {
                name,
                address,
                cause: error,
            };
        }
        if !told {
            told = true;
            tracing::error!(server = name, %address, %error, retry = ?BIND_RETRY, "cannot serve: is another proxy or agent on this port?");
        }
        tokio::time::sleep(BIND_RETRY).await;
    }
}

/// Listens; at an unspecified address in both families, as servers written in Go do.
fn listen_at(address: SocketAddr) -> io::Result<TcpListener> {
    if address.ip().is_unspecified() {
        let everywhere = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), address.port());
        if let Some(listener) = listener(everywhere, Families::Both)? {
            return Ok(listener);
        }
    }
    let lacking = || io::Error::other("this host lacks the address family");
    listener(address, Families::One)?.ok_or_else(lacking)
}

/// Whether a listener at an IPv6 address also takes IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Families {
    One,
    Both,
}

/// None where this host lacks the family.
fn listener(address: SocketAddr, families: Families) -> io::Result<Option<TcpListener>> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = match socket(family, SockType::Stream, flags, None) {
        Err(nix::Error::EAFNOSUPPORT) => return Ok(None),
        made => made?,
    };
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    if address.is_ipv6() {
        setsockopt(&fd, sockopt::Ipv6V6Only, &(families == Families::One))?;
    }
    bind(fd.as_raw_fd(), &SockaddrStorage::from(address))?;
    listen(&fd, Backlog::MAXCONN)?;
    Ok(Some(TcpListener::from_std(fd.into())?))
}

/// Returns when `value` is `wanted`; never, if nobody is left who would change it.
async fn until(mut value: watch::Receiver<bool>, wanted: bool) {
    if value.wait_for(|value| *value == wanted).await.is_err() {
        std::future::pending().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A node with a healthy socket layer, and a packet layer that is doing like this.
    fn health(packets: SyncStatus, self_test: SelfTest, started: Instant) -> Health {
        let sockets = SyncStatus {
            layer: "socket",
            ..synced()
        };
        let (_, self_test) = watch::channel(self_test);
        Health {
            layers: [sockets, packets]
                .map(|status| watch::channel(status).1)
                .into(),
            self_test,
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
}
