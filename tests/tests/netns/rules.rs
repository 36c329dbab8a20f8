//! What the commands say of the packet layer, which has no maps.

use anyhow::{Context, ensure};
use proxy_tests::{
    Scenario, Service,
    scenario::{SOON, TCP, TCP_TARGET, in_family},
    wait_for,
};
use serde_json::Value;

const ARGS: [&str; 6] = [
    "--mode",
    "iptables",
    "--cluster-cidr",
    "10.244.0.0/16,fd00:10:244::/48",
    "--iptables-min-sync-period",
    "100ms",
];

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
