//! Which compiler on this machine can build the eBPF programs.
//!
//! They need the `core` library for bpfel-unknown-none, a target that rustup delivers no library for. Two ways are
//! served: a distribution's compiler with a prebuilt one (Debian: rustc-web and libstd-rust-web-dev-bpf), and a rustup
//! toolchain with the component rust-src, from which cargo builds it.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, bail};

use crate::process::{self, Workspace};

/// Overrides the choice: [`SYSTEM`], or the name of a rustup toolchain.
pub const CHOICE: &str = "XTASK_EBPF_TOOLCHAIN";

/// The value of [`CHOICE`] for the distribution's compiler.
pub const SYSTEM: &str = "system";

const TARGET: &str = "bpfel-unknown-none";
const SYSTEM_RUSTC: &str = "/usr/bin/rustc";
const SYSTEM_CARGO: &str = "/usr/bin/cargo";

/// The oldest compiler that the workspace builds with (`rust-version` in Cargo.toml).
const OLDEST: (u32, u32) = (1, 95);

/// A compiler that can build the eBPF programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Toolchain {
    /// Where it comes from.
    pub origin: Origin,
    /// As it calls itself.
    pub version: Version,
}

/// Where a compiler comes from, and so how it is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The distribution's, beside whatever rustup put into PATH.
    System,
    /// A rustup toolchain with rust-src, by name.
    Rustup(String),
}

/// What `rustc -vV` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// `1.96.0`, `1.97.0-nightly`.
    pub release: String,
    /// `22.1.8`; bpf-linker's must not be older.
    pub llvm: String,
    /// The machine's own target.
    pub host: String,
}

impl Version {
    fn parse(text: &str) -> Option<Self> {
        let field = |name| text.lines().find_map(|line| line.strip_prefix(name));
        Some(Self {
            release: field("release: ")?.to_owned(),
            llvm: field("LLVM version: ")?.to_owned(),
            host: field("host: ")?.to_owned(),
        })
    }

    fn is_new_enough(&self) -> bool {
        let mut numbers = self
            .release
            .split(['.', '-'])
            .map(|number| number.parse::<u32>());
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= OLDEST,
            (_, _) => false,
        }
    }

    /// Of a compiler, asked.
    pub fn of(rustc: &mut Command) -> Option<Self> {
        Self::parse(&process::answer(rustc.arg("-vV"))?)
    }
}

impl std::fmt::Display for Toolchain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { origin, version } = self;
        match origin {
            Origin::System => write!(f, "{SYSTEM_RUSTC} {}", version.release)?,
            Origin::Rustup(name) => write!(f, "rustup's {name}, {}", version.release)?,
        }
        write!(f, " (LLVM {})", version.llvm)
    }
}

impl Toolchain {
    /// The first that serves: the distribution's, a rustup nightly, another rustup toolchain.
    ///
    /// # Errors
    /// Says for every compiler that was found why it does not serve.
    pub fn detect(workspace: &Workspace) -> Result<Self> {
        let choice = env::var(CHOICE).ok();
        let mut reasons = Vec::new();
        if choice.as_deref().is_none_or(|choice| choice == SYSTEM) {
            match system(workspace) {
                Ok(found) => return Ok(found),
                Err(reason) => reasons.push(reason),
            }
        }
        let listed = process::answer(workspace.command("rustup").args(["toolchain", "list"]));
        for name in rustup_names(&listed.unwrap_or_default()) {
            if choice
                .as_ref()
                .is_some_and(|choice| !name.starts_with(choice.as_str()))
            {
                continue;
            }
            match rustup(workspace, &name) {
                Ok(found) => return Ok(found),
                Err(reason) => reasons.push(reason),
            }
        }
        if let Some(choice) = choice {
            reasons.push(format!("only {choice} was asked for ({CHOICE})"));
        }
        bail!("no compiler for the eBPF programs: {}", reasons.join("; "))
    }

    /// Cargo of this toolchain with what it takes to build for the kernel; the caller adds the subcommand's arguments.
    pub fn cargo(&self, workspace: &Workspace, subcommand: &str) -> Command {
        let mut cargo = match &self.origin {
            Origin::System => {
                let mut cargo = workspace.command(SYSTEM_CARGO);
                cargo
                    .arg(subcommand)
                    .env("RUSTC", SYSTEM_RUSTC)
                    .env_remove("RUSTUP_TOOLCHAIN");
                cargo
            }
            Origin::Rustup(name) => {
                let mut cargo = workspace.command("rustup");
                cargo.args(["run", name, "cargo", subcommand, "-Z", "build-std=core"]);
                cargo.env_remove("RUSTC").env_remove("RUSTUP_TOOLCHAIN");
                cargo
            }
        };
        // aya-ebpf uses unstable features, and so does -Z; on a nightly this changes nothing.
        cargo.env("RUSTC_BOOTSTRAP", "1");
        // In the flags, not in the profile: otherwise compiler_builtins lacks the function information that BTF needs
        // (aya issue 1649). \x1f separates flags.
        cargo.env(
            "CARGO_ENCODED_RUSTFLAGS",
            "-Cdebuginfo=2\x1f-Clink-arg=--btf",
        );
        cargo.env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", "bpf-linker");
        cargo.args(["--target", TARGET, "--profile", "bpf", "--target-dir"]);
        cargo.arg(workspace.target("ebpf"));
        cargo
    }
}

