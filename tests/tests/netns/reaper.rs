//! The process that ends UDP sockets of removed backends: what it may do, and how it ends.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proxy_tests::{scenario::in_family, wait_for};

const SYS_PTRACE: u32 = 19;
const SYS_ADMIN: u32 = 21;

fn process(pid: u32, file: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{file}"))
}

/// The mask of one capability set: "CapEff", "CapPrm", "CapBnd", "CapInh".
fn capabilities(pid: u32, set: &str) -> anyhow::Result<u64> {
    let status = fs::read_to_string(process(pid, "status"))?;
    let mask = status.lines().find_map(|line| line.strip_prefix(set));
    let mask = mask.and_then(|rest| rest.strip_prefix(':'));
    Ok(u64::from_str_radix(
        mask.context("no such set")?.trim(),
        16,
    )?)
}

/// The only child of the agent that stays.
fn reaper_of(agent: u32) -> anyhow::Result<u32> {
    wait_for("the agent has a reaper", Duration::from_secs(5), || {
        for task in fs::read_dir(process(agent, "task"))? {
            let children = fs::read_to_string(task?.path().join("children"))?;
            for child in children.split_whitespace() {
                let command = fs::read_to_string(process(child.parse()?, "cmdline"))?;
                if command.split('\0').nth(1) == Some("reap") {
                    return Ok(child.parse()?);
                }
            }
        }
        anyhow::bail!("none yet")
    })
}

fn wait_gone(pid: u32) -> anyhow::Result<()> {
    wait_for("the reaper is gone", Duration::from_secs(5), || {
        ensure!(!process(pid, "status").exists(), "it still runs");
        Ok(())
    })
}

#[test]
#[ignore = "needs root and eBPF"]
fn the_reaper_alone_may_enter_network_namespaces() {
    in_family("reaper-caps", false, &[], |s| {
        let agent = s.agent.pid()?;
        let reaper = reaper_of(agent)?;
        for set in ["CapEff", "CapPrm", "CapInh", "CapBnd"] {
            let mask = capabilities(agent, set)?;
            assert_eq!(mask & (1 << SYS_ADMIN | 1 << SYS_PTRACE), 0, "{set}");
        }
        let kept = 1 << SYS_ADMIN | 1 << SYS_PTRACE;
        assert_eq!(capabilities(reaper, "CapEff")?, kept);
        assert_eq!(capabilities(reaper, "CapPrm")?, kept);
        assert_eq!(capabilities(reaper, "CapInh")?, 0);
        let holds = |file: &str| -> anyhow::Result<bool> {
            let links = fs::read_dir(process(reaper, "fd"))?.flatten();
            let mut targets = links.filter_map(|link| fs::read_link(link.path()).ok());
            Ok(targets.any(|target| target.to_string_lossy().contains(file)))
        };
        ensure!(
            !holds("/sys/fs/bpf")?,
            "the reaper holds the lock of the agent's directory"
        );
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn the_reaper_ends_with_its_agent_and_the_agent_with_its_reaper() {
    in_family("reaper-end", false, &[], |s| {
        let first = reaper_of(s.agent.pid()?)?;
        s.agent.kill9()?;
        wait_gone(first)?;
        s.agent.spawn()?;
        s.agent.wait_ready()?;
        let second = reaper_of(s.agent.pid()?)?;
        s.agent.stop()?;
        wait_gone(second)?;
        s.agent.spawn()?;
        s.agent.wait_ready()?;
        let third = reaper_of(s.agent.pid()?)?;
        kill(Pid::from_raw(third.try_into()?), Signal::SIGKILL)?;
        let (code, log) = s.agent.wait_end()?;
        assert_eq!(code, Some(1));
        ensure!(log.contains("only a new agent can start another"), "{log}");
        s.agent.spawn()?;
        s.agent.wait_ready()
    });
}
