//! Keys and values of every eBPF map: the contract between the agent and the kernel programs.
//!
//! Addresses are network-order words with IPv4 as v4-mapped IPv6, ports are [`Be16`], every other integer is in host
//! order. Each type has a fixed size without padding (asserted below). [`ABI_VERSION`] changes with any change here.
//!
//! # What later versions may change
//! [`Socket`], [`Peer`], [`AffinityKey`] and [`AffinityValue`] are frozen: their maps are carried from agent to agent, up
//! and down. The other values may grow at the end only: an agent of any version reads the ids that another one handed
//! out from the fields that exist here.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Version of the layout of the maps below.
pub const ABI_VERSION: u32 = if cfg!(feature = "abi-next") { 2 } else { 1 };

/// Words that a value of this ABI carries beyond the first release's.
pub const GROWN_WORDS: usize = if cfg!(feature = "abi-next") { 2 } else { 0 };

/// A type that may be copied to and from a map as bytes.
///
/// # Safety
/// The type is `#[repr(C)]`, has no padding, and every bit pattern is a value of it. Implemented by `plain!` only.
pub unsafe trait Plain: Copy + 'static {}

macro_rules! plain {
    ($($name:ty { $($field:ident: $type:ty),* $(,)? } = $size:expr;)*) => {$(
        const _: () = assert!(size_of::<$name>() == $size);
        const _: () = assert!(0 $(+ size_of::<$type>())* == $size, "padding");
        const _: fn($name) = |value| { $(let _: $type = value.$field;)* };
        // SAFETY: the fields are integers or `Plain` and fill the whole size (asserted above).
        unsafe impl Plain for $name {}
    )*};
}

/// An IPv6 address as four words in network byte order; IPv4 is v4-mapped (`::ffff:a.b.c.d`). 16 bytes.
///
/// Words, not bytes: a lookup with a `[u8; 16]` in its key costs 104–126 ns instead of 74–85 ns.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Addr(pub [u32; 4]);

impl Addr {
    /// `0.0.0.0`: the address of every IPv4 node port.
    pub const UNSPECIFIED_V4: Self = Self::from_v4_word(0);
    /// `::`: the address of every IPv6 node port.
    pub const UNSPECIFIED_V6: Self = Self([0; 4]);

    /// An IPv4 address given as the network-order word that the kernel uses.
    #[inline(always)]
    pub const fn from_v4_word(word: u32) -> Self {
        Self([0, 0, 0xffff_u32.to_be(), word])
    }

    /// Whether this is a v4-mapped address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0xffff_u32.to_be()
    }

    /// Whether this is `0.0.0.0` or `::`.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        self.0[3] == 0 && self.0[0] == 0 && self.0[1] == 0 && (self.0[2] == 0 || self.is_v4())
    }

    /// Whether this is in 127.0.0.0/8 or `::1`.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            self.0[3] & 0xff00_0000_u32.to_be() == 0x7f00_0000_u32.to_be()
        } else {
            self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0 && self.0[3] == 1_u32.to_be()
        }
    }

    /// The address that node ports of this address's family are filed under.
    #[inline(always)]
    pub const fn unspecified(&self) -> Self {
        if self.is_v4() {
            Self::UNSPECIFIED_V4
        } else {
            Self::UNSPECIFIED_V6
        }
    }
}

impl From<IpAddr> for Addr {
    fn from(address: IpAddr) -> Self {
        let octets = match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        let word = |at: usize| {
            u32::from_ne_bytes([octets[at], octets[at + 1], octets[at + 2], octets[at + 3]])
        };
        Self([word(0), word(4), word(8), word(12)])
    }
}

impl From<Addr> for IpAddr {
    fn from(address: Addr) -> Self {
        if address.is_v4() {
            return Ipv4Addr::from(u32::from_be(address.0[3])).into();
        }
        let half = |word: u32| u128::from(u32::from_be(word));
        let [a, b, c, d] = address.0;
        Ipv6Addr::from(half(a) << 96 | half(b) << 64 | half(c) << 32 | half(d)).into()
    }
}

/// A port in network byte order. 2 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Be16(pub u16);

impl Be16 {
    /// From host order.
    #[inline(always)]
    pub const fn new(host: u16) -> Self {
        Self(host.to_be())
    }

    /// In host order.
    #[inline(always)]
    pub const fn host(self) -> u16 {
        u16::from_be(self.0)
    }
}

