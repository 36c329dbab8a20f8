//! The hooks: which programs run where, in which order they change, and their pinned links.

use std::{
    fs::{self, File},
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use aya_obj::generated::{bpf_attach_type, bpf_link_info, bpf_link_type};

use super::{
    dir::{Generation, pin_over},
    refused::refused,
    sys,
    tables::Fds,
};
use crate::backends::Error;

/// One place in the kernel where a program of ours runs, and the name of that program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hook {
    /// A socket is closed.
    SockRelease,
    /// getpeername() on an IPv4 socket.
    GetPeerName4,
    /// getpeername() on an IPv6 socket.
    GetPeerName6,
    /// recvmsg() on an IPv4 socket.
    RecvMsg4,
    /// recvmsg() on an IPv6 socket.
    RecvMsg6,
    /// Lists the translated TCP sockets of the reader's network namespace; read by `dump`.
    ListTcp,
    /// Lists the translated UDP sockets of the reader's network namespace; read by `dump`.
    ListUdp,
    /// Destroys the connected UDP sockets, of the reader's network namespace, whose backend is dead.
    KillDead,
    /// Leads the UDP sockets of the reader's network namespace to their members after a repair that lost the indices. Attached
    /// only then, for one reading of each namespace.
    BindUdp,
    /// sendmsg() on an IPv4 socket.
    SendMsg4,
    /// sendmsg() on an IPv6 socket.
    SendMsg6,
    /// connect() on an IPv4 socket.
    Connect4,
    /// connect() on an IPv6 socket.
    Connect6,
}

/// Where a hook is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A hook of the node's cgroup.
    Cgroup(bpf_attach_type),
    /// The iterator of this name: "tcp", "udp".
    Iterator(&'static str),
}

impl Hook {
    /// Those that stay attached, in the order in which they are attached or moved: whoever undoes a translation is there before whoever makes it.
    pub const ALL: [Self; 12] = [
        Self::SockRelease,
        Self::GetPeerName4,
        Self::GetPeerName6,
        Self::RecvMsg4,
        Self::RecvMsg6,
        Self::ListTcp,
        Self::ListUdp,
        Self::KillDead,
        Self::SendMsg4,
        Self::SendMsg6,
        Self::Connect4,
        Self::Connect6,
    ];

    /// Name of the program and of the pinned link.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SockRelease => "sock_release",
            Self::GetPeerName4 => "getpeername4",
            Self::GetPeerName6 => "getpeername6",
            Self::RecvMsg4 => "recvmsg4",
            Self::RecvMsg6 => "recvmsg6",
            Self::ListTcp => "list_tcp",
            Self::ListUdp => "list_udp",
            Self::KillDead => "kill_dead",
            Self::BindUdp => "bind_udp",
            Self::SendMsg4 => "sendmsg4",
            Self::SendMsg6 => "sendmsg6",
            Self::Connect4 => "connect4",
            Self::Connect6 => "connect6",
        }
    }

    /// Where it is attached.
    pub const fn place(self) -> Place {
        match self {
            Self::SockRelease => Place::Cgroup(bpf_attach_type::BPF_CGROUP_INET_SOCK_RELEASE),
            Self::GetPeerName4 => Place::Cgroup(bpf_attach_type::BPF_CGROUP_INET4_GETPEERNAME),
            Self::GetPeerName6 => Place::Cgroup(bpf_attach_type::BPF_CGROUP_INET6_GETPEERNAME),
            Self::RecvMsg4 => Place::Cgroup(bpf_attach_type::BPF_CGROUP_UDP4_RECVMSG),
            Self::RecvMsg6 => Place::Cgroup(bpf_attach_type::BPF_CGROUP_UDP6_RECVMSG),
            Self::ListTcp => Place::Iterator("tcp"),
            Self::ListUdp | Self::KillDead | Self::BindUdp => Place::Iterator("udp"),
            Self::SendMsg4 => Place::Cgroup(bpf_attach_type::BPF_CGROUP_UDP4_SENDMSG),
            Self::SendMsg6 => Place::Cgroup(bpf_attach_type::BPF_CGROUP_UDP6_SENDMSG),
            Self::Connect4 => Place::Cgroup(bpf_attach_type::BPF_CGROUP_INET4_CONNECT),
            Self::Connect6 => Place::Cgroup(bpf_attach_type::BPF_CGROUP_INET6_CONNECT),
        }
    }

    /// Whether the socket layer can do without it.
    pub const fn is_optional(self) -> bool {
        matches!(self.place(), Place::Iterator(_))
    }
}

