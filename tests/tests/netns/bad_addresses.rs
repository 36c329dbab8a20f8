//! An address of the node that vanishes while rules that name it are being written.

use std::{fs, net::IpAddr};

use anyhow::ensure;
use proxy_tests::{
    Scenario,
    bystander::{Bystanders, node_port, web},
    kube::Variant,
    scenario::{SOON, TCP_TARGET, in_mode},
    tools::Tools,
    wait_for,
};

/// What node ports are served on: the network of the nodes.
const NODES: [&str; 2] = ["192.168.77.0/24", "fd00:192:168:77::/64"];

#[test]
#[ignore = "needs root and eBPF"]
fn an_address_that_vanishes_in_a_sync_costs_the_others_nothing_and_may_come_back() {
    for (mode, v6, variant) in [
        ("iptables", false, Variant::Nft),
        ("iptables", true, Variant::Legacy),
        ("ebpf", false, Variant::Legacy),
        ("ebpf", true, Variant::Nft),
    ] {
        vanish(mode, v6, variant)
            .unwrap_or_else(|error| panic!("{mode}, {variant:?}, {v6}: {error:?}"));
    }
}

fn vanish(mode: &str, v6: bool, variant: Variant) -> anyhow::Result<()> {
    let nodes = ["--nodeport-addresses", NODES[usize::from(v6)]];
    let args = [&in_mode(mode)[..], &nodes].concat();
    let mut s = Scenario::without_agent(&format!("bad-addresses-{mode}"), v6, &args)?;
    variant.hint(&s.a)?;
    let (address, length): (IpAddr, u8) = match v6 {
        false => ("192.168.77.200".parse()?, 24),
        true => ("fd00:192:168:77::200".parse()?, 64),
    };
    let change = |verb: &str| format!("addr {verb} {address}/{length} dev eth0");
    let nodad = if v6 { " nodad" } else { "" };
    let add = format!("{}{nodad}\n", change("add"));
    s.a.ip(&add)?;
    // Just before the rules go in.
    let tools = Tools::new(s.topology.state_dir().join("tools"), &mut s.agent)?;
    let (vanish, gone) = (tools.folder().join("vanish"), tools.folder().join("gone"));
    let family = if v6 { "ip6tables" } else { "iptables" };
    let restore = format!("{family}-{}-restore", variant.name());
    tools.put(
        &restore,
        &format!(
            "[ ! -e {vanish} ] || {{ mv {vanish} {gone}; ip {}; }}\nexec /usr/sbin/{restore} \"$@\"",
            change("del"),
            vanish = vanish.display(),
            gone = gone.display(),
        ),
    )?;
    s.agent.spawn()?;
    s.agent.wait_ready()?;
    let bystanders = Bystanders::start(&s)?;
    let reach = |number| {
        let to = (address, node_port(number)).into();
        let outsider = bystanders.outsider();
        wait_for("the address serves", SOON, || Ok(outsider.ask_tcp(to)?))
    };
    s.manifests.put(&web(&s, 1, TCP_TARGET))?;
    reach(1)?;
    let names_it = || -> anyhow::Result<bool> {
        let save = format!("{family}-{}-save", variant.name());
        Ok(s.a
            .output(&save, &["-t", "nat"])?
            .contains(&address.to_string()))
    };
    ensure!(names_it()?);

    fs::write(&vanish, "")?;
    s.manifests.put(&web(&s, 2, TCP_TARGET))?;
    bystanders.wait_served(&s, 2)?;
    wait_for("no rule names it", SOON, || {
        ensure!(gone.exists() && !names_it()?);
        Ok(())
    })?;
    s.manifests.put(&web(&s, 3, TCP_TARGET))?;
    bystanders.wait_served(&s, 3)?;

    s.a.ip(&add)?;
    reach(3)?;
    ensure!(s.agent.metric("proxy_agent_sync_errors_total", "")? == 0.0);
    bystanders.ensure_served()
}
