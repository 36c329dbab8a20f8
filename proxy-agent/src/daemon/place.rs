//! Which node this is: its name, the cgroup that its sockets live in, and where its Services come from.

use std::{env, fs, path::PathBuf};

use super::Error;
use crate::{
    backends::ebpf::probe::cgroup_root,
    cli::{Global, Sources},
    model::{Model, NodeName},
    sources::{Origin, kubernetes::Access},
    state::NodePortAddresses,
};

/// `--node-name`, or the host name in lower case, as the kubelet has it.
///
/// # Errors
/// The host name cannot be read, or is no name.
pub fn node_name(global: &Global) -> Result<NodeName, Error> {
    let name = match &global.node_name {
        // As kube-proxy's GetHostname (component-helpers/node/util/hostname.go).
        Some(name) => name.trim().to_lowercase(),
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

/// Where Services come from: `--manifests`, `--kubeconfig`, or the cluster that this process is a pod of.
///
/// # Errors
/// None of them.
pub fn origin(sources: &Sources) -> Result<Origin, Error> {
    let Sources {
        config: _,
        manifests,
        kubeconfig,
        master,
        nodeport_addresses: _,
        bind_address: _,
    } = sources;
    if let Some(folder) = manifests {
        return Ok(Origin::Manifests(folder.clone()));
    }
    if let Some(file) = kubeconfig {
        let access = Access::Kubeconfig(file.clone(), master.clone());
        return Ok(Origin::Kubernetes(access));
    }
    if master.is_some() || env::var_os("KUBERNETES_SERVICE_HOST").is_some() {
        return Ok(Origin::Kubernetes(Access::InCluster(master.clone())));
    }
    Err(Error::NoSource)
}

/// An empty model of the node called `here`, with what the flags say of its addresses.
pub fn model(here: NodeName, sources: &Sources) -> Model {
    let main_address = Some(sources.bind_address).filter(|ip| !ip.is_unspecified());
    Model::new(here)
        .with_node_ports(node_ports(sources))
        .with_main_address(main_address)
}

/// Which addresses serve node ports, in either layer.
fn node_ports(sources: &Sources) -> NodePortAddresses {
    let node_ports = NodePortAddresses::new(&sources.nodeport_addresses);
    for family in node_ports.unmentioned() {
        tracing::warn!(%family, "the list of addresses for node ports (--nodeport-addresses) names no network of this family: node ports are served on all addresses of it");
    }
    node_ports
}
