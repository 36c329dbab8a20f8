//! The thread on which the packet layer lives: rules of iptables, at the pace of its tools.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fs, io,
    sync::Arc,
    time::Instant,
};

use nix::unistd::{AccessFlags, access};
use tokio::sync::watch;

use super::{
    Error,
    feed::Feed,
    layer::LayerThread,
    rival::{self, Beside, LookOut},
};
use crate::{
    backends::{
        conntrack::Cleaner,
        iptables::{
            Counts, IptablesBackend,
            rules::{Features, LocalPods, NodePorts, Rules},
            tables::Tables as _,
            watch::Watched,
        },
        process,
    },
    cli::{DetectLocalMode, Layers, Packet, Run, Sources},
    compile::Compiler,
    metrics::{FamilyLabel, KubeProxyMetrics, LayerMetrics, Metrics, TableLabels},
    state::{Family, NodePortAddresses, ServicePort},
    sync::{Layer, Scope, SyncStatus},
};

mod tools;

pub use tools::Tools;
use tools::{LateFamilies, tell_tools};

/// What serves the node beside this layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nothing: this layer serves everything.
    Alone,
    /// The socket layer, which serves the node's own node ports on loopback without `route_localnet`.
    BesideSockets,
}

/// Beside the socket layer this one gets a tenth of a core that both want: its tools compute for seconds.
const NICE: i32 = 10;

/// Starts the thread.
///
/// # Errors
/// A flag that another one needs is missing; no thread to be had.
pub fn start(
    tools: Tools,
    args: &Run,
    feed: Feed,
    counts: LayerMetrics,
    metrics: &Arc<Metrics>,
    give_way: watch::Sender<bool>,
) -> Result<LayerThread, Error> {
    let place = tools.place();
    let rules = rules(&args.sources, &args.layers, place, route_localnet)?;
    let others = rival::look_out(
        args.metrics_bind_address.0,
        args.layers.packet.takeover_after(),
    );
    let LookOut {
        rivals,
        is_elsewhere,
    } = others.map_err(super::start("looking out for other proxies"))?;
    let pace = args.layers.packet.iptables_min_sync_period;
    let status = SyncStatus::channel("packet");
    let followed = status.subscribe();
    let inbox = Arc::clone(&feed.inbox);
    let flows = RefCell::new(cleaner(metrics).map_err(super::start("the conntrack clean-up"))?);
    let metrics = Arc::clone(metrics);
    let work = move || {
        if place == Place::BesideSockets
            && let Err(error) = process::give_way(NICE)
        {
            tracing::warn!(%error, "the packet layer competes with the socket layer for the cores");
        }
        let Some(host) = tools.wait(&feed.inbox, &status) else {
            return;
        };
        tell_tools(&host, &metrics);
        let rules = Rules {
            families: host.families(),
            features: host.features(),
            ..rules
        };
        let is_nft = host.variant().is_nft();
        let backend = IptablesBackend::new(Watched::new(host, is_nft), rules).beside(rivals);
        let layer = Layer::new(status, backend, counts, Instant::now());
        let layer = layer.with_pace(pace);
        let mut compiler = Compiler::default();
        let compile = |scope: &Scope| {
            let compiled = feed.compile(&mut compiler, scope, &metrics);
            let services = match &compiled.scope {
                Scope::All => None,
                Scope::Part(dirty) => Some(&dirty.services),
            };
            flows.borrow_mut().note(services, &compiled.state);
            compiled
        };
        let mut told = LeftOut::default();
        let mut beside = Beside::new(give_way, is_elsewhere, Arc::clone(&metrics));
        let mut families = LateFamilies::default();
        layer.run(&feed.inbox, compile, |backend, status| {
            told.tell(backend.left_out(), &metrics);
            beside.tend(backend, status);
            feed.tend(status);
            tell_counts(backend.counts(), &metrics.kube_proxy);
            let is_news = families.tend(backend, &metrics);
            if is_news {
                feed.inbox.push(Scope::All);
            }
            // While a source lacks something the rules keep what they had; what was noted before another proxy took the node is
            // no longer true.
            if status.is_serving && status.last_error.is_none() && !beside.is_observing() {
                flows.borrow_mut().clean();
            }
            backend.tables_mut().has_changed() || is_news
        });
    };
    LayerThread::start("packet-layer", followed, inbox, work)
        .map_err(super::start("the packet layer"))
}

/// What kube-proxy's metrics say of rules.
fn tell_counts(counts: &Counts, metrics: &KubeProxyMetrics) {
    let Counts {
        held,
        written,
        failures,
    } = counts;
    for (rules, gauges) in [(held, &metrics.rules), (written, &metrics.rules_last)] {
        for ((family, table), count) in rules {
            let labels = TableLabels {
                ip_family: family.name(),
                table: table.name(),
            };
            let gauge = gauges.get_or_create(&labels);
            gauge.set(i64::try_from(*count).unwrap_or(i64::MAX));
        }
    }
    for (family, (all, partial)) in failures {
        let label = FamilyLabel {
            ip_family: family.name(),
        };
        for (count, counters) in [
            (all, &metrics.restore_failures),
            (partial, &metrics.partial_restore_failures),
        ] {
            let counter = counters.get_or_create(&label);
            counter.inc_by(count.saturating_sub(counter.get()));
        }
    }
}

