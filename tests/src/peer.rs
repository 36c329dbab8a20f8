//! The helper process in a place: one request per line of JSON on its standard input, one answer per line on its output.
//!
//! A client has to be a process of its own, because the hooks look at the cgroup of whoever calls `connect`.

mod process;
mod protocol;
mod sockets;
mod survey;

pub use process::run;
pub use survey::{Heard, Question, Transport};

use std::{
    io::{self, BufRead, BufReader, Write},
    net::SocketAddr,
    process::{Child, ChildStdin, ChildStdout, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use crate::{
    load::{LoadPlan, LoadReport},
    place::{Place, os_error},
    server,
};
use anyhow::Context;
use protocol::{Request, Response};

/// How long a client waits for a connection or an answer, unless it says otherwise.
pub const PATIENCE: Duration = Duration::from_secs(3);

/// A helper process: a handle, cheap to clone. It ends with the last handle.
#[derive(Clone, Debug)]
pub struct Peer(Arc<Mutex<Pipes>>);

#[derive(Debug)]
struct Pipes {
    child: Child,
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Drop for Pipes {
    fn drop(&mut self) {
        drop(self.requests.take());
        // It ends by itself when its input does; whatever it says then is of no interest.
        drop(self.child.wait());
    }
}

/// A socket in a helper process; closed when dropped.
#[derive(Debug)]
pub struct Socket {
    peer: Peer,
    number: u32,
}

/// A load generator in a helper process.
#[derive(Debug)]
pub struct Load {
    peer: Peer,
    number: u32,
}

impl Peer {
    /// Starts one in `place`.
    ///
    /// # Errors
    /// The place does not exist.
    pub fn start(place: &Place) -> anyhow::Result<Self> {
        let mut child = place
            .command(crate::place::peer_binary()?)?
            .arg("serve")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start a helper in {}", place.name))?;
        let requests = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().context("no pipe")?);
        Ok(Self(Arc::new(Mutex::new(Pipes {
            child,
            requests,
            answers,
        }))))
    }

    fn call(&self, request: &Request) -> io::Result<Response> {
        let mut pipes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut line = serde_json::to_string(request)?;
        line.push('\n');
        let gone = || io::Error::other("the helper process is gone");
        pipes
            .requests
            .as_mut()
            .ok_or_else(gone)?
            .write_all(line.as_bytes())?;
        line.clear();
        if pipes.answers.read_line(&mut line)? == 0 {
            return Err(gone());
        }
        match serde_json::from_str(&line)? {
            Response::Failed { errno, text } => Err(os_error(errno, text)),
            response => Ok(response),
        }
    }

    /// Answers `identity` to each connection on `address`; the unspecified IPv6 address serves both families.
    ///
    /// # Errors
    /// The port is taken.
    pub fn serve_tcp(&self, address: SocketAddr, identity: &str) -> anyhow::Result<()> {
        let identity = identity.to_owned();
        self.call(&Request::ServeTcp { address, identity })
            .with_context(|| format!("cannot serve {address}"))?;
        Ok(())
    }

    /// Answers `identity`, a space and the client's address at `port` over TCP, UDP and SCTP, in both families.
    ///
    /// # Errors
    /// The port is taken.
    pub fn serve_sources(&self, port: u16, identity: &str) -> anyhow::Result<()> {
        let identity = identity.to_owned();
        self.call(&Request::ServeSources { port, identity })
            .with_context(|| format!("cannot serve port {port}"))?;
        Ok(())
    }

    /// Answers each datagram on `address` with `identity`, a space and the datagram.
    ///
    /// # Errors
    /// The port is taken.
    pub fn serve_udp(&self, address: SocketAddr, identity: &str) -> anyhow::Result<()> {
        let identity = identity.to_owned();
        self.call(&Request::ServeUdp { address, identity })
            .with_context(|| format!("cannot serve {address}"))?;
        Ok(())
    }

    /// Connects and keeps the connection.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn connect_tcp(&self, to: SocketAddr) -> io::Result<Socket> {
        self.connect_tcp_from(to, None, PATIENCE)
    }

    /// As [`Peer::connect_tcp`], from a bound socket if `bind` is given.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn connect_tcp_from(
        &self,
        to: SocketAddr,
        bind: Option<SocketAddr>,
        patience: Duration,
    ) -> io::Result<Socket> {
        let patience_ms = millis(patience);
        self.opened(&Request::TcpOpen {
            to,
            bind,
            patience_ms,
        })
    }

    /// Connects, and reads who answers.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn ask_tcp(&self, to: SocketAddr) -> io::Result<String> {
        let socket = self.connect_tcp(to)?;
        Ok(socket.receive(PATIENCE)?.0.trim_end().to_owned())
    }

    /// A UDP socket bound to `bind`; an IPv6 one can talk to v4-mapped addresses.
    ///
    /// # Errors
    /// The port is taken.
    pub fn open_udp(&self, bind: SocketAddr) -> io::Result<Socket> {
        self.opened(&Request::UdpOpen { bind })
    }

    /// A UDP socket of the family of `to`, on any port.
    ///
    /// # Errors
    /// Out of sockets.
    pub fn open_udp_for(&self, to: SocketAddr) -> io::Result<Socket> {
        self.open_udp(server::any_port(to))
    }

    /// Sends one datagram from a new unconnected socket, and reads who answers.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn ask_udp(&self, to: SocketAddr) -> io::Result<String> {
        let socket = self.open_udp_for(to)?;
        Ok(socket.ask_to(to)?.0)
    }

    /// Sends one SCTP INIT, and reads what the answer says.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn ask_sctp(&self, to: SocketAddr, patience: Duration) -> io::Result<String> {
        let patience_ms = millis(patience);
        match self.call(&Request::AskSctp { to, patience_ms })? {
            Response::Received { text, .. } => Ok(text),
            other => Err(io::Error::other(format!("unexpected answer {other:?}"))),
        }
    }

    /// Asks each question up to `tries` times; those that nobody answers wait together. One answer for each, in order.
    ///
    /// # Errors
    /// The helper is gone.
    pub fn survey(&self, questions: Vec<Question>, tries: usize) -> io::Result<Vec<Heard>> {
        match self.call(&Request::Survey { questions, tries })? {
            Response::Surveyed { heard } => Ok(heard),
            other => Err(io::Error::other(format!("unexpected answer {other:?}"))),
        }
    }

    /// Starts a load generator.
    ///
    /// # Errors
    /// The helper is gone.
    pub fn start_load(&self, plan: LoadPlan) -> anyhow::Result<Load> {
        match self.call(&Request::StartLoad { plan })? {
            Response::Opened { number } => Ok(Load {
                peer: self.clone(),
                number,
            }),
            other => anyhow::bail!("unexpected answer {other:?}"),
        }
    }

    fn opened(&self, request: &Request) -> io::Result<Socket> {
        match self.call(request)? {
            Response::Opened { number } => Ok(Socket {
                peer: self.clone(),
                number,
            }),
            other => Err(io::Error::other(format!("unexpected answer {other:?}"))),
        }
    }
}

