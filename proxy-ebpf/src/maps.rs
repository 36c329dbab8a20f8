//! Every map of the programs, and the balancing decision's view of them.
//!
//! Names are the contract with the agent, which sets `max_entries` at load; the sizes here only have to be legal. Words
//! that the agent commits (frontend values, set words, policies, member words) are read with one volatile load; whatever
//! they lead to is read through them, an address dependency that orders the two on every CPU that Linux runs on.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    Global,
    bindings::{BPF_F_MMAPABLE, bpf_sock},
    btf_maps::SkStorage,
    helpers::bpf_sk_storage_get,
    macros::{btf_map, map},
    maps::{Array, HashMap, LruHashMap, PerCpuArray},
    programs::SockAddrContext,
};
use proxy_ebpf::{
    abi::{
        Addr, AffinityKey, AffinityValue, Binding, BindingKey, CONNECTION_ENTRIES, Connection,
        FrontendKey, FrontendValue, Member, MemberWord, Meta, Name, Peer, PeerKey, Policy,
        REASONS as REASON_COUNT, Reason, Service, SetWord, Slot, Socket, Stats,
    },
    lb::{Scope, Tables},
};

#[map]
static FRONTENDS: HashMap<FrontendKey, FrontendValue> = HashMap::with_max_entries(1, 0);
#[map]
static VIPS: HashMap<Addr, u32> = HashMap::with_max_entries(1, 0);
#[map]
static LOCAL_ADDRS: HashMap<Addr, u32> = HashMap::with_max_entries(1, 0);
#[map]
static SERVICES: Array<Service> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map]
static SLOTS: Array<Slot> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map]
static MEMBERS: Array<Member> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map]
static META: Array<Meta> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// For `dump` only: no program reads it, but it is created and carried like the others.
#[map]
static NAMES: Array<Name> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map]
static STATS: Array<Stats> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map]
static REASONS: PerCpuArray<u64> = PerCpuArray::with_max_entries(REASON_COUNT, 0);
#[map]
static AFFINITY: LruHashMap<AffinityKey, AffinityValue> = LruHashMap::with_max_entries(1, 0);
#[map]
static PEERS: LruHashMap<PeerKey, Peer> = LruHashMap::with_max_entries(1, 0);
#[map]
static OPTOUT: HashMap<u64, u32> = HashMap::with_max_entries(1, 0);
/// Of one entry: the agent puts a larger one in its place for `bind_udp`.
#[map]
static BINDINGS: HashMap<BindingKey, Binding> = HashMap::with_max_entries(1, 0);
#[map]
static CONNECTIONS: Array<Connection> = Array::with_max_entries(CONNECTION_ENTRIES, BPF_F_MMAPABLE);
#[btf_map]
static SOCKETS: SkStorage<Socket> = SkStorage::new();

/// 0 where the kernel has no `bpf_set_retval` (before 5.18): refusals are then left to the packet layer.
#[unsafe(no_mangle)]
static CAN_REFUSE: Global<u32> = Global::new(1);

/// Whether a program of this kernel can answer ECONNREFUSED.
#[inline(always)]
pub fn can_refuse() -> bool {
    CAN_REFUSE.load() != 0
}

/// The maps as [`Tables`].
pub struct Maps;

/// One load of a word that somebody else stores.
///
/// # Safety
/// `word` points into a live map value and is aligned.
#[inline(always)]
unsafe fn load<T: Copy>(word: *const T) -> T {
    // SAFETY: the caller's promise.
    unsafe { ptr::read_volatile(word) }
}

