//! The cluster of the demonstration: packaged servers in pods, one agent on each node, one folder of YAML.

use std::{
    fs::{self, File},
    net::SocketAddr,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use serde_yaml_ng::Value;

use crate::{Agent, Manifests, Node, Place, Pod, Topology, wait_for};

/// The objects, as files of the folder that both agents read.
const FILES: [(&str, &str); 4] = [
    ("nodes.yaml", include_str!("../../demo/nodes.yaml")),
    ("web.yaml", include_str!("../../demo/web.yaml")),
    ("session.yaml", include_str!("../../demo/session.yaml")),
    ("kube-dns.yaml", include_str!("../../demo/kube-dns.yaml")),
];
const START: Duration = Duration::from_secs(10);

/// Everything that runs. Agents first: they end before their nodes.
#[derive(Debug)]
pub(super) struct Cluster {
    pub(super) agent_a: Agent,
    pub(super) agent_b: Agent,
    pub(super) node_a: Node,
    pub(super) client: Pod,
    pub(super) other_client: Pod,
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
        for web in [&web_1, &web_2, &web_3] {
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
        let agent_a = Agent::start(&node_a, &manifests, &[])?;
        let agent_b = Agent::start(&node_b, &manifests, &[])?;
        println!(
            "Both agents are ready after {:.1} s.",
            start.elapsed().as_secs_f32()
        );
        let pods = vec![web_1, web_2, web_3, dns_1, dns_2];
        Ok(Self {
            agent_a,
            agent_b,
            node_a,
            client,
            other_client,
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
            let server = if pod.name().starts_with("web") {
                "busybox httpd"
            } else {
                "dnsmasq"
            };
            println!("{node}  {:8}  {:12}  {server}", pod.name(), pod.v4());
        }
        println!(
            "\nBoth agents read the Services and EndpointSlices in {}:",
            self.manifests.dir().display()
        );
        println!("  {}", FILES.map(|(file, _)| file).join("  "));
        let args = self.agent_a.global_args().join(" ");
        println!(
            "  node-a$ proxy-agent {args} run --manifests {}",
            self.manifests.dir().display()
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

/// A web server that answers the pod's name.
fn start_web(topology: &Topology, pod: &Pod) -> anyhow::Result<()> {
    let root = topology.state_dir().join(pod.name());
    fs::create_dir_all(&root)?;
    fs::write(root.join("index.html"), format!("{}\n", pod.name()))?;
    let mut command = pod.place().command("busybox")?;
    command
        .args(["httpd", "-f", "-p", "[::]:8080", "-h"])
        .arg(&root);
    start(topology, pod, command)?;
    wait_for("the web server answers", START, || {
        let (status, body) = pod
            .place()
            .http_get(SocketAddr::from((pod.v4(), 8080)), "/")?;
        ensure!(status == 200, "{status} {body}");
        Ok(())
    })
}

/// A DNS server that knows one name, and says who it is.
fn start_dns(topology: &Topology, pod: &Pod) -> anyhow::Result<()> {
    let mut command = pod.place().command("dnsmasq")?;
    command.args([
        "--keep-in-foreground",
        "--no-resolv",
        "--no-hosts",
        "--conf-file=/dev/null",
    ]);
    command.args([
        "--user=root",
        "--pid-file=",
        "--log-facility=-",
        "--local=/cluster.local/",
    ]);
    command.arg("--host-record=web.default.svc.cluster.local,10.96.0.80,fd00:10:96::80");
    command.arg(format!("--txt-record=whoami.cluster.local,{}", pod.name()));
    start(topology, pod, command)?;
    let dig = || -> anyhow::Result<Output> {
        let mut dig = pod.place().command("dig")?;
        dig.args([
            "@127.0.0.1",
            "+short",
            "+tries=1",
            "+timeout=1",
            "TXT",
            "whoami.cluster.local",
        ]);
        Ok(dig.output()?)
    };
    wait_for("the DNS server answers", START, || {
        let output = dig()?;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stdout)
        );
        Ok(())
    })
}

fn start(topology: &Topology, pod: &Pod, mut command: Command) -> anyhow::Result<()> {
    let log = File::create(topology.state_dir().join(format!("{}.log", pod.name())))?;
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    let child = command.spawn()?;
    // The janitor ends it, by its cgroup.
    drop(child);
    Ok(())
}
