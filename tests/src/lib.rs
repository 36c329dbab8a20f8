//! Building blocks of the tests against a real kernel: clusters made of network namespaces, servers that answer who they
//! are, clients, manifests, and the agent as a process.
//!
//! Everything that is made carries the process id of its maker in its name, and a janitor process removes it when the
//! maker is gone, however it went.

pub mod agent;
pub mod bench;
pub mod bystander;
pub mod demo;
pub mod differential;
pub mod flannel;
pub mod flows;
pub mod foreign;
pub mod janitor;
pub mod kube;
pub mod load;
pub mod manifests;
pub mod marker;
pub mod names;
pub mod peer;
pub mod place;
pub mod programs;
pub mod raw;
pub mod scenario;
pub mod sctp;
pub mod server;
pub mod tools;
pub mod topology;

pub use agent::Agent;
pub use manifests::{Endpoint, Manifests, Service};
pub use peer::Peer;
pub use place::Place;
pub use scenario::Scenario;
pub use topology::{Node, Pod, Topology};

use std::time::{Duration, Instant};

/// Calls `probe` until it gives a value; after `deadline` the last reason it gave is the error.
///
/// # Errors
/// The condition did not come true in time.
pub fn wait_for<T>(
    what: &str,
    deadline: Duration,
    mut probe: impl FnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let start = Instant::now();
    loop {
        match probe() {
            Ok(value) => return Ok(value),
            Err(error) if start.elapsed() > deadline => {
                return Err(error.context(format!("{what}: not within {deadline:?}")));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// Lets what was started go on for a while.
pub fn let_run(time: Duration) {
    std::thread::sleep(time);
}

/// Whether a client's connection left the node untranslated: the topology's switch says so in ICMP, at a limited rate.
pub fn left_untranslated(error: &std::io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EHOSTUNREACH | libc::ENETUNREACH | libc::ETIMEDOUT)
    )
}
