//! Keys and values of every eBPF map: the contract between the agent and the kernel programs.
//!
//! Addresses are network-order words with IPv4 as v4-mapped IPv6, ports are [`Be16`], every other integer is in host
//! order. Each type has a fixed size without padding (asserted below). [`ABI_VERSION`] changes with any change here.
//!
//! # What later versions may change
//! [`Socket`], [`Peer`], [`Connection`], [`AffinityKey`] and [`AffinityValue`] are frozen: their maps are carried from
//! agent to agent, up and down. The other values may grow at the end only: an agent of any version reads the ids that
//! another one handed out from the fields that exist here.

macro_rules! plain {
    ($($name:ty { $($field:ident: $type:ty),* $(,)? } = $size:expr;)*) => {$(
        const _: () = assert!(size_of::<$name>() == $size);
        const _: () = assert!(0 $(+ size_of::<$type>())* == $size, "padding");
        const _: fn($name) = |value| { $(let _: $type = value.$field;)* };
        // SAFETY: the fields are integers or `Plain` and fill the whole size (asserted above).
        unsafe impl Plain for $name {}
    )*};
}

mod addr;
mod bindings;
mod counters;
mod sockets;

pub use addr::{Addr, Be16};
pub use bindings::{Binding, BindingKey};
pub use counters::{REASONS, Reason, Stats};
pub use sockets::{
    AffinityKey, AffinityValue, CONNECTION_ENTRIES, Connection, Peer, PeerKey, SOCKET_PEERS,
    Socket, SocketRecord, peer_flags,
};

/// Version of the layout of the maps below.
pub const ABI_VERSION: u32 = if cfg!(feature = "abi-next") { 2 } else { 1 };

/// Words that a value of this ABI carries beyond the first release's.
pub const GROWN_WORDS: usize = if cfg!(feature = "abi-next") { 2 } else { 0 };

/// A type that may be copied to and from a map as bytes.
///
/// # Safety
/// The type is `#[repr(C)]`, has no padding, and every bit pattern is a value of it. Implemented by `plain!` only.
pub unsafe trait Plain: Copy + 'static {}

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
pub(crate) const fn fold(hash: u32, word: u32) -> u32 {
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
    /// Sockets still name members by indices that a repair could not keep: none is destroyed.
    pub const UNBOUND: u32 = 4;
    /// Only the sockets of the node's own network namespace are served: the others are to be masqueraded, which a socket
    /// cannot be.
    pub const HOST_ONLY: u32 = 8;
}

plain! {
    FrontendKey { addr: Addr, port: Be16, protocol: u8, pad: u8 } = 20;
    Service { cluster: SetWord, local: SetWord, policy: Policy, used: u32, reserved: [u64; 5], grown: [u64; GROWN_WORDS] } = 64 + 8 * GROWN_WORDS;
    Slot { addr: Addr, port: Be16, flags: u16, member: u32, generation: u32, member_generation: u32, grown: [u64; GROWN_WORDS] } = 32 + 8 * GROWN_WORDS;
    Member { word: MemberWord, service: u32, port: Be16, pad: u16, addr: Addr, grown: [u64; GROWN_WORDS] } = 32 + 8 * GROWN_WORDS;
    Name { len: u8, protocol: u8, family: u8, pad: u8, text: [u8; NAME_LEN] } = 200;
    Meta { abi_version: u32, flags: u32, netns_cookie: u64, heartbeat_ns: u64, lease_ns: u64, generation: u64, node: [u8; 64], programs: u64, reserved: [u64; 18] } = 256;
}

// SAFETY: one integer.
unsafe impl Plain for FrontendValue {}
// SAFETY: an integer.
unsafe impl Plain for u64 {}
// SAFETY: an integer.
unsafe impl Plain for u32 {}

#[cfg(test)]
mod tests;
