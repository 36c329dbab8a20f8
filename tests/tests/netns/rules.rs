//! What the commands say of the packet layer, which has no maps.

use std::net::SocketAddr;

use anyhow::{Context, ensure};
use proxy_tests::{
    Scenario, Service,
    scenario::{SOON, TCP, TCP_TARGET, each_family_with, in_family, in_mode},
    wait_for,
};
use serde_json::{Value, json};

const ARGS: [&str; 6] = in_mode("iptables");

/// Runs `body` in both families with an agent in iptables mode that serves a Service with affinity at `vip(1)`.
fn each_family(name: &str, body: impl Fn(&mut Scenario) -> anyhow::Result<()>) {
    for v6 in [false, true] {
        in_family(name, v6, &ARGS, |s| {
            let service = Service::new("web", &[s.vip(1)])
                .port("http", "TCP", TCP, TCP_TARGET)
                .affinity(600);
            s.manifests.put(&service.endpoint(s.endpoint(&s.near)))?;
            let vip = (s.vip(1), TCP).into();
            wait_for("the Service is served", SOON, || {
                Ok(s.client.peer()?.ask_tcp(vip)?)
            })?;
            body(s)
        });
    }
}

/// The member of an array whose members are these.
fn find<'a>(array: &'a Value, members: &[(&str, &str)]) -> anyhow::Result<&'a Value> {
    let mut all = array.as_array().context("no array")?.iter();
    all.find(|one| members.iter().all(|(name, value)| one[*name] == *value))
        .with_context(|| format!("no {members:?} in {array}"))
}

#[test]
#[ignore = "needs root"]
fn dump_rules_says_what_the_kernel_holds() {
    each_family("dump-rules", |s| {
        let family = if s.v6 { "IPv6" } else { "IPv4" };
        for is_alive in [true, false] {
            if !is_alive {
                s.agent.kill9()?;
            }
            let dump = s.agent.json(&["dump", "rules"])?;
            let nat = find(&dump["tables"], &[("table", "nat"), ("family", family)])?;
            let jump = find(&nat["jumps"], &[("chain", "OUTPUT")])?;
            ensure!(jump["rule"].to_string().contains("-j KUBE-SERVICES"));
            let services = find(&nat["chains"], &[("chain", "KUBE-SERVICES")])?;
            let vip = format!("-d {}/", s.vip(1));
            ensure!(services["rules"].to_string().contains(&vip), "{services}");
            let set = find(&dump["sets"], &[("family", family)])?;
            ensure!(set["timeout_seconds"] == 600, "{set}");
        }
        for format in ["table", "yaml"] {
            let text = s.agent.text(&["dump", "rules", "-o", format])?;
            ensure!(text.contains("KUBE-POSTROUTING"), "{format}: {text}");
        }
        let no_maps = s.agent.run(&["dump", "services"])?;
        let text = String::from_utf8_lossy(&no_maps.stderr);
        ensure!(
            no_maps.status.code() == Some(1) && text.contains("dump rules"),
            "{no_maps:?}"
        );
        Ok(())
    });
}

#[test]
#[ignore = "needs root"]
fn rules_of_services_in_the_variant_that_nobody_keeps_are_told() {
    for (kept, stale) in [("nft", "legacy"), ("legacy", "nft")] {
        let name = format!("stale-{stale}");
        let mut s = Scenario::without_agent(&name, false, &ARGS).expect("a cluster");
        let body = |s: &mut Scenario| -> anyhow::Result<()> {
            let chain = |variant: &str, args: &str| {
                s.a.output(
                    &format!("iptables-{variant}"),
                    &args.split(' ').collect::<Vec<_>>(),
                )
            };
            chain(kept, "-t mangle -N KUBE-IPTABLES-HINT")?;
            chain(stale, "-t nat -N KUBE-SERVICES")?;
            chain(stale, "-t nat -A KUBE-SERVICES -j RETURN")?;
            s.agent.spawn()?;
            s.agent.wait_ready()?;
            let told = format!("iptables-{stale} holds rules of Services");
            s.agent.wait_log(&told)?;
            let check = || -> anyhow::Result<_> {
                let output = s.agent.run(&["check"])?;
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                Ok((output.status.code(), text))
            };
            let (code, text) = check()?;
            ensure!(code == Some(2) && text.contains(&told), "{code:?} {text}");
            // What it says to do.
            let command = text
                .split_once("remove them: ")
                .and_then(|(_, rest)| rest.split_once(';'))
                .map(|(command, _)| command)
                .context("no remedy")?;
            s.a.output("sh", &["-ec", command])?;
            let (code, text) = check()?;
            ensure!(code == Some(0) && !text.contains(&told), "{code:?} {text}");
            Ok(())
        };
        body(&mut s).unwrap_or_else(|error| panic!("{name}: {error:?}\n{}", s.agent.log()));
    }
}

