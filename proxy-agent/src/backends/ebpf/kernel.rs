//! [`Store`] in the kernel: pinned maps, their generations, and the hooks that use them.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::Duration,
};

use proxy_ebpf::abi::{Meta, Stats};

use self::{current::Current, grace::Grace};
use super::{
    dir::{Directory, check_writable},
    links::{self, Cgroup},
    load::{Constants, LeftOut, Object},
    probe,
    refused::refused,
    tables::{Fds, Tables, opted_out},
};
use crate::backends::Error;

mod as_store;
pub mod bind;
mod build;
mod current;
mod grace;
mod hooks;
mod open;
mod shapes;
mod swap;

pub use open::newest_complete;
pub use shapes::type_name;

/// Where and as whom the maps are kept.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Directory of the pins, on a bpffs.
    pub bpf_dir: PathBuf,
    /// Root of the cgroup v2 hierarchy whose sockets are served; found when absent.
    pub cgroup: Option<PathBuf>,
    /// Name of this node, for META.
    pub node_name: String,
    /// After how long without a heartbeat connect and sendmsg stop translating.
    pub lease: Lease,
    /// Serves only the sockets of the node's own network namespace.
    pub host_only: bool,
    /// Debug lines of the programs, through aya-log.
    pub log: bool,
}

/// After how long without a heartbeat connect and sendmsg leave everything to the packet layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lease {
    /// As a former agent has written it; never, where there was none.
    AsFound,
    /// Never: no packet layer serves the node.
    Never,
    /// After this long.
    After(Duration),
}

/// The kernel's maps and hooks. Holds the lock of its directory while it lives.
pub struct KernelStore {
    dir: Directory,
    cgroup: Cgroup,
    constants: Constants,
    node_name: String,
    lease: Lease,
    host_only: bool,
    current: Option<Current>,
    /// Number of the newest generation that was ever made.
    newest: u64,
    /// The hooks use the current generation, and older ones are gone.
    published: bool,
    left_out: Vec<LeftOut>,
    opt_out: BTreeSet<u64>,
    /// The iterator that leads sockets to their members is pinned.
    binding: bool,
    grace: Grace,
}

impl KernelStore {
    /// Takes the directory's lock and adopts what is pinned there; see `docs/adr/0003-generation-swap.md`.
    ///
    /// # Errors
    /// Another agent has the directory; something that the programs need is missing; the kernel refuses.
    pub fn open(options: OpenOptions) -> Result<Self, Error> {
        let OpenOptions {
            bpf_dir,
            cgroup,
            node_name,
            lease,
            host_only,
            log,
        } = options;
        probe::check_privileges()?;
        let constants = Constants {
            can_refuse: probe::has_set_retval(),
            log,
        };
        let object = Object::embedded(constants)?;
        let cgroup = Cgroup::open(&cgroup.map_or_else(probe::cgroup_root, Ok)?)?;
        check_writable(&bpf_dir)?;
        let dir = Directory::lock(&bpf_dir)?;
        let found = open::open(&dir, &object)?;
        let grace = Grace::new()?;
        let mut store = Self {
            dir,
            cgroup,
            constants,
            node_name,
            lease,
            host_only,
            current: None,
            newest: 0,
            published: false,
            left_out: Vec::new(),
            opt_out: BTreeSet::new(),
            binding: false,
            grace,
        };
        store.take(found, &object)?;
        if let Some(current) = &store.current {
            store.opt_out = opted_out(&current.fds)?;
        }
        Ok(store)
    }

    /// Vouches for the maps: only after a complete sync, at least every second while a lease is armed.
    pub fn heartbeat(&self) {
        if let Some(current) = &self.current {
            let offset = std::mem::offset_of!(Meta, heartbeat_ns);
            current
                .tables
                .meta
                .store_word(0, offset, build::monotonic_ns());
        }
    }

    /// Another lease than that which this store was opened with. The hooks go by it at once if they are in use.
    pub fn set_lease(&mut self, lease: Lease) {
        self.lease = lease;
        if let (Some(current), Some(lease_ns)) = (&self.current, lease.ns()) {
            let offset = std::mem::offset_of!(Meta, lease_ns);
            current.tables.meta.store_word(0, offset, lease_ns);
        }
    }

    /// The cgroups whose sockets are left alone, by id; at most 4,096.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn set_opt_out(&mut self, cgroups: &BTreeSet<u64>) -> Result<(), Error> {
        if self.opt_out != *cgroups {
            if let Some(current) = &self.current {
                current.write_opt_out(cgroups)?;
            }
            self.opt_out.clone_from(cgroups);
        }
        Ok(())
    }

    /// Programs that this kernel cannot run.
    pub fn left_out(&self) -> &[LeftOut] {
        &self.left_out
    }

    /// Number of the generation in use; 0 before the first.
    pub fn generation(&self) -> u64 {
        self.current
            .as_ref()
            .map_or(0, |current| current.generation.number)
    }

    /// The cgroup that is served.
    pub fn cgroup(&self) -> &Path {
        self.cgroup.path()
    }

    /// STATS at `service`.
    pub fn stats(&self, service: u32) -> Stats {
        self.tables().stats.read(service)
    }

    fn tables(&self) -> &Tables {
        let current = self.current.as_ref();
        &current
            .expect("capacity() is zero before the first reserve(): no index is valid")
            .tables
    }
}

impl Lease {
    /// [`Meta::lease_ns`], unless that stays as it is.
    fn ns(self) -> Option<u64> {
        match self {
            Self::AsFound => None,
            Self::Never => Some(0),
            Self::After(lease) => Some(lease.as_nanos() as u64),
        }
    }
}

/// Hooks that an agent with a socket layer left, held by one that runs without.
pub struct Left {
    dir: Directory,
}

impl Left {
    /// Looks for them; holds the lock of their directory.
    ///
    /// # Errors
    /// Another agent has the directory.
    pub fn find(bpf_dir: &Path) -> Result<Option<Self>, Error> {
        if !bpf_dir.exists() {
            return Ok(None);
        }
        let dir = Directory::lock(bpf_dir)?;
        Ok(Some(Self { dir }))
    }

    /// Detaches connect and sendmsg. Sockets that were translated go on being shown what they addressed.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn stop_translating(&self) -> Result<(), Error> {
        links::detach_translating(&self.dir.links()?)
    }
}

/// Removes every hook, pin and directory of an agent that is not running; does nothing where there is none.
///
/// # Errors
/// An agent runs; the kernel refused.
pub fn cleanup(bpf_dir: &Path) -> Result<(), Error> {
    if !bpf_dir.exists() {
        return Ok(());
    }
    let constants = Constants {
        can_refuse: false,
        log: false,
    };
    let object = Object::embedded(constants)?;
    let dir = Directory::lock(bpf_dir)?;
    links::detach_all(&dir.links()?)?;
    for generation in dir.generations()? {
        build::remove(&generation, &object)?;
    }
    std::fs::remove_dir(bpf_dir).map_err(|error| refused("remove", bpf_dir.display(), error))
}

/// Loads the programs onto small maps and drops all of it: what this kernel cannot run.
///
/// # Errors
/// The kernel refuses a program that the socket layer needs.
pub fn try_load(object: &Object) -> Result<Vec<LeftOut>, Error> {
    let mut maps = Fds::new();
    for (name, spec) in object.maps() {
        let map = match object.constants(name) {
            Some(bytes) => object.create_constants(name, bytes)?,
            None => object.create(name, shapes::smallest(name, spec))?,
        };
        maps.insert(name.clone(), map);
    }
    Ok(object.load(&maps)?.left_out)
}

#[cfg(test)]
mod tests;
