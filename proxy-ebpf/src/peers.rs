//! What a socket was translated from, and when a choice made for it still stands.
//!
//! A connected TCP socket has an entry of CONNECTIONS, found by its cookie. Every other one keeps
//! [`SOCKET_PEERS`](crate::abi::SOCKET_PEERS) translations in its own storage; the programs put more into PEERS. Here is the
//! decision over one socket's entry or storage; the hooks of one socket run under its lock.

use crate::{
    abi::{
        Addr, Be16, Binding, BindingKey, CONNECTION_ENTRIES, Connection, Peer, PeerKey, Socket,
        UDP, peer_flags,
    },
    lb::{Backend, Hit, Request, Tables, service_at, still_serves},
};

/// Idle time after which an unconnected socket's choice is made anew, as conntrack forgets a stream of datagrams
/// (nf_conntrack_udp_timeout_stream, 120 s).
pub const IDLE_NS: u64 = 120_000_000_000;

impl Peer {
    #[inline(always)]
    const fn is_used(&self) -> bool {
        self.flags & peer_flags::USED != 0
    }

    #[inline(always)]
    const fn is_connected(&self) -> bool {
        self.flags & peer_flags::CONNECTED != 0
    }

    #[inline(always)]
    const fn is_idle(&self, now_ns: u64) -> bool {
        now_ns.saturating_sub(self.last_used_ns) > IDLE_NS
    }

    /// Whether this stands for the frontend that the request addresses.
    #[inline(always)]
    pub fn is_for(&self, request: &Request) -> bool {
        self.is_used() && self.vip == request.addr && self.vip_port == request.port
    }

    /// Whether a datagram from this address is a reply of this translation.
    #[inline(always)]
    pub fn is_from(&self, addr: &Addr, port: Be16) -> bool {
        self.is_used() && self.backend == *addr && self.backend_port == port
    }

    /// Whether the next datagram of `request` goes where this one went.
    #[inline(always)]
    pub fn stands<T: Tables>(&self, tables: &T, request: &Request, hit: Hit) -> bool {
        // The kernel drops what anyone but the connected backend answers, however long that takes.
        self.is_for(request)
            && self.service == hit.service
            && (self.is_connected() || !self.is_idle(request.now_ns))
            && self.is_served(tables)
    }

    /// What speaks against another choice in this place: its youth.
    #[inline(always)]
    fn against_going(&mut self, request: &Request) -> Candidate<'_> {
        let cost = if !self.is_used() {
            0
        } else if self.is_connected() {
            NEVER
        } else if self.is_for(request) || self.is_idle(request.now_ns) {
            self.last_used_ns
        } else {
            NEVER
        };
        (cost, self)
    }

    /// What speaks against a datagram from this address being its answer: its age.
    #[inline(always)]
    fn against_answering(&mut self, addr: &Addr, port: Be16) -> Candidate<'_> {
        let cost = match self.is_from(addr, port) {
            true => NEVER - self.last_used_ns,
            false => NEVER,
        };
        (cost, self)
    }

    /// Whether this is a connected UDP socket's, whose backend no longer serves: nobody will answer, and no hook runs on
    /// `send()` that could choose another one.
    #[inline(always)]
    pub fn is_dead<T: Tables>(&self, tables: &T) -> bool {
        self.is_used()
            && self.is_connected()
            && self.protocol == UDP as u32
            && !self.is_served(tables)
    }

    /// Whether the backend still serves. Its address too: a socket outlives maps that had to be built anew, where its
    /// member may stand for another endpoint.
    #[inline(always)]
    fn is_served<T: Tables>(&self, tables: &T) -> bool {
        match tables.member(self.member) {
            Some(member) => {
                still_serves(&member, self.service, self.generation)
                    && member.addr == self.backend
                    && member.port == self.backend_port
            }
            None => false,
        }
    }

    /// Names the member anew after a repair that could not keep the indices: the endpoint is the same as before. Without a
    /// binding it is gone, and the peer stays as it is, naming nothing that serves.
    #[inline(always)]
    pub fn bind<T: Tables>(
        &mut self,
        tables: &T,
        binding: impl FnOnce(&BindingKey) -> Option<Binding>,
    ) {
        // A choice made since the repair is right.
        if !self.is_used() || self.is_served(tables) {
            return;
        }
        let service = service_at(tables, self.vip, self.vip_port, self.protocol as u8);
        let Some(service) = service else {
            return;
        };
        let key = BindingKey::new(service, self.backend, self.backend_port);
        let Some(found) = binding(&key) else {
            return;
        };
        self.service = service;
        self.member = found.member;
        self.generation = found.generation;
    }

    /// Records a choice.
    #[inline(always)]
    pub const fn record(&mut self, request: &Request, backend: &Backend, flags: u32) {
        *self = Self {
            vip: request.addr,
            backend: backend.addr,
            vip_port: request.port,
            backend_port: backend.port,
            flags,
            service: backend.service,
            member: backend.member,
            generation: backend.generation,
            protocol: request.protocol as u32,
            last_used_ns: request.now_ns,
        };
    }

    /// The key in PEERS by which sending finds this.
    #[inline(always)]
    pub const fn key_by_vip(cookie: u64, request: &Request) -> PeerKey {
        PeerKey {
            cookie,
            addr: request.addr,
            port: request.port,
            by: PeerKey::BY_VIP,
            pad: 0,
        }
    }

    /// The key in PEERS by which receiving finds this.
    #[inline(always)]
    pub const fn key_by_backend(cookie: u64, addr: Addr, port: Be16) -> PeerKey {
        PeerKey {
            cookie,
            addr,
            port,
            by: PeerKey::BY_BACKEND,
            pad: 0,
        }
    }
}

