//! Type-checks the workspace for a processor that this machine does not have.
//!
//! Needs that target's standard library: rustup's, or its source (Debian's rust-web-src, rustup's rust-src), from which
//! cargo makes it; and its C compiler, for the build script of a dependency (ring). Nothing of ours is linked.

use std::{path::Path, process::Command};

use anyhow::{Result, bail};

use crate::{
    needs::Purpose,
    process::{self, Workspace},
    remedy,
    toolchain::library_source,
};

/// The other processor that this runs on.
pub const OTHER: &str = "aarch64";

const PACKAGED_RUSTC: &str = "/usr/bin/rustc";
const PACKAGED_CARGO: &str = "/usr/bin/cargo";

/// `cargo xtask check-arch`.
///
/// # Errors
/// When the code does not type-check, or there is no standard library to check it against.
pub fn check(workspace: &Workspace) -> Result<()> {
    remedy::ensure(workspace, &[Purpose::Arch])?;
    let Some((mut cargo, _)) = compiler(workspace) else {
        bail!("no standard library for {OTHER}")
    };
    cargo
        .args(["--workspace", "--target", &target(), "--target-dir"])
        .arg(workspace.target("arch"));
    process::run(&mut cargo)
}

/// Where the standard library for [`OTHER`] is, or can be made from.
pub fn library(workspace: &Workspace) -> Result<String, String> {
    match compiler(workspace) {
        Some((_, library)) => Ok(library),
        None => Err(format!(
            "neither a standard library for {} nor its source",
            target()
        )),
    }
}

fn target() -> String {
    format!("{OTHER}-unknown-linux-gnu")
}

/// `cargo check` of the first compiler that can, with what it takes, and its library.
fn compiler(workspace: &Workspace) -> Option<(Command, String)> {
    let built = process::answer(workspace.command("rustc").args([
        "--print",
        "target-libdir",
        "--target",
        &target(),
    ]));
    if let Some(folder) = built.filter(|folder| Path::new(folder.trim()).is_dir()) {
        let mut cargo = workspace.cargo();
        cargo.arg("check");
        return Some((cargo, folder.trim().to_owned()));
    }
    let from_source = |mut cargo: Command, rustc: &str| {
        let sysroot = process::answer(workspace.command(rustc).args(["--print", "sysroot"]))?;
        let source = library_source(Path::new(sysroot.trim()));
        // -Z on a stable compiler.
        cargo.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1");
        cargo.args(["check", "-Z", "build-std=std,panic_abort"]);
        source
            .is_file()
            .then(|| (cargo, source.display().to_string()))
    };
    from_source(workspace.cargo(), "rustc")
        .or_else(|| from_source(workspace.command(PACKAGED_CARGO), PACKAGED_RUSTC))
}