/// The cgroup that the hooks are attached to.
pub struct Cgroup {
    handle: File,
    path: PathBuf,
    id: u64,
}

/// `CGROUP2_SUPER_MAGIC`, `include/uapi/linux/magic.h`.
const CGROUP2_MAGIC: i64 = 0x6367_7270;

impl Cgroup {
    /// Opens a directory of a cgroup v2 hierarchy.
    ///
    /// # Errors
    /// It is none.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let failed = |error| refused("open cgroup", path.display(), error);
        let handle = File::open(path).map_err(failed)?;
        let stat = nix::sys::statfs::fstatfs(&handle).map_err(|errno| failed(errno.into()))?;
        if stat.filesystem_type().0 as i64 & 0xffff_ffff != CGROUP2_MAGIC {
            return Err(Error::Unusable(format!(
                "{} is not in a cgroup v2 hierarchy; `mount -t cgroup2 none DIR` makes one, --cgroup DIR names it",
                path.display()
            )));
        }
        // The inode number of a cgroup's directory is its id (kernfs, 64-bit since v5.5).
        let id = std::os::unix::fs::MetadataExt::ino(&handle.metadata().map_err(failed)?);
        Ok(Self {
            handle,
            path: path.to_owned(),
            id,
        })
    }

    /// Its id.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// What [`attach`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attached {
    /// The very same program on the same maps was there already.
    Kept,
    /// A new link.
    Created,
    /// The program of the pinned link was replaced, atomically.
    Moved,
}

/// Makes `hook` run `program`, and pins the program in `generation`.
///
/// # Errors
/// The kernel refused, or something that is no link is pinned in the link's place.
pub fn attach(
    links: &Path,
    generation: &Generation,
    hook: Hook,
    program: &OwnedFd,
    cgroup: &Cgroup,
) -> Result<Attached, Error> {
    let path = links.join(hook.name());
    let object = || format!("hook {} on {}", hook.name(), cgroup.path.display());
    let failed = |error| refused("attach", object(), error);
    let existing = existing_link(&path)?;
    let usable = match &existing {
        Some(link) => serves(link, hook, cgroup).map_err(failed)?,
        None => false,
    };
    let outcome = match existing {
        Some(link) if usable => {
            let attached = sys::link_info(&link).map_err(failed)?.prog_id;
            if is_same_program(generation, hook, attached, program).map_err(failed)? {
                return Ok(Attached::Kept);
            }
            sys::link_update(&link, program).map_err(failed)?;
            Attached::Moved
        }
        Some(_) | None => {
            let link = match hook.place() {
                Place::Cgroup(hook) => sys::link_create(program, &cgroup.handle, hook),
                Place::Iterator(_) => sys::iter_link(program),
            };
            pin_over(&path, link.map_err(failed)?)?;
            Attached::Created
        }
    };
    generation.pin(hook.name(), program)?;
    Ok(outcome)
}

fn existing_link(path: &Path) -> Result<Option<OwnedFd>, Error> {
    let object = match sys::obj_get(path) {
        Ok(object) => object,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(refused("open", path.display(), error)),
    };
    match sys::kind_of(&object) {
        Ok(sys::Kind::Link) => Ok(Some(object)),
        Ok(sys::Kind::Map | sys::Kind::Program) | Err(_) => Err(Error::Unusable(format!(
            "{} is not a link and not ours; remove it, the agent then attaches the hook again",
            path.display()
        ))),
    }
}

/// Whether `link` is attached where `hook` wants it: a link outlives its cgroup, and --cgroup may have changed.
fn serves(link: &OwnedFd, hook: Hook, cgroup: &Cgroup) -> io::Result<bool> {
    let info = sys::link_info(link)?;
    Ok(match hook.place() {
        Place::Cgroup(hook) => {
            info.type_ == bpf_link_type::BPF_LINK_TYPE_CGROUP as u32
                && sys::cgroup_of(&info) == (cgroup.id, hook as u32)
        }
        Place::Iterator(_) => info.type_ == bpf_link_type::BPF_LINK_TYPE_ITER as u32,
    })
}

/// Whether the attached program is the one pinned in this generation, and does what `program` does on the same maps.
fn is_same_program(
    generation: &Generation,
    hook: Hook,
    attached: u32,
    program: &OwnedFd,
) -> io::Result<bool> {
    let Some(pinned) = generation.open(hook.name(), sys::Kind::Program) else {
        return Ok(false);
    };
    let (pinned, pinned_maps) = sys::prog_info(&pinned)?;
    let (wanted, wanted_maps) = sys::prog_info(program)?;
    Ok(pinned.id == attached && pinned.tag == wanted.tag && pinned_maps == wanted_maps)
}

