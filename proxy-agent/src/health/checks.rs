//! What load balancers ask for: whether this node has endpoints of a Service whose external policy is Local.
//!
//! One server for each `healthCheckNodePort` and address. Status, headers and body are kube-proxy's
//! (pkg/proxy/healthcheck/service_health.go), which answers in one family of a node only.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, SocketAddr},
    time::Instant,
};

use axum::{
    Router,
    extract::State,
    http::{HeaderName, StatusCode, header},
    response::{IntoResponse, Response},
};
use prometheus_client::metrics::gauge::Gauge;
use tokio::{
    net::TcpListener,
    sync::{oneshot, watch},
    task::JoinHandle,
    time::sleep,
};

use super::{
    Health,
    listen::{BIND_RETRY, Families, listener},
};
use crate::{
    events::{Event, Events},
    state::{Family, HealthCheck, ServiceName},
};

/// What load balancers are told, and where they may ask.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checks {
    /// The Services that they ask for.
    pub services: BTreeMap<ServiceName, HealthCheck>,
    /// Where they ask; unspecified for every address of its family.
    pub addresses: BTreeSet<IpAddr>,
}

impl Checks {
    /// Who is asked for at which port, and who is not because another Service is.
    fn owners(&self) -> (BTreeMap<u16, &ServiceName>, BTreeMap<&ServiceName, String>) {
        let (mut owners, mut failed) = (BTreeMap::new(), BTreeMap::new());
        for (name, check) in &self.services {
            let owner = *owners.entry(check.port).or_insert(name);
            if owner != name {
                let port = check.port;
                failed.insert(name, format!("Service {owner} has port {port}"));
            }
        }
        (owners, failed)
    }
}

/// Serves what `checks` holds for ever; a change of endpoints alone need not wake anybody. A port that cannot be had is told
/// once, in the log and to the cluster, counted in `failed`, and tried again; the others go on. Starts once every layer of
/// `health` serves everything: before that no traffic shall come.
pub async fn serve(
    checks: watch::Receiver<Checks>,
    health: Health,
    failed: Gauge,
    events: Events,
) -> ! {
    for layer in &health.layers {
        if layer
            .status
            .clone()
            .wait_for(|status| status.is_synced)
            .await
            .is_err()
        {
            // Its end is reported by who waits for it.
            std::future::pending().await
        }
    }
    let mut servers = Servers {
        running: BTreeMap::new(),
        told: BTreeMap::new(),
        checks: checks.clone(),
        health,
        failed,
        events,
    };
    let mut changes = checks;
    loop {
        changes.mark_unchanged();
        let is_complete = servers.level().await;
        let again = async {
            match is_complete {
                true => std::future::pending().await,
                false => sleep(BIND_RETRY).await,
            }
        };
        tokio::select! {
            changed = changes.changed() => {
                if changed.is_err() {
                    std::future::pending().await
                }
            }
            () = again => {}
        }
    }
}

/// The servers at work.
struct Servers {
    running: BTreeMap<SocketAddr, Server>,
    /// What is wrong, by Service.
    told: BTreeMap<ServiceName, String>,
    checks: watch::Receiver<Checks>,
    health: Health,
    failed: Gauge,
    events: Events,
}

struct Server {
    service: ServiceName,
    accepting: JoinHandle<io::Result<()>>,
    /// Ends the connections when it is dropped.
    _open: oneshot::Sender<()>,
}

impl Server {
    /// Its address is free again afterwards.
    async fn close(self) {
        self.accepting.abort();
        // It was told to end: nothing to learn from how it did.
        let _ = self.accepting.await;
    }
}

