//! The embedded object: its maps as specifications, its programs relocated and loaded onto maps that somebody else made.
//!
//! aya's own loader creates every map by itself and parses the kernel's BTF into 38 MB; a generation swap needs neither, so
//! only aya's object parser and its relocations are used.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    hash::{DefaultHasher, Hash, Hasher},
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use aya_obj::{
    EbpfSectionKind, Function,
    generated::{bpf_attach_type, bpf_prog_type},
};

use super::{
    kfuncs::{KernelBtf, resolve_calls},
    links::{Hook, Place},
    refused::refused,
    sys::{self, MapSpec},
    tables::Fds,
};
use crate::backends::Error;

/// The object that `build.rs` found; empty when there was none.
const EMBEDDED: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/programs.o"));

/// Lines of the verifier's log that are shown.
const LOG_LINES: usize = 20;

/// A program that this kernel cannot run, and why the agent does without it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOut {
    /// Name of the program.
    pub program: String,
    /// What is missing, and what that costs.
    pub reason: String,
}

/// What the programs are told at load: constants, so that the verifier removes the branches that they rule out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Constants {
    /// The kernel has `bpf_set_retval` (v5.18).
    pub can_refuse: bool,
    /// Debug lines through aya-log; costs 85 ns for each.
    pub log: bool,
}

/// Programs, loaded.
pub struct Loaded {
    /// By hook.
    pub programs: BTreeMap<Hook, OwnedFd>,
    /// Those that this kernel cannot run.
    pub left_out: Vec<LeftOut>,
}

/// A parsed object.
pub struct Object {
    parsed: aya_obj::Object,
    specs: BTreeMap<String, MapSpec>,
    kernel: &'static KernelBtf,
    btf: Option<OwnedFd>,
    digest: u64,
}

impl Object {
    /// The programs inside this agent.
    ///
    /// # Errors
    /// It was built without, or the kernel has no BTF.
    pub fn embedded(constants: Constants) -> Result<Self, Error> {
        if EMBEDDED.is_empty() {
            return Err(Error::Unusable(
                "this agent was built without the eBPF programs; build it by `cargo xtask build`"
                    .to_owned(),
            ));
        }
        Self::parse(EMBEDDED, constants)
    }

    /// Parses an object and tells the kernel its BTF.
    ///
    /// # Errors
    /// It is none, or the kernel has no BTF.
    pub fn parse(object: &[u8], constants: Constants) -> Result<Self, Error> {
        let broken = |error: &dyn std::fmt::Display| {
            Error::Unusable(format!("the embedded eBPF object cannot be used: {error}"))
        };
        let mut parsed = aya_obj::Object::parse(object).map_err(|error| broken(&error))?;
        let kernel = KernelBtf::running()?;
        patch_globals(&mut parsed, constants, kernel).map_err(|error| broken(&error))?;
        let features = aya::features().btf();
        let btf = match features.map(|features| parsed.fixup_and_sanitize_btf(features)) {
            None => None,
            Some(btf) => btf
                .map_err(|error| broken(&error))?
                .map(|btf| btf.to_bytes()),
        };
        let btf = btf.map(|btf| sys::btf_load(&btf)).transpose();
        let btf = btf.map_err(|error| refused("load", "the BTF of the eBPF programs", error))?;
        let specs = parsed
            .maps
            .iter()
            .map(|(name, map)| (name.clone(), spec(name, map)))
            .collect();
        let digest = digest(object, &parsed);
        Ok(Self {
            parsed,
            specs,
            kernel,
            btf,
            digest,
        })
    }

    /// Every map that the programs name, by name.
    pub fn maps(&self) -> &BTreeMap<String, MapSpec> {
        &self.specs
    }

    /// Creates a map of the object with `entries` entries, empty.
    ///
    /// # Errors
    /// The kernel refused; there is no such map.
    pub fn create(&self, name: &str, entries: u32) -> Result<OwnedFd, Error> {
        let spec = self.specs.get(name).ok_or_else(|| {
            Error::Unusable(format!("the embedded eBPF object has no map {name}"))
        })?;
        let spec = MapSpec {
            max_entries: entries,
            ..spec.clone()
        };
        let btf = self
            .btf
            .as_ref()
            .map(AsFd::as_fd)
            .filter(|_| spec.btf_types != (0, 0));
        sys::map_create(&spec, None, btf).map_err(|error| {
            refused(
                "create",
                format_args!("map {name} with {entries} entries"),
                error,
            )
        })
    }

