//! Bench `rules`: 10,000 Services × 100,000 endpoints in iptables: from nothing until the rules are complete, and from one
//! changed endpoint to a new connection that lands there; the agent, and the real kube-proxy with the same variant.
//!
//! Each proxy has a node to itself and runs alone there. Of the time that a change takes, the part of the tools
//! (`iptables-restore` and its siblings) is told apart: it is the same program on both sides, with other input.

use std::time::Duration;

use anyhow::Result;
use clap::Args;
use serde_json::json;

use super::{
    proxies::Proxy,
    report::{Report, Target},
};
use crate::kube::{Mode, Variant};

mod cluster;
mod measure;

use cluster::World;
use measure::Found;

/// Longest wait for complete rules.
const START: Duration = Duration::from_secs(600);
/// Longest time that all changes of one proxy may take together; those that fit in it count.
const CHANGING: Duration = Duration::from_secs(180);
const VARIANTS: [Variant; 2] = [Variant::Legacy, Variant::Nft];

/// Sizes other than the usual ones, for trying it out.
#[derive(Clone, Copy, Debug, Args)]
pub struct Options {
    /// Number of Services.
    #[arg(long, hide = true, default_value_t = 10_000)]
    services: u32,
    /// Endpoints of each.
    #[arg(long, hide = true, default_value_t = 10)]
    endpoints: u32,
    /// Changes of each proxy.
    #[arg(long, hide = true, default_value_t = 100)]
    rounds: u32,
}

/// Runs the bench.
///
/// # Errors
/// A part could not be made, or a change did not arrive.
pub fn run(options: &Options) -> Result<bool> {
    let mut report = Report::new("rules");
    let mut world = World::new(options.services, options.endpoints)?;
    report.row(json!({
        "services": options.services,
        "endpoints": options.services * options.endpoints,
    }));
    let mut ours = Vec::new();
    for variant in VARIANTS {
        let found = world.measure(Proxy::Ours(variant), options.rounds)?;
        report.row(found.row());
        ours.push(found);
    }
    // kube-proxy last: what it has left to do when its time is up disturbs nobody then.
    for (variant, ours) in VARIANTS.into_iter().zip(&ours) {
        let theirs = world.measure(Proxy::Kube(Mode::Iptables(variant)), options.rounds)?;
        report.row(theirs.row());
        compare(&mut report, ours, &theirs);
    }
    report.finish()
}

fn compare(report: &mut Report, ours: &Found, theirs: &Found) {
    let limited = if theirs.is_complete() {
        String::new()
    } else {
        format!(
            " (at least: its rules were not complete after {} s)",
            START.as_secs()
        )
    };
    let what = format!("cold start, {} / {}{limited}", theirs.proxy, ours.proxy);
    let ratio = theirs.cold_start_s() / ours.cold_start_s();
    report.target(Target::at_least(what, ratio, 2.0));
    let what = format!(
        "one change, p50, {} / {}{limited}",
        theirs.proxy, ours.proxy
    );
    let ratio = theirs.change_p50_s() / ours.change_p50_s();
    report.target(Target::at_least(what, ratio, 5.0));
}
