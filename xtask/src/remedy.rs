//! Says what a machine lacks (`cargo xtask check`), and brings it before it is needed.

use std::{env, fmt::Write as _};

use anyhow::{Context, Result, bail};

use crate::{
    arch,
    needs::{NEEDS, Need, Purpose, Source},
    process::{self, Workspace},
    toolchain::{CHOICE, SYSTEM},
};

/// Debian's compiler beside the rustup one: the only packaged one with a library for the kernel's target.
const COMPILER_PACKAGES: &[&str] = &["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf"];

/// What bpf-linker is built from; its LLVM must be at least the compiler's.
const LINKER_PACKAGES: &[&str] = &[
    "g++",
    "libclang-22-dev",
    "libpolly-22-dev",
    "libxml2-dev",
    "libzstd-dev",
    "llvm-22-dev",
    "pkg-config",
    "zlib1g-dev",
];

/// Without `LLVM_PREFIX` the build takes the first `llvm-config` in PATH, which may be an older LLVM's.
const LINKER_FROM_SOURCE: &str = "LLVM_PREFIX=/usr/lib/llvm-22 cargo install bpf-linker --version 0.13.0 \
     --locked --no-default-features --features llvm-22";
const LINKER_BINARY: &str = "cargo binstall --no-confirm bpf-linker";
const RUSTUP_NIGHTLY: &str =
    "rustup toolchain install nightly --profile minimal --component rust-src";

/// What can be installed from here.
struct Offers {
    /// Packages for the compiler and the linker.
    compiler: bool,
    linker: bool,
    /// Whether this is a Debian at all.
    apt: bool,
    rustup: bool,
    binstall: bool,
}

/// A line for the shell.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    line: String,
    root: bool,
}

/// What to do about all that is missing.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    steps: Vec<Step>,
    /// For the reader: what no command of ours can bring.
    advice: Vec<String>,
}

