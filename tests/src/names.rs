//! Names and paths of everything a topology makes in the kernel: from these the janitor finds it again.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};

/// Where named network namespaces live.
pub const NETNS_DIR: &str = "/run/netns";
/// Where BPF objects are pinned.
pub const BPFFS: &str = "/sys/fs/bpf";

/// What all names of one topology have in common: `<process id of the maker>-<counter>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suffix(String);

impl Suffix {
    /// The first free one of this process, taken by making its state directory.
    ///
    /// # Errors
    /// The state directory cannot be made.
    pub fn take() -> anyhow::Result<Self> {
        let process = std::process::id();
        for counter in 0.. {
            let suffix = Self(format!("{process}-{counter}"));
            match fs::create_dir(suffix.state_dir()) {
                Ok(()) => return Ok(suffix),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    let path = suffix.state_dir();
                    return Err(error).with_context(|| format!("cannot make {}", path.display()));
                }
            }
        }
        bail!("every name is taken")
    }

    /// A fixed one, for a topology that may outlive its maker: no sweep removes it.
    ///
    /// # Errors
    /// It exists, or its state directory cannot be made.
    pub fn take_named(name: &str) -> anyhow::Result<Self> {
        let suffix = Self::parse(name)?;
        let path = suffix.state_dir();
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(suffix)
    }

    /// Takes a suffix from the command line.
    ///
    /// # Errors
    /// Characters that none of our names has.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
        if text.is_empty() || !text.chars().all(plain) {
            bail!("bad topology name {text:?}: letters, digits and dashes only");
        }
        Ok(Self(text.to_owned()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Name of the network namespace of `part`.
    pub fn netns(&self, part: &str) -> String {
        format!("pt-{}-{part}", self.0)
    }

    /// How the names of all its network namespaces begin.
    pub fn netns_prefix(&self) -> String {
        format!("pt-{}-", self.0)
    }

    /// Its directory in cgroup v2.
    pub fn cgroup(&self) -> anyhow::Result<PathBuf> {
        Ok(cgroup2_root()?.join(self.directory()))
    }

    /// Its directory in every hierarchy of cgroups, v2's among them.
    ///
    /// # Errors
    /// The mounts cannot be read.
    pub fn cgroups(&self) -> anyhow::Result<Vec<PathBuf>> {
        let mounts = hierarchies()?.into_iter();
        Ok(mounts.map(|mount| mount.join(self.directory())).collect())
    }

    /// Its directory on bpffs.
    pub fn bpf_dir(&self) -> PathBuf {
        Path::new(BPFFS).join(self.directory())
    }

    /// Its directory for logs, manifests and configuration.
    pub fn state_dir(&self) -> PathBuf {
        std::env::temp_dir().join(self.directory())
    }

    fn directory(&self) -> String {
        format!("proxy-test-{}", self.0)
    }
}

/// Suffixes of everything that a process left behind which is no more.
pub fn abandoned() -> anyhow::Result<Vec<Suffix>> {
    let directories = [cgroup2_root()?, BPFFS.into(), std::env::temp_dir()];
    let mut names: Vec<String> = directories
        .iter()
        .flat_map(|directory| entries(directory))
        .filter_map(|name| name.strip_prefix("proxy-test-").map(str::to_owned))
        .collect();
    names.extend(
        entries(Path::new(NETNS_DIR)).filter_map(|name| Some(name.strip_prefix("pt-")?.to_owned())),
    );
    let mut found: Vec<String> = names
        .iter()
        .filter_map(|name| owner_is_dead(name))
        .collect();
    found.sort();
    found.dedup();
    Ok(found.into_iter().map(Suffix).collect())
}

/// `<pid>-<counter>` at the start of `name`, if that process is no more.
fn owner_is_dead(name: &str) -> Option<String> {
    let mut parts = name.split('-');
    let process: u32 = parts.next()?.parse().ok()?;
    let counter: u32 = parts.next()?.parse().ok()?;
    (!Path::new(&format!("/proc/{process}")).exists()).then(|| format!("{process}-{counter}"))
}

fn entries(directory: &Path) -> impl Iterator<Item = String> + use<> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
}

/// Where cgroup v2 is mounted: the root, or beside v1's hierarchies.
///
/// # Errors
/// It is not mounted.
pub fn cgroup2_root() -> anyhow::Result<PathBuf> {
    mount_point("cgroup2")?
        .context("cgroup v2 is not mounted; try: mount -t cgroup2 none /sys/fs/cgroup")
}

/// Where the hierarchies of cgroups are mounted, v2's and any of v1.
///
/// # Errors
/// The mounts cannot be read.
pub fn hierarchies() -> io::Result<Vec<PathBuf>> {
    let mut found = mount_points("cgroup")?;
    found.extend(mount_points("cgroup2")?);
    Ok(found)
}

/// Mounts bpffs unless it is there.
///
/// # Errors
/// Not allowed to.
pub fn ensure_bpffs() -> anyhow::Result<()> {
    if mount_point("bpf")?.is_some_and(|path| path == Path::new(BPFFS)) {
        return Ok(());
    }
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("bpf"), BPFFS, Some("bpf"), flags, None::<&str>)
        .with_context(|| format!("cannot mount bpffs at {BPFFS}"))
}

fn mount_point(kind: &str) -> io::Result<Option<PathBuf>> {
    Ok(mount_points(kind)?.into_iter().next())
}

fn mount_points(kind: &str) -> io::Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/mounts")?;
    let fields = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>());
    let found = fields.filter(|fields| fields.get(2) == Some(&kind));
    Ok(found
        .filter_map(|fields| fields.get(1).map(PathBuf::from))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_dead_processes_left_is_abandoned() {
        let own = std::process::id();
        assert_eq!(owner_is_dead(&format!("{own}-3-node-a")), None);
        // Larger than any process id can be (PID_MAX_LIMIT is 2^22).
        assert_eq!(
            owner_is_dead("99999999-3-node-a"),
            Some("99999999-3".into())
        );
        assert_eq!(owner_is_dead("kept-99999999"), None);
    }
}