/// `IPPROTO_TCP`.
pub const TCP: u8 = 6;
/// `IPPROTO_UDP`.
pub const UDP: u8 = 17;
/// `IPPROTO_SCTP`.
pub const SCTP: u8 = 132;

/// Key of FRONTENDS: what a client addresses. 20 bytes. Written by the agent; read by every program.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontendKey {
    /// The VIP; a node port has the unspecified address of its family.
    pub addr: Addr,
    /// The service port or node port.
    pub port: Be16,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub pad: u8,
}

impl FrontendKey {
    /// The key of `addr:port/protocol`.
    #[inline(always)]
    pub const fn new(addr: Addr, port: Be16, protocol: u8) -> Self {
        Self {
            addr,
            port,
            protocol,
            pad: 0,
        }
    }

    /// Sixteen bits of this key, stored in its value: a preallocated hash element can be given to another key while a
    /// reader holds it, and this makes such a value visible (DESIGN I6).
    #[inline(always)]
    pub const fn check(&self) -> u16 {
        let [a, b, c, d] = self.addr.0;
        let tail = (self.port.0 as u32) | ((self.protocol as u32) << 16);
        fold(fold(fold(fold(fold(0, a), b), c), d), tail) as u16
    }
}

#[inline(always)]
const fn fold(hash: u32, word: u32) -> u32 {
    let mixed = (hash ^ word).wrapping_mul(0x9e37_79b1);
    mixed ^ (mixed >> 15)
}

/// Value of FRONTENDS, one word so that a reader gets all of it at once: `service:32 | kind:8 | flags:8 | check:16` from
/// the high bits down. 8 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FrontendValue(pub u64);

impl FrontendValue {
    /// A value for `key`.
    pub const fn new(key: &FrontendKey, service: u32, kind: u8, flags: u8) -> Self {
        Self(
            ((service as u64) << 32)
                | ((kind as u64) << 24)
                | ((flags as u64) << 16)
                | key.check() as u64,
        )
    }

    /// Index into SERVICES.
    #[inline(always)]
    pub const fn service(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// One of [`kind`].
    #[inline(always)]
    pub const fn kind(self) -> u8 {
        (self.0 >> 24) as u8
    }

    /// Bits of [`frontend_flags`].
    #[inline(always)]
    pub const fn flags(self) -> u8 {
        (self.0 >> 16) as u8
    }

    /// Whether this value was written for `key`.
    #[inline(always)]
    pub const fn belongs_to(self, key: &FrontendKey) -> bool {
        self.0 as u16 == key.check()
    }
}

/// Kinds of a frontend.
pub mod kind {
    /// ClusterIP.
    pub const CLUSTER_IP: u8 = 1;
    /// NodePort.
    pub const NODE_PORT: u8 = 2;
    /// An address of `status.loadBalancer.ingress`.
    pub const LOAD_BALANCER: u8 = 3;
    /// An address of `spec.externalIPs`.
    pub const EXTERNAL_IP: u8 = 4;
}

/// Flags of a frontend.
pub mod frontend_flags {
    /// The Service restricts sources: left to the packet layer, which knows the client's address.
    pub const SOURCE_RANGES: u8 = 1;
    /// A ClusterIP that is assigned to a link of this node (NodeLocal DNSCache): left untranslated.
    pub const ON_LOCAL_LINK: u8 = 2;
}

/// Value of LOCAL_ADDRS: bits. 4 bytes.
pub mod node_address_flags {
    /// Node ports are served on this address.
    pub const NODE_PORTS: u32 = 1;
}

/// Which backends of a Service: `base:26 | count:20 | generation:18` from the high bits down. 8 bytes.
///
/// Stored with one release store; whoever reads it finds slots `base .. base + count` written, each with this
/// generation.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SetWord(pub u64);

impl SetWord {
    /// Most backends in one set.
    pub const MAX_COUNT: u32 = (1 << 20) - 1;
    /// Most slots in the map.
    pub const MAX_SLOTS: u32 = 1 << 26;
    /// Generations wrap here.
    pub const GENERATION_MASK: u32 = (1 << 18) - 1;

    /// A set word; each argument within its limit above.
    pub const fn new(base: u32, count: u32, generation: u32) -> Self {
        debug_assert!(base < Self::MAX_SLOTS && count <= Self::MAX_COUNT);
        Self(
            ((base as u64) << 38)
                | ((count as u64) << 18)
                | (generation & Self::GENERATION_MASK) as u64,
        )
    }

    /// Index of the first slot.
    #[inline(always)]
    pub const fn base(self) -> u32 {
        (self.0 >> 38) as u32
    }

