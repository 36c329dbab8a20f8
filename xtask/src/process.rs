//! Where the workspace is, and how other programs are run in it.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

/// How many lines of a failed program's output are worth showing.
const TAIL_LINES: usize = 30;

/// The folder with the workspace's `Cargo.toml`, and what is built in it.
pub struct Workspace {
    /// Absolute.
    pub root: PathBuf,
}

impl Workspace {
    /// The workspace that this xtask belongs to: cargo tells, also after the folder was moved.
    pub fn find() -> Self {
        let package = env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = package
            .parent()
            .map_or_else(|| PathBuf::from("."), Path::to_path_buf);
        Self { root }
    }

    /// `target/` of the workspace, or a path in it. Always this one: `proxy-agent/build.rs` looks there.
    pub fn target(&self, path: &str) -> PathBuf {
        self.root.join("target").join(path)
    }

    /// A program that will run in the workspace, without what `cargo run` put into our environment for its own sake.
    ///
    /// `LD_LIBRARY_PATH` names the libraries of the compiler that built xtask: another compiler must not see them.
    pub fn command(&self, program: impl Into<OsString>) -> Command {
        let mut command = Command::new(program.into());
        command
            .current_dir(&self.root)
            .env_remove("LD_LIBRARY_PATH");
        for (name, _) in env::vars_os() {
            if name.to_string_lossy().starts_with("CARGO_PKG_") {
                command.env_remove(name);
            }
        }
        command
            .env_remove("CARGO_MANIFEST_DIR")
            .env_remove("CARGO_MANIFEST_PATH");
        command
    }

    /// The cargo that runs us.
    pub fn cargo(&self) -> Command {
        let mut cargo = self.command(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.env("CARGO_TARGET_DIR", self.target(""));
        cargo
    }
}

/// Runs to the end with our own output and input.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot run {}", line(command)))?;
    if !status.success() {
        bail!("{} ended with {status}", line(command));
    }
    Ok(())
}

/// Runs to the end silently; a failure carries the last lines of what was printed.
pub fn run_quietly(command: &mut Command) -> Result<()> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", line(command)))?;
    if output.status.success() {
        return Ok(());
    }
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    bail!(
        "{} ended with {}; its last lines:\n{}",
        line(command),
        output.status,
        tail(&text)
    )
}

/// Standard output of a program that succeeded; `None` when it is not there or failed.
pub fn answer(command: &mut Command) -> Option<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The file a shell would run for `name`.
pub fn in_path(name: &str) -> Option<PathBuf> {
    // Debian keeps administrators' programs out of an ordinary user's PATH; we only run them as root.
    let extra = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&env::var_os("PATH").unwrap_or_default())
        .chain(extra)
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

/// The command as one would type it.
fn line(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(
        command
            .get_args()
            .map(|word| word.to_string_lossy().into_owned()),
    );
    words.join(" ")
}

/// The last lines, indented.
fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    let from = lines.len().saturating_sub(TAIL_LINES);
    lines[from..]
        .iter()
        .map(|line| format!("  {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}
