//! The pins of a generation, read without mapping a whole map: a mapping counts as resident memory, to the last page.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use proxy_ebpf::abi::{
    Addr, AffinityKey, AffinityValue, Connection, FrontendKey, FrontendValue, Member, Peer,
    PeerKey, Plain, Reason, SocketRecord, peer_flags,
};

use super::super::{
    dir::Directory,
    kernel,
    links::{self, Hook, Place},
    maps::{Array, per_cpu_totals},
    refused::refused,
    sys,
    tables::{Fds, handle, hash, opted_out},
};
use crate::backends::Error;

/// The maps and hooks that are pinned, by name.
pub struct Pins {
    links: PathBuf,
    fds: Fds,
}

/// One pinned map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapSummary {
    /// Name of the pin.
    pub name: String,
    /// Kernel id.
    pub id: u32,
    /// Type in the kernel's words, lower case: "hash", "array", "lru_hash".
    pub map_type: &'static str,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Entries in use; `None` where that cannot be told (socket storage).
    pub entries: Option<u32>,
    /// Entries that fit.
    pub capacity: u32,
    /// Bytes of kernel memory.
    pub bytes: u64,
}

/// One pinned hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HookSummary {
    /// Name of the hook and of its program: "connect4".
    pub hook: &'static str,
    /// Id of the link.
    pub link: u32,
    /// Id of the program.
    pub program: u32,
    /// Tag of the program: what it does, whatever its maps are.
    pub tag: String,
    /// Id of the cgroup that it is attached to; 0 for iterators.
    pub cgroup: u64,
}

/// A swap may remove the generation while it is being opened; the next one is complete by then.
pub(super) fn while_generations_change<T>(open: impl Fn() -> Result<T, Error>) -> Result<T, Error> {
    open().or_else(|_| open()).or_else(|_| open())
}

impl Pins {
    /// Opens the current generation below `bpf_dir`.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn open(bpf_dir: &Path) -> Result<Self, Error> {
        while_generations_change(|| Self::open_once(bpf_dir))
    }

    pub(super) fn open_once(bpf_dir: &Path) -> Result<Self, Error> {
        let dir = Directory::look(bpf_dir)?;
        let (_, fds) = kernel::newest_complete(&dir)?;
        Ok(Self {
            links: bpf_dir.join("links"),
            fds,
        })
    }

    /// The maps.
    pub(super) fn fds(&self) -> &Fds {
        &self.fds
    }

    /// All of PEERS.
    ///
    /// # Errors
    /// As above.
    pub fn peers(&self) -> Result<Vec<(PeerKey, Peer)>, Error> {
        hash(&self.fds, "PEERS")?.entries()
    }

    /// Every socket with storage of ours in the calling thread's network namespace.
    ///
    /// # Errors
    /// As above, or the kernel refused an iterator over sockets.
    pub fn sockets(&self) -> Result<Vec<SocketRecord>, Error> {
        let mut records = Vec::new();
        for hook in [Hook::ListTcp, Hook::ListUdp] {
            let path = self.links.join(hook.name());
            let bytes = fs::read(&path).map_err(|error| refused("read", path.display(), error))?;
            let found = bytes.chunks_exact(size_of::<SocketRecord>());
            records.extend(found.map(sys::from_prefix::<SocketRecord>));
        }
        Ok(records)
    }

    /// Ids of the cgroups whose sockets are left alone.
    ///
    /// # Errors
    /// As above.
    pub fn opt_out(&self) -> Result<BTreeSet<u64>, Error> {
        opted_out(&self.fds)
    }

    /// REASONS, summed over the CPUs.
    ///
    /// # Errors
    /// As above.
    pub fn reasons(&self) -> Result<Vec<(Reason, u64)>, Error> {
        let totals = per_cpu_totals(&handle(&self.fds, "REASONS")?)
            .map_err(|error| refused("read", "map REASONS", error))?;
        Ok(Reason::ALL.into_iter().zip(totals).collect())
    }

    /// Every pinned map of the generation, by name.
    ///
    /// # Errors
    /// As above.
    pub fn maps(&self) -> Result<Vec<MapSummary>, Error> {
        let mut summaries = Vec::new();
        for (name, map) in &self.fds {
            let failed = |error| refused("read", format_args!("map {name}"), error);
            let info = sys::map_info(map).map_err(failed)?;
            let memory = sys::fd_field(map, "memlock").map_err(failed)?;
            summaries.push(MapSummary {
                name: name.clone(),
                id: info.id,
                map_type: kernel::type_name(info.type_),
                key_size: info.key_size,
                value_size: info.value_size,
                entries: self.entries(name)?,
                capacity: info.max_entries,
                bytes: memory.and_then(|bytes| bytes.parse().ok()).unwrap_or(0),
            });
        }
        Ok(summaries)
    }

    /// Entries in use. Of an array: those that are not all zero, as far as that says something.
    fn entries(&self, name: &str) -> Result<Option<u32>, Error> {
        let entries = match name {
            "FRONTENDS" => self.keys::<FrontendKey, FrontendValue>(name)?,
            "VIPS" | "LOCAL_ADDRS" => self.keys::<Addr, u32>(name)?,
            "AFFINITY" => self.keys::<AffinityKey, AffinityValue>(name)?,
            "PEERS" => self.keys::<PeerKey, Peer>(name)?,
            "OPTOUT" => self.opt_out()?.len(),
            "SERVICES" | "NAMES" | "SLOTS" | "STATS" | "META" => {
                self.count(name, |part, index| !part.is_zero(index))?
            }
            // A free member keeps its generation.
            "MEMBERS" => self.count(name, |part, index| {
                part.read::<Member>(index).word.bits() != 0
            })?,
            "CONNECTIONS" => self.count(name, |part, index| {
                is_a_sockets(&part.read::<Connection>(index))
            })?,
            _ => return Ok(None),
        };
        Ok(Some(entries as u32))
    }

    fn keys<K: Plain, V: Plain>(&self, name: &str) -> Result<usize, Error> {
        Ok(hash::<K, V>(&self.fds, name)?.entries()?.len())
    }

    fn count(&self, name: &str, counts: impl Fn(&Array, u32) -> bool) -> Result<usize, Error> {
        let mut count = 0;
        let map = handle(&self.fds, name)?;
        Array::in_parts(&map, |part| {
            count += (0..part.len()).filter(|index| counts(part, *index)).count();
        })
        .map_err(|error| refused("map", format_args!("map {name}"), error))?;
        Ok(count)
    }

    /// Every pinned hook, in the order in which they are attached.
    ///
    /// # Errors
    /// As above.
    pub fn hooks(&self) -> Result<Vec<HookSummary>, Error> {
        let mut summaries = Vec::new();
        for hook in Hook::ALL {
            let Some((link, info)) = links::pinned_link(&self.links, hook)? else {
                continue;
            };
            let tag = sys::fd_field(&link, "prog_tag")
                .map_err(|error| refused("read", format_args!("hook {}", hook.name()), error))?;
            let cgroup = match hook.place() {
                Place::Cgroup(_) => sys::cgroup_of(&info).0,
                Place::Iterator(_) => 0,
            };
            summaries.push(HookSummary {
                hook: hook.name(),
                link: info.id,
                program: info.prog_id,
                tag: tag.unwrap_or_default(),
                cgroup,
            });
        }
        Ok(summaries)
    }
}

/// Whether a socket has this entry of CONNECTIONS.
pub(super) fn is_a_sockets(entry: &Connection) -> bool {
    entry.owner != 0 && entry.peer.flags & peer_flags::USED != 0
}
