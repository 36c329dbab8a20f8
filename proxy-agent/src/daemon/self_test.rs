//! Proof that the hooks translate: a socket in the node's cgroup, or below, connects to an address that only we know.
//!
//! The agent's own cgroup will do if it lies there, as a pod's does. Only else one is made for the test: in a container the
//! node's cgroups may be read-only, and nobody moves out of his namespace of cgroups.
//!
//! UDP `connect()` sends no packet. It chooses a source address, though: a loopback one if the canary address was
//! translated to the loopback backend, and something else, or an error, if not. Afterwards the peer must look like the
//! canary again.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    path::Path,
    process::{Command, Stdio},
};

use nix::errno::Errno;

use crate::{
    backends::ebpf::probe::{cgroup_root, is_root},
    state::{
        Backend, BackendState, DesiredState, Family, Frontend, FrontendKind, Protocol, ServiceName,
        ServicePort, ServiceState, TrafficPolicy,
    },
};

/// The IPv4 dummy address (RFC 7600): never assigned, never routed.
const CANARY_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 0, 8));
/// In the discard-only prefix (RFC 6666).
const CANARY_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 8));
/// What to look at when the hooks are attached and do not take effect.
const SUSPECT: &str = "a program of somebody else may be in the way: bpftool cgroup tree";
/// discard.
const PORT: u16 = 9;
/// A cgroup below the node's, with the process id of its agent.
const CHILD_PREFIX: &str = "proxy-agent-self-test-";
/// No Kubernetes name has an underscore.
const NAME: (&str, &str) = ("proxy-agent", "_self-test");

/// Whether a service port's "namespace/name:port" is the canary's.
pub fn is_canary(service: &str) -> bool {
    service.split_once('/') == Some(NAME)
}

/// Adds the canary to a complete desired state.
pub fn add_canary(state: &mut DesiredState) {
    for (canary, loopback) in [
        (CANARY_V4, IpAddr::from(Ipv4Addr::LOCALHOST)),
        (CANARY_V6, IpAddr::from(Ipv6Addr::LOCALHOST)),
    ] {
        let key = ServicePort {
            service: ServiceName::new(NAME.0, NAME.1),
            port: "".into(),
            protocol: Protocol::Udp,
            family: Family::of(canary),
        };
        let service = ServiceState {
            key: key.clone(),
            frontends: vec![Frontend {
                address: canary,
                port: PORT,
                kind: FrontendKind::ExternalIp,
                on_local_link: false,
            }],
            backends: vec![Backend {
                address: loopback,
                port: PORT,
                state: BackendState {
                    terminating: false,
                    on_this_node: true,
                    in_cluster: true,
                    in_local: true,
                },
            }],
            affinity_seconds: None,
            internal_policy: TrafficPolicy::Cluster,
            external_policy: TrafficPolicy::Cluster,
            source_ranges: Vec::new(),
            admits_node: false,
            health_check_port: None,
        };
        state.services.insert(key, service);
    }
}

/// Runs the test in a child process in or below `cgroup`.
///
/// # Errors
/// A sentence that says what is wrong.
pub fn run(cgroup: &Path) -> Result<(), String> {
    match is_inside(cgroup) {
        true => connect_by_child(None),
        false => run_below(cgroup),
    }
}

/// Whether this process lives in `cgroup`, or below.
fn is_inside(cgroup: &Path) -> bool {
    if is_root(cgroup) {
        return true;
    }
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"));
    // In a namespace of cgroups the path begins at its root: then it is too short, and never inside.
    let own = own
        .zip(cgroup_root().ok())
        .map(|(own, root)| root.join(own));
    let cgroup = cgroup.canonicalize();
    cgroup.is_ok_and(|cgroup| own.is_some_and(|own| own.starts_with(cgroup)))
}

fn run_below(cgroup: &Path) -> Result<(), String> {
    remove_leftovers(cgroup);
    let child = cgroup.join(format!("{CHILD_PREFIX}{}", std::process::id()));
    let at = child.display();
    match fs::create_dir(&child) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            let remedy = remedy(&error);
            return Err(format!("cannot make the cgroup {at}: {error}; {remedy}"));
        }
        Ok(()) | Err(_) => {}
    }
    let result = connect_by_child(Some(&child));
    // Best effort: the next self-test of this process uses it again.
    let _ = fs::remove_dir(&child);
    result
}

fn connect_by_child(cgroup: Option<&Path>) -> Result<(), String> {
    let result = Command::new("/proc/self/exe")
        .arg("self-test")
        .args(cgroup)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .output();
    match result {
        Err(error) => Err(format!("cannot start the self-test: {error}")),
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr);
            let text = text.trim().trim_start_matches("proxy-agent: ");
            Err(match text.is_empty() {
                true => format!("it ended with {}", output.status),
                false => text.to_owned(),
            })
        }
    }
}

