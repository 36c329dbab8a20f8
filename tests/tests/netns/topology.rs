//! The topology itself, without any agent: if these fail, the others mean nothing.

use std::{net::SocketAddr, path::Path, time::Duration};

use anyhow::ensure;
use proxy_tests::{
    Topology, left_untranslated, let_run,
    load::{LoadPlan, Talk},
    names, wait_for,
};

const FAMILIES: [bool; 2] = [false, true];

#[test]
#[ignore = "needs root"]
fn pods_of_different_nodes_reach_each_other() -> anyhow::Result<()> {
    let mut topology = Topology::new("reach")?;
    let (a, b) = (topology.node("node-a")?, topology.node("node-b")?);
    let (client, near, far) = (a.pod("client")?, a.pod("near")?, b.pod("far")?);
    for server in [&near, &far] {
        server.serve_tcp(80)?;
        server.serve_udp(53)?;
        for v6 in FAMILIES {
            let to = |port: u16| SocketAddr::from((server.address(v6), port));
            assert_eq!(client.ask_tcp(to(80))?, server.name());
            assert_eq!(client.ask_udp(to(53))?, server.name());
            assert_eq!(
                a.peer()?.ask_tcp(to(80))?,
                server.name(),
                "from the node itself"
            );
        }
    }
    Ok(())
}

/// Whatever ports its bridge has.
#[test]
#[ignore = "needs root"]
fn the_gateway_of_pods_keeps_its_link_address() -> anyhow::Result<()> {
    let mut topology = Topology::new("gateway")?;
    let (node, other) = (topology.node("node-a")?, topology.node("node-b")?);
    let (client, server) = (other.pod("client")?, node.pod("server")?);
    server.serve_tcp(80)?;
    let ask = || -> anyhow::Result<()> {
        for v6 in FAMILIES {
            let to = (server.address(v6), 80).into();
            assert_eq!(client.ask_tcp(to)?, server.name());
        }
        Ok(())
    };
    for (port, address) in [
        ("v-low", "02:00:00:00:00:01"),
        ("v-lowest", "02:00:00:00:00:00"),
    ] {
        node.ip(&format!(
            "link add {port} address {address} type veth peer name {port}-peer
link set {port} master cni0
link set {port} up
"
        ))?;
        ask()?;
    }
    node.ip("link del v-lowest\n")?;
    ask()
}

#[test]
#[ignore = "needs root"]
fn what_nobody_serves_fails_at_once_and_not_as_refused() -> anyhow::Result<()> {
    let mut topology = Topology::new("nobody")?;
    let pod = topology.node("node-a")?.pod("client")?;
    for to in ["10.96.0.10:80", "[fd00:10:96::a]:80"] {
        let error = pod.ask_tcp(to.parse()?).unwrap_err();
        assert!(left_untranslated(&error), "{to}: {error}");
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_load_counts_answers_by_server() -> anyhow::Result<()> {
    let mut topology = Topology::new("load")?;
    let pod = topology.node("node-a")?.pod("server")?;
    pod.serve_tcp(80)?;
    let plan = LoadPlan::new(
        Talk::Tcp,
        vec![(pod.v4(), 80).into(), (pod.v6(), 80).into()],
    );
    let load = pod.peer()?.start_load(plan)?;
    let_run(Duration::from_millis(500));
    let report = load.stop()?;
    assert_eq!((report.failed, report.answers.len()), (0, 1), "{report:?}");
    println!("{} connections in 0.5 s", report.answered());
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn nothing_is_left_behind() -> anyhow::Result<()> {
    let mut topology = Topology::new("gone")?;
    let node = topology.node("node-a")?;
    let pod = node.pod("server")?;
    pod.serve_tcp(80)?;
    let netns = pod.place().netns.clone();
    let paths = [netns, topology.state_dir(), node.cgroup(), node.bpf_dir()];
    assert!(paths.iter().all(|path| path.exists()), "{paths:?}");
    drop((topology, node, pod));
    let left: Vec<_> = paths.iter().filter(|path| path.exists()).collect();
    assert!(left.is_empty(), "{left:?}");
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_dead_maker_leaves_nothing_behind() -> anyhow::Result<()> {
    let mut child = std::process::Command::new(std::env::current_exe()?)
        .args(["--ignored", "--exact", "topology::waits_to_be_killed"])
        .env("PROXY_TESTS_WAIT", "1")
        .stdout(std::process::Stdio::null())
        .spawn()?;
    let netns = Path::new(names::NETNS_DIR).join(format!("pt-{}-0-node-a", child.id()));
    wait_for("the namespace", Duration::from_secs(20), || {
        ensure!(netns.exists(), "{}", netns.display());
        Ok(())
    })?;
    child.kill()?;
    child.wait()?;
    wait_for("the namespace is gone", Duration::from_secs(10), || {
        ensure!(!netns.exists(), "{}", netns.display());
        Ok(())
    })
}

/// Not a test: the victim of the one above.
#[test]
#[ignore = "needs root"]
fn waits_to_be_killed() -> anyhow::Result<()> {
    if std::env::var_os("PROXY_TESTS_WAIT").is_some() {
        let mut topology = Topology::new("victim")?;
        let _node = topology.node("node-a")?;
        let_run(Duration::from_secs(60));
    }
    Ok(())
}
