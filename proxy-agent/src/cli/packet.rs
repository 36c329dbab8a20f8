//! Flags of the packet layer.

use std::time::Duration;

use clap::{ArgAction, Args, ValueEnum};
use ipnet::IpNet;

use super::values::{boolean, duration};

/// The packet layer. Names and defaults are kube-proxy's (cmd/kube-proxy/app/options.go).
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Packet layer")]
pub struct Packet {
    /// How a pod of this node is told from other clients
    #[arg(long, value_name = "MODE", default_value = "ClusterCIDR")]
    pub detect_local_mode: DetectLocalMode,
    /// Networks of the cluster's pods, for ClusterCIDR: the first of each family counts
    #[arg(long, value_name = "CIDR,…", value_delimiter = ',')]
    pub cluster_cidr: Vec<IpNet>,
    /// Name of the pods' bridge, for BridgeInterface
    #[arg(long, value_name = "NAME")]
    pub pod_bridge_interface: Option<String>,
    /// What the names of the pods' interfaces begin with, for InterfaceNamePrefix
    #[arg(long, value_name = "PREFIX")]
    pub pod_interface_name_prefix: Option<String>,
    /// Masquerade whatever goes to a ClusterIP
    #[arg(long, action = ArgAction::Set, value_parser = boolean, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true")]
    pub masquerade_all: bool,
    /// Bit of the packet mark that asks for masquerading
    #[arg(long, value_name = "BIT", default_value = "14", value_parser = clap::value_parser!(u8).range(0..=31))]
    pub iptables_masquerade_bit: u8,
    /// Serve node ports on 127.0.0.0/8 in --mode iptables, which sets route_localnet
    #[arg(long, action = ArgAction::Set, value_parser = boolean, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true")]
    pub iptables_localhost_nodeports: bool,
    /// How often kube-proxy looks after its rules. Another one on this node gives a sign each time, and who fails for twice as
    /// long is not healthy
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration)]
    pub iptables_sync_period: Duration,
    /// Take over when another proxy has given no sign for this long [default: one and a half --iptables-sync-period]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub takeover_after: Option<Duration>,
    /// Shortest time from the end of one change of the rules to the next
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = duration)]
    pub iptables_min_sync_period: Duration,
}

impl Packet {
    /// How long another proxy may be silent.
    pub fn takeover_after(&self) -> Duration {
        let usual = self.iptables_sync_period + self.iptables_sync_period / 2;
        self.takeover_after.unwrap_or(usual)
    }
}

/// What tells a pod of this node from other clients; kube-proxy's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DetectLocalMode {
    /// Its address is in --cluster-cidr
    #[value(name = "ClusterCIDR")]
    ClusterCidr,
    /// Its address is in the podCIDRs of the own Node object, followed live
    #[value(name = "NodeCIDR")]
    NodeCidr,
    /// It comes through --pod-bridge-interface
    #[value(name = "BridgeInterface")]
    BridgeInterface,
    /// It comes through an interface whose name begins with --pod-interface-name-prefix
    #[value(name = "InterfaceNamePrefix")]
    InterfaceNamePrefix,
}
