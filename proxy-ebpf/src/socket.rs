//! The socket layer: translates a Service address once, when a socket connects or sends, and shows it again to whoever
//! asks where a datagram came from or whom the socket is connected to.
//!
//! One body for both families. The kernel runs the hooks of one socket under its lock, so that nothing here races with
//! itself. v4-mapped destinations of an IPv6 socket arrive at `connect6`, but at `sendmsg4`, and the replies at `recvmsg6`
//! (v6.18, net/ipv6/udp.c).

use aya_ebpf::{
    EbpfContext,
    helpers::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_netns_cookie, bpf_get_prandom_u32,
        bpf_get_socket_cookie, bpf_ktime_get_ns, bpf_set_retval,
    },
    programs::{SockAddrContext, SockContext},
};
use proxy_ebpf::{
    abi::{Addr, Be16, Peer, Reason, Socket, TCP, UDP, meta_flags, peer_flags},
    lb::{self, Backend, Hit, Request, Verdict},
};

use self::context::{Family, port, rewrite, sk};
use crate::{
    log,
    maps::{self, Counter, Maps, Terms},
};

pub mod context;

/// The kernel goes on with the call; the only value that recvmsg and getpeername may return.
const PROCEED: i32 = 1;
const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;

/// Cgroups deeper than this are opted out through their ancestors only.
const CGROUP_LEVELS: i32 = 16;

#[inline(always)]
fn request<F: Family>(ctx: &SockAddrContext, terms: &Terms, source: Addr, now_ns: u64) -> Request {
    // SAFETY: helpers without preconditions.
    let (netns_cookie, random) =
        unsafe { (bpf_get_netns_cookie(ctx.as_ptr()), bpf_get_prandom_u32()) };
    Request {
        addr: F::addr(ctx),
        port: port(ctx),
        protocol: context::protocol(ctx),
        on_host: netns_cookie == terms.netns_cookie,
        from_loopback: source.is_loopback(),
        netns_cookie,
        now_ns,
        random,
    }
}

/// Whether the agent has been gone for too long to be believed.
#[inline(always)]
fn lease_expired(terms: &Terms, now_ns: u64) -> bool {
    terms.lease_ns != 0 && now_ns.saturating_sub(terms.heartbeat_ns) > terms.lease_ns
}

#[inline(always)]
fn opted_out(terms: &Terms) -> bool {
    if terms.flags & meta_flags::OPT_OUT == 0 {
        return false;
    }
    for level in 0..CGROUP_LEVELS {
        // SAFETY: a helper without preconditions; 0 below the task's own level.
        let cgroup = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if cgroup == 0 {
            return false;
        }
        if maps::is_opted_out(cgroup) {
            return true;
        }
    }
    false
}

/// The frontend that serves a request of this task.
#[inline(always)]
fn find(request: &Request, terms: &Terms) -> Result<Hit, Verdict> {
    let found = lb::find(&Maps, request);
    // Asked only where it makes a difference: most connections go to no Service.
    let concerned = !matches!(found, Err(Verdict::Pass(_)));
    if concerned && terms.flags & meta_flags::HOST_ONLY != 0 && !request.on_host {
        return Err(Verdict::Pass(Reason::PodSocket));
    }
    if concerned && opted_out(terms) {
        return Err(Verdict::Pass(Reason::OptedOut));
    }
    found
}

/// How a program ends: the reason is counted once, at the one exit.
struct End {
    reason: Reason,
    refuse: bool,
}

/// The call goes on, as it is or rewritten.
const fn go_on(reason: Reason) -> End {
    End {
        reason,
        refuse: false,
    }
}

#[inline(always)]
fn refuse(request: &Request, service: Option<u32>, reason: Reason) -> End {
    if let Some(service) = service {
        maps::count_for(service, Counter::Refused);
    }
    log::refused(request, reason);
    End {
        reason,
        refuse: true,
    }
}

#[inline(always)]
fn finish(end: End) -> i32 {
    maps::count(end.reason);
    if !end.refuse || !maps::can_refuse() {
        return PROCEED;
    }
    // SAFETY: allowed in connect and sendmsg, the only ones that refuse. Without it the call ends in EPERM.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
    REFUSE
}

/// `connect()`.
#[inline(always)]
pub fn connect<F: Family>(ctx: &SockAddrContext) -> i32 {
    let end = connect_or_not::<F>(ctx);
    // The socket is no longer connected to what its entry or its storage says.
    if !end.refuse && end.reason as u32 != Reason::Connected as u32 {
        maps::free_connection(cookie(ctx));
        maps::forget(sk(ctx));
    }
    finish(end)
}

