//! Raw sockets: packets written by hand, but for their IP headers.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

/// Sends and receives what follows the IP header, for one protocol in one family. It sees all that reaches its network
/// namespace, beside the kernel's own sockets, and hears of ICMP errors.
#[derive(Debug)]
pub struct RawSocket(UdpSocket);

impl RawSocket {
    /// One in the calling thread's network namespace.
    ///
    /// # Errors
    /// No root.
    pub fn open(v6: bool, protocol: i32) -> io::Result<Self> {
        let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
        let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(protocol)))?;
        match v6 {
            true => setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?,
            false => setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?,
        }
        // Its calls are those of any socket for datagrams.
        Ok(Self(socket.into()))
    }

    /// Sends one packet.
    ///
    /// # Errors
    /// What the kernel said, also about an earlier packet.
    pub fn send(&self, bytes: &[u8], to: IpAddr) -> io::Result<()> {
        // The port of a raw socket's address is the protocol, or nothing.
        self.0.send_to(bytes, (to, 0)).map(drop)
    }

    /// Receives one packet: what it holds, and from where it comes.
    ///
    /// # Errors
    /// What the kernel said of an earlier packet.
    pub fn receive(&self) -> io::Result<(Vec<u8>, IpAddr)> {
        let mut buffer = [0; 2048];
        let (length, from) = self.0.recv_from(&mut buffer)?;
        // Of the headers only that of IPv4 is received; its first byte counts its words.
        let header = match from {
            SocketAddr::V4(_) => usize::from(buffer[0] & 0xf) * 4,
            SocketAddr::V6(_) => 0,
        };
        let bytes = buffer.get(header..length).unwrap_or_default();
        Ok((bytes.to_vec(), from.ip()))
    }

    /// As [`RawSocket::receive`], until the packet that `wanted` finds something in.
    ///
    /// # Errors
    /// What the kernel said, which is ETIMEDOUT if there was none within `patience`.
    pub fn find<T>(
        &self,
        patience: Duration,
        wanted: impl Fn(&[u8], IpAddr) -> Option<T>,
    ) -> io::Result<T> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::from_raw_os_error(libc::ETIMEDOUT));
            }
            self.0.set_read_timeout(Some(left))?;
            match self.receive() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => {
                    let (bytes, from) = other?;
                    if let Some(found) = wanted(&bytes, from) {
                        return Ok(found);
                    }
                }
            }
        }
    }
}
