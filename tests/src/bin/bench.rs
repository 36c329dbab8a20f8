//! `cargo xtask bench NAME`: both sides of a comparison in one run. Exit code 2 when a target is missed.

use std::{
    net::{Ipv4Addr, SocketAddr},
    process::ExitCode,
};

use clap::Parser;
use proxy_tests::bench::{api, connect, conntrack, memory, packets, rules, start, update};

/// Benches of proxy-agent.
#[derive(Debug, Parser)]
enum Bench {
    /// Connections through a ClusterIP against the pod directly.
    Connect,
    /// One endpoint of 100,000 changes.
    Update,
    /// 250,000 endpoints into an empty kernel, and a restart.
    Start,
    /// Resident memory after both.
    Memory,
    /// A million UDP flows, one in a hundred of them stale.
    Conntrack,
    /// Connections from outside through node ports, with our rules and with the real kube-proxy's.
    Packets(packets::Options),
    /// 100,000 endpoints into iptables, and one of them changes: the agent and the real kube-proxy.
    Rules(rules::Options),
    /// An endpoint changes in a loaded API server: the agent and the real kube-proxy.
    ClusterUpdate(api::Options),
    /// 100,000 endpoints from an API server: the agent and the real kube-proxy.
    ClusterStart(api::Options),
    /// What both take and keep in memory meanwhile, and their CPU time.
    ClusterMemory(api::Options),
    /// These three at once.
    Cluster(api::Options),
    /// The same with 250,000 endpoints.
    ClusterScale(api::Options),
    /// The server process of `connect` and `packets`.
    #[command(hide = true)]
    ConnectServer { address: SocketAddr, at_once: usize },
    /// The client process of `packets`; its plan is JSON.
    #[command(hide = true)]
    PacketsClient { plan: String },
    /// The client process of `connect`.
    #[command(hide = true)]
    ConnectClient { server: Ipv4Addr, services: u32 },
    /// The process that `memory` measures.
    #[command(hide = true)]
    MemoryEngine { services: u32, endpoints: u32 },
}

fn main() -> ExitCode {
    let met = match Bench::parse() {
        Bench::Connect => connect::run(),
        Bench::Update => update::run(),
        Bench::Start => start::run(),
        Bench::Memory => memory::run(),
        Bench::Conntrack => conntrack::run(),
        Bench::Packets(options) => packets::run(&options),
        Bench::Rules(options) => rules::run(&options),
        Bench::ClusterUpdate(options) => api::Bench::UPDATE.run(&options),
        Bench::ClusterStart(options) => api::Bench::START.run(&options),
        Bench::ClusterMemory(options) => api::Bench::MEMORY.run(&options),
        Bench::Cluster(options) => api::Bench::ALL.run(&options),
        Bench::ClusterScale(options) => api::Bench::SCALE.run(&options),
        Bench::ConnectServer { address, at_once } => {
            connect::serve(address, at_once).map(|()| true)
        }
        Bench::PacketsClient { plan } => packets::client::run(&plan).map(|()| true),
        Bench::ConnectClient { server, services } => {
            connect::client(server, services).map(|()| true)
        }
        Bench::MemoryEngine {
            services,
            endpoints,
        } => memory::engine(services, endpoints).map(|()| true),
    };
    match met {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(2),
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