    /// Number of slots.
    #[inline(always)]
    pub const fn count(self) -> u32 {
        (self.0 >> 18) as u32 & Self::MAX_COUNT
    }

    /// The generation that each of its slots carries.
    #[inline(always)]
    pub const fn generation(self) -> u32 {
        self.0 as u32 & Self::GENERATION_MASK
    }
}

/// Affinity, policies and flags of a Service: `flags:12 | affinity seconds:20`. 4 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Policy(pub u32);

impl Policy {
    /// `internalTrafficPolicy: Local`.
    pub const INTERNAL_LOCAL: u32 = 1;
    /// `externalTrafficPolicy: Local`.
    pub const EXTERNAL_LOCAL: u32 = 2;

    /// `affinity_seconds` 0 means none; at most 86,400 (the API's limit).
    pub const fn new(flags: u32, affinity_seconds: u32) -> Self {
        Self((flags << 20) | (affinity_seconds & 0xf_ffff))
    }

    /// Seconds that a client stays with its backend after its last connection; 0 when there is no affinity.
    #[inline(always)]
    pub const fn affinity_seconds(self) -> u32 {
        self.0 & 0xf_ffff
    }

    /// The flags above.
    #[inline(always)]
    pub const fn flags(self) -> u32 {
        self.0 >> 20
    }
}

/// Value of SERVICES, one per service port and family. 64 bytes. Written by the agent through its mapping.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Endpoints of the whole cluster that may be used from here.
    pub cluster: SetWord,
    /// Endpoints on this node.
    pub local: SetWord,
    /// Stored after both words.
    pub policy: Policy,
    /// 1 while the entry is in use.
    pub used: u32,
    /// Zero.
    pub reserved: [u64; 5],
    /// Later ABIs.
    pub grown: [u64; GROWN_WORDS],
}

/// Value of SLOTS: one backend inline. 32 bytes. Immutable from before its set word is stored until after the grace period.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// The backend's address.
    pub addr: Addr,
    /// The backend's port.
    pub port: Be16,
    /// Zero.
    pub flags: u16,
    /// Index into MEMBERS.
    pub member: u32,
    /// Generation of the set word that this slot belongs to.
    pub generation: u32,
    /// Generation of the member when the slot was written.
    pub member_generation: u32,
    /// Later ABIs.
    pub grown: [u64; GROWN_WORDS],
}

/// State of a member, read and written as one word: `generation:32 | bits:32`. 8 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct MemberWord(pub u64);

impl MemberWord {
    /// Takes traffic: ready, or terminating and still serving.
    pub const SERVING: u32 = 1;
    /// Being deleted.
    pub const TERMINATING: u32 = 2;
    /// On this node.
    pub const ON_THIS_NODE: u32 = 4;
    /// In the Service's cluster set.
    pub const IN_CLUSTER: u32 = 8;
    /// In the Service's local set.
    pub const IN_LOCAL: u32 = 16;

    /// Both halves.
    pub const fn new(generation: u32, bits: u32) -> Self {
        Self(((generation as u64) << 32) | bits as u64)
    }

    /// Changes only when the member stops serving or is gone.
    #[inline(always)]
    pub const fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// The bits above.
    #[inline(always)]
    pub const fn bits(self) -> u32 {
        self.0 as u32
    }
}

/// Value of MEMBERS: one endpoint of one service port. 32 bytes. Written by the agent through its mapping.
///
/// A member exists while its endpoint serves, in a set or draining; a free one has `word.bits() == 0`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Member {
    /// Read once, before the other fields are used.
    pub word: MemberWord,
    /// Index into SERVICES.
    pub service: u32,
    /// The endpoint's port.
    pub port: Be16,
    /// Zero.
    pub pad: u16,
    /// The endpoint's address.
    pub addr: Addr,
    /// Later ABIs.
    pub grown: [u64; GROWN_WORDS],
}

/// Key of AFFINITY. 24 bytes. Frozen.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AffinityKey {
    /// Here: low and high half of the client's netns cookie, then two zero words. In the packet layer: its address.
    pub client: Addr,
    /// Index into SERVICES.
    pub service: u32,
    /// Zero.
    pub pad: u32,
}

impl AffinityKey {
    /// The key of a client on this node.
    #[inline(always)]
    pub const fn from_netns(service: u32, cookie: u64) -> Self {
        Self {
            client: Addr([cookie as u32, (cookie >> 32) as u32, 0, 0]),
            service,
            pad: 0,
        }
    }

