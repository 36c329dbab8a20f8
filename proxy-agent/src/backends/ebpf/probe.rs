//! What this node offers the socket layer: for `check`, and for the choice of a mode.

use std::{
    fmt, fs,
    os::unix::{fs::MetadataExt as _, net::UnixDatagram},
    path::{Path, PathBuf},
};

use aya_obj::generated::{bpf_attach_type, bpf_prog_type};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::{
    dir, kernel,
    kfuncs::KernelBtf,
    links::Cgroup,
    load::{Constants, Object},
    sys,
};
use crate::backends::Error;

/// Something that the socket layer needs or can use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, or root.
    Privilege,
    /// The kernel describes its types.
    KernelBtf,
    /// A file system for pins.
    BpfFs,
    /// A cgroup v2 hierarchy.
    Cgroup,
    /// The kernel accepts the programs.
    Programs,
    /// `bpf_set_retval`: ECONNREFUSED where nothing is usable.
    Refusal,
    /// SO_NETNS_COOKIE: which sockets are the host's own.
    NetnsCookie,
    /// An iterator and what it needs.
    Iterator,
    /// The network namespaces of pods.
    Namespaces,
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Privilege => "privileges",
            Self::KernelBtf => "kernel BTF",
            Self::BpfFs => "bpffs",
            Self::Cgroup => "cgroup v2",
            Self::Programs => "eBPF programs",
            Self::Refusal => "refusals",
            Self::NetnsCookie => "network namespace cookies",
            Self::Iterator => "socket iterators",
            Self::Namespaces => "network namespaces of pods",
        })
    }
}

/// Something that is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// What.
    pub need: Need,
    /// The socket layer cannot do without it.
    pub is_required: bool,
    /// What was found, and what helps.
    pub text: String,
}

/// What this node offers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Release of the running kernel.
    pub kernel: String,
    /// The cgroup that would be served.
    pub cgroup: Option<PathBuf>,
    /// What is missing.
    pub missing: Vec<Missing>,
}

impl Report {
    /// Whether the socket layer can run here.
    pub fn is_usable(&self) -> bool {
        self.missing.iter().all(|missing| !missing.is_required)
    }

    fn note(&mut self, need: Need, is_required: bool, text: String) {
        self.missing.push(Missing {
            need,
            is_required,
            text,
        });
    }
}

/// Looks at this node. Attaches and pins nothing.
pub fn probe(bpf_dir: &Path, cgroup: Option<&Path>) -> Report {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut report = Report {
        kernel: kernel.trim().to_owned(),
        ..Report::default()
    };
    if let Err(error) = check_privileges() {
        report.note(Need::Privilege, true, error.to_string());
    } else if !has(effective_capabilities(), SYS_ADMIN) {
        let text = "the agent lacks CAP_SYS_ADMIN and cannot enter network namespaces: connected UDP sockets of pods go \
                    on to a removed backend until the client notices by itself"
            .to_owned();
        report.note(Need::Privilege, false, text);
    }
    if let Err(error) = KernelBtf::running() {
        report.note(Need::KernelBtf, true, error.to_string());
    }
    if let Err(error) = dir::check_writable(bpf_dir) {
        report.note(Need::BpfFs, true, error.to_string());
    }
    let root = cgroup.map_or_else(cgroup_root, |path| Ok(path.to_owned()));
    match root.and_then(|path| Cgroup::open(&path)) {
        Ok(cgroup) => report.cgroup = Some(cgroup.path().to_owned()),
        Err(error) => report.note(Need::Cgroup, true, error.to_string()),
    }
    if own_netns_cookie() == 0 {
        let text =
            "the kernel has no SO_NETNS_COOKIE (5.14); node ports on 127.0.0.1 are not served"
                .to_owned();
        report.note(Need::NetnsCookie, false, text);
    }
    if let Some(text) = hidden_namespaces() {
        report.note(Need::Namespaces, false, text);
    }
    // Without these the programs cannot be loaded anyway.
    if report.is_usable() {
        try_programs(&mut report);
    }
    report
}

