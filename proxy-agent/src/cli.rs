//! Arguments: every flag typed, with its unit. Nothing here opens a file or asks the kernel.

use std::{ffi::OsString, net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::state::NodePortAddress;

mod host;
mod packet;
mod values;

pub use host::HostSettings;
pub use packet::{DetectLocalMode, Packet};
pub use values::Destination;
use values::seconds;

/// Exit code of a wrong command line (`EX_USAGE`).
pub const USAGE: u8 = 64;
/// Exit code of a failure.
pub const FAILURE: u8 = 1;
/// Exit code of `check` and `plan` when something differs.
pub const DIFFERENCES: u8 = 2;

/// A kube-proxy replacement: Services become eBPF maps, connections go to pods.
#[derive(Debug, Parser)]
#[command(name = "proxy-agent", version, max_term_width = 120)]
#[command(
    after_help = "Without a command, `run` is meant. Exit codes: 0 done, 1 failure, \
    2 differences (check, plan), 64 wrong usage."
)]
pub struct Cli {
    /// Flags of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Flags of every command.
#[derive(Debug, Args)]
pub struct Global {
    /// Directory on a bpf file system that holds this node's links and maps
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        default_value = "/sys/fs/bpf/proxy-agent"
    )]
    pub bpf_dir: PathBuf,
    /// The node's cgroup v2; its sockets are served [default: the root of the machine's cgroup v2]
    #[arg(long, global = true, value_name = "DIR")]
    pub cgroup: Option<PathBuf>,
    /// Name of the Node object of this machine [default: the host name in lower case]
    #[arg(long, global = true, value_name = "NAME")]
    pub node_name: Option<String>,
    /// What to log: error, warn, info, debug, trace, or a filter as in RUST_LOG, which it overrides
    #[arg(long, global = true, value_name = "FILTER")]
    pub log_level: Option<String>,
    /// How to log
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
}

/// Format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the node: keep the kernel's maps true to the Services (default)
    Run(Box<Run>),
    /// Print what the kernel holds; works with the agent dead
    Dump(Dump),
    /// Say where a connection goes, and why
    Explain(Explain),
    /// Can this node run eBPF, and is the kernel's state what it should be? Exit code 2 where not
    Check(Check),
    /// Print what `run` would change, and change nothing. Exit code 2 if there is anything
    Plan(Plan),
    /// Remove hooks, pins, the directory and rules; refused while an agent runs
    Cleanup(Cleanup),
    /// Connect to the canary address from this cgroup: a child of `run`
    #[command(hide = true)]
    SelfTest {
        /// The cgroup to enter.
        cgroup: PathBuf,
    },
    /// End connected UDP sockets of removed backends, once for each byte on standard input: a child of `run`
    #[command(hide = true)]
    Reap,
}

/// Where Services come from.
#[derive(Clone, Debug, Args)]
pub struct Sources {
    /// Folder of Kubernetes YAML and JSON (Service, EndpointSlice, Node), followed live, instead of an API server
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
    /// its main ones (`primary`); a family without a network is served on all [default: all]
    #[arg(long, value_name = "CIDR,…", value_delimiter = ',')]
    pub nodeport_addresses: Vec<NodePortAddress>,
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

/// `run`.
#[derive(Clone, Debug, Args)]
pub struct Run {
    /// Where Services come from.
    #[command(flatten)]
    pub sources: Sources,
    /// Which layers there are.
    #[command(flatten)]
    pub layers: Layers,
    /// Serves /readyz, /livez and /healthz
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:10256")]
    pub healthz_bind_address: SocketAddr,
    /// Serves /metrics, /proxyMode and /configz
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:10249")]
    pub metrics_bind_address: SocketAddr,
    /// Leave the sockets of these cgroups alone: a glob on paths below --cgroup; repeatable, followed live
    #[arg(long, value_name = "GLOB")]
    pub socket_exclude_cgroup: Vec<String>,
    /// Seconds without an agent after which connect and sendmsg leave everything to the packet layer
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    pub socket_lease: Duration,
    /// Settings of the host.
    #[command(flatten)]
    pub host: HostSettings,
    /// Let the programs in the kernel log every decision: for debugging, slow
    #[arg(long)]
    pub log_programs: bool,
}

/// Which layers a node has: for `run`, and for the commands that say what it would do.
#[derive(Clone, Debug, Args)]
pub struct Layers {
    /// How Services are served
    #[arg(
        long,
        alias = "proxy-mode",
        value_name = "MODE",
        default_value = "auto"
    )]
    pub mode: Mode,
    /// What arrives as a packet.
    #[command(flatten)]
    pub packet: Packet,
}

