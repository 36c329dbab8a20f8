//! Ends connected UDP sockets whose backend is gone: `send()` runs no hook, so only an error makes the client connect again.
//!
//! The iterator that may destroy sees only the network namespace of whoever opens it, so all of the node's are entered one
//! after the other: 10 ms for 250 of them (v6.18). Entering takes CAP_SYS_ADMIN. A process of its own has it, and nothing
//! else to do: the agent drops it as soon as that process runs.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Read as _, Write as _},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    thread,
    time::Duration,
};

use caps::{CapSet, Capability, CapsHashSet};
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{prctl, signal::Signal},
};
use tokio::sync::oneshot;

use super::namespaces;
use crate::{
    backends::ebpf::links::Hook,
    cli::{Global, LogFormat},
};

/// A socket that chose its backend just before that one went is found a moment later: look again.
const AGAIN: Duration = Duration::from_millis(40);
/// What the reaper keeps: to enter network namespaces, and to find those that only processes hold (ptrace(2), "Ptrace
/// access mode checking").
const NEEDED: [Capability; 2] = [Capability::CAP_SYS_ADMIN, Capability::CAP_SYS_PTRACE];

/// The process that ends sockets, as the agent holds it.
#[derive(Debug)]
pub struct Reaper {
    child: Child,
    requests: ChildStdin,
}

impl Reaper {
    /// Starts the process, which ends with this one. To be called before the agent's own files and threads are there.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(global: &Global) -> io::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg("reap").arg("--bpf-dir").arg(&global.bpf_dir);
        if let Some(filter) = &global.log_level {
            command.arg("--log-level").arg(filter);
        }
        match global.log_format {
            LogFormat::Text => {}
            LogFormat::Json => drop(command.args(["--log-format", "json"])),
        }
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        let mut child = command.spawn()?;
        let requests = child.stdin.take();
        let requests = requests.ok_or_else(|| io::Error::other("it has no standard input"))?;
        // A request is never worth waiting for: those in the pipe are answered by the same round.
        fcntl(&requests, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(Self { child, requests })
    }

    /// What asks for rounds, and what says that the process has ended.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn split(self) -> io::Result<(Requests, oneshot::Receiver<io::Result<ExitStatus>>)> {
        let Self {
            mut child,
            requests,
        } = self;
        let (ended, end) = oneshot::channel();
        // Nobody listens any more when the agent ends.
        let wait = move || drop(ended.send(child.wait()));
        thread::Builder::new()
            .name("reaper".to_owned())
            .spawn(wait)?;
        Ok((Requests(requests), end))
    }
}

/// Asks for dead sockets to be ended.
#[derive(Debug)]
pub struct Requests(ChildStdin);

impl Requests {
    /// UDP backends are gone. Does not wait.
    pub fn ask(&mut self) {
        match self.0.write(&[1]) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => tracing::error!(%error, "cannot reach the reaper"),
        }
    }
}

/// Takes what only the reaper needs from the calling thread and all that it starts.
///
/// # Errors
/// The kernel refused.
pub fn drop_capabilities() -> Result<(), caps::errors::CapsError> {
    let may_bound = caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)?;
    for capability in NEEDED {
        // In this order: what is inheritable or effective has to be permitted.
        for set in [CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
            caps::drop(None, set, capability)?;
        }
        if may_bound {
            caps::drop(None, CapSet::Bounding, capability)?;
        }
    }
    Ok(())
}

/// The reaper's process: a round for each request on standard input, until that ends. `bpf_dir` holds the pinned iterators.
///
/// # Errors
/// A sentence that says what failed.
pub fn run(bpf_dir: &Path) -> Result<(), String> {
    prctl::set_pdeathsig(Signal::SIGKILL)
        .map_err(|errno| format!("cannot ask to end with the agent: {errno}"))?;
    keep_only_needed().map_err(|error| format!("cannot drop capabilities: {error}"))?;
    serve(&bpf_dir.join("links")).map_err(|error| format!("cannot read requests: {error}"))
}

fn keep_only_needed() -> Result<(), caps::errors::CapsError> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = permitted
        .intersection(&CapsHashSet::from(NEEDED))
        .copied()
        .collect();
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)
}

fn serve(links: &Path) -> io::Result<()> {
    let mut requests = io::stdin().lock();
    let mut hidden = BTreeSet::new();
    let mut buffer = [0; 4096];
    while requests.read(&mut buffer)? > 0 {
        loop {
            reap(links, &mut hidden);
            let stdin = io::stdin();
            let mut waiting = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
            let again = PollTimeout::try_from(AGAIN).unwrap_or(PollTimeout::ZERO);
            if poll(&mut waiting, again)? == 0 {
                reap(links, &mut hidden);
                break;
            }
            if requests.read(&mut buffer)? == 0 {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// One round. `hidden` are the namespaces that could not be entered, each told once.
fn reap(links: &Path, hidden: &mut BTreeSet<PathBuf>) {
    let binder = links.join(Hook::BindUdp.name());
    if binder.exists() {
        read_everywhere(&binder, hidden);
        // Its absence tells the agent that it was read.
        if let Err(error) = fs::remove_file(&binder) {
            tracing::error!(pin = %binder.display(), %error, "cannot remove");
        }
    }
    read_everywhere(&links.join(Hook::KillDead.name()), hidden);
}

/// Reading an iterator is what makes it work.
fn read_everywhere(iterator: &Path, hidden: &mut BTreeSet<PathBuf>) {
    // Kernels that lack it were told of when the programs were loaded.
    if !iterator.exists() {
        return;
    }
    let namespaces = namespaces::all();
    let results = namespaces::visit(&namespaces, || fs::read(iterator).map(drop));
    for (path, result) in namespaces.into_iter().zip(results) {
        match result {
            // Gone meanwhile, with its sockets.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if !hidden.contains(&path) => {
                tracing::warn!(netns = %path.display(), %error, "cannot end UDP sockets of dead backends in a network namespace: it takes CAP_SYS_ADMIN");
                hidden.insert(path);
            }
            Ok(()) | Err(_) => {}
        }
    }
}
