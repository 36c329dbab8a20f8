//! Netlink of netfilter's subsystems: messages built and read as bytes, on a socket of the calling thread's network
//! namespace.
//!
//! Layouts: include/uapi/linux/netlink.h and netfilter/nfnetlink.h. Headers are in host order, attributes of netfilter in
//! network order.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    setsockopt, socket, sockopt,
};

/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Bytes of `struct nfgenmsg`, which follows it.
const GENERIC: usize = 4;
/// Bytes of `struct nlattr`.
const ATTRIBUTE: usize = 4;
/// Set in the type of an attribute that holds attributes.
const NESTED: u16 = 1 << 15;
/// Both flag bits in the type of an attribute.
const ATTRIBUTE_FLAGS: u16 = 0b11 << 14;

/// Type of a message that answers a request with an errno; 0 for success.
const ERROR: u16 = 2;
/// Type of the message that ends a dump.
const DONE: u16 = 3;

/// `NFNL_MSG_BATCH_BEGIN` and `NFNL_MSG_BATCH_END`.
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;

/// `NLM_F_REQUEST`.
const REQUEST: u16 = 0x1;
/// `NLM_F_ACK`: answer also a request that succeeded.
pub const ACK: u16 = 0x4;
/// `NLM_F_DUMP`: answer with everything that there is.
pub const DUMP: u16 = 0x300;

/// Enough for what the kernel puts into one datagram (`NLMSG_GOODSIZE` and a dump's 32 KiB).
pub const BUFFER_BYTES: usize = 32 * 1024;

/// A socket for requests, or for what a subsystem tells everybody.
#[derive(Debug)]
pub struct Socket(OwnedFd);

impl Socket {
    /// One that gets the messages of multicast `group` (`NFNLGRP_*`), or only answers.
    ///
    /// # Errors
    /// The kernel has no nfnetlink, or the group needs CAP_NET_ADMIN.
    pub fn open(group: Option<u32>) -> io::Result<Self> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkNetFilter,
        )?;
        let groups = group.map_or(0, |group| 1 << (group - 1));
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        Ok(Self(fd))
    }

    /// Room for datagrams that nobody has read yet, bytes.
    ///
    /// # Errors
    /// CAP_NET_ADMIN is missing.
    pub fn set_room(&self, bytes: usize) -> io::Result<()> {
        Ok(setsockopt(&self.0, sockopt::RcvBufForce, &bytes)?)
    }

    /// Sends requests. The kernel has carried them out when this returns.
    ///
    /// # Errors
    /// It did not take them.
    pub fn send(&self, requests: &Requests) -> io::Result<()> {
        send(self.0.as_raw_fd(), &requests.0, MsgFlags::empty())?;
        Ok(())
    }

    /// Next datagram, waiting for it.
    ///
    /// # Errors
    /// `ENOBUFS`: some were lost since the last one.
    pub fn receive<'a>(&self, buffer: &'a mut [u8]) -> io::Result<Messages<'a>> {
        let read = recv(self.0.as_raw_fd(), buffer, MsgFlags::empty())?;
        Ok(Messages(&buffer[..read]))
    }

    /// Next datagram, if one is there.
    ///
    /// # Errors
    /// `ENOBUFS`: some were lost since the last one.
    pub fn try_receive<'a>(&self, buffer: &'a mut [u8]) -> io::Result<Option<Messages<'a>>> {
        match recv(self.0.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(read) => Ok(Some(Messages(&buffer[..read]))),
            Err(nix::Error::EAGAIN) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Sends `requests`, of which one has [`ACK`], and waits for its answer; `take` is given each message that comes before.
///
/// # Errors
/// The kernel has no nfnetlink, or the answer is an error.
pub fn ask(requests: &Requests, mut take: impl FnMut(Message<'_>)) -> io::Result<()> {
    let socket = Socket::open(None)?;
    socket.send(requests)?;
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        for message in socket.receive(&mut buffer)? {
            match message {
                Message::Answer(0) | Message::Done => return Ok(()),
                Message::Answer(errno) => return Err(io::Error::from_raw_os_error(errno)),
                Message::Data { .. } => take(message),
            }
        }
    }
}

/// A message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// One of a subsystem.
    Data {
        /// Subsystem and number: [`kind`].
        kind: u16,
        /// `NLM_F_*`.
        flags: u16,
        /// `NFPROTO_*`.
        family: u8,
        /// What it says.
        attributes: Attributes<'a>,
    },
    /// A request was carried out (0), or why not (errno).
    Answer(i32),
    /// The end of a dump.
    Done,
}

