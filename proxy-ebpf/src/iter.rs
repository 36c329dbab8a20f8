//! Iterators over the sockets of one network namespace, the opener's: `dump sockets`, and the end of connected UDP sockets
//! whose backend is gone.
//!
//! No hook runs on `send()` of a connected socket, so it is destroyed when its backend no longer serves: the client gets an
//! error and connects again. The agent enters each namespace of the node for it. An iterator over the storage map would see
//! all namespaces at once, but may not destroy ("R1 must be referenced or trusted", v6.18), and locked-down kernels refuse
//! to load it.

use core::{ffi::c_void, mem, ptr};

use aya_ebpf::{
    Global,
    bindings::seq_file,
    helpers::{bpf_get_socket_cookie, bpf_probe_read_kernel, bpf_seq_write},
};
use proxy_ebpf::abi::{Addr, Be16, Peer, Reason, meta_flags};

use crate::maps::{self, Maps};

/// Offsets in `struct sock_common`, set by the agent from the kernel's BTF; these are what 64-bit kernels have.
#[unsafe(no_mangle)]
static SKC_DADDR_OFFSET: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static SKC_DPORT_OFFSET: Global<u32> = Global::new(12);
#[unsafe(no_mangle)]
static SKC_FAMILY_OFFSET: Global<u32> = Global::new(16);
#[unsafe(no_mangle)]
static SKC_V6_DADDR_OFFSET: Global<u32> = Global::new(56);

const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// Calls of helpers from here on are calls of kernel functions: the agent rewrites them before the load, because rustc
/// emits no declaration that the kernel would take.
const KERNEL_FUNCTIONS: usize = 0x6b66_0000;
const BPF_SOCK_DESTROY: usize = KERNEL_FUNCTIONS + 1;

/// `struct bpf_iter_meta`.
#[repr(C)]
pub struct Meta {
    seq: *mut seq_file,
}

/// What `struct bpf_iter__tcp` and `struct bpf_iter__udp` begin with.
#[repr(C)]
pub struct SocketContext {
    meta: *mut Meta,
    sk: *mut c_void,
}

/// The socket; null after the last one, when the kernel calls once more.
#[inline(always)]
fn socket(ctx: *const SocketContext) -> *mut c_void {
    // SAFETY: the kernel's context, read field by field as the verifier wants it.
    unsafe { ptr::read_volatile(&raw const (*ctx).sk) }
}

/// Writes `cookie`, then the whole [`Socket`], for each translated socket: [`proxy_ebpf::abi::SocketRecord`].
#[inline(always)]
pub fn list(ctx: *const SocketContext) -> i32 {
    let sk = socket(ctx);
    if sk.is_null() {
        return 0;
    }
    // SAFETY: `sk` is not null. The helper has nothing for what is no full socket, a handshake or TIME_WAIT.
    let Some(value) = (unsafe { maps::socket_of(sk) }) else {
        return 0;
    };
    // SAFETY: the kernel's context, and `sk` is not null.
    let (seq, cookie) = unsafe {
        let meta = ptr::read_volatile(&raw const (*ctx).meta);
        (
            ptr::read_volatile(&raw const (*meta).seq),
            bpf_get_socket_cookie(sk),
        )
    };
    emit(seq, &cookie);
    emit(seq, value);
    0
}

/// Destroys connected UDP sockets whose backend no longer serves.
#[inline(always)]
pub fn kill_dead(ctx: *const SocketContext) -> i32 {
    let sk = socket(ctx);
    let is_bound = maps::terms().is_some_and(|terms| terms.flags & meta_flags::UNBOUND == 0);
    if sk.is_null() || !is_bound {
        return 0;
    }
    // SAFETY: `sk` is not null, and locked by this iterator (v6.5, 7625d2e9741c).
    let Some(socket) = (unsafe { maps::socket_of(sk) }) else {
        return 0;
    };
    let peer = &mut socket.peers[0];
    if peer.is_dead(&Maps) && is_connected_to(sk, peer) {
        peer.flags = 0;
        // SAFETY: a call of the kernel function, once the agent has rewritten it; this program is left out where the
        // kernel lacks it.
        unsafe {
            let destroy: unsafe extern "C" fn(*mut c_void) -> i32 =
                mem::transmute(BPF_SOCK_DESTROY);
            destroy(sk);
        }
        maps::count(Reason::SocketDestroyed);
    }
    0
}

/// Names the members anew that a socket knows, after a repair that could not keep their indices.
#[inline(always)]
pub fn bind(ctx: *const SocketContext) -> i32 {
    let sk = socket(ctx);
    if sk.is_null() {
        return 0;
    }
    // SAFETY: `sk` is not null, and locked as in `kill_dead`.
    let Some(socket) = (unsafe { maps::socket_of(sk) }) else {
        return 0;
    };
    // No loop; see `peers::Candidate`.
    let [a, b, c, d] = &mut socket.peers;
    a.bind(&Maps, maps::binding);
    b.bind(&Maps, maps::binding);
    c.bind(&Maps, maps::binding);
    d.bind(&Maps, maps::binding);
    0
}

/// A record that does not fit is dropped by the kernel with the whole element, and shown again in the next read.
#[inline(always)]
fn emit<T>(seq: *mut seq_file, record: &T) {
    // SAFETY: the record's own bytes.
    unsafe { bpf_seq_write(seq, ptr::from_ref(record).cast(), size_of::<T>() as u32) };
}

/// Whether the kernel's socket is connected to the peer's backend. `connect(AF_UNSPEC)` runs no hook.
#[inline(always)]
fn is_connected_to(sk: *mut c_void, peer: &Peer) -> bool {
    let port = Be16(field(sk, &SKC_DPORT_OFFSET));
    let addr = match field::<u16>(sk, &SKC_FAMILY_OFFSET) {
        AF_INET => Addr::from_v4_word(field(sk, &SKC_DADDR_OFFSET)),
        AF_INET6 => Addr(field(sk, &SKC_V6_DADDR_OFFSET)),
        _ => return false,
    };
    peer.is_from(&addr, port)
}

/// A field of `struct sock_common`, zero where it cannot be read.
#[inline(always)]
fn field<T: Copy + Default>(sk: *mut c_void, offset: &Global<u32>) -> T {
    let at = sk.wrapping_byte_add(offset.load() as usize).cast::<T>();
    // SAFETY: the helper checks the address.
    unsafe { bpf_probe_read_kernel(at) }.unwrap_or_default()
}
