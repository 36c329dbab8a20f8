//! `cleanup`, and kube-proxy's flag for it: what an agent or kube-proxy left on the node.

use std::{process::ExitCode, sync::Arc};

use super::Error;
use crate::{
    backends::{
        self,
        ebpf::kernel,
        iptables::{
            self, Extent,
            host::{self, Host, Owner},
            leftovers,
        },
    },
    cli, daemon,
};

/// `cleanup`.
///
/// # Errors
/// An agent runs, or the kernel refuses; with `--kube-proxy`, another proxy runs, or no agent's rules serve the node.
pub fn cleanup(global: &cli::Global, args: &cli::Cleanup) -> Result<ExitCode, Error> {
    let another = daemon::rival::answer();
    if args.kube_proxy {
        refuse_beside(another.as_deref())?;
        clean_up_kube_proxy(leftovers::ensure_served)?;
        return Ok(ExitCode::SUCCESS);
    }
    // One in mode nftables shares nothing with us.
    let extent = match another.as_deref() {
        None | Some("nftables") => Extent::Ours,
        Some(_) => Extent::OursAlone,
    };
    remove(global, extent)?;
    Ok(ExitCode::SUCCESS)
}

/// `run --cleanup`, as kube-proxy has it: what any proxy left.
///
/// # Errors
/// An agent or another proxy runs, or the kernel refuses.
pub fn cleanup_everything(global: &cli::Global) -> Result<(), Error> {
    refuse_beside(daemon::rival::answer().as_deref())?;
    remove(global, Extent::Everything)?;
    match Host::installed() {
        Ok(()) => clean_up_kube_proxy(|_| Ok(())),
        // Nobody can have made rules.
        Err(_) => Ok(()),
    }
}

/// Hooks, maps, and chains to this extent.
fn remove(global: &cli::Global, extent: Extent) -> Result<(), Error> {
    kernel::cleanup(&global.bpf_dir)?;
    let owner = Arc::new(Owner::take()?);
    // Without the tools nobody can have made rules.
    if Host::installed().is_ok() {
        let host = Host::find(Some(owner))?;
        tell_lacks(&host);
        for key in iptables::remove(host, extent)?.kept {
            tracing::warn!(
                "{key} is empty but stays: a rule of somebody else leads to it; remove that rule, then run this again"
            );
        }
        host::accounts::remove()?;
    }
    Ok(())
}

fn refuse_beside(another: Option<&str>) -> Result<(), Error> {
    match another {
        None => Ok(()),
        Some(mode) => Err(backends::Error::Unusable(format!(
            "another proxy serves this node (mode {mode}): stop it first, its rules are in use"
        ))
        .into()),
    }
}

fn tell_lacks(host: &Host) {
    for (family, error) in host.lacks() {
        tracing::warn!(%family, error, "these tables cannot be read, and stay as they are");
    }
}

fn clean_up_kube_proxy(
    ensure_unused: impl FnOnce(&mut Host) -> Result<(), backends::Error>,
) -> Result<(), Error> {
    let mut host = Host::find(None)?;
    tell_lacks(&host);
    ensure_unused(&mut host)?;
    for what in leftovers::remove(&mut host)? {
        tracing::info!(what, "removed");
    }
    if leftovers::remove_link()? {
        tracing::info!(what = "link kube-ipvs0", "removed");
    }
    Ok(())
}
