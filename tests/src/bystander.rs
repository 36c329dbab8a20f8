//! A Service that no fault is about, and clients who must not notice any: a pod, and somebody outside the cluster.

use std::{net::SocketAddr, time::Duration};

use anyhow::ensure;

use crate::{
    Peer, Pod, Scenario, Service,
    load::{LoadPlan, Talk},
    peer::Load,
    scenario::{SOON, TCP, TCP_TARGET},
    wait_for,
};

const NUMBER: u8 = 99;
const NODE_PORT: u16 = 30_099;
/// Between two connections of a client: some hundred a second leave the cores to the others.
const PAUSE: Duration = Duration::from_millis(3);

/// Two clients who connect all the time.
#[derive(Debug)]
pub struct Bystanders {
    outsider: Pod,
    loads: Vec<(&'static str, Load)>,
}

impl Bystanders {
    /// Makes the Service, waits until both clients are served, and lets them go on.
    ///
    /// # Errors
    /// They are not served in time.
    pub fn start(s: &Scenario) -> anyhow::Result<Self> {
        let service = Service::new("bystander", &[s.vip(NUMBER)])
            .port("http", "TCP", TCP, TCP_TARGET)
            .node_port(NODE_PORT)
            .endpoint(s.endpoint(&s.near));
        s.manifests.put(&service)?;
        let outsider = s.topology.outsider()?;
        let mut loads = Vec::new();
        for (name, peer, to) in [
            ("pod", s.client.peer()?, (s.vip(NUMBER), TCP)),
            ("outsider", outsider.peer()?, (s.a.address(s.v6), NODE_PORT)),
        ] {
            loads.push((name, serve_and_load(&peer, to.into())?));
        }
        Ok(Self { outsider, loads })
    }

    /// The client outside.
    pub fn outsider(&self) -> &Pod {
        &self.outsider
    }

    /// Stops them.
    ///
    /// # Errors
    /// A connection failed, or none was made.
    pub fn ensure_served(self) -> anyhow::Result<()> {
        for (name, load) in self.loads {
            let report = load.stop()?;
            ensure!(
                report.failed == 0 && report.answered() > 0,
                "{name}: {report:?}"
            );
        }
        Ok(())
    }
}

fn serve_and_load(peer: &Peer, to: SocketAddr) -> anyhow::Result<Load> {
    wait_for("the bystanders are served", SOON, || Ok(peer.ask_tcp(to)?))?;
    let mut plan = LoadPlan::new(Talk::Tcp, vec![to]);
    plan.pause = PAUSE;
    peer.start_load(plan)
}
