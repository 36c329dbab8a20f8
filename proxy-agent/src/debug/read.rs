//! From pinned maps to [`Contents`].

use std::{collections::BTreeMap, io};

use proxy_ebpf::{
    abi::{Connection, MemberWord, Socket, SocketRecord},
    lb::{ATTEMPTS, Tables as _},
};

use super::contents::{Contents, Entry, MapUse, slots};
use crate::{
    backends::{Error, ebpf::view::PinnedMaps},
    daemon::namespaces,
};

/// Reads everything but sockets, which only iterator programs can list.
///
/// # Errors
/// The kernel could not be read.
pub fn read(maps: &PinnedMaps) -> Result<Contents, Error> {
    let mut contents = Contents {
        meta: maps.meta(),
        frontends: maps.frontends()?.into_iter().collect(),
        vips: maps.vips()?.into_iter().collect(),
        addresses: maps.addresses()?.into_iter().collect(),
        affinity: maps.affinity_entries()?.into_iter().collect(),
        reasons: maps.pins.reasons()?,
        maps: map_uses(maps)?,
        services: BTreeMap::new(),
        slots: BTreeMap::new(),
        members: BTreeMap::new(),
        sockets: Vec::new(),
        peers: Vec::new(),
    };
    let capacity = maps.capacity();
    for index in 0..capacity.members {
        if let Some(member) = maps.member(index)
            && member.word.bits() & MemberWord::SERVING != 0
        {
            contents.members.insert(index, member);
        }
    }
    for index in 0..capacity.services {
        let (Some(mut service), Some(name), Some(stats)) =
            (maps.service(index), maps.name(index), maps.stats(index))
        else {
            continue;
        };
        if service.used == 0 || name.len == 0 {
            continue;
        }
        for _ in 0..ATTEMPTS {
            let cluster = slots(maps, service.cluster);
            let local = slots(maps, service.local);
            if let (Some(cluster), Some(local)) = (cluster, local) {
                contents.slots.extend(cluster);
                contents.slots.extend(local);
                break;
            }
            service = maps.service(index).unwrap_or(service);
        }
        contents.services.insert(
            index,
            Entry {
                service,
                name,
                stats,
            },
        );
    }
    Ok(contents)
}

/// Every translated socket of the node: those of CONNECTIONS, and in each network namespace that can be entered those with
/// storage.
///
/// # Errors
/// None can be listed, not even in the own namespace.
pub fn sockets(maps: &PinnedMaps) -> Result<Vec<SocketRecord>, Error> {
    // First, and so the ones that stay: a socket may have storage from an earlier connection.
    let mut records: Vec<SocketRecord> = maps.connections().map(record).collect();
    records.extend(maps.pins.sockets()?);
    let namespaces = namespaces::all();
    let listed = namespaces::visit(&namespaces, || {
        maps.pins.sockets().map_err(io::Error::other)
    });
    for (path, listed) in namespaces.iter().zip(listed) {
        match listed {
            Ok(listed) => records.extend(listed),
            Err(error) => {
                tracing::warn!(netns = %path.display(), %error, "cannot list the sockets of a network namespace: it takes CAP_SYS_ADMIN");
            }
        }
    }
    records.sort_by_key(|record| record.cookie);
    records.dedup_by_key(|record| record.cookie);
    Ok(records)
}

fn record(connection: Connection) -> SocketRecord {
    let mut socket = Socket {
        netns_cookie: connection.netns_cookie,
        ..Socket::default()
    };
    socket.peers[0] = connection.peer;
    SocketRecord {
        cookie: connection.owner,
        socket,
    }
}

/// Entries and capacity of every map.
///
/// # Errors
/// The kernel could not be read.
pub fn map_uses(maps: &PinnedMaps) -> Result<Vec<MapUse>, Error> {
    let summaries = maps.pins.maps()?.into_iter();
    Ok(summaries
        .map(|map| MapUse {
            map: map.name,
            entries: map.entries.map(u64::from),
            capacity: u64::from(map.capacity),
            bytes: map.bytes,
        })
        .collect())
}
