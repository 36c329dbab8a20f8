//! Programs, links and iterators.

use super::{
    AsFd, BorrowedFd, CStr, File, OwnedFd, address, bpf, bpf_attach_type, bpf_attr, bpf_cmd,
    bpf_fd, bpf_insn, io, object_name, raw, zeroed,
};

/// Largest verifier log that the kernels in use accept (`UINT_MAX >> 8` before v5.10's successors).
const LOG_SIZE: usize = (1 << 24) - 1;

/// How often a load that a signal interrupts is tried.
const LOAD_ATTEMPTS: usize = 10;

/// What can be loaded as a program.
pub struct ProgSpec<'a> {
    /// Kernel name; cut after 15 bytes.
    pub name: &'a str,
    /// `BPF_PROG_TYPE_*`.
    pub prog_type: u32,
    /// The hook that it is made for.
    pub attach_type: bpf_attach_type,
    /// BTF id of the kernel function that an iterator stands for; else zero.
    pub attach_btf_id: u32,
    /// Instructions, relocated.
    pub insns: &'a [bpf_insn],
    /// Licence.
    pub license: &'a CStr,
    /// BTF of the object and its description of functions and lines.
    pub debug: Option<Debug<'a>>,
}

/// BTF of a program: function and line records as the kernel wants them.
#[derive(Clone, Copy)]
pub struct Debug<'a> {
    /// The loaded BTF.
    pub btf: BorrowedFd<'a>,
    /// Records, bytes of one record.
    pub functions: (&'a [u8], usize),
    /// Records, bytes of one record.
    pub lines: (&'a [u8], usize),
}

/// BPF_PROG_LOAD.
///
/// # Errors
/// What the kernel said, and the verifier's log.
pub fn prog_load(spec: &ProgSpec<'_>) -> Result<OwnedFd, (io::Error, String)> {
    let mut attr: bpf_attr = zeroed();
    // Field by field: assigning a whole struct would copy its padding, which later kernels read as fields.
    attr.__bindgen_anon_3.prog_type = spec.prog_type;
    attr.__bindgen_anon_3.insn_cnt = spec.insns.len() as u32;
    attr.__bindgen_anon_3.insns = address(spec.insns);
    attr.__bindgen_anon_3.license = spec.license.as_ptr() as u64;
    attr.__bindgen_anon_3.prog_name = object_name(spec.name);
    attr.__bindgen_anon_3.expected_attach_type = spec.attach_type as u32;
    attr.__bindgen_anon_3.attach_btf_id = spec.attach_btf_id;
    if let Some(Debug {
        btf,
        functions,
        lines,
    }) = spec.debug
    {
        attr.__bindgen_anon_3.prog_btf_fd = raw(&btf);
        if functions.1 > 0 {
            attr.__bindgen_anon_3.func_info = address(functions.0);
            attr.__bindgen_anon_3.func_info_rec_size = functions.1 as u32;
            attr.__bindgen_anon_3.func_info_cnt = (functions.0.len() / functions.1) as u32;
        }
        if lines.1 > 0 {
            attr.__bindgen_anon_3.line_info = address(lines.0);
            attr.__bindgen_anon_3.line_info_rec_size = lines.1 as u32;
            attr.__bindgen_anon_3.line_info_cnt = (lines.0.len() / lines.1) as u32;
        }
    }
    let first = match load(&mut attr) {
        Ok(fd) => return Ok(fd),
        Err(error) => error,
    };
    let mut log = vec![0_u8; LOG_SIZE];
    attr.__bindgen_anon_3.log_buf = log.as_mut_ptr() as u64;
    attr.__bindgen_anon_3.log_size = log.len() as u32;
    attr.__bindgen_anon_3.log_level = 1;
    match load(&mut attr) {
        Ok(fd) => Ok(fd),
        Err(_) => {
            let len = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
            Err((first, String::from_utf8_lossy(&log[..len]).into_owned()))
        }
    }
}

/// The verifier gives up with EAGAIN when a signal is pending (v5.0, c3494801cd17), be it only a SIGCONT.
fn load(attr: &mut bpf_attr) -> io::Result<OwnedFd> {
    for _ in 1..LOAD_ATTEMPTS {
        match bpf_fd(bpf_cmd::BPF_PROG_LOAD, attr) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            loaded => return loaded,
        }
    }
    bpf_fd(bpf_cmd::BPF_PROG_LOAD, attr)
}

