//! Every metric, in one struct; a field's doc comment is its HELP text.
//!
//! What the kernel counts is read at each scrape (see [`Kernel`]), everything else is updated where it happens.

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};
use proxy_ebpf::abi::Reason;

mod kube_proxy;
mod process;
mod rest_client;
mod text;

pub use kube_proxy::{
    Accounts, CodeLabel, FamilyLabel, KubeProxyMetrics, PolicyLabels, TableLabels,
};
use process::Process;
pub use rest_client::RestClientMetrics;

/// Label of a layer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct LayerLabel {
    /// `socket` or `packet`.
    pub layer: &'static str,
}

/// Label of a map.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct MapLabel {
    /// Name of the map.
    pub map: String,
}

/// Label of a reason.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReasonLabel {
    /// [`Reason::name`].
    pub reason: &'static str,
}

/// Label of what shows another proxy.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct SignLabel {
    /// `proxy_mode`, `nft_table`, `canary` or `rules`.
    pub sign: &'static str,
}

/// Labels of the mode.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ModeLabels {
    /// Socket layer: `ebpf` or `off`.
    pub socket: &'static str,
    /// Packet layer: `iptables` or `off`.
    pub packet: &'static str,
    /// Why this and nothing better.
    pub reason: String,
}

macro_rules! metrics {
    ($(#[doc = $help:literal] $field:ident: $type:ty = $new:expr => $name:literal;)*) => {
        /// Every metric of the agent.
        #[derive(Clone, Debug)]
        pub struct Metrics {
            $(#[doc = $help] pub $field: $type,)*
            /// Those with kube-proxy's prefix.
            pub kube_proxy: KubeProxyMetrics,
            /// Those of the client of the API server.
            pub rest_client: RestClientMetrics,
        }

        impl Default for Metrics {
            fn default() -> Self {
                Self {
                    $($field: $new,)*
                    kube_proxy: KubeProxyMetrics::default(),
                    rest_client: RestClientMetrics::default(),
                }
            }
        }

        #[cfg(test)]
        const NAMES: &[&str] = &[$($name),*];

        impl Metrics {
            fn register(&self, registry: &mut Registry) {
                $(registry.register($name, $help.trim(), self.$field.clone());)*
            }
        }
    };
}

metrics! {
    /// Seconds from taking a batch of changes to the kernel holding them
    sync_duration: Family<LayerLabel, Histogram, fn() -> Histogram> = Family::new_with_constructor(sync_duration) => "sync_duration_seconds";
    /// Syncs that ended in an error
    sync_errors: Family<LayerLabel, Counter> = Family::default() => "sync_errors";
    /// Changes that the kernel does not hold yet
    changes_pending: Family<LayerLabel, Gauge> = Family::default() => "changes_pending";
    /// Entries of the kernel that the audit found different from what was written, and repaired
    drift_repairs: Family<LayerLabel, Counter> = Family::default() => "drift_repairs";
    /// Manifest files and objects in them that cannot be used as they are
    source_problems: Gauge = Gauge::default() => "source_problems";
    /// Addresses and endpoints of Services that are not carried out: taken by another Service, or forbidden
    problems: Gauge = Gauge::default() => "problems";
    /// Service ports whose rules iptables refuses
    left_out: Gauge = Gauge::default() => "left_out";
    /// Families of addresses (IPv4, IPv6) that arrive without being served: their tools do not work, or lack tables in the kernel
    families_failed: Gauge = Gauge::default() => "families_failed";
    /// Health-check node ports of Services that cannot be listened at, because somebody else does or the system refuses
    health_check_ports_failed: Gauge = Gauge::default() => "health_check_ports_failed";
    /// Settings of the host that could not be made: read-only, or not ours to change
    host_settings_failed: Gauge = Gauge::default() => "host_settings_failed";
    /// Clients of one endpoint that session affinity of the packet layer remembers, at most
    affinity_clients: Gauge = Gauge::default() => "affinity_clients";
    /// Flows that were forgotten because nobody serves where they lead to: an endpoint that is gone, or untranslated
    conntrack_flows_deleted: Counter = Counter::default() => "conntrack_flows_deleted";
    /// Seconds from asking the kernel for its flows to the end of a clean-up
    conntrack_cleanup_duration: Histogram = Histogram::new(exponential_buckets(0.001, 2.0, 15)) => "conntrack_cleanup_duration_seconds";
    /// Errors of the sources: files that cannot be read or understood, watches that broke
    source_errors: Counter = Counter::default() => "source_errors";
    /// Entries in use, by map
    map_entries: Family<MapLabel, Gauge> = Family::default() => "map_entries";
    /// Entries that fit before the maps are made larger, by map
    map_capacity: Family<MapLabel, Gauge> = Family::default() => "map_capacity";
    /// Connections and datagrams refused by the kernel programs, by reason
    refused: Family<ReasonLabel, Counter> = Family::default() => "refused";
    /// Connections and datagrams left untranslated by the kernel programs, by reason
    passed: Family<ReasonLabel, Counter> = Family::default() => "passed";
    /// Connections translated by the kernel programs
    connections: Counter = Counter::default() => "connections";
    /// Datagrams of unconnected sockets translated by the kernel programs
    datagrams: Counter = Counter::default() => "datagrams";
    /// 1 while another proxy serves the node and the packet layer writes nothing, by what shows it
    observing: Family<SignLabel, Gauge> = Family::default() => "observing";
    /// Which layers serve this node, and why
    mode_info: Family<ModeLabels, Gauge> = Family::default() => "mode_info";
}

fn sync_duration() -> Histogram {
    Histogram::new(exponential_buckets(0.000_05, 2.0, 20))
}

/// What one layer counts; see the fields of [`Metrics`] of the same names.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "they are those of Metrics")]
pub struct LayerMetrics {
    pub sync_duration: Histogram,
    pub sync_errors: Counter,
    pub changes_pending: Gauge,
    pub drift_repairs: Counter,
    /// Of the layer that speaks for the node.
    pub kube_proxy: Option<KubeProxyMetrics>,
}

/// Whether a layer's syncs are told as kube-proxy's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Voice {
    /// It speaks for the node.
    Node,
    /// It speaks for itself.
    Own,
}

/// What the kernel holds and has counted.
#[derive(Clone, Debug, Default)]
pub struct Kernel {
    /// Name, entries in use where that can be told, capacity.
    pub maps: Vec<(String, Option<u64>, u64)>,
    /// Every exit of every program.
    pub reasons: Vec<(Reason, u64)>,
    /// Packets in kube-proxy's own counters, those of them that are there.
    pub accounts: Accounts,
}

impl Metrics {
    /// The part of a layer.
    pub fn layer(&self, layer: &'static str, voice: Voice) -> LayerMetrics {
        let label = LayerLabel { layer };
        LayerMetrics {
            sync_duration: self.sync_duration.get_or_create(&label).clone(),
            sync_errors: self.sync_errors.get_or_create(&label).clone(),
            changes_pending: self.changes_pending.get_or_create(&label).clone(),
            drift_repairs: self.drift_repairs.get_or_create(&label).clone(),
            kube_proxy: (voice == Voice::Node).then(|| self.kube_proxy.clone()),
        }
    }

    /// Takes over what was read from the kernel.
    pub fn update(&self, kernel: &Kernel) {
        self.kube_proxy.update(kernel.accounts);
        for (map, entries, capacity) in &kernel.maps {
            let gauge = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
            let label = MapLabel { map: map.clone() };
            if let Some(entries) = entries {
                self.map_entries.get_or_create(&label).set(gauge(*entries));
            }
            self.map_capacity
                .get_or_create(&label)
                .set(gauge(*capacity));
        }
        for &(reason, count) in &kernel.reasons {
            let label = ReasonLabel {
                reason: reason.name(),
            };
            match role(reason) {
                Role::Connection => set(&self.connections, count),
                Role::Datagram => set(&self.datagrams, count),
                Role::Refusal => set(&self.refused.get_or_create(&label), count),
                Role::Passed => set(&self.passed.get_or_create(&label), count),
                Role::Internal => {}
            }
        }
    }

    /// The text that Prometheus reads, in its format 0.0.4.
    pub fn text(&self) -> String {
        text::prometheus(&self.open_metrics())
    }

    /// The same in the format OpenMetrics 1.0.
    pub fn open_metrics(&self) -> String {
        let mut registry = Registry::default();
        self.register(registry.sub_registry_with_prefix("proxy_agent"));
        self.kube_proxy
            .register(registry.sub_registry_with_prefix("kubeproxy"));
        self.rest_client.register(&mut registry);
        // Without /proc there is nothing to say.
        if let Ok(process) = Process::read() {
            process.register(&mut registry);
        }
        let mut text = String::new();
        encode(&mut text, &registry).expect("writing to a String does not fail");
        text
    }
}

/// The kernel's counters never go down, nor do those of a generation swap, which carries totals over.
fn set(counter: &Counter<u64, AtomicU64>, value: u64) {
    counter.inner().store(value, Ordering::Relaxed);
}

enum Role {
    Connection,
    Datagram,
    Refusal,
    Passed,
    Internal,
}

fn role(reason: Reason) -> Role {
    match reason {
        Reason::Connected => Role::Connection,
        Reason::Sent => Role::Datagram,
        Reason::NoEndpoints | Reason::UnknownPort => Role::Refusal,
        Reason::NotAService
        | Reason::OtherProtocol
        | Reason::OptedOut
        | Reason::LeaseExpired
        | Reason::SourceRanges
        | Reason::OnLocalLink
        | Reason::ForeignLoopback
        | Reason::PodSocket
        | Reason::UdpConnectPassed
        | Reason::NoStorage
        | Reason::Contended
        | Reason::BrokenMap => Role::Passed,
        Reason::ReplyTranslated
        | Reason::PeerNameTranslated
        | Reason::Recycled
        | Reason::PeerOverflow
        | Reason::SocketDestroyed
        | Reason::ReplyUntouched
        | Reason::AffinityHit
        | Reason::EntryTaken
        | Reason::Closed
        | Reason::CloseUntouched => Role::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_the_documented_names_and_the_kernels_counts() {
        let metrics = Metrics::default();
        metrics.update(&Kernel {
            maps: vec![("frontends".to_owned(), Some(3), 1024)],
            reasons: vec![
                (Reason::Connected, 7),
                (Reason::NoEndpoints, 2),
                (Reason::OptedOut, 1),
            ],
            accounts: Accounts {
                invalid_dropped: Some(5),
                localhost_accepted: None,
            },
        });
        metrics
            .mode_info
            .get_or_create(&ModeLabels {
                socket: "ebpf",
                packet: "off",
                reason: "all there".into(),
            })
            .set(1);
        metrics
            .layer("socket", Voice::Own)
            .sync_duration
            .observe(0.001);
        let text = metrics.text();
        for line in [
            "proxy_agent_sync_duration_seconds_count{layer=\"socket\"} 1",
            "proxy_agent_changes_pending{layer=\"socket\"} 0",
            "proxy_agent_map_entries{map=\"frontends\"} 3",
            "proxy_agent_map_capacity{map=\"frontends\"} 1024",
            "proxy_agent_refused_total{reason=\"no_endpoints\"} 2",
            "proxy_agent_passed_total{reason=\"opted_out\"} 1",
            "proxy_agent_connections_total 7",
            "kubeproxy_iptables_ct_state_invalid_dropped_packets_total 5",
            "kubeproxy_iptables_localhost_nodeports_accepted_packets_total 0",
            "proxy_agent_source_errors_total 0",
            "proxy_agent_mode_info{socket=\"ebpf\",packet=\"off\",reason=\"all there\"} 1",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "no {line:?} in\n{text}"
            );
        }
    }

    #[test]
    fn the_dashboard_and_the_alerts_ask_for_nothing_that_is_not_there() {
        let own = NAMES.iter().map(|name| format!("proxy_agent_{name}"));
        let kube_proxys = kube_proxy::NAMES.iter();
        let kube_proxys = kube_proxys.map(|name| format!("kubeproxy_{name}"));
        let process = ["cpu_seconds", "resident_memory_bytes"];
        let process = process.map(|name| format!("process_{name}"));
        let known: Vec<String> = own.chain(kube_proxys).chain(process).collect();
        let files = [
            include_str!("../../deploy/monitoring/dashboard.json"),
            include_str!("../../deploy/monitoring/alerts.yaml"),
        ];
        for file in files {
            let words = file.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            let asked = words.filter(|word| {
                let mut prefixes = ["proxy_agent_", "kubeproxy_", "process_"].iter();
                prefixes.any(|prefix| word.starts_with(prefix))
            });
            let mut count = 0;
            for name in asked {
                let ends = ["", "_bucket", "_total"].iter();
                let mut bases = ends.filter_map(|end| name.strip_suffix(end));
                let is_known = bases.any(|base| known.iter().any(|known| known == base));
                assert!(is_known, "no {name} in {known:?}");
                count += 1;
            }
            assert!(count > 5, "{count}");
        }
    }
}
