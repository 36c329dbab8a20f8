//! Which node this is: its name, and the cgroup that its sockets live in.

use std::{fs, path::PathBuf};

use super::Error;
use crate::{
    backends::ebpf::probe::cgroup_root,
    cli::{Global, Sources},
    model::NodeName,
    state::NodePortAddresses,
};

/// `--node-name`, or the host name in lower case, as the kubelet has it.
///
/// # Errors
/// The host name cannot be read, or is no name.
pub fn node_name(global: &Global) -> Result<NodeName, Error> {
    let name = match &global.node_name {
        Some(name) => name.clone(),
        None => fs::read_to_string("/proc/sys/kernel/hostname")
            .map_err(|error| Error::NodeName(error.to_string()))?
            .trim()
            .to_lowercase(),
    };
    if name.is_empty() || name.len() > 253 {
        let len = name.len();
        return Err(Error::NodeName(format!(
            "a name has 1 to 253 characters, this one {len}"
        )));
    }
    Ok(NodeName::new(&name))
}

/// `--cgroup`, or the root of the machine's cgroup v2 hierarchy.
///
/// # Errors
/// No such hierarchy is mounted.
pub fn cgroup(global: &Global) -> Result<PathBuf, Error> {
    if let Some(path) = &global.cgroup {
        return Ok(path.clone());
    }
    Ok(cgroup_root()?)
}

/// Which addresses serve node ports, in either layer.
pub fn node_ports(sources: &Sources) -> NodePortAddresses {
    let node_ports = NodePortAddresses::new(&sources.nodeport_addresses);
    for family in node_ports.unmentioned() {
        tracing::warn!(%family, "--nodeport-addresses names no network of this family: node ports are served on all addresses of it");
    }
    node_ports
}
