//! Real Kubernetes components: a control plane in the switch of a topology, and kube-proxy on a node.

mod access;
mod bulk;
mod client;
mod control;
mod controllers;
mod machine;
mod namespaces;
mod proxy;

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
};

use anyhow::{Context, bail};

pub use access::Server;
pub use control::{ControlPlane, KUBE_PROXY, NOBODY, SERVICE_NETWORKS};
pub use machine::Machine;
pub use proxy::{KubeProxy, Mode, Periods, Variant};

use crate::place::Place;

/// Folder with the components, as `cargo xtask tools` makes it.
const FOLDER: &str = "PROXY_KUBE_TOOLS";

/// A component's binary.
///
/// # Errors
/// It is nowhere to be found.
pub fn tool(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let beside = own.ancestors().map(|folder| folder.join("tools"));
    let mut folders = std::env::var_os(FOLDER)
        .map(PathBuf::from)
        .into_iter()
        .chain(beside);
    match folders.find(|folder| folder.join(name).is_file()) {
        Some(folder) => Ok(folder.join(name)),
        None => bail!("no {name}: run `cargo xtask tools`, or set {FOLDER}"),
    }
}

/// A component at work. Dropping it kills the process and, in a failing test, prints the end of its log.
#[derive(Debug)]
struct Component {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Component {
    /// Starts one; `prepare` adds what the command needs.
    fn start(
        name: &str,
        place: &Place,
        log: &Path,
        prepare: impl FnOnce(&mut Command),
    ) -> anyhow::Result<Self> {
        let mut command = place.command(tool(name)?)?;
        prepare(&mut command);
        Self::spawn(name, command, log)
    }

    /// Starts one by a command that is complete.
    fn spawn(name: &str, mut command: Command, log: &Path) -> anyhow::Result<Self> {
        let output = File::options().create(true).append(true).open(log)?;
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        let child = command.spawn();
        Ok(Self {
            name: name.to_owned(),
            child: child.with_context(|| format!("cannot start {name}"))?,
            log: log.to_owned(),
        })
    }

    /// An error if it ended.
    fn ensure_alive(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended with {status}:\n{}", self.name, self.last_words()),
        }
    }

    /// The last lines of its log.
    fn last_words(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

impl Drop for Component {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{} said last:\n{}", self.name, self.last_words());
        }
        // Gone already: nothing to do.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
