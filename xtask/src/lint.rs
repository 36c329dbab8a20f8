//! Everything that can be judged without running the code: format, lints, layers, dependencies.

use anyhow::{Result, bail};

use crate::{
    layers,
    needs::Purpose,
    process::{self, Workspace},
    remedy,
};

type Step = fn(&Workspace) -> Result<()>;

/// `cargo xtask lint`: all of it runs, also after a failure.
///
/// # Errors
/// Names what found something.
pub fn run(workspace: &Workspace) -> Result<()> {
    remedy::ensure(workspace, &[Purpose::Lint])?;
    let steps: [(&str, Step); 5] = [
        ("format", |workspace| {
            process::run(workspace.cargo().args(["fmt", "--all", "--check"]))
        }),
        ("clippy", clippy),
        ("clippy of the eBPF programs", clippy_of_programs),
        ("layers", layers::check),
        ("dependencies", dependencies),
    ];
    let mut failed = Vec::new();
    for (name, step) in steps {
        println!("lint: {name}");
        if let Err(error) = step(workspace) {
            eprintln!("{error:#}");
            failed.push(name);
        }
    }
    if failed.is_empty() {
        Ok(())
    } else {
        bail!("lint: not clean: {}", failed.join(", "))
    }
}

fn clippy(workspace: &Workspace) -> Result<()> {
    process::run(workspace.cargo().args([
        "clippy",
        "--workspace",
        "--all-targets",
        "--",
        "-Dwarnings",
    ]))
}

/// For the host, because clippy comes without a library for the programs' target: nothing is linked, so all that is
/// missed is code for that target only. `abort`, because a program without std cannot unwind; the variable, because
/// aya-ebpf uses unstable features; a folder of its own, because all that would build everything else again.
fn clippy_of_programs(workspace: &Workspace) -> Result<()> {
    let mut cargo = workspace.cargo();
    cargo.args([
        "clippy",
        "--package",
        "proxy-ebpf",
        "--bin",
        "proxy-ebpf",
        "--features",
        "programs",
    ]);
    cargo
        .args(["--config", "profile.dev.panic='abort'", "--target-dir"])
        .arg(workspace.target("ebpf-lint"));
    process::run(cargo.args(["--", "-Dwarnings"]).env("RUSTC_BOOTSTRAP", "1"))
}

fn dependencies(workspace: &Workspace) -> Result<()> {
    let deny = |arguments: &[&str]| {
        let mut cargo = workspace.cargo();
        cargo.args(["deny", "--log-level", "warn"]).args(arguments);
        cargo
    };
    process::run(&mut deny(&["check", "bans", "licenses", "sources"]))?;
    if process::run_quietly(&mut deny(&["fetch", "db"])).is_err() {
        println!(
            "lint: advisories NOT checked: their database (github.com/RustSec/advisory-db) cannot be reached"
        );
        return Ok(());
    }
    process::run(&mut deny(&["check", "advisories"]))
}
