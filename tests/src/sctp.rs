//! The first two packets of an SCTP association, by raw sockets: the kernel may track SCTP and have no SCTP sockets.
//!
//! The INIT ACK that answers an INIT carries a line of text as its state cookie, which is opaque to clients. RFC 9260,
//! sections 3 and 3.3.2 to 3.3.3. The kernel writes the IP headers.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    thread,
    time::Duration,
};

use crate::raw::RawSocket;

const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
/// Kind of the parameter that an INIT ACK must have.
const STATE_COOKIE: u16 = 7;
/// Of our side of every association; a packet carries the tag of the side that receives it.
const CLIENT_TAG: u32 = 0x0c11_e274;
const SERVER_TAG: u32 = 0x005e_2e72;
/// In every packet before its chunks.
const COMMON_HEADER: usize = 12;
/// Tag, window, streams out and in, first sequence number.
const FIXED_PART: usize = 16;

/// A packet with one chunk.
#[derive(Debug, PartialEq, Eq)]
struct Packet {
    source: u16,
    destination: u16,
    /// Of the receiver; none is known to who sends an INIT.
    tag: u32,
    chunk: u8,
    /// Of the sender.
    own_tag: u32,
    cookie: Option<String>,
}

impl Packet {
    fn write(&self) -> Vec<u8> {
        let mut value = self.own_tag.to_be_bytes().to_vec();
        value.extend(65_536_u32.to_be_bytes());
        value.extend([1_u16.to_be_bytes(); 2].concat());
        value.extend(1_u32.to_be_bytes());
        if let Some(cookie) = &self.cookie {
            value.extend(STATE_COOKIE.to_be_bytes());
            value.extend(length(4 + cookie.len()));
            value.extend(cookie.as_bytes());
        }
        let mut bytes = [self.source, self.destination]
            .map(u16::to_be_bytes)
            .concat();
        bytes.extend(self.tag.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend([self.chunk, 0]);
        bytes.extend(length(4 + value.len()));
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        let sum = crc32c(&bytes).to_le_bytes();
        bytes[8..COMMON_HEADER].copy_from_slice(&sum);
        bytes
    }

    /// `None`: no packet with one chunk of these kinds, or a wrong checksum.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (header, chunk) = bytes.split_at_checked(COMMON_HEADER)?;
        let (ports, sum) = header.split_at(8);
        if crc32c(&[ports, &[0; 4], chunk].concat()).to_le_bytes() != sum {
            return None;
        }
        let word = |bytes: &[u8]| Some(u32::from_be_bytes(bytes.try_into().ok()?));
        let short = |bytes: &[u8]| Some(u16::from_be_bytes(bytes.try_into().ok()?));
        let value = chunk.get(4..short(chunk.get(2..4)?)?.into())?;
        let (fixed, parameter) = value.split_at_checked(FIXED_PART)?;
        let cookie = match parameter.get(..2).and_then(short) {
            Some(STATE_COOKIE) => {
                let text = parameter.get(4..short(parameter.get(2..4)?)?.into())?;
                Some(String::from_utf8_lossy(text).into_owned())
            }
            _ => None,
        };
        Some(Self {
            source: short(&ports[..2])?,
            destination: short(&ports[2..4])?,
            tag: word(&ports[4..])?,
            chunk: *chunk.first()?,
            own_tag: word(&fixed[..4])?,
            cookie,
        })
    }
}

fn length(bytes: usize) -> [u8; 2] {
    u16::try_from(bytes).unwrap_or(u16::MAX).to_be_bytes()
}

/// The checksum of SCTP (RFC 9260, appendix A); it goes into the packet with its lowest byte first.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut sum = u32::MAX;
    for byte in bytes {
        sum ^= u32::from(*byte);
        for _ in 0..8 {
            let carry = sum & 1;
            sum = (sum >> 1) ^ (carry * 0x82f6_3b78);
        }
    }
    !sum
}

/// Answers each INIT to `port` in one family with `identity`, a space and the client's address; on a thread.
///
/// # Errors
/// No raw socket.
pub fn serve_sources(v6: bool, port: u16, identity: String) -> io::Result<()> {
    let socket = RawSocket::open(v6, libc::IPPROTO_SCTP)?;
    thread::spawn(move || {
        loop {
            // Errors are about earlier answers (ICMP).
            let Ok((bytes, from)) = socket.receive() else {
                continue;
            };
            let packet = Packet::parse(&bytes);
            let wanted = |it: &Packet| (it.chunk, it.destination) == (INIT, port);
            if let Some(init) = packet.filter(wanted) {
                let answer = Packet {
                    source: init.destination,
                    destination: init.source,
                    tag: init.own_tag,
                    chunk: INIT_ACK,
                    own_tag: SERVER_TAG,
                    cookie: Some(format!("{identity} {from}")),
                };
                drop(socket.send(&answer.write(), from));
            }
        }
    });
    Ok(())
}

/// Sends one INIT from port `source` to `to`, and returns the cookie of the INIT ACK.
///
/// # Errors
/// What the kernel said, which is ETIMEDOUT if nothing came; an answer from another address.
pub fn ask(source: u16, to: SocketAddr, patience: Duration) -> io::Result<String> {
    let socket = RawSocket::open(to.is_ipv6(), libc::IPPROTO_SCTP)?;
    let init = Packet {
        source,
        destination: to.port(),
        tag: 0,
        chunk: INIT,
        own_tag: CLIENT_TAG,
        cookie: None,
    };
    match socket.send(&init.write(), to.ip()) {
        // A rule stopped it. If it was rejected, the socket hears that next.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {}
        other => other?,
    }
    let (answer, from) = socket.find(patience, |bytes, from: IpAddr| {
        let answer = Packet::parse(bytes)?;
        let is_it = (answer.chunk, answer.destination) == (INIT_ACK, source);
        is_it.then_some((answer, from))
    })?;
    let from = SocketAddr::from((from, answer.source));
    match answer.cookie {
        Some(cookie) if (from, answer.tag) == (to, CLIENT_TAG) => Ok(cookie),
        _ => Err(io::Error::other(format!("{answer:?} from {from}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_castagnolis() {
        // RFC 3720, B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn packets_read_back_as_they_were_written_and_damaged_ones_do_not() {
        let packet = Packet {
            source: 40_000,
            destination: 80,
            tag: 1,
            chunk: INIT_ACK,
            own_tag: 2,
            cookie: Some("near 10.0.0.1".to_owned()),
        };
        let mut bytes = packet.write();
        assert_eq!(Packet::parse(&bytes), Some(packet));
        bytes[0] ^= 1;
        assert_eq!(Packet::parse(&bytes), None);
    }
}
