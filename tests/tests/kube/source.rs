//! Services come from the API server.

use std::time::{Duration, Instant};

use anyhow::ensure;
use proxy_tests::{
    agent::HEALTHZ,
    kube::{KUBE_PROXY, NOBODY, Variant},
    scenario::SOON,
    wait_for,
};

use crate::cluster::{Cluster, assert_none_failed};

/// The longest wait between two tries is a minute.
const RECOVERY: Duration = Duration::from_secs(150);
/// Of a machine that is gone a connection is known to be dead after 45 s; here it may be busy.
const SILENCE: Duration = Duration::from_secs(60);
const MODES: [&str; 2] = ["ebpf", "iptables"];

/// A cluster whose agent follows the API server, and is not started.
fn in_each_mode(name: &str, body: impl Fn(&mut Cluster) -> anyhow::Result<()>) {
    for mode in MODES {
        let name = format!("{name}-{mode}");
        Cluster::run(&name, Variant::Nft, &["--mode", mode], |c| {
            // kube-proxy's rights are enough.
            let kubeconfig = c.control.kubeconfig_of(KUBE_PROXY)?;
            c.scenario.agent.follow_api(&kubeconfig);
            c.control.apply_node(&c.scenario.a)?;
            body(c)
        });
    }
}

#[test]
#[ignore = "needs root"]
fn services_of_the_api_server_are_served_and_followed() {
    in_each_mode("source", |c| {
        let (near, far) = (c.scenario.near.clone(), c.scenario.far.clone());
        let outsider = c.scenario.topology.outsider()?;
        c.apply(&[&near])?;
        c.scenario.agent.spawn()?;
        c.scenario.agent.wait_ready()?;
        c.wait_served_by(&[&near])?;
        let loads = c.load(&outsider)?;
        c.apply(&[&near, &far])?;
        c.wait_served_by(&[&near, &far])?;
        c.apply(&[&far])?;
        c.wait_served_by(&[&far])?;
        assert_none_failed(loads)?;
        c.apply(&[])?;
        c.wait_refused()?;
        c.apply(&[&near])?;
        c.wait_served_by(&[&near])?;
        c.delete()
    });
}

#[test]
#[ignore = "needs root"]
fn without_the_api_server_all_goes_on_and_afterwards_what_was_missed_is_made_good() {
    in_each_mode("source-gone", |c| {
        let (near, far) = (c.scenario.near.clone(), c.scenario.far.clone());
        let outsider = c.scenario.topology.outsider()?;
        c.apply(&[&near])?;
        c.scenario.agent.spawn()?;
        c.scenario.agent.wait_ready()?;
        c.wait_served_by(&[&near])?;
        let loads = c.load(&outsider)?;
        c.control.stop_api();
        c.wait_problems(SOON, |count| count > 0.0)?;
        // Nothing waits for a sync: as kube-proxy, it is healthy.
        for path in ["/healthz", "/livez"] {
            let (status, body) = c.scenario.agent.place().http_get(HEALTHZ, path)?;
            ensure!(status == 200, "{path}: {status} {body}");
        }
        // Not its client, at every try.
        let log = c.scenario.agent.log();
        ensure!(!log.contains("failed with error"), "{log}");
        // A new agent finds what the kernel holds, and deletes nothing.
        c.scenario.agent.kill9()?;
        c.scenario.agent.spawn()?;
        wait_for("the new agent says what it waits for", RECOVERY, || {
            let (status, body) = c.scenario.agent.place().http_get(HEALTHZ, "/readyz")?;
            ensure!(
                status == 503 && body.contains("waiting for the sources: "),
                "{status} {body}"
            );
            Ok(())
        })?;
        c.wait_served_by(&[&near])?;
        // What is known of the node is told all the same.
        let kubeconfig = c.control.kubeconfig_of(KUBE_PROXY)?.display().to_string();
        let checked = c
            .scenario
            .agent
            .run(&["check", "--kubeconfig", &kubeconfig])?;
        let text = String::from_utf8_lossy(&checked.stdout);
        ensure!(checked.status.code() == Some(1), "{checked:?}");
        ensure!(
            text.contains("packet layer") && text.contains("has not said within"),
            "{text}"
        );
        c.control.start_api(&[])?;
        c.scenario.agent.wait_ready_within(RECOVERY)?;
        c.apply(&[&far])?;
        c.wait_served_by(&[&far])?;
        c.wait_problems(RECOVERY, |count| count == 0.0)?;
        assert_none_failed(loads)
    });
}

