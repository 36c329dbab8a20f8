//! Tools that do not work when the agent starts, for one family or at all: what needs none of them is served, and the rest as
//! soon as they work.

use std::{fs, path::PathBuf};

use anyhow::ensure;
use proxy_tests::{
    Scenario,
    agent::HEALTHZ,
    bystander::{Bystanders, node_port, web},
    kube::Variant,
    scenario::{SOON, TCP, TCP_TARGET, fails_with, in_mode},
    tools::Tools,
    wait_for,
};

const REASON: &str = "no such luck";

/// A cluster on the nft variant whose agent, not started yet, finds these tools broken while the file is there.
fn broken(mode: &str, v6: bool, names: &[&str]) -> anyhow::Result<(Scenario, PathBuf)> {
    let mut s = Scenario::without_agent(&format!("late-tools-{mode}"), v6, &in_mode(mode))?;
    Variant::Nft.hint(&s.a)?;
    let tools = Tools::new(s.topology.state_dir().join("tools"), &mut s.agent)?;
    let bad = tools.folder().join("bad");
    for name in names {
        let fail = format!(
            "[ ! -e {} ] || {{ echo '{REASON}' >&2; exit 1; }}",
            bad.display()
        );
        tools.put(name, &format!("{fail}\nexec /usr/sbin/{name} \"$@\""))?;
    }
    fs::write(&bad, "")?;
    Ok((s, bad))
}

fn health(s: &Scenario, path: &str) -> anyhow::Result<(u16, String)> {
    s.a.place().http_get(HEALTHZ, path)
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_family_whose_tools_fail_costs_the_other_one_nothing() {
    for (mode, v6, verb) in [
        ("iptables", false, "save"),
        ("iptables", true, "restore"),
        ("ebpf", false, "restore"),
    ] {
        let served_again = || -> anyhow::Result<()> {
            let other = if v6 { "iptables" } else { "ip6tables" };
            let (mut s, bad) = broken(mode, v6, &[&format!("{other}-nft-{verb}")])?;
            s.agent.spawn()?;
            s.agent.wait_ready()?;
            let bystanders = Bystanders::start(&s)?;
            let failed = "proxy_agent_families_failed";
            ensure!(s.agent.metric(failed, "")? == 1.0);
            ensure!(s.agent.log().contains(REASON));
            let rules = || s.a.output(&format!("{other}-nft-save"), &["-t", "nat"]);
            ensure!(!rules()?.contains("KUBE-SERVICES"));
            fs::remove_file(bad)?;
            wait_for("the other family is served", SOON, || {
                ensure!(rules()?.contains("-A PREROUTING"));
                ensure!(s.agent.metric(failed, "")? == 0.0);
                Ok(())
            })?;
            s.manifests.put(&web(&s, 1, TCP_TARGET))?;
            bystanders.wait_served(&s, 1)?;
            bystanders.ensure_served()
        };
        served_again().unwrap_or_else(|error| panic!("{mode}, v6: {v6}: {error:?}"));
    }
}

#[test]
#[ignore = "needs root and eBPF"]
fn the_socket_layer_serves_while_the_tools_fail_and_rules_come_when_they_work() {
    let late = || -> anyhow::Result<()> {
        let (mut s, bad) = broken("ebpf", false, &["iptables"])?;
        let outsider = s.topology.outsider()?;
        s.agent.spawn()?;
        s.manifests.put(&web(&s, 1, TCP_TARGET))?;
        let pod = s.client.peer()?;
        let cluster_ip = (s.vip(1), TCP).into();
        wait_for("the socket layer serves", SOON, || {
            Ok(pod.ask_tcp(cluster_ip)?)
        })?;
        let (status, body) = health(&s, "/readyz")?;
        ensure!(status == 503 && body.contains("packet layer"), "{body}");
        ensure!(body.contains(REASON), "{body}");
        ensure!(health(&s, "/livez")?.0 == 200);
        let node = (s.a.address(s.v6), node_port(1)).into();
        fails_with(outsider.ask_tcp(node), libc::ECONNREFUSED)?;
        fs::remove_file(bad)?;
        s.agent.wait_ready()?;
        outsider.ask_tcp(node)?;
        Ok(())
    };
    late().unwrap_or_else(|error| panic!("{error:?}"));
}
