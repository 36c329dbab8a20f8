//! BPF_DIR: one agent's pins. `links/<hook>` for ever, `abi-<version>-gen-<N>/<MAP or hook>` for each generation.
//!
//! Objects are opened by their pins only, never by id: that needs no CAP_SYS_ADMIN and never finds another agent's.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::statfs::statfs,
};

use super::{refused::refused, sys, tables::Fds};
use crate::backends::Error;

/// `BPF_FS_MAGIC`, `include/uapi/linux/magic.h`.
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// Ends the name of a pin that is about to take another one's place.
pub const BESIDE: &str = "_new";

/// The directory of pins.
pub struct Directory {
    path: PathBuf,
    /// Held while this lives. Close-on-exec, so that no child keeps it.
    _lock: Option<Flock<File>>,
}

impl Directory {
    /// Makes the directory if need be and takes its lock.
    ///
    /// # Errors
    /// It is not on a bpffs, may not be written, or another agent has it.
    pub fn lock(path: &Path) -> Result<Self, Error> {
        check_bpffs(path)?;
        fs::create_dir_all(path).map_err(|error| refused("create", path.display(), error))?;
        let handle = File::open(path).map_err(|error| refused("open", path.display(), error))?;
        match Flock::lock(handle, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self {
                path: path.to_owned(),
                _lock: Some(lock),
            }),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Err(Error::Unusable(format!(
                "another agent has {0}: one agent per directory; stop it (`fuser -v {0}` names it) or give this one \
                 its own --bpf-dir",
                path.display()
            ))),
            Err((_, errno)) => Err(refused("lock", path.display(), errno.into())),
        }
    }

    /// The directory as it is, without its lock: for reading only.
    ///
    /// # Errors
    /// There is none.
    pub fn look(path: &Path) -> Result<Self, Error> {
        if !path.is_dir() {
            check_bpffs(path)?;
            return Err(Error::Unusable(format!(
                "{} does not exist: no agent has run with this --bpf-dir",
                path.display()
            )));
        }
        Ok(Self {
            path: path.to_owned(),
            _lock: None,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Directory of the pinned links, made if need be. A link that an agent died over before it had its place is
    /// unpinned: it would run its program beside the one in place.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn links(&self) -> Result<PathBuf, Error> {
        let path = self.path.join("links");
        let failed = |error| refused("create", path.display(), error);
        fs::create_dir_all(&path).map_err(failed)?;
        for entry in fs::read_dir(&path).map_err(failed)? {
            let pin = entry.map_err(failed)?.path();
            if pin.to_string_lossy().ends_with(BESIDE) {
                fs::remove_file(&pin).map_err(|error| refused("remove", pin.display(), error))?;
            }
        }
        Ok(path)
    }

    /// Every generation, the newest last.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn generations(&self) -> Result<Vec<Generation>, Error> {
        let unreadable = |error| refused("read", self.path.display(), error);
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(unreadable)? {
            let path = entry.map_err(unreadable)?.path();
            found.extend(Generation::parse(path));
        }
        found.sort_by_key(|generation| (generation.number, generation.abi));
        Ok(found)
    }

    /// Makes the directory of generation `number`.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn create_generation(&self, abi: u32, number: u64) -> Result<Generation, Error> {
        let path = self.path.join(format!("abi-{abi}-gen-{number}"));
        fs::create_dir(&path).map_err(|error| refused("create", path.display(), error))?;
        Ok(Generation { abi, number, path })
    }
}

/// Whether pins can be kept at `path`.
///
/// # Errors
/// `path`, or the nearest directory above it that exists, is not on a bpffs.
pub fn check_bpffs(path: &Path) -> Result<(), Error> {
    let existing = existing(path);
    let stat =
        statfs(existing).map_err(|errno| refused("read", existing.display(), errno.into()))?;
    if stat.filesystem_type().0 as i64 & 0xffff_ffff == BPF_FS_MAGIC {
        return Ok(());
    }
    Err(Error::Unusable(format!(
        "cannot keep maps in {}: {} is not on a bpffs; run `mount -t bpf bpf /sys/fs/bpf`, or give a --bpf-dir below a \
         mounted one",
        path.display(),
        existing.display()
    )))
}

/// Whether pins can be kept at `path` by this process, which root alone does not say: profiles of AppArmor and SELinux forbid
/// it to containers.
///
/// # Errors
/// As [`check_bpffs`]; no directory can be made there.
pub fn check_writable(path: &Path) -> Result<(), Error> {
    check_bpffs(path)?;
    let trial = existing(path).join(format!("trial-{}", std::process::id()));
    let tried = fs::create_dir(&trial).and_then(|()| fs::remove_dir(&trial));
    tried.map_err(|error| {
        Error::Unusable(format!(
            "cannot keep maps in {}: making {} fails: {error}; is it mounted read-only, or has this container a profile of \
             AppArmor or SELinux? (deploy/base/daemonset.yaml has none)",
            path.display(),
            trial.display()
        ))
    })
}

