//! A small cluster whose objects come from an API server for kube-proxy, and from files for the agent.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use anyhow::{Context, ensure};
use proxy_tests::{
    Endpoint, Peer, Pod, Scenario, Service,
    kube::{ControlPlane, Variant},
    load::{LoadPlan, LoadReport, Talk},
    peer::Load,
    scenario::{OFTEN, SOON, TCP, TCP_TARGET, UDP, UDP_TARGET, fails_with, passes, who_tcp},
    wait_for,
};

pub const NODE_PORT: u16 = 30_080;
/// Of the Service that every cluster here has, in both families; not the first ones, which are the API server's.
pub const VIPS: [&str; 2] = ["10.96.0.20", "fd00:10:96::20"];

pub struct Cluster {
    // Before the topology in which it runs.
    pub control: ControlPlane,
    pub scenario: Scenario,
}

impl Cluster {
    /// One whose agent is not started; kubelet would have chosen this variant.
    pub fn start(name: &str, variant: Variant, args: &[&str]) -> anyhow::Result<Self> {
        let basic = [
            "--cluster-cidr",
            "10.244.0.0/16,fd00:10:244::/48",
            "--iptables-min-sync-period",
            "100ms",
        ];
        let scenario = Scenario::without_agent(name, false, &[&basic, args].concat())?;
        variant.hint(&scenario.a)?;
        let control = ControlPlane::start(&scenario.topology)?;
        Ok(Self { control, scenario })
    }

    /// The Service with these endpoints, for both proxies.
    pub fn apply(&self, pods: &[&Pod]) -> anyhow::Result<()> {
        let vips = VIPS.map(|vip| vip.parse().expect("an address"));
        let service = Service::new("web", &vips)
            .port("http", "TCP", TCP, TCP_TARGET)
            .node_port(NODE_PORT)
            .port("dns", "UDP", UDP, UDP_TARGET);
        let both = |pod: &&Pod| {
            let node = self.scenario.endpoint(pod).node().to_owned();
            [false, true].map(|v6| Endpoint::new(pod.address(v6), &node))
        };
        let service = service.endpoints(pods.iter().flat_map(both));
        self.scenario.manifests.put(&service)?;
        self.control.apply(&service)
    }

    /// Starts the agent as the user of this token, and waits until it serves.
    pub fn follow(&mut self, token: &str) -> anyhow::Result<()> {
        let kubeconfig = self.control.kubeconfig_of(token)?;
        self.scenario.agent.follow_api(&kubeconfig);
        self.scenario.agent.spawn()?;
        self.scenario.agent.wait_ready()
    }

    /// Where the Service is found from this node, in both families.
    pub fn targets(&self) -> Vec<SocketAddr> {
        let vips = VIPS.map(|vip| SocketAddr::new(vip.parse().expect("an address"), TCP));
        let node = [false, true].map(|v6| (self.scenario.a.address(v6), NODE_PORT).into());
        vips.into_iter().chain(node).collect()
    }