impl Connection {
    /// Index of the entry that a socket may have.
    #[inline(always)]
    pub const fn index(cookie: u64) -> u32 {
        cookie as u32 & (CONNECTION_ENTRIES - 1)
    }

    /// Records what `connect()` chose for the socket that has this entry.
    #[inline(always)]
    pub const fn connect(&mut self, request: &Request, backend: &Backend) {
        self.netns_cookie = request.netns_cookie;
        self.peer
            .record(request, backend, peer_flags::USED | peer_flags::CONNECTED);
    }

    /// The peer, if this is the socket's entry and the kernel's idea of its peer is the same. `connect(AF_UNSPEC)` runs no
    /// hook that could free it.
    #[inline(always)]
    pub fn connected_to(&self, cookie: u64, addr: &Addr, port: Be16) -> Option<&Peer> {
        (self.owner == cookie && self.peer.is_from(addr, port)).then_some(&self.peer)
    }
}

impl Socket {
    /// Records what `connect()` chose; the socket now talks to nobody else.
    #[inline(always)]
    pub fn connect(&mut self, request: &Request, backend: &Backend) {
        self.netns_cookie = request.netns_cookie;
        let [connected, b, c, d] = &mut self.peers;
        connected.record(request, backend, peer_flags::USED | peer_flags::CONNECTED);
        (b.flags, c.flags, d.flags) = (0, 0, 0);
    }

    /// The connected peer, if the kernel's idea of it is the same. `connect(AF_UNSPEC)` runs no hook that could clear it.
    #[inline(always)]
    pub fn connected_to(&self, addr: &Addr, port: Be16) -> Option<&Peer> {
        let peer = &self.peers[0];
        (peer.is_connected() && peer.is_from(addr, port)).then_some(peer)
    }

    /// Whether there may be more peers in PEERS.
    #[inline(always)]
    pub const fn is_full(&self) -> bool {
        let [a, b, c, d] = &self.peers;
        a.is_used() && b.is_used() && c.is_used() && d.is_used()
    }

    /// The choice made earlier for this request, if it stands.
    #[inline(always)]
    pub fn choice<T: Tables>(
        &mut self,
        tables: &T,
        request: &Request,
        hit: Hit,
    ) -> Option<&mut Peer> {
        let [a, b, c, d] = &mut self.peers;
        match () {
            () if a.stands(tables, request, hit) => Some(a),
            () if b.stands(tables, request, hit) => Some(b),
            () if c.stands(tables, request, hit) => Some(c),
            () if d.stands(tables, request, hit) => Some(d),
            () => None,
        }
    }

    /// Where to record a new choice: a free entry, else the oldest one that is idle or for the same frontend. `None` means
    /// PEERS.
    ///
    /// A dead choice for the same frontend is not the first to go: replies may still be on their way from its backend.
    #[inline(always)]
    pub fn place(&mut self, request: &Request) -> Option<&mut Peer> {
        let [a, b, c, d] = &mut self.peers;
        let (a, b) = (a.against_going(request), b.against_going(request));
        let (c, d) = (c.against_going(request), d.against_going(request));
        possible(least(least(a, b), least(c, d)))
    }

    /// Which translation a datagram from this address answers: the one used last, where two lead to one backend.
    #[inline(always)]
    pub fn sender(&mut self, addr: &Addr, port: Be16) -> Option<&mut Peer> {
        let [a, b, c, d] = &mut self.peers;
        let (a, b) = (
            a.against_answering(addr, port),
            b.against_answering(addr, port),
        );
        let (c, d) = (
            c.against_answering(addr, port),
            d.against_answering(addr, port),
        );
        possible(least(least(a, b), least(c, d)))
    }
}

/// What speaks against a peer, and the peer. No `Option`, whose undefined parts the verifier sees being copied; and no loops
/// over peers, because the verifier of 6.1 does not see where they end.
type Candidate<'a> = (u64, &'a mut Peer);

const NEVER: u64 = u64::MAX;

#[inline(always)]
fn least<'a>(one: Candidate<'a>, other: Candidate<'a>) -> Candidate<'a> {
    if other.0 < one.0 { other } else { one }
}

#[inline(always)]
fn possible(candidate: Candidate<'_>) -> Option<&mut Peer> {
    let (cost, peer) = candidate;
    (cost != NEVER).then_some(peer)
}

#[cfg(test)]
mod tests;
