//! The client sockets of a helper process, by number.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket,
            sockopt,
        },
        time::{TimeVal, TimeValLike},
    },
};

#[derive(Debug)]
enum Open {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

/// Open sockets.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    open: BTreeMap<u32, Open>,
    next: u32,
}

impl Sockets {
    fn add(&mut self, socket: Open) -> u32 {
        self.next += 1;
        self.open.insert(self.next, socket);
        self.next
    }

    fn find(&mut self, number: u32) -> io::Result<&mut Open> {
        self.open
            .get_mut(&number)
            .ok_or_else(|| io::Error::other("no such socket"))
    }

    pub(super) fn open_tcp(
        &mut self,
        to: SocketAddr,
        from: Option<SocketAddr>,
        patience: Duration,
    ) -> io::Result<u32> {
        let stream = match from {
            None => TcpStream::connect_timeout(&to, patience)?,
            Some(from) => connect_from(from, to, patience)?,
        };
        Ok(self.add(Open::Tcp(stream)))
    }

    pub(super) fn open_udp(&mut self, from: SocketAddr) -> io::Result<u32> {
        let socket = UdpSocket::bind(from)?;
        Ok(self.add(Open::Udp(socket)))
    }

    pub(super) fn connect(&mut self, number: u32, to: SocketAddr) -> io::Result<()> {
        match self.find(number)? {
            Open::Udp(socket) => socket.connect(to),
            Open::Tcp(_) => Err(io::Error::from(Errno::EISCONN)),
        }
    }

    pub(super) fn send(
        &mut self,
        number: u32,
        to: Option<SocketAddr>,
        text: &str,
    ) -> io::Result<()> {
        match (self.find(number)?, to) {
            (Open::Udp(socket), Some(to)) => socket.send_to(text.as_bytes(), to).map(drop),
            (Open::Udp(socket), None) => socket.send(text.as_bytes()).map(drop),
            (Open::Tcp(stream), _) => stream.write_all(text.as_bytes()),
        }
    }

    pub(super) fn receive(
        &mut self,
        number: u32,
        patience: Duration,
    ) -> io::Result<(String, Option<SocketAddr>)> {
        let mut buffer = [0; 2048];
        let patience = Some(patience.max(Duration::from_millis(1)));
        let (length, from) = match self.find(number)? {
            Open::Udp(socket) => {
                socket.set_read_timeout(patience)?;
                let (length, from) = socket.recv_from(&mut buffer)?;
                (length, Some(from))
            }
            Open::Tcp(stream) => {
                stream.set_read_timeout(patience)?;
                (stream.read(&mut buffer)?, None)
            }
        };
        let bytes = buffer.get(..length).unwrap_or_default();
        Ok((String::from_utf8_lossy(bytes).into_owned(), from))
    }

    pub(super) fn peer_address(&mut self, number: u32) -> io::Result<SocketAddr> {
        match self.find(number)? {
            Open::Udp(socket) => socket.peer_addr(),
            Open::Tcp(stream) => stream.peer_addr(),
        }
    }

    pub(super) fn close(&mut self, number: u32) {
        self.open.remove(&number);
    }
}

/// The standard library cannot bind before it connects.
fn connect_from(from: SocketAddr, to: SocketAddr, patience: Duration) -> io::Result<TcpStream> {
    let family = if to.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let fd: OwnedFd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let millis = i64::try_from(patience.as_millis()).unwrap_or(i64::MAX);
    // Bounds connect() too (socket(7), SO_SNDTIMEO).
    setsockopt(&fd, sockopt::SendTimeout, &TimeVal::milliseconds(millis))?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(from))?;
    match connect(fd.as_raw_fd(), &SockaddrStorage::from(to)) {
        Ok(()) => Ok(TcpStream::from(fd)),
        Err(Errno::EINPROGRESS) => Err(io::Error::from(io::ErrorKind::TimedOut)),
        Err(error) => Err(error.into()),
    }
}
