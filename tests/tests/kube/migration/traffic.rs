//! New connections and datagrams from everywhere, and some that last.

use std::{fmt, net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context, bail, ensure};
use proxy_tests::{
    Peer, Pod,
    flows::Client,
    load::{LoadPlan, LoadReport, Record, Talk},
    peer::{Load, PATIENCE, Socket},
    scenario::{TCP, UDP},
};

use super::DNS_NODE_PORT;
use crate::cluster::{Cluster, NODE_PORT, VIPS};

/// Between two exchanges of one client.
const PAUSE: Duration = Duration::from_millis(5);
/// Failures in kube-proxy's start-up gap are all looked at.
const SPELLED_OUT: usize = 10_000;
/// One of four endpoints or more is one that stays.
const TRIES: usize = 200;

/// Who asks over which protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Who {
    /// From where.
    pub client: Client,
    /// How.
    pub talk: Talk,
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} by {:?}", self.client, self.talk)
    }
}

/// What one of them saw.
pub struct Seen {
    /// Which one.
    pub who: Who,
    /// Failures above all.
    pub report: LoadReport,
    /// Each answer.
    pub records: Vec<Record>,
}

/// All of them at work.
pub struct Traffic(Vec<(Who, Load, PathBuf)>);

/// Who talks, and where each of them finds the Service over TCP and UDP.
fn clients(c: &Cluster, outsider: &Pod) -> anyhow::Result<Vec<(Who, Peer, Vec<SocketAddr>)>> {
    let mut all = Vec::new();
    for (client, peer) in [
        (Client::Pod, c.scenario.client.peer()?),
        (Client::Node, c.scenario.a.peer()?),
        (Client::Outside, outsider.peer()?),
    ] {
        for (talk, port, node_port) in [
            (Talk::Tcp, TCP, NODE_PORT),
            (Talk::FreshUdp, UDP, DNS_NODE_PORT),
        ] {
            let node = [false, true].map(|v6| SocketAddr::new(c.scenario.a.address(v6), node_port));
            let vips = VIPS.map(|vip| SocketAddr::new(vip.parse().expect("an address"), port));
            let targets = match client {
                Client::Pod | Client::Node => [vips, node].concat(),
                Client::Outside => node.to_vec(),
            };
            all.push((Who { client, talk }, peer.clone(), targets));
        }
    }
    Ok(all)
}

impl Traffic {
    /// Begins.
    pub fn start(c: &Cluster, outsider: &Pod) -> anyhow::Result<Self> {
        let clients = clients(c, outsider)?.into_iter();
        let start = |(who, peer, targets): (Who, Peer, Vec<SocketAddr>)| {
            let Who { client, talk } = who;
            let file = format!("answers-{client:?}-{talk:?}");
            let record = c.scenario.topology.state_dir().join(file);
            let plan = LoadPlan {
                pause: PAUSE,
                record: Some(record.clone()),
                spelled_out: SPELLED_OUT,
                ..LoadPlan::new(talk, targets)
            };
            Ok((who, peer.start_load(plan)?, record))
        };
        clients.map(start).collect::<anyhow::Result<_>>().map(Self)
    }

    /// Ends.
    pub fn stop(self) -> anyhow::Result<Vec<Seen>> {
        let stop = |(who, load, record): (Who, Load, PathBuf)| {
            let report = load.stop().with_context(|| format!("{who:?}"))?;
            let records = Record::read_all(&record)?;
            Ok(Seen {
                who,
                report,
                records,
            })
        };
        self.0.into_iter().map(stop).collect()
    }
}

/// Connections, and UDP sockets that are connected, to endpoints that stay; to each address of the Service.
#[derive(Default)]
pub struct Established(Vec<(String, Socket, String)>);

impl Established {
    /// Makes one of each more.
    pub fn add(&mut self, c: &Cluster, outsider: &Pod, when: &str) -> anyhow::Result<()> {
        let staying = [c.scenario.near.name(), c.scenario.far.name()];
        for (who, peer, targets) in clients(c, outsider)? {
            for to in targets {
                let what = format!("{who:?} to {to}, made {when}");
                let (socket, identity) =
                    to_one_of(&staying, who.talk, &peer, to).with_context(|| what.clone())?;
                self.0.push((what, socket, identity));
            }
        }
        Ok(())
    }

    /// All of them are still answered by whom they were made to.
    pub fn assert_alive(&self, when: &str) -> anyhow::Result<()> {
        for (what, socket, identity) in &self.0 {
            let answer = socket.ask();
            let answer = answer.with_context(|| format!("{what}: {when}"))?;
            ensure!(
                answer == *identity,
                "{what}: {when} {answer} instead of {identity}"
            );
        }
        Ok(())
    }
}

fn to_one_of(
    staying: &[&str],
    talk: Talk,
    peer: &Peer,
    to: SocketAddr,
) -> anyhow::Result<(Socket, String)> {
    for _ in 0..TRIES {
        let (socket, identity) = match talk {
            Talk::Tcp => {
                let socket = peer.connect_tcp(to)?;
                let (line, _) = socket.receive(PATIENCE)?;
                (socket, line.trim_end().to_owned())
            }
            Talk::Udp | Talk::ConnectedUdp | Talk::FreshUdp => {
                let socket = peer.open_udp_for(to)?;
                socket.connect(to)?;
                let identity = socket.ask()?;
                (socket, identity)
            }
        };
        if staying.contains(&identity.as_str()) {
            return Ok((socket, identity));
        }
    }
    bail!("never one of {staying:?}")
}
