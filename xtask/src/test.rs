//! Tests, from those that need nothing to those that need root and a kernel; the demo and the benches, which need the
//! same things.

use std::{
    collections::BTreeSet,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::{
    build::{self, Abi},
    image,
    needs::Purpose,
    process::{self, Workspace},
    remedy, tools,
};

/// Environment variable with the seed of the tests that compare random Services.
const SEED: &str = "PROXY_SEED";
/// The package with the scenarios, the demo and the benches.
const PACKAGE: &str = "proxy-tests";
/// The benches whose other side is the real kube-proxy.
const BESIDE_KUBE_PROXY: [&str; 7] = [
    "packets",
    "rules",
    "cluster",
    "cluster-update",
    "cluster-start",
    "cluster-memory",
    "cluster-scale",
];

/// How much a test needs. The first two need neither root nor the programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Level {
    /// Beside the code.
    Unit,
    /// YAML in, state and maps out.
    Golden,
    /// The loaded programs, by system calls: tests beside the code that need root, and the test target `packet`.
    Packet,
    /// Clusters made of network namespaces.
    Netns,
    /// The same with real Kubernetes components, which Go builds.
    Kube,
    /// Long runs under load.
    Torture,
    /// All of these.
    All,
}

impl Level {
    fn needs_root(self) -> bool {
        match self {
            Self::Unit | Self::Golden => false,
            Self::Packet | Self::Netns | Self::Kube | Self::Torture | Self::All => true,
        }
    }

    fn needs_kubernetes(self) -> bool {
        match self {
            Self::Kube | Self::All => true,
            Self::Unit | Self::Golden | Self::Packet | Self::Netns | Self::Torture => false,
        }
    }
}

/// `cargo xtask test`: everything runs even after a failure; cargo's own summaries are the last lines.
///
/// # Errors
/// When a test fails, or the machine cannot run it: nothing is skipped.
pub fn run(workspace: &Workspace, level: Level, filter: Option<&str>) -> Result<()> {
    let targets = test_targets(workspace)?;
    let runs = runs(level, &targets)?;
    if level.needs_root() {
        remedy::ensure(
            workspace,
            &[Purpose::Build, Purpose::Kernel, Purpose::Scenarios],
        )?;
    }
    let mut variables = Vec::new();
    if level.needs_root() {
        let built = build::agents(workspace, &[Abi::Current, Abi::Next], false)?;
        if level.needs_kubernetes()
            && let Some(agent) = built.first()
        {
            remedy::ensure(workspace, &[Purpose::Kubernetes])?;
            let components = tools::ensure(workspace)?;
            let images = image::for_tests(workspace, &built, &components)?;
            variables.push((tools::FOLDER, components));
            variables.push(("PROXY_IMAGES", images));
            variables.push(("PROXY_ROOTFS", image::unpack(workspace, agent)?));
        }
        variables.extend(["PROXY_AGENT", "PROXY_AGENT_NEXT"].into_iter().zip(built));
        process::run(
            workspace
                .cargo()
                .args(["build", "--package", PACKAGE, "--bins"]),
        )?;
    }
    let mut failed = Vec::new();
    for run in runs {
        let mut cargo = workspace.cargo();
        cargo
            .args(["test", "--workspace", "--no-fail-fast"])
            .args(&run.targets)
            .args(filter);
        cargo
            .arg("--")
            .args(run.harness)
            .envs(variables.iter().map(|(name, path)| (name, path)));
        if let Err(error) = process::run(&mut cargo) {
            failed.push(error.to_string());
        }
    }
    if failed.is_empty() {
        Ok(())
    } else {
        bail!("tests failed: {}", failed.join("; "))
    }
}

/// `cargo xtask fuzz-diff`: one seed after the other until the time is over or one fails, which has named itself.
///
/// # Errors
/// Services of a seed are answered otherwise than by kube-proxy, or the machine cannot run it.
pub fn fuzz_diff(workspace: &Workspace, minutes: u64, first: u64) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(60 * minutes);
    let mut seed = first;
    while Instant::now() < end {
        println!("seed {seed}");
        let mut again = workspace.command(std::env::current_exe()?);
        again.args(["test", "--level", "kube", "random"]);
        again.env(SEED, seed.to_string());
        process::run(&mut again).with_context(|| format!("seed {seed}"))?;
        seed += 1;
    }
    println!("seeds {first} to {}: all the same", seed - 1);
    Ok(())
}

/// One run of `cargo test`.
#[derive(Debug, PartialEq, Eq)]
struct Run {
    targets: Vec<String>,
    harness: &'static [&'static str],
}

/// What to run for a level, given the workspace's test targets. A target without a level of its own is `packet`.
/// Torture measures failures under load, so one at a time.
fn runs(level: Level, targets: &BTreeSet<String>) -> Result<Vec<Run>> {
    let beside = || ["--lib", "--bins"].map(str::to_owned).to_vec();
    let named = |wanted: &dyn Fn(&str) -> bool| -> Vec<String> {
        let names = targets.iter().filter(|name| wanted(name));
        names
            .flat_map(|name| ["--test".to_owned(), name.clone()])
            .collect()
    };
    let run = |targets, harness| Run { targets, harness };
    let runs = match level {
        Level::Unit => vec![run(beside(), &[] as &[_])],
        Level::Golden => vec![run(named(&|name| name == "golden"), &[])],
        Level::Packet => {
            let others = named(&|name| !["golden", "netns", "kube", "torture"].contains(&name));
            vec![run([beside(), others].concat(), &["--ignored"])]
        }
        Level::Netns => vec![run(named(&|name| name == "netns"), &["--include-ignored"])],
        Level::Kube => vec![run(named(&|name| name == "kube"), &["--include-ignored"])],
        Level::Torture => {
            let torture = named(&|name| name == "torture");
            vec![run(torture, &["--include-ignored", "--test-threads=1"])]
        }
        Level::All => vec![
            run(vec![], &[]),
            run(
                [beside(), named(&|name| name != "torture")].concat(),
                &["--ignored"],
            ),
            run(
                named(&|name| name == "torture"),
                &["--ignored", "--test-threads=1"],
            ),
        ],
    };
    // Without a target cargo would run all of them.
    if level != Level::All && runs.iter().any(|run| run.targets.is_empty()) {
        bail!("no package of the workspace has tests of this level: {targets:?}");
    }
    Ok(runs)
}

