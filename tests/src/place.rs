//! Where a process runs: a network namespace and a cgroup.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context, bail};
use nix::sched::{CloneFlags, setns};

/// A network namespace and a cgroup v2.
#[derive(Clone, Debug)]
pub struct Place {
    /// For people: "node-a", "node-a/web-1".
    pub name: String,
    /// The file of the network namespace.
    pub netns: PathBuf,
    /// The directory of the cgroup.
    pub cgroup: PathBuf,
}

impl Place {
    /// `program`, to be run here.
    ///
    /// # Errors
    /// The helper binary is missing.
    pub fn command(&self, program: impl AsRef<OsStr>) -> anyhow::Result<Command> {
        let mut command = Command::new(peer_binary()?);
        command
            .arg("enter")
            .arg(&self.netns)
            .arg(&self.cgroup)
            .arg(program)
            // Ctrl-C is for the maker alone; the janitor ends the rest.
            .process_group(0);
        Ok(command)
    }

    /// A DNS server that knows nothing of this machine: what it knows is for the caller to add.
    ///
    /// # Errors
    /// The helper binary is missing.
    pub fn dns_server(&self) -> anyhow::Result<Command> {
        let mut command = self.command("dnsmasq")?;
        command.args(["--keep-in-foreground", "--user=root", "--pid-file="]);
        command.args(["--no-resolv", "--no-hosts", "--conf-file=/dev/null"]);
        Ok(command)
    }

    /// Runs `work` on a thread in the network namespace; the cgroup stays that of the caller, where no hook is attached.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        let enter = || -> anyhow::Result<T> {
            enter_netns(&self.netns)?;
            Ok(work())
        };
        thread::scope(|scope| scope.spawn(enter).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// GET over HTTP from inside the network namespace, past all hooks: status and body.
    ///
    /// # Errors
    /// No connection, or no HTTP.
    pub fn http_get(&self, address: SocketAddr, path: &str) -> anyhow::Result<(u16, String)> {
        self.inside(|| http_get(address, path))?
            .with_context(|| format!("GET http://{address}{path} in {}", self.name))
    }

    /// The command line that enters the network namespace.
    pub fn nsenter(&self) -> String {
        format!("nsenter --net={}", self.netns.display())
    }
}

fn http_get(address: SocketAddr, path: &str) -> anyhow::Result<(u16, String)> {
    let timeout = Duration::from_secs(5);
    let mut stream = TcpStream::connect_timeout(&address, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .context("no end of the headers")?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    Ok((status.context("no status")?, body.to_owned()))
}

/// The process of `peer enter`: goes to a place and becomes `program` there. Returns only on failure.
///
/// # Errors
/// The place or the program does not exist.
pub fn enter(netns: &Path, cgroup: &Path, program: &OsStr, args: &[&OsStr]) -> anyhow::Error {
    let go = || -> anyhow::Result<()> {
        let procs = cgroup.join("cgroup.procs");
        fs::write(&procs, "0").with_context(|| format!("cannot write {}", procs.display()))?;
        enter_netns(netns)
    };
    match go() {
        Ok(()) => {
            let error = Command::new(program).args(args).exec();
            anyhow::Error::from(error).context(format!("cannot run {}", program.display()))
        }
        Err(error) => error,
    }
}

/// Moves the calling thread into a network namespace.
///
/// # Errors
/// It does not exist, or may not be entered.
pub fn enter_netns(netns: &Path) -> anyhow::Result<()> {
    let file =
        File::open(netns).with_context(|| format!("cannot open namespace {}", netns.display()))?;
    setns(file, CloneFlags::CLONE_NEWNET)
        .with_context(|| format!("cannot enter namespace {}", netns.display()))
}

/// The helper binary of this package: beside the running one, or above it for tests; `PROXY_PEER` overrides.
///
/// # Errors
/// It was not built.
pub fn peer_binary() -> anyhow::Result<PathBuf> {
    built_binary("PROXY_PEER", "peer")
}

/// A binary of this workspace: the one named by `variable`, else the one built beside the running one.
///
/// # Errors
/// It was not built.
pub fn built_binary(variable: &str, name: &str) -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        return Ok(path.into());
    }
    let own = std::env::current_exe()?;
    let found = own
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join(name))
        .find(|p| p.is_file());
    match found {
        Some(path) => Ok(path),
        None => bail!(
            "no {name} beside {}; build it, or set {variable}",
            own.display()
        ),
    }
}

/// What went wrong in a system call of another process.
pub fn os_error(errno: Option<i32>, text: String) -> io::Error {
    match errno {
        Some(errno) => io::Error::from_raw_os_error(errno),
        None => io::Error::other(text),
    }
}