/// `dump`.
#[derive(Debug, Args)]
pub struct Dump {
    /// What to print
    pub what: Table,
    /// How to print it
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub output: Output,
}

/// Contents of a dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Table {
    /// Service ports with frontends and backends
    Services,
    /// Every backend that serves, draining ones included
    Backends,
    /// Translated sockets
    Sockets,
    /// Which client stays with which backend
    Affinity,
    /// Maps, their capacity and use
    Maps,
    /// Version, node, heartbeat, hooks, counters
    Status,
    /// Chains, jumps and address sets of the packet layer
    Rules,
}

/// Format of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people
    Table,
    /// JSON
    Json,
    /// YAML
    Yaml,
}

/// `explain`.
#[derive(Debug, Args)]
pub struct Explain {
    /// Who connects: `host`; an address of this node or of a pod on it; the name of a network namespace
    /// (/run/netns/NAME); a netns cookie; or an address outside the node. The client's namespace decides node ports on
    /// loopback and session affinity
    pub client: String,
    /// What it connects to: ADDRESS:PORT[/tcp|udp|sctp], IPv6 in brackets
    #[arg(value_name = "ADDRESS:PORT/PROTO")]
    pub destination: Destination,
    /// How to print it
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub output: Output,
}

/// `check`.
#[derive(Debug, Args)]
pub struct Check {
    /// Compared with the kernel's state when given.
    #[command(flatten)]
    pub sources: Sources,
    /// The layers to look at.
    #[command(flatten)]
    pub layers: Layers,
    /// How to print it
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub output: Output,
}

/// `plan`.
#[derive(Debug, Args)]
pub struct Plan {
    /// Where Services come from.
    #[command(flatten)]
    pub sources: Sources,
    /// The layers that would run.
    #[command(flatten)]
    pub layers: Layers,
    /// How to print it
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub output: Output,
}

/// `cleanup`.
#[derive(Debug, Args)]
pub struct Cleanup {
    /// Remove what kube-proxy left instead, of any of its modes: also beside a running agent, whose rules stay
    #[arg(long)]
    pub kube_proxy: bool,
}

/// Parses a command line; the first of `args` is the program's name.
///
/// # Errors
/// What clap has to say; printing it and the exit code ([`USAGE`] unless it is help) are the caller's.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
    let mut args: Vec<OsString> = args.into_iter().collect();
    if lacks_command(&args) {
        args.insert(1, "run".into());
    }
    Cli::try_parse_from(args)
}

