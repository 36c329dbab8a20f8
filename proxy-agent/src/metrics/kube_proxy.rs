//! kube-proxy's metrics, with its names, texts, labels and buckets (pkg/proxy/metrics/metrics.go, v1.36): what its
//! dashboards and alerts ask for.
//!
//! Both families are served by the same syncs, so each sync counts for both. Of two layers the slower one speaks: the packet
//! layer where there is one.

use std::{
    sync::atomic::AtomicU64,
    time::{Duration, SystemTime},
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use super::set;

/// Label of a family of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct FamilyLabel {
    /// `IPv4` or `IPv6`.
    pub ip_family: &'static str,
}

/// Labels of the rules of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct TableLabels {
    /// `IPv4` or `IPv6`.
    pub ip_family: &'static str,
    /// `filter` or `nat`.
    pub table: &'static str,
}

/// Labels of what a policy leaves without endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PolicyLabels {
    /// `IPv4` or `IPv6`.
    pub ip_family: &'static str,
    /// `internal` or `external`.
    pub traffic_policy: &'static str,
}

/// Label of an answer over HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CodeLabel {
    /// Its status: 200, 503.
    pub code: u16,
}

const FAMILIES: [&str; 2] = ["IPv4", "IPv6"];

/// Packets that rules have counted, where there are such counters.
#[derive(Clone, Copy, Debug, Default)]
pub struct Accounts {
    /// Dropped because conntrack calls them invalid.
    pub invalid_dropped: Option<u64>,
    /// Accepted for a node port on 127.0.0.0/8.
    pub localhost_accepted: Option<u64>,
}

type Histograms = Family<FamilyLabel, Histogram, fn() -> Histogram>;
/// Seconds since 1970.
type Times = Family<FamilyLabel, Gauge<f64, AtomicU64>>;

macro_rules! metrics {
    ($($field:ident: $type:ty = $new:expr => $name:literal, $help:literal;)*) => {
        /// All of them. A clone counts into the same.
        #[derive(Clone, Debug)]
        #[expect(missing_docs, reason = "their texts are kube-proxy's")]
        pub struct KubeProxyMetrics {
            $(pub $field: $type,)*
        }

        impl Default for KubeProxyMetrics {
            fn default() -> Self {
                Self { $($field: $new,)* }
            }
        }

        #[cfg(test)]
        pub(super) const NAMES: &[&str] = &[$($name),*];

        impl KubeProxyMetrics {
            pub(super) fn register(&self, registry: &mut Registry) {
                $(registry.register($name, concat!("[ALPHA] ", $help), self.$field.clone());)*
            }
        }
    };
}

metrics! {
    sync: Histograms = Family::new_with_constructor(sync_duration) => "sync_proxy_rules_duration_seconds", "SyncProxyRules latency in seconds";
    sync_full: Histograms = Family::new_with_constructor(sync_duration) => "sync_full_proxy_rules_duration_seconds", "SyncProxyRules latency in seconds for full resyncs";
    sync_partial: Histograms = Family::new_with_constructor(sync_duration) => "sync_partial_proxy_rules_duration_seconds", "SyncProxyRules latency in seconds for partial resyncs";
    last_synced: Times = Family::default() => "sync_proxy_rules_last_timestamp_seconds", "The last time proxy rules were successfully synced";
    last_queued: Times = Family::default() => "sync_proxy_rules_last_queued_timestamp_seconds", "The last time a sync of proxy rules was queued";
    programming: Histograms = Family::new_with_constructor(programming_duration) => "network_programming_duration_seconds", "In Cluster Network Programming Latency in seconds";
    endpoint_changes_pending: Gauge = Gauge::default() => "sync_proxy_rules_endpoint_changes_pending", "Pending proxy rules Endpoint changes";
    endpoint_changes: Counter = Counter::default() => "sync_proxy_rules_endpoint_changes", "Cumulative proxy rules Endpoint changes";
    service_changes_pending: Gauge = Gauge::default() => "sync_proxy_rules_service_changes_pending", "Pending proxy rules Service changes";
    service_changes: Counter = Counter::default() => "sync_proxy_rules_service_changes", "Cumulative proxy rules Service changes";
    no_local_endpoints: Family<PolicyLabels, Gauge> = Family::default() => "sync_proxy_rules_no_local_endpoints_total", "Number of services with a Local traffic policy and no endpoints";
    rules: Family<TableLabels, Gauge> = Family::default() => "sync_proxy_rules_iptables_total", "Total number of iptables rules owned by kube-proxy";
    rules_last: Family<TableLabels, Gauge> = Family::default() => "sync_proxy_rules_iptables_last", "Number of iptables rules written by kube-proxy in last sync";
    restore_failures: Family<FamilyLabel, Counter> = each_family() => "sync_proxy_rules_iptables_restore_failures", "Cumulative proxy iptables restore failures";
    partial_restore_failures: Family<FamilyLabel, Counter> = each_family() => "sync_proxy_rules_iptables_partial_restore_failures", "Cumulative proxy iptables partial restore failures";
    nft_sync_failures: Family<FamilyLabel, Counter> = each_family() => "sync_proxy_rules_nftables_sync_failures", "Cumulative proxy nftables sync failures";
    nft_cleanup_failures: Family<FamilyLabel, Counter> = each_family() => "sync_proxy_rules_nftables_cleanup_failures", "Cumulative proxy nftables cleanup failures";
    invalid_dropped: Counter = Counter::default() => "iptables_ct_state_invalid_dropped_packets", "packets dropped by iptables to work around conntrack problems";
    localhost_accepted: Counter = Counter::default() => "iptables_localhost_nodeports_accepted_packets", "Number of packets accepted on nodeports of loopback interface";
    reconciled: Histograms = Family::new_with_constructor(sync_duration) => "conntrack_reconciler_sync_duration_seconds", "ReconcileConntrackFlowsLatency latency in seconds";
    reconciled_entries: Family<FamilyLabel, Counter> = each_family() => "conntrack_reconciler_deleted_entries", "Cumulative conntrack flows deleted by conntrack reconciler";
    healthz: Family<CodeLabel, Counter> = Family::default() => "proxy_healthz", "Cumulative proxy healthz HTTP status";
    livez: Family<CodeLabel, Counter> = Family::default() => "proxy_livez", "Cumulative proxy livez HTTP status";
}

