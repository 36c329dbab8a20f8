//! Who connects: from what the user typed to a network namespace.

use std::{
    io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use proxy_ebpf::abi::Addr;

use super::routes::Whereabouts;
use crate::{
    backends::{ebpf::probe::NAMED_NAMESPACES, own_addresses},
    daemon::namespaces,
};

/// Who connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// How the user named it.
    pub name: String,
    /// It lives in the node's own network namespace.
    pub on_host: bool,
    /// Cookie of its network namespace, the key of its affinity; none when that could not be found.
    pub netns_cookie: Option<u64>,
    /// It binds its sockets to a loopback address.
    pub from_loopback: bool,
    /// Its address, when it was named by one.
    pub address: Option<IpAddr>,
    /// Its network namespace, when that was found; none for the node's own.
    pub namespace: Option<PathBuf>,
    /// It is named by an address that nothing on this node has.
    pub is_outside: bool,
}

/// How likely it is that a network namespace is on this node, and not on another one in containers of the same machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Presence {
    /// Its processes are elsewhere.
    Elsewhere,
    /// Nothing is seen of it.
    Unseen,
    /// It has processes here.
    Here,
}

/// Finds the client that `text` names; `node_cookie` is the netns cookie of META. `whereabouts` says where an address is. Of
/// several network namespaces with one address (nodes in containers) the likeliest is meant.
///
/// # Errors
/// A sentence: there is no such client.
pub fn find(
    text: &str,
    node_cookie: u64,
    is_node_address: impl Fn(&Addr) -> bool,
    whereabouts: impl FnOnce(IpAddr) -> Whereabouts,
    presence: impl Fn(&Path) -> Presence,
) -> Result<Client, String> {
    let client = |cookie: Option<u64>| Client {
        name: text.to_owned(),
        on_host: cookie == Some(node_cookie),
        netns_cookie: cookie,
        from_loopback: false,
        address: None,
        namespace: None,
        is_outside: false,
    };
    if text == "host" {
        return Ok(client(Some(node_cookie)));
    }
    if let Ok(address) = text.parse::<IpAddr>() {
        let named = |cookie| Client {
            address: Some(address),
            from_loopback: address.is_loopback(),
            ..client(cookie)
        };
        if address.is_loopback() || is_node_address(&Addr::from(address)) {
            return Ok(named(Some(node_cookie)));
        }
        // Where the way to it leads out as well, only what is seen here is here.
        let owner = match whereabouts(address) {
            Whereabouts::Inside => namespace_with(address, Presence::Elsewhere, presence),
            Whereabouts::Unclear => namespace_with(address, Presence::Here, presence),
            Whereabouts::Outside => Owner::Nobody,
        };
        return Ok(match owner {
            Owner::Namespace(path, cookie) => Client {
                namespace: Some(path),
                ..named(cookie)
            },
            Owner::Nobody => Client {
                is_outside: true,
                ..named(None)
            },
            // A pod whose namespace is not found has no affinity that could be looked up; all else is the same for every pod.
            Owner::Unknown => named(None),
        });
    }
    if let Ok(cookie) = text.parse() {
        return Ok(Client {
            namespace: namespace_of(cookie),
            ..client(Some(cookie))
        });
    }
    let path = Path::new(NAMED_NAMESPACES).join(text);
    if text.contains('/') || !path.exists() {
        return Err(format!(
            "{text:?} is no client: give `host`, an address, the name of a network namespace in {NAMED_NAMESPACES}, or a netns cookie"
        ));
    }
    match namespaces::inside(&path, namespaces::own_cookie) {
        Ok(cookie) => Ok(Client {
            namespace: Some(path),
            ..client(Some(cookie))
        }),
        Err(error) => Err(format!(
            "cannot enter the network namespace {text}: {error}; this needs root"
        )),
    }
}

/// Who has an address.
enum Owner {
    /// A network namespace of this node, and its cookie where the kernel has such.
    Namespace(PathBuf, Option<u64>),
    /// No network namespace of this node.
    Nobody,
    /// Not all of them may be entered.
    Unknown,
}

/// The likeliest of those that have an address, and are as likely as `least` at least.
fn namespace_with(address: IpAddr, least: Presence, presence: impl Fn(&Path) -> Presence) -> Owner {
    let paths = namespaces::all();
    let owners = namespaces::visit(&paths, || {
        let has = own_addresses()?.any(|own| own == address);
        Ok(has.then(|| namespaces::own_cookie().ok()))
    });
    let is_denied = |owner: &io::Result<_>| {
        let error = owner.as_ref().err();
        error.is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
    };
    let nobody = match owners.iter().any(is_denied) {
        true => Owner::Unknown,
        false => Owner::Nobody,
    };
    let with_it = paths.into_iter().zip(owners).filter_map(|(path, owner)| {
        // Others are gone, or without it.
        let cookie = owner.ok().flatten()?;
        Some((presence(&path), path, cookie))
    });
    let likely = with_it.filter(|(presence, ..)| *presence >= least);
    likely
        .max_by_key(|(presence, ..)| *presence)
        .map_or(nobody, |(_, path, cookie)| Owner::Namespace(path, cookie))
}

fn namespace_of(cookie: u64) -> Option<PathBuf> {
    let paths = namespaces::all();
    let cookies = namespaces::visit(&paths, namespaces::own_cookie);
    let mut found = paths.into_iter().zip(cookies);
    let (path, _) = found.find(|(_, found)| found.as_ref().is_ok_and(|found| *found == cookie))?;
    Some(path)
}
