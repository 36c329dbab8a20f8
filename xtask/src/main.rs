//! Building, demonstrating, testing and measuring proxy-agent: one command each (`cargo xtask --help`).

mod build;
mod process;
mod toolchain;

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
}

fn main() -> ExitCode {
    let workspace = process::Workspace::find();
    let done = match Cli::parse().command {
        Task::Build { release, next } => build::run(&workspace, release, next),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
