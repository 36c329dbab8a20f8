//! The kernel programs alone: on small maps that a test fills by hand, attached to a cgroup that this process is in, in a
//! network namespace of the test's own where every backend is an address of `lo`.

use std::{
    fs::{self, File},
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context, ensure};
use nix::{
    fcntl::{Flock, FlockArg},
    sched::{CloneFlags, unshare},
    time::{ClockId, clock_gettime},
};
use proxy_agent::backends::ebpf::{
    links::Place,
    load::{Constants, Loaded, Object},
    maps::per_cpu_totals,
    sys,
    tables::{Fds, Tables, array, hash},
};
use proxy_ebpf::{
    abi::{
        ABI_VERSION, Addr, Be16, Connection, FrontendKey, FrontendValue, Member, MemberWord, Meta,
        Policy, Reason, Service, SetWord, Slot, Socket, Stats, kind, meta_flags,
    },
    lb::Scope,
};

use crate::names::cgroup2_root;

mod iterators;

const SERVICES: u32 = 16;
const SLOTS: u32 = 1024;
const MEMBERS: u32 = 64;
const HASHES: u32 = 64;

/// Addresses of `lo` in a test's namespace: of backends, and of the node.
pub const BACKENDS_V4: [&str; 4] = ["10.244.0.1", "10.244.0.2", "10.244.0.3", "10.244.0.4"];
/// As [`BACKENDS_V4`].
pub const BACKENDS_V6: [&str; 4] = [
    "fd00:10:244::1",
    "fd00:10:244::2",
    "fd00:10:244::3",
    "fd00:10:244::4",
];
/// The node's own.
pub const NODE: [&str; 2] = ["192.168.0.2", "fd00:192:168::2"];

/// Counted whenever a socket closes.
const ENDS: [Reason; 2] = [Reason::Closed, Reason::CloseUntouched];

/// Programs, maps and cgroup of one test. The process is in the cgroup while this lives.
pub struct Programs {
    fds: Fds,
    tables: Tables,
    loaded: Loaded,
    links: Vec<OwnedFd>,
    cgroup: PathBuf,
    home: PathBuf,
    seen: Vec<u64>,
    next_slot: u32,
    /// Last: the next test begins when everything else is gone.
    _turn: Flock<File>,
}

