//! What the programs count.

use super::Plain;

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
    /// A connection kept in socket storage because another socket has its entry of CONNECTIONS.
    EntryTaken = 22,
    /// A socket closed and gave up its entry of CONNECTIONS.
    Closed = 23,
    /// A socket without an entry of CONNECTIONS closed.
    CloseUntouched = 24,
    /// A pod's socket, where only the node's own are served.
    PodSocket = 25,
}

impl Reason {
    /// All of them, by index.
    pub const ALL: [Self; 26] = [
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
        Self::EntryTaken,
        Self::Closed,
        Self::CloseUntouched,
        Self::PodSocket,
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
            Self::EntryTaken => "entry_taken",
            Self::Closed => "closed",
            Self::CloseUntouched => "close_untouched",
            Self::PodSocket => "pod_socket",
        }
    }
}

/// Entries of REASONS; room for later ones.
pub const REASONS: u32 = 64;

plain! {
    Stats { connections: u64, datagrams: u64, refused: u64, reserved: u64 } = 32;
}
