//! Two real nodes: containerd and kubelet run the pods, the scheduler and the controllers make them, and the agent is deployed
//! as its users would.

mod beside;
mod cluster;

use std::{
    collections::BTreeSet,
    fs, io,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proxy_tests::{
    Endpoint, Service,
    scenario::{OFTEN, SOON, UDP, UDP_TARGET},
    wait_for,
};

use self::cluster::{Nodes, RealPod, Traffic};
use crate::{cluster::assert_none_failed, deploy::deploy};

const DNS: &str = include_str!("nodes/coredns.yaml");
const PODS: &str = include_str!("nodes/pods.yaml");
const MESH: &str = include_str!("nodes/mesh.yaml");
/// Where the pods `web` answer with their names: their port, that of the Service, and that of the nodes.
const TARGET: u16 = 9000;
const PORT: u16 = 81;
const NODE_PORT: u16 = 30_081;
const AGENT: &str = "daemonset/proxy-agent";
const KUBE_PROXY: &str = "daemonset/kube-proxy";
const SYSTEM: &str = "--namespace=kube-system";

#[test]
#[ignore = "needs root and eBPF"]
fn real_nodes_are_served_by_the_daemonset() {
    let nodes = Nodes::start().unwrap_or_else(|error| panic!("{error:?}"));
    serve(&nodes).unwrap_or_else(|error| panic!("{error:?}"));
}

fn serve(nodes: &Nodes) -> anyhow::Result<()> {
    let control = &nodes.control;
    nodes.apply_kubeadms_kube_proxy()?;
    // CoreDNS finds the API server by its Service.
    control.apply_manifests(DNS)?;
    control.apply_manifests(PODS)?;
    nodes.wait_rolled_out(SYSTEM, "deployment/coredns")?;
    for pods in ["daemonset/web", "daemonset/client"] {
        nodes.wait_rolled_out("--namespace=default", pods)?;
    }
    let (clients, servers) = (nodes.enter("app=client")?, nodes.enter("app=web")?);
    for server in &servers {
        let any = |port| SocketAddr::new(IpAddr::from([0_u16; 8]), port);
        server.peer.serve_tcp(any(TARGET), &server.name)?;
        server.peer.serve_udp(any(UDP_TARGET), &server.name)?;
    }
    let traffic = Traffic {
        clients: &clients,
        nodes,
        outsider: nodes.topology.outsider()?.peer()?,
        vips: nodes
            .vips("web")?
            .into_iter()
            .map(|vip| (vip, PORT).into())
            .collect(),
    };
    names_lead_to_pods(nodes, &clients, &servers)?;
    kubeadms_daemonset_goes_on_with_another_image_and_back(nodes, &traffic)?;
    beside::the_agent_comes(nodes, &traffic)?;
    names_lead_to_pods(nodes, &clients, &servers)?;
    connected_sockets_hear_of_removed_endpoints(nodes, &clients[0], &servers)?;
    a_pod_opts_out(nodes)?;
    a_rolling_update_fails_nobody(nodes, &traffic)?;
    a_deleted_agent_fails_nobody(nodes, &traffic)?;
    connected_sockets_hear_of_removed_endpoints(nodes, &clients[1], &servers)?;
    a_hung_agent_is_restarted(nodes, &traffic)?;
    agrees_with_its_check(nodes)?;
    beside::kube_proxy_comes_back(nodes, &traffic)?;
    names_lead_to_pods(nodes, &clients, &servers)
}

/// By the DNS of the cluster, in both families, wherever client and server are.
fn names_lead_to_pods(
    nodes: &Nodes,
    clients: &[RealPod],
    servers: &[RealPod],
) -> anyhow::Result<()> {
    let wanted: BTreeSet<_> = servers.iter().map(|pod| pod.name.clone()).collect();
    for client in clients {
        for family in ["--ipv4", "--ipv6"] {
            let names = ["http://web", "http://web.default.svc.cluster.local"];
            let often: Vec<&str> = names.into_iter().cycle().take(OFTEN).collect();
            // A pod that is ready is known to every proxy a moment later.
            wait_for("both pods answer", SOON, || {
                let said = nodes.get(client, &[&[family][..], &often].concat())?;
                let who: BTreeSet<_> = said.lines().map(str::to_owned).collect();
                ensure!(who == wanted, "{} on {}: {who:?}", client.name, client.node);
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// Sockets of a pod that are connected to a Service's address.
fn connected_sockets_hear_of_removed_endpoints(
    nodes: &Nodes,
    client: &RealPod,
    servers: &[RealPod],
) -> anyhow::Result<()> {
    let vip = IpAddr::from([10, 96, 0, 77]);
    let to = SocketAddr::from((vip, UDP));
    let only = |server: &RealPod| {
        let of_family = server.addresses.iter().filter(|address| address.is_ipv4());
        let endpoints = of_family.map(|address| Endpoint::new(*address, &server.node));
        Service::new("names", &[vip])
            .port("dns", "UDP", UDP, UDP_TARGET)
            .endpoints(endpoints)
    };
    let mut times = Vec::new();
    for pair in [0, 1].repeat(3).windows(2) {
        let (now, next) = (&servers[pair[0]], &servers[pair[1]]);
        nodes.control.apply(&only(now))?;
        let socket = wait_for("the endpoint answers", SOON, || {
            let socket = client.peer.open_udp_for(to)?;
            socket.connect(to)?;
            let who = socket.ask()?;
            ensure!(who == now.name, "{who} answers");
            Ok(socket)
        })?;
        nodes.control.apply(&only(next))?;
        let start = Instant::now();
        let error = socket
            .receive(Duration::from_secs(5))
            .expect_err("nobody answers any more");
        times.push(start.elapsed());
        ensure!(
            error.kind() != io::ErrorKind::WouldBlock,
            "no error: {times:?}"
        );
    }
    nodes.control.delete("names")?;
    times.sort();
    println!("{}: errors after {times:?}", client.node);
    let median = times[times.len() / 2];
    ensure!(median <= Duration::from_millis(100), "{times:?}");
    Ok(())
}

/// The image of kube-proxy's pods becomes ours, and theirs again.
fn kubeadms_daemonset_goes_on_with_another_image_and_back(
    nodes: &Nodes,
    traffic: &Traffic,
) -> anyhow::Result<()> {
    let loads = traffic.start()?;
    let patch = deploy("overlays/kubeadm/swap.yaml").display().to_string();
    let steps = [
        ["patch", "daemonset", "kube-proxy", "--patch-file", &patch],
        [
            "rollout",
            "undo",
            "daemonset",
            "kube-proxy",
            "--to-revision=1",
        ],
    ];
    for step in steps {
        nodes.control.kubectl(&[&[SYSTEM][..], &step].concat())?;
        nodes.wait_rolled_out(SYSTEM, KUBE_PROXY)?;
    }
    assert_none_failed(loads).context("swap")
}

/// By its annotation, once the agents may read pods.
fn a_pod_opts_out(nodes: &Nodes) -> anyhow::Result<()> {
    let overlay = deploy("overlays/opt-out").display().to_string();
    nodes.control.kubectl(&["apply", "--kustomize", &overlay])?;
    nodes.wait_rolled_out(SYSTEM, AGENT)?;
    nodes.control.apply_manifests(MESH)?;
    nodes.wait_rolled_out("--namespace=default", "daemonset/mesh")?;
    let (clients, meshes) = (nodes.enter("app=client")?, nodes.enter("app=mesh")?);
    for (client, mesh) in clients.iter().zip(&meshes) {
        let before = nodes.opted_out(&client.node)?;
        nodes.get(client, &["http://web"])?;
        ensure!(nodes.opted_out(&client.node)? == before, "{}", client.name);
        nodes.get(mesh, &["http://web"])?;
        let after = nodes.opted_out(&mesh.node)?;
        ensure!(after > before, "{}: {before} and {after}", mesh.name);
    }
    nodes.control.kubectl(&["delete", "daemonset", "mesh"])?;
    Ok(())
}

/// To the agent of the next release, whose maps are others.
fn a_rolling_update_fails_nobody(nodes: &Nodes, traffic: &Traffic) -> anyhow::Result<()> {
    let loads = traffic.start()?;
    let before = agents(nodes)?;
    let image = "*=localhost/proxy-agent:next";
    nodes
        .control
        .kubectl(&[SYSTEM, "set", "image", AGENT, image])?;
    nodes.wait_rolled_out(SYSTEM, AGENT)?;
    ensure!(
        before.is_disjoint(&agents(nodes)?),
        "an agent is the former one"
    );
    assert_none_failed(loads).context("rolling update")
}

fn a_deleted_agent_fails_nobody(nodes: &Nodes, traffic: &Traffic) -> anyhow::Result<()> {
    let loads = traffic.start()?;
    let before = agents(nodes)?;
    for pod in &before {
        nodes.control.kubectl(&[SYSTEM, "delete", "pod", pod])?;
        nodes.wait_rolled_out(SYSTEM, AGENT)?;
    }
    ensure!(
        before.is_disjoint(&agents(nodes)?),
        "an agent is the former one"
    );
    assert_none_failed(loads).context("deleted agents")
}

fn agents(nodes: &Nodes) -> anyhow::Result<BTreeSet<String>> {
    let pods = nodes.pods(SYSTEM, "app.kubernetes.io/name=proxy-agent")?;
    let names = pods
        .iter()
        .filter_map(|pod| pod["metadata"]["name"].as_str());
    Ok(names.map(str::to_owned).collect())
}

/// Kubelet asks /livez, and waits a minute before it believes the silence.
fn a_hung_agent_is_restarted(nodes: &Nodes, traffic: &Traffic) -> anyhow::Result<()> {
    let loads = traffic.start()?;
    let pods = nodes.pods(SYSTEM, "app.kubernetes.io/name=proxy-agent")?;
    let pod = &pods[1];
    for process in nodes.processes(pod)? {
        let name = fs::read_to_string(format!("/proc/{process}/comm"))?;
        if name.trim() == "proxy-agent" {
            kill(Pid::from_raw(process), Signal::SIGSTOP)?;
        }
    }
    let name = pod["metadata"]["name"].as_str().context("no name")?;
    let restarted = "--for=jsonpath={.status.containerStatuses[0].restartCount}=1";
    let pod = format!("pod/{name}");
    nodes
        .control
        .kubectl(&[SYSTEM, "wait", restarted, &pod, "--timeout=180s"])?;
    nodes.wait_rolled_out(SYSTEM, AGENT)?;
    assert_none_failed(loads).context("hung agent")
}

/// The agent's own tool, in its pod.
fn agrees_with_its_check(nodes: &Nodes) -> anyhow::Result<()> {
    let config = "--config=/var/lib/kube-proxy/config.conf";
    for pod in agents(nodes)? {
        let args = [SYSTEM, "exec", &pod, "--", "proxy-agent", "check", config];
        nodes
            .control
            .kubectl(&args)
            .with_context(|| nodes.state())?;
    }
    Ok(())
}
