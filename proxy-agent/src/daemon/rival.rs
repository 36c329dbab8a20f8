//! Another proxy on this node: asks whether one answers, tells what follows, and clears away what one left.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::sync::watch;

use crate::{
    backends::{
        Error,
        iptables::{
            self, Extent, IptablesBackend,
            host::Host,
            rival::{Rivals, Sign, Stance, nft},
            watch::Watched,
        },
    },
    health::OURS,
    metrics::{Metrics, SignLabel},
    sync::SyncStatus,
};

/// Where a kube-proxy answers unless it is told otherwise.
const KUBE_PROXY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);
const ASK_EVERY: Duration = Duration::from_secs(1);
/// Longest wait for a connection to this machine, and for a whole answer.
const TIMEOUT: Duration = Duration::from_secs(1);
/// kube-proxy's table of one family follows that of the other one within this time, or not at all.
const OTHER_FAMILY: Duration = Duration::from_secs(60);
/// More than any answer to `/proxyMode` has, bytes.
const ANSWER_BYTES: usize = 4096;

/// Who asks for other proxies, all the time.
pub struct LookOut {
    /// What follows from their answers.
    pub rivals: Rivals,
    /// Whether one answers at kube-proxy's port and that is not ours: then it does not want ours.
    pub is_elsewhere: Arc<AtomicBool>,
}

/// Begins to look out for other proxies: at kube-proxy's port and at `own`, which may be taken by one. One that gives no
/// sign for `patience` is gone. The first answer is in when this returns.
///
/// # Errors
/// No thread to be had.
pub fn look_out(own: Option<SocketAddr>, patience: Duration) -> io::Result<LookOut> {
    let own = own.map(|own| SocketAddr::new(reachable(own.ip()), own.port()));
    let elsewhere = own.filter(|own| *own != KUBE_PROXY);
    let is_elsewhere = Arc::new(AtomicBool::new(false));
    let tells_elsewhere = Arc::clone(&is_elsewhere);
    let answers = move || {
        let has_its_port = foreign_mode(KUBE_PROXY).is_some();
        tells_elsewhere.store(has_its_port && elsewhere.is_some(), Ordering::Relaxed);
        has_its_port || elsewhere.is_some_and(|own| foreign_mode(own).is_some())
    };
    let proxy_mode = Arc::new(AtomicBool::new(answers()));
    let told = Arc::downgrade(&proxy_mode);
    thread::Builder::new()
        .name("other-proxies".to_owned())
        .spawn(move || {
            loop {
                thread::sleep(ASK_EVERY);
                let now = answers();
                // Nobody wants to know any more: the layer has ended.
                let Some(told) = told.upgrade() else { return };
                told.store(now, Ordering::Relaxed);
            }
        })?;
    Ok(LookOut {
        rivals: Rivals::new(patience, proxy_mode),
        is_elsewhere,
    })
}

/// Where a server that listens on `address` is reached from this node.
fn reachable(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(v4) if v4.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(v6) if v6.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        address => address,
    }
}

/// What another proxy at kube-proxy's port calls its mode; none if nobody is there, or an agent of our kind.
pub fn answer() -> Option<String> {
    foreign_mode(KUBE_PROXY)
}

fn foreign_mode(address: SocketAddr) -> Option<String> {
    // Nobody there, or nobody who answers: no sign.
    let answer = ask(address).ok()?;
    mode_of_another(&answer).map(str::to_owned)
}

fn ask(address: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    // At once: who answers the first piece of it and closes would reset the connection at the second.
    let request = format!("GET /proxyMode HTTP/1.0\r\nHost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let end = Instant::now() + TIMEOUT;
    let mut answer = [0; ANSWER_BYTES];
    let mut length = 0;
    while length < ANSWER_BYTES {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut answer[length..])? {
            0 => break,
            read => length += read,
        }
    }
    Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
}

/// The one word that a proxy answers, unless it is an agent of our kind.
fn mode_of_another(answer: &str) -> Option<&str> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let mut lines = head.lines();
    let is_ok = lines
        .next()
        .is_some_and(|status| status.split(' ').nth(1) == Some("200"));
    let is_ours = lines.any(|line| {
        line.split_once(':')
            .is_some_and(|(name, _)| name.eq_ignore_ascii_case(OURS.as_str()))
    });
    let word = body.trim();
    let is_word = !word.is_empty() && word.chars().all(|c| c.is_ascii_alphanumeric());
    (is_ok && !is_ours && is_word).then_some(word)
}

/// What the thread of the packet layer does about other proxies.
pub struct Beside {
    /// True while another proxy should have our port, if it wants it: by its answers there it is seen to be alive.
    give_way: watch::Sender<bool>,
    /// See [`LookOut::is_elsewhere`].
    is_elsewhere: Arc<AtomicBool>,
    metrics: Arc<Metrics>,
    told: Stance,
    /// Our rules are still to go, since then.
    leaves: Option<Instant>,
    /// What could not be removed, told once.
    trouble: Option<String>,
}

impl Beside {
    /// Tells `give_way` when another proxy should have our port; `is_elsewhere` is the one of [`LookOut`].
    pub fn new(
        give_way: watch::Sender<bool>,
        is_elsewhere: Arc<AtomicBool>,
        metrics: Arc<Metrics>,
    ) -> Self {
        for sign in Sign::ALL {
            gauge(&metrics, sign).set(0);
        }
        Self {
            give_way,
            is_elsewhere,
            metrics,
            told: Stance::Serve,
            leaves: None,
            trouble: None,
        }
    }

