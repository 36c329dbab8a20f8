//! Random Services: the real kube-proxy and the agent, one after the other on the same node, answer every question the same.
//!
//! A seed that fails is run again by `PROXY_SEED=N cargo xtask test --level kube random`; `cargo xtask fuzz-diff` goes on
//! with others. What differs is shrunk before it is printed.

use std::{
    collections::BTreeMap,
    env, mem,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use proxy_tests::{
    Endpoint, Pod, Service,
    differential::{Answer, Answers, Comparison, World, serve_unallocated},
    kube::{KubeProxy, Mode, Variant},
    scenario::{OFTEN, SOON, SOURCES, TCP_TARGET, who_tcp},
    wait_for,
};
use serde_json::json;

use crate::cluster::{Cluster, VIPS};

/// What every run of the tests tries, unless PROXY_SEED says otherwise.
const SEEDS: [u64; 2] = [1, 2];
/// Then the smallest world so far is printed.
const SHRINK: Duration = Duration::from_secs(300);
/// A cluster in which worlds are tried.
struct Trial<'a> {
    c: &'a mut Cluster,
    outsider: Pod,
    /// How often the Service that shows who has seen what was changed.
    marks: u16,
    /// The world's Services that there are, as [`World::made`] has them.
    made: BTreeMap<String, u8>,
}

