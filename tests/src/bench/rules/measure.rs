//! One proxy on a node of its own.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::{
    super::{
        proxies::{Cpu, Proxy, Running},
        report::percentile,
    },
    CHANGING, START,
    cluster::{World, address},
};
use crate::{Pod, let_run, wait_for};

/// Between a connection that landed and the next change: longer than the shortest time between two changes of the rules, and
/// enough for what is left to do behind the change.
const PAUSE: Duration = Duration::from_millis(300);
/// Between two attempts to connect.
const AGAIN: Duration = Duration::from_millis(1);

/// What was found of a proxy.
pub(super) struct Found {
    pub proxy: Proxy,
    /// None: not within [`START`].
    started: Option<Started>,
}

struct Started {
    took: Duration,
    /// What the start cost.
    cpu: Cpu,
    changes: Changes,
}

#[derive(Default)]
struct Changes {
    /// From a change to the connection that landed, ascending; seconds.
    took: Vec<f64>,
    /// What all of them cost together.
    cpu: Cpu,
    /// Connections that failed meanwhile.
    failed: u32,
}

impl World {
    /// Starts a proxy on a new node, and changes endpoints.
    pub(super) fn measure(&mut self, proxy: Proxy, changes: u32) -> Result<Found> {
        let (node, client) = self.node(&proxy.node_name())?;
        for service in self.changing() {
            self.lead(proxy, service, 0)?;
        }
        println!("{proxy} starts");
        let start = Instant::now();
        let mut running = match proxy {
            Proxy::Ours(variant) => Running::ours(&node, variant, &self.manifests)?,
            Proxy::Kube(mode) => Running::kube(self.control()?, &node, mode)?,
        };
        let took = match running.wait_complete(start, START) {
            Ok(took) => took,
            Err(_) if start.elapsed() >= START => {
                println!("{proxy}: not complete after {} s", START.as_secs());
                let started = None;
                return Ok(Found { proxy, started });
            }
            Err(error) => return Err(error.context(proxy.to_string())),
        };
        let cpu = running.cpu()?;
        println!("{proxy}: complete after {:.1} s", took.as_secs_f64());
        let changes = self.change(proxy, &running, &client, changes)?;
        running.stop()?;
        let started = Some(Started { took, cpu, changes });
        Ok(Found { proxy, started })
    }

    /// Changes endpoints one after the other, until it is `count` or the time is up.
    fn change(
        &mut self,
        proxy: Proxy,
        running: &Running,
        client: &Pod,
        count: u32,
    ) -> Result<Changes> {
        let services = self.changing();
        let names = self.servers.each_ref().map(|pod| pod.name().to_owned());
        for service in &services {
            wait_for("the server answers", Duration::from_secs(10), || {
                let who = client.ask_tcp(address(*service))?;
                ensure!(who == names[0], "{who} instead of {}", names[0]);
                Ok(())
            })?;
        }
        let_run(PAUSE);
        let mut changes = Changes::default();
        let before = running.cpu()?;
        let start = Instant::now();
        for (step, service) in (0..count).zip(services.iter().cycle()) {
            // To the second server, and back the next time that it is this Service's turn.
            let server = (1 + step as usize / services.len()) % names.len();
            let begin = self.lead(proxy, *service, server)?;
            loop {
                match client.ask_tcp(address(*service)) {
                    Ok(who) if who == names[server] => break,
                    Ok(_) => {}
                    Err(_) => changes.failed += 1,
                }
                ensure!(
                    begin.elapsed() < CHANGING,
                    "{proxy}: no connection landed within {CHANGING:?} of a change"
                );
                let_run(AGAIN);
            }
            changes.took.push(begin.elapsed().as_secs_f64());
            let_run(PAUSE);
            if start.elapsed() > CHANGING {
                break;
            }
        }
        changes.cpu = running.cpu()? - before;
        changes.took.sort_by(f64::total_cmp);
        println!("{proxy}: {} changes", changes.took.len());
        Ok(changes)
    }
}

impl Found {
    /// Whether its rules were ever complete.
    pub fn is_complete(&self) -> bool {
        self.started.is_some()
    }

    /// Seconds until its rules were complete, or how long that was waited for.
    pub fn cold_start_s(&self) -> f64 {
        let started = self.started.as_ref();
        started.map_or(START, |started| started.took).as_secs_f64()
    }

    /// Seconds from a change to the connection that landed, the median. Who never had complete rules has not served a change
    /// for that long.
    pub fn change_p50_s(&self) -> f64 {
        let started = self.started.as_ref();
        started.map_or(START.as_secs_f64(), |started| {
            percentile(&started.changes.took, 50.0)
        })
    }

    /// For the report.
    pub fn row(&self) -> Value {
        let Some(Started { took, cpu, changes }) = &self.started else {
            return json!({"side": self.proxy.to_string(), "cold_start_s": format!("> {}", START.as_secs())});
        };
        let count = changes.took.len() as f64;
        let ms = |percent| percentile(&changes.took, percent) * 1e3;
        let share = |cpu: Cpu| (cpu.tools_user_s + cpu.tools_kernel_s) / cpu.all_s;
        json!({
            "side": self.proxy.to_string(),
            "cold_start_s": took.as_secs_f64(),
            "cold_start_cpu": cpu,
            "cold_start_share_of_tools": share(*cpu),
            "changes": count,
            "change_p50_ms": ms(50.0),
            "change_p99_ms": ms(99.0),
            "failed_connections": changes.failed,
            "cpu_per_change": changes.cpu / count,
            "change_share_of_tools": share(changes.cpu),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube::{Mode, Variant};

    #[test]
    fn who_never_gets_complete_is_told_with_the_limit() {
        let found = Found {
            proxy: Proxy::Kube(Mode::Iptables(Variant::Nft)),
            started: None,
        };
        assert_eq!(
            found.row(),
            json!({"side": "kube-proxy iptables-nft", "cold_start_s": "> 600"})
        );
        assert_eq!((found.cold_start_s(), found.change_p50_s()), (600.0, 600.0));
    }

    #[test]
    fn the_tools_have_their_share_of_the_time() {
        let cpu = Cpu {
            all_s: 8.0,
            tools_user_s: 3.0,
            tools_kernel_s: 1.0,
        };
        let found = Found {
            proxy: Proxy::Ours(Variant::Legacy),
            started: Some(Started {
                took: Duration::from_secs(2),
                cpu,
                changes: Changes {
                    took: vec![0.1, 0.2, 0.3, 0.4],
                    cpu,
                    failed: 0,
                },
            }),
        };
        let row = found.row();
        assert_eq!(row["change_p50_ms"], 250.0);
        assert_eq!(row["cpu_per_change"]["all_s"], 2.0);
        assert_eq!(row["change_share_of_tools"], 0.5);
    }
}
