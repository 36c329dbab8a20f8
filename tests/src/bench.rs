//! The benches: both sides in one run, the ratio and its interval, a JSON report, and exit code 2 for a missed target.

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

use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use serde::de::DeserializeOwned;

use crate::Pod;

/// Runs the bench's own binary in a pod: what it prints, as JSON.
///
/// # Errors
/// It cannot be run, does not succeed, or prints something else.
fn output_of<T: DeserializeOwned>(pod: &Pod, args: &[&str]) -> Result<T> {
    let own = std::env::current_exe().context("cannot find the bench's own binary")?;
    let output = pod
        .place()
        .command(own)?
        .args(args)
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run the client")?;
    ensure!(
        output.status.success(),
        "the client ended with {}",
        output.status
    );
    serde_json::from_slice(&output.stdout).context("the client did not print what it measured")
}
