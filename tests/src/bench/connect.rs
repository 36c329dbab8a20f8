//! Bench `connect`: connect, one byte there, one byte back, reset; through a ClusterIP against the pod directly.
//!
//! Client and server are pods of one node. At each size every Service leads to the same pod and the client takes a random
//! ClusterIP each time, so that a large table is not flattered by warm caches.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    sys::socket::{setsockopt, sockopt},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    cluster::{Cluster, PORT, TARGET_PORT},
    output_of, own_binary,
    report::{Report, Target, percentile, ratio},
};
use crate::{Agent, Manifests, Pod, Topology, wait_for};

const SIZES: [u32; 4] = [1, 1_000, 10_000, 50_000];
/// Alternating pairs of rounds at each size: many and short, because what disturbs a shared machine lasts longer than a
/// pair and then disturbs few of them.
const PAIRS: usize = 801;
const ROUND: Duration = Duration::from_millis(20);
/// Through a ClusterIP at least this share of direct connections per second.
const RATIO: f64 = 0.98;

/// One round of one side.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Round {
    per_second: f64,
    p50_us: f64,
    p99_us: f64,
}

/// A round of direct connections, and one through ClusterIPs right before or after it.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Pair {
    direct: Round,
    service: Round,
}

/// Runs the bench.
///
/// # Errors
/// A part could not be made or a connection failed.
pub fn run() -> Result<bool> {
    let mut topology = Topology::new("bench-connect")?;
    let node = topology.node("node-a")?;
    let (client, server) = (node.pod("client")?, node.pod("server")?);
    let mut serving = server
        .place()
        .command(own_binary()?)?
        .args([
            "connect-server",
            &format!("{}:{TARGET_PORT}", server.v4()),
            "1",
        ])
        .stdin(Stdio::piped())
        .spawn()
        .context("cannot start the server")?;
    let mut report = Report::new("connect");
    let mut medians = Vec::new();
    for services in SIZES {
        let manifests = Manifests::new(&topology.state_dir(), &format!("services-{services}"))?;
        let list = Cluster {
            services,
            endpoints: 1,
        }
        .manifest_to(server.v4());
        manifests.write("cluster.json", &list.to_string())?;
        let mut agent = Agent::start(&node, &manifests, &[])?;
        let pairs = measure(&client, server.v4(), services)?;
        agent.stop()?;
        let found = ratio(
            pairs
                .iter()
                .map(|p| p.service.per_second / p.direct.per_second)
                .collect(),
        );
        report.row(json!({
            "services": services,
            "direct": median(pairs.iter().map(|pair| &pair.direct)),
            "service": median(pairs.iter().map(|pair| &pair.service)),
            "ratio": found,
        }));
        let what = format!("connections per second through {services} Services, share of direct");
        report.target(Target::at_least(what, found.median, RATIO));
        medians.push(found.median);
    }
    drop(serving.stdin.take());
    serving.wait().context("the server did not end")?;
    if let (Some(small), Some(large)) = (medians.first(), medians.last()) {
        report.target(Target::at_least(
            "50,000 Services against 1",
            large / small,
            RATIO,
        ));
    }
    report.finish()
}

fn measure(client: &Pod, server: Ipv4Addr, services: u32) -> Result<Vec<Pair>> {
    output_of(
        client.place().command(own_binary()?)?,
        &["connect-client", &server.to_string(), &services.to_string()],
    )
}

fn median<'a>(rounds: impl Iterator<Item = &'a Round> + Clone) -> Round {
    let middle = |value: fn(&Round) -> f64| {
        let mut values: Vec<f64> = rounds.clone().map(value).collect();
        values.sort_by(f64::total_cmp);
        percentile(&values, 50.0)
    };
    Round {
        per_second: middle(|round| round.per_second),
        p50_us: middle(|round| round.p50_us),
        p99_us: middle(|round| round.p99_us),
    }
}

/// The server process: serves this many connections at once until its standard input ends.
///
/// # Errors
/// The address cannot be bound.
pub fn serve(address: SocketAddr, at_once: usize) -> Result<()> {
    pin(1)?;
    let listener = TcpListener::bind(address).with_context(|| format!("cannot bind {address}"))?;
    for _ in 0..at_once {
        let listener = listener.try_clone().context("cannot share the listener")?;
        std::thread::spawn(move || answer(&listener));
    }
    std::io::stdin()
        .read_to_end(&mut Vec::new())
        .context("cannot wait for the end")?;
    Ok(())
}

fn answer(listener: &TcpListener) {
    let mut byte = [0];
    for mut stream in listener.incoming().flatten() {
        // A client that went away is the client's failure, and it says so.
        if stream.read_exact(&mut byte).is_ok() {
            drop(stream.write_all(&byte));
            drop(stream.read(&mut byte));
        }
    }
}

/// The client process: prints its pairs as JSON.
///
/// # Errors
/// A connection failed.
pub fn client(server: Ipv4Addr, services: u32) -> Result<()> {
    pin(0)?;
    let direct = SocketAddr::from((server, TARGET_PORT));
    wait_for("the server answers", Duration::from_secs(5), || {
        exchange(direct)
    })?;
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        SocketAddr::from((
            Cluster::cluster_ip((seed % u64::from(services)) as u32),
            PORT,
        ))
    };
    round(&mut next)?;
    let mut pairs = Vec::with_capacity(PAIRS);
    for number in 0..PAIRS {
        // Each side goes first in every other pair.
        let (first, second);
        if number % 2 == 0 {
            first = round(&mut || direct)?;
            second = round(&mut next)?;
            pairs.push(Pair {
                direct: first,
                service: second,
            });
        } else {
            first = round(&mut next)?;
            second = round(&mut || direct)?;
            pairs.push(Pair {
                direct: second,
                service: first,
            });
        }
    }
    println!("{}", serde_json::to_string(&pairs)?);
    Ok(())
}

fn round(next: &mut dyn FnMut() -> SocketAddr) -> Result<Round> {
    let start = Instant::now();
    let mut took = Vec::new();
    while start.elapsed() < ROUND {
        let to = next();
        let before = Instant::now();
        exchange(to)?;
        took.push(before.elapsed().as_nanos() as f64 / 1e3);
    }
    let per_second = took.len() as f64 / start.elapsed().as_secs_f64();
    took.sort_by(f64::total_cmp);
    Ok(Round {
        per_second,
        p50_us: percentile(&took, 50.0),
        p99_us: percentile(&took, 99.0),
    })
}

/// Connects, sends a byte, reads one, and resets the connection.
pub(super) fn exchange(to: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect(to).with_context(|| format!("cannot connect to {to}"))?;
    // A reset instead of TIME_WAIT, or the client's ports run out.
    let reset = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&stream, sockopt::Linger, &reset).context("cannot set SO_LINGER")?;
    let mut byte = [7];
    stream
        .write_all(&byte)
        .with_context(|| format!("cannot write to {to}"))?;
    stream
        .read_exact(&mut byte)
        .with_context(|| format!("no answer from {to}"))
}

/// Client and server have a core each: the scheduler's choices are most of the noise otherwise.
pub(super) fn pin(core: usize) -> Result<()> {
    let mut cores = CpuSet::new();
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    cores.set(core % count).context("no such core")?;
    sched_setaffinity(Pid::from_raw(0), &cores).context("cannot bind to a core")
}
