//! The kernel programs: entry points of one call each.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod iter;
mod log;
mod maps;
mod socket;

use aya_ebpf::{
    macros::{cgroup_sock, cgroup_sock_addr},
    programs::{SockAddrContext, SockContext},
};
use socket::context::{V4, V6};

macro_rules! hooks {
    ($($hook:ident = $body:ident::<$family:ident>;)*) => {$(
        #[cgroup_sock_addr($hook)]
        fn $hook(ctx: SockAddrContext) -> i32 {
            socket::$body::<$family>(&ctx)
        }
    )*};
}

hooks! {
    connect4 = connect::<V4>;
    connect6 = connect::<V6>;
    sendmsg4 = sendmsg::<V4>;
    sendmsg6 = sendmsg::<V6>;
    recvmsg4 = recvmsg::<V4>;
    recvmsg6 = recvmsg::<V6>;
    getpeername4 = getpeername::<V4>;
    getpeername6 = getpeername::<V6>;
}

#[cgroup_sock(sock_release)]
fn sock_release(ctx: SockContext) -> i32 {
    socket::release(&ctx)
}

macro_rules! iterators {
    ($($name:ident = $body:ident in $section:literal;)*) => {$(
        #[unsafe(no_mangle)]
        #[unsafe(link_section = $section)]
        extern "C" fn $name(ctx: *const iter::SocketContext) -> i32 {
            iter::$body(ctx)
        }
    )*};
}

iterators! {
    list_tcp = list in "iter/tcp";
    list_udp = list in "iter/udp";
    kill_dead = kill_dead in "iter/udp";
    bind_udp = bind in "iter/udp";
}

/// The kernel functions used here are GPL-only, some of them.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}
