//! Tests that change the tables of a network namespace get one of their own.

use std::thread;

use nix::sched::{CloneFlags, unshare};

/// Runs `test` on a thread in a new network namespace.
pub fn in_namespace<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    let work = || {
        unshare(CloneFlags::CLONE_NEWNET).expect("root");
        test()
    };
    thread::scope(|scope| scope.spawn(work).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
