//! `KubeProxyConfiguration` of kubeproxy.config.k8s.io/v1alpha1, field by field
//! (staging/src/k8s.io/kube-proxy/config/v1alpha1/types.go, v1.36), and our own field in it.
//!
//! A field that is absent, null or empty is unset. Ranges are checked here, where an error knows the path of its field.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, time::Duration};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::values::{
    Healthz, Lease, Metrics, Networks, Text, Within, boolean, is_default, or_default, parsed,
    perhaps_boolean, perhaps_time, section, text, time,
};
use crate::{
    cli::{DetectLocalMode, LogFormat, Mode, ProxyMode},
    state::NodePortAddress,
};

/// `apiVersion`.
pub const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
/// `kind`.
pub const KIND: &str = "KubeProxyConfiguration";

/// The whole file.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct KubeProxyConfiguration {
    pub api_version: String,
    pub kind: String,
    #[serde(deserialize_with = "or_default")]
    pub feature_gates: BTreeMap<String, bool>,
    #[serde(deserialize_with = "section")]
    pub client_connection: ClientConnection,
    #[serde(deserialize_with = "section")]
    pub logging: Logging,
    #[serde(deserialize_with = "text")]
    pub hostname_override: String,
    #[serde(with = "parsed")]
    pub bind_address: Option<IpAddr>,
    #[serde(with = "parsed")]
    pub healthz_bind_address: Option<Healthz>,
    #[serde(with = "parsed")]
    pub metrics_bind_address: Option<Metrics>,
    #[serde(deserialize_with = "boolean")]
    pub bind_address_hard_fail: bool,
    #[serde(deserialize_with = "boolean")]
    pub enable_profiling: bool,
    #[serde(deserialize_with = "text")]
    pub show_hidden_metrics_for_version: String,
    #[serde(with = "parsed")]
    pub mode: Option<ProxyMode>,
    #[serde(deserialize_with = "section")]
    pub iptables: Iptables,
    #[serde(deserialize_with = "section")]
    pub ipvs: Ipvs,
    #[serde(deserialize_with = "section")]
    pub nftables: Nftables,
    #[serde(deserialize_with = "section")]
    pub winkernel: Winkernel,
    #[serde(with = "parsed")]
    pub detect_local_mode: Option<DetectLocalMode>,
    #[serde(deserialize_with = "section")]
    pub detect_local: DetectLocal,
    #[serde(rename = "clusterCIDR", with = "parsed")]
    pub cluster_cidr: Option<Networks>,
    #[serde(deserialize_with = "or_default")]
    pub node_port_addresses: Vec<Text<NodePortAddress>>,
    pub oom_score_adj: Option<Within<-1000, 1000>>,
    #[serde(deserialize_with = "section")]
    pub conntrack: Conntrack,
    #[serde(with = "time")]
    pub config_sync_period: Duration,
    #[serde(deserialize_with = "text")]
    pub port_range: String,
    #[serde(deserialize_with = "boolean", skip_serializing_if = "is_default")]
    pub windows_run_as_service: bool,
    /// What kube-proxy does not have; it warns of the field and goes on.
    #[serde(deserialize_with = "section", skip_serializing_if = "is_default")]
    pub proxy_agent: ProxyAgent,
}