/// Type of message `number` of `subsystem` (`NFNL_SUBSYS_*`).
pub const fn kind(subsystem: u8, number: u8) -> u16 {
    u16::from_be_bytes([subsystem, number])
}

/// The messages of a datagram. What is cut off or malformed is not among them.
#[derive(Clone, Copy, Debug)]
pub struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let length = u32::from_ne_bytes(*self.0.first_chunk()?) as usize;
        let message = self.0.get(..length)?;
        let body = message.get(HEADER..)?;
        self.0 = self.0.get(padded(length)..).unwrap_or_default();
        let kind = u16::from_ne_bytes([message[4], message[5]]);
        let flags = u16::from_ne_bytes([message[6], message[7]]);
        match kind {
            ERROR => Some(Message::Answer(-i32::from_ne_bytes(*body.first_chunk()?))),
            DONE => Some(Message::Done),
            _ => Some(Message::Data {
                kind,
                flags,
                family: *body.first()?,
                attributes: Attributes(body.get(GENERIC..)?),
            }),
        }
    }
}

/// Attributes, each with its type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes<'a>(&'a [u8]);

impl<'a> Attributes<'a> {
    /// The bytes of the attribute of this type.
    pub fn find(self, wanted: u16) -> Option<&'a [u8]> {
        self.into_iter()
            .find_map(|(kind, value)| (kind == wanted).then_some(value))
    }

    /// The attributes in the attribute of this type.
    pub fn nested(self, wanted: u16) -> Option<Self> {
        self.find(wanted).map(Self)
    }

    /// A name: without the zero at its end.
    pub fn text(self, wanted: u16) -> Option<&'a [u8]> {
        let value = self.find(wanted)?;
        Some(value.strip_suffix(&[0]).unwrap_or(value))
    }

    /// A number of 16 bits.
    pub fn u16(self, wanted: u16) -> Option<u16> {
        Some(u16::from_be_bytes(*self.find(wanted)?.first_chunk()?))
    }

    /// A number of 32 bits.
    pub fn u32(self, wanted: u16) -> Option<u32> {
        Some(u32::from_be_bytes(*self.find(wanted)?.first_chunk()?))
    }

    /// All of them as they came.
    pub fn bytes(self) -> &'a [u8] {
        self.0
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let [low, high, kind @ ..] = *self.0.first_chunk::<ATTRIBUTE>()?;
        let length = usize::from(u16::from_ne_bytes([low, high]));
        let value = self.0.get(ATTRIBUTE..length)?;
        self.0 = self.0.get(padded(length)..).unwrap_or_default();
        Some((u16::from_ne_bytes(kind) & !ATTRIBUTE_FLAGS, value))
    }
}

/// Requests for one datagram, which the kernel carries out one after the other.
#[derive(Clone, Debug, Default)]
pub struct Requests(Vec<u8>);

