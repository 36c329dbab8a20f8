//! The bpf(2) calls that aya 0.14 lacks or hides, and the few socket calls beside them.
//!
//! Every function takes slices and file descriptors and checks their sizes; nothing here knows our maps.

use std::{
    ffi::{CStr, CString, c_char},
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use aya_obj::generated::{
    bpf_attach_type, bpf_attr, bpf_cmd, bpf_insn, bpf_link_info, bpf_map_info, bpf_prog_info,
};
use proxy_ebpf::abi::Plain;

#[cfg(test)]
pub use self::info::zeroed_map_info;
pub use self::info::{Kind, cgroup_of, fd_field, kind_of, link_info, map_info, name_of, prog_info};
pub use self::programs::{
    Debug, ProgSpec, btf_load, insn, iter_file, iter_link, link_create, link_detach, link_update,
    netns_cookie, prog_load, prog_query,
};

mod info;
mod programs;

/// What can be created as a map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MapSpec {
    /// Kernel name; cut after 15 bytes.
    pub name: String,
    /// `BPF_MAP_TYPE_*`.
    pub map_type: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Entries.
    pub max_entries: u32,
    /// `BPF_F_*`.
    pub flags: u32,
    /// BTF types of key and value; zero when the type needs none.
    pub btf_types: (u32, u32),
}

fn bpf(cmd: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i32> {
    // SAFETY: the kernel reads and writes `size_of::<bpf_attr>()` bytes of `attr`, and what its pointers lead to; each
    // caller below fills those pointers from slices that outlive the call, with their lengths.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            cmd as u32,
            std::ptr::from_mut(attr),
            size_of::<bpf_attr>(),
        )
    };
    i32::try_from(result)
        .ok()
        .filter(|code| *code >= 0)
        .ok_or_else(io::Error::last_os_error)
}

fn bpf_fd(cmd: bpf_cmd, attr: &mut bpf_attr) -> io::Result<OwnedFd> {
    let fd = bpf(cmd, attr)?;
    // SAFETY: these commands return a new descriptor (close-on-exec), which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn zeroed<T: Copy>() -> T {
    const { assert!(!std::mem::needs_drop::<T>()) };
    // SAFETY: only called for the kernel's C structs and unions of integers, of which all-zero is a value.
    unsafe { std::mem::zeroed() }
}

fn raw(fd: &impl AsFd) -> u32 {
    fd.as_fd().as_raw_fd() as u32
}

fn address<T>(slice: &[T]) -> u64 {
    slice.as_ptr() as u64
}

fn object_name(name: &str) -> [c_char; 16] {
    let mut field = [0; 16];
    for (to, from) in field.iter_mut().take(15).zip(name.bytes()) {
        // The kernel accepts letters, digits, '_' and '.' (bpf_obj_name_cpy).
        let valid = from.is_ascii_alphanumeric() || from == b'_' || from == b'.';
        *to = (if valid { from } else { b'_' }) as c_char;
    }
    field
}

