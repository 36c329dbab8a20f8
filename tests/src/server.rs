//! Servers that answer who they are.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

/// How long the accepting thread itself waits for a client to go before it hands the connection to a thread.
const QUICK: Duration = Duration::from_millis(20);

/// Any port of the family of `to`.
pub fn any_port(to: SocketAddr) -> SocketAddr {
    if to.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (Ipv6Addr::UNSPECIFIED, 0).into()
    }
}

/// Writes `identity` and a newline to each connection, and again for each piece of data that comes; on a thread.
///
/// # Errors
/// The port is taken.
pub fn tcp(address: SocketAddr, identity: &str) -> io::Result<()> {
    let line = format!("{identity}\n");
    accept(address, move |stream| welcome(stream, &line))
}

/// Writes `identity`, a space and the client's address to each connection, and again as [`tcp`] does; on a thread.
///
/// # Errors
/// The port is taken.
pub fn tcp_sources(address: SocketAddr, identity: String) -> io::Result<()> {
    accept(address, move |stream| {
        if let Ok(from) = stream.peer_addr() {
            let from = from.ip().to_canonical();
            welcome(stream, &format!("{identity} {from}\n"));
        }
    })
}

fn accept(address: SocketAddr, serve: impl Fn(TcpStream) + Send + 'static) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    thread::spawn(move || listener.incoming().flatten().for_each(serve));
    Ok(())
}

/// Most clients read the line and are gone: a thread only for those that stay.
fn welcome(mut stream: TcpStream, line: &str) {
    let mut buffer = [0; 512];
    if stream.write_all(line.as_bytes()).is_err() || stream.set_read_timeout(Some(QUICK)).is_err() {
        return;
    }
    match stream.read(&mut buffer) {
        Ok(0) => {}
        Ok(_) => stay(stream, line, true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => stay(stream, line, false),
        Err(_) => {}
    }
}

fn stay(mut stream: TcpStream, line: &str, asked: bool) {
    let line = line.to_owned();
    thread::spawn(move || -> io::Result<()> {
        stream.set_read_timeout(None)?;
        let mut buffer = [0; 512];
        if asked {
            stream.write_all(line.as_bytes())?;
        }
        while stream.read(&mut buffer)? > 0 {
            stream.write_all(line.as_bytes())?;
        }
        Ok(())
    });
}

/// Answers each datagram with `identity`, a space and the datagram; on a thread.
///
/// # Errors
/// The port is taken.
pub fn udp(address: SocketAddr, identity: String) -> io::Result<()> {
    answer_datagrams(address, move |datagram, _, answer| {
        answer.extend_from_slice(identity.as_bytes());
        answer.push(b' ');
        answer.extend_from_slice(datagram);
    })
}

/// Answers each datagram with `identity`, a space and the client's address; on a thread.
///
/// # Errors
/// The port is taken.
pub fn udp_sources(address: SocketAddr, identity: String) -> io::Result<()> {
    answer_datagrams(address, move |_, from, answer| {
        let from = from.ip().to_canonical();
        answer.extend_from_slice(format!("{identity} {from}").as_bytes());
    })
}

fn answer_datagrams(
    address: SocketAddr,
    write: impl Fn(&[u8], SocketAddr, &mut Vec<u8>) + Send + 'static,
) -> io::Result<()> {
    let socket = UdpSocket::bind(address)?;
    thread::spawn(move || {
        let mut buffer = [0; 2048];
        let mut answer = Vec::new();
        loop {
            // Errors are about earlier answers (ICMP): the next datagram may be fine.
            let Ok((length, from)) = socket.recv_from(&mut buffer) else {
                continue;
            };
            answer.clear();
            write(buffer.get(..length).unwrap_or_default(), from, &mut answer);
            drop(socket.send_to(&answer, from));
        }
    });
    Ok(())
}