impl Tables for Maps {
    #[inline(always)]
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        // SAFETY: a value that the lookup returned; preallocated, so it stays readable.
        FRONTENDS.get_ptr(key).map(|value| unsafe { load(value) })
    }

    #[inline(always)]
    fn is_cluster_ip(&self, addr: &Addr) -> bool {
        VIPS.get_ptr(addr).is_some()
    }

    #[inline(always)]
    fn node_address(&self, addr: &Addr) -> Option<u32> {
        // SAFETY: a value that the lookup returned.
        LOCAL_ADDRS
            .get_ptr(addr)
            .map(|flags| unsafe { load(flags) })
    }

    #[inline(always)]
    fn set(&self, service: u32, scope: Scope) -> Option<SetWord> {
        let service = SERVICES.get_ptr(service)?;
        // SAFETY: an element of the array, whose fields are aligned.
        Some(unsafe {
            match scope {
                Scope::Cluster => load(&raw const (*service).cluster),
                Scope::Local => load(&raw const (*service).local),
            }
        })
    }

    #[inline(always)]
    fn policy(&self, service: u32) -> Option<Policy> {
        let service = SERVICES.get_ptr(service)?;
        // SAFETY: an element of the array.
        Some(unsafe { load(&raw const (*service).policy) })
    }

    #[inline(always)]
    fn slot(&self, index: u32) -> Option<Slot> {
        // SAFETY: an element of the array; the agent does not touch it while a set word leads here.
        SLOTS.get_ptr(index).map(|slot| unsafe { *slot })
    }

    #[inline(always)]
    fn member(&self, index: u32) -> Option<Member> {
        let member = MEMBERS.get_ptr(index)?;
        // SAFETY: an element of the array. The word goes first: it says whether the rest is what the caller looks for.
        let word: MemberWord = unsafe { load(&raw const (*member).word) };
        // SAFETY: as above.
        Some(Member {
            word,
            ..unsafe { *member }
        })
    }

    #[inline(always)]
    fn affinity(&self, key: &AffinityKey) -> Option<AffinityValue> {
        // SAFETY: a value that the lookup returned. It may be recycled while it is copied; `lb` checks for that.
        AFFINITY.get_ptr(key).map(|value| unsafe { *value })
    }

    #[inline(always)]
    fn remember(&self, key: &AffinityKey, value: &AffinityValue) {
        let _best_effort = AFFINITY.insert(key, value, 0);
    }

    #[inline(always)]
    fn note(&self, reason: Reason) {
        count(reason);
    }
}

/// `*counter += 1` in one instruction.
///
/// # Safety
/// `counter` points into a live map value and is aligned.
#[inline(always)]
unsafe fn increment(counter: *mut u64) {
    // SAFETY: an atomic add to memory that the caller vouches for. There is no `AtomicU64::fetch_add` on this target
    // (`atomic-cas: false`), and compiled atomics whose result is unused need the same instruction.
    unsafe {
        core::arch::asm!("lock *(u64 *)({counter} + 0) += {one}", counter = in(reg) counter, one = in(reg) 1_u64);
    }
}

/// Counts in REASONS. Atomic although per CPU: a program can be preempted by another one.
#[inline(always)]
pub fn count(reason: Reason) {
    if let Some(counter) = REASONS.get_ptr_mut(reason as u32) {
        // SAFETY: an element of the array.
        unsafe { increment(counter) };
    }
}

/// What [`count_for`] adds to.
#[derive(Clone, Copy)]
pub enum Counter {
    /// [`Stats::connections`].
    Connections,
    /// [`Stats::datagrams`].
    Datagrams,
    /// [`Stats::refused`].
    Refused,
}

/// Counts in STATS.
#[inline(always)]
pub fn count_for(service: u32, counter: Counter) {
    if let Some(stats) = STATS.get_ptr_mut(service) {
        // SAFETY: an element of the array.
        unsafe {
            increment(match counter {
                Counter::Connections => &raw mut (*stats).connections,
                Counter::Datagrams => &raw mut (*stats).datagrams,
                Counter::Refused => &raw mut (*stats).refused,
            });
        }
    }
}

/// The words of META that decide how a program starts.
#[derive(Clone, Copy)]
pub struct Terms {
    /// Bits of [`proxy_ebpf::abi::meta_flags`].
    pub flags: u32,
    /// The node's own network namespace.
    pub netns_cookie: u64,
    /// See [`Meta::heartbeat_ns`].
    pub heartbeat_ns: u64,
    /// See [`Meta::lease_ns`].
    pub lease_ns: u64,
}

/// Reads META.
#[inline(always)]
pub fn terms() -> Option<Terms> {
    let meta = META.get_ptr(0)?;
    // SAFETY: the one element of the array, whose fields are aligned.
    unsafe {
        Some(Terms {
            flags: load(&raw const (*meta).flags),
            netns_cookie: load(&raw const (*meta).netns_cookie),
            heartbeat_ns: load(&raw const (*meta).heartbeat_ns),
            lease_ns: load(&raw const (*meta).lease_ns),
        })
    }
}

/// BINDINGS.
#[inline(always)]
pub fn binding(key: &BindingKey) -> Option<Binding> {
    // SAFETY: a value that the lookup returned; nobody changes it while the program is in use.
    BINDINGS.get_ptr(key).map(|value| unsafe { *value })
}

/// Whether this cgroup is excluded.
#[inline(always)]
pub fn is_opted_out(cgroup: u64) -> bool {
    OPTOUT.get_ptr(cgroup).is_some()
}

