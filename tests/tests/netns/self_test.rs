//! A node on which the self-test fails: not ready, with the reason, until that is mended; what works goes on meanwhile.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
};

use anyhow::{bail, ensure};
use proxy_agent::backends::ebpf::links::Hook;
use proxy_tests::{
    Scenario,
    agent::HEALTHZ,
    foreign::{Foreign, Meddling},
    scenario::{SOON, each_family, in_family, reaches},
    wait_for,
};

/// Waits until `/readyz` is 503 for a reason with all of `words`, and the log says so too.
fn wait_unready(s: &Scenario, words: &[&str]) -> anyhow::Result<()> {
    let reason = wait_for("the node is not ready", SOON, || {
        match s.a.place().http_get(HEALTHZ, "/readyz")? {
            (503, reason) if words.iter().all(|word| reason.contains(word)) => Ok(reason),
            (status, body) => bail!("/readyz without {words:?}: {status} {body}"),
        }
    })?;
    let Some(why) = reason.trim().strip_prefix("the self-test failed: ") else {
        bail!("/readyz does not say that it is the self-test: {reason}");
    };
    let log = s.agent.log();
    let told = log
        .lines()
        .any(|line| line.contains("ERROR") && line.contains("self-test") && line.contains(why));
    ensure!(told, "not in the log: {why}\n{log}");
    Ok(())
}

/// Alive, which is what keeps a kubelet from restarting it, and at work: a change arrives, old and new connections too.
fn goes_on(s: &Scenario) -> anyhow::Result<()> {
    let web = s.service("web", 1);
    for (pod, name) in [(&s.near, "near"), (&s.far, "far")] {
        s.apply(&web.clone().endpoint(s.endpoint(pod)))?;
        reaches(&s.client.peer()?, s.vip(1), &[name])?;
    }
    for path in ["/livez", "/healthz"] {
        let (status, body) = s.a.place().http_get(HEALTHZ, path)?;
        ensure!(status == 200, "{path}: {status} {body}");
    }
    Ok(())
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_cgroup_that_takes_no_child_keeps_the_node_unready_until_it_does() {
    in_family("no-child-cgroup", false, &[], |s| {
        s.agent.stop()?;
        // The agent lives outside of it: it needs a child there to test from.
        let served = s.client.place().cgroup.clone();
        let limit = served.join("cgroup.max.descendants");
        fs::write(&limit, "0")?;
        let cgroup = served.display().to_string();
        s.agent.add_flag(&format!("--cgroup={cgroup}"));
        s.agent.spawn()?;
        wait_unready(s, &["cannot make the cgroup", &cgroup, "max.descendants"])?;
        goes_on(s)?;
        fs::write(&limit, "max")?;
        s.agent.wait_ready()
    });
}

/// Somebody else's programs, each in the way of one step of the self-test, and what the agent says of it.
fn obstacles(s: &Scenario) -> [(Hook, SocketAddr, Meddling, [&'static str; 2]); 4] {
    let (canary, connect, name): (IpAddr, _, _) = match s.v6 {
        false => ([192, 0, 0, 8].into(), Hook::Connect4, Hook::GetPeerName4),
        true => (
            [0x100, 0, 0, 0, 0, 0, 0, 8].into(),
            Hook::Connect6,
            Hook::GetPeerName6,
        ),
    };
    let (asked, translated) = ((canary, 9).into(), (s.loopback(), 9).into());
    let redirect = Meddling::Redirect;
    [
        (
            connect,
            asked,
            Meddling::Refuse,
            [
                "the canary address",
                "was not translated: Operation not permitted",
            ],
        ),
        (
            connect,
            translated,
            Meddling::Refuse,
            [
                "cannot connect to the backend of the canary address",
                "Operation not permitted",
            ],
        ),
        (
            connect,
            translated,
            redirect(canary),
            [
                "the canary address",
                "was not translated: its source address is ",
            ],
        ),
        (
            name,
            asked,
            redirect(s.loopback()),
            [
                "the canary address",
                "was translated, but getpeername() shows ",
            ],
        ),
    ]
}

#[test]
#[ignore = "needs root and eBPF"]
fn somebody_elses_programs_keep_the_node_unready_until_the_last_is_gone() {
    each_family("foreign-programs", |s| {
        s.agent.stop()?;
        s.agent.text(&["cleanup"])?;
        let mut in_the_way = None;
        for (hook, at, meddling, words) in obstacles(s) {
            // The first runs before the agent's own hook, the others after it. At no time there is none of them: the one
            // before goes when its successor has come.
            let next = Foreign::attach(&s.a.cgroup(), hook, at, meddling)?;
            if in_the_way.replace(next).is_none() {
                s.agent.spawn()?;
            }
            wait_unready(s, &words)?;
        }
        goes_on(s)?;
        drop(in_the_way);
        s.agent.wait_ready()?;
        reaches(&s.client.peer()?, s.vip(1), &["far"])
    });
}