#[inline(always)]
fn connect_or_not<F: Family>(ctx: &SockAddrContext) -> End {
    let Some(terms) = maps::terms() else {
        return go_on(Reason::BrokenMap);
    };
    // SAFETY: a helper without preconditions.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    if lease_expired(&terms, now_ns) {
        return go_on(Reason::LeaseExpired);
    }
    let request = request::<F>(ctx, &terms, F::bound(ctx), now_ns);
    let (verdict, service) = match find(&request, &terms) {
        Ok(hit) => (lb::choose(&Maps, hit, &request), Some(hit.service)),
        Err(verdict) => (verdict, None),
    };
    match verdict {
        Verdict::Pass(reason) => go_on(reason),
        // Resolvers sort addresses by connecting a datagram socket to each (RFC 6724), without sending anything.
        Verdict::Refuse(_) if request.protocol == UDP => go_on(Reason::UdpConnectPassed),
        Verdict::Refuse(reason) => refuse(&request, service, reason),
        Verdict::Translate(backend) => connect_to::<F>(ctx, &request, &backend),
    }
}

#[inline(always)]
fn connect_to<F: Family>(ctx: &SockAddrContext, request: &Request, backend: &Backend) -> End {
    if request.protocol == TCP {
        // Socket storage is what a connection would pay most for (docs/adr/0005); it is for when two sockets want one entry.
        if let Some(connection) = maps::claimed_connection(cookie(ctx)) {
            connection.connect(request, backend);
            return connected::<F>(ctx, request, backend);
        }
        maps::count(Reason::EntryTaken);
    }
    // Without a record of it, recvmsg and getpeername would show the backend.
    let Some(socket) = maps::socket_or_new(ctx) else {
        return go_on(Reason::NoStorage);
    };
    socket.connect(request, backend);
    connected::<F>(ctx, request, backend)
}

#[inline(always)]
fn connected<F: Family>(ctx: &SockAddrContext, request: &Request, backend: &Backend) -> End {
    rewrite::<F>(ctx, &backend.addr, backend.port);
    maps::count_for(backend.service, Counter::Connections);
    log::translated(request, &backend.addr, backend.port);
    go_on(Reason::Connected)
}

/// `sendto()` and `sendmsg()` with an address: UDP only.
#[inline(always)]
pub fn sendmsg<F: Family>(ctx: &SockAddrContext) -> i32 {
    finish(send_or_not::<F>(ctx))
}

#[inline(always)]
fn send_or_not<F: Family>(ctx: &SockAddrContext) -> End {
    let Some(terms) = maps::terms() else {
        return go_on(Reason::BrokenMap);
    };
    // SAFETY: a helper without preconditions.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    if lease_expired(&terms, now_ns) {
        return go_on(Reason::LeaseExpired);
    }
    let request = request::<F>(ctx, &terms, F::datagram_source(ctx), now_ns);
    let hit = match find(&request, &terms) {
        Ok(hit) => hit,
        Err(Verdict::Pass(reason)) => return go_on(reason),
        Err(Verdict::Refuse(reason)) => return refuse(&request, None, reason),
        Err(Verdict::Translate(_)) => return go_on(Reason::BrokenMap),
    };
    let Some(socket) = maps::socket_or_new(ctx) else {
        return go_on(Reason::NoStorage);
    };
    if let Some((addr, port)) = earlier_choice(ctx, socket, &request, hit) {
        return send_to::<F>(ctx, &request, hit, &addr, port);
    }
    match lb::choose(&Maps, hit, &request) {
        Verdict::Pass(reason) => go_on(reason),
        Verdict::Refuse(reason) => refuse(&request, Some(hit.service), reason),
        Verdict::Translate(backend) => {
            socket.netns_cookie = request.netns_cookie;
            remember(ctx, socket, &request, &backend);
            send_to::<F>(ctx, &request, hit, &backend.addr, backend.port)
        }
    }
}

#[inline(always)]
fn send_to<F: Family>(
    ctx: &SockAddrContext,
    request: &Request,
    hit: Hit,
    addr: &Addr,
    port: Be16,
) -> End {
    rewrite::<F>(ctx, addr, port);
    maps::count_for(hit.service, Counter::Datagrams);
    log::translated(request, addr, port);
    go_on(Reason::Sent)
}

