//! Flags of `run`, and those of them that the commands have which say what it would do.

use std::{path::PathBuf, time::Duration};

use clap::{ArgAction, Args, ValueEnum};

use super::{
    HostSettings, Packet,
    kube_proxy::Meaningless,
    values::{Listen, boolean, healthz_address, metrics_address, seconds},
};
use crate::state::NodePortAddress;

/// Where Services come from.
#[derive(Clone, Debug, Args)]
pub struct Sources {
    /// A KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1), as kube-proxy reads it: its flags count no longer
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Folder of Kubernetes YAML and JSON (Service, EndpointSlice, Node, ServiceCIDR), followed live, instead of an API server
    #[arg(long, value_name = "DIR", conflicts_with_all = ["kubeconfig", "master"])]
    pub manifests: Option<PathBuf>,
    /// How to reach the API server [default: as a pod]
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// The API server's own address, where it is not the one of the kubeconfig or of the pod's environment, which is a
    /// Service that only this agent makes work
    #[arg(long, value_name = "URL")]
    pub master: Option<String>,
    /// Serve node ports, and answer health checks of load balancers, only on addresses of the node in these networks, or on
    /// its main ones (`primary`); a family without a network is served on all [default: all, with --proxy-mode nftables
    /// `primary`]
    #[arg(long, value_name = "CIDR,…", value_delimiter = ',')]
    pub nodeport_addresses: Vec<NodePortAddress>,
    /// The main address of this node, where it is not the one of the Node object; nothing listens on it
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0")]
    pub bind_address: std::net::IpAddr,
}

/// How Services are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// The best that this node can do
    Auto,
    /// eBPF for the sockets of this node, iptables for what arrives as a packet
    Ebpf,
    /// iptables alone: for kernels without usable eBPF
    Iptables,
}

/// kube-proxy's words for its modes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ProxyMode {
    /// Its default, whatever that is
    #[default]
    #[value(name = "")]
    Unset,
    /// Iptables
    #[value(name = "iptables")]
    Iptables,
    /// Ipvs
    #[value(name = "ipvs")]
    Ipvs,
    /// Nftables
    #[value(name = "nftables")]
    Nftables,
}

/// `run`.
#[derive(Clone, Debug, Args)]
pub struct Run {
    /// Where Services come from.
    #[command(flatten)]
    pub sources: Sources,
    /// Which layers there are.
    #[command(flatten)]
    pub layers: Layers,
    /// Serves /healthz, /livez and /readyz; nowhere when empty
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:10256", value_parser = healthz_address)]
    pub healthz_bind_address: Listen,
    /// Serves /metrics, /proxyMode and /configz; nowhere when empty
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:10249", value_parser = metrics_address)]
    pub metrics_bind_address: Listen,
    /// End when one of these two addresses cannot be had, instead of trying again
    #[arg(long, action = ArgAction::Set, value_parser = boolean, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true")]
    pub bind_address_hard_fail: bool,
    /// 0: no --healthz-bind-address
    #[arg(long, hide = true, value_name = "PORT")]
    pub healthz_port: Option<u16>,
    /// 0: no --metrics-bind-address
    #[arg(long, hide = true, value_name = "PORT")]
    pub metrics_port: Option<u16>,
    /// Leave the sockets of these cgroups alone: a glob on paths below --cgroup; repeatable, followed live
    #[arg(long, value_name = "GLOB")]
    pub socket_exclude_cgroup: Vec<String>,
    /// Leave the sockets of pods alone that carry the annotation proxy-agent/socket-layer: "off". It takes the right to list and
    /// watch pods
    #[arg(long, action = ArgAction::Set, value_parser = boolean, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true")]
    pub socket_exclude_pods: bool,
    /// Seconds without an agent after which connect and sendmsg leave everything to the packet layer
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    pub socket_lease: Duration,
    /// Settings of the host.
    #[command(flatten)]
    pub host: HostSettings,
    /// Let the programs in the kernel log every decision: for debugging, slow
    #[arg(long)]
    pub log_programs: bool,
    /// Instead of serving the node.
    #[command(flatten)]
    pub instead: Instead,
}

/// What `run` does instead of serving the node: kube-proxy's flags for it.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Instead of serving the node")]
pub struct Instead {
    /// Write what is in force, as a KubeProxyConfiguration
    #[arg(long, value_name = "FILE", conflicts_with_all = ["cleanup", "init_only"])]
    pub write_config_to: Option<PathBuf>,
    /// Remove what this agent and what kube-proxy left on this node
    #[arg(long, action = ArgAction::Set, value_parser = boolean, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true")]
    pub cleanup: bool,
    /// Make the settings of the host, which takes more rights than serving the node
    #[arg(long, action = ArgAction::Set, value_parser = boolean, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true")]
    pub init_only: bool,
}

/// Which layers a node has: for `run`, and for the commands that say what it would do.
#[derive(Clone, Debug, Args)]
pub struct Layers {
    /// How Services are served [default: as --proxy-mode says]
    #[arg(long, value_name = "MODE")]
    pub mode: Option<Mode>,
    /// kube-proxy's word: `iptables` is --mode iptables; `nftables`, `ipvs` and none are --mode auto. With `nftables` the packet
    /// layer drops what is sent to an address of the ServiceCIDRs that no Service has
    #[arg(
        long,
        value_name = "MODE",
        default_value = "",
        hide_default_value = true,
        hide_possible_values = true
    )]
    pub proxy_mode: ProxyMode,
    /// What arrives as a packet.
    #[command(flatten)]
    pub packet: Packet,
    /// What kube-proxy has and this agent does not.
    #[command(flatten)]
    pub meaningless: Meaningless,
}

impl Layers {
    /// How Services are served.
    pub fn mode(&self) -> Mode {
        self.mode.unwrap_or(match self.proxy_mode {
            ProxyMode::Iptables => Mode::Iptables,
            ProxyMode::Unset | ProxyMode::Ipvs | ProxyMode::Nftables => Mode::Auto,
        })
    }

    /// Whether packets to addresses of the ServiceCIDRs that no Service has are dropped, as kube-proxy does it in its mode
    /// nftables alone.
    pub fn drops_unallocated(&self) -> bool {
        self.proxy_mode == ProxyMode::Nftables
    }
}
