//! The demonstration: a small cluster on this machine, real clients and servers, and what they see.

use std::process::ExitCode;

use clap::Parser;
use proxy_tests::demo;

/// Shows Service traffic balanced by the kernel, in a cluster of network namespaces on this machine
#[derive(Debug, Parser)]
#[command(name = "demo")]
struct Args {
    /// Leave everything up at the end
    #[arg(long, conflicts_with = "remove")]
    keep: bool,
    /// Remove what `--keep` left
    #[arg(long)]
    remove: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let result = if args.remove {
        demo::remove().map(|()| true)
    } else {
        demo::run(args.keep)
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}
