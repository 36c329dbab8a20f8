//! What the running kernel calls things: functions and struct members by its BTF, and the calls of kernel functions in our
//! programs turned into what the verifier wants.
//!
//! rustc emits no declaration of a kernel function that the kernel would take (aya#432), so a program calls a helper number
//! that does not exist, and its calls are rewritten before the load (`reference`: v5.13, e6ac2450d6de).

use std::{collections::BTreeMap, fs, path::Path, sync::OnceLock};

use aya_obj::generated::bpf_insn;

use super::links::{Hook, Place};
use crate::backends::Error;

/// Where the kernel shows its BTF.
pub const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

/// First placeholder; the kernel has a few hundred helpers.
const PLACEHOLDERS: i32 = 0x6b66_0000;
/// `BPF_JMP | BPF_CALL`.
const CALL: u8 = 0x85;
/// `BPF_PSEUDO_KFUNC_CALL`, `include/uapi/linux/bpf.h`.
const PSEUDO_KFUNC_CALL: u8 = 2;

/// Kernel functions that the programs call, by placeholder.
const FUNCTIONS: [(i32, &str); 1] = [(PLACEHOLDERS + 1, "bpf_sock_destroy")];

/// The struct whose members the programs read, and those.
const STRUCTURE: &str = "sock_common";
const MEMBERS: [&str; 4] = ["skc_daddr", "skc_dport", "skc_family", "skc_v6_daddr"];

/// What the programs need of the kernel's BTF, whose megabytes are read once and dropped. Not parsed by aya, which needs
/// 38 MB for it.
pub struct KernelBtf {
    /// Ids of functions, those that there are.
    functions: BTreeMap<String, u32>,
    /// Byte offsets in [`STRUCTURE`], those that there are.
    offsets: BTreeMap<&'static str, u32>,
}

/// The kernel's BTF, as it is read.
struct Raw<'a> {
    types: &'a [u8],
    strings: &'a [u8],
}

const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_FUNC: u32 = 12;

/// One type of the kernel's BTF.
struct Type<'a> {
    id: u32,
    name: u32,
    kind: u32,
    has_bitfields: bool,
    members: &'a [u8],
}

impl KernelBtf {
    /// The running kernel's.
    ///
    /// # Errors
    /// The kernel has none, or it cannot be read.
    pub fn running() -> Result<&'static Self, Error> {
        static RUNNING: OnceLock<KernelBtf> = OnceLock::new();
        if let Some(known) = RUNNING.get() {
            return Ok(known);
        }
        let data = fs::read(Path::new(KERNEL_BTF)).map_err(|error| {
            Error::Unusable(format!(
                "cannot read {KERNEL_BTF}: {error}; the eBPF programs need a kernel built with CONFIG_DEBUG_INFO_BTF"
            ))
        })?;
        let found = Raw::parse(&data)
            .ok_or_else(|| Error::Unusable(format!("{KERNEL_BTF} is not BTF of version 1")))?;
        Ok(RUNNING.get_or_init(|| Self::of(&found)))
    }

    fn of(raw: &Raw<'_>) -> Self {
        let called = FUNCTIONS.iter().map(|(_, name)| (*name).to_owned());
        let hooks = Hook::ALL.into_iter().chain([Hook::BindUdp]);
        let iterators = hooks.filter_map(|hook| match hook.place() {
            Place::Iterator(target) => Some(iterator(target)),
            Place::Cgroup(_) => None,
        });
        let functions = called.chain(iterators);
        let offset = |member| Some((member, raw.member_offset(STRUCTURE, member)?));
        Self {
            functions: functions
                .filter_map(|name| raw.function(&name).map(|id| (name, id)))
                .collect(),
            offsets: MEMBERS.into_iter().filter_map(offset).collect(),
        }
    }

    /// Id of a function that the programs call.
    pub fn function(&self, name: &str) -> Option<u32> {
        self.functions.get(name).copied()
    }

    /// Id of the function that stands for an iterator over what `target` names.
    pub fn iterator(&self, target: &str) -> Option<u32> {
        self.function(&iterator(target))
    }

    /// Byte offset of a member of `struct sock_common` that the programs read, also of one in an unnamed struct or union
    /// inside.
    pub fn member_offset(&self, member: &str) -> Option<u32> {
        self.offsets.get(member).copied()
    }
}

fn iterator(target: &str) -> String {
    format!("bpf_iter_{target}")
}

impl<'a> Raw<'a> {
    fn parse(data: &'a [u8]) -> Option<Self> {
        // struct btf_header: magic, version, flags, hdr_len, then offset and length of types and strings.
        if data.get(..3)? != [0xeb9f_u16.to_ne_bytes()[0], 0xeb9f_u16.to_ne_bytes()[1], 1] {
            return None;
        }
        let word = |at: usize| Some(u32_at(data, at)? as usize);
        let body = word(4)?;
        let section = |offset: usize, len: usize| data.get(body + offset..body + offset + len);
        Some(Self {
            types: section(word(8)?, word(12)?)?,
            strings: section(word(16)?, word(20)?)?,
        })
    }