#[inline(always)]
fn cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the context of a hook that may ask.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

/// The backend of an earlier choice that stands, which is thereby used again.
#[inline(always)]
fn earlier_choice(
    ctx: &SockAddrContext,
    socket: &mut Socket,
    request: &Request,
    hit: Hit,
) -> Option<(Addr, Be16)> {
    if let Some(peer) = socket.choice(&Maps, request, hit) {
        peer.last_used_ns = request.now_ns;
        return Some((peer.backend, peer.backend_port));
    }
    if !socket.is_full() {
        return None;
    }
    let cookie = cookie(ctx);
    let peer = maps::overflow_peer(&Peer::key_by_vip(cookie, request))
        .filter(|peer| peer.stands(&Maps, request, hit))?;
    peer.last_used_ns = request.now_ns;
    let (addr, port) = (peer.backend, peer.backend_port);
    // Another VIP that leads there may have written it since.
    maps::remember_overflow(&Peer::key_by_backend(cookie, addr, port), peer);
    Some((addr, port))
}

#[inline(always)]
fn remember(ctx: &SockAddrContext, socket: &mut Socket, request: &Request, backend: &Backend) {
    if let Some(place) = socket.place(request) {
        place.record(request, backend, peer_flags::USED);
        return;
    }
    maps::count(Reason::PeerOverflow);
    let mut peer = Peer::default();
    peer.record(request, backend, peer_flags::USED);
    let cookie = cookie(ctx);
    maps::remember_overflow(&Peer::key_by_vip(cookie, request), &peer);
    let by_backend = Peer::key_by_backend(cookie, backend.addr, backend.port);
    maps::remember_overflow(&by_backend, &peer);
}

/// `recvfrom()` and `recvmsg()` that ask for the sender: UDP only.
#[inline(always)]
pub fn recvmsg<F: Family>(ctx: &SockAddrContext) -> i32 {
    maps::count(show_sender::<F>(ctx));
    PROCEED
}

#[inline(always)]
fn show_sender<F: Family>(ctx: &SockAddrContext) -> Reason {
    let Some(socket) = maps::socket(ctx) else {
        return Reason::ReplyUntouched;
    };
    let (addr, port) = (F::addr(ctx), port(ctx));
    let overflow = match socket.is_full() {
        true => maps::overflow_peer(&Peer::key_by_backend(cookie(ctx), addr, port)),
        false => None,
    };
    let mut sender = socket.sender(&addr, port);
    if let Some(other) = overflow
        && other.is_from(&addr, port)
        && sender
            .as_ref()
            .is_none_or(|peer| peer.last_used_ns < other.last_used_ns)
    {
        sender = Some(other);
    }
    let Some(peer) = sender else {
        return Reason::ReplyUntouched;
    };
    // SAFETY: a helper without preconditions.
    peer.last_used_ns = unsafe { bpf_ktime_get_ns() };
    rewrite::<F>(ctx, &peer.vip, peer.vip_port);
    Reason::ReplyTranslated
}

/// `getpeername()`.
#[inline(always)]
pub fn getpeername<F: Family>(ctx: &SockAddrContext) -> i32 {
    maps::count(show_peer::<F>(ctx));
    PROCEED
}

#[inline(always)]
fn show_peer<F: Family>(ctx: &SockAddrContext) -> Reason {
    let (addr, port, cookie) = (F::addr(ctx), port(ctx), cookie(ctx));
    let connection = maps::connection(cookie);
    if let Some(peer) = connection.and_then(|entry| entry.connected_to(cookie, &addr, port)) {
        rewrite::<F>(ctx, &peer.vip, peer.vip_port);
        return Reason::PeerNameTranslated;
    }
    let socket = maps::socket(ctx);
    if let Some(peer) = socket.and_then(|socket| socket.connected_to(&addr, port)) {
        rewrite::<F>(ctx, &peer.vip, peer.vip_port);
        return Reason::PeerNameTranslated;
    }
    Reason::ReplyUntouched
}

/// The last handle to a socket is closed. The kernel's own sockets and MPTCP's subflows end without this hook: their entries
/// stay taken.
#[inline(always)]
pub fn release(ctx: &SockContext) -> i32 {
    // SAFETY: the context of a hook that may ask.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    maps::count(match maps::free_connection(cookie) {
        true => Reason::Closed,
        false => Reason::CloseUntouched,
    });
    PROCEED
}