    /// See [`FrontendKey::check`].
    #[inline(always)]
    pub const fn check(&self) -> u16 {
        let [a, b, c, d] = self.client.0;
        fold(fold(fold(fold(fold(0, a), b), c), d), self.service) as u16
    }
}

/// Value of AFFINITY. 32 bytes. Frozen. Written by the programs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AffinityValue {
    /// CLOCK_MONOTONIC.
    pub last_used_ns: u64,
    /// Index into MEMBERS.
    pub member: u32,
    /// Generation of the member when it was chosen.
    pub generation: u32,
    /// The slot it was chosen by; a hint for dumps.
    pub slot: u32,
    /// [`AffinityKey::check`].
    pub check: u16,
    /// Zero.
    pub pad: u16,
    /// Zero.
    pub reserved: u64,
}

/// One translation of a socket. 64 bytes. Frozen. Written by the programs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// What the application addressed.
    pub vip: Addr,
    /// What the kernel was given instead.
    pub backend: Addr,
    /// Port of `vip`.
    pub vip_port: Be16,
    /// Port of `backend`.
    pub backend_port: Be16,
    /// Bits of [`peer_flags`]; 0 = this entry is free.
    pub flags: u32,
    /// Index into SERVICES.
    pub service: u32,
    /// Index into MEMBERS.
    pub member: u32,
    /// Generation of the member when it was chosen.
    pub generation: u32,
    /// IP protocol number.
    pub protocol: u32,
    /// CLOCK_MONOTONIC, last datagram (UDP) or the connect.
    pub last_used_ns: u64,
}

/// Flags of a [`Peer`].
pub mod peer_flags {
    /// The entry holds something.
    pub const USED: u32 = 1;
    /// Made by `connect()`.
    pub const CONNECTED: u32 = 2;
}

/// Translations kept in a socket's own storage; more go to PEERS.
pub const SOCKET_PEERS: usize = 4;

/// Value of SOCKETS (SK_STORAGE). 272 bytes. Frozen. Written by the programs; dies with the socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Socket {
    /// The client's network namespace.
    pub netns_cookie: u64,
    /// Zero.
    pub reserved: u64,
    /// `peers[0]` is the connected one, if any.
    pub peers: [Peer; SOCKET_PEERS],
}

/// One record of the iterator `list_sockets`. 280 bytes. Frozen.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketRecord {
    /// `bpf_get_socket_cookie`.
    pub cookie: u64,
    /// Its value in SOCKETS.
    pub socket: Socket,
}

/// One record of the iterator `list_dead`: a connected UDP socket whose backend no longer serves. 16 bytes. Frozen.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeadSocket {
    /// The network namespace in which `kill_dead` finds it.
    pub netns_cookie: u64,
    /// `bpf_get_socket_cookie`.
    pub cookie: u64,
}

/// Key of PEERS (LRU_HASH): translations beyond a socket's own storage. 32 bytes. Frozen.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerKey {
    /// `bpf_get_socket_cookie`.
    pub cookie: u64,
    /// The VIP or the backend.
    pub addr: Addr,
    /// Its port.
    pub port: Be16,
    /// [`PeerKey::BY_VIP`] or [`PeerKey::BY_BACKEND`].
    pub by: u16,
    /// Zero.
    pub pad: u32,
}

impl PeerKey {
    /// Sending: what did this socket use for this VIP?
    pub const BY_VIP: u16 = 0;
    /// Receiving: which VIP does this backend stand for?
    pub const BY_BACKEND: u16 = 1;
}

/// Bytes of a Service's name in [`Name`]: "namespace/name:port", three DNS labels, at most 63 + 1 + 63 + 1 + 63 = 191.
pub const NAME_LEN: usize = 196;

/// Value of NAMES, index of SERVICES. 200 bytes. Written by the agent, read by `dump`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name {
    /// 0 = the entry is free.
    pub len: u8,
    /// IP protocol number.
    pub protocol: u8,
    /// 4 or 6.
    pub family: u8,
    /// Zero.
    pub pad: u8,
    /// UTF-8, `len` bytes.
    pub text: [u8; NAME_LEN],
}

