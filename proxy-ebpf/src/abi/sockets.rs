//! What is remembered of clients and their sockets. Frozen: these maps are carried from agent to agent, up and down.

use super::{Addr, Be16, Plain, fold};

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

/// Entries of CONNECTIONS, a power of two: a socket's is its cookie modulo this. Frozen.
pub const CONNECTION_ENTRIES: u32 = 1 << 16;

/// Value of CONNECTIONS: the translation of a connected TCP socket. 80 bytes. Frozen. Written by the programs; given up when
/// the socket closes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Connection {
    /// `bpf_get_socket_cookie` of the socket that has this entry; 0 = it is free.
    pub owner: u64,
    /// The client's network namespace.
    pub netns_cookie: u64,
    /// What `connect()` chose.
    pub peer: Peer,
}

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

/// One record of the iterators `list_tcp` and `list_udp`. 280 bytes. Frozen.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketRecord {
    /// `bpf_get_socket_cookie`.
    pub cookie: u64,
    /// Its value in SOCKETS.
    pub socket: Socket,
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

plain! {
    AffinityKey { client: Addr, service: u32, pad: u32 } = 24;
    AffinityValue { last_used_ns: u64, member: u32, generation: u32, slot: u32, check: u16, pad: u16, reserved: u64 } = 32;
    Peer { vip: Addr, backend: Addr, vip_port: Be16, backend_port: Be16, flags: u32, service: u32, member: u32, generation: u32, protocol: u32, last_used_ns: u64 } = 64;
    Connection { owner: u64, netns_cookie: u64, peer: Peer } = 80;
    Socket { netns_cookie: u64, reserved: u64, peers: [Peer; SOCKET_PEERS] } = 272;
    SocketRecord { cookie: u64, socket: Socket } = 280;
    PeerKey { cookie: u64, addr: Addr, port: Be16, by: u16, pad: u32 } = 32;
}