fn path_name(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

/// The bytes of a map key or value.
pub fn bytes_of<T: Plain>(value: &T) -> &[u8] {
    // SAFETY: `Plain` promises that there is no padding: every byte is initialised.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// The bytes of several keys or values.
pub fn bytes_of_slice<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: as in `bytes_of`; arrays add no padding.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// A value from its first bytes; fields that `bytes` does not reach are zero (a value of an older ABI).
pub fn from_prefix<T: Plain>(bytes: &[u8]) -> T {
    let mut value: T = zeroed();
    let len = bytes.len().min(size_of::<T>());
    // SAFETY: `len` bytes fit both sides, which do not overlap; `Plain` promises that any bytes are a value.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), std::ptr::from_mut(&mut value).cast(), len);
    }
    value
}

/// BPF_MAP_CREATE.
///
/// # Errors
/// As the kernel says; ENOMEM and E2BIG when it is too large.
pub fn map_create(
    spec: &MapSpec,
    inner: Option<BorrowedFd<'_>>,
    btf: Option<BorrowedFd<'_>>,
) -> io::Result<OwnedFd> {
    let mut attr: bpf_attr = zeroed();
    // Field by field: assigning a whole struct would copy its padding, which later kernels read as fields.
    attr.__bindgen_anon_1.map_type = spec.map_type;
    attr.__bindgen_anon_1.key_size = spec.key_size;
    attr.__bindgen_anon_1.value_size = spec.value_size;
    attr.__bindgen_anon_1.max_entries = spec.max_entries;
    attr.__bindgen_anon_1.map_flags = spec.flags;
    attr.__bindgen_anon_1.inner_map_fd = inner.map_or(0, |fd| raw(&fd));
    attr.__bindgen_anon_1.map_name = object_name(&spec.name);
    attr.__bindgen_anon_1.btf_fd = btf.map_or(0, |fd| raw(&fd));
    attr.__bindgen_anon_1.btf_key_type_id = spec.btf_types.0;
    attr.__bindgen_anon_1.btf_value_type_id = spec.btf_types.1;
    bpf_fd(bpf_cmd::BPF_MAP_CREATE, &mut attr)
}

/// BPF_MAP_UPDATE_ELEM. `key` and `value` must have the map's sizes.
///
/// # Errors
/// As the kernel says.
pub fn map_update(map: impl AsFd, key: &[u8], value: &[u8]) -> io::Result<()> {
    element(
        bpf_cmd::BPF_MAP_UPDATE_ELEM,
        map,
        key,
        value.as_ptr() as u64,
    )
}

/// BPF_MAP_LOOKUP_ELEM into `value`; false when there is no such key.
///
/// # Errors
/// As the kernel says.
pub fn map_lookup(map: impl AsFd, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    let value = value.as_mut_ptr() as u64;
    found(element(bpf_cmd::BPF_MAP_LOOKUP_ELEM, map, key, value))
}

/// BPF_MAP_DELETE_ELEM; false when there is no such key.
///
/// # Errors
/// As the kernel says.
pub fn map_delete(map: impl AsFd, key: &[u8]) -> io::Result<bool> {
    found(element(bpf_cmd::BPF_MAP_DELETE_ELEM, map, key, 0))
}

/// BPF_MAP_GET_NEXT_KEY into `next`; false at the end.
///
/// # Errors
/// As the kernel says.
pub fn map_next_key(map: impl AsFd, key: Option<&[u8]>, next: &mut [u8]) -> io::Result<bool> {
    let next = next.as_mut_ptr() as u64;
    found(element(
        bpf_cmd::BPF_MAP_GET_NEXT_KEY,
        map,
        key.unwrap_or_default(),
        next,
    ))
}

fn found(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

fn element(cmd: bpf_cmd, map: impl AsFd, key: &[u8], value: u64) -> io::Result<()> {
    let mut attr: bpf_attr = zeroed();
    attr.__bindgen_anon_2.map_fd = raw(&map);
    attr.__bindgen_anon_2.key = if key.is_empty() { 0 } else { address(key) };
    attr.__bindgen_anon_2.__bindgen_anon_1.value = value;
    bpf(cmd, &mut attr).map(drop)
}

/// BPF_MAP_UPDATE_BATCH; how many went in, and the error that stopped it.
pub fn map_update_batch(
    map: impl AsFd,
    keys: &[u8],
    values: &[u8],
    count: u32,
) -> (u32, io::Result<()>) {
    let mut attr: bpf_attr = zeroed();
    attr.batch.map_fd = raw(&map);
    attr.batch.keys = address(keys);
    attr.batch.values = address(values);
    attr.batch.count = count;
    batch(bpf_cmd::BPF_MAP_UPDATE_BATCH, &mut attr, count)
}

/// BPF_MAP_DELETE_BATCH; how many are gone, and the error that stopped it.
pub fn map_delete_batch(map: impl AsFd, keys: &[u8], count: u32) -> (u32, io::Result<()>) {
    let mut attr: bpf_attr = zeroed();
    attr.batch.map_fd = raw(&map);
    attr.batch.keys = address(keys);
    attr.batch.count = count;
    batch(bpf_cmd::BPF_MAP_DELETE_BATCH, &mut attr, count)
}

fn batch(cmd: bpf_cmd, attr: &mut bpf_attr, count: u32) -> (u32, io::Result<()>) {
    let result = bpf(cmd, attr).map(drop);
    // SAFETY: `batch` is the member that was filled and that these commands write to.
    let done = unsafe { attr.batch.count };
    // Refused before the first element, `count` is untouched.
    let refused = result.as_ref().is_err_and(|error| {
        matches!(
            error.raw_os_error(),
            Some(libc::EINVAL | libc::EPERM | ENOTSUPP | libc::EFAULT)
        )
    });
    (
        if refused && done == count {
            0
        } else {
            done.min(count)
        },
        result,
    )
}

/// The kernel's own errno for "not supported"; not in libc.
pub const ENOTSUPP: i32 = 524;

/// BPF_MAP_LOOKUP_BATCH from `cursor` on; how many were read, and whether that was the end. `cursor` has four bytes or
/// more and is `None` at first.
///
/// # Errors
/// As the kernel says; ENOSPC when one bucket has more than fits.
pub fn map_lookup_batch(
    map: impl AsFd,
    cursor: &mut Option<Vec<u8>>,
    keys: &mut [u8],
    values: &mut [u8],
    count: u32,
) -> io::Result<(u32, bool)> {
    // The position is a bucket number for hashes, a key for others.
    let mut next = vec![0_u8; 256];
    let mut attr: bpf_attr = zeroed();
    attr.batch.map_fd = raw(&map);
    attr.batch.in_batch = cursor.as_ref().map_or(0, |at| address(at));
    attr.batch.out_batch = next.as_mut_ptr() as u64;
    attr.batch.keys = keys.as_mut_ptr() as u64;
    attr.batch.values = values.as_mut_ptr() as u64;
    attr.batch.count = count;
    let result = bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr);
    // SAFETY: `batch` is the member that was filled and that this command writes to.
    let read = unsafe { attr.batch.count }.min(count);
    match result {
        Ok(_) => {
            *cursor = Some(next);
            Ok((read, false))
        }
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok((read, true)),
        Err(error) => Err(error),
    }
}

/// BPF_MAP_FREEZE: nobody writes the map through system calls from now on.
///
/// # Errors
/// As the kernel says.
pub fn map_freeze(map: impl AsFd) -> io::Result<()> {
    let mut attr: bpf_attr = zeroed();
    attr.__bindgen_anon_2.map_fd = raw(&map);
    bpf(bpf_cmd::BPF_MAP_FREEZE, &mut attr).map(drop)
}

/// BPF_OBJ_GET: what is pinned at `path`. For reading and writing: a map opened for reading only cannot be mapped, and a
/// link is refused.
///
/// # Errors
/// As the kernel says.
pub fn obj_get(path: &Path) -> io::Result<OwnedFd> {
    let path = path_name(path)?;
    let mut attr: bpf_attr = zeroed();
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    bpf_fd(bpf_cmd::BPF_OBJ_GET, &mut attr)
}

/// BPF_OBJ_PIN.
///
/// # Errors
/// As the kernel says; EEXIST when something is there.
pub fn obj_pin(object: impl AsFd, path: &Path) -> io::Result<()> {
    let path = path_name(path)?;
    let mut attr: bpf_attr = zeroed();
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    attr.__bindgen_anon_4.bpf_fd = raw(&object);
    bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr).map(drop)
}

/// CPUs that the kernel keeps per-CPU values for.
///
/// # Errors
/// The kernel could not be read.
pub fn possible_cpus() -> io::Result<usize> {
    let ranges = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let count = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(last.parse::<usize>().ok()? + 1 - first.parse::<usize>().ok()?)
    };
    let counts: Option<Vec<usize>> = ranges.trim().split(',').map(count).collect();
    counts
        .map(|counts| counts.iter().sum())
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}
