//! What makes a node look like a machine to its programs: mounts, cgroups and a host name of its own.

use std::{
    ffi::OsStr,
    fmt::Write as _,
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, ensure};

use crate::{Node, names, place::Place};

const CGROUPS: &str = "/sys/fs/cgroup";
/// What kubelet sets for the whole machine unless it finds it so (pkg/kubelet/cm/container_manager_linux.go): it finds it so.
const SETTINGS: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// Namespaces beside the node's network.
#[derive(Debug)]
pub(super) struct Namespaces {
    place: Place,
    /// Holds them until its input ends.
    holder: Child,
}

impl Namespaces {
    /// Makes them; `dir` is for what they are made of.
    pub(super) fn make(node: &Node, dir: &Path) -> anyhow::Result<Self> {
        let cgroups = own_cgroups(node)?;
        let mut command = node.place().command("sh")?;
        // They are made where the process is, so it goes to the roots of what it will see.
        let enter =
            r#"until [ "$1" = -- ]; do echo $$ > "$1/cgroup.procs"; shift; done; shift; exec "$@""#;
        command.args(["-ec", enter, "sh"]);
        command.args(cgroups.iter().map(|cgroup| &cgroup.own));
        command.args(["--", "unshare", "--mount", "--cgroup", "--uts"]);
        command.args(["sh", "-ec", &script(node, &cgroups, dir)?]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = command.spawn().context("cannot start a shell")?;
        let output = holder.stdout.take().context("no pipe")?;
        let mut said = String::new();
        BufReader::new(output).read_line(&mut said)?;
        ensure!(said == "ready\n", "{}: no namespaces", node.name());
        share_controllers(node)?;
        let place = node.place().clone();
        Ok(Self { place, holder })
    }

    /// A program that runs in them.
    pub(super) fn command(&self, program: impl AsRef<OsStr>) -> anyhow::Result<Command> {
        let mut command = self.place.command("nsenter")?;
        let pid = self.holder.id().to_string();
        command.args(["--target", &pid, "--mount", "--uts", "--cgroup"]);
        // In v1 a process is in a cgroup of each hierarchy.
        let enter =
            r#"for c in /sys/fs/cgroup/*/tasks; do [ ! -e $c ] || echo $$ > $c; done; exec "$@""#;
        command.args(["sh", "-ec", enter, "sh"]).arg(program);
        Ok(command)
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        // It may have ended.
        drop(self.holder.wait());
    }
}

/// A cgroup of the node's.
struct Cgroup {
    /// What the node sees as a root.
    own: PathBuf,
    /// Where it sees it.
    seen: PathBuf,
}

/// The node's cgroup in each hierarchy.
fn own_cgroups(node: &Node) -> anyhow::Result<Vec<Cgroup>> {
    let v2 = names::cgroup2_root()?;
    let node = node.cgroup();
    let relative = node.strip_prefix(&v2)?;
    let mut cgroups = Vec::new();
    for seen in names::hierarchies()? {
        let own = seen.join(relative);
        let parent = own.parent().context("a node is part of a topology")?;
        fs::create_dir_all(parent)?;
        // Without them nobody can enter.
        for name in ["cpuset.cpus", "cpuset.mems"] {
            if let Ok(value) = fs::read_to_string(seen.join(name)) {
                fs::write(parent.join(name), value)?;
                fs::write(parent.join("cgroup.clone_children"), "1")?;
            }
        }
        fs::create_dir_all(&own)?;
        cgroups.push(Cgroup { own, seen });
    }
    Ok(cgroups)
}

/// What the holder does in its namespaces.
fn script(node: &Node, cgroups: &[Cgroup], dir: &Path) -> anyhow::Result<String> {
    let mut mounts = String::new();
    let stage = dir.join("cgroups");
    for Cgroup { own, seen } in cgroups {
        let to = stage.join(seen.strip_prefix(CGROUPS)?);
        let (own, to) = (own.display(), to.display());
        writeln!(mounts, "mkdir -p {to}; mount --bind {own} {to}")?;
    }
    for (name, value) in SETTINGS {
        let file = dir.join(name.replace('/', "-"));
        fs::write(&file, value)?;
        writeln!(mounts, "mount --bind {} /proc/sys/{name}", file.display())?;
    }
    let (name, stage, v2) = (node.name(), stage.display(), names::cgroup2_root()?);
    let host = v2.join("host/cgroup.procs");
    Ok(format!(
        r"echo {name} > /proc/sys/kernel/hostname
mkdir {stage}
mount -t tmpfs -o mode=755 cgroup {stage}
{mounts}
umount --recursive --lazy {CGROUPS}
mount --move {stage} {CGROUPS}
echo $$ > {}
mount -t bpf bpf /sys/fs/bpf
mount -t tmpfs -o mode=755 run /run
mkdir /run/netns /run/lock
mount --make-rshared /
echo ready
exec cat",
        host.display()
    ))
}

/// Where v2 has all controllers, those below may use them.
fn share_controllers(node: &Node) -> anyhow::Result<()> {
    let root = names::cgroup2_root()?;
    let node = node.cgroup();
    let folders = node
        .ancestors()
        .take_while(|folder| folder.starts_with(&root));
    let folders: Vec<_> = folders.collect();
    for folder in folders.iter().rev() {
        let controllers = fs::read_to_string(folder.join("cgroup.controllers"))?;
        for controller in controllers.split_whitespace() {
            fs::write(
                folder.join("cgroup.subtree_control"),
                format!("+{controller}"),
            )?;
        }
    }
    Ok(())
}
