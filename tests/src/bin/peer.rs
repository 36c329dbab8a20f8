//! The helper process of the tests: enters namespaces and cgroups, serves, connects, generates load, cleans up.

use std::{
    ffi::{OsStr, OsString},
    path::Path,
    process::ExitCode,
};

use anyhow::bail;
use proxy_tests::{janitor, names::Suffix, peer, place};

const USAGE: &str =
    "usage: peer enter NETNS CGROUP PROGRAM [ARG]... | peer serve | peer janitor TOPOLOGY";

fn run(args: &[&OsStr]) -> anyhow::Result<()> {
    match args {
        [verb, netns, cgroup, program, args @ ..] if *verb == "enter" => Err(place::enter(
            Path::new(netns),
            Path::new(cgroup),
            program,
            args,
        )),
        [verb] if *verb == "serve" => peer::run(),
        [verb, suffix] if *verb == "janitor" => {
            janitor::run(&Suffix::parse(&suffix.to_string_lossy())?)
        }
        _ => bail!(USAGE),
    }
}

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    match run(&args.iter().map(OsString::as_os_str).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("peer: {error:#}");
            ExitCode::FAILURE
        }
    }
}
