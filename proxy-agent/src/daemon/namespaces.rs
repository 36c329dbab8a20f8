//! Network namespaces of this node: where they are, their cookies, and how to do something inside one.

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    net::UdpSocket,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::sched::{CloneFlags, setns};

use crate::backends::ebpf::sys;

/// Where `ip netns` and container runtimes bind network namespaces.
pub const NAMED: &str = "/run/netns";

/// Namespaces that have a name.
pub fn named() -> Vec<PathBuf> {
    let entries = fs::read_dir(NAMED).into_iter().flatten().flatten();
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

/// Which namespace has which cookie, as found so far. Cookies are never used twice.
#[derive(Debug, Default)]
pub struct Cookies {
    /// A process may have left the namespace meanwhile, so a hit is verified.
    known: HashMap<u64, PathBuf>,
}

impl Cookies {
    /// Where the namespace with this cookie can be entered; none if it is gone or hidden.
    pub fn find(&mut self, cookie: u64) -> Option<PathBuf> {
        if let Some(path) = self.known.get(&cookie)
            && inside(path, own_cookie).is_ok_and(|found| found == cookie)
        {
            return Some(path.clone());
        }
        self.known.clear();
        let mut seen = Vec::new();
        for path in named().into_iter().chain(of_processes()) {
            // Many processes share a namespace: each is entered once.
            let Ok(metadata) = fs::metadata(&path) else {
                continue;
            };
            let identity = (metadata.dev(), metadata.ino());
            if seen.contains(&identity) {
                continue;
            }
            seen.push(identity);
            if let Ok(found) = inside(&path, own_cookie) {
                self.known.insert(found, path);
            }
            if self.known.contains_key(&cookie) {
                break;
            }
        }
        self.known.get(&cookie).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[ignore = "needs CAP_SYS_ADMIN"]
    fn the_own_namespace_is_found_by_its_cookie() {
        let cookie = own_cookie().unwrap();
        let path = Cookies::default().find(cookie).unwrap();
        assert_eq!(inside(&path, own_cookie).unwrap(), cookie);
    }
}
