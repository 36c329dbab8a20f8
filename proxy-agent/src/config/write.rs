//! What is in force, as the file that kube-proxy would write.

use std::{fs, path::Path};

use serde_json::{Value, json};

use super::{
    Error,
    file::{
        API_VERSION, ClientConnection, Conntrack, DetectLocal, Iptables, Ipvs, KIND,
        KubeProxyConfiguration, Logging, Nftables, ProxyAgent,
    },
    values::{Lease, ListenAt, Networks, Text, Within},
};
use crate::cli::{Global, HostSettings, Packet, ProxyMode, Run};

/// Writes it as YAML.
///
/// # Errors
/// The file cannot be written.
pub fn write(global: &Global, run: &Run, path: &Path) -> Result<(), Error> {
    let text = serde_yaml_ng::to_string(&value(global, run))
        .expect("text, numbers and lists of them are YAML");
    fs::write(path, text).map_err(|cause| Error::Write {
        path: path.to_owned(),
        cause,
    })
}

/// The answer of `/configz`: by the group of the configuration.
pub fn configz(global: &Global, run: &Run) -> Value {
    json!({"kubeproxy.config.k8s.io": value(global, run)})
}

fn value(global: &Global, run: &Run) -> Value {
    serde_json::to_value(in_force(global, run)).expect("every field has a form in JSON")
}

fn in_force(global: &Global, run: &Run) -> KubeProxyConfiguration {
    let sources = &run.sources;
    let packet = &run.layers.packet;
    let path = sources.kubeconfig.as_ref();
    let mode = run.layers.proxy_mode;
    let (iptables, ipvs, nftables) = by_mode(packet, mode);
    let networks = Some(packet.cluster_cidr.clone()).filter(|networks| !networks.is_empty());
    let node_ports = sources.nodeport_addresses.iter();
    KubeProxyConfiguration {
        api_version: API_VERSION.to_owned(),
        kind: KIND.to_owned(),
        client_connection: ClientConnection {
            kubeconfig: path.map_or_else(String::new, |path| path.display().to_string()),
            ..ClientConnection::default()
        },
        logging: Logging {
            format: Some(global.log_format),
            verbosity: global.verbosity.unwrap_or_default(),
            ..Logging::default()
        },
        hostname_override: global.node_name.clone().unwrap_or_default(),
        bind_address: Some(sources.bind_address),
        healthz_bind_address: run.healthz_bind_address.0.map(ListenAt),
        metrics_bind_address: run.metrics_bind_address.0.map(ListenAt),
        bind_address_hard_fail: run.bind_address_hard_fail,
        mode: Some(mode),
        iptables,
        ipvs,
        nftables,
        detect_local_mode: Some(packet.detect_local_mode),
        detect_local: DetectLocal {
            bridge_interface: packet.pod_bridge_interface.clone().unwrap_or_default(),
            interface_name_prefix: packet.pod_interface_name_prefix.clone().unwrap_or_default(),
        },
        cluster_cidr: networks.map(Networks),
        node_port_addresses: node_ports.map(|entry| Text(*entry)).collect(),
        oom_score_adj: Within::new(run.host.oom_score_adj.into()),
        conntrack: conntrack(&run.host),
        proxy_agent: ProxyAgent {
            mode: run.layers.mode,
            socket_lease: Some(Text(Lease(run.socket_lease))),
            socket_exclude_cgroups: run.socket_exclude_cgroup.clone(),
            socket_exclude_pods: run.socket_exclude_pods,
            takeover_after: packet.takeover_after(),
            bpf_dir: Some(global.bpf_dir.clone()),
            cgroup: global.cgroup.clone(),
        },
        ..KubeProxyConfiguration::default()
    }
}

/// What the mode reads from its own section; the other sections keep their defaults.
fn by_mode(packet: &Packet, mode: ProxyMode) -> (Iptables, Ipvs, Nftables) {
    let masquerade_bit = Within::new(packet.iptables_masquerade_bit.into());
    let masquerade_all = packet.masquerade_all;
    let sync_period = packet.iptables_sync_period;
    let min_sync_period = packet.iptables_min_sync_period;
    let iptables = Iptables {
        masquerade_bit,
        localhost_node_ports: Some(packet.iptables_localhost_nodeports),
        ..Iptables::default()
    };
    match mode {
        ProxyMode::Unset | ProxyMode::Iptables => (
            Iptables {
                masquerade_all,
                sync_period,
                min_sync_period,
                ..iptables
            },
            Ipvs::default(),
            Nftables::default(),
        ),
        ProxyMode::Ipvs => (
            Iptables {
                masquerade_all,
                ..iptables
            },
            Ipvs {
                sync_period,
                min_sync_period,
                ..Ipvs::default()
            },
            Nftables::default(),
        ),
        ProxyMode::Nftables => (
            Iptables {
                masquerade_bit: None,
                ..iptables
            },
            Ipvs::default(),
            Nftables {
                masquerade_bit,
                masquerade_all,
                sync_period,
                min_sync_period,
            },
        ),
    }
}

fn conntrack(host: &HostSettings) -> Conntrack {
    Conntrack {
        max_per_core: Within::new(host.conntrack_max_per_core.into()),
        min: Within::new(host.conntrack_min.into()),
        tcp_established_timeout: Some(host.conntrack_tcp_timeout_established),
        tcp_close_wait_timeout: Some(host.conntrack_tcp_timeout_close_wait),
        tcp_be_liberal: host.conntrack_tcp_be_liberal,
        udp_timeout: host.conntrack_udp_timeout,
        udp_stream_timeout: host.conntrack_udp_timeout_stream,
    }
}