fn try_programs(report: &mut Report) {
    let can_refuse = has_set_retval();
    if !can_refuse {
        let text = "the kernel has no bpf_set_retval for these hooks (5.18); connections to a Service without endpoints \
                    are left to the packet layer instead of being refused at once"
            .to_owned();
        report.note(Need::Refusal, false, text);
    }
    let constants = Constants {
        can_refuse,
        log: false,
    };
    let tried = Object::embedded(constants).and_then(|object| kernel::try_load(&object));
    match tried {
        Ok(left_out) => {
            for program in left_out {
                let text = format!("{}: {}", program.program, program.reason);
                report.note(Need::Iterator, false, text);
            }
        }
        Err(error) => report.note(Need::Programs, true, error.to_string()),
    }
}

const SYS_ADMIN: u32 = 21;

fn has(capabilities: u64, bit: u32) -> bool {
    capabilities >> bit & 1 == 1
}

/// The mask of this process; zero if it cannot be read.
fn effective_capabilities() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok())
        .unwrap_or(0)
}

/// Whether this process may load and attach programs at all.
///
/// # Errors
/// What it lacks.
pub fn check_privileges() -> Result<(), Error> {
    lacking(effective_capabilities()).map_or(Ok(()), |lacking| {
        Err(Error::Unusable(format!(
            "the agent lacks {lacking}; run it as root, or give it these capabilities"
        )))
    })
}

/// Names of the capabilities that are missing, if any. CAP_SYS_ADMIN stands for CAP_BPF and CAP_PERFMON.
fn lacking(capabilities: u64) -> Option<String> {
    const WANTED: [(u32, &str, bool); 3] = [
        (12, "CAP_NET_ADMIN", false),
        (38, "CAP_PERFMON", true),
        (39, "CAP_BPF", true),
    ];
    let lacking: Vec<&str> = WANTED
        .iter()
        .filter(|(bit, _, by_admin)| {
            !(has(capabilities, *bit) || *by_admin && has(capabilities, SYS_ADMIN))
        })
        .map(|(_, name, _)| *name)
        .collect();
    (!lacking.is_empty()).then(|| lacking.join(", "))
}

/// Where `ip netns` and container runtimes bind network namespaces.
pub const NAMED_NAMESPACES: &str = "/run/netns";

/// What follows, and helps, if the network namespaces of pods cannot be found from here.
pub fn hidden_namespaces() -> Option<String> {
    let processes = fs::metadata("/proc/self/ns/pid").ok()?.ino();
    hidden_from(processes, Path::new(NAMED_NAMESPACES))
}

/// Inode of the machine's first namespace of processes (PROC_PID_INIT_INO, include/linux/proc_ns.h).
const FIRST_PROCESSES: u64 = 0xEFFF_FFFC;

/// They have names, or are those of processes, which all are seen from the first namespace of them.
fn hidden_from(processes: u64, named: &Path) -> Option<String> {
    (processes != FIRST_PROCESSES && !named.is_dir()).then(|| {
        let named = named.display();
        format!(
            "{named} is not there: mount the node's, with propagation HostToContainer; connected UDP sockets of pods go on to \
             a removed backend until the client notices by itself"
        )
    })
}

/// Root of the cgroup v2 hierarchy, also where it is mounted beside v1 controllers.
///
/// # Errors
/// None is mounted.
pub fn cgroup_root() -> Result<PathBuf, Error> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut found = cgroups_in(&mounts).peekable();
    if found.peek().is_none() {
        return Err(Error::Unusable(
            "no cgroup v2 hierarchy is mounted; `mount -t cgroup2 none /sys/fs/cgroup/unified` mounts one beside v1, or boot \
             with systemd.unified_cgroup_hierarchy=1"
                .to_owned(),
        ));
    }
    found.find(|point| is_root(point)).ok_or_else(|| {
        Error::Unusable(
            "only a part of the node's cgroup v2 hierarchy is mounted here, the container's own: mount the host's \
             /sys/fs/cgroup into it, wherever you like, with the mounts below"
                .to_owned(),
        )
    })
}