impl Servers {
    /// Closes and opens what changed; whether nothing is missing.
    async fn level(&mut self) -> bool {
        let (wanted, mut failed) = {
            let checks = self.checks.borrow();
            let (owners, failed) = checks.owners();
            let mut wanted = BTreeMap::new();
            for (port, owner) in owners {
                let addresses = checks.addresses.iter();
                wanted.extend(addresses.map(|ip| (SocketAddr::new(*ip, port), owner.clone())));
            }
            let failed = failed.into_iter().map(|(name, why)| (name.clone(), why));
            (wanted, failed.collect::<BTreeMap<ServiceName, String>>())
        };
        let is_over =
            |at: &SocketAddr, server: &mut Server| wanted.get(at) != Some(&server.service);
        let over: Vec<_> = self.running.extract_if(.., is_over).collect();
        for (at, server) in over {
            tracing::info!(service = %server.service, address = %at, "no longer answering load balancers");
            server.close().await;
        }
        let mut is_early = false;
        for (at, service) in wanted {
            if self.running.contains_key(&at) {
                continue;
            }
            // For one family alone: both have one at the same port.
            match listener(at, Families::One) {
                Ok(Some(listener)) => {
                    tracing::info!(%service, address = %at, "answering load balancers");
                    let server = self.start(listener, service, Family::of(at.ip()));
                    self.running.insert(at, server);
                }
                Ok(None) => {}
                // An address that goes, or that the kernel still looks for others to have.
                Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => is_early = true,
                Err(error) => {
                    failed.insert(service, format!("cannot listen at {at}: {error}"));
                }
            }
        }
        self.tell(failed) && !is_early
    }

    fn start(&self, listener: TcpListener, service: ServiceName, family: Family) -> Server {
        let router = Router::new().fallback(answer).with_state(Asked {
            service: service.clone(),
            family,
            checks: self.checks.clone(),
            health: self.health.clone(),
        });
        let (open, closed) = oneshot::channel::<()>();
        let serving = axum::serve(listener, router).with_graceful_shutdown(async {
            // Nothing is ever sent.
            let _ = closed.await;
        });
        Server {
            service,
            accepting: tokio::spawn(serving.into_future()),
            _open: open,
        }
    }

    fn tell(&mut self, failed: BTreeMap<ServiceName, String>) -> bool {
        for (service, error) in &failed {
            if self.told.get(service) != Some(error) {
                tracing::error!(%service, error, retry = ?BIND_RETRY, "load balancers get no answer at the health-check node port of this Service, and will send it no traffic");
                self.events.tell(Event::NoHealthCheck {
                    service: service.clone(),
                    why: error.clone(),
                });
            }
        }
        let count = i64::try_from(failed.len());
        self.failed.set(count.unwrap_or(i64::MAX));
        self.told = failed;
        self.told.is_empty()
    }
}

/// What one server answers from.
#[derive(Clone)]
struct Asked {
    service: ServiceName,
    family: Family,
    checks: watch::Receiver<Checks>,
    health: Health,
}

async fn answer(State(asked): State<Asked>) -> Response {
    let endpoints = {
        let checks = asked.checks.borrow();
        let check = checks.services.get(&asked.service);
        check.map_or(0, |check| check.endpoints_in(asked.family))
    };
    let is_healthy = asked.health.stuck(Instant::now()).is_none();
    let status = match endpoints > 0 && is_healthy {
        true => StatusCode::OK,
        false => StatusCode::SERVICE_UNAVAILABLE,
    };
    let headers = [
        (header::CONTENT_TYPE, "application/json".to_owned()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
        (
            HeaderName::from_static("x-load-balancing-endpoint-weight"),
            endpoints.to_string(),
        ),
    ];
    (status, headers, body(&asked.service, endpoints, is_healthy)).into_response()
}

/// To the byte what kube-proxy says.
fn body(service: &ServiceName, endpoints: usize, is_healthy: bool) -> String {
    let (namespace, name) = service.as_str().split_once('/').unwrap_or_default();
    format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": \"{namespace}\",\n\t\t\"name\": \"{name}\"\n\t}},\n\t\"localEndpoints\": {endpoints},\n\t\"serviceProxyHealthy\": {is_healthy}\n}}"
    )
}

#[cfg(test)]
mod tests;
