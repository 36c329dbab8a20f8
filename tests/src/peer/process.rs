//! The side of the helper process.

use std::{
    io::{self, BufRead, Write},
    net::{Ipv6Addr, SocketAddr},
    time::Duration,
};

use super::{
    errno_of,
    protocol::{Request, Response},
    sockets::Sockets,
    survey::{self, Ports},
};
use crate::{load::Loads, sctp, server};

/// The helper's process: answers requests until its input ends.
///
/// # Errors
/// Its pipes broke.
pub fn run() -> anyhow::Result<()> {
    let mut state = State::default();
    let mut output = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let request = serde_json::from_str(&line?)?;
        let response = state
            .answer(request)
            .unwrap_or_else(|error| Response::Failed {
                errno: errno_of(&error),
                text: error.to_string(),
            });
        serde_json::to_writer(&mut output, &response)?;
        output.write_all(b"\n")?;
        output.flush()?;
    }
    Ok(())
}

#[derive(Default)]
struct State {
    sockets: Sockets,
    loads: Loads,
    ports: Ports,
}

impl State {
    fn answer(&mut self, request: Request) -> io::Result<Response> {
        let sockets = &mut self.sockets;
        match request {
            Request::ServeTcp { address, identity } => server::tcp(address, &identity)?,
            Request::ServeSources { port, identity } => {
                let everywhere = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
                server::tcp_sources(everywhere, identity.clone())?;
                server::udp_sources(everywhere, identity.clone())?;
                for v6 in [false, true] {
                    sctp::serve_sources(v6, port, identity.clone())?;
                }
            }
            Request::ServeUdp { address, identity } => server::udp(address, identity)?,
            Request::AskSctp { to, patience_ms } => {
                let patience = Duration::from_millis(patience_ms);
                let text = sctp::ask(self.ports.next(), to, patience)?;
                return Ok(Response::Received { from: None, text });
            }
            Request::TcpOpen {
                to,
                bind,
                patience_ms,
            } => {
                let patience = Duration::from_millis(patience_ms);
                return Ok(Response::Opened {
                    number: sockets.open_tcp(to, bind, patience)?,
                });
            }
            Request::UdpOpen { bind } => {
                return Ok(Response::Opened {
                    number: sockets.open_udp(bind)?,
                });
            }
            Request::Connect { socket, to } => sockets.connect(socket, to)?,
            Request::Send { socket, to, text } => sockets.send(socket, to, &text)?,
            Request::Receive {
                socket,
                patience_ms,
            } => {
                let patience = Duration::from_millis(patience_ms);
                let (text, from) = sockets.receive(socket, patience)?;
                return Ok(Response::Received { from, text });
            }
            Request::PeerAddress { socket } => {
                return Ok(Response::Address {
                    address: sockets.peer_address(socket)?,
                });
            }
            Request::Close { socket } => sockets.close(socket),
            Request::Survey { questions, tries } => {
                return Ok(Response::Surveyed {
                    heard: survey::ask(&questions, tries, &self.ports),
                });
            }
            Request::StartLoad { plan } => {
                return Ok(Response::Opened {
                    number: self.loads.start(plan),
                });
            }
            Request::StopLoad { load } => {
                return Ok(Response::Load {
                    report: self.loads.stop(load)?,
                });
            }
        }
        Ok(Response::Done)
    }
}
