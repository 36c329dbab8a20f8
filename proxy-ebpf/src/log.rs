//! Debug lines of the programs, through aya-log.
//!
//! The agent sets the global `AYA_LOG_LEVEL` at load: 0 for none, when the verifier removes all of this, 4 for these.
//! Functions of their own, so that their buffers are not on the stack of the programs.

use aya_log_ebpf::macro_support::{Level, level_enabled};
use proxy_ebpf::{
    abi::{Addr, Be16, Reason},
    lb::Request,
};

#[inline(always)]
fn octets(addr: &Addr) -> [u8; 16] {
    let [a, b, c, d] = addr.0.map(u32::to_ne_bytes);
    [
        a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2],
        d[3],
    ]
}

/// A connection or datagram was sent to a backend.
#[inline(always)]
pub fn translated(request: &Request, addr: &Addr, port: Be16) {
    if level_enabled(Level::Debug) {
        write_translated(&request.addr, request.port.host(), addr, port.host());
    }
}

#[inline(never)]
fn write_translated(vip: &Addr, vip_port: u16, addr: &Addr, port: u16) {
    let ctx = ();
    aya_log_ebpf::debug!(
        ctx,
        "[{:i}]:{} goes to [{:i}]:{}",
        octets(vip),
        vip_port,
        octets(addr),
        port
    );
}

/// A connection or datagram was refused.
#[inline(always)]
pub fn refused(request: &Request, reason: Reason) {
    if level_enabled(Level::Debug) {
        write_refused(&request.addr, request.port.host(), reason as u32);
    }
}

#[inline(never)]
fn write_refused(vip: &Addr, vip_port: u16, reason: u32) {
    let ctx = ();
    aya_log_ebpf::debug!(
        ctx,
        "[{:i}]:{} is refused, reason {}",
        octets(vip),
        vip_port,
        reason
    );
}