/// `if *word == 0 { *word = new }` in one instruction (v5.12, 5ffa25502b5a); what was there.
///
/// # Safety
/// `word` points into a live map value and is aligned.
#[cfg(target_arch = "bpf")]
#[inline(always)]
unsafe fn claim(word: *mut u64, new: u64) -> u64 {
    let found;
    // SAFETY: an atomic exchange in memory that the caller vouches for; see `increment`.
    unsafe {
        core::arch::asm!("r0 = cmpxchg_64({word} + 0, r0, {new})", word = in(reg) word, new = in(reg) new, inout("r0") 0_u64 => found);
    }
    found
}

/// The same for lints, which run for the host: it has no register of that name.
#[cfg(not(target_arch = "bpf"))]
unsafe fn claim(word: *mut u64, new: u64) -> u64 {
    use core::sync::atomic::{AtomicU64, Ordering};
    // SAFETY: as above.
    let word = unsafe { AtomicU64::from_ptr(word) };
    let claimed = word.compare_exchange(0, new, Ordering::Relaxed, Ordering::Relaxed);
    claimed.unwrap_or_else(|found| found)
}

/// The entry of CONNECTIONS that a socket of this cookie may have. Only its owner writes it.
#[inline(always)]
pub fn connection(cookie: u64) -> Option<&'static mut Connection> {
    // SAFETY: an element of the array. Others compare its owner and change nothing but a free one's, atomically.
    CONNECTIONS
        .get_ptr_mut(Connection::index(cookie))
        .and_then(|entry| unsafe { entry.as_mut() })
}

/// The same, made the socket's own; none when another socket has it.
#[inline(always)]
pub fn claimed_connection(cookie: u64) -> Option<&'static mut Connection> {
    let entry = connection(cookie)?;
    // SAFETY: a field of an element of the array.
    let owner = unsafe { claim(&raw mut entry.owner, cookie) };
    if owner == 0 || owner == cookie {
        return Some(entry);
    }
    None
}

/// Frees the socket's entry of CONNECTIONS; false when it has none.
#[inline(always)]
pub fn free_connection(cookie: u64) -> bool {
    let Some(entry) = connection(cookie) else {
        return false;
    };
    // SAFETY: fields of an element of the array. Whoever claims it next finds it without flags until it is written.
    unsafe {
        if load(&raw const entry.owner) != cookie {
            return false;
        }
        ptr::write_volatile(&raw mut entry.peer.flags, 0);
        ptr::write_volatile(&raw mut entry.owner, 0);
    }
    true
}

/// The storage of the context's socket, if it has one. The kernel holds the socket's lock while a hook runs, so nobody
/// else writes it; iterators read it.
#[inline(always)]
pub fn socket(ctx: &SockAddrContext) -> Option<&'static mut Socket> {
    // SAFETY: the helper checks the socket of the context, and its answer lives as long as the program runs.
    unsafe { SOCKETS.get_ptr_mut(ctx).as_mut() }
}

/// The same, made if need be (zeroed); none when the kernel refuses it.
#[inline(always)]
pub fn socket_or_new(ctx: &SockAddrContext) -> Option<&'static mut Socket> {
    // SAFETY: as in `socket`.
    unsafe { SOCKETS.get_or_insert_ptr_mut(ctx, None).as_mut() }
}

/// The storage of a kernel socket that an iterator walks over and has locked.
///
/// # Safety
/// `sk` is a pointer of the iterator's context, not null.
#[inline(always)]
pub unsafe fn socket_of(sk: *mut c_void) -> Option<&'static mut Socket> {
    let map = (&raw const SOCKETS).cast_mut().cast();
    // SAFETY: the map's own definition, and the caller's promise.
    unsafe {
        bpf_sk_storage_get(map, sk, ptr::null_mut(), 0)
            .cast::<Socket>()
            .as_mut()
    }
}

/// Deletes the socket's storage.
#[inline(always)]
pub fn forget(sk: *mut bpf_sock) {
    // SAFETY: the helper checks the socket of the context.
    let _none_is_fine = unsafe { SOCKETS.delete(sk) };
}

/// PEERS. The element may be recycled under the reader, who compares the addresses in it.
#[inline(always)]
pub fn overflow_peer(key: &PeerKey) -> Option<&'static mut Peer> {
    // SAFETY: a value that the lookup returned; preallocated, so it stays accessible.
    PEERS
        .get_ptr_mut(key)
        .and_then(|peer| unsafe { peer.as_mut() })
}

/// Writes PEERS; best effort.
#[inline(always)]
pub fn remember_overflow(key: &PeerKey, peer: &Peer) {
    let _best_effort = PEERS.insert(key, peer, 0);
}