impl Requests {
    /// Adds a request of type [`kind`]; `fill` writes its attributes.
    pub fn push(&mut self, kind: u16, flags: u16, family: u8, fill: impl FnOnce(&mut Writer<'_>)) {
        let start = self.0.len();
        self.0.extend([0; 4]);
        self.0.extend(kind.to_ne_bytes());
        self.0.extend((flags | REQUEST).to_ne_bytes());
        self.0.extend([0; 8]);
        self.0.extend([family, 0, 0, 0]);
        fill(&mut Writer(&mut self.0));
        let length = (self.0.len() - start) as u32;
        self.0[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    }

    /// Makes what `fill` adds one transaction of `subsystem`: all of it is carried out, or nothing.
    pub fn transaction(&mut self, subsystem: u8, fill: impl FnOnce(&mut Self)) {
        self.bracket(BATCH_BEGIN, subsystem);
        fill(self);
        self.bracket(BATCH_END, subsystem);
    }

    fn bracket(&mut self, kind: u16, subsystem: u8) {
        self.push(kind, 0, 0, |_| {});
        // `res_id` of the generic header, its last 16 bits, in network order.
        if let Some(last) = self.0.last_mut() {
            *last = subsystem;
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes all out.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

/// Writes attributes.
#[derive(Debug)]
pub struct Writer<'a>(&'a mut Vec<u8>);

impl Writer<'_> {
    /// An attribute of at most 64 KiB.
    pub fn put(&mut self, kind: u16, value: &[u8]) {
        let length = (ATTRIBUTE + value.len()) as u16;
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    /// An attribute that holds those which `fill` writes.
    pub fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Writer<'_>)) {
        let start = self.0.len();
        self.0.extend([0; 2]);
        self.0.extend((kind | NESTED).to_ne_bytes());
        fill(&mut Writer(self.0));
        let length = (self.0.len() - start) as u16;
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }

    /// An attribute that holds attributes which were read before.
    pub fn copy(&mut self, kind: u16, attributes: Attributes<'_>) {
        self.put(kind | NESTED, attributes.bytes());
    }
}

/// Messages and attributes begin at multiples of four.
const fn padded(length: usize) -> usize {
    length.next_multiple_of(4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut requests = Requests::default();
        requests.push(kind(10, 16), DUMP, 2, |writer| {
            writer.put(1, b"nat\0");
            writer.nest(2, |inner| {
                inner.put(1, &7_u16.to_be_bytes());
                inner.put(2, &9_u32.to_be_bytes());
            });
        });
        requests.push(kind(1, 2), ACK, 10, |_| {});
        let [first, second] = Messages(&requests.0).collect::<Vec<_>>()[..] else {
            panic!("{requests:?}");
        };
        let Message::Data {
            kind: read,
            flags,
            family,
            attributes,
        } = first
        else {
            panic!("{first:?}");
        };
        assert_eq!((read, flags, family), (0x0a10, DUMP | REQUEST, 2));
        assert_eq!(attributes.text(1), Some(&b"nat"[..]));
        let inner = attributes.nested(2).unwrap();
        assert_eq!((inner.u16(1), inner.u32(2)), (Some(7), Some(9)));
        assert_eq!(inner.find(3), None);
        assert!(matches!(
            second,
            Message::Data {
                kind: 0x0102,
                family: 10,
                ..
            }
        ));
    }

    #[test]
    fn what_is_cut_off_is_not_read() {
        let mut requests = Requests::default();
        requests.push(kind(10, 16), 0, 2, |writer| {
            writer.put(1, b"nat\0");
            writer.put(2, b"filter\0");
        });
        for end in 0..requests.0.len() {
            assert_eq!(Messages(&requests.0[..end]).next(), None, "{end} bytes");
        }
        let attributes = &requests.0[HEADER + GENERIC..];
        for end in 0..attributes.len() {
            // The last attribute has one byte of padding.
            let expected = match end {
                0..8 => 0,
                8..19 => 1,
                _ => 2,
            };
            assert_eq!(Attributes(&attributes[..end]).count(), expected, "{end}");
        }
        // Lengths that lie.
        assert_eq!(Messages(&[4, 0, 0, 0]).next(), None);
        assert_eq!(Attributes(&[3, 0, 1, 0, 9]).next(), None);
    }

    #[test]
    fn the_kernel_answers_a_request() {
        let mut requests = Requests::default();
        // No such subsystem.
        requests.push(kind(200, 0), ACK, 0, |_| {});
        let error = ask(&requests, |message| panic!("{message:?}")).unwrap_err();
        assert!(
            error.raw_os_error().is_some_and(|errno| errno > 0),
            "{error}"
        );
    }
}