/// Value of META, one entry. 256 bytes. Written by the agent through its mapping.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meta {
    /// [`ABI_VERSION`] of the writer.
    pub abi_version: u32,
    /// Bits of [`meta_flags`].
    pub flags: u32,
    /// Cookie of the network namespace that the agent runs in: the node's own.
    pub netns_cookie: u64,
    /// CLOCK_MONOTONIC of the last second in which the agent vouched for these maps.
    pub heartbeat_ns: u64,
    /// Age of the heartbeat at which connect and sendmsg stop translating; 0 = never.
    pub lease_ns: u64,
    /// Counts generation swaps.
    pub generation: u64,
    /// Name of the node, zero-padded.
    pub node: [u8; 64],
    /// Digest of the programs that were attached last, by which a restarted agent knows its own without loading them.
    pub programs: u64,
    /// Zero.
    pub reserved: [u64; 18],
}

/// Flags of [`Meta`].
pub mod meta_flags {
    /// The maps hold a complete state; before this they are under construction and no hook uses them.
    pub const COMPLETE: u32 = 1;
    /// OPTOUT has entries.
    pub const OPT_OUT: u32 = 2;
}

/// Value of STATS, index of SERVICES. 32 bytes. Added to atomically by the programs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// connect() calls translated.
    pub connections: u64,
    /// Datagrams of unconnected sockets translated.
    pub datagrams: u64,
    /// Refusals.
    pub refused: u64,
    /// Zero.
    pub reserved: u64,
}

/// Why a program left by the exit it took: index of REASONS, a PERCPU_ARRAY of u64 counters.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// Translated by connect().
    Connected = 0,
    /// Translated by sendmsg().
    Sent = 1,
    /// Reply shown as coming from the VIP.
    ReplyTranslated = 2,
    /// getpeername() answered with the VIP.
    PeerNameTranslated = 3,
    /// Nothing of ours: no such frontend.
    NotAService = 4,
    /// The protocol is neither TCP nor UDP.
    OtherProtocol = 5,
    /// The socket's cgroup is excluded.
    OptedOut = 6,
    /// The agent has been gone for longer than the lease.
    LeaseExpired = 7,
    /// Source ranges: the packet layer decides.
    SourceRanges = 8,
    /// The ClusterIP is assigned to a local link.
    OnLocalLink = 9,
    /// A loopback address that is not the node's, or a source bound to loopback.
    ForeignLoopback = 10,
    /// No usable endpoint: refused.
    NoEndpoints = 11,
    /// A ClusterIP without such a port: refused.
    UnknownPort = 12,
    /// No usable endpoint, but a UDP connect() is never refused: passed.
    UdpConnectPassed = 13,
    /// No socket storage: passed untranslated.
    NoStorage = 14,
    /// The set changed under the reader four times: passed untranslated.
    Contended = 15,
    /// A hash element was recycled under the reader and looked up again.
    Recycled = 16,
    /// A map that must have this entry does not: passed untranslated.
    BrokenMap = 17,
    /// A peer in PEERS because the socket's own storage is full.
    PeerOverflow = 18,
    /// A connected UDP socket of a dead member destroyed.
    SocketDestroyed = 19,
    /// recvmsg() or getpeername() of something untranslated.
    ReplyUntouched = 20,
    /// Affinity decided the backend.
    AffinityHit = 21,
}

impl Reason {
    /// All of them, by index.
    pub const ALL: [Self; 22] = [
        Self::Connected,
        Self::Sent,
        Self::ReplyTranslated,
        Self::PeerNameTranslated,
        Self::NotAService,
        Self::OtherProtocol,
        Self::OptedOut,
        Self::LeaseExpired,
        Self::SourceRanges,
        Self::OnLocalLink,
        Self::ForeignLoopback,
        Self::NoEndpoints,
        Self::UnknownPort,
        Self::UdpConnectPassed,
        Self::NoStorage,
        Self::Contended,
        Self::Recycled,
        Self::BrokenMap,
        Self::PeerOverflow,
        Self::SocketDestroyed,
        Self::ReplyUntouched,
        Self::AffinityHit,
    ];

    /// The name used in metrics and dumps.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connected => "connected",
            Self::Sent => "sent",
            Self::ReplyTranslated => "reply_translated",
            Self::PeerNameTranslated => "peer_name_translated",
            Self::NotAService => "not_a_service",
            Self::OtherProtocol => "other_protocol",
            Self::OptedOut => "opted_out",
            Self::LeaseExpired => "lease_expired",
            Self::SourceRanges => "source_ranges",
            Self::OnLocalLink => "on_local_link",
            Self::ForeignLoopback => "foreign_loopback",
            Self::NoEndpoints => "no_endpoints",
            Self::UnknownPort => "unknown_port",
            Self::UdpConnectPassed => "udp_connect_passed",
            Self::NoStorage => "no_storage",
            Self::Contended => "contended",
            Self::Recycled => "recycled",
            Self::BrokenMap => "broken_map",
            Self::PeerOverflow => "peer_overflow",
            Self::SocketDestroyed => "socket_destroyed",
            Self::ReplyUntouched => "reply_untouched",
            Self::AffinityHit => "affinity_hit",
        }
    }
}