    /// Bytes of a section of constants; `None` for other maps.
    pub fn constants(&self, name: &str) -> Option<&[u8]> {
        let map = self.parsed.maps.get(name)?;
        (map.section_kind() == EbpfSectionKind::Rodata).then(|| map.data())
    }

    /// Creates the map of a section of constants: filled and frozen.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn create_constants(&self, name: &str, bytes: &[u8]) -> Result<OwnedFd, Error> {
        let map = self.create(name, 1)?;
        sys::map_update(&map, &0_u32.to_ne_bytes(), bytes)
            .and_then(|()| sys::map_freeze(&map))
            .map_err(|error| refused("fill", format_args!("map {name}"), error))?;
        Ok(map)
    }

    /// Digest of the programs and of their constants.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// Relocates the programs onto `maps` and loads them.
    ///
    /// # Errors
    /// The kernel refuses one that the socket layer needs.
    pub fn load(&self, maps: &Fds) -> Result<Loaded, Error> {
        self.load_some(maps, &[&Hook::ALL[..], &[Hook::BindUdp]].concat())
    }

    /// [`Object::load`], for the programs of `hooks` only.
    ///
    /// # Errors
    /// As there.
    pub fn load_some(&self, maps: &Fds, hooks: &[Hook]) -> Result<Loaded, Error> {
        let mut object = self.parsed.clone();
        let broken = |error: aya_obj::relocation::EbpfRelocationError| {
            Error::Unusable(format!(
                "the embedded eBPF object cannot be relocated: {error}"
            ))
        };
        let text: HashSet<usize> = object
            .functions
            .keys()
            .map(|(section, _)| *section)
            .collect();
        let fds = self
            .parsed
            .maps
            .iter()
            .filter_map(|(name, map)| Some((name.as_str(), maps.get(name)?.as_raw_fd(), map)));
        object.relocate_maps(fds, &text).map_err(broken)?;
        object.relocate_calls(&text).map_err(broken)?;
        let mut loaded = Loaded {
            programs: BTreeMap::new(),
            left_out: Vec::new(),
        };
        for &hook in hooks {
            let Some(program) = object.programs.get(hook.name()) else {
                loaded.left_out.push(left_out(
                    hook,
                    "this agent's object does not have it".to_owned(),
                ));
                continue;
            };
            let Some(function) = object.functions.get_mut(&program.function_key()) else {
                continue;
            };
            match self.load_one(hook, function, &program.license) {
                Ok(fd) => drop(loaded.programs.insert(hook, fd)),
                Err(Refusal::Missing(what)) if hook.is_optional() => {
                    loaded.left_out.push(left_out(hook, what));
                }
                Err(Refusal::Verifier(Error::Verifier { reason, log, .. }))
                    if hook.is_optional() =>
                {
                    let line = log
                        .lines()
                        .rev()
                        .find(|line| !line.starts_with("processed"))
                        .unwrap_or("");
                    loaded.left_out.push(left_out(
                        hook,
                        format!("the kernel refuses it: {reason}; {line}"),
                    ));
                }
                Err(Refusal::Verifier(error)) => return Err(error),
                Err(Refusal::Missing(what)) => return Err(Error::Unusable(what)),
            }
        }
        Ok(loaded)
    }

    fn load_one(
        &self,
        hook: Hook,
        function: &mut Function,
        license: &std::ffi::CStr,
    ) -> Result<OwnedFd, Refusal> {
        resolve_calls(&mut function.instructions, self.kernel)
            .map_err(|name| Refusal::Missing(format!("the kernel does not have {name}")))?;
        let (prog_type, attach_type, attach_btf_id) = match hook.place() {
            Place::Cgroup(hook @ bpf_attach_type::BPF_CGROUP_INET_SOCK_RELEASE) => {
                (bpf_prog_type::BPF_PROG_TYPE_CGROUP_SOCK, hook, 0)
            }
            Place::Cgroup(hook) => (bpf_prog_type::BPF_PROG_TYPE_CGROUP_SOCK_ADDR, hook, 0),
            Place::Iterator(target) => {
                let id = self.kernel.iterator(target).ok_or_else(|| {
                    Refusal::Missing(format!("the kernel does not have the iterator {target}"))
                })?;
                (
                    bpf_prog_type::BPF_PROG_TYPE_TRACING,
                    bpf_attach_type::BPF_TRACE_ITER,
                    id,
                )
            }
        };
        let functions = function.func_info.func_info_bytes();
        let lines = function.line_info.line_info_bytes();
        let debug = self.btf.as_ref().map(|btf| sys::Debug {
            btf: btf.as_fd(),
            functions: (&functions, function.func_info_rec_size),
            lines: (&lines, function.line_info_rec_size),
        });
        let spec = sys::ProgSpec {
            name: hook.name(),
            prog_type: prog_type as u32,
            attach_type,
            attach_btf_id,
            insns: &function.instructions,
            license,
            debug,
        };
        sys::prog_load(&spec).map_err(|(error, log)| {
            Refusal::Verifier(if log.trim().is_empty() {
                refused("load", format_args!("program {}", hook.name()), error)
            } else {
                Error::Verifier {
                    program: hook.name().to_owned(),
                    reason: error.to_string(),
                    log: tail(&log),
                }
            })
        })
    }
}

