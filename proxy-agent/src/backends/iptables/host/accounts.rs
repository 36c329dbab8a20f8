//! Packet counters that rules add to, under the names that kube-proxy gave them: dashboards and tools look for these.
//!
//! They are objects of the kernel beside the tables (include/uapi/linux/netfilter/nfnetlink_acct.h), in the calling thread's
//! network namespace.

use std::io;

use crate::backends::{
    Error,
    iptables::names::{INVALID_DROPPED, LOCALHOST_ACCEPTED},
    nfnetlink::{ACK, Attributes, Message, Requests, ask, kind},
};

const ALL: [&str; 2] = [INVALID_DROPPED, LOCALHOST_ACCEPTED];

/// `NFNL_SUBSYS_ACCT`.
const SUBSYSTEM: u8 = 7;
const NEW: u16 = kind(SUBSYSTEM, 0);
const GET: u16 = kind(SUBSYSTEM, 1);
const DELETE: u16 = kind(SUBSYSTEM, 3);
/// `NFACCT_NAME`, with a zero at its end.
const NAME: u16 = 1;
/// `NFACCT_PKTS`, big-endian.
const PACKETS: u16 = 2;

/// Makes those that are not there.
///
/// # Errors
/// The kernel has no such counters, or refuses.
pub fn create() -> io::Result<()> {
    for name in ALL {
        // One of that name is there.
        unless(&[libc::EBUSY, libc::EEXIST], request(NEW, name, |_| {}))?;
    }
    Ok(())
}

/// Removes those that no rule uses.
///
/// # Errors
/// The kernel refuses.
pub fn remove() -> Result<(), Error> {
    for name in ALL {
        // Not there, or used by the rules of another proxy; the last one is from a kernel without such counters.
        let spared = [libc::ENOENT, libc::EBUSY, libc::EINVAL];
        unless(&spared, request(DELETE, name, |_| {})).map_err(|cause| Error::Kernel {
            action: "remove",
            object: format!("packet counter {name}"),
            cause,
            hint: "",
        })?;
    }
    Ok(())
}

/// What the counter called `name` has counted.
///
/// # Errors
/// There is no such counter, or the kernel cannot be asked.
pub fn packets(name: &str) -> io::Result<u64> {
    let mut found = None;
    request(GET, name, |attributes| {
        let bytes = attributes
            .find(PACKETS)
            .and_then(|value| value.first_chunk());
        found = bytes.map(|bytes| u64::from_be_bytes(*bytes));
    })?;
    found.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// Sends a request about the counter called `name`; `take` is given what is told of it.
fn request(what: u16, name: &str, mut take: impl FnMut(Attributes<'_>)) -> io::Result<()> {
    let mut requests = Requests::default();
    requests.push(what, ACK, 0, |writer| {
        writer.put(NAME, &[name.as_bytes(), b"\0"].concat());
    });
    ask(&requests, |message| {
        if let Message::Data { attributes, .. } = message {
            take(attributes);
        }
    })
}

/// An error that is one of `spared` is none.
fn unless(spared: &[i32], result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| match error.raw_os_error() {
        Some(errno) if spared.contains(&errno) => Ok(()),
        _ => Err(error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backends::in_namespace::in_namespace;

    #[test]
    #[ignore = "needs root"]
    fn counters_are_made_once_read_and_removed() {
        in_namespace(|| {
            assert!(packets(INVALID_DROPPED).is_err());
            create().unwrap();
            create().unwrap();
            assert_eq!(packets(INVALID_DROPPED).unwrap(), 0);
            assert_eq!(packets(LOCALHOST_ACCEPTED).unwrap(), 0);
            remove().unwrap();
            remove().unwrap();
            assert!(packets(LOCALHOST_ACCEPTED).is_err());
        });
    }
}