fn system(workspace: &Workspace) -> Result<Toolchain, String> {
    if !Path::new(SYSTEM_RUSTC).is_file() || !Path::new(SYSTEM_CARGO).is_file() {
        return Err(format!("there is no {SYSTEM_RUSTC} with its cargo"));
    }
    let version = Version::of(&mut workspace.command(SYSTEM_RUSTC))
        .ok_or_else(|| format!("{SYSTEM_RUSTC} does not say its version"))?;
    if !version.is_new_enough() {
        return Err(format!(
            "{SYSTEM_RUSTC} is {}, and {}.{} is needed",
            version.release, OLDEST.0, OLDEST.1
        ));
    }
    let arguments = ["--print", "target-libdir", "--target", TARGET];
    let folder =
        process::answer(workspace.command(SYSTEM_RUSTC).args(arguments)).unwrap_or_default();
    if !has_core(Path::new(folder.trim())) {
        return Err(format!(
            "{SYSTEM_RUSTC} {} has no core library for {TARGET}",
            version.release
        ));
    }
    Ok(Toolchain {
        origin: Origin::System,
        version,
    })
}

fn has_core(folder: &Path) -> bool {
    let Ok(files) = fs::read_dir(folder) else {
        return false;
    };
    files
        .flatten()
        .any(|file| file.file_name().to_string_lossy().starts_with("libcore-"))
}

fn rustup(workspace: &Workspace, name: &str) -> Result<Toolchain, String> {
    let rustc = || {
        let mut rustc = workspace.command("rustup");
        rustc.args(["run", name, "rustc"]);
        rustc
    };
    let version =
        Version::of(&mut rustc()).ok_or_else(|| format!("rustup's {name} does not work"))?;
    if !version.is_new_enough() {
        return Err(format!(
            "rustup's {name} is {}, and {}.{} is needed",
            version.release, OLDEST.0, OLDEST.1
        ));
    }
    let sysroot = process::answer(rustc().args(["--print", "sysroot"])).unwrap_or_default();
    if !library_source(Path::new(sysroot.trim())).is_file() {
        return Err(format!("rustup's {name} has no component rust-src"));
    }
    Ok(Toolchain {
        origin: Origin::Rustup(name.to_owned()),
        version,
    })
}

/// The file by which cargo recognises the standard library's source.
pub fn library_source(sysroot: &Path) -> PathBuf {
    sysroot.join("lib/rustlib/src/rust/library/Cargo.lock")
}

/// The names in `rustup toolchain list`, nightlies first.
fn rustup_names(listed: &str) -> Vec<String> {
    let mut names: Vec<_> = listed
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "no") // "no installed toolchains"
        .map(str::to_owned)
        .collect();
    names.sort_by_key(|name| !name.starts_with("nightly"));
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEBIAN: &str = "rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)\nbinary: rustc\n\
        commit-hash: ac68faa20c58cbccd01ee7208bf3b6e93a7d7f96\ncommit-date: 2026-05-25\n\
        host: x86_64-unknown-linux-gnu\nrelease: 1.96.0\nLLVM version: 22.1.8\n";

    fn version(release: &str) -> Version {
        Version {
            release: release.into(),
            llvm: "22.1.8".into(),
            host: "x86_64-unknown-linux-gnu".into(),
        }
    }

    #[test]
    fn the_compilers_own_words_give_its_version() {
        assert_eq!(Version::parse(DEBIAN), Some(version("1.96.0")));
        assert_eq!(Version::parse("rustc 1.63.0"), None);
    }

    #[test]
    fn compilers_older_than_the_workspace_allows_are_told_apart() {
        for (release, new_enough) in [
            ("1.94.1", false),
            ("1.95.0", true),
            ("1.97.0-nightly", true),
            ("2.0.0", true),
            ("unknown", false),
        ] {
            assert_eq!(version(release).is_new_enough(), new_enough, "{release}");
        }
    }

    #[test]
    fn nightlies_come_first_and_marks_are_cut_off() {
        let listed = "stable-x86_64-unknown-linux-gnu (active, default)\nnightly-x86_64-unknown-linux-gnu\n1.95.0\n";
        let names = [
            "nightly-x86_64-unknown-linux-gnu",
            "stable-x86_64-unknown-linux-gnu",
            "1.95.0",
        ];
        assert_eq!(rustup_names(listed), names);
        assert_eq!(
            rustup_names("no installed toolchains\n"),
            Vec::<String>::new()
        );
    }
}
