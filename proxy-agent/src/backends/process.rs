//! What this process and its threads take of the machine. nix has neither call.

use std::io;

/// Heaps of the allocator (malloc's arenas), at most. Each keeps what was freed between two parts in use: with one for every
/// thread, an agent with 100,000 endpoints holds 16 MB more (`cargo xtask bench memory`).
const HEAPS: libc::c_int = 2;

/// From how many bytes on a block has pages of its own, which go back to the kernel with it. malloc's own first value, but it
/// raises that with each such block that is freed, and then keeps the room of large ones among small ones: 10 MB more at
/// 10,000 Services (`cargo xtask bench cluster-memory`).
const OWN_PAGES: libc::c_int = 128 << 10;

/// Makes the allocator keep little of what is free. Has no effect on heaps that threads have already.
pub fn keep_little() {
    for (setting, value) in [
        (libc::M_ARENA_MAX, HEAPS),
        (libc::M_MMAP_THRESHOLD, OWN_PAGES),
        (libc::M_TRIM_THRESHOLD, OWN_PAGES),
    ] {
        // SAFETY: sets a number of the allocator; it takes any.
        unsafe { libc::mallopt(setting, value) };
    }
}

/// Makes the calling thread, and what it starts from now on, give way to the others: `by` is added to its nice value, which
/// ends at 19.
///
/// # Errors
/// The kernel refuses.
pub fn give_way(by: i32) -> io::Result<()> {
    // On Linux a nice value belongs to a thread, and 0 is the calling one.
    // SAFETY: takes numbers and returns one. -1 is a nice value too, so errno tells an error; none is documented for this call.
    let now = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    // SAFETY: takes numbers.
    match unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, now + by) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, process::Command, thread};

    use super::*;

    /// Field 19 of `stat`; the second one, the name, may have spaces in it.
    fn nice(stat: &str) -> i32 {
        let after_name = stat.rsplit_once(") ").unwrap().1;
        after_name.split(' ').nth(16).unwrap().parse().unwrap()
    }

    fn own_nice() -> i32 {
        nice(&fs::read_to_string("/proc/thread-self/stat").unwrap())
    }

    #[test]
    fn one_thread_and_its_children_give_way() {
        let before = own_nice();
        let humble = thread::spawn(|| {
            give_way(3).unwrap();
            let child = Command::new("cat").arg("/proc/self/stat").output().unwrap();
            (own_nice(), nice(&String::from_utf8_lossy(&child.stdout)))
        });
        let expected = (before + 3).min(19);
        assert_eq!(humble.join().unwrap(), (expected, expected));
        assert_eq!(own_nice(), before);
    }
}
