//! Removes what a topology made: processes, cgroups, network namespaces, pinned objects, files.
//!
//! A process of its own that waits for the maker's end of a pipe to close, so that it also works after a panic, Ctrl-C
//! or `kill -9`.

use std::{
    fs,
    io::{self, Read, Write},
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::Context;
use nix::mount::{MntFlags, umount2};

use crate::{names, names::Suffix, place::peer_binary, wait_for};

/// What the maker writes to the pipe when everything is to stay.
const KEEP: u8 = b'k';

/// The maker's end of a janitor.
#[derive(Debug)]
pub struct Janitor(Child);

impl Janitor {
    /// Starts a janitor for `suffix`; it acts when this value, or the whole process, is gone.
    ///
    /// # Errors
    /// The helper binary cannot be started.
    pub fn start(suffix: &Suffix) -> anyhow::Result<Self> {
        let peer = peer_binary()?;
        let child = Command::new(&peer)
            .args(["janitor", suffix.as_str()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            // Ctrl-C goes to the whole foreground group: not to this one.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", peer.display()))?;
        Ok(Self(child))
    }

    /// Leaves everything as it is.
    pub fn dismiss(&mut self) {
        if let Some(pipe) = &mut self.0.stdin {
            // The janitor is gone already if this fails, so nothing will be removed either.
            drop(pipe.write_all(&[KEEP]));
        }
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        match self.0.wait() {
            Ok(status) if status.success() => {}
            other => eprintln!("janitor: {other:?}; something may be left behind"),
        }
    }
}

/// The janitor's process: waits for the maker, then removes everything unless told to keep it.
///
/// # Errors
/// Something could not be removed.
pub fn run(suffix: &Suffix) -> anyhow::Result<()> {
    let mut told = Vec::new();
    io::stdin().read_to_end(&mut told)?;
    if told.contains(&KEEP) {
        return Ok(());
    }
    remove(suffix)
}

/// Removes everything that carries `suffix`.
///
/// # Errors
/// Something could not be removed; the rest is.
pub fn remove(suffix: &Suffix) -> anyhow::Result<()> {
    let cgroup = suffix.cgroup()?;
    let results = [
        kill_processes(&cgroup),
        remove_namespaces(&suffix.netns_prefix()),
        remove_tree(&suffix.bpf_dir()),
        suffix
            .cgroups()?
            .iter()
            .try_for_each(|cgroup| remove_cgroups(cgroup)),
        remove_tree(&suffix.state_dir()),
    ];
    results.into_iter().collect()
}

/// Removes what dead processes left.
///
/// # Errors
/// Something could not be removed.
pub fn sweep() -> anyhow::Result<()> {
    names::abandoned()?.iter().try_for_each(remove)
}

fn kill_processes(cgroup: &Path) -> anyhow::Result<()> {
    if !cgroup.exists() {
        return Ok(());
    }
    fs::write(cgroup.join("cgroup.kill"), "1")
        .or_else(|error| if cgroup.exists() { Err(error) } else { Ok(()) })
        .with_context(|| format!("cannot kill the processes of {}", cgroup.display()))?;
    wait_for(
        "processes end",
        Duration::from_secs(10),
        || match fs::read_to_string(cgroup.join("cgroup.events")) {
            Ok(events) if events.contains("populated 1") => anyhow::bail!("{events:?}"),
            _ => Ok(()),
        },
    )
}

fn remove_namespaces(prefix: &str) -> anyhow::Result<()> {
    let Ok(entries) = fs::read_dir(names::NETNS_DIR) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            // Not a mount any more: a removal that was interrupted.
            let _ = umount2(&entry.path(), MntFlags::MNT_DETACH);
            ignore_missing(fs::remove_file(entry.path()))
                .with_context(|| format!("cannot remove {}", entry.path().display()))?;
        }
    }
    Ok(())
}

fn remove_tree(path: &Path) -> anyhow::Result<()> {
    ignore_missing(fs::remove_dir_all(path))
        .with_context(|| format!("cannot remove {}", path.display()))
}

fn remove_cgroups(path: &Path) -> anyhow::Result<()> {
    let Ok(entries) = fs::read_dir(path) else {
        return Ok(());
    };
    for entry in entries.flatten().filter(|e| e.path().is_dir()) {
        remove_cgroups(&entry.path())?;
    }
    // A process that was just killed may keep it busy for a moment.
    wait_for("cgroup is removed", Duration::from_secs(5), || {
        Ok(ignore_missing(fs::remove_dir(path))?)
    })
    .with_context(|| format!("cannot remove {}", path.display()))
}

fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