/// The nearest directory of a path that there is.
fn existing(path: &Path) -> &Path {
    path.ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"))
}

/// One generation of maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generation {
    /// ABI of its maps, as the name says.
    pub abi: u32,
    /// Counts up.
    pub number: u64,
    /// Its directory.
    pub path: PathBuf,
}

impl Generation {
    fn parse(path: PathBuf) -> Option<Self> {
        let name = path.file_name()?.to_str()?;
        let (abi, number) = name.strip_prefix("abi-")?.split_once("-gen-")?;
        Some(Self {
            abi: abi.parse().ok()?,
            number: number.parse().ok()?,
            path,
        })
    }

    /// Where `name` is pinned. Names on a bpffs have no dots.
    pub fn pin_path(&self, name: &str) -> PathBuf {
        self.path
            .join(name.trim_start_matches('.').replace('.', "_"))
    }

    /// What is pinned as `name`, if it is a `kind`.
    pub fn open(&self, name: &str, kind: sys::Kind) -> Option<OwnedFd> {
        let object = sys::obj_get(&self.pin_path(name)).ok()?;
        (sys::kind_of(&object).ok()? == kind).then_some(object)
    }

    /// The maps among `names` that are pinned.
    pub fn open_maps<'a>(&self, names: impl Iterator<Item = &'a str>) -> Fds {
        let open = |name: &str| Some((name.to_owned(), self.open(name, sys::Kind::Map)?));
        names.filter_map(open).collect()
    }

    /// Names of everything pinned in it.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn pins(&self) -> Result<Vec<String>, Error> {
        let failed = |error| refused("read", self.path.display(), error);
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(failed)? {
            names.push(
                entry
                    .map_err(failed)?
                    .file_name()
                    .to_string_lossy()
                    .into_owned(),
            );
        }
        names.sort();
        Ok(names)
    }

    /// Pins `object` as `name`, in the place of what was there.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn pin(&self, name: &str, object: impl AsFd) -> Result<(), Error> {
        pin_over(&self.pin_path(name), object)
    }

    /// Unpins every object for which `is_ours`, and removes the directory if that empties it.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn remove(&self, is_ours: impl Fn(&str, &OwnedFd) -> bool) -> Result<(), Error> {
        let failed = |error| refused("remove", self.path.display(), error);
        let mut foreign = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            match sys::obj_get(&path) {
                Ok(object) if is_ours(&name, &object) => fs::remove_file(&path).map_err(failed)?,
                Ok(_) | Err(_) => foreign.push(name),
            }
        }
        if foreign.is_empty() {
            return fs::remove_dir(&self.path).map_err(failed);
        }
        tracing::warn!(
            directory = %self.path.display(),
            objects = foreign.join(", "),
            "objects that are not ours are left where they are"
        );
        Ok(())
    }
}

/// Pins `object` at `path`, atomically in the place of what was there.
///
/// # Errors
/// The kernel refused.
pub fn pin_over(path: &Path, object: impl AsFd) -> Result<(), Error> {
    let failed = |error| refused("pin", path.display(), error);
    match sys::obj_pin(object.as_fd(), path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        result => return result.map_err(failed),
    }
    let mut beside = path.as_os_str().to_owned();
    beside.push(BESIDE);
    let beside = PathBuf::from(beside);
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        Ok(()) | Err(_) => {}
    }
    sys::obj_pin(object.as_fd(), &beside).map_err(failed)?;
    fs::rename(&beside, path).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_outside_a_bpffs_is_refused_with_the_mount_command() {
        let plain = tempfile::tempdir().unwrap();
        let error = Directory::lock(&plain.path().join("agent"))
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("mount -t bpf bpf /sys/fs/bpf"), "{error}");
        assert!(!plain.path().join("agent").exists());
    }

    #[test]
    fn generations_are_recognised_by_their_directory_names() {
        let parse = |name: &str| Generation::parse(PathBuf::from("/x").join(name));
        let generation = parse("abi-2-gen-17").unwrap();
        assert_eq!((generation.abi, generation.number), (2, 17));
        assert_eq!(
            generation.pin_path(".rodata"),
            PathBuf::from("/x/abi-2-gen-17/rodata")
        );
        for other in ["links", "abi-2", "abi-x-gen-1", "abi-1-gen-"] {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
