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
/// Between two connections of a client: some hundred a second leave the cores to the others.
const PAUSE: Duration = Duration::from_millis(3);

/// A Service at `vip(number)` whose endpoint, port `target` of the near pod, is reached by a node port, too.
pub fn web(s: &Scenario, number: u8, target: u16) -> Service {
    Service::new(&format!("web-{number}"), &[s.vip(number)])
        .port("http", "TCP", TCP, target)
        .node_port(node_port(number))
        .endpoint(s.endpoint(&s.near))
}

/// The node port of [`web`].
pub fn node_port(number: u8) -> u16 {
    30_000 + u16::from(number)
}

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
        s.manifests.put(&web(s, NUMBER, TCP_TARGET))?;
        let outsider = s.topology.outsider()?;
        let mut loads = Vec::new();
        for (name, peer, to) in [
            ("pod", s.client.peer()?, (s.vip(NUMBER), TCP)),
            (
                "outsider",
                outsider.peer()?,
                (s.a.address(s.v6), node_port(NUMBER)),
            ),
        ] {
            loads.push((name, serve_and_load(&peer, to.into())?));
        }
        Ok(Self { outsider, loads })
    }

    /// The client outside.
    pub fn outsider(&self) -> &Pod {
        &self.outsider
    }

    /// Waits until a pod and somebody outside reach [`web`] number `number`.
    ///
    /// # Errors
    /// They do not in time.
    pub fn wait_served(&self, s: &Scenario, number: u8) -> anyhow::Result<()> {
        let (pod, outsider) = (s.client.peer()?, self.outsider.peer()?);
        wait_for("the Service is served", SOON, || {
            pod.ask_tcp((s.vip(number), TCP).into())?;
            outsider.ask_tcp((s.a.address(s.v6), node_port(number)).into())?;
            Ok(())
        })
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
