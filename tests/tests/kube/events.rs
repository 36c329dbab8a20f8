//! Kubernetes Events: what kube-proxy tells the cluster, and what the agent tells beyond it.

use std::net::{Ipv4Addr, TcpListener};

use anyhow::{Context, ensure};
use proxy_tests::{
    Service,
    agent::{HEALTHZ, METRICS},
    kube::{ControlPlane, KUBE_PROXY, KubeProxy, Mode, NOBODY, Variant},
    scenario::{SOON, TCP, TCP_TARGET},
    wait_for,
};
use serde_json::Value;

use crate::cluster::{Cluster, NODE_PORT};

/// A port that somebody has before a Service's health check wants it.
const TAKEN: u16 = 32_001;

/// Waits for an Event of this reason that is none of `known`.
fn next(control: &ControlPlane, reason: &str, known: &[Value]) -> anyhow::Result<Value> {
    wait_for(&format!("an Event {reason}"), SOON, || {
        let events = control.events()?;
        let name = |event: &Value| event["metadata"]["name"].clone();
        let is_new = |event: &&Value| {
            event["reason"] == reason && known.iter().all(|old| name(old) != name(event))
        };
        let found = events.iter().find(is_new).cloned();
        found.with_context(|| format!("{events:#?}"))
    })
}

/// An Event without what is of one time and one object, and who reports it without their host.
fn lasting(event: &Value) -> Value {
    let mut event = event.clone();
    event["metadata"] = serde_json::json!({"namespace": event["metadata"]["namespace"]});
    event["eventTime"] = Value::Null;
    let instance = event["reportingInstance"].as_str().unwrap_or_default();
    let is_named = instance.starts_with("kube-proxy-") && instance.len() > "kube-proxy-".len();
    event["reportingInstance"] = is_named.into();
    event
}

/// Whose health check wants a port that somebody has.
fn with_health_check(c: &Cluster) -> Service {
    let (address, name) = ("10.96.0.30".parse().expect("an address"), "checked");
    Service::new(name, &[address])
        .port("http", "TCP", TCP, TCP_TARGET)
        .node_port(NODE_PORT + 1)
        .load_balancer("198.51.100.30".parse().expect("an address"), "VIP")
        .spec("externalTrafficPolicy", "Local")
        .spec("healthCheckNodePort", TAKEN)
        .endpoint(c.scenario.endpoint(&c.scenario.near))
}

#[test]
#[ignore = "needs root"]
fn the_cluster_is_told_what_kube_proxy_tells_it() {
    Cluster::run("events", Variant::Nft, &["--mode", "iptables"], |c| {
        let node = c.scenario.a.clone();
        let _taken = node
            .place()
            .inside(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, TAKEN)))??;
        c.control.apply(&with_health_check(c))?;
        let kube_proxy = KubeProxy::start(&c.control, &node, Mode::Iptables(Variant::Nft))?;
        let reasons = ["Starting", "FailedToStartServiceHealthcheck"];
        let its = reasons.map(|reason| next(&c.control, reason, &[]));
        kube_proxy.stop()?;
        let known = c.control.events()?;
        c.follow(KUBE_PROXY)?;
        for (reason, its) in reasons.into_iter().zip(its) {
            let (its, mut ours) = (lasting(&its?), lasting(&next(&c.control, reason, &known)?));
            if reason == "Starting" {
                // By it `kubectl describe node` finds them, as kubelet's; kube-proxy 1.36 gives none.
                assert_eq!(ours["regarding"]["uid"], node.name());
                ours["regarding"]
                    .as_object_mut()
                    .context("no object")?
                    .remove("uid");
            } else {
                // Each in its own words.
                ensure!(
                    ours["note"]
                        .as_str()
                        .is_some_and(|note| note.contains("32001")),
                    "{ours:#}"
                );
                ours["note"] = its["note"].clone();
            }
            assert_eq!(ours, its, "{reason}");
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root"]
fn who_loses_an_address_and_an_agent_without_a_port_are_told_of() {
    Cluster::run("events-own", Variant::Nft, &["--mode", "iptables"], |c| {
        let node = c.scenario.a.clone();
        c.control.apply_node(&node)?;
        c.follow(KUBE_PROXY)?;
        let claim = |c: &Cluster, name, number| {
            let address = Ipv4Addr::new(10, 96, 0, number).into();
            let service = Service::new(name, &[address])
                .port("http", "TCP", TCP, TCP_TARGET)
                .spec("externalIPs", vec!["198.51.100.31"])
                .endpoint(c.scenario.endpoint(&c.scenario.near));
            c.control.apply(&service)
        };
        claim(c, "first", 31)?;
        claim(c, "second", 32)?;
        let lost = next(&c.control, "AddressTaken", &[])?;
        assert_eq!(lost["regarding"]["name"], "second");
        assert_eq!(lost["regarding"]["kind"], "Service");
        assert_eq!(
            (&lost["type"], &lost["action"]),
            (&"Warning".into(), &"Serve".into())
        );
        let note = lost["note"].as_str().unwrap_or_default();
        ensure!(
            note.contains("198.51.100.31:80") && note.contains("Service default/first has it"),
            "{note}"
        );

        // Every agent of the cluster finds the same, and tells it once for all.
        c.scenario.agent.stop()?;
        c.scenario.agent.spawn()?;
        c.scenario.agent.wait_ready()?;
        claim(c, "third", 33)?;
        let later = next(&c.control, "AddressTaken", std::slice::from_ref(&lost))?;
        assert_eq!(later["regarding"]["name"], "third");

        c.scenario.agent.stop()?;
        c.scenario.agent.add_flag("--bind-address-hard-fail");
        for (address, reason) in [
            (METRICS, "FailedToStartMetricServer"),
            (HEALTHZ, "FailedToStartProxierHealthcheck"),
        ] {
            let _taken = node.place().inside(|| TcpListener::bind(address))??;
            c.scenario.agent.spawn()?;
            let (code, log) = c.scenario.agent.wait_end()?;
            ensure!(code == Some(1), "{code:?} {log}");
            let unbound = next(&c.control, reason, &[])?;
            assert_eq!(unbound["regarding"]["name"], node.name());
            assert_eq!(
                (&unbound["type"], &unbound["action"]),
                (&"Warning".into(), &"StartKubeProxy".into())
            );
            let note = unbound["note"].as_str().unwrap_or_default();
            // At all addresses, or at this one.
            let port = format!(":{}", address.port());
            ensure!(note.contains(&port), "{note}");
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root"]
fn an_agent_that_may_not_tell_says_so_once_and_serves() {
    Cluster::run(
        "events-refused",
        Variant::Nft,
        &["--mode", "iptables"],
        |c| {
            let near = c.scenario.near.clone();
            c.control.grant(
                NOBODY,
                &[
                    ("", "services"),
                    ("", "nodes"),
                    ("discovery.k8s.io", "endpointslices"),
                ],
            )?;
            c.control.apply(&with_health_check(c))?;
            c.apply(&[&near])?;
            let _taken = c
                .scenario
                .a
                .place()
                .inside(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, TAKEN)))??;
            c.follow(NOBODY)?;
            c.wait_served_by(&[&near])?;
            let refused = r#"{apiGroups: ["events.k8s.io"], resources: ["events"], verbs: ["create", "patch"]}"#;
            c.wait_log(refused)?;
            c.wait_log("load balancers get no answer")?;
            c.apply(&[])?;
            c.wait_refused()?;
            let log = c.scenario.agent.log();
            ensure!(log.matches(refused).count() == 1, "{log}");
            ensure!(c.control.events()?.is_empty());
            Ok(())
        },
    );
}
