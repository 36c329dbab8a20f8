//! curl in a loop, and what it says.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{BufRead, BufReader},
    process::{Child, ChildStdout, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
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
    pub(super) fn take(&mut self, line: &str) {
        match line.split_once(' ') {
            None if line.is_empty() => {}
            Some(("200", _)) => {}
            Some((status, error)) => self.failures.push(format!("{status} {error}")),
            None => {
                *self.answers.entry(line.to_owned()).or_default() += 1;
                self.last.insert(line.to_owned(), Instant::now());
            }
        }
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
        let text = format!("{} failed of {}", self.failures.len(), self.total());
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

/// How curl reports: the body is the pod's name, then a line with the status.
pub(super) const ARGS: [&str; 5] = ["-s", "--max-time", "3", "-w", "%{http_code} %{errormsg}\n"];

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
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .for_each(|line| counts.take(line));
    Ok(counts)
}

/// Several curls that go on until they are stopped.
#[derive(Debug)]
pub(super) struct Traffic {
    counts: Arc<Mutex<Counts>>,
    curls: Vec<(Child, JoinHandle<()>)>,
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
            let reader = std::thread::spawn(move || read(output, &counts));
            traffic.curls.push((child, reader));
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

    /// Ends it: what it saw.
    pub(super) fn stop(mut self) -> Counts {
        self.end();
        self.counts()
    }

    fn end(&mut self) {
        for (child, _) in &mut self.curls {
            // Gone already: nothing to do.
            drop(child.kill());
            drop(child.wait());
        }
        for (_, reader) in self.curls.drain(..) {
            drop(reader.join());
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

fn read(output: ChildStdout, counts: &Mutex<Counts>) {
    for line in BufReader::new(output).lines().map_while(Result::ok) {
        lock(counts).take(&line);
    }
}
