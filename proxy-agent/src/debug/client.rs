//! Who connects: from what the user typed to a network namespace.

use std::{io, net::IpAddr, path::Path};

use nix::ifaddrs::getifaddrs;
use proxy_ebpf::abi::Addr;

use super::explain::Client;
use crate::daemon::namespaces::{self, NAMED};

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
    match namespaces::inside(&path, namespaces::own_cookie) {
        Ok(cookie) => Ok(client(Some(cookie), false)),
        Err(error) => Err(format!(
            "cannot enter the network namespace {text}: {error}; this needs root"
        )),
    }
}

/// The cookie of the namespace that has an address.
fn namespace_with(address: IpAddr) -> Option<u64> {
    namespaces::named().iter().find_map(|path| {
        let cookie = namespaces::inside(path, move || {
            if has(address)? {
                namespaces::own_cookie().map(Some)
            } else {
                Ok(None)
            }
        });
        cookie.ok().flatten()
    })
}

/// Whether a link of the calling thread's namespace has an address.
fn has(address: IpAddr) -> io::Result<bool> {
    let mut interfaces = getifaddrs().map_err(io::Error::from)?;
    Ok(interfaces.any(|interface| {
        let storage = interface.address.as_ref();
        let v4 = storage
            .and_then(|s| s.as_sockaddr_in())
            .map(|s| IpAddr::from(s.ip()));
        let v6 = storage
            .and_then(|s| s.as_sockaddr_in6())
            .map(|s| IpAddr::from(s.ip()));
        v4.or(v6) == Some(address)
    }))
}