    /// Call it twice a second, with how the layer is doing.
    pub fn tend(&mut self, backend: &mut IptablesBackend<Watched<Host>>, status: &SyncStatus) {
        let Some(rivals) = backend.rivals() else {
            return;
        };
        let stance = rivals.decision().stance();
        let wants_clearing = rivals.decision().wants_clearing();
        self.tell(stance);
        let gives_way = self.is_observing() && !self.is_elsewhere.load(Ordering::Relaxed);
        self.give_way
            .send_if_modified(|told| std::mem::replace(told, gives_way) != gives_way);
        // Its tables of both families are not written at once, if there are both.
        let is_due = |since: Instant| nft::serves_all() || since.elapsed() >= OTHER_FAMILY;
        if self.leaves.is_some_and(is_due) {
            // Nobody keeps them true any more, and they would translate beside its table.
            let done = iptables::remove(backend.tables_mut(), Extent::Ours);
            if self.keep(done).is_some() {
                self.leaves = None;
            }
        }
        // Never before our own rules serve everything.
        if wants_clearing && status.is_serving {
            let done = clear(backend);
            if self.keep(done).is_some() {
                backend.rivals_cleared();
            }
        }
    }

    /// Whether another proxy serves the node, as told last.
    pub fn is_observing(&self) -> bool {
        matches!(self.told, Stance::Observe(_))
    }

    /// An error is tried again twice a second, and told once.
    fn keep<T>(&mut self, done: Result<T, Error>) -> Option<T> {
        match done {
            Ok(value) => {
                self.trouble = None;
                Some(value)
            }
            Err(error) => {
                let error = format!("{error:#}");
                if self.trouble.as_ref() != Some(&error) {
                    tracing::warn!(
                        error,
                        "cannot clear away for another proxy, or after it; trying again"
                    );
                    self.trouble = Some(error);
                }
                None
            }
        }
    }

    fn tell(&mut self, stance: Stance) {
        let before = std::mem::replace(&mut self.told, stance);
        if before == stance {
            return;
        }
        if let Stance::Observe(sign) = before {
            gauge(&self.metrics, sign).set(0);
        }
        match stance {
            Stance::Observe(sign) => {
                gauge(&self.metrics, sign).set(1);
                tracing::warn!(
                    sign = sign.name(),
                    "another proxy serves this node: the rules are left to it until it is gone"
                );
            }
            Stance::Serve => {
                tracing::info!("no other proxy serves this node any more: taking over");
            }
        }
        self.leaves = (stance == Stance::Observe(Sign::NftTable)).then(Instant::now);
    }
}

fn gauge(metrics: &Metrics, sign: Sign) -> prometheus_client::metrics::gauge::Gauge {
    let label = SignLabel { sign: sign.name() };
    metrics.observing.get_or_create(&label).clone()
}

/// Removes what a kube-proxy leaves beside the chains that we share with it.
fn clear(backend: &mut IptablesBackend<Watched<Host>>) -> Result<(), Error> {
    let had_canaries = backend.has_canaries();
    if had_canaries {
        backend.tables_mut().remove_canaries()?;
    }
    let had_table = nft::remove().map_err(|cause| Error::Kernel {
        action: "remove",
        object: "table kube-proxy of nftables".to_owned(),
        cause,
        hint: "",
    })?;
    if had_canaries || had_table {
        tracing::info!(
            canaries = had_canaries,
            nft_table = had_table,
            "what kube-proxy left is removed"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn only_another_proxys_answer_is_foreign() {
        for (answer, expected) in [
            ("HTTP/1.0 200 OK\r\nContent-Length: 8\r\n\r\niptables", true),
            ("HTTP/1.1 200 OK\r\n\r\nnftables\n", true),
            (
                "HTTP/1.1 200 OK\r\nX-Proxy-Agent: 0.1.0\r\n\r\niptables",
                false,
            ),
            ("HTTP/1.1 404 Not Found\r\n\r\niptables", false),
            ("HTTP/1.1 200 OK\r\n\r\n<html>some page</html>", false),
            ("HTTP/1.1 200 OK\r\n\r\n", false),
            ("SSH-2.0-OpenSSH_9.2\r\n", false),
            ("", false),
        ] {
            assert_eq!(mode_of_another(answer).is_some(), expected, "{answer:?}");
        }
    }

    #[test]
    fn a_server_is_asked_and_silence_is_no_sign() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 256];
                let read = stream.read(&mut request).unwrap();
                assert!(request[..read].starts_with(b"GET /proxyMode "));
                stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nipvs").unwrap();
            });
            assert_eq!(foreign_mode(address).as_deref(), Some("ipvs"));
        });
        drop(listener);
        assert_eq!(foreign_mode(address), None);
    }

    #[test]
    fn a_server_that_talks_without_end_is_waited_for_no_longer_than_one_that_is_silent() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                // Until nobody listens.
                while stream.write_all(&[b'x'; 64]).is_ok() {
                    thread::sleep(TIMEOUT / 20);
                }
            });
            let start = Instant::now();
            assert_eq!(foreign_mode(address), None);
            assert!(start.elapsed() < 2 * TIMEOUT, "{:?}", start.elapsed());
        });
    }

    #[test]
    fn a_server_on_all_addresses_is_asked_on_loopback() {
        for (address, expected) in [
            ("0.0.0.0", "127.0.0.1"),
            ("::", "::1"),
            ("10.0.0.1", "10.0.0.1"),
        ] {
            let [address, expected] =
                [address, expected].map(|text| text.parse::<IpAddr>().unwrap());
            assert_eq!(reachable(address), expected);
        }
    }
}
