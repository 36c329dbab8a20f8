//! Network namespaces of this node: where they are, their cookies, and how to do something inside one.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    net::UdpSocket,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::sched::{CloneFlags, setns};

use crate::backends::ebpf::{probe::NAMED_NAMESPACES, sys};

/// Namespaces that have a name.
pub fn named() -> Vec<PathBuf> {
    let entries = fs::read_dir(NAMED_NAMESPACES)
        .into_iter()
        .flatten()
        .flatten();
    entries.map(|entry| entry.path()).collect()
}

/// Namespaces that only processes hold.
fn of_processes() -> Vec<PathBuf> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let is_process = |name: &str| name.bytes().all(|byte| byte.is_ascii_digit());
    entries
        .filter(|entry| entry.file_name().to_str().is_some_and(is_process))
        .map(|entry| entry.path().join("ns/net"))
        .collect()
}

/// Runs `work` in a network namespace, on a thread of its own: only that thread enters it.
///
/// # Errors
/// The namespace is gone or may not be entered (that takes CAP_SYS_ADMIN), or `work` failed.
pub fn inside<T: Send>(path: &Path, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let namespace = File::open(path)?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            work()
        });
        thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread inside ended early")))
    })
}

/// Cookie of the calling thread's network namespace.
///
/// # Errors
/// The kernel has none (before 5.14), or no socket can be had.
pub fn own_cookie() -> io::Result<u64> {
    let socket = UdpSocket::bind("127.0.0.1:0").or_else(|_| UdpSocket::bind("[::]:0"))?;
    sys::netns_cookie(&socket)
}

/// Every network namespace that has a name or a process, each once.
pub fn all() -> Vec<PathBuf> {
    distinct(named().into_iter().chain(of_processes()))
}

/// The namespaces among these, each once: many processes share one. A name is a plain file, which may be closed to all, until the
/// namespace is mounted on it.
fn distinct(paths: impl Iterator<Item = PathBuf>) -> Vec<PathBuf> {
    let Ok(own) = fs::metadata("/proc/thread-self/ns/net") else {
        return Vec::new();
    };
    let mut seen = HashSet::new();
    let is_new = |path: &PathBuf| {
        let found = fs::metadata(path).ok();
        found.is_some_and(|found| found.dev() == own.dev() && seen.insert(found.ino()))
    };
    paths.filter(is_new).collect()
}

/// Runs `work` in each of these network namespaces, one after the other, on one thread of its own.
pub fn visit<T: Send>(
    paths: &[PathBuf],
    work: impl Fn() -> io::Result<T> + Sync,
) -> Vec<io::Result<T>> {
    let enter = |path: &PathBuf| {
        setns(File::open(path)?, CloneFlags::CLONE_NEWNET)?;
        work()
    };
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| paths.iter().map(enter).collect());
        thread.join().unwrap_or_else(|_| {
            let ended = |_| Err(io::Error::other("the thread inside ended early"));
            paths.iter().map(ended).collect()
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[ignore = "needs CAP_SYS_ADMIN"]
    fn the_own_namespace_is_among_all_and_can_be_visited() {
        let cookie = own_cookie().unwrap();
        let all = all();
        let cookies = visit(&all, own_cookie);
        assert_eq!(cookies.len(), all.len());
        let own = cookies.iter().flatten().filter(|found| **found == cookie);
        assert_eq!(own.count(), 1, "{all:?}");
        assert_eq!(
            own_cookie().unwrap(),
            cookie,
            "this thread stays where it is"
        );
    }

    #[test]
    fn a_name_without_its_namespace_and_what_was_seen_are_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let name = folder.path().join("made-just-now");
        File::create(&name).unwrap();
        let own = PathBuf::from("/proc/self/ns/net");
        let same = PathBuf::from("/proc/thread-self/ns/net");
        let gone = folder.path().join("gone");
        let paths = [name, own.clone(), gone, same];
        assert_eq!(distinct(paths.into_iter()), [own]);
    }

    #[test]
    fn a_namespace_that_is_gone_is_told_apart() {
        let gone = [PathBuf::from("/proc/self/ns/no-such-namespace")];
        let results = visit(&gone, own_cookie);
        assert_eq!(
            results[0].as_ref().unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }
}
