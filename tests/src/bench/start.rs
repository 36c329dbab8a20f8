//! Bench `start`: a model of 5,000 Services × 250,000 endpoints into an empty kernel, then a restart with nothing to do.

use anyhow::Result;
use serde_json::json;

use super::{
    cluster::Cluster,
    engine,
    report::{Report, Target, percentile},
};
use crate::Topology;

const CLUSTER: Cluster = Cluster {
    services: 5_000,
    endpoints: 50,
};
const ROUNDS: usize = 5;

/// Runs the bench.
///
/// # Errors
/// The kernel refuses.
pub fn run() -> Result<bool> {
    let mut topology = Topology::new("bench-start")?;
    let model = engine::model_of(CLUSTER);
    let mut report = Report::new("start");
    let (mut starts, mut restarts, mut writes) = (Vec::new(), Vec::new(), 0);
    for round in 0..ROUNDS {
        // A node of its own: an empty directory and a cgroup without hooks.
        let node = topology.node(&format!("node-{round}"))?;
        let start = engine::start(&node, &model)?;
        let restart = engine::start(&node, &model)?;
        report.row(json!({
            "services": CLUSTER.services,
            "endpoints": CLUSTER.services * CLUSTER.endpoints,
            "start_s": start.took.as_secs_f64(),
            "start_writes": start.writes,
            "restart_s": restart.took.as_secs_f64(),
            "restart_writes": restart.writes,
        }));
        starts.push(start.took.as_secs_f64());
        restarts.push(restart.took.as_secs_f64());
        writes += restart.writes;
    }
    let median = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        percentile(&values, 50.0)
    };
    report.target(Target::at_most(
        "start from nothing, seconds",
        median(starts),
        1.0,
    ));
    report.target(Target::at_most("restart, seconds", median(restarts), 0.7));
    report.target(Target::at_most(
        "entries written by restarts",
        writes as f64,
        0.0,
    ));
    report.finish()
}