/// Entries of REASONS; room for later ones.
pub const REASONS: u32 = 64;

plain! {
    FrontendKey { addr: Addr, port: Be16, protocol: u8, pad: u8 } = 20;
    Service { cluster: SetWord, local: SetWord, policy: Policy, used: u32, reserved: [u64; 5], grown: [u64; GROWN_WORDS] } = 64 + 8 * GROWN_WORDS;
    Slot { addr: Addr, port: Be16, flags: u16, member: u32, generation: u32, member_generation: u32, grown: [u64; GROWN_WORDS] } = 32 + 8 * GROWN_WORDS;
    Member { word: MemberWord, service: u32, port: Be16, pad: u16, addr: Addr, grown: [u64; GROWN_WORDS] } = 32 + 8 * GROWN_WORDS;
    AffinityKey { client: Addr, service: u32, pad: u32 } = 24;
    AffinityValue { last_used_ns: u64, member: u32, generation: u32, slot: u32, check: u16, pad: u16, reserved: u64 } = 32;
    Peer { vip: Addr, backend: Addr, vip_port: Be16, backend_port: Be16, flags: u32, service: u32, member: u32, generation: u32, protocol: u32, last_used_ns: u64 } = 64;
    Socket { netns_cookie: u64, reserved: u64, peers: [Peer; SOCKET_PEERS] } = 272;
    SocketRecord { cookie: u64, socket: Socket } = 280;
    DeadSocket { netns_cookie: u64, cookie: u64 } = 16;
    PeerKey { cookie: u64, addr: Addr, port: Be16, by: u16, pad: u32 } = 32;
    Name { len: u8, protocol: u8, family: u8, pad: u8, text: [u8; NAME_LEN] } = 200;
    Meta { abi_version: u32, flags: u32, netns_cookie: u64, heartbeat_ns: u64, lease_ns: u64, generation: u64, node: [u8; 64], programs: u64, reserved: [u64; 18] } = 256;
    Stats { connections: u64, datagrams: u64, refused: u64, reserved: u64 } = 32;
}

// SAFETY: transparent integers, or arrays of them.
unsafe impl Plain for Addr {}
// SAFETY: one integer.
unsafe impl Plain for FrontendValue {}
// SAFETY: an integer.
unsafe impl Plain for u64 {}
// SAFETY: an integer.
unsafe impl Plain for u32 {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_way_into_words_and_back() {
        for text in ["10.96.0.1", "0.0.0.0", "127.0.0.1", "fd00::1", "::", "::1"] {
            let ip: IpAddr = text.parse().unwrap();
            assert_eq!(IpAddr::from(Addr::from(ip)), ip);
        }
        let loopback = |text: &str| Addr::from(text.parse::<IpAddr>().unwrap()).is_loopback();
        assert!(
            loopback("127.9.9.9") && loopback("::1") && !loopback("::2") && !loopback("10.0.0.1")
        );
        assert_eq!(Addr::from(IpAddr::from([0, 0, 0, 0])), Addr::UNSPECIFIED_V4);
    }

    #[test]
    fn set_words_hold_their_three_parts() {
        let word = SetWord::new(SetWord::MAX_SLOTS - 1, SetWord::MAX_COUNT, 0x2_ffff);
        assert_eq!(
            (word.base(), word.count(), word.generation()),
            (SetWord::MAX_SLOTS - 1, SetWord::MAX_COUNT, 0x2_ffff)
        );
    }

    #[test]
    fn frontend_values_name_their_key() {
        let key = FrontendKey::new(Addr::from_v4_word(7), Be16::new(80), TCP);
        let other = FrontendKey::new(Addr::from_v4_word(7), Be16::new(81), TCP);
        let value = FrontendValue::new(&key, 77, kind::NODE_PORT, frontend_flags::SOURCE_RANGES);
        assert_eq!((value.service(), value.kind(), value.flags()), (77, 2, 1));
        assert!(value.belongs_to(&key) && !value.belongs_to(&other));
    }

    #[test]
    fn reasons_are_listed_by_their_index() {
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
        }
    }
}