/// Not zero, which stands for "unknown". Another compiler may hash differently: the programs are loaded once more then.
fn digest(object: &[u8], parsed: &aya_obj::Object) -> u64 {
    let mut hasher = DefaultHasher::new();
    object.hash(&mut hasher);
    let constants: BTreeMap<_, _> = parsed
        .maps
        .iter()
        .map(|(name, map)| (name, map.data()))
        .collect();
    constants.hash(&mut hasher);
    hasher.finish() | 1
}

enum Refusal {
    Missing(String),
    Verifier(Error),
}

fn left_out(hook: Hook, what: String) -> LeftOut {
    let cost = match hook {
        Hook::KillDead => {
            "; connected UDP sockets of a removed backend go on until the client notices by itself"
        }
        Hook::BindUdp => {
            "; connected UDP sockets get an error after a repair that could not keep the indices"
        }
        Hook::ListTcp | Hook::ListUdp => "; `dump sockets` does not show all",
        Hook::SockRelease
        | Hook::GetPeerName4
        | Hook::GetPeerName6
        | Hook::RecvMsg4
        | Hook::RecvMsg6
        | Hook::SendMsg4
        | Hook::SendMsg6
        | Hook::Connect4
        | Hook::Connect6 => "",
    };
    LeftOut {
        program: hook.name().to_owned(),
        reason: format!("{what}{cost}"),
    }
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}

fn spec(name: &str, map: &aya_obj::Map) -> MapSpec {
    let btf_types = match map {
        // Socket storage is refused without them; other maps need none.
        aya_obj::Map::Btf(map) => (map.def.btf_key_type_id, map.def.btf_value_type_id),
        aya_obj::Map::Legacy(_) => (0, 0),
    };
    MapSpec {
        name: name.to_owned(),
        map_type: map.map_type(),
        key_size: map.key_size(),
        value_size: map.value_size(),
        max_entries: map.max_entries(),
        flags: map.map_flags(),
        btf_types,
    }
}

fn patch_globals(
    object: &mut aya_obj::Object,
    constants: Constants,
    kernel: &KernelBtf,
) -> Result<(), aya_obj::ParseError> {
    let can_refuse = u32::from(constants.can_refuse).to_ne_bytes();
    // aya-log's levels: 0 = off, 4 = debug.
    let log_level = [if constants.log { 4_u8 } else { 0 }];
    let offsets = [
        ("SKC_DADDR_OFFSET", "skc_daddr"),
        ("SKC_DPORT_OFFSET", "skc_dport"),
        ("SKC_FAMILY_OFFSET", "skc_family"),
        ("SKC_V6_DADDR_OFFSET", "skc_v6_daddr"),
    ]
    .map(|(global, member)| (global, kernel.member_offset(member).map(u32::to_ne_bytes)));
    let mut globals: HashMap<&str, (&[u8], bool)> = HashMap::from([
        ("CAN_REFUSE", (&can_refuse[..], false)),
        ("AYA_LOG_LEVEL", (&log_level[..], false)),
    ]);
    for (global, offset) in &offsets {
        globals.extend(
            offset
                .as_ref()
                .map(|offset| (*global, (&offset[..], false))),
        );
    }
    object.patch_map_data(globals)
}

#[cfg(test)]
mod tests;
