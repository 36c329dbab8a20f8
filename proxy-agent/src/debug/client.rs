//! Who connects: from what the user typed to a network namespace.

use std::{
    fs, io,
    net::{IpAddr, UdpSocket},
    path::{Path, PathBuf},
};

use nix::{
    ifaddrs::getifaddrs,
    sched::{CloneFlags, setns},
};
use proxy_ebpf::abi::Addr;

use super::explain::Client;
use crate::backends::ebpf::sys;

/// Where `ip netns` and container runtimes bind network namespaces.
const NAMED: &str = "/run/netns";

/// Finds the client that `text` names; `node_cookie` is the netns cookie of META.
///
/// # Errors
/// A sentence: there is no such client.
pub fn find(
    text: &str,
    node_cookie: u64,
    is_node_address: impl Fn(&Addr) -> bool,
) -> Result<Client, String> {
    let client = |cookie: Option<u64>, from_loopback| Client {
        name: text.to_owned(),
        on_host: cookie == Some(node_cookie),
        netns_cookie: cookie,
        from_loopback,
    };
    if text == "host" {
        return Ok(client(Some(node_cookie), false));
    }
    if let Ok(address) = text.parse::<IpAddr>() {
        if address.is_loopback() || is_node_address(&Addr::from(address)) {
            return Ok(client(Some(node_cookie), address.is_loopback()));
        }
        // A pod whose namespace is not found has no affinity that could be looked up; all else is the same for every pod.
        return Ok(client(namespace_with(address), false));
    }
    if let Ok(cookie) = text.parse() {
        return Ok(client(Some(cookie), false));
    }
    let path = Path::new(NAMED).join(text);
    if text.contains('/') || !path.exists() {
        return Err(format!(
            "{text:?} is no client: give `host`, an address, the name of a network namespace in {NAMED}, or a netns cookie"
        ));
    }
    match inside(&path, netns_cookie) {
        Ok(cookie) => Ok(client(Some(cookie), false)),
        Err(error) => Err(format!(
            "cannot enter the network namespace {text}: {error}; this needs root"
        )),
    }
}

/// The cookie of the named namespace that has an address.
fn namespace_with(address: IpAddr) -> Option<u64> {
    let paths: Vec<PathBuf> = fs::read_dir(NAMED)
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    paths.iter().find_map(|path| {
        inside(path, move || {
            let has_it = getifaddrs().map_err(io::Error::from)?.any(|interface| {
                let storage = interface.address;
                let v4 = storage
                    .as_ref()
                    .and_then(|s| s.as_sockaddr_in())
                    .map(|s| IpAddr::from(s.ip()));
                let v6 = storage
                    .as_ref()
                    .and_then(|s| s.as_sockaddr_in6())
                    .map(|s| IpAddr::from(s.ip()));
                v4.or(v6) == Some(address)
            });
            if has_it {
                netns_cookie().map(Some)
            } else {
                Ok(None)
            }
        })
        .ok()
        .flatten()
    })
}

/// Runs `work` on a thread of its own in a network namespace; only that thread enters it.
fn inside<T: Send>(path: &Path, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let namespace = fs::File::open(path)?;
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
fn netns_cookie() -> io::Result<u64> {
    let socket = UdpSocket::bind("127.0.0.1:0").or_else(|_| UdpSocket::bind("[::]:0"))?;
    sys::netns_cookie(&socket)
}
