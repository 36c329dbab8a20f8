//! The file onto the flags. Defaults are kube-proxy's (pkg/proxy/apis/config/v1alpha1/defaults.go, v1.36).

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use super::{
    file::{Conntrack, Iptables, KubeProxyConfiguration, Nftables},
    values::{ListenAt, Within},
};
use crate::cli::{
    DetectLocalMode, Global, HEALTHZ_PORT, HostSettings, Layers, Listen, METRICS_PORT, Packet,
    ProxyMode, Run, Sources,
};

const MASQUERADE_BIT: u8 = 14;
const SYNC_PERIOD: Duration = Duration::from_secs(30);
const MIN_SYNC_PERIOD: Duration = Duration::from_secs(1);

/// Fields that need one another.
///
/// # Errors
/// One is missing: its path, and why it is needed.
pub fn check(file: &KubeProxyConfiguration) -> Result<(), String> {
    let detect = &file.detect_local;
    match file.detect_local_mode {
        Some(DetectLocalMode::BridgeInterface) if detect.bridge_interface.is_empty() => Err(
            "detectLocal.bridgeInterface: must not be empty with detectLocalMode BridgeInterface"
                .to_owned(),
        ),
        Some(DetectLocalMode::InterfaceNamePrefix) if detect.interface_name_prefix.is_empty() => {
            Err("detectLocal.interfaceNamePrefix: must not be empty with detectLocalMode InterfaceNamePrefix".to_owned())
        }
        _ => Ok(()),
    }
}

/// What every command needs.
pub fn to_global(file: &KubeProxyConfiguration, global: &mut Global, given: &BTreeSet<String>) {
    let is_free = |flag: &str| !given.contains(flag);
    if is_free("node_name") && !file.hostname_override.trim().is_empty() {
        global.node_name = Some(file.hostname_override.clone());
    }
    if is_free("log_format") {
        global.log_format = file.logging.format.unwrap_or(global.log_format);
    }
    if is_free("verbosity") {
        global.verbosity = Some(file.logging.verbosity);
    }
    let own = &file.proxy_agent;
    if is_free("bpf_dir") {
        global.bpf_dir = own.bpf_dir.clone().unwrap_or(global.bpf_dir.clone());
    }
    if is_free("cgroup") {
        global.cgroup.clone_from(&own.cgroup);
    }
}

/// Where Services come from.
pub fn to_sources(file: &KubeProxyConfiguration, sources: &mut Sources) {
    let Sources {
        config: _,
        manifests,
        kubeconfig,
        master: _,
        nodeport_addresses,
        bind_address,
    } = sources;
    // A folder of manifests stands instead of an API server.
    let file_kubeconfig = Some(&file.client_connection.kubeconfig).filter(|path| !path.is_empty());
    *kubeconfig = match manifests {
        Some(_) => None,
        None => file_kubeconfig.map(PathBuf::from),
    };
    *nodeport_addresses = file
        .node_port_addresses
        .iter()
        .map(|entry| entry.0)
        .collect();
    *bind_address = main_address(file);
}

fn main_address(file: &KubeProxyConfiguration) -> IpAddr {
    file.bind_address.unwrap_or(Ipv4Addr::UNSPECIFIED.into())
}

