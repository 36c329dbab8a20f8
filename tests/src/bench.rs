//! The benches: both sides in one run, the ratio and its interval, a JSON report, and exit code 2 for a missed target.

pub mod api;
pub mod cluster;
pub mod connect;
pub mod conntrack;
pub mod engine;
pub mod memory;
pub mod packets;
pub mod proxies;
pub mod report;
pub mod rules;
pub mod start;
pub mod update;

use std::{
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde::de::DeserializeOwned;

/// The bench's own binary, which has the parts that need a process of their own.
fn own_binary() -> Result<PathBuf> {
    std::env::current_exe().context("cannot find the bench's own binary")
}

/// What a process of [`own_binary`] prints, as JSON.
///
/// # Errors
/// It cannot be run, does not succeed, or prints something else.
fn output_of<T: DeserializeOwned>(mut command: Command, args: &[&str]) -> Result<T> {
    let part = args.first().copied().unwrap_or_default();
    let output = command.args(args).stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("cannot run {part}"))?;
    ensure!(
        output.status.success(),
        "{part} ended with {}",
        output.status
    );
    serde_json::from_slice(&output.stdout)
        .with_context(|| format!("{part} did not print what it measured"))
}
