//! The two HTTP servers, and what they answer from.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::sync::watch;

use crate::{
    backends::{
        self,
        ebpf::view::Pins,
        iptables::{
            host::accounts,
            names::{INVALID_DROPPED, LOCALHOST_ACCEPTED},
        },
    },
    cli::{Global, Run},
    config,
    events::{Event, Events},
    health::{self, Health, Metering, Place, Unbound, checks::Checks},
    metrics::{Accounts, Kernel, Metrics, ModeLabels},
};

/// The server of metrics, by name.
const METRICS: &str = "metrics";

/// Serves `/readyz`, `/livez` and `/healthz`, and what load balancers ask for at the ports of `checks`. Ends only without a
/// port that it must have.
pub fn health(
    args: &Run,
    health: Health,
    checks: watch::Receiver<Checks>,
    metrics: &Metrics,
    events: &Events,
) -> impl Future<Output = Unbound> + use<> {
    let router = health::health_router(health.clone(), metrics.kube_proxy.clone());
    let (_, keeps) = watch::channel(false);
    let place = Place {
        name: "healthz",
        address: args.healthz_bind_address.0,
        is_final: args.bind_address_hard_fail,
    };
    let own = health::serve(place, router, keeps);
    let failed = metrics.health_check_ports_failed.clone();
    let of_services = health::checks::serve(checks, health, failed, events.clone());
    async {
        tokio::select! {
            unbound = own => unbound,
            never = of_services => never,
        }
    }
}

/// Serves `/metrics`, `/proxyMode` and `/configz`, except while the port is to be another proxy's. Ends only without a port
/// that it must have.
pub fn metrics(
    global: &Global,
    args: &Run,
    cgroup: Option<&Path>,
    metrics: &Arc<Metrics>,
    give_way: watch::Receiver<bool>,
) -> impl Future<Output = Unbound> + use<> {
    let router = health::metrics_router(Metering {
        metrics: Arc::clone(metrics),
        kernel: kernel_counters(global.bpf_dir.clone()),
        // "ebpf" is a word that kube-proxy's own tests do not take for one of its modes.
        mode: cgroup.map_or("iptables", |_| "ebpf"),
        config: Arc::new(config::configz(global, args)),
    });
    let place = Place {
        name: METRICS,
        address: args.metrics_bind_address.0,
        is_final: args.bind_address_hard_fail,
    };
    health::serve(place, router, give_way)
}

/// Tells the cluster that the process ends for want of a port.
pub async fn tell_unbound(unbound: &Unbound, events: &Events) {
    let why = unbound.to_string();
    let event = match unbound.name {
        METRICS => Event::NoMetrics(why),
        _ => Event::NoHealth(why),
    };
    events.tell_last(event).await;
}

/// Says which layers serve this node, and why: each by its implementation, or "off".
pub fn tell_mode(socket: &'static str, packet: &'static str, reason: String, metrics: &Metrics) {
    tracing::info!(socket, packet, reason, "mode");
    let labels = ModeLabels {
        socket,
        packet,
        reason,
    };
    metrics.mode_info.get_or_create(&labels).set(1);
}

/// Reads the counters of the kernel at each scrape. A swap may have moved them: the directory is opened each time.
fn kernel_counters(bpf_dir: PathBuf) -> Arc<dyn Fn() -> Kernel + Send + Sync> {
    Arc::new(move || {
        // Without a socket layer there are no maps.
        let of_maps = map_counters(&bpf_dir).unwrap_or_default();
        let packets = |name| accounts::packets(name).ok();
        Kernel {
            accounts: Accounts {
                invalid_dropped: packets(INVALID_DROPPED),
                localhost_accepted: packets(LOCALHOST_ACCEPTED),
            },
            ..of_maps
        }
    })
}

fn map_counters(bpf_dir: &Path) -> Result<Kernel, backends::Error> {
    let pins = Pins::open(bpf_dir)?;
    let summaries = pins.maps()?.into_iter();
    let summaries = summaries.map(|map| {
        let entries = map.entries.map(u64::from);
        (map.name, entries, u64::from(map.capacity))
    });
    Ok(Kernel {
        maps: summaries.collect(),
        reasons: pins.reasons()?,
        accounts: Accounts::default(),
    })
}
