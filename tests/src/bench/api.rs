//! Benches `cluster-update`, `cluster-start`, `cluster-memory`, `cluster-scale`, and `cluster`, which is the first three in one:
//! the agent with both layers and the real kube-proxy in mode nftables follow the same loaded API server, one after the other,
//! each on a node of its own.
//!
//! The API server works on the same cores as both; what it takes itself is shown by a bare list and a bare watch in the same
//! run. Its CPU time is charged to nobody.

use anyhow::{Context as _, Result};
use clap::Args;
use serde_json::{Value, json};

use super::{
    cluster::Cluster,
    report::{Report, Target},
};

mod lists;
mod measure;
mod updates;
mod wire;
mod world;

use lists::Form;
use measure::{Cost, Found, Side};
use updates::Updates;
use world::World;

/// Sizes other than the usual ones, for trying it out.
#[derive(Clone, Copy, Debug, Args)]
pub struct Options {
    /// Number of Services.
    #[arg(long, hide = true)]
    services: Option<u32>,
    /// Endpoints of each.
    #[arg(long, hide = true)]
    endpoints: Option<u32>,
    /// Times that an endpoint is replaced, taken away and given back.
    #[arg(long, hide = true, default_value_t = 100)]
    rounds: u32,
}

/// One of the benches.
#[derive(Clone, Copy, Debug)]
pub struct Bench {
    name: &'static str,
    cluster: Cluster,
    parts: Parts,
    limits: Limits,
}

/// What is measured.
#[derive(Clone, Copy, Debug)]
struct Parts {
    update: bool,
    start: bool,
    memory: bool,
}

/// What depends on the size.
#[derive(Clone, Copy, Debug)]
struct Limits {
    peak_mb: f64,
    /// Percentiles of the time that a change takes, and the limit of each.
    updates_ms: &'static [(f64, f64)],
    /// While the packet layer only observes.
    observing_mb: f64,
    /// Those against kube-proxy hold.
    ratios: bool,
}

const USUAL: Cluster = Cluster {
    services: 10_000,
    endpoints: 10,
};
const USUAL_LIMITS: Limits = Limits {
    peak_mb: 110.0,
    updates_ms: &[(50.0, 10.0), (99.0, 25.0)],
    observing_mb: 70.0,
    ratios: true,
};
const ALL: Parts = Parts {
    update: true,
    start: true,
    memory: true,
};
const NONE: Parts = Parts {
    update: false,
    start: false,
    memory: false,
};

impl Bench {
    /// The next three with one loading of the API server.
    pub const ALL: Self = Self::usual("cluster", ALL);
    /// From a patch to new connections.
    pub const UPDATE: Self = Self::usual(
        "cluster-update",
        Parts {
            update: true,
            ..NONE
        },
    );
    /// From nothing, and again.
    pub const START: Self = Self::usual(
        "cluster-start",
        Parts {
            start: true,
            ..NONE
        },
    );
    /// Memory and CPU time.
    pub const MEMORY: Self = Self::usual(
        "cluster-memory",
        Parts {
            memory: true,
            ..NONE
        },
    );
    /// All of it with larger Services.
    pub const SCALE: Self = Self {
        name: "cluster-scale",
        cluster: Cluster {
            services: 5_000,
            endpoints: 50,
        },
        parts: ALL,
        limits: Limits {
            peak_mb: 200.0,
            updates_ms: &[(50.0, 10.0)],
            observing_mb: 200.0,
            ratios: false,
        },
    };

    const fn usual(name: &'static str, parts: Parts) -> Self {
        Self {
            name,
            cluster: USUAL,
            parts,
            limits: USUAL_LIMITS,
        }
    }

