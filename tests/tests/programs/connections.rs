//! TCP connections: what is remembered of them, for how long, and where.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket};
use proxy_ebpf::abi::{Connection, Reason, TCP};
use proxy_tests::programs::{Programs, with_programs};

use super::{BACKENDS, SERVICE, VIPS, at, disconnect, errno, mapped, serve, set_backends};

/// Runs `test` for each way of addressing the VIP at port 80, with a listener at port 8080 of its one backend.
fn each_way(
    test: impl Fn(&mut Programs, SocketAddr, SocketAddr) -> anyhow::Result<()> + Send + Sync,
) -> anyhow::Result<()> {
    for (family, map) in [(0, false), (0, true), (1, false)] {
        with_programs(|programs| {
            serve(programs, family, 1)?;
            let backend = at(BACKENDS[family][0], 8080);
            let _listener = programs.outside(|| Ok(TcpListener::bind(backend)?))?;
            let vip = at(VIPS[family], 80);
            match map {
                true => test(programs, mapped(vip), mapped(backend)),
                false => test(programs, vip, backend),
            }
        })?;
    }
    Ok(())
}

/// A socket that can connect to `to`.
fn unconnected(to: SocketAddr) -> anyhow::Result<TcpStream> {
    let family = match to {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    let fd: OwnedFd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    Ok(TcpStream::from(fd))
}

fn only<T: std::fmt::Debug>(all: Vec<T>) -> anyhow::Result<T> {
    match <[T; 1]>::try_from(all) {
        Ok([one]) => Ok(one),
        Err(all) => anyhow::bail!("{all:?}"),
    }
}

fn connect_to(client: &TcpStream, to: SocketAddr) -> nix::Result<()> {
    connect(client.as_raw_fd(), &SockaddrStorage::from(to))
}

#[test]
#[ignore = "needs CAP_BPF"]
fn a_connection_goes_to_a_backend_and_shows_the_vip() -> anyhow::Result<()> {
    each_way(|programs, vip, _| {
        let client = unconnected(vip)?;
        connect_to(&client, vip)?;
        assert_eq!(programs.counted()?, [(Reason::Connected, 1)]);
        assert_eq!(programs.stats(SERVICE).connections, 1);
        assert_eq!(client.peer_addr()?, vip);
        assert_eq!(programs.counted()?, [(Reason::PeerNameTranslated, 1)]);

        let entry = only(programs.connections()?)?;
        assert_eq!((entry.peer.service, entry.peer.member), (SERVICE, 1));
        assert_eq!(programs.list_sockets()?, [], "needs no storage");
        Ok(())
    })
}

#[test]
#[ignore = "needs CAP_BPF"]
fn a_connection_is_forgotten_when_the_last_handle_is_closed() -> anyhow::Result<()> {
    each_way(|programs, vip, _| {
        let client = TcpStream::connect(vip)?;
        let other = client.try_clone()?;
        let closed = programs.total(Reason::Closed)?;
        drop(client);
        assert_eq!(other.peer_addr()?, vip);
        assert_eq!(programs.total(Reason::Closed)?, closed);
        drop(other);
        assert_eq!(programs.connections()?, []);
        assert_eq!(programs.total(Reason::Closed)?, closed + 1);

        let untouched = programs.total(Reason::CloseUntouched)?;
        drop(unconnected(vip)?);
        assert_eq!(programs.total(Reason::CloseUntouched)?, untouched + 1);
        Ok(())
    })
}

#[test]
#[ignore = "needs CAP_BPF"]
fn a_connection_that_failed_is_forgotten_with_its_socket() -> anyhow::Result<()> {
    with_programs(|programs| {
        serve(programs, 0, 1)?;
        let error = TcpStream::connect(at(VIPS[0], 80)).unwrap_err();
        assert_eq!(errno(&error), Some(nix::errno::Errno::ECONNREFUSED));
        assert_eq!(programs.counted()?, [(Reason::Connected, 1)], "no listener");
        assert_eq!(programs.connections()?, []);
        // Refused by the program: there is nothing to remember.
        set_backends(programs, 0, 0..0);
        let client = unconnected(at(VIPS[0], 80))?;
        connect_to(&client, at(VIPS[0], 80)).unwrap_err();
        assert_eq!(programs.counted()?, [(Reason::NoEndpoints, 1)]);
        assert_eq!(programs.connections()?, []);
        Ok(())
    })
}

#[test]
#[ignore = "needs CAP_BPF"]
fn a_socket_that_connects_elsewhere_shows_where() -> anyhow::Result<()> {
    each_way(|programs, vip, backend| {
        let client = unconnected(vip)?;
        connect_to(&client, vip)?;
        assert_eq!(client.peer_addr()?, vip);
        disconnect(&client)?;
        // The address that the VIP led to, by its own name.
        connect_to(&client, backend)?;
        assert_eq!(client.peer_addr()?, backend);
        assert_eq!(
            programs.counted()?,
            [
                (Reason::Connected, 1),
                (Reason::PeerNameTranslated, 1),
                (Reason::NotAService, 1),
                (Reason::ReplyUntouched, 1)
            ]
        );
        assert_eq!(programs.connections()?, []);
        disconnect(&client)?;
        connect_to(&client, vip)?;
        assert_eq!(client.peer_addr()?, vip);
        assert_eq!(programs.connections()?.len(), 1);
        Ok(())
    })
}

#[test]
#[ignore = "needs CAP_BPF"]
fn a_socket_whose_entry_is_taken_keeps_its_connection_in_its_storage() -> anyhow::Result<()> {
    each_way(|programs, vip, backend| {
        let client = unconnected(vip)?;
        connect_to(&client, vip)?;
        let cookie = only(programs.connections()?)?.owner;
        disconnect(&client)?;
        let other = Connection {
            owner: cookie + 1,
            ..Connection::default()
        };
        programs.take_entry(cookie, &other)?;
        programs.counted()?;
        connect_to(&client, vip)?;
        let expected = [(Reason::Connected, 1), (Reason::EntryTaken, 1)];
        assert_eq!(programs.counted()?, expected);
        assert_eq!(client.peer_addr()?, vip);
        assert_eq!(programs.counted()?, [(Reason::PeerNameTranslated, 1)]);
        let record = only(programs.list_sockets()?)?;
        assert_eq!(record.cookie, cookie);
        assert_eq!(record.socket.peers[0].vip_port.host(), 80);
        assert_eq!(record.socket.peers[0].protocol, u32::from(TCP));

        disconnect(&client)?;
        connect_to(&client, backend)?;
        assert_eq!(client.peer_addr()?, backend);
        assert_eq!(programs.list_sockets()?, []);
        drop(client);
        assert_eq!(programs.connections()?, [other], "not its own to free");
        Ok(())
    })
}
