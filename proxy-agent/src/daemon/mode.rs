//! Which layer serves this node: what was asked for, as far as the node can do it.

use std::path::Path;

use super::{Error, place::cgroup};
use crate::{
    backends::{
        self,
        ebpf::{
            kernel::{KernelStore, Left, OpenOptions},
            probe::probe,
        },
        iptables::host::Host,
    },
    cli::{Global, Mode, Run},
    model::NodeName,
};

/// What was opened.
pub enum Opened {
    /// The kernel's maps.
    Sockets(Box<KernelStore>),
    /// The tools for rules, and the hooks that a former mode left.
    Packets(Host, Option<Left>),
}

/// Opens what `--mode` asks for, and in mode auto the best that this node can do. Says why.
///
/// # Errors
/// It cannot be had; in mode auto nothing can.
pub fn open(global: &Global, args: &Run, here: &NodeName) -> Result<(Opened, String), Error> {
    match args.mode {
        Mode::Iptables => packets(global, "asked for".to_owned()),
        Mode::Ebpf => sockets(global, args, here, "asked for"),
        Mode::Auto => {
            let best = "this kernel has what the socket layer needs";
            match sockets(global, args, here, best) {
                Err(Error::Unfit(lacks)) => {
                    tracing::warn!(lacks, "no socket layer: iptables serves this node");
                    packets(global, format!("no socket layer: {lacks}"))
                }
                opened => opened,
            }
        }
    }
}

fn packets(global: &Global, reason: String) -> Result<(Opened, String), Error> {
    let host = Host::open().map_err(|packet| Error::NoPackets {
        packet,
        reason: reason.clone(),
    })?;
    let left = Left::find(&global.bpf_dir)?;
    Ok((Opened::Packets(host, left), reason))
}

/// Opens the kernel's maps, or says all that this node lacks for them.
fn sockets(
    global: &Global,
    args: &Run,
    here: &NodeName,
    reason: &str,
) -> Result<(Opened, String), Error> {
    let unfit = |error: backends::Error, cgroup: Option<&Path>| {
        let missing = probe(&global.bpf_dir, cgroup).missing.into_iter();
        let required: Vec<String> = missing
            .filter(|missing| missing.is_required)
            .map(|missing| missing.text)
            .collect();
        if required.is_empty() {
            Error::Backend(error)
        } else {
            Error::Unfit(required.join("; "))
        }
    };
    let cgroup = match cgroup(global) {
        Ok(cgroup) => cgroup,
        Err(Error::Backend(error)) => return Err(unfit(error, None)),
        Err(error) => return Err(error),
    };
    let options = OpenOptions {
        bpf_dir: global.bpf_dir.clone(),
        cgroup: Some(cgroup.clone()),
        node_name: here.to_string(),
        // Armed only while a packet layer serves the node beside this one, which would take over: there is none yet.
        lease: None,
        log: args.log_programs,
    };
    let store = KernelStore::open(options).map_err(|error| unfit(error, Some(&cgroup)))?;
    Ok((Opened::Sockets(Box::new(store)), reason.to_owned()))
}
