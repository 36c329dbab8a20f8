//! dump, explain, plan, check, cleanup.

use anyhow::ensure;
use proxy_tests::{
    Scenario,
    scenario::{TCP, UDP, each_family, in_family, passes, reaches},
    wait_for,
};
use serde_json::json;

#[test]
#[ignore = "needs root and eBPF"]
fn dump_services_says_what_the_kernel_holds() {
    each_family("dump", |s| {
        let web = s
            .service("web", 1)
            .affinity(600)
            .spec("externalIPs", json!([s.outside(1)]))
            .endpoint(s.endpoint(&s.near))
            .endpoint(s.endpoint(&s.far));
        s.apply(&web)?;
        let (near, far) = (s.near.address(s.v6), s.far.address(s.v6));
        let backend = |address, local| json!({"address": address, "port": 8080, "local": local, "state": "ready"});
        let mut expected = json!({
            "service": "default/web:http",
            "family": if s.v6 { "IPv6" } else { "IPv4" },
            "protocol": "TCP",
            "frontends": [
                {"address": s.vip(1), "port": 80, "kind": "cluster-ip"},
                {"address": s.outside(1), "port": 80, "kind": "external-ip"},
            ],
            "backends": [backend(near, true), backend(far, false)],
            "local_backends": [],
            "session_affinity_seconds": 600,
            "internal_traffic_policy": "Cluster",
            "external_traffic_policy": "Cluster",
        });
        let mut dumped = s.dumped("default/web:http")?;
        for value in [&mut dumped, &mut expected] {
            if let Some(frontends) = value["frontends"].as_array_mut() {
                frontends.sort_by_key(ToString::to_string);
            }
        }
        assert_eq!(dumped, expected);

        // With the agent dead too.
        s.agent.kill9()?;
        let table = s.agent.text(&["dump", "services"])?;
        ensure!(
            table.contains("default/web:http") && table.contains("default/web:dns"),
            "{table}"
        );
        ensure!(
            s.services()?.as_array().is_some_and(|all| all.len() == 3),
            "{}",
            s.services()?
        );
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn every_dump_prints_tables_json_and_yaml() {
    in_family("dumps", false, &[], |s| {
        s.apply(
            &s.service("web", 1)
                .affinity(600)
                .endpoint(s.endpoint(&s.near)),
        )?;
        let peer = s.client.peer()?;
        let socket = peer.connect_tcp((s.vip(1), TCP).into())?;
        for what in [
            "services", "backends", "sockets", "affinity", "maps", "status",
        ] {
            let dump = s.agent.json(&["dump", what])?;
            let empty = dump.as_array().is_some_and(Vec::is_empty);
            ensure!(!empty && !dump.is_null(), "{what}: {dump}");
            for format in ["table", "yaml"] {
                let text = s.agent.text(&["dump", what, "-o", format])?;
                ensure!(text.lines().count() > 1, "{what} as {format}: {text}");
            }
        }
        let sockets = s.agent.text(&["dump", "sockets"])?;
        ensure!(
            sockets.contains("10.96.0.1:80") && sockets.contains("10.244.1.3:8080"),
            "{sockets}"
        );
        drop(socket);
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn explain_says_where_a_connection_goes_and_why() {
    each_family("explain", |s| {
        let web = s
            .service("web", 1)
            .endpoint(s.endpoint(&s.near))
            .endpoint(s.endpoint(&s.far));
        s.apply(&web)?;
        s.apply(&s.service("empty", 2))?;
        let client = s.client.address(s.v6).to_string();
        let explain = |number, port| {
            let to = std::net::SocketAddr::from((s.vip(number), port));
            s.agent.json(&["explain", &client, &format!("{to}/TCP")])
        };
        let why = explain(1, TCP)?;
        ensure!(
            why["verdict"] == "translate" && why["layer"] == "socket",
            "{why}"
        );
        ensure!(
            why["candidates"]
                .as_array()
                .is_some_and(|all| all.len() == 2),
            "{why}"
        );
        let refused = explain(2, TCP)?;
        ensure!(refused["verdict"] == "refuse", "{refused}");
        let unknown = explain(1, UDP)?;
        ensure!(
            unknown["verdict"] == "refuse" && unknown["frontend"].is_null(),
            "{unknown}"
        );
        let foreign = explain(3, TCP)?;
        ensure!(foreign["verdict"] == "pass", "{foreign}");
        let usage = s.agent.run(&["explain", &client, "nonsense"])?;
        ensure!(usage.status.code() == Some(64), "{usage:?}");
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn plan_and_check_tell_drift_from_its_absence() {
    in_family("plan", false, &[], |s| {
        s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.near)))?;
        s.settle_packets()?;
        let manifests = s.manifests.dir().to_string_lossy().into_owned();
        let code = |s: &Scenario, verb: &str| -> anyhow::Result<(Option<i32>, String)> {
            let output = s.agent.run(&[verb, "--manifests", &manifests])?;
            let text = [output.stdout, output.stderr].concat();
            Ok((
                output.status.code(),
                String::from_utf8_lossy(&text).into_owned(),
            ))
        };
        for verb in ["plan", "check"] {
            let (exit, text) = code(s, verb)?;
            ensure!(exit == Some(0), "{verb}: {exit:?} {text}");
        }
        s.agent.kill9()?;
        s.manifests
            .put(&s.service("web", 1).endpoint(s.endpoint(&s.far)))?;
        for verb in ["plan", "check"] {
            let (exit, text) = code(s, verb)?;
            ensure!(
                exit == Some(2) && text.contains("default/web") && text.contains("packet"),
                "{verb}: {exit:?} {text}"
            );
        }
        // Both only looked.
        reaches(&s.client.peer()?, s.vip(1), &["near"])
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn cleanup_removes_hooks_and_pins_once_the_agent_is_gone() {
    each_family("cleanup", |s| {
        s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.near)))?;
        let refused = s.agent.run(&["cleanup"])?;
        ensure!(refused.status.code() == Some(1), "{refused:?}");
        reaches(&s.client.peer()?, s.vip(1), &["near"])?;
        s.agent.stop()?;
        reaches(&s.client.peer()?, s.vip(1), &["near"])?;
        s.agent.text(&["cleanup"])?;
        ensure!(
            !s.a.bpf_dir().exists(),
            "{} is still there",
            s.a.bpf_dir().display()
        );
        passes(&s.client.peer()?, (s.vip(1), TCP).into())?;
        s.agent.text(&["cleanup"]).map(drop)
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn health_and_metrics_are_served() {
    in_family("health", false, &[], |s| {
        s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.near)))?;
        for path in ["/readyz", "/livez", "/healthz"] {
            let (status, body) = s.a.place().http_get(proxy_tests::agent::HEALTHZ, path)?;
            ensure!(status == 200, "{path}: {status} {body}");
        }
        reaches(&s.client.peer()?, s.vip(1), &["near"])?;
        s.agent
            .wait_metric("proxy_agent_connections_total", "", |count| count >= 40.0)?;
        s.agent
            .wait_metric("proxy_agent_sync_duration_seconds_count", "", |count| {
                count >= 1.0
            })?;
        s.agent
            .wait_metric("proxy_agent_changes_pending", "", |pending| pending == 0.0)?;
        s.agent
            .wait_metric("proxy_agent_mode_info", "socket=\"ebpf\"", |one| one == 1.0)?;
        s.agent
            .wait_metric("proxy_agent_map_capacity", "", |sum| sum > 0.0)?;
        s.agent
            .wait_metric("proxy_agent_map_entries", "", |sum| sum > 0.0)
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn an_agent_without_its_first_complete_sync_is_not_ready() {
    in_family("not-ready", false, &[], |s| {
        s.agent.stop()?;
        std::fs::remove_dir_all(s.manifests.dir())?;
        s.agent.spawn()?;
        // Either it says that it is not ready, or it says why it cannot be.
        wait_for(
            "it is not ready",
            std::time::Duration::from_secs(10),
            || {
                let answer = s.a.place().http_get(proxy_tests::agent::HEALTHZ, "/readyz");
                let ended = s.agent.log().contains("manifests");
                ensure!(
                    ended || answer.is_ok_and(|(status, _)| status == 503),
                    "{}",
                    s.agent.log()
                );
                Ok(())
            },
        )
    });
}