/// Forgets the flows that lead to nobody who serves, and counts them.
fn cleaner(metrics: &Metrics) -> io::Result<Cleaner> {
    let deleted = metrics.conntrack_flows_deleted.clone();
    let duration = metrics.conntrack_cleanup_duration.clone();
    let kube_proxy = metrics.kube_proxy.clone();
    Cleaner::start(move |cleaned, elapsed| match cleaned {
        Ok(cleaned) => {
            duration.observe(elapsed.as_secs_f64());
            deleted.inc_by(cleaned.deleted.sum());
            for family in [Family::V4, Family::V6] {
                let label = FamilyLabel {
                    ip_family: family.name(),
                };
                let looks = kube_proxy.reconciled.get_or_create(&label);
                looks.observe(elapsed.as_secs_f64());
                let entries = kube_proxy.reconciled_entries.get_or_create(&label);
                entries.inc_by(cleaned.deleted.of(family));
            }
            if cleaned.kept > 0 {
                tracing::warn!(
                    flows = cleaned.kept,
                    "stale flows stay until their clients pause: a network card forwards them"
                );
            }
        }
        Err(error) => {
            tracing::warn!(
                error = format!("{error:#}"),
                "cannot clean up flows; trying again"
            );
        }
    })
}

/// The rules that the flags ask for, whatever the tools can do. `route_localnet` says whether that is set; asked only if it
/// matters.
///
/// # Errors
/// A flag that another one needs is missing.
pub fn rules(
    sources: &Sources,
    layers: &Layers,
    place: Place,
    route_localnet: impl FnOnce() -> bool,
) -> Result<Rules, Error> {
    let args = &layers.packet;
    let node_ports = NodePortAddresses::new(&sources.nodeport_addresses);
    let needs = |flag| Error::Flag {
        flag,
        mode: args.detect_local_mode,
    };
    let local_pods = match args.detect_local_mode {
        DetectLocalMode::ClusterCidr if args.cluster_cidr.is_empty() => LocalPods::Unknown,
        DetectLocalMode::ClusterCidr => LocalPods::Networks(args.cluster_cidr.clone()),
        DetectLocalMode::NodeCidr => LocalPods::OfNode(Vec::new()),
        DetectLocalMode::BridgeInterface => {
            let name = args.pod_bridge_interface.clone();
            LocalPods::Interface(name.ok_or_else(|| needs("--pod-bridge-interface"))?)
        }
        DetectLocalMode::InterfaceNamePrefix => {
            let prefix = args.pod_interface_name_prefix.as_ref();
            let prefix = prefix.ok_or_else(|| needs("--pod-interface-name-prefix"))?;
            LocalPods::Interface(format!("{prefix}+"))
        }
    };
    if local_pods == LocalPods::Unknown {
        tracing::warn!(
            "no --cluster-cidr: what goes to a ClusterIP from outside the cluster is not masqueraded, and its answers may take another way back"
        );
    }
    let families = [Family::V4, Family::V6].into_iter();
    let restricted: BTreeSet<Family> = families.filter(|of| node_ports.restricts(*of)).collect();
    Ok(Rules {
        families: [Family::V4, Family::V6].into(),
        masquerade_mark: 1 << args.iptables_masquerade_bit,
        masquerade_all: args.masquerade_all,
        local_pods,
        node_ports: match restricted.is_empty() {
            true => NodePorts::All,
            false => NodePorts::Listed(restricted),
        },
        localhost_node_ports: place == Place::Alone
            && wants_route_localnet(sources, args)
            && route_localnet(),
        conntrack_liberal: is_set(BE_LIBERAL),
        service_networks: layers.drops_unallocated().then(Vec::new),
        features: Features::default(),
    })
}

const BE_LIBERAL: &str = "/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal";
const ROUTE_LOCALNET: &str = "/proc/sys/net/ipv4/conf/all/route_localnet";

fn is_set(sysctl: &str) -> bool {
    fs::read_to_string(sysctl).is_ok_and(|value| value.trim() != "0")
}

/// Whether rules alone are to serve node ports on 127.0.0.0/8.
pub fn wants_route_localnet(sources: &Sources, args: &Packet) -> bool {
    let node_ports = NodePortAddresses::new(&sources.nodeport_addresses);
    args.iptables_localhost_nodeports && node_ports.contain_loopback()
}

/// Lets packets to 127.0.0.0/8 be translated; the rules guard that network against everybody else (CVE-2020-8558).
pub fn route_localnet() -> bool {
    if is_set(ROUTE_LOCALNET) {
        return true;
    }
    match fs::write(ROUTE_LOCALNET, "1") {
        Ok(()) => {
            tracing::info!("route_localnet is set, for node ports on 127.0.0.0/8");
            true
        }
        Err(error) => {
            tracing::warn!(sysctl = ROUTE_LOCALNET, %error, "node ports on 127.0.0.0/8 are not served");
            false
        }
    }
}

/// Whether `run` finds `route_localnet` set or can set it.
pub fn has_route_localnet() -> bool {
    is_set(ROUTE_LOCALNET) || access(ROUTE_LOCALNET, AccessFlags::W_OK).is_ok()
}

/// Service ports that the tools refuse: each told once, until it goes in.
#[derive(Debug, Default)]
struct LeftOut(BTreeMap<ServicePort, String>);

impl LeftOut {
    fn tell(&mut self, now: &BTreeMap<ServicePort, String>, metrics: &Metrics) {
        if self.0 == *now {
            return;
        }
        let new = now
            .iter()
            .filter(|(port, why)| self.0.get(*port) != Some(*why));
        for (port, why) in new {
            tracing::error!(service = %port, protocol = %port.protocol, family = %port.family, error = why, "iptables refuses the rules of this Service; the others are in force, and it is tried again");
        }
        metrics
            .left_out
            .set(i64::try_from(now.len()).unwrap_or(i64::MAX));
        self.0.clone_from(now);
    }
}
