//! The cluster of the demonstration: packaged servers in pods, one agent on each node, one folder of YAML.

use std::{fmt, time::Instant};

use anyhow::{Context, ensure};
use serde_yaml_ng::Value;

use super::{
    Mode,
    servers::{start_dns, start_web},
};
use crate::{Agent, Manifests, Node, Place, Pod, Topology, agent::METRICS};

/// The objects, as files of the folder that both agents read.
const FILES: [(&str, &str); 5] = [
    ("nodes.yaml", include_str!("../../demo/nodes.yaml")),
    ("web.yaml", include_str!("../../demo/web.yaml")),
    ("session.yaml", include_str!("../../demo/session.yaml")),
    ("kube-dns.yaml", include_str!("../../demo/kube-dns.yaml")),
    ("public.yaml", include_str!("../../demo/public.yaml")),
];
/// Which addresses are pods': clients from elsewhere are masqueraded where a policy does not forbid it.
const CLUSTER_CIDR: &str = "10.244.0.0/16,fd00:10:244::/48";

impl Mode {
    /// The agent's options.
    fn args(self) -> [&'static str; 4] {
        let mode = match self {
            Self::Ebpf => "ebpf",
            Self::Iptables => "iptables",
        };
        ["--mode", mode, "--cluster-cidr", CLUSTER_CIDR]
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.args()[1])
    }
}

/// Everything that runs. Agents first: they end before their nodes.
#[derive(Debug)]
pub(super) struct Cluster {
    pub(super) agent_a: Agent,
    pub(super) agent_b: Agent,
    pub(super) node_a: Node,
    pub(super) node_b: Node,
    pub(super) client: Pod,
    pub(super) other_client: Pod,
    /// A client outside: reaches external IPs through node-a, load-balancer IPs through node-b.
    pub(super) outsider: Pod,
    pub(super) mode: Mode,
    pods: Vec<Pod>,
    manifests: Manifests,
    topology: Topology,
}

impl Cluster {
    /// Builds it; with a name it can be kept.
    pub(super) fn start(name: Option<&str>) -> anyhow::Result<Self> {
        let mut topology = match name {
            Some(name) => Topology::named(name)
                .context("is there one from before? Remove it with: target/debug/demo --remove")?,
            None => Topology::new("demo")?,
        };
        let (node_a, node_b) = (topology.node("node-a")?, topology.node("node-b")?);
        // Addresses follow the order: .2, .3, .4 (the YAML names them).
        let (client, web_1) = (node_a.pod("client")?, node_a.pod("web-1")?);
        let dns_1 = node_a.pod("dns-1")?;
        let (web_2, web_3) = (node_b.pod("web-2")?, node_b.pod("web-3")?);
        let (dns_2, other_client) = (node_b.pod("dns-2")?, node_b.pod("client-b")?);
        let web_4 = node_b.pod("web-4")?;
        let outsider = topology.outsider()?;
        outsider.ip(&routes(&node_a, &node_b))?;
        for web in [&web_1, &web_2, &web_3, &web_4] {
            start_web(&topology, web)?;
        }
        for dns in [&dns_1, &dns_2] {
            start_dns(&topology, dns)?;
        }
        let manifests = Manifests::new(&topology.state_dir(), "manifests")?;
        for (file, text) in FILES {
            manifests.write(file, text)?;
        }
        let start = Instant::now();
        let mode = Mode::Ebpf;
        let agent_a = Agent::start(&node_a, &manifests, &mode.args())?;
        let agent_b = Agent::start(&node_b, &manifests, &mode.args())?;
        println!(
            "Both agents are ready after {:.1} s.",
            start.elapsed().as_secs_f32()
        );
        let pods = vec![web_1, dns_1, web_2, web_3, web_4, dns_2];
        Ok(Self {
            agent_a,
            agent_b,
            node_a,
            node_b,
            client,
            other_client,
            outsider,
            mode,
            pods,
            manifests,
            topology,
        })
    }

    /// Says who is where.
    pub(super) fn introduce(&self) {
        println!("\nnode    pod       address       serves");
        println!("node-a  client    {:12}  (curl, dig)", self.client.v4());
        for pod in &self.pods {
            let node = if pod.v4().octets()[2] == 1 {
                "node-a"
            } else {
                "node-b"
            };
            let server = match pod.name() {
                "web-4" => "busybox httpd; at first in no Service",
                name if name.starts_with("web") => "busybox httpd",
                _ => "dnsmasq",
            };
            println!("{node}  {:8}  {:12}  {server}", pod.name(), pod.v4());
        }
        println!("node-b  client-b  {:12}  (curl)", self.other_client.v4());
        println!(
            "outside the cluster: outsider, {} and {}; node-a is {}, node-b {}",
            self.outsider.v4(),
            self.outsider.v6(),
            self.node_a.v4(),
            self.node_b.v4()
        );
        println!("  (curl, dig); its route to external IPs is node-a, to load-balancer IPs node-b");
        println!(
            "\nBoth agents read the Services and EndpointSlices in {}:",
            self.manifests.dir().display()
        );
        println!("  {}", FILES.map(|(file, _)| file).join("  "));
        let args = self.agent_a.global_args().join(" ");
        println!(
            "  node-a$ proxy-agent {args} run --manifests {} {}",
            self.manifests.dir().display(),
            self.mode.args().join(" ")
        );
        println!(
            "\"client$\" means: in the network namespace and the cgroup of that pod. By hand:"
        );
        let Place { netns, cgroup, .. } = self.client.place();
        println!(
            "  echo $$ > {}/cgroup.procs; nsenter --net={}",
            cgroup.display(),
            netns.display()
        );
    }

