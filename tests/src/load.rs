//! Load generators: connections, or datagrams, one after the other on several threads, each answer and failure kept.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs,
    io::{self, Read},
    net::{SocketAddr, TcpStream, UdpSocket},
    ops::Range,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::{
    sys::socket::{setsockopt, sockopt},
    time::{ClockId, clock_gettime},
};
use serde::{Deserialize, Serialize};

use crate::server::any_port;

/// Failures that a report spells out, unless the plan says otherwise; the others are counted.
const SPELLED_OUT: usize = 20;
/// Where [`Talk::FreshUdp`] comes from, one after the other.
const FRESH_PORTS: Range<u16> = 32_768..61_000;
const PATIENCE: Duration = Duration::from_secs(2);

/// How the load talks to its targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Talk {
    /// A new connection each time.
    Tcp,
    /// One unconnected socket per thread.
    Udp,
    /// One connected socket per thread and target, replaced when it fails.
    ConnectedUdp,
    /// A new socket each time, from another port than those before: connection tracking still knows their flows.
    FreshUdp,
}

/// What a load generator does.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LoadPlan {
    /// Taken in turn.
    pub targets: Vec<SocketAddr>,
    /// How.
    pub talk: Talk,
    /// Generators side by side.
    pub threads: usize,
    /// Pause after each exchange.
    pub pause: Duration,
    /// Where to write a [`Record`] per success.
    pub record: Option<PathBuf>,
    /// How many failures to spell out.
    pub spelled_out: usize,
}

impl LoadPlan {
    /// As fast as it goes, on one thread.
    pub fn new(talk: Talk, targets: Vec<SocketAddr>) -> Self {
        Self {
            targets,
            talk,
            threads: 1,
            pause: Duration::ZERO,
            record: None,
            spelled_out: SPELLED_OUT,
        }
    }
}

/// One exchange that succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Before it began, [`now_ns`].
    pub start_ns: u64,
    /// After the answer, [`now_ns`].
    pub end_ns: u64,
    /// Index of the target in the plan.
    pub target: u64,
    /// The first eight bytes of the answer.
    pub identity: [u8; 8],
}

impl Record {
    /// The identity of a server as a record holds it.
    pub fn identity_of(text: &str) -> [u8; 8] {
        let mut identity = [0; 8];
        for (to, from) in identity.iter_mut().zip(text.bytes()) {
            *to = from;
        }
        identity
    }

    fn write(&self, out: &mut Vec<u8>) {
        for word in [self.start_ns, self.end_ns, self.target] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&self.identity);
    }

    /// Reads the file of a plan.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn read_all(path: &std::path::Path) -> io::Result<Vec<Self>> {
        let bytes = fs::read(path)?;
        let (records, _) = bytes.as_chunks::<32>();
        Ok(records.iter().map(Self::parse).collect())
    }

    fn parse(bytes: &[u8; 32]) -> Self {
        let (words, _) = bytes.as_chunks::<8>();
        let word = |index: usize| words.get(index).copied().unwrap_or_default();
        Self {
            start_ns: u64::from_le_bytes(word(0)),
            end_ns: u64::from_le_bytes(word(1)),
            target: u64::from_le_bytes(word(2)),
            identity: word(3),
        }
    }
}

/// An exchange that failed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failure {
    /// When it began, [`now_ns`].
    pub start_ns: u64,
    /// When it failed, [`now_ns`].
    pub end_ns: u64,
    /// To whom.
    pub target: SocketAddr,
    /// What the kernel said.
    pub error: String,
}

/// What a load generator saw.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LoadReport {
    /// Answers by who gave them.
    pub answers: BTreeMap<String, u64>,
    /// Exchanges without an answer.
    pub failed: u64,
    /// The first of those.
    pub failures: Vec<Failure>,
}

impl LoadReport {
    /// Exchanges with an answer.
    pub fn answered(&self) -> u64 {
        self.answers.values().sum()
    }

    fn add(&mut self, other: Self, spelled_out: usize) {
        for (identity, count) in other.answers {
            *self.answers.entry(identity).or_default() += count;
        }
        self.failed += other.failed;
        let room = spelled_out.saturating_sub(self.failures.len());
        self.failures.extend(other.failures.into_iter().take(room));
    }
}

/// CLOCK_MONOTONIC, which all processes of the machine share.
pub fn now_ns() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from);
    time.map_or(0, |time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}

/// The load generators of a helper process.
#[derive(Debug, Default)]
pub struct Loads {
    running: BTreeMap<u32, Running>,
    next: u32,
}

#[derive(Debug)]
struct Running {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<(LoadReport, Vec<u8>)>>,
    record: Option<PathBuf>,
    spelled_out: usize,
}

impl Loads {
    /// Starts one and returns its number.
    pub fn start(&mut self, plan: LoadPlan) -> u32 {
        let stop = Arc::new(AtomicBool::new(false));
        let start_thread = |number: usize| {
            let (stop, plan) = (stop.clone(), plan.clone());
            thread::spawn(move || generate(&plan, number, &stop))
        };
        let threads = (0..plan.threads).map(start_thread).collect();
        self.next += 1;
        self.running.insert(
            self.next,
            Running {
                stop,
                threads,
                record: plan.record,
                spelled_out: plan.spelled_out,
            },
        );
        self.next
    }