/// What to do about a cgroup that cannot be made. EAGAIN is a limit (cgroup_mkdir(), kernel/cgroup/cgroup.c, v6.18).
fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::WouldBlock => {
            "raise cgroup.max.descendants and cgroup.max.depth there and above"
        }
        _ => "mount it writable",
    }
}

/// Removes the cgroups of self-tests whose agent was killed meanwhile.
fn remove_leftovers(cgroup: &Path) {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name
            .to_str()
            .and_then(|name| name.strip_prefix(CHILD_PREFIX));
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Best effort: it is empty, or somebody else's business.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// The child's part: enters `cgroup`, if one is given, and connects.
///
/// # Errors
/// A sentence that says what is wrong.
pub fn connect_from(cgroup: Option<&Path>) -> Result<(), String> {
    if let Some(cgroup) = cgroup {
        fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string())
            .map_err(|error| format!("cannot enter the cgroup {}: {error}", cgroup.display()))?;
    }
    let loopback = |ip: IpAddr| SocketAddr::new(ip, PORT);
    connect(CANARY_V4, loopback(Ipv4Addr::LOCALHOST.into()))?;
    connect(CANARY_V6, loopback(Ipv6Addr::LOCALHOST.into()))
}

fn connect(canary: IpAddr, backend: SocketAddr) -> Result<(), String> {
    let unspecified: IpAddr = match canary {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let open = || UdpSocket::bind(SocketAddr::new(unspecified, 0));
    let canary = SocketAddr::new(canary, PORT);
    let direct = open().and_then(|socket| socket.connect(backend));
    match direct {
        Ok(()) => {}
        // A family that this node does not have needs no test.
        Err(error) if is_without_family(&error) => return Ok(()),
        Err(error) => {
            return Err(format!(
                "cannot connect to the backend of the canary address {canary}, {backend}: {error}; {SUSPECT}"
            ));
        }
    }
    let failed = |what: String| {
        Err(format!(
            "a connection to the canary address {canary} {what}; {SUSPECT}"
        ))
    };
    let socket = open().map_err(|error| format!("cannot open a socket: {error}"))?;
    if let Err(error) = socket.connect(canary) {
        return failed(format!("was not translated: {error}"));
    }
    match socket.local_addr() {
        Ok(local) if local.ip() == backend.ip() => {}
        Ok(local) => {
            let source = local.ip();
            return failed(format!(
                "was not translated: its source address is {source}"
            ));
        }
        Err(error) => return failed(format!("has no source address: {error}")),
    }
    match socket.peer_addr() {
        Ok(peer) if peer == canary => Ok(()),
        Ok(peer) => failed(format!("was translated, but getpeername() shows {peer}")),
        Err(error) => failed(format!("has no peer: {error}")),
    }
}

/// Whether this says that the node does not have the socket's family: not compiled in, or without a loopback address.
fn is_without_family(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(
        errno,
        Some(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL | Errno::ENETUNREACH)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_hooks_the_canary_is_not_translated() {
        let error = connect(CANARY_V4, SocketAddr::new(Ipv4Addr::LOCALHOST.into(), PORT));
        assert!(error.unwrap_err().contains("was not translated"));
    }

    #[test]
    #[ignore = "needs root"]
    fn a_family_without_a_loopback_address_is_not_tested() {
        let result = std::thread::spawn(|| {
            // A new namespace, where the loopback interface is down.
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            connect(CANARY_V6, SocketAddr::new(Ipv6Addr::LOCALHOST.into(), PORT))
        });
        assert_eq!(result.join().unwrap(), Ok(()));
    }

    #[test]
    fn cgroups_of_dead_agents_are_removed() {
        let root = tempfile::tempdir().unwrap();
        let own = root
            .path()
            .join(format!("{CHILD_PREFIX}{}", std::process::id()));
        // Beyond the largest process id.
        let dead = root.path().join(format!("{CHILD_PREFIX}4194305"));
        fs::create_dir(&own).unwrap();
        fs::create_dir(&dead).unwrap();
        remove_leftovers(root.path());
        assert!(own.exists() && !dead.exists());
    }

    #[test]
    fn this_process_is_in_the_root_of_all_cgroups_and_in_none_that_is_empty() {
        let root = cgroup_root().unwrap();
        assert!(is_inside(&root));
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = own.lines().find_map(|line| line.strip_prefix("0::/"));
        assert!(is_inside(&root.join(own.unwrap())));
        assert!(!is_inside(Path::new("/proc")) && !is_inside(Path::new("/nonexistent")));
    }

    #[test]
    fn the_canary_has_a_name_of_its_own() {
        let mut state = DesiredState::default();
        add_canary(&mut state);
        assert_eq!(state.services.len(), 2);
        assert!(state.services.keys().all(|key| is_canary(&key.to_string())));
        assert!(!is_canary("default/web:http"));
    }
}
