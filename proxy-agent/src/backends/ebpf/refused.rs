//! What a refused system call means to the operator.

use std::{fmt::Display, io};

use crate::backends::Error;

/// "cannot `action` `object`: …" with what to do about it.
pub fn refused(action: &'static str, object: impl Display, cause: io::Error) -> Error {
    let hint = match cause.raw_os_error() {
        Some(libc::ENOMEM) => {
            "; the kernel has no memory for it: free some, or raise the memory limit of the agent's cgroup"
        }
        Some(libc::EPERM | libc::EACCES) => {
            "; run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON (CAP_SYS_ADMIN before 5.8)"
        }
        Some(libc::E2BIG) => "; it is full, or larger than the kernel allows",
        _ => "",
    };
    Error::Kernel {
        action,
        object: object.to_string(),
        cause,
        hint,
    }
}
