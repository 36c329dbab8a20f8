//! What of a configuration has no effect here, and why: for the log.

use std::{collections::BTreeSet, time::Duration};

use serde_json::{Value, json};

use super::{
    file::{ClientConnection, Ipvs, KubeProxyConfiguration, Logging},
    values::is_default,
};

// Defaults of kube-proxy, which it writes: who has them has not asked for them.
const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";
const QPS: f32 = 5.0;
const BURST: i64 = 10;
const REFRESHED: Duration = Duration::from_secs(900);

/// Flags of kube-proxy that a file replaces, by their ids.
const REPLACED: [&str; 26] = [
    "kubeconfig",
    "nodeport_addresses",
    "bind_address",
    "healthz_bind_address",
    "healthz_port",
    "metrics_bind_address",
    "metrics_port",
    "bind_address_hard_fail",
    "proxy_mode",
    "detect_local_mode",
    "cluster_cidr",
    "pod_bridge_interface",
    "pod_interface_name_prefix",
    "masquerade_all",
    "iptables_masquerade_bit",
    "iptables_localhost_nodeports",
    "iptables_sync_period",
    "iptables_min_sync_period",
    "conntrack_max_per_core",
    "conntrack_min",
    "conntrack_tcp_timeout_established",
    "conntrack_tcp_timeout_close_wait",
    "conntrack_tcp_be_liberal",
    "conntrack_udp_timeout",
    "conntrack_udp_timeout_stream",
    "oom_score_adj",
];

/// The flags that were given in vain beside a file.
pub fn flags(given: &BTreeSet<String>) -> impl Iterator<Item = String> {
    let vain = given.iter().filter(|id| REPLACED.contains(&id.as_str()));
    vain.map(|id| {
        let flag = id.replace('_', "-");
        format!("--{flag} has no effect: --config is given")
    })
}

/// The fields that are set to something that this agent does not have.
pub fn fields(file: &KubeProxyConfiguration) -> impl Iterator<Item = String> {
    let ClientConnection {
        kubeconfig: _,
        accept_content_types,
        content_type,
        qps,
        burst,
    } = &file.client_connection;
    let Logging {
        format: _,
        flush_frequency,
        verbosity: _,
        vmodule,
        options,
    } = &file.logging;
    let Ipvs {
        sync_period: _,
        min_sync_period: _,
        scheduler,
        exclude_cidrs,
        strict_arp,
        tcp_timeout,
        tcp_fin_timeout,
        udp_timeout,
    } = &file.ipvs;
    let json_alone = "objects are read as JSON";
    let few_requests = "its requests are few";
    let no_ipvs = "no mode uses ipvs";
    let no_windows = "this is no Windows";
    let at_once = "logs are written at once, and for all of the agent alike";
    let fields = [
        (
            "featureGates",
            !file.feature_gates.is_empty(),
            "none of them is a gate of this agent",
        ),
        (
            "clientConnection.acceptContentTypes",
            !accept_content_types.is_empty(),
            json_alone,
        ),
        (
            "clientConnection.contentType",
            !["", PROTOBUF].contains(&content_type.as_str()),
            json_alone,
        ),
        (
            "clientConnection.qps",
            ![0.0, QPS].contains(qps),
            few_requests,
        ),
        (
            "clientConnection.burst",
            ![0, BURST].contains(&burst.to()),
            few_requests,
        ),
        (
            "logging.flushFrequency",
            says_something(flush_frequency),
            at_once,
        ),
        ("logging.vmodule", says_something(vmodule), at_once),
        ("logging.options", says_something(options), at_once),
        (
            "enableProfiling",
            file.enable_profiling,
            "it is no Go program",
        ),
        (
            "showHiddenMetricsForVersion",
            !file.show_hidden_metrics_for_version.is_empty(),
            "it hides no metrics",
        ),
        ("ipvs.scheduler", !scheduler.is_empty(), no_ipvs),
        ("ipvs.excludeCIDRs", !exclude_cidrs.is_empty(), no_ipvs),
        ("ipvs.strictARP", *strict_arp, no_ipvs),
        ("ipvs.tcpTimeout", !is_default(tcp_timeout), no_ipvs),
        ("ipvs.tcpFinTimeout", !is_default(tcp_fin_timeout), no_ipvs),
        ("ipvs.udpTimeout", !is_default(udp_timeout), no_ipvs),
        ("winkernel", !is_default(&file.winkernel), no_windows),
        (
            "windowsRunAsService",
            file.windows_run_as_service,
            no_windows,
        ),
        (
            "configSyncPeriod",
            ![Duration::ZERO, REFRESHED].contains(&file.config_sync_period),
            "nothing has to be refreshed: objects are followed and not stored",
        ),
        (
            "portRange",
            !file.port_range.is_empty(),
            "it opens no ports for Services",
        ),
    ];
    let vain = fields.into_iter().filter(|(_, is_set, _)| *is_set);
    vain.map(|(field, _, why)| format!("{field} has no effect: {why}"))
}

/// Whether a value is more than the empty one that kubeadm writes, or a default.
fn says_something(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Object(fields) => fields.values().any(says_something),
        Value::Array(values) => values.iter().any(says_something),
        other => ![
            json!(0),
            json!(""),
            json!("0"),
            json!("0s"),
            json!("5s"),
            json!(5_000_000_000_u64),
        ]
        .contains(other),
    }
}