/// Which layers there are.
pub fn to_layers(file: &KubeProxyConfiguration, layers: &mut Layers, given: &BTreeSet<String>) {
    layers.proxy_mode = file.mode.unwrap_or_default();
    if !given.contains("mode") {
        layers.mode = file.proxy_agent.mode;
    }
    let Iptables {
        masquerade_bit,
        masquerade_all,
        localhost_node_ports,
        sync_period,
        min_sync_period,
    } = file.iptables.clone();
    let (bit, masquerade_all, period, least) = match layers.proxy_mode {
        ProxyMode::Unset | ProxyMode::Iptables => {
            (masquerade_bit, masquerade_all, sync_period, min_sync_period)
        }
        ProxyMode::Ipvs => {
            let ipvs = &file.ipvs;
            (
                masquerade_bit,
                masquerade_all,
                ipvs.sync_period,
                ipvs.min_sync_period,
            )
        }
        ProxyMode::Nftables => {
            let Nftables {
                masquerade_bit,
                masquerade_all,
                sync_period,
                min_sync_period,
            } = file.nftables.clone();
            (masquerade_bit, masquerade_all, sync_period, min_sync_period)
        }
    };
    let takeover_after = match given.contains("takeover_after") {
        true => layers.packet.takeover_after,
        false => Some(file.proxy_agent.takeover_after).filter(|time| !time.is_zero()),
    };
    let named = |name: &String| Some(name.clone()).filter(|name| !name.is_empty());
    let networks = file.cluster_cidr.clone();
    layers.packet = Packet {
        detect_local_mode: file
            .detect_local_mode
            .unwrap_or(DetectLocalMode::ClusterCidr),
        cluster_cidr: networks.map_or(Vec::new(), |networks| networks.0),
        pod_bridge_interface: named(&file.detect_local.bridge_interface),
        pod_interface_name_prefix: named(&file.detect_local.interface_name_prefix),
        masquerade_all,
        iptables_masquerade_bit: bit.map_or(MASQUERADE_BIT, Within::to),
        iptables_localhost_nodeports: localhost_node_ports.unwrap_or(true),
        iptables_sync_period: or(period, SYNC_PERIOD),
        iptables_min_sync_period: match layers.proxy_mode {
            // There 0 is no pause at all.
            ProxyMode::Ipvs => least,
            ProxyMode::Unset | ProxyMode::Iptables | ProxyMode::Nftables => {
                or(least, MIN_SYNC_PERIOD)
            }
        },
        takeover_after,
    };
}

/// Zero is unset.
fn or(time: Duration, default: Duration) -> Duration {
    match time.is_zero() {
        true => default,
        false => time,
    }
}

/// What only `run` has.
pub fn to_run(file: &KubeProxyConfiguration, run: &mut Run, given: &BTreeSet<String>) {
    let (anywhere, here): (IpAddr, IpAddr) = match main_address(file) {
        IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(_) => (Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::LOCALHOST.into()),
    };
    let healthz = file.healthz_bind_address;
    let healthz = healthz.unwrap_or(ListenAt(SocketAddr::new(anywhere, HEALTHZ_PORT)));
    run.healthz_bind_address = Listen(Some(healthz.0));
    let metrics = file.metrics_bind_address;
    let metrics = metrics.unwrap_or(ListenAt(SocketAddr::new(here, METRICS_PORT)));
    run.metrics_bind_address = Listen(Some(metrics.0));
    run.bind_address_hard_fail = file.bind_address_hard_fail;
    run.host = host_settings(file);
    let own = &file.proxy_agent;
    if !given.contains("socket_exclude_cgroup") {
        run.socket_exclude_cgroup
            .clone_from(&own.socket_exclude_cgroups);
    }
    if !given.contains("socket_exclude_pods") {
        run.socket_exclude_pods = own.socket_exclude_pods;
    }
    if let Some(lease) = own.socket_lease
        && !given.contains("socket_lease")
    {
        run.socket_lease = lease.0.0;
    }
}

fn host_settings(file: &KubeProxyConfiguration) -> HostSettings {
    let Conntrack {
        max_per_core,
        min,
        tcp_established_timeout,
        tcp_close_wait_timeout,
        tcp_be_liberal,
        udp_timeout,
        udp_stream_timeout,
    } = file.conntrack;
    let hours = |hours: u64| Duration::from_secs(hours * 3_600);
    HostSettings {
        conntrack_max_per_core: max_per_core.map_or(32_768, Within::to),
        conntrack_min: min.map_or(131_072, Within::to),
        conntrack_tcp_timeout_established: tcp_established_timeout.unwrap_or(hours(24)),
        conntrack_tcp_timeout_close_wait: tcp_close_wait_timeout.unwrap_or(hours(1)),
        conntrack_tcp_be_liberal: tcp_be_liberal,
        conntrack_udp_timeout: udp_timeout,
        conntrack_udp_timeout_stream: udp_stream_timeout,
        oom_score_adj: file.oom_score_adj.map_or(-999, Within::to),
    }
}
