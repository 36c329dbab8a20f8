//! Many questions at once: who answers at each of many addresses, over many tries.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
    sync::atomic::{AtomicU16, Ordering},
    thread,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::sockets::Sockets;
use crate::{sctp, server::any_port};

/// A rejection that comes while `connect()` still has the socket is heard at the second SYN, a second later.
const TCP_PATIENCE: Duration = Duration::from_millis(1_300);
/// Of what has no connection.
const PATIENCE: Duration = Duration::from_millis(400);
/// See [`Ports`].
const FIRST_PORT: u16 = 40_000;
const PORTS: u16 = 20_000;

/// Over which protocol something is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Transport {
    /// A connection.
    Tcp,
    /// A datagram of a connected socket.
    Udp,
    /// The first packet of an association.
    Sctp,
}

impl Transport {
    /// As Kubernetes writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }
}

/// One question of a survey.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Question {
    /// Where.
    pub to: SocketAddr,
    /// How.
    pub transport: Transport,
    /// Questions of one group are asked one after the other, as the answer to one may follow from that to another; what they
    /// are answered first does not count.
    pub group: Option<String>,
}

/// What was heard.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Heard {
    /// All that answered, in their words.
    pub texts: BTreeSet<String>,
    /// What ended it: the number of the error, and its text.
    pub error: Option<(Option<i32>, String)>,
}

/// Where associations come from: another port each time, or conntrack knows the flow already.
#[derive(Debug, Default)]
pub(super) struct Ports(AtomicU16);

impl Ports {
    pub(super) fn next(&self) -> u16 {
        FIRST_PORT + self.0.fetch_add(1, Ordering::Relaxed) % PORTS
    }
}

/// Asks each question once, all groups at the same time, so that those without an answer wait together; then those that were
/// answered up to `tries` times, one after the other.
pub(super) fn ask(questions: &[Question], tries: usize, ports: &Ports) -> Vec<Heard> {
    let mut groups: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (index, question) in questions.iter().enumerate() {
        // Raw sockets hear of each other's errors.
        let shared = match question.transport {
            Transport::Sctp => Some("SCTP".to_owned()),
            Transport::Tcp | Transport::Udp => question.group.clone(),
        };
        let group = shared.unwrap_or_else(|| index.to_string());
        groups.entry(group).or_default().push(index);
    }
    let mut heard = vec![Heard::default(); questions.len()];
    thread::scope(|scope| {
        let ask_group = |group: Vec<usize>| {
            let answers = group
                .into_iter()
                .map(|index| (index, once(&questions[index], ports)));
            answers.collect::<Vec<_>>()
        };
        let asking: Vec<_> = groups
            .into_values()
            .map(|group| scope.spawn(move || ask_group(group)))
            .collect();
        for (index, answer) in asking
            .into_iter()
            .flat_map(|it| it.join().unwrap_or_default())
        {
            heard[index].add(answer);
        }
    });
    for (question, heard) in questions.iter().zip(&mut heard) {
        if question.group.is_some() {
            // Who answers was only settled when all of the group had been asked.
            heard.texts.clear();
        }
        for _ in 1..tries {
            if heard.error.is_some() {
                break;
            }
            heard.add(once(question, ports));
        }
    }
    heard
}

impl Heard {
    fn add(&mut self, answer: io::Result<String>) {
        match answer {
            Ok(text) => {
                self.texts.insert(text.trim().to_owned());
            }
            Err(error) => self.error = Some((super::errno_of(&error), error.to_string())),
        }
    }
}

fn once(question: &Question, ports: &Ports) -> io::Result<String> {
    let to = question.to;
    let mut sockets = Sockets::default();
    match question.transport {
        Transport::Tcp => {
            let socket = sockets.open_tcp(to, None, TCP_PATIENCE)?;
            Ok(sockets.receive(socket, TCP_PATIENCE)?.0)
        }
        Transport::Udp => {
            let socket = sockets.open_udp(any_port(to))?;
            sockets.connect(socket, to)?;
            match sockets.send(socket, None, "?") {
                // A rule stopped it. If it was rejected, the socket hears that next.
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => {}
                other => other?,
            }
            Ok(sockets.receive(socket, PATIENCE)?.0)
        }
        Transport::Sctp => {
            let source = ports.next();
            match sctp::ask(source, to, PATIENCE) {
                // As any stack does, once: a packet may be lost.
                Err(error) if error.raw_os_error() == Some(libc::ETIMEDOUT) => {
                    sctp::ask(source, to, PATIENCE)
                }
                heard => heard,
            }
        }
    }
}