impl Trial<'_> {
    /// Brings the world to a moment, and waits until whoever serves the node has seen all of it.
    fn apply(&mut self, world: &World, moment: usize) -> anyhow::Result<()> {
        self.change(world, moment)?;
        self.marks += 1;
        let s = &self.c.scenario;
        // Services and slices come by two ways, and each family and layer is written by itself: a mark in all of them.
        let pod = if self.marks.is_multiple_of(2) {
            &s.near
        } else {
            &s.far
        };
        let (port, node_port) = (1_000 + self.marks, 31_500 + self.marks);
        let vips = VIPS.map(|vip| vip.parse().expect("an address"));
        let node = s.endpoint(pod).node().to_owned();
        let mark = Service::new("mark", &vips)
            .port("http", "TCP", port, TCP_TARGET)
            .node_port(node_port)
            .endpoints([false, true].map(|v6| Endpoint::new(pod.address(v6), &node)));
        self.c.control.apply(&mark)?;
        let (client, outsider) = (s.client.peer()?, self.outsider.peer()?);
        let vips = vips.map(|vip: IpAddr| (&client, SocketAddr::new(vip, port)));
        let nodes = [false, true].map(|v6| (&outsider, (s.a.address(v6), node_port).into()));
        for (peer, to) in vips.into_iter().chain(nodes) {
            wait_for("the mark is served", SOON, || {
                let who = who_tcp(peer, to, OFTEN)?;
                ensure!(who == [pod.name().to_owned()].into(), "{who:?}");
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Brings the world to a moment: whoever has to go gives way first.
    fn change(&mut self, world: &World, moment: usize) -> anyhow::Result<()> {
        let made = world.made(moment);
        let before = mem::replace(&mut self.made, made.clone());
        let is_gone = |(name, number): &(String, u8)| made.get(name) != Some(number);
        for (name, _) in before.into_iter().filter(is_gone) {
            self.c.control.delete(&name)?;
        }
        let services = world.services(moment, &self.c.scenario);
        self.c.control.apply_all(&services)
    }

    /// Asks everything. A UDP flow of an earlier round, whose port a socket gets again, would go where that went.
    fn ask(&self, world: &World, moment: usize) -> anyhow::Result<Answers> {
        self.c.scenario.a.output("conntrack", &["--flush"])?;
        let start = Instant::now();
        let answers = world.ask(moment, &self.c.scenario, &self.outsider)?;
        println!(
            "moment {moment}: {} questions, {:?}",
            answers.len(),
            start.elapsed()
        );
        Ok(answers)
    }

    /// All questions at all moments: kube-proxy goes through them from the first to the last, the agent from there back.
    fn ask_both(&mut self, world: &World, mode: Mode, own: &str) -> anyhow::Result<Vec<String>> {
        let node = self.c.scenario.a.clone();
        let config = json!({"mode": own});
        self.change(world, 0)?;
        let kube_proxy = KubeProxy::start_sharing(&self.c.control, &node, mode, config)?;
        let mut its = Vec::new();
        for moment in 0..world.moments() {
            self.apply(world, moment)?;
            let answers = self.ask(world, moment)?;
            ensure_way_to_nobody(&answers, mode)?;
            let undisputed = match world.undisputed(moment) {
                Some(world) => {
                    self.apply(&world, moment)?;
                    self.ask(&world, moment)?
                }
                None => Answers::new(),
            };
            its.push((answers, undisputed));
        }
        let agent = &mut self.c.scenario.agent;
        agent.read_config(kube_proxy.config());
        kube_proxy.stop()?;
        agent.spawn()?;
        agent.wait_ready()?;
        let mut found = Vec::new();
        for moment in (0..world.moments()).rev() {
            self.apply(world, moment)?;
            let ours = self.ask(world, moment)?;
            let comparison = Comparison {
                has_sockets: own == "ebpf",
                mode,
            };
            let (its, undisputed) = &its[moment];
            let differences = comparison.differences(its, undisputed, &ours);
            found.extend(
                differences
                    .iter()
                    .map(|it| format!("moment {moment}, {it}")),
            );
        }
        Ok(found)
    }

    /// Leaves nothing of a world, whatever became of it.
    fn clear(&mut self) -> anyhow::Result<()> {
        let agent = &mut self.c.scenario.agent;
        if agent.pid().is_ok() {
            agent.stop()?;
        }
        agent.text(&["cleanup"])?;
        let names = mem::take(&mut self.made).into_keys();
        // One that was not made after all keeps no other.
        let deleted = names.map(|name| self.c.control.delete(&name));
        deleted.collect::<Vec<_>>().into_iter().collect()
    }

    fn compare(&mut self, world: &World, mode: Mode, own: &str) -> anyhow::Result<Vec<String>> {
        let found = self.ask_both(world, mode, own);
        let cleared = self.clear();
        let found = found?;
        cleared.map(|()| found)
    }

    fn assert_same(&mut self, world: World, mode: Mode, own: &str) -> anyhow::Result<()> {
        let yaml = world.to_yaml(&self.c.scenario)?;
        let found = self.compare(&world, mode, own).context(yaml)?;
        if found.is_empty() {
            return Ok(());
        }
        println!("{found:#?}\nshrinking");
        let end = Instant::now() + SHRINK;
        let mut last = found;
        let small = world.shrink(|world| {
            if Instant::now() > end {
                return false;
            }
            let found = self.compare(world, mode, own).unwrap_or_else(|error| {
                println!("not tried: {error:?}");
                Vec::new()
            });
            let fails = !found.is_empty();
            if fails {
                last = found;
            }
            fails
        });
        bail!("{last:#?}\n{}", small.to_yaml(&self.c.scenario)?)
    }
}

/// What no Service has in the ServiceCIDRs is answered elsewhere, unless kube-proxy drops it.
fn ensure_way_to_nobody(answers: &Answers, mode: Mode) -> anyhow::Result<()> {
    let nobodys = answers
        .values()
        .filter(|(asked, _)| asked.is_served_elsewhere());
    let other = nobodys.filter(|(_, answer)| match mode {
        Mode::Nftables => *answer != Answer::Silent,
        Mode::Iptables(_) => !matches!(answer, Answer::Served { .. }),
    });
    let other: Vec<String> = other.map(|(asked, _)| asked.to_string()).collect();
    ensure!(other.is_empty(), "kube-proxy in {mode:?}: {other:#?}");
    Ok(())
}

/// Each kube-proxy against an agent in this mode.
fn answers_are_the_same(seed: u64, pairs: [(Mode, &str); 2]) {
    let given = env::var("PROXY_SEED").map(|seed| seed.parse().expect("PROXY_SEED is a number"));
    let seed = given.unwrap_or(seed);
    Cluster::run(&format!("random-{seed}"), Variant::Nft, &[], |c| {
        // Rejections are to be heard, however many there are at a time.
        for limit in ["ipv4.icmp_ratelimit", "ipv6.icmp.ratelimit"] {
            let setting = format!("net.{limit}=0");
            c.scenario.a.output("sysctl", &["-qw", &setting])?;
        }
        c.scenario.serve_sources()?;
        c.scenario.client.peer()?.serve_sources(SOURCES, "client")?;
        let outsider = c.scenario.topology.outsider()?;
        let _elsewhere = serve_unallocated(&c.scenario, &outsider)?;
        let mut trial = Trial {
            outsider,
            c,
            marks: 0,
            made: BTreeMap::new(),
        };
        for (mode, own) in pairs {
            let done = trial.assert_same(World::new(seed), mode, own);
            done.with_context(|| format!("seed {seed}, {own} against {mode}"))?;
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn random_services_are_answered_as_by_the_same_kind_of_proxy() {
    let iptables = Mode::Iptables(Variant::Nft);
    answers_are_the_same(SEEDS[0], [(iptables, "iptables"), (Mode::Nftables, "ebpf")]);
}

#[test]
#[ignore = "needs root and eBPF"]
fn random_services_are_answered_as_by_the_other_kind_of_proxy() {
    let iptables = Mode::Iptables(Variant::Nft);
    answers_are_the_same(SEEDS[1], [(iptables, "ebpf"), (Mode::Nftables, "iptables")]);
}
