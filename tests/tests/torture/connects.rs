//! Connects on all cores while everything changes, the agent included.

use std::{
    env,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};

use super::churn::{Churn, Outcome};

const PAUSE: Duration = Duration::from_millis(60);

/// Runs a body under load and judges every answer. A failure shows the agent's log.
fn torture(name: &str, body: impl Fn(&mut Churn) -> anyhow::Result<()>) -> Outcome {
    let mut churn = Churn::start(name).unwrap_or_else(|error| panic!("{name}: {error:?}"));
    let start = Instant::now();
    let result = churn
        .start_load()
        .and_then(|()| body(&mut churn))
        .and_then(|()| churn.finish());
    let outcome = result.unwrap_or_else(|error| panic!("{name}: {error:?}"));
    println!(
        "{name}: {} connections, 0 failed; {} files with {} endpoint changes in {:.0?}",
        outcome.report.answered(),
        outcome.rounds,
        outcome.changes,
        start.elapsed(),
    );
    outcome
}

#[test]
#[ignore = "needs root and eBPF; takes a minute"]
fn no_connection_fails_while_endpoints_and_addresses_change() {
    const TIME: Duration = Duration::from_secs(60);
    let outcome = torture("churn", |churn| churn.churn(TIME, PAUSE));
    let rate = outcome.changes / TIME.as_secs();
    assert!(rate >= 1000, "only {rate} endpoint changes per second");
}

/// Kills the agent amid changes, changes once more while it is dead, and lets it catch up.
fn replace_agent(churn: &mut Churn, binary: Option<&PathBuf>) -> anyhow::Result<()> {
    churn.churn(Duration::from_millis(300), PAUSE)?;
    churn.change()?;
    churn.kill()?;
    churn.change()?;
    if let Some(binary) = binary {
        churn.agent.use_binary(binary);
    }
    churn.agent.spawn()?;
    churn.agent.wait_ready()?;
    churn.caught_up();
    Ok(())
}

#[test]
#[ignore = "needs root and eBPF; takes a minute"]
fn no_connection_fails_when_the_agent_is_killed_twenty_times() {
    torture("kill", |churn| {
        (0..20).try_for_each(|_| replace_agent(churn, None))
    });
}

#[test]
#[ignore = "needs root and eBPF; takes two minutes"]
fn no_connection_fails_in_fifty_upgrades_and_downgrades() {
    let binary = |name: &str| -> anyhow::Result<PathBuf> {
        Ok(env::var_os(name)
            .with_context(|| format!("{name} is not set: run cargo xtask test"))?
            .into())
    };
    torture("upgrade", |churn| {
        let (this, next) = (binary("PROXY_AGENT")?, binary("PROXY_AGENT_NEXT")?);
        for _ in 0..50 {
            for (binary, abi) in [(&next, "abi-2-"), (&this, "abi-1-")] {
                replace_agent(churn, Some(binary))?;
                let generations = generations(churn)?;
                ensure!(
                    generations.iter().any(|name| name.starts_with(abi)),
                    "no {abi}* in {generations:?}"
                );
            }
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF; takes a minute"]
fn no_connection_fails_in_twenty_generation_swaps() {
    torture("swap", |churn| {
        let mut capacities = Vec::new();
        for _ in 0..20 {
            // A map that is not where it should be makes the next start build a new generation.
            churn.churn(Duration::from_millis(300), PAUSE)?;
            let before = generations(churn)?;
            churn.kill()?;
            remove_one_map(churn)?;
            churn.agent.spawn()?;
            churn.agent.wait_ready()?;
            churn.caught_up();
            let after = generations(churn)?;
            ensure!(after != before, "no new generation: {before:?}");
            capacities.push(capacity(churn, "MEMBERS")?);
        }
        let constant = capacities
            .windows(2)
            .all(|pair| pair.first() == pair.last());
        ensure!(constant, "the maps grow without need: {capacities:?}");
        Ok(())
    });
}

/// Names in the agent's directory: `abi-V-gen-N`, `links`.
fn generations(churn: &Churn) -> anyhow::Result<Vec<String>> {
    let entries = std::fs::read_dir(churn.node.bpf_dir())?;
    let name = |entry: std::fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
    let mut names: Vec<_> = entries.flatten().map(name).collect();
    names.sort();
    Ok(names)
}

fn capacity(churn: &Churn, map: &str) -> anyhow::Result<Option<u64>> {
    let maps = churn.agent.json(&["dump", "maps"])?;
    let found = maps
        .as_array()
        .and_then(|maps| maps.iter().find(|one| one["map"] == map));
    Ok(found.and_then(|found| found["capacity"].as_u64()))
}

/// Removes the pin of SLOTS, wherever it is.
fn remove_one_map(churn: &Churn) -> anyhow::Result<()> {
    let mut removed = 0;
    for generation in std::fs::read_dir(churn.node.bpf_dir())?.flatten() {
        let pin = generation.path().join("SLOTS");
        if pin.exists() {
            std::fs::remove_file(pin)?;
            removed += 1;
        }
    }
    ensure!(
        removed > 0,
        "no SLOTS in {}",
        churn.node.bpf_dir().display()
    );
    Ok(())
}
