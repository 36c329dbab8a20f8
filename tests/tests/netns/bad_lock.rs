//! Somebody holds the lock of the legacy tools for ever: what needs no rules is served, and who holds it is named. (The nft
//! variant has no lock.)

use std::{fs::File, net::IpAddr, path::Path};

use anyhow::{Context as _, ensure};
use nix::fcntl::{Flock, FlockArg};
use proxy_tests::{
    Scenario,
    agent::HEALTHZ,
    bystander::{Bystanders, web},
    kube::Variant,
    scenario::{SOON, TCP, TCP_TARGET, in_mode},
    tools::Tools,
    wait_for,
};

/// The file that every legacy tool locks.
const LOCK: &str = "/run/xtables.lock";

/// Locks the file for this process.
fn lock(file: &Path) -> anyhow::Result<Flock<File>> {
    Flock::lock(
        File::options().write(true).open(file)?,
        FlockArg::LockExclusive,
    )
    .map_err(|(_, errno)| errno)
    .context("the lock of a test")
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_lock_held_for_ever_is_told_with_its_holder_and_holds_up_nothing_but_rules() {
    for mode in ["iptables", "ebpf"] {
        held(mode).unwrap_or_else(|error| panic!("{mode}: {error:?}"));
    }
}

fn held(mode: &str) -> anyhow::Result<()> {
    let mut s = Scenario::without_agent(&format!("bad-lock-{mode}"), false, &in_mode(mode))?;
    Variant::Legacy.hint(&s.a)?;
    // The agent and its tools see a lock of their own there.
    let own = s.topology.state_dir().join("lock");
    File::create(&own)?;
    File::options().append(true).create(true).open(LOCK)?;
    let tools = Tools::new(s.topology.state_dir().join("tools"), &mut s.agent)?;
    tools.show(&own, LOCK, &mut s.agent)?;
    let holder = format!("process {}", std::process::id());
    let has_sockets = mode == "ebpf";
    let pod = s.client.peer()?;
    let reach = |cluster_ip: IpAddr| {
        wait_for("the socket layer serves", SOON, || {
            Ok(pod.ask_tcp((cluster_ip, TCP).into())?)
        })
    };

    let lock_at_start = lock(&own)?;
    s.agent.spawn()?;
    s.manifests.put(&web(&s, 1, TCP_TARGET))?;
    if has_sockets {
        reach(s.vip(1))?;
    }
    wait_for("the holder is named", SOON, || {
        let (status, body) = s.a.place().http_get(HEALTHZ, "/readyz")?;
        ensure!(status == 503 && body.contains(&holder), "{status} {body}");
        Ok(())
    })?;
    drop(lock_at_start);
    s.agent.wait_ready_within(SOON)?;

    let bystanders = Bystanders::start(&s)?;
    bystanders.wait_served(&s, 1)?;
    let errors = || s.agent.metric("proxy_agent_sync_errors_total", "packet");
    let before = errors()?;
    let lock_later = lock(&own)?;
    s.manifests.put(&web(&s, 2, TCP_TARGET))?;
    if has_sockets {
        reach(s.vip(2))?;
    }
    wait_for("the packet layer gives up waiting", SOON, || {
        ensure!(errors()? > before);
        Ok(())
    })?;
    ensure!(s.agent.log().contains(&holder), "{}", s.agent.log());
    drop(lock_later);
    bystanders.wait_served(&s, 2)?;
    bystanders.ensure_served()
}
