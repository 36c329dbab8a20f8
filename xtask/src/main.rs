//! Building, demonstrating, testing and measuring proxy-agent: one command each (`cargo xtask --help`).

mod arch;
mod build;
mod image;
mod layers;
mod lint;
mod needs;
mod process;
mod remedy;
mod test;
mod toolchain;
mod tools;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    bin_name = "cargo xtask",
    about = "Build, demo, test and bench of proxy-agent: one command each"
)]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Build the eBPF programs and the agent, as one static binary with the programs inside.
    Build {
        /// With optimisation: what is shipped and measured.
        #[arg(long)]
        release: bool,
        /// Also the agent of the next ABI, which the upgrade tests need.
        #[arg(long)]
        next: bool,
    },
    /// Build the container image, without Docker: an OCI layout and a tar of it, with the agent and iptables inside.
    Image {
        /// Its name, with the tag [default: localhost/proxy-agent:VERSION].
        #[arg(long)]
        name: Option<String>,
    },
    /// Say what this machine lacks for building, testing and the demo, and the commands that bring it.
    Check {
        /// Run those commands.
        #[arg(long)]
        fix: bool,
    },
    /// Run the tests; those that need root and the kernel too, so as root.
    Test {
        /// Only tests whose name contains this.
        filter: Option<String>,
        /// Only tests that need this much.
        #[arg(long, value_enum, default_value = "all")]
        level: test::Level,
    },
    /// Compare random Services with the real kube-proxy, seed after seed.
    FuzzDiff {
        /// For how long.
        #[arg(long, default_value_t = 30)]
        minutes: u64,
        /// The first seed; 1 and 2 are those of the tests.
        #[arg(long, default_value_t = 3)]
        seed: u64,
    },
    /// Find or build the Kubernetes components that the tests run, and say where they are.
    Tools,
    /// Make a small cluster of network namespaces and show the kernel balancing real traffic in it.
    Demo {
        /// Leave it running, and say how to enter it.
        #[arg(long, conflicts_with = "remove")]
        keep: bool,
        /// Remove what `--keep` left.
        #[arg(long)]
        remove: bool,
    },
    /// Measure, and compare with the target; results go to target/bench/NAME.json. Exit code 2: a target was missed.
    Bench {
        /// Which bench, and its own options.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        name: Vec<String>,
    },
    /// Rewrite what the golden tests expect: review the difference.
    Bless,
    /// Type-check the workspace for aarch64.
    CheckArch,
    /// Check format, lints (as errors), layers and dependencies.
    Lint,
    /// Check who uses whom, against xtask/layers.toml.
    Layers,
}

fn main() -> ExitCode {
    let workspace = process::Workspace::find();
    let done = match Cli::parse().command {
        Task::Build { release, next } => build::run(&workspace, release, next),
        Task::Image { name } => image::run(&workspace, name.as_deref()),
        Task::Check { fix } => remedy::check(&workspace, fix),
        Task::Test { filter, level } => test::run(&workspace, level, filter.as_deref()),
        Task::FuzzDiff { minutes, seed } => test::fuzz_diff(&workspace, minutes, seed),
        Task::Tools => tools::run(&workspace),
        Task::Demo { keep, remove } => test::demo(&workspace, keep, remove),
        Task::Bench { name } => test::bench(&workspace, &name),
        Task::Bless => test::bless(&workspace),
        Task::CheckArch => arch::check(&workspace),
        Task::Lint => lint::run(&workspace),
        Task::Layers => layers::check(&workspace),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