/// Whether `hook` is attached where it should be and runs the program that is pinned in `generation`, on `maps`.
///
/// # Errors
/// The kernel could not be read.
pub fn is_in_place(
    links: &Path,
    generation: &Generation,
    hook: Hook,
    cgroup: &Cgroup,
    maps: &Fds,
) -> Result<bool, Error> {
    let failed = |error| refused("read", format_args!("hook {}", hook.name()), error);
    let Some((link, info)) = pinned_link(links, hook)? else {
        return Ok(false);
    };
    let Some(program) = generation.open(hook.name(), sys::Kind::Program) else {
        return Ok(false);
    };
    let (program, used) = sys::prog_info(&program).map_err(failed)?;
    if info.prog_id != program.id || !serves(&link, hook, cgroup).map_err(failed)? {
        return Ok(false);
    }
    let mut own = Vec::new();
    for map in maps.values() {
        own.push(sys::map_info(map).map_err(failed)?.id);
    }
    for name in generation
        .pins()?
        .iter()
        .filter(|name| name.starts_with("rodata"))
    {
        let constants = generation.open(name, sys::Kind::Map);
        own.extend(
            constants
                .map(sys::map_info)
                .transpose()
                .map_err(failed)?
                .map(|info| info.id),
        );
    }
    Ok(used.iter().all(|id| own.contains(id)))
}

/// Whether every pinned link runs the program that is pinned in `generation`.
///
/// # Errors
/// The kernel could not be read.
pub fn all_belong_to(links: &Path, generation: &Generation) -> Result<bool, Error> {
    for hook in Hook::ALL {
        let path = links.join(hook.name());
        let failed = |error| refused("read", path.display(), error);
        let Some(link) = existing_link(&path)? else {
            continue;
        };
        let attached = sys::link_info(&link).map_err(failed)?.prog_id;
        let pinned = generation.open(hook.name(), sys::Kind::Program);
        let pinned = pinned.map(sys::prog_info).transpose().map_err(failed)?;
        if pinned.is_none_or(|(pinned, _)| pinned.id != attached) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What is pinned as a hook's link.
///
/// # Errors
/// The kernel could not be read.
pub fn pinned_link(links: &Path, hook: Hook) -> Result<Option<(OwnedFd, bpf_link_info)>, Error> {
    let path = links.join(hook.name());
    let Some(link) = existing_link(&path)? else {
        return Ok(None);
    };
    let info = sys::link_info(&link).map_err(|error| refused("read", path.display(), error))?;
    Ok(Some((link, info)))
}

/// Detaches every hook: those that translate first, those that undo translations last.
///
/// # Errors
/// The kernel refused; the hooks before it are gone.
pub fn detach_all(links: &Path) -> Result<(), Error> {
    let is_attached = |hook: &Hook| links.join(hook.name()).exists();
    if TRANSLATING.iter().any(is_attached) {
        detach_translating(links)?;
        thread::sleep(ANSWERS);
    }
    for hook in Hook::ALL.into_iter().rev().chain([Hook::BindUdp]) {
        detach(links, hook)?;
    }
    match fs::remove_dir(links) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(refused("remove", links.display(), error))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Answers to datagrams that were translated before come within this time: their senders are still shown as the Service's.
const ANSWERS: Duration = Duration::from_secs(1);

/// The hooks that translate.
pub const TRANSLATING: [Hook; 4] = [
    Hook::Connect6,
    Hook::Connect4,
    Hook::SendMsg6,
    Hook::SendMsg4,
];

/// Detaches the hooks that translate: connect and sendmsg.
///
/// # Errors
/// The kernel refused; the hooks before it are gone.
pub fn detach_translating(links: &Path) -> Result<(), Error> {
    TRANSLATING
        .into_iter()
        .try_for_each(|hook| detach(links, hook))
}

fn detach(links: &Path, hook: Hook) -> Result<(), Error> {
    let path = links.join(hook.name());
    let Some(link) = existing_link(&path)? else {
        return Ok(());
    };
    if let Place::Cgroup(_) = hook.place() {
        sys::link_detach(&link).map_err(|error| refused("detach", path.display(), error))?;
    }
    fs::remove_file(&path).map_err(|error| refused("remove", path.display(), error))
}