    fn types(&self) -> impl Iterator<Item = Type<'_>> {
        let mut rest = self.types;
        let mut id = 0;
        std::iter::from_fn(move || {
            let name = u32_at(rest, 0)?;
            let word = u32_at(rest, 4)?;
            let (kind, count) = (word >> 24 & 0x1f, (word & 0xffff) as usize);
            // Bytes that follow the common twelve: Documentation/bpf/btf.rst.
            let extra = match kind {
                1 | 14 | 17 => 4,
                3 => 12,
                KIND_STRUCT | KIND_UNION | 15 | 19 => 12 * count,
                6 | 13 => 8 * count,
                _ => 0,
            };
            let members = rest.get(12..12 + extra)?;
            rest = &rest[12 + extra..];
            id += 1;
            Some(Type {
                id,
                name,
                kind,
                has_bitfields: word >> 31 == 1,
                members,
            })
        })
    }

    fn name_is(&self, name: u32, wanted: &str) -> bool {
        self.strings
            .get(name as usize..)
            .and_then(|text| text.strip_prefix(wanted.as_bytes()))
            .is_some_and(|rest| rest.first() == Some(&0))
    }

    fn function(&self, name: &str) -> Option<u32> {
        self.types()
            .find(|it| it.kind == KIND_FUNC && self.name_is(it.name, name))
            .map(|it| it.id)
    }

    fn member_offset(&self, structure: &str, member: &str) -> Option<u32> {
        let bits = self
            .types()
            .filter(|it| it.kind == KIND_STRUCT && self.name_is(it.name, structure))
            .find_map(|it| self.offset_in(&it, member, 4))?;
        Some(bits / 8)
    }

    fn offset_in(&self, structure: &Type<'_>, wanted: &str, depth: u32) -> Option<u32> {
        structure.members.chunks_exact(12).find_map(|member| {
            let (name, id, offset) = (u32_at(member, 0)?, u32_at(member, 4)?, u32_at(member, 8)?);
            let offset = if structure.has_bitfields {
                offset & 0xff_ffff
            } else {
                offset
            };
            if self.name_is(name, wanted) {
                return Some(offset);
            }
            let is_unnamed = self.name_is(name, "");
            let inside =
                (is_unnamed && depth > 0).then(|| self.types().find(|it| it.id == id))??;
            Some(offset + self.offset_in(&inside, wanted, depth - 1)?)
        })
    }
}

fn u32_at(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(data.get(at..at + 4)?.try_into().ok()?))
}

/// Turns the calls of placeholders into calls of kernel functions.
///
/// # Errors
/// The name of a function that this kernel lacks.
pub fn resolve_calls(instructions: &mut [bpf_insn], btf: &KernelBtf) -> Result<(), &'static str> {
    for instruction in instructions {
        if instruction.code != CALL || instruction.src_reg() != 0 {
            continue;
        }
        let Some((_, name)) = FUNCTIONS.iter().find(|(imm, _)| *imm == instruction.imm) else {
            continue;
        };
        instruction.imm = btf.function(name).ok_or(*name)? as i32;
        instruction.set_src_reg(PSEUDO_KFUNC_CALL);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct outer { int a; union { int b; struct { int c; int d; }; }; }` and `void f()`.
    fn example() -> Vec<u8> {
        let strings = b"\0outer\0a\0b\0c\0d\0f\0int\0";
        let name = |text: &str| {
            let bytes = format!("\0{text}\0").into_bytes();
            (strings
                .windows(bytes.len())
                .position(|at| at == bytes)
                .unwrap()
                + 1) as u32
        };
        let types: Vec<u32> = [
            vec![name("int"), 1 << 24, 4, 32],
            vec![0, 4 << 24 | 2, 8, name("c"), 1, 0, name("d"), 1, 32],
            vec![0, 5 << 24 | 2, 8, name("b"), 1, 0, 0, 2, 0],
            vec![name("outer"), 4 << 24 | 2, 12, name("a"), 1, 0, 0, 3, 32],
            vec![0, 13 << 24, 0],
            vec![name("f"), 12 << 24, 5],
        ]
        .concat();
        let types: Vec<u8> = types.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let header = [
            24,
            0,
            types.len() as u32,
            types.len() as u32,
            strings.len() as u32,
        ];
        let mut data = [&0xeb9f_u16.to_ne_bytes()[..], &[1, 0]].concat();
        data.extend(header.iter().flat_map(|word| word.to_ne_bytes()));
        data.extend(types);
        data.extend(strings);
        data
    }

    #[test]
    fn members_of_unnamed_unions_and_structs_are_found() {
        let data = example();
        let btf = Raw::parse(&data).unwrap();
        assert_eq!(btf.member_offset("outer", "a"), Some(0));
        assert_eq!(btf.member_offset("outer", "b"), Some(4));
        assert_eq!(btf.member_offset("outer", "d"), Some(8));
        assert_eq!(btf.member_offset("outer", "e"), None);
        assert_eq!((btf.function("f"), btf.function("int")), (Some(6), None));
    }

    #[test]
    fn calls_of_placeholders_name_the_function_that_is_missing() {
        let mut call = bpf_insn {
            code: CALL,
            imm: PLACEHOLDERS + 1,
            ..bpf_insn {
                code: 0,
                _bitfield_align_1: [],
                _bitfield_1: Default::default(),
                off: 0,
                imm: 0,
            }
        };
        call.set_src_reg(0);
        let kernel = KernelBtf::of(&Raw::parse(&example()).unwrap());
        assert_eq!(resolve_calls(&mut [call], &kernel), Err("bpf_sock_destroy"));
        call.imm = 1;
        assert_eq!(resolve_calls(&mut [call], &kernel), Ok(()));
    }

    #[test]
    fn the_running_kernel_has_the_offsets_of_64_bit_kernels() {
        let Ok(btf) = KernelBtf::running() else {
            return;
        };
        let offset = |member| btf.member_offset(member);
        assert_eq!(offset("skc_daddr"), Some(0));
        assert_eq!(offset("skc_dport"), Some(12));
        assert_eq!(offset("skc_family"), Some(16));
        assert_eq!(offset("skc_v6_daddr"), Some(56));
    }
}
