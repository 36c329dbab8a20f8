//! The programs meet a generation of maps, and the hooks move to them.

use std::os::fd::OwnedFd;

use super::super::{
    dir::{Directory, Generation},
    links::{self, Attached, Cgroup, Hook},
    load::{LeftOut, Loaded, Object},
    sys,
    tables::Fds,
};
use crate::backends::Error;

/// Programs that the kernel accepted, not attached yet, and their constants.
pub struct Ready {
    loaded: Loaded,
    maps: Fds,
    new_constants: Vec<String>,
}

/// Loads the programs of `hooks` onto `fds`.
///
/// # Errors
/// The kernel refuses one; nothing has changed.
pub fn load(
    object: &Object,
    generation: &Generation,
    fds: &Fds,
    hooks: &[Hook],
) -> Result<Ready, Error> {
    let mut maps = Fds::new();
    let mut new_constants = Vec::new();
    for name in object.maps().keys() {
        let map = match object.constants(name) {
            Some(bytes) => match pinned_constants(generation, name, bytes) {
                Some(map) => map,
                None => {
                    new_constants.push(name.clone());
                    object.create_constants(name, bytes)?
                }
            },
            None => super::super::tables::handle(fds, name)?,
        };
        maps.insert(name.clone(), map);
    }
    Ok(Ready {
        loaded: object.load_some(&maps, hooks)?,
        maps,
        new_constants,
    })
}

/// What could not be loaded.
pub fn left_out(ready: Ready) -> Vec<LeftOut> {
    ready.loaded.left_out
}

/// Hooks that do not run a program pinned in `generation` on its maps.
///
/// # Errors
/// The kernel could not be read.
pub fn missing(
    dir: &Directory,
    generation: &Generation,
    cgroup: &Cgroup,
    fds: &Fds,
) -> Result<Vec<Hook>, Error> {
    let links = dir.links()?;
    let mut missing = Vec::new();
    for hook in Hook::ALL {
        if !links::is_in_place(&links, generation, hook, cgroup, fds)? {
            missing.push(hook);
        }
    }
    Ok(missing)
}

/// The pinned constants, if they are the same: the programs on them are then the same too.
fn pinned_constants(generation: &Generation, name: &str, bytes: &[u8]) -> Option<OwnedFd> {
    let map = generation.open(name, sys::Kind::Map)?;
    let mut pinned = vec![0; bytes.len()];
    let same_size = sys::map_info(&map).ok()?.value_size as usize == bytes.len();
    let read = same_size && sys::map_lookup(&map, &0_u32.to_ne_bytes(), &mut pinned).ok()?;
    (read && pinned == bytes).then_some(map)
}

/// Attaches or moves every hook, in the order of [`Hook::ALL`]; what this kernel cannot run is returned.
///
/// # Errors
/// The kernel refused; the hooks before are moved.
pub fn attach(
    dir: &Directory,
    generation: &Generation,
    cgroup: &Cgroup,
    ready: Ready,
) -> Result<Vec<LeftOut>, Error> {
    let Ready {
        loaded,
        maps,
        new_constants,
    } = ready;
    for name in &new_constants {
        generation.pin(name, &maps[name])?;
    }
    let links = dir.links()?;
    let Loaded {
        programs,
        mut left_out,
    } = loaded;
    for hook in Hook::ALL {
        let Some(program) = programs.get(&hook) else {
            continue;
        };
        match links::attach(&links, generation, hook, program, cgroup) {
            Ok(Attached::Kept) => {}
            Ok(how @ (Attached::Created | Attached::Moved)) => {
                tracing::debug!(hook = hook.name(), how = ?how, generation = generation.number, "hook attached");
            }
            Err(error) if hook.is_optional() => left_out.push(LeftOut {
                program: hook.name().to_owned(),
                reason: error.to_string(),
            }),
            Err(error) => return Err(error),
        }
    }
    Ok(left_out)
}
