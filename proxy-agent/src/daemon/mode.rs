//! Which layers serve this node: what was asked for, as far as the node can do it.

use std::{path::Path, sync::Arc};

use super::{Error, packet::Tools, place::cgroup};
use crate::{
    backends::{
        self,
        ebpf::{
            kernel::{KernelStore, Lease, Left, OpenOptions},
            probe::{hidden_namespaces, is_root, probe},
        },
        iptables::host::{Host, Owner},
    },
    cli::{Global, Mode, Run},
    model::NodeName,
};

/// What was opened, and why this and nothing better.
pub struct Opened {
    /// What the layers work on.
    pub layers: Layers,
    /// For the log and the metric.
    pub reason: String,
}

/// What the layers work on.
pub enum Layers {
    /// The kernel's maps; and the tools for rules, where they are installed.
    Sockets(Box<KernelStore>, Option<Tools>),
    /// The tools for rules, and the hooks that a former mode left.
    Packets(Host, Option<Left>),
}

/// Opens what `--mode` asks for, and in mode auto the best that this node can do.
///
/// # Errors
/// It cannot be had; in mode auto nothing can. Another agent serves this node.
pub fn open(global: &Global, args: &Run, here: &NodeName) -> Result<Opened, Error> {
    // Before anything is read or changed: one agent for each node.
    let owner = Arc::new(Owner::take()?);
    match args.layers.mode() {
        Mode::Iptables => packets(global, owner, "asked for".to_owned()),
        Mode::Ebpf => match sockets(global, args, here)? {
            Ok(store) => Ok(beside(store, owner, "asked for")),
            Err(lacks) => Err(Error::Unfit(lacks)),
        },
        Mode::Auto => match sockets(global, args, here)? {
            Ok(store) => {
                let best = "this kernel has what the socket layer needs";
                Ok(beside(store, owner, best))
            }
            Err(lacks) => {
                tracing::warn!(lacks, "no socket layer: iptables serves this node");
                packets(global, owner, format!("no socket layer: {lacks}"))
            }
        },
    }
}

fn packets(global: &Global, owner: Arc<Owner>, reason: String) -> Result<Opened, Error> {
    let host = Host::open(owner).map_err(|packet| Error::NoPackets {
        packet,
        reason: reason.clone(),
    })?;
    let left = Left::find(&global.bpf_dir)?;
    let layers = Layers::Packets(host, left);
    Ok(Opened { layers, reason })
}

/// The packet layer beside the socket layer. Without its tools the connections of this node are served all the same.
fn beside(mut store: KernelStore, owner: Arc<Owner>, reason: &str) -> Opened {
    let (tools, reason) = match Host::installed() {
        Ok(()) => (Some(Tools::Awaited(owner)), reason.to_owned()),
        Err(error) => {
            tracing::error!(
                error = format!("{error:#}"),
                "no packet layer: what arrives from outside this node is not served"
            );
            // Nothing is there that could take over.
            store.set_lease(Lease::Never);
            (None, format!("{reason}; no packet layer: {error}"))
        }
    };
    Opened {
        layers: Layers::Sockets(Box::new(store), tools),
        reason,
    }
}

/// Opens the kernel's maps, or says all that this node lacks for them.
///
/// # Errors
/// It lacks nothing, and they cannot be opened all the same.
fn sockets(
    global: &Global,
    args: &Run,
    here: &NodeName,
) -> Result<Result<KernelStore, String>, Error> {
    let cgroup = match cgroup(global) {
        Ok(cgroup) => cgroup,
        Err(Error::Backend(error)) => return lacks(global, error, None).map(Err),
        Err(error) => return Err(error),
    };
    if !is_root(&cgroup) {
        tracing::info!(cgroup = %cgroup.display(), "not the root of the node's cgroups: sockets outside of it are not served");
    }
    let options = OpenOptions {
        bpf_dir: global.bpf_dir.clone(),
        cgroup: Some(cgroup.clone()),
        node_name: here.to_string(),
        lease: Lease::AsFound,
        host_only: args.layers.packet.masquerade_all,
        log: args.log_programs,
    };
    match KernelStore::open(options) {
        Ok(store) => {
            if let Some(text) = hidden_namespaces() {
                tracing::warn!("{text}");
            }
            Ok(Ok(store))
        }
        Err(error) => lacks(global, error, Some(&cgroup)).map(Err),
    }
}

/// What this node lacks, if that explains `error`.
fn lacks(global: &Global, error: backends::Error, cgroup: Option<&Path>) -> Result<String, Error> {
    let missing = probe(&global.bpf_dir, cgroup).missing.into_iter();
    let required: Vec<String> = missing
        .filter(|missing| missing.is_required)
        .map(|missing| missing.text)
        .collect();
    match required.is_empty() {
        true => Err(Error::Backend(error)),
        false => Ok(required.join("; ")),
    }
}