    /// Takes an endpoint out of `web.yaml`, in both families' slices; `None` puts all back.
    pub(super) fn edit_web(&self, without: Option<&str>) -> anyhow::Result<()> {
        let (file, text) = FILES[1];
        let Some(pod) = without else {
            return self.manifests.write(file, text);
        };
        let mut edited = String::new();
        for document in text.split("---\n") {
            let mut object: Value = serde_yaml_ng::from_str(document)?;
            if let Some(endpoints) = object.get_mut("endpoints").and_then(Value::as_sequence_mut) {
                endpoints.retain(|endpoint| endpoint["targetRef"]["name"] != pod);
            }
            edited += "---\n";
            edited += &serde_yaml_ng::to_string(&object)?;
        }
        self.manifests.write(file, &edited)
    }

    /// Puts pod web-4 in the place of web-3 in the Services of `public.yaml`; `false` puts web-3 back.
    pub(super) fn replace_public(&self, is_replaced: bool) -> anyhow::Result<()> {
        let (file, text) = FILES[4];
        if !is_replaced {
            return self.manifests.write(file, text);
        }
        let edited = text
            .replace("[10.244.2.3]", "[10.244.2.6]")
            .replace("fd00:10:244:2::3", "fd00:10:244:2::6")
            .replace("web-3", "web-4");
        self.manifests.write(file, &edited)
    }

    /// Ends both agents, one after the other, and starts each again in another mode.
    pub(super) fn switch(&mut self, mode: Mode) -> anyhow::Result<()> {
        self.mode = mode;
        for agent in [&mut self.agent_a, &mut self.agent_b] {
            let node = agent.node().clone();
            println!("{}$ kill (the agent)", node.name());
            agent.stop()?;
            println!("{}$ proxy-agent run --mode {} ...", node.name(), mode);
            *agent = Agent::start(&node, &self.manifests, &mode.args())?;
            let (_, said) = node.place().http_get(METRICS, "/proxyMode")?;
            println!(
                "{}$ curl -s http://{METRICS}/proxyMode\n{said}",
                node.name()
            );
            ensure!(said == mode.to_string(), "/proxyMode says {said:?}");
            let hook = node.bpf_dir().join("links/connect4");
            let found = if hook.exists() { "is there" } else { "is gone" };
            println!("# {} {found}", hook.display());
            ensure!(
                hook.exists() == (mode == Mode::Ebpf),
                "in mode {mode} the hook that translates {found}"
            );
        }
        Ok(())
    }

    /// What the agents wrote.
    pub(super) fn print_logs(&self) {
        for agent in [&self.agent_a, &self.agent_b] {
            println!(
                "\nlog of the agent of {}:\n{}",
                agent.node().name(),
                agent.log()
            );
        }
    }

    /// Leaves everything up, and says how to use it.
    pub(super) fn keep(mut self) {
        println!("\nEverything stays up. To enter the client's pod:");
        let Place { netns, cgroup, .. } = self.client.place();
        println!(
            "  sh -c 'echo $$ > {}/cgroup.procs; exec nsenter --net={} sh'",
            cgroup.display(),
            netns.display()
        );
        println!("To ask the agent of node-a:");
        println!(
            "  {} {} dump services",
            self.agent_a.binary().display(),
            self.agent_a.global_args().join(" ")
        );
        println!(
            "Services to play with, and logs: {}",
            self.topology.state_dir().display()
        );
        let demo = std::env::current_exe().unwrap_or_else(|_| "demo".into());
        println!("To remove it: {} --remove", demo.display());
        self.agent_a.leave();
        self.agent_b.leave();
        self.topology.keep();
    }
}

/// Routes of the client outside, as a router in front of the nodes would have them.
fn routes(node_a: &Node, node_b: &Node) -> String {
    let (external, external_v6) = (node_a.v4(), node_a.v6());
    let (balancer, balancer_v6) = (node_b.v4(), node_b.v6());
    format!(
        "route add 203.0.113.0/24 via {external}
route add 2001:db8:1::/64 via {external_v6}
route add 198.51.100.0/24 via {balancer}
route add 2001:db8:2::/64 via {balancer_v6}
"
    )
}