    /// Stops one: what it saw.
    ///
    /// # Errors
    /// No such load, or its records cannot be written.
    pub fn stop(&mut self, number: u32) -> io::Result<LoadReport> {
        let running = self.running.remove(&number);
        let Running {
            stop,
            threads,
            record,
            spelled_out,
        } = running.ok_or_else(|| io::Error::other("no such load"))?;
        stop.store(true, Ordering::Relaxed);
        let mut report = LoadReport::default();
        let mut records = Vec::new();
        for thread in threads {
            let (part, bytes) = thread
                .join()
                .map_err(|_| io::Error::other("a load generator panicked"))?;
            report.add(part, spelled_out);
            records.extend(bytes);
        }
        if let Some(path) = record {
            fs::write(path, records)?;
        }
        Ok(report)
    }
}

fn generate(plan: &LoadPlan, number: usize, stop: &AtomicBool) -> (LoadReport, Vec<u8>) {
    let mut report = LoadReport::default();
    let mut records = Vec::new();
    let mut sockets = BTreeMap::new();
    let mut ports = FRESH_PORTS.cycle();
    // Threads begin at different targets.
    let skip = number * plan.targets.len() / plan.threads.max(1);
    let targets = plan.targets.iter().enumerate().cycle().skip(skip);
    for (index, &target) in targets {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let start_ns = now_ns();
        let answer = match plan.talk {
            Talk::Tcp => ask_tcp(target),
            Talk::Udp => ask_udp(&mut sockets, any_port(target), target, false),
            Talk::ConnectedUdp => ask_udp(&mut sockets, target, target, true),
            Talk::FreshUdp => ask_udp_from(&mut ports, target),
        };
        let end_ns = now_ns();
        match answer {
            Ok(identity) => {
                if plan.record.is_some() {
                    let identity = Record::identity_of(&identity);
                    Record {
                        start_ns,
                        end_ns,
                        target: index as u64,
                        identity,
                    }
                    .write(&mut records);
                }
                *report.answers.entry(identity).or_default() += 1;
            }
            Err(error) => {
                report.failed += 1;
                if report.failures.len() < plan.spelled_out {
                    let error = error.to_string();
                    report.failures.push(Failure {
                        start_ns,
                        end_ns,
                        target,
                        error,
                    });
                }
            }
        }
        if !plan.pause.is_zero() {
            thread::sleep(plan.pause);
        }
    }
    (report, records)
}

fn ask_tcp(target: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&target, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut buffer = [0; 64];
    let length = stream.read(&mut buffer)?;
    // A reset instead of TIME_WAIT, or the client's ports run out at a few hundred connections per second.
    setsockopt(
        &stream,
        sockopt::Linger,
        &libc::linger {
            l_onoff: 1,
            l_linger: 0,
        },
    )?;
    identity(&buffer, length, '\n')
}

/// `key` says which socket to use: one for all, or one for each target.
fn ask_udp(
    sockets: &mut BTreeMap<SocketAddr, UdpSocket>,
    key: SocketAddr,
    target: SocketAddr,
    connected: bool,
) -> io::Result<String> {
    if let Entry::Vacant(entry) = sockets.entry(key) {
        let socket = UdpSocket::bind(any_port(target))?;
        if connected {
            socket.connect(target)?;
        }
        entry.insert(socket);
    }
    let answer = sockets.get(&key).map_or_else(
        || Err(io::Error::other("no socket")),
        |socket| exchange_datagrams(socket, target, connected),
    );
    if answer.is_err() {
        sockets.remove(&key);
    }
    answer
}

/// From a new socket at the next of `ports` that is free.
fn ask_udp_from(ports: &mut impl Iterator<Item = u16>, target: SocketAddr) -> io::Result<String> {
    let mut from = any_port(target);
    loop {
        from.set_port(ports.next().ok_or(io::ErrorKind::AddrNotAvailable)?);
        match UdpSocket::bind(from) {
            Ok(socket) => return exchange_datagrams(&socket, target, false),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error),
        }
    }
}

fn exchange_datagrams(
    socket: &UdpSocket,
    target: SocketAddr,
    connected: bool,
) -> io::Result<String> {
    socket.set_read_timeout(Some(PATIENCE))?;
    if connected {
        socket.send(b"?")?;
    } else {
        socket.send_to(b"?", target)?;
    }
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer)?;
    if from != target {
        return Err(io::Error::other(format!("an answer from {from}")));
    }
    identity(&buffer, length, ' ')
}

fn identity(buffer: &[u8], length: usize, end: char) -> io::Result<String> {
    let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
    match text.split_once(end) {
        Some((identity, _)) => Ok(identity.to_owned()),
        None => Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("answer {text:?}"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_read_back_as_they_were_written() {
        let record = Record {
            start_ns: 1,
            end_ns: 2,
            target: 3,
            identity: Record::identity_of("s1-22"),
        };
        let mut bytes = Vec::new();
        record.write(&mut bytes);
        let bytes: [u8; 32] = bytes.try_into().unwrap();
        assert_eq!(Record::parse(&bytes), record);
    }
}