/// BPF_BTF_LOAD.
///
/// # Errors
/// As the kernel says.
pub fn btf_load(btf: &[u8]) -> io::Result<OwnedFd> {
    let mut attr: bpf_attr = zeroed();
    attr.__bindgen_anon_7.btf = address(btf);
    attr.__bindgen_anon_7.btf_size = btf.len() as u32;
    bpf_fd(bpf_cmd::BPF_BTF_LOAD, &mut attr)
}

/// BPF_LINK_CREATE on a cgroup. Flags are zero: links of cgroup hooks are multi, and aya's flag for it is refused
/// (aya#1078).
///
/// # Errors
/// As the kernel says.
pub fn link_create(
    program: impl AsFd,
    cgroup: impl AsFd,
    hook: bpf_attach_type,
) -> io::Result<OwnedFd> {
    let mut attr: bpf_attr = zeroed();
    attr.link_create.__bindgen_anon_1.prog_fd = raw(&program);
    attr.link_create.__bindgen_anon_2.target_fd = raw(&cgroup);
    attr.link_create.attach_type = hook as u32;
    bpf_fd(bpf_cmd::BPF_LINK_CREATE, &mut attr)
}

/// BPF_LINK_UPDATE: puts `program` in the place of the link's.
///
/// # Errors
/// As the kernel says.
pub fn link_update(link: impl AsFd, program: impl AsFd) -> io::Result<()> {
    let mut attr: bpf_attr = zeroed();
    attr.link_update.link_fd = raw(&link);
    attr.link_update.__bindgen_anon_1.new_prog_fd = raw(&program);
    bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// BPF_LINK_DETACH: the program no longer runs when this returns. Dropping the last handle detaches too, but later.
///
/// # Errors
/// As the kernel says; EOPNOTSUPP for iterators.
pub fn link_detach(link: impl AsFd) -> io::Result<()> {
    let mut attr: bpf_attr = zeroed();
    attr.link_detach.link_fd = raw(&link);
    bpf(bpf_cmd::BPF_LINK_DETACH, &mut attr).map(drop)
}

/// A link of an iterator program.
///
/// # Errors
/// As the kernel says.
pub fn iter_link(program: impl AsFd) -> io::Result<OwnedFd> {
    let mut attr: bpf_attr = zeroed();
    attr.link_create.__bindgen_anon_1.prog_fd = raw(&program);
    attr.link_create.attach_type = bpf_attach_type::BPF_TRACE_ITER as u32;
    bpf_fd(bpf_cmd::BPF_LINK_CREATE, &mut attr)
}

/// A file whose reading runs the iterator once.
///
/// # Errors
/// As the kernel says.
pub fn iter_file(link: impl AsFd) -> io::Result<File> {
    let mut attr: bpf_attr = zeroed();
    attr.iter_create.link_fd = raw(&link);
    bpf_fd(bpf_cmd::BPF_ITER_CREATE, &mut attr).map(File::from)
}

/// BPF_PROG_QUERY: ids of the programs on a cgroup's hook.
///
/// # Errors
/// As the kernel says.
pub fn prog_query(cgroup: impl AsFd, hook: bpf_attach_type) -> io::Result<Vec<u32>> {
    let mut ids = vec![0_u32; 64];
    let mut attr: bpf_attr = zeroed();
    attr.query.__bindgen_anon_1.target_fd = raw(&cgroup);
    attr.query.attach_type = hook as u32;
    attr.query.prog_ids = ids.as_mut_ptr() as u64;
    attr.query.__bindgen_anon_2.prog_cnt = ids.len() as u32;
    bpf(bpf_cmd::BPF_PROG_QUERY, &mut attr)?;
    // SAFETY: both members of this union are the same u32.
    ids.truncate(unsafe { attr.query.__bindgen_anon_2.prog_cnt } as usize);
    Ok(ids)
}

/// Cookie of the network namespace that `socket` lives in (SO_NETNS_COOKIE, v5.14).
///
/// # Errors
/// ENOPROTOOPT on older kernels.
pub fn netns_cookie(socket: impl AsFd) -> io::Result<u64> {
    use std::os::fd::AsRawFd;
    let mut cookie = 0_u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, the size of `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &raw mut len,
        )
    };
    if result == 0 {
        Ok(cookie)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// `include/uapi/asm-generic/socket.h`; the same on x86_64 and aarch64.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// One instruction of a small program.
pub fn insn(code: u8, dst: u8, imm: i32) -> bpf_insn {
    let mut insn = bpf_insn {
        code,
        imm,
        ..zeroed()
    };
    insn.set_dst_reg(dst);
    insn
}