/// Runs `test` on programs of its own, one test at a time: a process is in one cgroup only.
pub fn with_programs(
    test: impl FnOnce(&mut Programs) -> anyhow::Result<()> + Send,
) -> anyhow::Result<()> {
    let work = || {
        // First of all: tools that are run here would be in the cgroup of the test before.
        let turn = take_turn()?;
        unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
        make_network()?;
        test(&mut Programs::attach(turn)?)
    };
    thread::scope(|scope| scope.spawn(work).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn take_turn() -> anyhow::Result<Flock<File>> {
    Flock::lock(File::open(cgroup2_root()?)?, FlockArg::LockExclusive)
        .map_err(|(_, errno)| anyhow::Error::from(errno).context("cannot wait for my turn"))
}

/// The object of this build.
///
/// # Errors
/// It was built without, or the kernel has no BTF.
pub fn object(can_refuse: bool, log: bool) -> anyhow::Result<Object> {
    Ok(Object::embedded(Constants { can_refuse, log })?)
}

/// Creates every map of `object`, small.
pub fn make_maps(object: &Object) -> anyhow::Result<Fds> {
    let mut fds = Fds::new();
    for (name, spec) in object.maps() {
        let entries = match name.as_str() {
            "SERVICES" | "NAMES" | "STATS" => SERVICES,
            "SLOTS" => SLOTS,
            "MEMBERS" => MEMBERS,
            "FRONTENDS" | "VIPS" | "LOCAL_ADDRS" | "OPTOUT" | "AFFINITY" | "PEERS" | "BINDINGS" => {
                HASHES
            }
            _ => spec.max_entries,
        };
        let fd = match object.constants(name) {
            Some(bytes) => object.create_constants(name, bytes)?,
            None => object.create(name, entries)?,
        };
        fds.insert(name.clone(), fd);
    }
    Ok(fds)
}

fn make_network() -> anyhow::Result<()> {
    let ip = |line: &str| -> anyhow::Result<()> {
        let status = Command::new("ip").args(line.split(' ')).status()?;
        ensure!(status.success(), "ip {line}: {status}");
        Ok(())
    };
    ip("link set lo up")?;
    for address in BACKENDS_V4.iter().chain(&NODE[..1]) {
        ip(&format!("addr add {address}/32 dev lo"))?;
    }
    for address in BACKENDS_V6.iter().chain(&NODE[1..]) {
        ip(&format!("addr add {address}/128 dev lo nodad"))?;
    }
    // So that a datagram socket can connect to an address that nobody has.
    ip("route add default dev lo")?;
    ip("-6 route add default dev lo")
}

impl Programs {
    fn attach(turn: Flock<File>) -> anyhow::Result<Self> {
        let root = cgroup2_root()?;
        let object = object(true, false)?;
        let fds = make_maps(&object)?;
        let loaded = object.load(&fds)?;
        let tables = Tables::new(&fds, true)?;
        let home = root.join(own_cgroup()?.trim_start_matches('/'));
        let cgroup = root.join(format!("proxy-test-{}-programs", std::process::id()));
        fs::create_dir(&cgroup).with_context(|| format!("cannot make {}", cgroup.display()))?;
        let mut this = Self {
            fds,
            tables,
            loaded,
            links: Vec::new(),
            cgroup,
            home,
            seen: Vec::new(),
            next_slot: 1,
            _turn: turn,
        };
        let cookie = sys::netns_cookie(UdpSocket::bind("127.0.0.1:0")?)?;
        this.set_meta(|meta| meta.netns_cookie = cookie);
        this.attach_hooks()?;
        this.counted()?;
        join_cgroup(&this.cgroup)?;
        Ok(this)
    }

    fn attach_hooks(&mut self) -> anyhow::Result<()> {
        let cgroup = File::open(&self.cgroup)?;
        for (hook, program) in &self.loaded.programs {
            if let Place::Cgroup(place) = hook.place() {
                let link = sys::link_create(program, &cgroup, place);
                self.links
                    .push(link.with_context(|| format!("cannot attach {}", hook.name()))?);
            }
        }
        Ok(())
    }

    /// Runs `work` with the process outside the cgroup: its sockets see no hooks.
    pub fn outside<T>(&self, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        join_cgroup(&self.home)?;
        let result = work();
        join_cgroup(&self.cgroup)?;
        result
    }

    /// Runs `work` with the process in a cgroup below.
    pub fn in_child<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let child = self.cgroup.join("child");
        fs::create_dir(&child)?;
        join_cgroup(&child)?;
        let result = work(self);
        join_cgroup(&self.cgroup)?;
        fs::remove_dir(&child)?;
        result
    }

    /// Id of the cgroup.
    pub fn cgroup_id(&self) -> anyhow::Result<u64> {
        Ok(std::os::unix::fs::MetadataExt::ino(&fs::metadata(
            &self.cgroup,
        )?))
    }

    /// Changes META.
    pub fn set_meta(&self, change: impl FnOnce(&mut Meta)) {
        let mut meta = self.tables.meta();
        meta.abi_version = ABI_VERSION;
        meta.flags |= meta_flags::COMPLETE;
        change(&mut meta);
        self.tables.meta.write(0, &meta);
    }

    /// Excludes a cgroup.
    pub fn opt_out(&self, cgroup: u64) -> anyhow::Result<()> {
        hash::<u64, u32>(&self.fds, "OPTOUT")?.upsert(&[(cgroup, 1)])?;
        self.set_meta(|meta| meta.flags |= meta_flags::OPT_OUT);
        Ok(())
    }

    /// Says that `address` is the node's own.
    pub fn add_node_address(&self, address: &str, flags: u32) -> anyhow::Result<()> {
        Ok(self.tables.addresses.upsert(&[(words(address)?, flags)])?)
    }

    /// Adds a frontend of `service`; see [`kind`] and [`proxy_ebpf::abi::frontend_flags`].
    pub fn add_frontend(
        &self,
        service: u32,
        at: SocketAddr,
        protocol: u8,
        frontend_kind: u8,
        flags: u8,
    ) -> anyhow::Result<()> {
        let key = FrontendKey::new(at.ip().into(), Be16::new(at.port()), protocol);
        let value = FrontendValue::new(&key, service, frontend_kind, flags);
        if frontend_kind == kind::CLUSTER_IP {
            self.tables.vips.upsert(&[(key.addr, 1)])?;
        }
        Ok(self.tables.frontends.upsert(&[(key, value)])?)
    }

    /// Adds a ClusterIP.
    pub fn add_cluster_ip(&self, service: u32, at: SocketAddr, protocol: u8) -> anyhow::Result<()> {
        self.add_frontend(service, at, protocol, kind::CLUSTER_IP, 0)
    }

    /// Puts a value of another key in the place of a frontend's.
    pub fn corrupt_frontend(&self, at: SocketAddr, protocol: u8) -> anyhow::Result<()> {
        let key = FrontendKey::new(at.ip().into(), Be16::new(at.port()), protocol);
        let value = FrontendValue(!u64::from(key.check()));
        Ok(self.tables.frontends.upsert(&[(key, value)])?)
    }

    /// Makes `backends` the cluster set of `service`, each as the member of the given index, the first `local` of them also
    /// the local set.
    pub fn set_backends(
        &mut self,
        service: u32,
        backends: &[(u32, SocketAddr)],
        local: usize,
        policy: Policy,
    ) {
        let generation = self.next_slot;
        let (base, count) = (self.next_slot, u32::try_from(backends.len()).unwrap_or(0));
        self.next_slot += count;
        for (slot, (index, at)) in (base..).zip(backends) {
            let mut member: Member = self.tables.members.read(*index);
            if member.word.bits() == 0 || member.addr != at.ip().into() {
                let bits = MemberWord::SERVING | MemberWord::IN_CLUSTER | MemberWord::IN_LOCAL;
                member = Member {
                    word: MemberWord::new(member.word.generation() + 1, bits),
                    service,
                    port: Be16::new(at.port()),
                    addr: at.ip().into(),
                    ..Member::default()
                };
                self.tables.members.write(*index, &member);
            }
            let slot_value = Slot {
                addr: member.addr,
                port: member.port,
                member: *index,
                generation,
                member_generation: member.word.generation(),
                ..Slot::default()
            };
            self.tables.slots.write(slot, &slot_value);
        }
        let value = Service {
            cluster: SetWord::new(base, count, generation),
            local: SetWord::new(base, u32::try_from(local).unwrap_or(0), generation),
            policy,
            used: 1,
            ..Service::default()
        };
        self.tables.services.write(service, &value);
    }

    /// Makes the set word of `service` name slots that are not its own.
    pub fn contend(&self, service: u32, scope: Scope) {
        let mut value: Service = self.tables.services.read(service);
        let word = match scope {
            Scope::Cluster => &mut value.cluster,
            Scope::Local => &mut value.local,
        };
        *word = SetWord::new(word.base(), word.count(), word.generation() + 1);
        self.tables.services.write(service, &value);
    }

    /// The member stops serving.
    pub fn retire(&self, member: u32) {
        let mut value: Member = self.tables.members.read(member);
        value.word = MemberWord::new(value.word.generation() + 1, 0);
        self.tables.members.write(member, &value);
    }

    /// STATS of `service`.
    pub fn stats(&self, service: u32) -> Stats {
        self.tables.stats.read(service)
    }

    /// The counters of REASONS that changed since the last call, and by how much. Without the ends of sockets, which are where
    /// a test drops them: see [`Programs::total`].
    pub fn counted(&mut self) -> anyhow::Result<Vec<(Reason, u64)>> {
        let map = self.fds.get("REASONS").context("no map REASONS")?;
        let now = per_cpu_totals(map)?;
        let before = std::mem::replace(&mut self.seen, now);
        let changes = Reason::ALL.iter().zip(&self.seen).enumerate();
        Ok(changes
            .map(|(index, (reason, now))| (*reason, now - before.get(index).copied().unwrap_or(0)))
            .filter(|(reason, change)| *change > 0 && !ENDS.contains(reason))
            .collect())
    }

    /// A counter of REASONS.
    pub fn total(&self, reason: Reason) -> anyhow::Result<u64> {
        let totals = per_cpu_totals(self.fds.get("REASONS").context("no map REASONS")?)?;
        Ok(totals[reason as usize])
    }

    /// The entries of CONNECTIONS that sockets have.
    pub fn connections(&self) -> anyhow::Result<Vec<Connection>> {
        let map = array(&self.fds, "CONNECTIONS", false)?;
        let entries = (0..map.len()).map(|index| map.read::<Connection>(index));
        Ok(entries.filter(|entry| entry.owner != 0).collect())
    }

    /// Gives the entry of the socket with this cookie to another one.
    pub fn take_entry(&self, cookie: u64, connection: &Connection) -> anyhow::Result<()> {
        array(&self.fds, "CONNECTIONS", true)?.write(Connection::index(cookie), connection);
        Ok(())
    }

    /// Makes the choices of `socket` look as if they were used last this long ago.
    pub fn age(&self, socket: &UdpSocket, idle: Duration) -> anyhow::Result<()> {
        let map = self.fds.get("SOCKETS").context("no map SOCKETS")?;
        let key = socket.as_raw_fd().to_ne_bytes();
        let mut bytes = [0; size_of::<Socket>()];
        let found = sys::map_lookup(map, &key, &mut bytes)?;
        ensure!(found, "the socket was not translated");
        let mut value: Socket = sys::from_prefix(&bytes);
        let at = now_ns()? - u64::try_from(idle.as_nanos())?;
        value.peers.iter_mut().for_each(|p| p.last_used_ns = at);
        Ok(sys::map_update(map, &key, sys::bytes_of(&value))?)
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        self.links.clear();
        let gone = join_cgroup(&self.home).and_then(|()| Ok(fs::remove_dir(&self.cgroup)?));
        if let Err(error) = gone {
            eprintln!("cannot remove {}: {error:#}", self.cgroup.display());
        }
    }
}

fn words(address: &str) -> anyhow::Result<Addr> {
    Ok(address.parse::<IpAddr>()?.into())
}

/// CLOCK_MONOTONIC.
pub fn now_ns() -> anyhow::Result<u64> {
    let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
    Ok(u64::try_from(now.as_nanos())?)
}

fn join_cgroup(directory: &Path) -> anyhow::Result<()> {
    let procs = directory.join("cgroup.procs");
    fs::write(&procs, "0").with_context(|| format!("cannot write {}", procs.display()))
}

fn own_cgroup() -> anyhow::Result<String> {
    let lines = fs::read_to_string("/proc/self/cgroup")?;
    let path = lines.lines().find_map(|line| line.strip_prefix("0::"));
    Ok(path.context("this process is in no cgroup v2")?.to_owned())
}