#[test]
#[ignore = "needs root"]
fn plan_and_check_compare_rules_and_write_none() {
    each_family("plan-rules", |s| {
        let manifests = s.manifests.dir().to_string_lossy().into_owned();
        let ask = |s: &Scenario, verb: &str| -> anyhow::Result<(Option<i32>, String)> {
            let args = [&[verb, "--manifests", &manifests], &ARGS[..]].concat();
            let output = s.agent.run(&args)?;
            let text = [output.stdout, output.stderr].concat();
            Ok((
                output.status.code(),
                String::from_utf8_lossy(&text).into_owned(),
            ))
        };
        for verb in ["plan", "check"] {
            let (code, text) = ask(s, verb)?;
            ensure!(code == Some(0), "{verb}: {code:?} {text}");
        }
        s.agent.kill9()?;
        let (family, save) = match s.v6 {
            true => ("IPv6", "ip6tables-save"),
            false => ("IPv4", "iptables-save"),
        };
        let rules = |s: &Scenario| -> anyhow::Result<Vec<String>> {
            let saved = s.a.output(save, &["-t", "nat"])?;
            let lines = saved.lines().filter(|line| line.starts_with("-A"));
            Ok(lines.map(ToOwned::to_owned).collect())
        };
        let before = rules(s)?;
        // Another port, and an endpoint that needs no chain of its own.
        let service = Service::new("web", &[s.vip(1)])
            .port("http", "TCP", TCP + 1, TCP_TARGET)
            .endpoint(s.endpoint(&s.far));
        s.manifests.put(&service)?;
        let (code, text) = ask(s, "check")?;
        let told = text.contains("packet layer's state") && text.contains("DIFFERS");
        ensure!(code == Some(2) && told, "{code:?} {text}");
        let (code, text) = ask(s, "plan")?;
        ensure!(code == Some(2), "{code:?} {text}");
        let has = |action: &str, what: &str| {
            let mut lines = text.lines().map(|line| line.split_whitespace());
            let start: Vec<&str> = ["packet", action]
                .into_iter()
                .chain(what.split(' '))
                .collect();
            lines.any(|words| {
                let words: Vec<&str> = words.collect();
                let is_of_family = words.last() == Some(&family);
                is_of_family && words.join(" ").starts_with(&start.join(" "))
            })
        };
        ensure!(has("change", "chain nat KUBE-SERVICES"), "{text}");
        ensure!(has("remove", "chain nat KUBE-SEP-"), "{text}");
        ensure!(has("remove", "set KUBE-SEP-"), "{text}");
        ensure!(rules(s)? == before, "plan writes");
        Ok(())
    });
}

/// `explain`, of a client that connects by TCP.
fn explain(s: &Scenario, client: &str, to: SocketAddr) -> anyhow::Result<Value> {
    s.agent.json(&["explain", client, &format!("{to}/tcp")])
}

