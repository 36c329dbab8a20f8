//! A Service with more endpoints than one EndpointSlice holds, by packets.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use anyhow::{Context, ensure};
use proxy_tests::{
    Scenario, Service,
    kube::Variant,
    let_run,
    load::{LoadPlan, LoadReport, Talk},
    scenario::{SOON, TCP, TCP_TARGET, in_mode},
    wait_for,
};

const ENDPOINTS: u16 = 1_200;
const FIRST_PORT: u16 = 20_000;
const NODE_PORT: u16 = 30_080;
/// Connections, at least: ten for each endpoint, so that one is without any once in twenty runs, and six in 10^10.
const CONNECTIONS: u64 = 10 * ENDPOINTS as u64;
const FEW: usize = 5;

#[test]
#[ignore = "needs root"]
fn each_of_more_than_a_thousand_endpoints_is_chosen_as_often() {
    for (v6, variant) in [(false, Variant::Nft), (true, Variant::Legacy)] {
        let body = || {
            let mut s = Scenario::without_agent("many-endpoints", v6, &in_mode("iptables"))?;
            variant.hint(&s.a)?;
            s.agent.spawn()?;
            s.agent.wait_ready()?;
            choose(&s)
        };
        body().unwrap_or_else(|error| panic!("{variant:?}: {error:?}"));
    }
}

fn choose(s: &Scenario) -> anyhow::Result<()> {
    // Half of them on each node: here they have chains of their own.
    let endpoints = (0..ENDPOINTS).map(|number| {
        let pod = [&s.near, &s.far][usize::from(number % 2)];
        let address = SocketAddr::from((pod.address(s.v6), FIRST_PORT + number));
        pod.peer()?.serve_tcp(address, &format!("e{number}"))?;
        Ok(s.endpoint(pod).at_port(address.port()))
    });
    let endpoints = endpoints.collect::<anyhow::Result<Vec<_>>>()?;
    let service = Service::new("web", &[s.vip(1)])
        .port("http", "TCP", TCP, TCP_TARGET)
        .node_port(NODE_PORT)
        .endpoints(endpoints);
    s.manifests.put(&service)?;
    let peer = s.topology.outsider()?.peer()?;
    let to = (s.a.address(s.v6), NODE_PORT).into();
    wait_for("the Service is served", SOON, || Ok(peer.ask_tcp(to)?))?;
    let plan = LoadPlan {
        threads: 4,
        ..LoadPlan::new(Talk::Tcp, vec![to])
    };
    let mut chosen: BTreeMap<String, u64> = BTreeMap::new();
    let connections = |chosen: &BTreeMap<String, u64>| chosen.values().sum::<u64>();
    while connections(&chosen) < CONNECTIONS {
        let load = peer.start_load(plan.clone())?;
        let_run(Duration::from_secs(1));
        let LoadReport {
            answers,
            failed,
            failures,
        } = load.stop()?;
        ensure!(failed == 0, "{failures:?}");
        ensure!(!answers.is_empty(), "nobody answers");
        for (endpoint, count) in answers {
            *chosen.entry(endpoint).or_default() += count;
        }
    }
    let never = usize::from(ENDPOINTS).checked_sub(chosen.len());
    let never = never.context("endpoints that do not exist")?;
    ensure!(never <= FEW, "{never} endpoints were never chosen");
    // Pearson's: its mean is the degrees of freedom, and its variance twice that.
    let expected = connections(&chosen) as f64 / f64::from(ENDPOINTS);
    let distance = |count: u64| (count as f64 - expected).powi(2) / expected;
    let sum: f64 = chosen.values().map(|count| distance(*count)).sum();
    let chi_square = sum + never as f64 * expected;
    let freedom = f64::from(ENDPOINTS - 1);
    let limit = freedom + 8.0 * (2.0 * freedom).sqrt();
    println!("chi-square {chi_square:.0}, at most {limit:.0}; {expected:.1} connections each");
    ensure!(chi_square < limit, "{chi_square} of {limit}: {chosen:?}");
    Ok(())
}