impl Socket {
    /// Connects a UDP socket.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn connect(&self, to: SocketAddr) -> io::Result<()> {
        self.peer
            .call(&Request::Connect {
                socket: self.number,
                to,
            })
            .map(drop)
    }

    /// Sends to whom it is connected to.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn send(&self, text: &str) -> io::Result<()> {
        let text = text.to_owned();
        self.peer
            .call(&Request::Send {
                socket: self.number,
                to: None,
                text,
            })
            .map(drop)
    }

    /// Sends to `to`.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn send_to(&self, text: &str, to: SocketAddr) -> io::Result<()> {
        let text = text.to_owned();
        self.peer
            .call(&Request::Send {
                socket: self.number,
                to: Some(to),
                text,
            })
            .map(drop)
    }

    /// Receives: the text, and for UDP the sender that the kernel names.
    ///
    /// # Errors
    /// What the kernel said, or nothing came within `patience`.
    pub fn receive(&self, patience: Duration) -> io::Result<(String, Option<SocketAddr>)> {
        let patience_ms = millis(patience);
        match self.peer.call(&Request::Receive {
            socket: self.number,
            patience_ms,
        })? {
            Response::Received { from, text } => Ok((text, from)),
            other => Err(io::Error::other(format!("unexpected answer {other:?}"))),
        }
    }

    /// Sends to `to` and receives: who answered, and the sender that the kernel names.
    ///
    /// # Errors
    /// As both.
    pub fn ask_to(&self, to: SocketAddr) -> io::Result<(String, SocketAddr)> {
        self.send_to("?", to)?;
        self.identity()
    }

    /// Sends to whom it is connected to, and receives.
    ///
    /// # Errors
    /// As both.
    pub fn ask(&self) -> io::Result<String> {
        self.send("?\n")?;
        let (text, _) = self.receive(PATIENCE)?;
        Ok(text
            .split([' ', '\n'])
            .next()
            .unwrap_or_default()
            .to_owned())
    }

    fn identity(&self) -> io::Result<(String, SocketAddr)> {
        let (text, from) = self.receive(PATIENCE)?;
        let identity = text.split(' ').next().unwrap_or_default().to_owned();
        Ok((identity, from.ok_or_else(|| io::Error::other("no sender"))?))
    }

    /// What `getpeername` says.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn peer_address(&self) -> io::Result<SocketAddr> {
        match self.peer.call(&Request::PeerAddress {
            socket: self.number,
        })? {
            Response::Address { address } => Ok(address),
            other => Err(io::Error::other(format!("unexpected answer {other:?}"))),
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Fails only when the process, and so the socket, is gone.
        drop(self.peer.call(&Request::Close {
            socket: self.number,
        }));
    }
}

impl Load {
    /// Stops it: what it saw.
    ///
    /// # Errors
    /// The helper is gone.
    pub fn stop(self) -> anyhow::Result<LoadReport> {
        match self.peer.call(&Request::StopLoad { load: self.number })? {
            Response::Load { report } => Ok(report),
            other => anyhow::bail!("unexpected answer {other:?}"),
        }
    }
}

/// The standard library's own timeouts carry no number.
fn errno_of(error: &io::Error) -> Option<i32> {
    let timeout = (error.kind() == io::ErrorKind::TimedOut).then_some(libc::ETIMEDOUT);
    error.raw_os_error().or(timeout)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
