//! Packet counters that rules add to, under the names that kube-proxy gave them: dashboards and tools look for these.
//!
//! They are objects of the kernel beside the tables (include/uapi/linux/netfilter/nfnetlink_acct.h), in the calling thread's
//! network namespace.

use std::io;

use crate::backends::{
    Error,
    iptables::names::{INVALID_DROPPED, LOCALHOST_ACCEPTED},
    nfnetlink::{ACK, Attributes, BUFFER_BYTES, Message, Requests, Socket, kind},
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
        match ask(NEW, ACK, name, |_| None)? {
            // One of that name is there.
            Err(libc::EBUSY | libc::EEXIST) | Ok(()) => {}
            Err(errno) => return Err(io::Error::from_raw_os_error(errno)),
        }
    }
    Ok(())
}

/// Removes those that no rule uses.
///
/// # Errors
/// The kernel refuses.
pub fn remove() -> Result<(), Error> {
    for name in ALL {
        let failed = |cause| Error::Kernel {
            action: "remove",
            object: format!("packet counter {name}"),
            cause,
            hint: "",
        };
        match ask(DELETE, ACK, name, |_| None).map_err(failed)? {
            // Not there, or used by the rules of another proxy; the last one is from a kernel without such counters.
            Err(libc::ENOENT | libc::EBUSY | libc::EINVAL) | Ok(()) => {}
            Err(errno) => return Err(failed(io::Error::from_raw_os_error(errno))),
        }
    }
    Ok(())
}

/// What the counter called `name` has counted; none where there is no such counter.
///
/// # Errors
/// The kernel cannot be asked.
pub fn packets(name: &str) -> io::Result<Option<u64>> {
    let mut found = None;
    let read = |attributes: Attributes<'_>| {
        let bytes = attributes.find(PACKETS)?.first_chunk::<8>()?;
        Some(u64::from_be_bytes(*bytes))
    };
    let answer = ask(GET, 0, name, |attributes| {
        found = read(attributes);
        Some(())
    })?;
    Ok(answer.ok().and(found))
}

/// Sends one request, and takes its one answer: an errno, or what `take` makes of the data.
fn ask(
    what: u16,
    flags: u16,
    name: &str,
    mut take: impl FnMut(Attributes<'_>) -> Option<()>,
) -> io::Result<Result<(), i32>> {
    let socket = Socket::open(None)?;
    let mut requests = Requests::default();
    requests.push(what, flags, 0, |writer| {
        writer.put(NAME, &[name.as_bytes(), b"\0"].concat());
    });
    socket.send(&requests)?;
    let mut buffer = vec![0; BUFFER_BYTES];
    for message in socket.receive(&mut buffer)? {
        match message {
            Message::Answer(0) => return Ok(Ok(())),
            Message::Answer(errno) => return Ok(Err(errno)),
            Message::Data { attributes, .. } => {
                if take(attributes).is_some() {
                    return Ok(Ok(()));
                }
            }
            Message::Done => {}
        }
    }
    Err(io::Error::other("no answer about a packet counter"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backends::in_namespace::in_namespace;

    #[test]
    #[ignore = "needs root"]
    fn counters_are_made_once_read_and_removed() {
        in_namespace(|| {
            assert_eq!(packets(INVALID_DROPPED).unwrap(), None);
            create().unwrap();
            create().unwrap();
            assert_eq!(packets(INVALID_DROPPED).unwrap(), Some(0));
            assert_eq!(packets(LOCALHOST_ACCEPTED).unwrap(), Some(0));
            remove().unwrap();
            remove().unwrap();
            assert_eq!(packets(LOCALHOST_ACCEPTED).unwrap(), None);
        });
    }
}