/// `cargo xtask check`: the table of everything, and the commands that bring what is missing; with `fix`, runs them.
///
/// # Errors
/// When something is missing, or cannot be brought.
pub fn check(workspace: &Workspace, fix: bool) -> Result<()> {
    let mut missing = Vec::new();
    for need in NEEDS {
        match need.probe(workspace) {
            Ok(found) => println!("ok       {:14} {found}", need.name),
            Err(wrong) => {
                println!("MISSING  {:14} {wrong}; it {}", need.name, need.why);
                missing.push(need);
            }
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    if fix {
        return bring(workspace, &missing);
    }
    println!("\n{}", plan(&missing, &Offers::here(workspace)));
    bail!(
        "{} of {} things are missing; `cargo xtask check --fix` runs the commands",
        missing.len(),
        NEEDS.len()
    )
}

/// Returns when everything for `purposes` is there. Tells what is missing and why it is needed before it installs it.
///
/// # Errors
/// When something cannot be brought from here; the message says what to run.
pub fn ensure(workspace: &Workspace, purposes: &[Purpose]) -> Result<()> {
    let mut missing = Vec::new();
    for need in NEEDS.iter().filter(|need| purposes.contains(&need.purpose)) {
        if let Err(wrong) = need.probe(workspace) {
            println!("missing: {} ({wrong}); it {}", need.name, need.why);
            missing.push(need);
        }
    }
    if missing.is_empty() {
        Ok(())
    } else {
        bring(workspace, &missing)
    }
}

fn bring(workspace: &Workspace, missing: &[&Need]) -> Result<()> {
    let root = is_root(workspace);
    let mut offers = Offers::here(workspace);
    if offers.apt && root && missing.iter().any(|need| need.source.may_be_packaged()) {
        // A fresh machine's package lists are empty or old.
        step(workspace, "apt-get update")?;
        offers = Offers::here(workspace);
    }
    let plan = plan(missing, &offers);
    if !plan.advice.is_empty() || (!root && plan.steps.iter().any(|step| step.root)) {
        bail!("this machine is not ready\n{plan}");
    }
    for Step { line, .. } in &plan.steps {
        step(workspace, line)?;
    }
    let left: Vec<_> = missing
        .iter()
        .filter_map(|need| {
            need.probe(workspace)
                .err()
                .map(|wrong| format!("{}: {wrong}", need.name))
        })
        .collect();
    if !left.is_empty() {
        bail!(
            "still missing after all commands succeeded: {}",
            left.join("; ")
        );
    }
    Ok(())
}

fn step(workspace: &Workspace, line: &str) -> Result<()> {
    println!("running: {line}");
    let mut shell = workspace.command("sh");
    shell
        .args(["-c", line])
        .env("DEBIAN_FRONTEND", "noninteractive");
    process::run_quietly(&mut shell).context("a command that would bring what is missing failed")
}

fn is_root(workspace: &Workspace) -> bool {
    NEEDS
        .iter()
        .filter(|need| need.name == "root")
        .all(|need| need.probe(workspace).is_ok())
}

impl Offers {
    fn here(workspace: &Workspace) -> Self {
        let apt = process::in_path("apt-get").is_some();
        let offers = |packages: &[&str]| {
            let policy =
                process::answer(workspace.command("apt-cache").arg("policy").args(packages));
            apt && candidates(&policy.unwrap_or_default()) == packages.len()
        };
        // Somebody who asks for a rustup toolchain is not served by packages.
        let refused = env::var(CHOICE).is_ok_and(|choice| choice != SYSTEM);
        Self {
            compiler: !refused && offers(COMPILER_PACKAGES),
            linker: offers(LINKER_PACKAGES),
            apt,
            rustup: process::in_path("rustup").is_some(),
            binstall: process::in_path("cargo-binstall").is_some(),
        }
    }
}

/// How many packages of an answer of `apt-cache policy` can be installed.
fn candidates(policy: &str) -> usize {
    policy
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Candidate: "))
        .filter(|version| *version != "(none)")
        .count()
}

fn plan(missing: &[&Need], offers: &Offers) -> Plan {
    let mut plan = Plan::default();
    let mut packages: Vec<&str> = Vec::new();
    let mut later: Vec<Step> = Vec::new();
    for need in missing {
        match need.source {
            Source::Compiler if offers.compiler => packages.extend(COMPILER_PACKAGES),
            Source::Compiler if offers.rustup => {
                later.push(Step { line: RUSTUP_NIGHTLY.into(), root: false });
            }
            Source::Compiler => plan.advice.push(format!("install rustup, then run: {RUSTUP_NIGHTLY}")),
            Source::Linker if offers.linker => {
                packages.extend(LINKER_PACKAGES);
                later.push(Step { line: LINKER_FROM_SOURCE.into(), root: false });
            }
            Source::Linker if offers.binstall => {
                later.push(Step { line: LINKER_BINARY.into(), root: false });
            }
            Source::Linker => plan.advice.push(format!(
                "put bpf-linker's published binary into PATH (https://github.com/aya-rs/bpf-linker/releases), or run: \
                 cargo install cargo-binstall && {LINKER_BINARY}"
            )),
            Source::Library if offers.compiler => packages.push("rust-web-src"),
            Source::Library => {
                let line = format!("rustup target add {}-unknown-linux-gnu", arch::OTHER);
                later.push(Step { line, root: false });
            }
            Source::Package(package) if offers.apt => packages.push(package),
            Source::Package(package) => {
                plan.advice.push(format!("install {} (Debian's package is called {package})", need.name));
            }
            Source::Root(line) => later.push(Step { line: line.into(), root: true }),
            Source::Shell(line) => later.push(Step { line: line.into(), root: false }),
            Source::Owner(advice) => plan.advice.push(format!("{}: {advice}", need.name)),
        }
    }
    if !packages.is_empty() {
        let line = format!(
            "apt-get install -y --no-install-recommends {}",
            packages.join(" ")
        );
        plan.steps.push(Step { line, root: true });
    }
    plan.steps.extend(later);
    plan
}

impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { steps, advice } = self;
        let mut text = String::new();
        if !steps.is_empty() {
            writeln!(text, "what brings it:")?;
        }
        for Step { line, root } in steps {
            writeln!(text, "  {}{line}", if *root { "(as root) " } else { "" })?;
        }
        for advice in advice {
            writeln!(text, "to do: {advice}")?;
        }
        f.write_str(text.trim_end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEBIAN: Offers = Offers {
        compiler: true,
        linker: true,
        apt: true,
        rustup: true,
        binstall: false,
    };
    const RUSTUP: Offers = Offers {
        compiler: false,
        linker: false,
        apt: false,
        rustup: true,
        binstall: true,
    };
    const BARE: Offers = Offers {
        compiler: false,
        linker: false,
        apt: false,
        rustup: false,
        binstall: false,
    };

    fn lines(names: &[&str], offers: &Offers) -> (Vec<String>, usize) {
        let missing: Vec<_> = NEEDS
            .iter()
            .filter(|need| names.contains(&need.name))
            .collect();
        let plan = plan(&missing, offers);
        (
            plan.steps.into_iter().map(|step| step.line).collect(),
            plan.advice.len(),
        )
    }

    #[test]
    fn debian_installs_all_packages_at_once_and_then_builds_the_linker() {
        let (lines, advice) = lines(&["eBPF compiler", "bpf-linker", "dig"], &DEBIAN);
        assert_eq!(
            lines,
            [
                "apt-get install -y --no-install-recommends rustc-web cargo-web libstd-rust-web-dev-bpf g++ \
                 libclang-22-dev libpolly-22-dev libxml2-dev libzstd-dev llvm-22-dev pkg-config zlib1g-dev \
                 bind9-dnsutils",
                LINKER_FROM_SOURCE,
            ]
        );
        assert_eq!(advice, 0);
    }

    #[test]
    fn without_debian_rustup_and_published_binaries_serve() {
        let (lines, advice) = lines(&["eBPF compiler", "bpf-linker", "dig"], &RUSTUP);
        assert_eq!(lines, [RUSTUP_NIGHTLY, LINKER_BINARY]);
        assert_eq!(advice, 1, "dig is the reader's to install");
    }

    #[test]
    fn what_no_command_brings_becomes_advice() {
        assert_eq!(
            lines(&["eBPF compiler", "bpf-linker", "root"], &BARE),
            (vec![], 3)
        );
    }

    #[test]
    fn packages_without_a_candidate_are_not_offered() {
        let policy = "rustc-web:\n  Installed: (none)\n  Candidate: 1.96.0+dfsg1-1~deb12u2\n  Version table:\n\
            cargo-web:\n  Installed: (none)\n  Candidate: (none)\n";
        assert_eq!(candidates(policy), 1);
    }
}
