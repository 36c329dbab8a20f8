//! Connects on all cores while everything changes, the agent included.

use std::{
    collections::BTreeMap,
    env,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use serde_json::Value;

use super::{
    churn::{Churn, Outcome},
    growth::{GROWTHS, Growth},
};

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
        for growth in GROWTHS {
            (0..3).try_for_each(|_| repair(churn))?;
            grow(churn, growth)?;
        }
        Ok(())
    });
}

/// A map that is not where it should be makes the next start build a new generation.
fn repair(churn: &mut Churn) -> anyhow::Result<()> {
    churn.churn(Duration::from_millis(300), PAUSE)?;
    let (old, sizes) = (newest_generation(churn)?, capacities(churn)?);
    churn.kill()?;
    remove_one_map(churn)?;
    churn.agent.spawn()?;
    churn.agent.wait_ready()?;
    churn.caught_up();
    ensure!(
        newest_generation(churn)? > old,
        "none after generation {old}"
    );
    let larger: Vec<_> = capacities(churn)?
        .into_iter()
        .filter(|(map, entries)| sizes.get(map).is_some_and(|before| before < entries))
        .collect();
    ensure!(larger.is_empty(), "maps grow without need: {larger:?}");
    Ok(())
}

/// More than a map holds makes the running agent build a new generation. Endpoints and addresses change with it.
fn grow(churn: &mut Churn, (map, services): Growth) -> anyhow::Result<()> {
    churn.churn(Duration::from_millis(300), PAUSE)?;
    churn.settle()?;
    let (old, sizes) = (newest_generation(churn)?, capacities(churn)?);
    let start = Instant::now();
    // Both files are new: the change may have to wait for the growth, so what it ends is allowed until that is over.
    churn.change()?;
    churn.add(&map.to_lowercase(), &services())?;
    churn.settle()?;
    churn.caught_up();
    let new = capacities(churn)?;
    let (before, after) = (sizes.get(map), new.get(map));
    println!(
        "{map}: {before:?} became {after:?}, {:.1?} after the file was begun",
        start.elapsed()
    );
    ensure!(before < after, "{map} did not grow: {before:?}, {after:?}");
    ensure!(
        newest_generation(churn)? > old,
        "none after generation {old}"
    );
    Ok(())
}

/// Names in the agent's directory: `abi-V-gen-N`, `links`.
fn generations(churn: &Churn) -> anyhow::Result<Vec<String>> {
    let entries = std::fs::read_dir(churn.node.bpf_dir())?;
    let name = |entry: std::fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
    let mut names: Vec<_> = entries.flatten().map(name).collect();
    names.sort();
    Ok(names)
}

/// The number of the newest generation. The one before it stays for its grace period.
fn newest_generation(churn: &Churn) -> anyhow::Result<u64> {
    let names = generations(churn)?;
    let numbers = names.iter().filter_map(|name| name.rsplit_once("-gen-"));
    let newest = numbers.filter_map(|(_, number)| number.parse().ok()).max();
    newest.with_context(|| format!("no generation in {names:?}"))
}

/// Entries that each map holds.
fn capacities(churn: &Churn) -> anyhow::Result<BTreeMap<String, u64>> {
    let maps = churn.agent.json(&["dump", "maps"])?;
    let maps = maps.as_array().context("no maps")?.iter();
    let capacity = |map: &Value| {
        let name = map["map"].as_str().context("a map without a name")?;
        let entries = map["capacity"]
            .as_u64()
            .context("a map without a capacity")?;
        Ok((name.to_owned(), entries))
    };
    maps.map(capacity).collect()
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