/// Nothing passes between the switch, where the API server is, and the node itself; or everything does again.
fn cut(c: &Cluster, is_cut: bool) -> anyhow::Result<()> {
    let place = c.scenario.topology.switch_place()?;
    let verb = if is_cut { "-I" } else { "-D" };
    for (chain, side) in [("INPUT", "-s"), ("OUTPUT", "-d")] {
        let node = c.scenario.a.v4().to_string();
        let rule = [verb, chain, side, &node, "-j", "DROP"];
        let status = place.command("iptables")?.args(rule).status()?;
        ensure!(status.success(), "iptables {rule:?}");
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_connection_that_dies_silently_is_told_of_and_made_anew() {
    let args = ["--mode", "iptables"];
    Cluster::run("source-silent", Variant::Nft, &args, |c| {
        let (near, far) = (c.scenario.near.clone(), c.scenario.far.clone());
        let outsider = c.scenario.topology.outsider()?;
        c.control.apply_node(&c.scenario.a)?;
        c.apply(&[&near])?;
        c.follow(KUBE_PROXY)?;
        c.wait_served_by(&[&near])?;
        let loads = c.load(&outsider)?;
        cut(c, true)?;
        let since = Instant::now();
        c.wait_problems(SILENCE, |count| count >= 3.0)?;
        println!("noticed after {:?}", since.elapsed());
        let log = c.scenario.agent.log();
        ensure!(
            log.contains("what is known stays in use, trying again"),
            "{log}"
        );
        c.apply(&[&far])?;
        cut(c, false)?;
        c.wait_problems(RECOVERY, |count| count == 0.0)?;
        c.wait_served_by(&[&far])?;
        assert_none_failed(loads)
    });
}

#[test]
#[ignore = "needs root"]
fn an_api_server_without_streamed_lists_is_followed_by_pages() {
    Cluster::run("source-pages", Variant::Nft, &["--mode", "iptables"], |c| {
        let (near, far) = (c.scenario.near.clone(), c.scenario.far.clone());
        c.control.stop_api();
        c.control
            .start_api(&["--feature-gates", "WatchList=false"])?;
        c.apply(&[&near])?;
        c.scenario.agent.follow_api(&c.control.kubeconfig()?);
        c.scenario.agent.spawn()?;
        // There is no Node object of its name either.
        c.scenario.agent.wait_ready()?;
        c.wait_log("this API server is too old")?;
        c.wait_served_by(&[&near])?;
        c.apply(&[&far])?;
        c.wait_served_by(&[&far])?;
        c.delete()
    });
}

#[test]
#[ignore = "needs root"]
fn a_right_that_is_missing_is_named_with_the_rule_that_grants_it() {
    Cluster::run(
        "source-rights",
        Variant::Nft,
        &["--mode", "iptables"],
        |c| {
            c.scenario
                .agent
                .follow_api(&c.control.kubeconfig_of(NOBODY)?);
            c.scenario.agent.spawn()?;
            for rule in [
                r#"{apiGroups: [""], resources: ["services"], verbs: ["list", "watch"]}"#,
                r#"{apiGroups: ["discovery.k8s.io"], resources: ["endpointslices"], verbs: ["list", "watch"]}"#,
                r#"{apiGroups: [""], resources: ["nodes"], verbs: ["list", "watch"]}"#,
            ] {
                c.wait_log(rule)?;
            }
            Ok(())
        },
    );
}

#[test]
#[ignore = "needs root"]
fn a_kubeconfig_that_cannot_be_used_is_named() {
    Cluster::run("source-bad", Variant::Nft, &["--mode", "iptables"], |c| {
        let missing = c.scenario.topology.state_dir().join("missing");
        let output =
            c.scenario
                .agent
                .run(&["plan", "--kubeconfig", &missing.display().to_string()])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success());
        ensure!(
            said.contains("cannot use the kubeconfig") && said.contains("missing"),
            "{said}"
        );
        Ok(())
    });
}
