//! curl in a loop, and what it says.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{BufRead, BufReader},
    process::{Child, ChildStdout, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};

use crate::{Place, wait_for};

/// The Service that steps inside the cluster use.
pub(super) const WEB: &str = "http://10.96.0.80/";

/// Answers by pod, and requests without one.
#[derive(Clone, Debug, Default)]
pub(super) struct Counts {
    pub(super) answers: BTreeMap<String, u64>,
    pub(super) failures: Vec<String>,
    last: BTreeMap<String, Instant>,
}

impl Counts {
    /// Takes in a line of curl's output: a pod's name, perhaps with the source it saw, or "<status> <error>" as [`ARGS`] asks for.
    /// Whether the line is a request's last.
    pub(super) fn take(&mut self, line: &str) -> bool {
        match line.split_once(' ') {
            None if line.is_empty() => return false,
            Some(("200", _)) => {}
            Some((status, error)) => self.failures.push(format!("{status} {error}")),
            None => {
                *self.answers.entry(line.to_owned()).or_default() += 1;
                self.last.insert(line.to_owned(), Instant::now());
                return false;
            }
        }
        true
    }

    /// All answers.
    pub(super) fn total(&self) -> u64 {
        self.answers.values().sum()
    }

    /// When `pod` answered last.
    pub(super) fn last(&self, pod: &str) -> Option<Instant> {
        self.last.get(pod).copied()
    }

    /// "0 failed of 1000", with the first failure.
    pub(super) fn verdict(&self) -> String {
        let failed = self.failures.len();
        let text = format!("{failed} failed of {}", self.total() + failed as u64);
        match self.failures.first() {
            Some(first) => format!("{text} ({first})"),
            None => text,
        }
    }

    /// "web-1 99, web-2 101; 0 failed".
    pub(super) fn summary(&self) -> String {
        let mut text = String::new();
        for (pod, count) in &self.answers {
            let comma = if text.is_empty() { "" } else { ", " };
            // Writing to a String cannot fail.
            let _ = write!(text, "{comma}{pod} {count}");
        }
        let _ = write!(text, "; {} failed", self.failures.len());
        if let Some(first) = self.failures.first() {
            let _ = write!(text, " ({first})");
        }
        text
    }
}

/// After which curl gives a request up: `--max-time` of [`ARGS`].
const LIMIT: Duration = Duration::from_secs(3);
/// How curl reports: the body is the pod's name, then a line with the status.
const ARGS: [&str; 5] = ["-s", "--max-time", "3", "-w", "%{http_code} %{errormsg}\n"];

/// Runs one curl to its end.
pub(super) fn curl(place: &Place, url: &str) -> anyhow::Result<Counts> {
    println!("{}$ curl -s '{url}'", place.name);
    let output = place
        .command("curl")?
        .args(ARGS)
        .args(["--fail-early", url])
        .output()
        .context("cannot run curl")?;
    let mut counts = Counts::default();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        counts.take(line);
    }
    Ok(counts)
}

/// Several curls that go on until they are stopped.
#[derive(Debug)]
pub(super) struct Traffic {
    counts: Arc<Mutex<Counts>>,
    curls: Vec<Curl>,
}

#[derive(Debug)]
struct Curl {
    child: Child,
    /// Requests that ended, with an answer or without.
    ended: Arc<AtomicU64>,
    reader: JoinHandle<()>,
}

impl Traffic {
    pub(super) fn start(place: &Place, url: &str, curls: usize) -> anyhow::Result<Self> {
        let url = format!("{url}?[1-10000000]");
        println!(
            "{}$ curl -s '{url}'   # {curls} of them, a new connection each time",
            place.name
        );
        let mut traffic = Self {
            counts: Arc::default(),
            curls: Vec::new(),
        };
        for _ in 0..curls {
            let mut command = place.command("curl")?;
            command
                .args(ARGS)
                .arg(&url)
                .stdout(Stdio::piped())
                .stderr(Stdio::null());
            let mut child = command.spawn().context("cannot run curl")?;
            let output = child.stdout.take().context("no pipe")?;
            let counts = traffic.counts.clone();
            let ended = Arc::<AtomicU64>::default();
            let number = ended.clone();
            let reader = std::thread::spawn(move || read(output, &counts, &number));
            traffic.curls.push(Curl {
                child,
                ended,
                reader,
            });
        }
        Ok(traffic)
    }

    /// What it saw so far.
    pub(super) fn counts(&self) -> Counts {
        lock(&self.counts).clone()
    }

    /// Waits until a condition on the counts holds.
    pub(super) fn wait(&self, what: &str, wanted: impl Fn(&Counts) -> bool) -> anyhow::Result<()> {
        wait_for(what, Duration::from_secs(10), || {
            let counts = self.counts();
            ensure!(wanted(&counts), "so far: {}", counts.summary());
            Ok(())
        })
    }

    /// Waits until there are `more` answers than now.
    pub(super) fn wait_more(&self, more: u64) -> anyhow::Result<()> {
        let before = self.counts().total();
        self.wait("more answers", |counts| counts.total() >= before + more)
    }

    /// Ends it: what it saw. Lets every curl end what it is at first, so that no request that hangs goes uncounted.
    pub(super) fn stop(mut self) -> anyhow::Result<Counts> {
        for curl in &self.curls {
            let before = curl.ended.load(Ordering::Relaxed);
            wait_for("each curl ends a request", LIMIT * 2, || {
                ensure!(curl.ended.load(Ordering::Relaxed) > before, "one hangs");
                Ok(())
            })?;
        }
        self.end();
        Ok(self.counts())
    }

    fn end(&mut self) {
        for curl in &mut self.curls {
            // Gone already: nothing to do.
            drop(curl.child.kill());
            drop(curl.child.wait());
        }
        for curl in self.curls.drain(..) {
            drop(curl.reader.join());
        }
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.end();
    }
}

fn lock(counts: &Mutex<Counts>) -> MutexGuard<'_, Counts> {
    counts.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read(output: ChildStdout, counts: &Mutex<Counts>, ended: &AtomicU64) {
    for line in BufReader::new(output).lines().map_while(Result::ok) {
        if lock(counts).take(&line) {
            ended.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_ends_with_its_status_and_fails_unless_that_is_200() {
        let mut counts = Counts::default();
        let lines = ["web-1", "200 ", "", "000 Connection timed out"];
        let ends = lines.map(|line| counts.take(line));
        assert_eq!(ends, [false, true, false, true]);
        assert_eq!(counts.total(), 1);
        assert_eq!(counts.verdict(), "1 failed of 2 (000 Connection timed out)");
    }
}