/// Whether it is the root of the whole hierarchy, and not of a namespace's part of it: that has the first inode, as
/// `kernfs_create_root` (fs/kernfs/dir.c) makes its node first.
pub fn is_root(cgroup: &Path) -> bool {
    const ROOT: u64 = 1;
    let is_cgroup = statfs(cgroup).is_ok_and(|of| of.filesystem_type() == CGROUP2_SUPER_MAGIC);
    is_cgroup && fs::metadata(cgroup).is_ok_and(|root| root.ino() == ROOT)
}

/// Where cgroup v2 hierarchies, or parts of them, are mounted. mountinfo: id, parent, device, root, mount point, options,
/// optional fields, "-", type, source, options (proc_pid_mountinfo(5)).
fn cgroups_in(mounts: &str) -> impl Iterator<Item = PathBuf> {
    mounts.lines().filter_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let point = before.split(' ').nth(4)?;
        let is_cgroup = after.split(' ').next()? == "cgroup2";
        is_cgroup.then(|| PathBuf::from(point.replace("\\040", " ")))
    })
}

/// Cookie of the network namespace that the agent runs in; 0 when the kernel cannot tell.
pub fn own_netns_cookie() -> u64 {
    UnixDatagram::unbound()
        .and_then(sys::netns_cookie)
        .unwrap_or(0)
}

/// Whether connect hooks may call `bpf_set_retval` (v5.18, b44123b4a3dc).
pub fn has_set_retval() -> bool {
    const SET_RETVAL: i32 = 187;
    let insns = [
        sys::insn(0xb7, 1, -libc::ECONNREFUSED),
        sys::insn(0x85, 0, SET_RETVAL),
        sys::insn(0xb7, 0, 1),
        sys::insn(0x95, 0, 0),
    ];
    sys::prog_load(&sys::ProgSpec {
        name: "probe",
        prog_type: bpf_prog_type::BPF_PROG_TYPE_CGROUP_SOCK_ADDR as u32,
        attach_type: bpf_attach_type::BPF_CGROUP_INET4_CONNECT,
        attach_btf_id: 0,
        insns: &insns,
        license: c"GPL",
        debug: None,
    })
    .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_that_are_missing_are_named() {
        assert_eq!(lacking(1 << 12 | 1 << 38 | 1 << 39), None);
        assert_eq!(lacking(1 << 12 | 1 << SYS_ADMIN), None);
        assert_eq!(
            lacking(1 << 39).as_deref(),
            Some("CAP_NET_ADMIN, CAP_PERFMON")
        );
    }

    #[test]
    fn namespaces_of_pods_are_hidden_without_names_and_processes() {
        let (there, missing) = (Path::new("/proc"), Path::new("/proc/no-such-folder"));
        assert_eq!(hidden_from(FIRST_PROCESSES, missing), None);
        assert_eq!(hidden_from(1, there), None);
        let text = hidden_from(1, missing).unwrap();
        assert!(
            text.starts_with("/proc/no-such-folder is not there"),
            "{text}"
        );
    }

    #[test]
    fn cgroup_hierarchies_are_found_beside_v1_controllers() {
        let mounts = "\
24 30 0:22 / /proc rw - proc proc rw
31 24 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw
40 31 0:29 /pod /mnt/part rw shared:2 - cgroup2 cgroup2 rw
41 31 0:29 / /sys/fs/cgroup/unified rw,relatime shared:9 master:1 - cgroup2 cgroup2 rw
";
        let found: Vec<PathBuf> = cgroups_in(mounts).collect();
        assert_eq!(
            found,
            ["/mnt/part", "/sys/fs/cgroup/unified"].map(PathBuf::from)
        );
        assert!(cgroup_root().is_ok_and(|root| is_root(&root)));
        // Its first inode is another hierarchy's.
        assert!(!is_root(Path::new("/proc")));
    }
}
