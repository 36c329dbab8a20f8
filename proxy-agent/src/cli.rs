//! Arguments: every flag typed, with its unit. Nothing here opens a file or asks the kernel.

use std::{collections::BTreeSet, ffi::OsString, path::PathBuf};

use clap::{
    ArgMatches, Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum,
    parser::ValueSource,
};

mod host;
mod kube_proxy;
mod packet;
mod run;
mod values;

pub use host::HostSettings;
pub use kube_proxy::Meaningless;
pub use packet::{DetectLocalMode, Packet};
pub use run::{Instead, Layers, Mode, ProxyMode, Run, Sources};
use values::words;
pub use values::{Destination, HEALTHZ_PORT, Listen, METRICS_PORT, duration, duration_text};

/// Exit code of a wrong command line (`EX_USAGE`).
pub const USAGE: u8 = 64;
/// Exit code of a failure.
pub const FAILURE: u8 = 1;
/// Exit code of `check` and `plan` when something differs.
pub const DIFFERENCES: u8 = 2;

/// A kube-proxy replacement: Services become eBPF maps, connections go to pods.
#[derive(Debug, Parser)]
#[command(
    name = "proxy-agent",
    version,
    max_term_width = 120,
    args_override_self = true
)]
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
    /// Names of the flags that were given, with `_` between their words.
    #[arg(skip)]
    pub given: BTreeSet<String>,
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
    #[arg(
        long,
        visible_alias = "hostname-override",
        global = true,
        value_name = "NAME"
    )]
    pub node_name: Option<String>,
    /// What to log: error, warn, info, debug, trace, or a filter as in RUST_LOG, which it overrides
    #[arg(long, global = true, value_name = "FILTER")]
    pub log_level: Option<String>,
    /// What to log, in kube-proxy's numbers: 4 is debug, 6 is trace
    #[arg(short, long = "v", global = true, value_name = "LEVEL")]
    pub verbosity: Option<u32>,
    /// How to log
    #[arg(
        long,
        visible_alias = "logging-format",
        global = true,
        value_name = "FORMAT",
        default_value = "text"
    )]
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
        cgroup: Option<PathBuf>,
    },
    /// End connected UDP sockets of removed backends, once for each byte on standard input: a child of `run`
    #[command(hide = true)]
    Reap,
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

words!(LogFormat, Mode, ProxyMode, DetectLocalMode);

/// Parses a command line; the first of `args` is the program's name. Flags may be written with `_` for `-`, as in Go.
///
/// # Errors
/// What clap has to say; printing it and the exit code ([`USAGE`] unless it is help) are the caller's.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
    let mut args: Vec<OsString> = args.into_iter().map(with_dashes).collect();
    if lacks_command(&args) {
        match args.iter().any(asks_version) {
            true => args.splice(1.., ["--version".into()]).for_each(drop),
            false => args.insert(1, "run".into()),
        }
    }
    let matches = Cli::command().try_get_matches_from(args)?;
    let given = matches.subcommand().map(|(_, flags)| given(flags));
    let mut cli =
        Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut Cli::command()))?;
    cli.given = given.unwrap_or_default();
    Ok(cli)
}

/// kube-proxy's flag may stand among others, and may have a value.
fn asks_version(arg: &OsString) -> bool {
    matches!(
        arg.to_str(),
        Some("--version" | "--version=true" | "--version=raw")
    )
}

fn given(flags: &ArgMatches) -> BTreeSet<String> {
    let ids = flags.ids().map(|id| id.as_str());
    let given = ids.filter(|id| flags.value_source(id) == Some(ValueSource::CommandLine));
    given.map(str::to_owned).collect()
}

fn with_dashes(arg: OsString) -> OsString {
    match arg.to_str().and_then(|text| text.strip_prefix("--")) {
        None => arg,
        Some(flag) => {
            let (name, value) = flag.split_at(flag.find('=').unwrap_or(flag.len()));
            format!("--{}{value}", name.replace('_', "-")).into()
        }
    }
}

/// Whether nothing but flags follows the program's name: then `run` is meant.
fn lacks_command(args: &[OsString]) -> bool {
    const WITH_VALUE: [&str; 9] = [
        "--bpf-dir",
        "--cgroup",
        "--node-name",
        "--hostname-override",
        "--log-level",
        "-v",
        "--v",
        "--log-format",
        "--logging-format",
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
mod tests;
