//! What the kernel says about maps, programs and links.

use super::{
    AsFd, CStr, bpf, bpf_attr, bpf_cmd, bpf_link_info, bpf_map_info, bpf_prog_info, c_char, io,
    raw, zeroed,
};

fn object_info<T: Copy>(object: impl AsFd, info: &mut T) -> io::Result<()> {
    let mut attr: bpf_attr = zeroed();
    attr.info.bpf_fd = raw(&object);
    attr.info.info_len = size_of::<T>() as u32;
    attr.info.info = std::ptr::from_mut(info) as u64;
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr).map(drop)
}

/// What a descriptor of an eBPF object stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A map.
    Map,
    /// A program.
    Program,
    /// A link.
    Link,
}

/// Which kind of object `object` is. The kernel's info structs cannot tell: a map's and a program's have the same start.
///
/// # Errors
/// The descriptor is none of eBPF.
pub fn kind_of(object: impl AsFd) -> io::Result<Kind> {
    let target = std::fs::read_link(format!("/proc/self/fd/{}", raw(&object)))?;
    match target.to_str() {
        Some("anon_inode:bpf-map") => Ok(Kind::Map),
        Some("anon_inode:bpf-prog") => Ok(Kind::Program),
        Some("anon_inode:bpf_link" | "anon_inode:bpf-link") => Ok(Kind::Link),
        Some(_) | None => Err(io::Error::from(io::ErrorKind::InvalidInput)),
    }
}

/// BPF_OBJ_GET_INFO_BY_FD of a map.
///
/// # Errors
/// As the kernel says.
pub fn map_info(map: impl AsFd) -> io::Result<bpf_map_info> {
    let mut info = zeroed();
    object_info(map, &mut info)?;
    Ok(info)
}

/// BPF_OBJ_GET_INFO_BY_FD of a program, and the ids of its maps.
///
/// # Errors
/// As the kernel says.
pub fn prog_info(program: impl AsFd) -> io::Result<(bpf_prog_info, Vec<u32>)> {
    let mut ids = vec![0_u32; 64];
    let mut info: bpf_prog_info = zeroed();
    info.nr_map_ids = ids.len() as u32;
    info.map_ids = ids.as_mut_ptr() as u64;
    object_info(program, &mut info)?;
    ids.truncate(info.nr_map_ids as usize);
    ids.sort_unstable();
    Ok((info, ids))
}

/// BPF_OBJ_GET_INFO_BY_FD of a link.
///
/// # Errors
/// As the kernel says.
pub fn link_info(link: impl AsFd) -> io::Result<bpf_link_info> {
    let mut info = zeroed();
    object_info(link, &mut info)?;
    Ok(info)
}

/// An empty info struct.
#[cfg(test)]
pub fn zeroed_map_info() -> bpf_map_info {
    zeroed()
}

/// Name in an info struct.
pub fn name_of(field: &[c_char; 16]) -> String {
    let bytes: Vec<u8> = field.iter().map(|byte| *byte as u8).collect();
    CStr::from_bytes_until_nul(&bytes)
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// Id of the cgroup that a link is attached to (0: the cgroup is gone), and its hook.
pub fn cgroup_of(link: &bpf_link_info) -> (u64, u32) {
    // SAFETY: plain integers; meaningful when `type_` says cgroup, which the caller looks at.
    let cgroup = unsafe { link.__bindgen_anon_1.cgroup };
    (cgroup.cgroup_id, cgroup.attach_type)
}

/// A field of the descriptor's /proc/self/fdinfo.
///
/// # Errors
/// It cannot be read.
pub fn fd_field(fd: impl AsFd, field: &str) -> io::Result<Option<String>> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", raw(&fd)))?;
    let value = |line: &str| {
        Some(
            line.strip_prefix(field)?
                .strip_prefix(':')?
                .trim()
                .to_owned(),
        )
    };
    Ok(text.lines().find_map(value))
}
