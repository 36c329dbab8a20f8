//! The eBPF programs, and the agent as one static binary with the programs inside.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::{
    needs::Purpose,
    process::{self, Workspace},
    remedy,
    toolchain::{CHOICE, Toolchain, Version},
};

/// Which ABI of the maps to build: ours, or what a future release looks like to the upgrade tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Abi {
    /// This release's.
    Current,
    /// Feature `abi-next`.
    Next,
}

impl Abi {
    fn suffix(self) -> &'static str {
        match self {
            Self::Current => "",
            Self::Next => "-next",
        }
    }
}

/// `cargo xtask build`.
///
/// # Errors
/// When a compiler is missing or refuses.
pub fn run(workspace: &Workspace, release: bool, next: bool) -> Result<()> {
    remedy::ensure(workspace, &[Purpose::Build])?;
    let abis: &[Abi] = if next {
        &[Abi::Current, Abi::Next]
    } else {
        &[Abi::Current]
    };
    for agent in agents(workspace, abis, release)? {
        println!("{}", agent.display());
    }
    Ok(())
}

/// The agents' files, in the order asked for; built if their sources changed.
///
/// All programs are built before the first agent: a new object makes cargo build every agent again.
pub fn agents(workspace: &Workspace, abis: &[Abi], release: bool) -> Result<Vec<PathBuf>> {
    for abi in abis {
        programs(workspace, *abi)?;
    }
    abis.iter()
        .map(|abi| agent(workspace, *abi, release))
        .collect()
}

/// Static, so that it runs in an empty container image; built with `--target`, so that the flag for it reaches neither
/// build scripts nor what plain `cargo check` and `cargo test` have compiled.
fn agent(workspace: &Workspace, abi: Abi, release: bool) -> Result<PathBuf> {
    let host = Version::of(&mut workspace.command("rustc"))
        .context("rustc does not say its version: is it in PATH?")?
        .host;
    let mut cargo = workspace.cargo();
    cargo.args([
        "build",
        "--package",
        "proxy-agent",
        "--bin",
        "proxy-agent",
        "--target",
        &host,
    ]);
    cargo.env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static");
    // The build script takes the object from where we put it, by feature.
    cargo.env_remove("PROXY_EBPF_OBJECT");
    if release {
        cargo.arg("--release");
    }
    if abi == Abi::Next {
        cargo.args(["--features", "abi-next"]);
    }
    process::run(&mut cargo)?;
    let profile = if release { "release" } else { "debug" };
    let built = workspace.target(&format!("{host}/{profile}/proxy-agent"));
    place(
        &built,
        &workspace.target(&format!("agent/{profile}/proxy-agent{}", abi.suffix())),
    )
}

/// The object file of the eBPF programs, where `proxy-agent/build.rs` finds it.
fn programs(workspace: &Workspace, abi: Abi) -> Result<PathBuf> {
    let toolchain = Toolchain::detect(workspace)?;
    let mut cargo = toolchain.cargo(workspace, "build");
    cargo.args([
        "--package",
        "proxy-ebpf",
        "--bin",
        "proxy-ebpf",
        "--features",
    ]);
    cargo.arg(match abi {
        Abi::Current => "programs",
        Abi::Next => "programs,abi-next",
    });
    process::run(&mut cargo).with_context(|| {
        format!(
            "the eBPF programs did not build with {toolchain}; if bpf-linker said `Invalid record`, its LLVM is \
             older than that: install a newer bpf-linker, or name another compiler in {CHOICE}"
        )
    })?;
    let built = workspace.target("ebpf/bpfel-unknown-none/bpf/proxy-ebpf");
    place(
        &built,
        &workspace.target(&format!("bpf/proxy-ebpf{}", abi.suffix())),
    )
}

/// Copies a built file to where it is used. An equal one keeps its date, or everything that embeds it is built again; a
/// different one is replaced by renaming, because the old one may be running.
fn place(built: &Path, used: &Path) -> Result<PathBuf> {
    let bytes = fs::read(built).with_context(|| format!("cannot read {}", built.display()))?;
    if fs::read(used).is_ok_and(|old| old == bytes) {
        return Ok(used.to_owned());
    }
    let write = || {
        fs::create_dir_all(used.parent().unwrap_or(used))?;
        let new = used.with_extension("new");
        fs::copy(built, &new)?;
        fs::rename(&new, used)
    };
    write().with_context(|| format!("cannot write {}", used.display()))?;
    Ok(used.to_owned())
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn an_equal_file_keeps_its_date_and_a_different_one_is_replaced() {
        let folder = std::env::temp_dir().join(format!("xtask-place-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (built, used) = (folder.join("built"), folder.join("deep/used"));
        let old = SystemTime::UNIX_EPOCH;
        fs::write(&built, "one").unwrap();
        place(&built, &used).unwrap();
        fs::File::options()
            .write(true)
            .open(&used)
            .unwrap()
            .set_modified(old)
            .unwrap();
        place(&built, &used).unwrap();
        assert_eq!(fs::metadata(&used).unwrap().modified().unwrap(), old);
        fs::write(&built, "two").unwrap();
        place(&built, &used).unwrap();
        assert_eq!(fs::read_to_string(&used).unwrap(), "two");
        fs::remove_dir_all(&folder).unwrap();
    }
}
