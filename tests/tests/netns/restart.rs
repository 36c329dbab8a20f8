//! The agent's life: dead, restarted, twice, on foreign ground.

use std::{fs, time::Duration};

use anyhow::{Context, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proxy_tests::{
    Agent, Scenario, let_run,
    scenario::{TCP, UDP, each_family, each_family_with, in_family, reaches, refuses},
};

#[test]
#[ignore = "needs root and eBPF"]
fn the_kernel_goes_on_while_the_agent_is_dead() {
    each_family("dead", |s| {
        let web = s.service("web", 1);
        s.manifests.put(&s.service("empty", 2))?;
        s.apply(&web.clone().endpoint(s.endpoint(&s.near)))?;
        s.agent.kill9()?;
        reaches(&s.client.peer()?, s.vip(1), &["near"])?;
        refuses(&s.client.peer()?, s.vip(2), TCP, UDP)?;
        s.manifests.put(&web.endpoint(s.endpoint(&s.far)))?;
        s.agent.spawn()?;
        s.agent.wait_ready()?;
        reaches(&s.client.peer()?, s.vip(1), &["far"])
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn an_agent_that_is_stopped_and_continued_loads_its_programs() {
    in_family("stopped", false, &[], |s| {
        s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.near)))?;
        s.agent.stop()?;
        s.agent.text(&["cleanup"])?;
        let log = s.agent.log().len();
        s.agent.spawn()?;
        let agent = Pid::from_raw(s.agent.pid()?.try_into()?);
        // The verifier gives up when a signal is pending, and a freezer, a debugger or a suspended machine sends these. Fewer
        // than the ten attempts at one program, and spread over the time that all of them take to load.
        for _ in 0..8 {
            let_run(Duration::from_millis(50));
            kill(agent, Signal::SIGSTOP)?;
            kill(agent, Signal::SIGCONT)?;
        }
        s.agent.wait_ready()?;
        let log = s.agent.log().split_off(log);
        ensure!(
            !log.contains("left out") && !log.contains("sync failed"),
            "{log}"
        );
        reaches(&s.client.peer()?, s.vip(1), &["near"])
    });
}

/// Paths of all maps and links that are pinned.
fn pinned(s: &Scenario) -> anyhow::Result<Vec<String>> {
    let mut paths = Vec::new();
    let mut folders = vec![s.a.bpf_dir()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else {
                paths.push(entry.path().display().to_string());
            }
        }
    }
    paths.sort();
    Ok(paths)
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_restart_adopts_what_is_there_and_writes_nothing() {
    // Without anything to warn of, whatever rights the tests have: a lower score takes CAP_SYS_RESOURCE.
    let quiet = [
        "--cluster-cidr",
        "10.244.0.0/16,fd00:10:244::/48",
        "--oom-score-adj",
        "0",
    ];
    each_family_with("adopt", &quiet, |s| {
        let web = s
            .service("web", 1)
            .endpoint(s.endpoint(&s.near))
            .endpoint(s.endpoint(&s.far));
        s.apply(&web)?;
        s.settle_packets()?;
        let state = |s: &Scenario| -> anyhow::Result<_> {
            Ok((
                pinned(s)?,
                s.services()?,
                s.agent.json(&["dump", "backends"])?,
            ))
        };
        let before = state(s)?;
        let log = s.agent.log().len();
        s.agent.restart()?;
        assert_eq!(state(s)?, before);
        let log = s.agent.log().split_off(log);
        ensure!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
        let syncs = log
            .lines()
            .filter(|line| line.contains("first complete sync"));
        let idle = syncs.clone().filter(|line| line.ends_with("changes=0"));
        ensure!(syncs.count() == 2 && idle.count() == 2, "{log}");
        reaches(&s.client.peer()?, s.vip(1), &["near", "far"])
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_second_agent_on_the_same_node_is_refused() {
    in_family("second", false, &[], |s| {
        s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.near)))?;
        let ports = [
            "--healthz-bind-address",
            "127.0.0.1:1",
            "--metrics-bind-address",
            "127.0.0.1:2",
        ];
        let mut args = vec!["run", "--manifests"];
        let manifests = s.manifests.dir().display().to_string();
        args.push(&manifests);
        args.extend(ports);
        let output = s.agent.run(&args)?;
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        ensure!(
            output.status.code() == Some(1) && text.contains("stop it first"),
            "{text}"
        );
        reaches(&s.client.peer()?, s.vip(1), &["near"])
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn two_nodes_on_one_kernel_do_not_disturb_each_other() {
    in_family("two-nodes", false, &[], |s| {
        let _other = Agent::start(&s.b, &s.manifests, &[])?;
        let web = s.service("web", 1).spec("internalTrafficPolicy", "Local");
        s.apply(
            &web.endpoint(s.endpoint(&s.near))
                .endpoint(s.endpoint(&s.far)),
        )?;
        reaches(&s.client.peer()?, s.vip(1), &["near"])?;
        reaches(&s.far.peer()?, s.vip(1), &["far"])?;
        s.agent.stop()?;
        s.agent.text(&["cleanup"])?;
        reaches(&s.far.peer()?, s.vip(1), &["far"])
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_foreign_map_in_our_place_is_replaced_and_told_and_not_written() {
    each_family("foreign", |s| {
        s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.near)))?;
        s.agent.stop()?;
        let maps = pinned(s)?;
        let path = |name: &str| {
            let found = maps.iter().find(|path| path.ends_with(&format!("/{name}")));
            found.with_context(|| format!("no {name} in {maps:?}"))
        };
        // Another map of ours, of another type and size, under the name of SERVICES.
        let (services, frontends) = (path("SERVICES")?, path("FRONTENDS")?);
        let aside = format!("{services}-aside");
        fs::rename(services, &aside)?;
        fs::rename(frontends, services)?;
        s.agent.spawn()?;
        s.agent.wait_ready()?;
        reaches(&s.client.peer()?, s.vip(1), &["near"])?;
        let log = s.agent.log();
        ensure!(log.contains("SERVICES"), "{log}");
        s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.far)))?;
        reaches(&s.client.peer()?, s.vip(1), &["far"])
    });
}
