//! Where servers listen.

use std::{
    io,
    net::{Ipv6Addr, SocketAddr},
    os::fd::AsRawFd,
    time::Duration,
};

use axum::Router;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket,
    sockopt,
};
use tokio::{net::TcpListener, sync::watch};

/// How often a taken port is tried again: kube-proxy's interval (cmd/kube-proxy/app/server.go, v1.36).
pub const BIND_RETRY: Duration = Duration::from_secs(5);

/// Where a server listens, and what becomes of a port that cannot be had.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// What is served, for the log.
    pub name: &'static str,
    /// Nowhere without one.
    pub address: Option<SocketAddr>,
    /// Not to be tried again.
    pub is_final: bool,
}

/// A server that has no port, and shall not wait for it.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot serve {name} at {address}: {cause}; is another proxy or agent on this port? bindAddressHardFail is set"
)]
pub struct Unbound {
    /// What is served.
    pub name: &'static str,
    address: SocketAddr,
    cause: io::Error,
}

/// Serves `router` for ever. By default a port that cannot be had is no reason to stop serving the node: it is tried again.
/// While `give_way` is true the port is left to others.
pub async fn serve(place: Place, router: Router, give_way: watch::Receiver<bool>) -> Unbound {
    let Place {
        name,
        address: Some(address),
        is_final,
    } = place
    else {
        return std::future::pending().await;
    };
    let mut told = false;
    loop {
        until(give_way.clone(), false).await;
        let error = match listen_at(address) {
            Ok(listener) => {
                tracing::info!(server = name, %address, "serving");
                let server = axum::serve(listener, router.clone());
                let gives_way = until(give_way.clone(), true);
                match server.with_graceful_shutdown(gives_way).await {
                    Ok(()) => {
                        tracing::info!(server = name, %address, "the port is left to another proxy");
                        continue;
                    }
                    Err(error) => error,
                }
            }
            Err(error) => error,
        };
        if is_final {
            return Unbound {
                name,
                address,
                cause: error,
            };
        }
        if !told {
            told = true;
            tracing::error!(server = name, %address, %error, retry = ?BIND_RETRY, "cannot serve: is another proxy or agent on this port?");
        }
        tokio::time::sleep(BIND_RETRY).await;
    }
}

/// Listens; at an unspecified address in both families, as servers written in Go do.
fn listen_at(address: SocketAddr) -> io::Result<TcpListener> {
    if address.ip().is_unspecified() {
        let everywhere = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), address.port());
        if let Some(listener) = listener(everywhere, Families::Both)? {
            return Ok(listener);
        }
    }
    let lacking = || io::Error::other("this host lacks the address family");
    listener(address, Families::One)?.ok_or_else(lacking)
}

/// Whether a listener at an IPv6 address also takes IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Families {
    One,
    Both,
}

/// None where this host lacks the family.
pub(super) fn listener(address: SocketAddr, families: Families) -> io::Result<Option<TcpListener>> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = match socket(family, SockType::Stream, flags, None) {
        Err(nix::Error::EAFNOSUPPORT) => return Ok(None),
        made => made?,
    };
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    if address.is_ipv6() {
        setsockopt(&fd, sockopt::Ipv6V6Only, &(families == Families::One))?;
    }
    bind(fd.as_raw_fd(), &SockaddrStorage::from(address))?;
    listen(&fd, Backlog::MAXCONN)?;
    Ok(Some(TcpListener::from_std(fd.into())?))
}

/// Returns when `value` is `wanted`; never, if nobody is left who would change it.
async fn until(mut value: watch::Receiver<bool>, wanted: bool) {
    if value.wait_for(|value| *value == wanted).await.is_err() {
        std::future::pending().await
    }
}
