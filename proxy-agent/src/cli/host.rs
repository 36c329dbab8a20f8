//! Flags for settings of the host.

use std::time::Duration;

use clap::{ArgAction, Args};

use super::values::{boolean, duration};

/// Settings of the host. Names and defaults are kube-proxy's (cmd/kube-proxy/app/options.go).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Args)]
#[command(next_help_heading = "Host: raised where smaller, never lowered")]
pub struct HostSettings {
    /// Connections to track for each CPU; 0 leaves the limit as it is
    #[arg(long, value_name = "NUMBER", default_value_t = 32_768)]
    pub conntrack_max_per_core: u32,
    /// Connections to track at least, however few CPUs there are
    #[arg(long, value_name = "NUMBER", default_value_t = 131_072)]
    pub conntrack_min: u32,
    /// How long an idle TCP connection is tracked; 0 leaves it as it is
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = duration)]
    pub conntrack_tcp_timeout_established: Duration,
    /// How long a TCP connection that one end has closed is tracked; 0 leaves it as it is
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = duration)]
    pub conntrack_tcp_timeout_close_wait: Duration,
    /// Take no TCP packet out of its window for invalid
    #[arg(long, action = ArgAction::Set, value_parser = boolean, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true")]
    pub conntrack_tcp_be_liberal: bool,
    /// How long an idle UDP flow without an answer is tracked; 0 leaves it as it is
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = duration)]
    pub conntrack_udp_timeout: Duration,
    /// How long an idle UDP flow with answers is tracked; 0 leaves it as it is
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = duration)]
    pub conntrack_udp_timeout_stream: Duration,
    /// How soon the kernel ends this process when memory runs out: -1000 never, 1000 first
    #[arg(long, value_name = "SCORE", default_value_t = -999, allow_negative_numbers = true, value_parser = clap::value_parser!(i16).range(-1000..=1000))]
    pub oom_score_adj: i16,
}
