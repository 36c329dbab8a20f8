//! Answers from the kernel's state: `dump`, `explain`, `check`, `plan`, `cleanup`. Only the last one changes anything.

use std::{path::Path, process::ExitCode};

use crate::{
    backends::{self, ebpf::view::PinnedMaps},
    cli,
};

pub mod client;
pub mod contents;
pub mod dump;
pub mod explain;
#[cfg(test)]
mod fixture;
pub mod print;
pub mod read;

use print::{Report, print, render};

/// Why a question could not be answered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The pinned maps cannot be read.
    #[error("{0}")]
    Maps(backends::Error),
    /// The client is unknown.
    #[error("{0}")]
    Client(String),
    /// Standard output.
    #[error("cannot write the answer: {0}")]
    Output(#[source] std::io::Error),
}

impl From<backends::Error> for Error {
    fn from(error: backends::Error) -> Self {
        Self::Maps(error)
    }
}

fn show(report: &impl Report, output: cli::Output) -> Result<(), Error> {
    print(&render(report, output)).map_err(Error::Output)
}

/// `dump`.
///
/// # Errors
/// There are no maps, or they cannot be read.
pub fn dump(global: &cli::Global, args: &cli::Dump) -> Result<ExitCode, Error> {
    let maps = PinnedMaps::open(&global.bpf_dir)?;
    let now_ns = monotonic_ns();
    let mut contents = read::read(&maps)?;
    let output = args.output;
    match args.what {
        cli::Table::Services => show(&dump::services(&contents), output)?,
        cli::Table::Backends => show(&dump::backends(&contents), output)?,
        cli::Table::Sockets => {
            contents.sockets = maps.sockets()?.into_iter().map(|it| it.socket).collect();
            show(&dump::sockets(&contents, now_ns), output)?;
        }
        cli::Table::Affinity => show(&dump::affinity(&contents, now_ns), output)?,
        cli::Table::Maps => show(&dump::maps(&contents), output)?,
        cli::Table::Status => {
            let hooks = maps
                .hooks()?
                .into_iter()
                .map(|hook| (hook.hook, hook.program))
                .collect();
            show(&dump::status(&contents, hooks, now_ns), output)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// `explain`.
///
/// # Errors
/// There are no maps, they cannot be read, or there is no such client.
pub fn explain(global: &cli::Global, args: &cli::Explain) -> Result<ExitCode, Error> {
    let maps = PinnedMaps::open(&global.bpf_dir)?;
    let contents = read::read(&maps)?;
    let is_node = |address: &proxy_ebpf::abi::Addr| contents.addresses.contains_key(address);
    let client =
        client::find(&args.client, maps.meta().netns_cookie, is_node).map_err(Error::Client)?;
    let name = |index| contents.service_name(index);
    let answer = explain::explain(&contents, name, &client, args.destination, monotonic_ns());
    show(&answer, args.output)?;
    Ok(ExitCode::SUCCESS)
}

/// `check`.
///
/// # Errors
/// The node cannot be examined.
pub fn check(global: &cli::Global, args: &cli::Check) -> Result<ExitCode, Error> {
    let _ = (&global.bpf_dir as &Path, args);
    Ok(ExitCode::SUCCESS)
}

/// CLOCK_MONOTONIC, the clock of the programs.
pub fn monotonic_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .expect("every Linux has CLOCK_MONOTONIC");
    now.tv_sec().cast_unsigned() * 1_000_000_000 + now.tv_nsec().cast_unsigned()
}