fn sync_duration() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 15))
}

fn programming_duration() -> Histogram {
    // That of 0 is where component-base begins when it merges buckets.
    let quarters = [0.0, 0.25, 0.5].into_iter();
    let seconds = (1..60).map(f64::from);
    let by_five = (0..12).map(|n| f64::from(60 + 5 * n));
    let by_thirty = (0..7).map(|n| f64::from(120 + 30 * n));
    Histogram::new(quarters.chain(seconds).chain(by_five).chain(by_thirty))
}

fn each_family() -> Family<FamilyLabel, Counter> {
    let counters: Family<FamilyLabel, Counter> = Family::default();
    for ip_family in FAMILIES {
        drop(counters.get_or_create(&FamilyLabel { ip_family }));
    }
    counters
}

fn seconds(time: SystemTime) -> f64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or_default().as_secs_f64()
}

impl KubeProxyMetrics {
    /// A sync of everything, or of a part, has taken so long.
    pub fn synced(&self, is_full: bool, elapsed: Duration) {
        let kind = match is_full {
            true => &self.sync_full,
            false => &self.sync_partial,
        };
        for ip_family in FAMILIES {
            let label = FamilyLabel { ip_family };
            for histogram in [&self.sync, kind] {
                histogram
                    .get_or_create(&label)
                    .observe(elapsed.as_secs_f64());
            }
        }
    }

    /// The kernel holds everything.
    pub fn succeeded(&self, now: SystemTime) {
        self.stamp(&self.last_synced, now);
    }

    /// A sync failed.
    pub fn failed(&self) {
        for ip_family in FAMILIES {
            let label = FamilyLabel { ip_family };
            self.nft_sync_failures.get_or_create(&label).inc();
        }
    }

    /// Changes of so many Services and EndpointSlices wait for a sync.
    pub fn queued(&self, services: usize, slices: usize, now: SystemTime) {
        self.stamp(&self.last_queued, now);
        for (count, pending, total) in [
            (
                services,
                &self.service_changes_pending,
                &self.service_changes,
            ),
            (
                slices,
                &self.endpoint_changes_pending,
                &self.endpoint_changes,
            ),
        ] {
            pending.inc_by(i64::try_from(count).unwrap_or(i64::MAX));
            total.inc_by(count as u64);
        }
    }

    /// What waited is being synced.
    pub fn taken(&self) {
        self.service_changes_pending.set(0);
        self.endpoint_changes_pending.set(0);
    }

    fn stamp(&self, times: &Times, now: SystemTime) {
        for ip_family in FAMILIES {
            let label = FamilyLabel { ip_family };
            times.get_or_create(&label).set(seconds(now));
        }
    }

    pub(super) fn update(&self, accounts: Accounts) {
        let Accounts {
            invalid_dropped,
            localhost_accepted,
        } = accounts;
        for (counter, packets) in [
            (&self.invalid_dropped, invalid_dropped),
            (&self.localhost_accepted, localhost_accepted),
        ] {
            if let Some(packets) = packets {
                set(counter, packets);
            }
        }
    }
}