/// Whether all outcomes translate, each to another of so many backends with the same chance, and whether masqueraded.
fn ensure_drawn(why: &Value, backends: usize, masqueraded: bool) -> anyhow::Result<()> {
    let outcomes = why["packet"]["outcomes"]
        .as_array()
        .with_context(|| why.to_string())?;
    let even = |outcome: &Value| {
        let chance = outcome["chance"].as_f64().unwrap_or_default();
        (chance * backends as f64 - 1.0).abs() < 0.001 && outcome["masqueraded"] == masqueraded
    };
    let is_drawn = outcomes.len() == backends && outcomes.iter().all(even);
    ensure!(why["verdict"] == "translate" && is_drawn, "{why}");
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn explain_follows_packets_through_the_rules_where_there_are_no_maps() {
    for v6 in [false, true] {
        in_family("explain-rules", v6, &ARGS, |s| {
            const NODE_PORT: u16 = 30_081;
            let outsider = s.topology.outsider()?.address(v6).to_string();
            let web = Service::new("web", &[s.vip(1)])
                .port("http", "TCP", TCP, TCP_TARGET)
                .node_port(NODE_PORT);
            let [near, far] = [&s.near, &s.far].map(|pod| s.endpoint(pod));
            s.manifests.put(&web.endpoint(near).endpoint(far))?;
            s.manifests
                .put(&Service::new("empty", &[s.vip(2)]).port("http", "TCP", TCP, TCP_TARGET))?;
            let tool = if v6 { "ip6tables" } else { "iptables" };
            let odd = "-t nat -I PREROUTING -p tcp -m multiport --dports 1,2 -j RETURN";
            s.a.output(tool, &odd.split(' ').collect::<Vec<_>>())?;
            let client = s.client.address(v6).to_string();
            let (vip, empty) = ((s.vip(1), TCP).into(), (s.vip(2), TCP).into());
            wait_for("both Services are in the rules", SOON, || {
                ensure!(explain(s, &client, vip)?["verdict"] == "translate");
                ensure!(explain(s, &client, empty)?["verdict"] == "refuse");
                Ok(())
            })?;
            let why = explain(s, &client, vip)?;
            ensure_drawn(&why, 2, false)?;
            ensure!(
                why["layer"] == "packet" && why["packet"]["interface"] == "cni0",
                "{why}"
            );
            let frontend = json!({"service": "default/web:http", "address": s.vip(1), "port": TCP, "protocol": "TCP", "kind": "cluster-ip"});
            ensure!(why["frontend"] == frontend, "{why}");
            ensure!(
                why["packet"]["foreign"].to_string().contains("multiport"),
                "{why}"
            );
            ensure_drawn(&explain(s, "host", vip)?, 2, true)?;
            let node_port = (s.a.address(v6), NODE_PORT).into();
            let why = explain(s, &outsider, node_port)?;
            ensure_drawn(&why, 2, true)?;
            ensure!(why["frontend"]["kind"] == "node-port", "{why}");
            let why = explain(s, &client, empty)?;
            let rule = &why["packet"]["outcomes"][0]["decisions"][0];
            ensure!(
                rule["rule"].to_string().contains("has no endpoints"),
                "{why}"
            );
            let to = format!("{vip}/sctp");
            let why = s.agent.json(&["explain", &client, &to])?;
            ensure!(why["verdict"] == "pass", "{why}");
            let text = s.agent.text(&["explain", &client, &vip.to_string()])?;
            ensure!(
                text.contains("a rule of somebody else: nat: -A PREROUTING"),
                "{text}"
            );
            Ok(())
        });
    }
}

#[test]
#[ignore = "needs root and eBPF"]
fn explain_follows_packets_of_whom_the_socket_layer_leaves_alone() {
    let args = ["--socket-exclude-cgroup", "pod-cl*"];
    each_family_with("explain-left", &args, |s| {
        let outsider = s.topology.outsider()?;
        let web = s.service("web", 1);
        let [near, far] = [&s.near, &s.far].map(|pod| s.endpoint(pod));
        s.apply(&web.endpoint(near).endpoint(far))?;
        s.settle_packets()?;
        let vip = (s.vip(1), TCP).into();
        // Neighbours of the node, of which no process is seen, and an endpoint of another node.
        for client in [&outsider, &s.far] {
            let why = explain(s, &client.address(s.v6).to_string(), vip)?;
            let reason = why["reason"].to_string();
            ensure!(reason.contains("no socket of this node"), "{why}");
        }
        // A process each, by which their cgroups are seen.
        let _peers = (outsider.peer()?, s.client.peer()?);
        for (client, reason) in [(&s.client, "excluded"), (&outsider, "cgroup")] {
            // By name: other clusters of this machine have the same addresses.
            let name = client.place().netns.file_name().context("no name")?;
            let why = explain(s, &name.to_string_lossy(), vip)?;
            ensure_drawn(&why, 2, false)?;
            let is_told = why["reason"].to_string().contains(reason);
            ensure!(is_told && why["layer"] == "packet", "{why}");
            ensure!(why["frontend"]["service"] == "default/web:http", "{why}");
        }
        // One that nobody here has.
        let nobody = if s.v6 {
            "2001:db8:77::7"
        } else {
            "198.51.100.77"
        };
        let why = explain(s, nobody, vip)?;
        ensure!(
            why["reason"].to_string().contains("no socket of this node"),
            "{why}"
        );
        let served = explain(s, &s.near.address(s.v6).to_string(), vip)?;
        ensure!(
            served["layer"] == "socket" && served["packet"].is_null(),
            "{served}"
        );
        Ok(())
    });
}