/// The names of all integration tests, as cargo sees them.
fn test_targets(workspace: &Workspace) -> Result<BTreeSet<String>> {
    let arguments = ["metadata", "--no-deps", "--format-version", "1"];
    let text = process::answer(workspace.cargo().args(arguments))
        .context("cargo metadata does not answer")?;
    let metadata: serde_json::Value =
        serde_json::from_str(&text).context("cargo metadata is not JSON")?;
    Ok(named_targets(&metadata))
}

fn named_targets(metadata: &serde_json::Value) -> BTreeSet<String> {
    let all =
        |value: &serde_json::Value, field| value[field].as_array().cloned().unwrap_or_default();
    all(metadata, "packages")
        .iter()
        .flat_map(|package| all(package, "targets"))
        .filter(|target| all(target, "kind").iter().any(|kind| kind == "test"))
        .filter_map(|target| target["name"].as_str().map(str::to_owned))
        .collect()
}

/// `cargo xtask bless`: rewrites what the golden tests expect.
///
/// # Errors
/// When the tests do not run.
pub fn bless(workspace: &Workspace) -> Result<()> {
    process::run(
        workspace
            .cargo()
            .args(["test", "--workspace", "--test", "golden"])
            .env("BLESS", "1"),
    )
}

/// `cargo xtask demo`: does not return, unless it cannot start. The demo takes our place, so Ctrl-C and its exit code are
/// between it and the caller.
///
/// # Errors
/// When something is missing or does not build.
pub fn demo(workspace: &Workspace, keep: bool, remove: bool) -> Result<()> {
    remedy::ensure(
        workspace,
        &[Purpose::Build, Purpose::Kernel, Purpose::Scenarios],
    )?;
    let agents = build::agents(workspace, &[Abi::Current], false)?;
    process::run(
        workspace
            .cargo()
            .args(["build", "--package", PACKAGE, "--bins"]),
    )?;
    let mut demo = with_agents(workspace, &workspace.target("debug/demo"), &agents);
    become_it(
        demo.args(keep.then_some("--keep"))
            .args(remove.then_some("--remove")),
    )
}

/// `cargo xtask bench NAME`: the same with an optimised agent; exit code 2 means a target was missed.
///
/// # Errors
/// When something is missing or does not build.
pub fn bench(workspace: &Workspace, arguments: &[String]) -> Result<()> {
    let mut variables = Vec::new();
    remedy::ensure(
        workspace,
        &[Purpose::Build, Purpose::Kernel, Purpose::Scenarios],
    )?;
    let has_kube_proxy = arguments
        .first()
        .is_some_and(|name| BESIDE_KUBE_PROXY.contains(&name.as_str()));
    if has_kube_proxy {
        remedy::ensure(workspace, &[Purpose::Kubernetes])?;
        variables.push((tools::FOLDER, tools::ensure(workspace)?));
    }
    let agents = build::agents(workspace, &[Abi::Current], true)?;
    process::run(
        workspace
            .cargo()
            .args(["build", "--release", "--package", PACKAGE, "--bins"]),
    )?;
    let mut bench = with_agents(workspace, &workspace.target("release/bench"), &agents);
    become_it(bench.args(arguments).envs(variables))
}

fn with_agents(workspace: &Workspace, program: &Path, agents: &[PathBuf]) -> Command {
    let mut command = workspace.command(program);
    command.envs(agents.iter().map(|agent| ("PROXY_AGENT", agent)));
    command
}

fn become_it(command: &mut Command) -> Result<()> {
    Err(command.exec())
        .with_context(|| format!("cannot run {}", command.get_program().to_string_lossy()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn targets(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn all_runs_torture_alone_and_last() {
        let runs = runs(Level::All, &targets(&["golden", "netns", "torture"])).unwrap();
        let words: Vec<_> = runs
            .iter()
            .map(|run| (run.targets.join(" "), run.harness))
            .collect();
        let expected: [(&str, &[&str]); 3] = [
            ("", &[]),
            ("--lib --bins --test golden --test netns", &["--ignored"]),
            ("--test torture", &["--ignored", "--test-threads=1"]),
        ];
        assert_eq!(
            words,
            expected.map(|(targets, harness)| (targets.to_owned(), harness))
        );
    }

    #[test]
    fn a_target_without_a_level_is_not_forgotten() {
        let runs = runs(Level::Packet, &targets(&["golden", "netns", "programs"])).unwrap();
        assert_eq!(runs[0].targets, ["--lib", "--bins", "--test", "programs"]);
    }

    #[test]
    fn a_level_without_tests_is_an_error_and_not_a_success() {
        assert!(runs(Level::Torture, &targets(&["netns"])).is_err());
    }

    #[test]
    fn integration_tests_of_all_packages_are_found() {
        let metadata = serde_json::json!({"packages": [
            {"targets": [{"kind": ["lib"], "name": "proxy_agent"}, {"kind": ["test"], "name": "golden"}]},
            {"targets": [{"kind": ["bin"], "name": "demo"}, {"kind": ["test"], "name": "netns"}]},
        ]});
        assert_eq!(named_targets(&metadata), targets(&["golden", "netns"]));
    }
}