/// Our own options.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ProxyAgent {
    /// `--mode`: wins over kube-proxy's.
    #[serde(with = "parsed", skip_serializing_if = "is_default")]
    pub mode: Option<Mode>,
    /// `--socket-lease`.
    #[serde(skip_serializing_if = "is_default")]
    pub socket_lease: Option<Text<Lease>>,
    /// `--socket-exclude-cgroup`.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "is_default")]
    pub socket_exclude_cgroups: Vec<String>,
    /// `--socket-exclude-pods`.
    #[serde(skip_serializing_if = "is_default")]
    pub socket_exclude_pods: bool,
    /// `--takeover-after`.
    #[serde(with = "time", skip_serializing_if = "is_default")]
    pub takeover_after: Duration,
    /// `--bpf-dir`.
    #[serde(skip_serializing_if = "is_default")]
    pub bpf_dir: Option<PathBuf>,
    /// `--cgroup`.
    #[serde(skip_serializing_if = "is_default")]
    pub cgroup: Option<PathBuf>,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClientConnection {
    #[serde(deserialize_with = "text")]
    pub kubeconfig: String,
    #[serde(deserialize_with = "text")]
    pub accept_content_types: String,
    #[serde(deserialize_with = "text")]
    pub content_type: String,
    #[serde(deserialize_with = "or_default")]
    pub qps: f32,
    #[serde(deserialize_with = "or_default")]
    pub burst: Within<0, { i32::MAX as i64 }>,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Logging {
    #[serde(with = "parsed")]
    pub format: Option<LogFormat>,
    /// Nanoseconds, or a duration.
    #[serde(skip_serializing_if = "Value::is_null")]
    pub flush_frequency: Value,
    #[serde(deserialize_with = "or_default")]
    pub verbosity: u32,
    #[serde(skip_serializing_if = "Value::is_null")]
    pub vmodule: Value,
    #[serde(skip_serializing_if = "Value::is_null")]
    pub options: Value,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Iptables {
    pub masquerade_bit: Option<Within<0, 31>>,
    #[serde(deserialize_with = "boolean")]
    pub masquerade_all: bool,
    #[serde(deserialize_with = "perhaps_boolean")]
    pub localhost_node_ports: Option<bool>,
    #[serde(with = "time")]
    pub sync_period: Duration,
    #[serde(with = "time")]
    pub min_sync_period: Duration,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Ipvs {
    #[serde(with = "time")]
    pub sync_period: Duration,
    #[serde(with = "time")]
    pub min_sync_period: Duration,
    #[serde(deserialize_with = "text")]
    pub scheduler: String,
    #[serde(rename = "excludeCIDRs", deserialize_with = "or_default")]
    pub exclude_cidrs: Vec<Text<IpNet>>,
    #[serde(rename = "strictARP", deserialize_with = "boolean")]
    pub strict_arp: bool,
    #[serde(with = "time")]
    pub tcp_timeout: Duration,
    #[serde(with = "time")]
    pub tcp_fin_timeout: Duration,
    #[serde(with = "time")]
    pub udp_timeout: Duration,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Nftables {
    pub masquerade_bit: Option<Within<0, 31>>,
    #[serde(deserialize_with = "boolean")]
    pub masquerade_all: bool,
    #[serde(with = "time")]
    pub sync_period: Duration,
    #[serde(with = "time")]
    pub min_sync_period: Duration,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Winkernel {
    #[serde(deserialize_with = "text")]
    pub network_name: String,
    #[serde(deserialize_with = "text")]
    pub source_vip: String,
    #[serde(rename = "enableDSR", deserialize_with = "boolean")]
    pub enable_dsr: bool,
    #[serde(deserialize_with = "text")]
    pub root_hns_endpoint_name: String,
    #[serde(deserialize_with = "boolean")]
    pub forward_health_check_vip: bool,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DetectLocal {
    #[serde(deserialize_with = "text")]
    pub bridge_interface: String,
    #[serde(deserialize_with = "text")]
    pub interface_name_prefix: String,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Conntrack {
    pub max_per_core: Option<Within<0, { i32::MAX as i64 }>>,
    pub min: Option<Within<0, { i32::MAX as i64 }>>,
    #[serde(with = "perhaps_time")]
    pub tcp_established_timeout: Option<Duration>,
    #[serde(with = "perhaps_time")]
    pub tcp_close_wait_timeout: Option<Duration>,
    #[serde(deserialize_with = "boolean")]
    pub tcp_be_liberal: bool,
    #[serde(with = "time")]
    pub udp_timeout: Duration,
    #[serde(with = "time")]
    pub udp_stream_timeout: Duration,
}
