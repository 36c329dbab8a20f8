//! What the hooks of the two address families read and write in their contexts: the only difference between them.

use core::ptr;

use aya_ebpf::{bindings::bpf_sock, programs::SockAddrContext};
use proxy_ebpf::abi::{Addr, Be16};

/// How a hook of one address family reads and writes its context.
pub trait Family {
    /// The address that the call names, or that answers it.
    fn addr(ctx: &SockAddrContext) -> Addr;
    /// Replaces it; `addr` is of this family.
    fn set_addr(ctx: &SockAddrContext, addr: &Addr);
    /// The source address of the socket, unspecified when it has none.
    fn bound(ctx: &SockAddrContext) -> Addr;
    /// The source address of the datagram, unspecified when the kernel is to choose.
    fn datagram_source(ctx: &SockAddrContext) -> Addr;
}

/// Hooks whose names end in 4.
pub struct V4;
/// Hooks whose names end in 6.
pub struct V6;

/// One load, as the verifier wants it from a context: whole words at constant offsets.
macro_rules! read {
    ($pointer:expr, $($field:tt)+) => {
        // SAFETY: a field of the context, or of the socket in it; the kernel translates the load.
        unsafe { ptr::read_volatile(&raw const (*$pointer).$($field)+) }
    };
}

macro_rules! write {
    ($ctx:expr, $value:expr, $($field:tt)+) => {
        // SAFETY: a field of the context that this hook may write.
        unsafe { ptr::write_volatile(&raw mut (*$ctx.sock_addr).$($field)+, $value) }
    };
}

impl Family for V4 {
    #[inline(always)]
    fn addr(ctx: &SockAddrContext) -> Addr {
        Addr::from_v4_word(read!(ctx.sock_addr, user_ip4))
    }

    #[inline(always)]
    fn set_addr(ctx: &SockAddrContext, addr: &Addr) {
        write!(ctx, addr.0[3], user_ip4);
    }

    #[inline(always)]
    fn bound(ctx: &SockAddrContext) -> Addr {
        Addr::from_v4_word(read!(sk(ctx), src_ip4))
    }

    #[inline(always)]
    fn datagram_source(ctx: &SockAddrContext) -> Addr {
        Addr::from_v4_word(read!(ctx.sock_addr, msg_src_ip4))
    }
}

impl Family for V6 {
    #[inline(always)]
    fn addr(ctx: &SockAddrContext) -> Addr {
        let from = ctx.sock_addr;
        Addr([
            read!(from, user_ip6[0]),
            read!(from, user_ip6[1]),
            read!(from, user_ip6[2]),
            read!(from, user_ip6[3]),
        ])
    }

    #[inline(always)]
    fn set_addr(ctx: &SockAddrContext, addr: &Addr) {
        write!(ctx, addr.0[0], user_ip6[0]);
        write!(ctx, addr.0[1], user_ip6[1]);
        write!(ctx, addr.0[2], user_ip6[2]);
        write!(ctx, addr.0[3], user_ip6[3]);
    }

    #[inline(always)]
    fn bound(ctx: &SockAddrContext) -> Addr {
        let from = sk(ctx);
        Addr([
            read!(from, src_ip6[0]),
            read!(from, src_ip6[1]),
            read!(from, src_ip6[2]),
            read!(from, src_ip6[3]),
        ])
    }

    #[inline(always)]
    fn datagram_source(ctx: &SockAddrContext) -> Addr {
        let from = ctx.sock_addr;
        Addr([
            read!(from, msg_src_ip6[0]),
            read!(from, msg_src_ip6[1]),
            read!(from, msg_src_ip6[2]),
            read!(from, msg_src_ip6[3]),
        ])
    }
}

/// The socket.
#[inline(always)]
pub fn sk(ctx: &SockAddrContext) -> *mut bpf_sock {
    // SAFETY: `sk` is the member of this union in every hook of ours.
    unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk }
}

/// The port that the call names, or that answers it.
#[inline(always)]
pub fn port(ctx: &SockAddrContext) -> Be16 {
    Be16(read!(ctx.sock_addr, user_port) as u16)
}

/// Replaces address and port.
#[inline(always)]
pub fn rewrite<F: Family>(ctx: &SockAddrContext, addr: &Addr, port: Be16) {
    F::set_addr(ctx, addr);
    write!(ctx, u32::from(port.0), user_port);
}

/// IP protocol number of the socket.
#[inline(always)]
pub fn protocol(ctx: &SockAddrContext) -> u8 {
    read!(ctx.sock_addr, protocol) as u8
}
