//! Whether the socket layer serves a client, by the cgroups of its processes.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// How the processes of a network namespace stand to the socket layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It serves them.
    Served,
    /// No process is seen there. It would serve one of a pod.
    Unseen,
    /// All are in excluded cgroups.
    Excluded,
    /// Some are in excluded cgroups.
    PartlyExcluded,
    /// None is below the cgroup whose sockets are served.
    Elsewhere,
}

/// Looks at the processes of a network namespace. `mount` is the cgroup v2 hierarchy, `served` the cgroup in it whose sockets
/// are served, `excluded` the ids of cgroups that are left alone.
pub fn standing(
    namespace: &Path,
    mount: &Path,
    served: &Path,
    excluded: &BTreeSet<u64>,
) -> Standing {
    let cgroups = cgroups(namespace, mount);
    let is_excluded = |cgroup: &&PathBuf| {
        let above = cgroup
            .ancestors()
            .take_while(|above| above.starts_with(mount));
        // A cgroup's id is its inode number (v5.5, 67c0496e87d1).
        let mut ids = above.filter_map(|above| fs::metadata(above).ok().map(|found| found.ino()));
        ids.any(|id| excluded.contains(&id))
    };
    let here: Vec<_> = cgroups
        .iter()
        .filter(|cgroup| cgroup.starts_with(served))
        .collect();
    let left = here.iter().copied().filter(is_excluded).count();
    match (cgroups.len(), here.len()) {
        (0, _) => Standing::Unseen,
        (_, 0) => Standing::Elsewhere,
        (_, here) if left == here => Standing::Excluded,
        _ if left > 0 => Standing::PartlyExcluded,
        _ => Standing::Served,
    }
}

/// The cgroups of a network namespace's processes.
fn cgroups(namespace: &Path, mount: &Path) -> BTreeSet<PathBuf> {
    let identity = |path: &Path| {
        let found = fs::metadata(path).ok()?;
        Some((found.dev(), found.ino()))
    };
    let Some(wanted) = identity(namespace) else {
        return BTreeSet::new();
    };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let inside =
        processes.filter(|process| identity(&process.path().join("ns/net")) == Some(wanted));
    let cgroup = |process: fs::DirEntry| {
        let text = fs::read_to_string(process.path().join("cgroup")).ok()?;
        let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
        Some(mount.join(path))
    };
    inside.filter_map(cgroup).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backends::ebpf::probe::cgroup_root;

    #[test]
    fn the_own_process_is_served_unless_it_is_excluded_or_elsewhere() {
        let mount = cgroup_root().expect("cgroup v2");
        let own = Path::new("/proc/self/ns/net");
        let id = fs::metadata(&mount).unwrap().ino();
        let ask = |served: &Path, excluded: &[u64]| {
            standing(own, &mount, served, &excluded.iter().copied().collect())
        };
        assert_eq!(ask(&mount, &[]), Standing::Served);
        assert_eq!(ask(&mount, &[id]), Standing::Excluded);
        assert_eq!(ask(&mount.join("no-such-cgroup"), &[]), Standing::Elsewhere);
        let nobody = Path::new("/proc/self/ns/no-such-namespace");
        let none = BTreeSet::new();
        assert_eq!(standing(nobody, &mount, &mount, &none), Standing::Unseen);
    }
}
