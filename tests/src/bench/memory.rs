//! Bench `memory`: what the engine keeps in memory after the work of `start` and `update`, in a process of its own; and what
//! the whole agent takes and keeps on a folder of manifests.

mod agent;

pub(super) use agent::usage;

use std::{fs, net::Ipv4Addr, process::Command, time::Duration};

use anyhow::{Context as _, Result};
use proxy_agent::{backends::ebpf::view::Pins, model::Objects};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    cluster::{Cluster, slice},
    engine::{self, Engine},
    output_of, own_binary,
    report::{Report, Target},
};
use crate::{Topology, wait_for};

const MB: f64 = 1e6;

/// Where memory is, in bytes.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Usage {
    /// Resident, without the mappings of BPF maps.
    resident: u64,
    /// Resident pages of those mappings: the kernel's own memory, counted again.
    mapped: u64,
    /// The kernel's memory for all maps.
    maps: u64,
}

/// Runs the bench.
///
/// # Errors
/// A part could not be made.
pub fn run() -> Result<bool> {
    let mut report = Report::new("memory");
    for (services, endpoints, limit) in [(10_000, 10, 60.0), (5_000, 50, 120.0)] {
        let command = Command::new(own_binary()?);
        let (of_services, of_endpoints) = (services.to_string(), endpoints.to_string());
        let usage: Usage = output_of(command, &["memory-engine", &of_services, &of_endpoints])?;
        let total = services * endpoints;
        report.row(json!({
            "services": services, "endpoints": total,
            "resident_mb": usage.resident as f64 / MB,
            "mapped_mb": usage.mapped as f64 / MB,
            "kernel_maps_mb": usage.maps as f64 / MB,
        }));
        let what = format!("resident at {services} Services x {total} endpoints, MB");
        report.target(Target::at_most(what, usage.resident as f64 / MB, limit));
    }
    agent::rows(&mut report)?;
    report.finish()
}

/// The process that is measured: prints its usage as JSON.
///
/// # Errors
/// The kernel refuses.
pub fn engine(services: u32, endpoints: u32) -> Result<()> {
    let cluster = Cluster {
        services,
        endpoints,
    };
    let mut topology = Topology::new("bench-memory")?;
    let node = topology.node("node-a")?;
    let engine = Engine::start(&node, engine::model_of(cluster))?;
    for service in 0..services {
        let other = Ipv4Addr::from(0x0c00_0000 + service);
        let addresses = (1..endpoints)
            .map(|n| Cluster::endpoint(service, n))
            .chain([other]);
        let slices = vec![slice(service, addresses)];
        engine.change(Objects {
            slices,
            complete: true,
            ..Objects::default()
        });
    }
    wait_for(
        "all changes are in the kernel",
        Duration::from_secs(30),
        || (engine.pending() == 0).then_some(()).context("not yet"),
    )?;
    let mut usage = resident(&fs::read_to_string("/proc/self/smaps")?);
    usage.maps = Pins::open(&node.bpf_dir())?
        .maps()?
        .iter()
        .map(|map| map.bytes)
        .sum();
    println!("{}", serde_json::to_string(&usage)?);
    Ok(())
}

fn resident(smaps: &str) -> Usage {
    let mut usage = Usage::default();
    let mut is_map = false;
    for line in smaps.lines() {
        if let Some(rest) = line.strip_prefix("Rss:") {
            let kib: u64 = rest.trim().trim_end_matches(" kB").parse().unwrap_or(0);
            let sum = if is_map {
                &mut usage.mapped
            } else {
                &mut usage.resident
            };
            *sum += kib * 1024;
        } else if line
            .split(' ')
            .next()
            .is_some_and(|range| range.contains('-'))
        {
            is_map = line.contains("anon_inode:bpf-map");
        }
    }
    usage
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_of_maps_are_counted_apart() {
        let smaps = "00-10 rw-p 0 00:00 0 [heap]\nSize: 8 kB\nRss:       8 kB\n\
                     10-20 rw-s 0 00:0f 9 anon_inode:bpf-map\nRss:      16 kB\n";
        let Usage {
            resident,
            mapped,
            maps,
        } = resident(smaps);
        assert_eq!((resident, mapped, maps), (8 * 1024, 16 * 1024, 0));
    }
}
