//! What can be done with a pod.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{Pod, links};
use crate::{peer::Peer, place::Place};

impl Pod {
    /// Its name, which is also what its servers answer.
    pub fn name(&self) -> &str {
        &self.place().name
    }

    /// Where its processes run.
    pub fn place(&self) -> &Place {
        &self.0.host.place
    }

    /// Its helper process.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn peer(&self) -> anyhow::Result<Peer> {
        self.0.host.peer()
    }

    /// Its address.
    pub fn v4(&self) -> Ipv4Addr {
        self.0.v4
    }

    /// Its address.
    pub fn v6(&self) -> Ipv6Addr {
        self.0.v6
    }

    /// Its address in one of both families.
    pub fn address(&self, v6: bool) -> IpAddr {
        if v6 {
            self.v6().into()
        } else {
            self.v4().into()
        }
    }

    /// Starts a server on both families that answers the pod's name to each connection.
    ///
    /// # Errors
    /// The port is taken.
    pub fn serve_tcp(&self, port: u16) -> anyhow::Result<()> {
        self.peer()?
            .serve_tcp((Ipv6Addr::UNSPECIFIED, port).into(), self.name())
    }

    /// Starts a server on both families that answers each datagram with the pod's name, a space and the datagram.
    ///
    /// # Errors
    /// The port is taken.
    pub fn serve_udp(&self, port: u16) -> anyhow::Result<()> {
        self.peer()?
            .serve_udp((Ipv6Addr::UNSPECIFIED, port).into(), self.name())
    }

    /// Connects, and reads who answers.
    ///
    /// # Errors
    /// What the kernel said to the client.
    pub fn ask_tcp(&self, to: SocketAddr) -> std::io::Result<String> {
        self.peer().map_err(std::io::Error::other)?.ask_tcp(to)
    }

    /// Sends one datagram from a new unconnected socket, and reads who answers.
    ///
    /// # Errors
    /// What the kernel said to the client.
    pub fn ask_udp(&self, to: SocketAddr) -> std::io::Result<String> {
        self.peer().map_err(std::io::Error::other)?.ask_udp(to)
    }

    /// Runs `ip -batch` in its namespace.
    ///
    /// # Errors
    /// One of the lines failed.
    pub fn ip(&self, lines: &str) -> anyhow::Result<()> {
        links::batch("ip", &links::namespace_name(self.place()), lines)
    }
}
