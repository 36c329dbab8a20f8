//! Random Services: the real kube-proxy and the agent, one after the other on the same node, answer every question the same.
//!
//! A seed that fails is run again by `PROXY_SEED=N cargo xtask test --level kube random`; `cargo xtask fuzz-diff` goes on
//! with others.

use std::{collections::BTreeSet, env};

use anyhow::{Context, bail};
use proxy_tests::{
    Pod,
    differential::{Answers, World, agree},
    kube::{KubeProxy, Mode, Variant},
    scenario::SOURCES,
};
use serde_json::json;

use crate::cluster::Cluster;

/// What every run of the tests tries, unless PROXY_SEED says otherwise.
const OF_RULES: u64 = 1;
const OF_BOTH_LAYERS: u64 = 2;

fn compare(world: &World, its: &Answers, ours: &Answers, has_sockets: bool) -> anyhow::Result<()> {
    let mut differences = Vec::new();
    let mut services = BTreeSet::new();
    for (question, (client, ours)) in ours {
        let (_, its) = its
            .get(question)
            .with_context(|| format!("{question} was not asked"))?;
        if !agree(*client, ours, its, has_sockets) {
            differences.push(format!("{question}: {ours:?}, kube-proxy {its:?}"));
            services.extend(question.split(':').next());
        }
    }
    match differences.is_empty() {
        true => Ok(()),
        false => bail!("{differences:#?}\n{}", world.to_yaml(&services)?),
    }
}

/// Asks everything. A UDP flow of an earlier round, whose port a socket gets again, would go where that went.
fn ask(c: &Cluster, world: &World, outsider: &Pod) -> anyhow::Result<Answers> {
    c.scenario.a.output("conntrack", &["--flush"])?;
    world.ask(&c.scenario, outsider)
}

fn answers_the_same(mode: Mode, own: &str, seed: u64) {
    let given = env::var("PROXY_SEED").map(|seed| seed.parse().expect("PROXY_SEED is a number"));
    let seed = given.unwrap_or(seed);
    let name = format!("random-{own}-{seed}");
    Cluster::run(&name, Variant::Nft, &[], |c| {
        let node = c.scenario.a.clone();
        let outsider = c.scenario.topology.outsider()?;
        c.scenario.serve_sources()?;
        c.scenario.client.peer()?.serve_sources(SOURCES, "client")?;
        let world = World::new(seed, &c.scenario);
        c.control.apply_all(&world.services)?;
        let own = json!({"mode": own, "socketLease": "3s"});
        let has_sockets = own["mode"] == "ebpf";
        let kube_proxy = KubeProxy::start_sharing(&c.control, &node, mode, own.clone())?;
        let its = ask(c, &world, &outsider)?;
        c.scenario.agent.read_config(kube_proxy.config());
        kube_proxy.stop()?;
        c.scenario.agent.spawn()?;
        c.scenario.agent.wait_ready()?;
        c.wait_log("what kube-proxy left is removed")?;
        let ours = ask(c, &world, &outsider)?;
        compare(&world, &its, &ours, has_sockets).with_context(|| format!("seed {seed}"))?;
        println!("seed {seed}: {} questions", ours.len());

        // And after a change, which the agent sees and the new kube-proxy finds.
        let world = world.changed(seed + 1_000, &c.scenario);
        c.control.apply_all(&world.services)?;
        c.wait_all_applied()?;
        let ours = ask(c, &world, &outsider)?;
        c.scenario.agent.stop()?;
        c.scenario.agent.text(&["cleanup"])?;
        let kube_proxy = KubeProxy::start_sharing(&c.control, &node, mode, own)?;
        let its = ask(c, &world, &outsider)?;
        compare(&world, &its, &ours, has_sockets)
            .with_context(|| format!("seed {seed}, changed"))?;
        kube_proxy.stop()
    });
}

#[test]
#[ignore = "needs root"]
fn random_services_have_the_same_rules() {
    answers_the_same(Mode::Iptables(Variant::Nft), "iptables", OF_RULES);
}

#[test]
#[ignore = "needs root and eBPF"]
fn random_services_are_served_the_same_by_both_layers() {
    answers_the_same(Mode::Iptables(Variant::Nft), "ebpf", OF_BOTH_LAYERS);
}
