//! Who holds the lock that all legacy tools share.

use std::{fs, os::unix::fs::MetadataExt as _, path::Path};

use crate::backends::Error;

/// Where it is, unless XTABLES_LOCKFILE says otherwise (iptables 1.8.5).
const LOCK_FILE: &str = "/run/xtables.lock";

/// The error of a tool that waited for it in vain.
pub fn held(seconds: u32) -> Error {
    let file = std::env::var("XTABLES_LOCKFILE").unwrap_or_else(|_| LOCK_FILE.to_owned());
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let inode = fs::metadata(&file).map(|found| found.ino()).ok();
    let holder = inode.and_then(|inode| holder(&locks, inode));
    let who = match holder {
        Some(pid) => format!("process {pid} ({})", command(pid)),
        None => "somebody who is not to be seen from here".to_owned(),
    };
    Error::Unusable(format!(
        "{file} was not to be had in {seconds} s: {who} holds it; the rules stay as they are until it is free"
    ))
}

/// Process that holds a lock on the file of this inode. A line of /proc/locks is
/// `1: FLOCK  ADVISORY  WRITE 1234 00:19:567 0 EOF`; a waiting one has `->` in its second field.
fn holder(locks: &str, inode: u64) -> Option<u32> {
    locks.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, kind, _, _, pid, file, ..] = fields[..] else {
            return None;
        };
        let same = file.rsplit(':').next()?.parse() == Ok(inode);
        (kind != "->" && same).then(|| pid.parse().ok())?
    })
}

fn command(pid: u32) -> String {
    let name = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("comm"));
    name.map_or_else(|_| "gone".to_owned(), |name| name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_is_the_one_who_does_not_wait() {
        let locks = "1: -> FLOCK  ADVISORY  WRITE 77 00:19:567 0 EOF\n\
            2: POSIX  ADVISORY  WRITE 12 00:19:566 0 EOF\n\
            3: FLOCK  ADVISORY  WRITE 1234 00:19:567 0 EOF\n";
        assert_eq!(holder(locks, 567), Some(1234));
        assert_eq!(holder(locks, 568), None);
    }
}
