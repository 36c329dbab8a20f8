//! The shape of legacy tables, as `IPT_SO_GET_INFO` tells it (include/uapi/linux/netfilter_ipv4/ip_tables.h).

use std::{
    fs, io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::{backends::iptables::tables::Table, state::Family};

/// `IPT_SO_GET_INFO` and `IP6T_SO_GET_INFO`.
const GET_INFO: libc::c_int = 64;
/// Bytes of `struct ipt_getinfo`, and of `struct ip6t_getinfo`.
const INFO: usize = 84;
/// Of these, the name of the table.
const NAME: usize = 32;

const TABLES: [(Family, Table); 4] = [
    (Family::V4, Table::Filter),
    (Family::V4, Table::Nat),
    (Family::V6, Table::Filter),
    (Family::V6, Table::Nat),
];

/// Where each hook begins and ends, how many entries there are, how many bytes they take.
type Shape = [u8; INFO];

/// Compares shapes.
#[derive(Debug)]
pub struct Watch {
    /// Of each table of [`TABLES`]; none if the kernel has no such table here.
    shapes: Vec<Option<Shape>>,
}

impl Watch {
    /// Begins with what is there.
    pub fn open() -> io::Result<Self> {
        Ok(Self { shapes: shapes()? })
    }

    /// Whether the shape of a table changed since the last look.
    pub fn look(&mut self) -> io::Result<bool> {
        self.compare(None)
    }

    /// The same, after we changed the shape of one.
    pub fn resume(&mut self, family: Family, table: Table) -> io::Result<bool> {
        self.compare(Some((family, table)))
    }

    /// A table that was not there held nothing of ours: the tools make one by reading it.
    fn compare(&mut self, own: Option<(Family, Table)>) -> io::Result<bool> {
        let now = shapes()?;
        let mut pairs = TABLES.iter().zip(self.shapes.iter().zip(&now));
        let has_changed = pairs
            .any(|(table, (before, now))| Some(*table) != own && before.is_some() && before != now);
        self.shapes = now;
        Ok(has_changed)
    }
}

fn shapes() -> io::Result<Vec<Option<Shape>>> {
    let shapes = TABLES
        .into_iter()
        .map(|(family, table)| shape_of(family, table));
    shapes.collect()
}

fn shape_of(family: Family, table: Table) -> io::Result<Option<Shape>> {
    let (names, domain, level) = match family {
        Family::V4 => ("ip_tables_names", AddressFamily::Inet, libc::IPPROTO_IP),
        Family::V6 => ("ip6_tables_names", AddressFamily::Inet6, libc::IPPROTO_IPV6),
    };
    let name = table.to_string();
    // Asking for a table makes the kernel create it, so it is not asked for one that is not there.
    let names = fs::read_to_string(format!("/proc/thread-self/net/{names}"));
    let names = match names {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        names => names?,
    };
    if !names.lines().any(|line| line == name) {
        return Ok(None);
    }
    let socket = socket(domain, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    get_info(&socket, level, &name).map(Some)
}

fn get_info(socket: &OwnedFd, level: libc::c_int, table: &str) -> io::Result<Shape> {
    let mut shape = [0; INFO];
    shape[..NAME][..table.len()].copy_from_slice(table.as_bytes());
    let mut length = INFO as libc::socklen_t;
    // SAFETY: the kernel reads a name from `shape` and writes at most `length` bytes, its size, into it; nix has only
    // options that are written.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            GET_INFO,
            shape.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    match result {
        0 => Ok(shape),
        _ => Err(io::Error::last_os_error()),
    }
}