    /// Waits until exactly these pods answer the client, wherever the Service is found.
    pub fn wait_served_by(&self, pods: &[&Pod]) -> anyhow::Result<()> {
        let wanted: BTreeSet<String> = pods.iter().map(|pod| pod.name().to_owned()).collect();
        let client = self.scenario.client.peer()?;
        for target in self.targets() {
            wait_for("the endpoints answer", SOON, || {
                let who = who_tcp(&client, target, OFTEN)?;
                ensure!(who == wanted, "{target}: {who:?} instead of {wanted:?}");
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Waits until the client is refused, wherever the Service is found.
    pub fn wait_refused(&self) -> anyhow::Result<()> {
        let client = self.scenario.client.peer()?;
        for target in self.targets() {
            wait_for("the Service is refused", SOON, || {
                fails_with(client.ask_tcp(target), libc::ECONNREFUSED)
            })?;
        }
        Ok(())
    }

    /// Deletes the Service, and waits until its addresses are nobody's.
    pub fn delete(&self) -> anyhow::Result<()> {
        self.control.delete("web")?;
        let client = self.scenario.client.peer()?;
        for vip in VIPS {
            let vip = SocketAddr::new(vip.parse().expect("an address"), TCP);
            wait_for("the address is nobody's", SOON, || passes(&client, vip))?;
        }
        Ok(())
    }

    /// Who talks to the Service, and where each finds it: a pod, the node itself, and a machine outside.
    fn clients(
        &self,
        outsider: &Pod,
    ) -> anyhow::Result<[(&'static str, Peer, Vec<SocketAddr>); 3]> {
        let all = self.targets();
        let of_node = all.iter().copied().filter(|to| to.port() == NODE_PORT);
        let of_node = of_node.collect();
        Ok([
            ("pod", self.scenario.client.peer()?, all.clone()),
            ("node", self.scenario.a.peer()?, all),
            ("outside", outsider.peer()?, of_node),
        ])
    }

    /// Connections all the time, by all clients.
    pub fn load(&self, outsider: &Pod) -> anyhow::Result<Vec<(&'static str, Load)>> {
        let clients = self.clients(outsider)?.into_iter();
        clients
            .map(|(name, client, targets)| {
                let plan = LoadPlan {
                    pause: Duration::from_millis(1),
                    ..LoadPlan::new(Talk::Tcp, targets)
                };
                Ok((name, client.start_load(plan)?))
            })
            .collect()
    }

    /// Waits until the agent has written this.
    pub fn wait_log(&self, text: &str) -> anyhow::Result<()> {
        wait_for(&format!("a line with {text:?}"), SOON, || {
            let log = self.scenario.agent.log();
            ensure!(log.contains(text), "{log}");
            Ok(())
        })
    }

    /// Waits until the agent has, or has no longer, problems with the API server. Who asks a Service instead, all that time,
    /// runs out of ports.
    pub fn wait_problems(&self, limit: Duration, is_it: fn(f64) -> bool) -> anyhow::Result<()> {
        wait_for("problems with the API server, or none", limit, || {
            let count = self
                .scenario
                .agent
                .metric("proxy_agent_source_problems", "")?;
            ensure!(is_it(count), "{count} kinds are known not to be followed");
            Ok(())
        })
    }

    /// The text of all tables of this node, as the variant sees them.
    pub fn rules(&self, variant: Variant) -> anyhow::Result<String> {
        let save = |family: &str| {
            let tool = format!("{family}-{}-save", variant.name());
            self.scenario.a.output(&tool, &[])
        };
        Ok(format!("{}{}", save("iptables")?, save("ip6tables")?))
    }

    /// Whether kube-proxy's table of nftables is there, in either family.
    pub fn has_nft_table(&self) -> anyhow::Result<bool> {
        let tables = self.scenario.a.output("nft", &["list", "tables"])?;
        Ok(tables.lines().any(|table| table.ends_with(" kube-proxy")))
    }

    /// Runs `body`; a failure shows what was going on.
    pub fn run(
        name: &str,
        variant: Variant,
        args: &[&str],
        body: impl FnOnce(&mut Self) -> anyhow::Result<()>,
    ) {
        let mut cluster =
            Self::start(name, variant, args).unwrap_or_else(|error| panic!("{name}: {error:?}"));
        // The cluster is dropped by the panic, and so prints the agent's log.
        body(&mut cluster).unwrap_or_else(|error| panic!("{name}: {error:?}"));
    }
}

/// Stops the loads: nobody may have failed, and everybody must have been answered.
pub fn assert_none_failed(loads: Vec<(&'static str, Load)>) -> anyhow::Result<()> {
    let mut reports: Vec<(&str, LoadReport)> = Vec::new();
    for (name, load) in loads {
        reports.push((name, load.stop().context(name)?));
    }
    for (name, report) in &reports {
        println!(
            "{name}: {} answered, {} failed",
            report.answered(),
            report.failed
        );
    }
    let is_good = |(_, report): &(&str, LoadReport)| report.failed == 0 && report.answered() > 100;
    ensure!(reports.iter().all(is_good), "{reports:#?}");
    Ok(())
}