    /// Runs the bench.
    ///
    /// # Errors
    /// A part could not be made, or a change did not arrive.
    pub fn run(mut self, options: &Options) -> Result<bool> {
        let Cluster {
            services,
            endpoints,
        } = &mut self.cluster;
        *services = options.services.unwrap_or(*services);
        *endpoints = options.endpoints.unwrap_or(*endpoints);
        let mut report = Report::new(self.name);
        let mut world = World::new(self.cluster)?;
        report.row(json!({
            "services": self.cluster.services,
            "endpoints": self.cluster.services * self.cluster.endpoints,
        }));
        let mut bare_list_s = f64::INFINITY;
        if self.parts.start {
            for form in Form::ALL {
                let listed = lists::list(&world.wire, form)?;
                report.row(listed.row());
                if form == Form::JsonStreamed {
                    bare_list_s = listed.took.as_secs_f64();
                }
            }
        }
        let ours = world.measure(Side::Ours, self.parts, options.rounds)?;
        ours.rows().into_iter().for_each(|row| report.row(row));
        let kube = world.measure(Side::Kube, self.parts, options.rounds)?;
        kube.rows().into_iter().for_each(|row| report.row(row));
        if let (Some(ours), Some(kube)) = (&ours.updates, &kube.updates) {
            self.judge_updates(ours, kube, &mut report);
        }
        if self.parts.start {
            self.judge_start(&ours, &kube, bare_list_s, &mut report)?;
        }
        if let (Some(of_ours), Some(of_kube)) = (&ours.cost, &kube.cost) {
            self.judge_cost((&ours, of_ours), (&kube, of_kube), &mut report)?;
        }
        report.finish()
    }

    fn judge_updates(&self, ours: &Updates, kube: &Updates, report: &mut Report) {
        for &(percent, limit) in self.limits.updates_ms {
            let served = format!("slice patched to first new connection, p{percent}, ms");
            report.target(Target::at_most(served, ours.served_ms(percent), limit));
            let refused = format!("last endpoint removed to first refused, p{percent}, ms");
            report.target(Target::at_most(refused, ours.refused_ms(percent), limit));
        }
        self.ratio(
            "slice patched to first new connection, p50",
            kube.served_ms(50.0) / ours.served_ms(50.0),
            Some(100.0),
            report,
        );
        self.ratio(
            "last endpoint removed to first refused, p50",
            kube.refused_ms(50.0) / ours.refused_ms(50.0),
            None,
            report,
        );
    }

    fn judge_start(
        &self,
        ours: &Found,
        kube: &Found,
        bare_list_s: f64,
        report: &mut Report,
    ) -> Result<()> {
        let restart = ours.restart.as_ref().context("no restart")?;
        for (what, start) in [("start", &ours.start), ("restart", restart)] {
            let socket = start.socket.context("no socket layer")?.as_secs_f64();
            let what =
                format!("{what} until the socket layer is programmed, beyond a bare list, s");
            report.target(Target::at_most(what, socket - bare_list_s, 1.0));
        }
        let complete_s = kube.start.complete.as_secs_f64();
        for (layer, took, limit) in [
            ("socket", ours.start.socket, Some(12.0)),
            ("packet", ours.start.packet, None),
        ] {
            let took = took.context("no such layer")?.as_secs_f64();
            let what = format!("start until the {layer} layer is programmed");
            self.ratio(&what, complete_s / took, limit, report);
        }
        Ok(())
    }

    fn judge_cost(
        &self,
        (ours, of_ours): (&Found, &Cost),
        (kube, of_kube): (&Found, &Cost),
        report: &mut Report,
    ) -> Result<()> {
        let peak = |usage: &Value| usage["peak_mb"].as_f64().context("no peak");
        report.target(Target::at_most(
            "peak resident memory, MB",
            peak(&of_ours.at_end)?,
            self.limits.peak_mb,
        ));
        let observer = of_kube.observer.as_ref().context("no observer")?;
        report.target(Target::at_most(
            "peak resident memory while the packet layer observes, MB",
            peak(observer)?,
            self.limits.observing_mb,
        ));
        for (what, ours, kube) in [
            ("start", ours.start_cpu, kube.start_cpu),
            ("1,000 endpoint changes", of_ours.changes, of_kube.changes),
        ] {
            let own = format!("CPU time of {what}, the agent's own and kube-proxy's with nft");
            self.ratio(&own, kube.all_s / ours.own_s(), Some(20.0), report);
            let all = format!("CPU time of {what}, both with their tools");
            self.ratio(&all, kube.all_s / ours.all_s, None, report);
        }
        Ok(())
    }

    /// How many times as much it is with kube-proxy; a target where it has one.
    fn ratio(&self, what: &str, ratio: f64, limit: Option<f64>, report: &mut Report) {
        let what = format!("{what}: kube-proxy nftables / proxy-agent");
        match limit.filter(|_| self.limits.ratios) {
            Some(limit) => report.target(Target::at_least(what, ratio, limit)),
            None => report.row(json!({"what": what, "ratio": ratio})),
        }
    }
}