/// Whether nothing but flags follows the program's name: then `run` is meant.
fn lacks_command(args: &[OsString]) -> bool {
    const WITH_VALUE: [&str; 5] = [
        "--bpf-dir",
        "--cgroup",
        "--node-name",
        "--log-level",
        "--log-format",
    ];
    const OF_THE_PROGRAM: [&str; 4] = ["-h", "--help", "-V", "--version"];
    let mut rest = args.iter().skip(1).map(|arg| arg.to_string_lossy());
    while let Some(arg) = rest.next() {
        if WITH_VALUE.contains(&arg.as_ref()) {
            rest.next();
        } else if !WITH_VALUE
            .iter()
            .any(|flag| arg.starts_with(&format!("{flag}=")))
        {
            return arg.starts_with('-') && !OF_THE_PROGRAM.contains(&arg.as_ref());
        }
    }
    !args.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Cli, clap::Error> {
        parse(
            std::iter::once("proxy-agent")
                .chain(line.split_whitespace())
                .map(OsString::from),
        )
    }

    #[test]
    fn run_is_the_command_when_none_is_given() {
        for line in [
            "--manifests /m",
            "run --manifests /m",
            "--bpf-dir /b --manifests /m",
            "--cgroup=/c --manifests /m",
        ] {
            let Command::Run(run) = parsed(line).unwrap().command else {
                panic!("{line} is not run");
            };
            assert_eq!(run.sources.manifests, Some("/m".into()));
        }
        assert!(matches!(parsed("").unwrap().command, Command::Run(_)));
    }

    #[test]
    fn global_flags_may_stand_on_either_side_of_the_command() {
        for line in ["--bpf-dir /b dump services", "dump services --bpf-dir /b"] {
            let cli = parsed(line).unwrap();
            assert_eq!(cli.global.bpf_dir, PathBuf::from("/b"));
            assert!(matches!(
                cli.command,
                Command::Dump(Dump {
                    what: Table::Services,
                    ..
                })
            ));
        }
    }

    #[test]
    fn proxy_mode_is_another_name_of_mode() {
        for line in ["--mode ebpf", "--proxy-mode ebpf", "--proxy-mode=ebpf"] {
            let Command::Run(run) = parsed(line).unwrap().command else {
                panic!("{line} is not run");
            };
            assert_eq!(run.layers.mode, Mode::Ebpf);
        }
    }

    #[test]
    fn flags_have_the_documented_defaults() {
        let cli = parsed("run").unwrap();
        let Command::Run(run) = cli.command else {
            panic!("not run");
        };
        assert_eq!(cli.global.bpf_dir, PathBuf::from("/sys/fs/bpf/proxy-agent"));
        assert_eq!(run.healthz_bind_address, "0.0.0.0:10256".parse().unwrap());
        assert_eq!(run.metrics_bind_address, "127.0.0.1:10249".parse().unwrap());
        assert_eq!(run.socket_lease, Duration::from_secs(30));
        assert_eq!(run.layers.mode, Mode::Auto);
    }

    #[test]
    fn the_packet_layer_has_the_flags_of_kube_proxy() {
        let packet = |line: &str| match parsed(line).unwrap().command {
            Command::Run(run) => run.layers.packet,
            other => panic!("{other:?}"),
        };
        let plain = packet("run");
        assert_eq!(plain.iptables_masquerade_bit, 14);
        assert!(!plain.masquerade_all && plain.iptables_localhost_nodeports);
        assert_eq!(plain.detect_local_mode, DetectLocalMode::ClusterCidr);
        assert_eq!(plain.iptables_min_sync_period, Duration::from_secs(1));
        assert_eq!(plain.takeover_after, Duration::from_secs(45));
        let given = packet(
            "--masquerade-all --cluster-cidr=10.244.0.0/16,fd00:10:244::/56 --iptables-localhost-nodeports=false \
             --detect-local-mode=InterfaceNamePrefix --pod-interface-name-prefix=veth --iptables-min-sync-period=100ms",
        );
        assert!(given.masquerade_all && !given.iptables_localhost_nodeports);
        assert_eq!(given.cluster_cidr.len(), 2);
        assert_eq!(given.iptables_min_sync_period, Duration::from_millis(100));
    }

    #[test]
    fn the_addresses_of_node_ports_concern_every_command_that_reads_sources() {
        let list = "--nodeport-addresses=primary,127.0.0.0/8";
        let Command::Run(run) = parsed(list).unwrap().command else {
            panic!("not run");
        };
        let Command::Plan(plan) = parsed(&format!("plan {list}")).unwrap().command else {
            panic!("not plan");
        };
        for sources in [run.sources, plan.sources] {
            assert_eq!(sources.nodeport_addresses.len(), 2);
        }
    }

    #[test]
    fn wrong_flags_are_refused() {
        for line in [
            "--nonsense",
            "nonsense",
            "--socket-lease 1",
            "--mode x",
            "--iptables-masquerade-bit 32",
            "--cluster-cidr 10.244.0.0",
            "--nodeport-addresses main",
            "--detect-local-mode x",
            "--iptables-min-sync-period 1h2",
            "--iptables-min-sync-period 1d",
            "--oom-score-adj 1001",
            "dump",
            "dump x",
        ] {
            let error = parsed(line).unwrap_err();
            assert!(error.use_stderr(), "{line}: {error}");
        }
        assert!(!parsed("--help").unwrap_err().use_stderr());
        assert!(!parsed("--version").unwrap_err().use_stderr());
    }
}
