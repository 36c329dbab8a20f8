//! Who writes the rules of a node in the benches that compare: the agent, or the real kube-proxy.

use std::{
    fmt, fs,
    ops::{Div, Sub},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::{
    Agent, Manifests, Node, Place,
    kube::{ControlPlane, KubeProxy, Mode, Periods, Variant},
};

/// The defaults, which both sides have in common.
const DEFAULT: Periods = Periods {
    min_sync: "1s",
    sync: "30s",
};
/// For those who serve by rules alone, and are measured change by change.
const QUICK: Periods = Periods {
    min_sync: "100ms",
    ..DEFAULT
};
const POD_NETWORKS: &str = "10.244.0.0/16,fd00:10:244::/48";

/// A proxy on iptables or nftables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proxy {
    /// The agent in iptables mode.
    Ours(Variant),
    /// kube-proxy.
    Kube(Mode),
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ours(variant) => write!(f, "proxy-agent iptables-{}", variant.name()),
            Self::Kube(mode) => write!(f, "kube-proxy {mode}"),
        }
    }
}

impl Proxy {
    /// A name for its node.
    pub fn node_name(self) -> String {
        match self {
            Self::Ours(variant) => format!("ours-{}", variant.name()),
            Self::Kube(mode) => format!("kube-{mode}"),
        }
    }
}

/// A proxy at work.
#[derive(Debug)]
pub enum Running {
    /// The agent.
    Ours(Agent),
    /// kube-proxy.
    Kube(KubeProxy),
}

/// CPU time in seconds since a proxy was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Cpu {
    /// Of its process and everything that it started.
    pub all_s: f64,
    /// Of the tools that it ran to the end (iptables-restore, iptables-save, nft and so on), in their own code.
    pub tools_user_s: f64,
    /// The kernel's work for those tools.
    pub tools_kernel_s: f64,
}

impl Cpu {
    /// Of the process itself, without the tools.
    pub fn own_s(self) -> f64 {
        self.all_s - self.tools_user_s - self.tools_kernel_s
    }
}

impl Sub for Cpu {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            all_s: self.all_s - before.all_s,
            tools_user_s: self.tools_user_s - before.tools_user_s,
            tools_kernel_s: self.tools_kernel_s - before.tools_kernel_s,
        }
    }
}

impl Div<f64> for Cpu {
    type Output = Self;

    fn div(self, count: f64) -> Self {
        Self {
            all_s: self.all_s / count,
            tools_user_s: self.tools_user_s / count,
            tools_kernel_s: self.tools_kernel_s / count,
        }
    }
}

impl Running {
    /// Starts the agent in iptables mode on a node that nobody has served yet.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn ours(node: &Node, variant: Variant, manifests: &Manifests) -> Result<Self> {
        variant.hint(node)?;
        let args = [
            "--mode",
            "iptables",
            "--cluster-cidr",
            POD_NETWORKS,
            "--iptables-min-sync-period",
            QUICK.min_sync,
        ];
        let mut agent = Agent::new(node, manifests, &args)?;
        agent.spawn()?;
        Ok(Self::Ours(agent))
    }

    /// Starts the agent with both layers on a node that nobody has served yet; it follows the API server.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn following(control: &ControlPlane, node: &Node) -> Result<Self> {
        Variant::Nft.hint(node)?;
        let mut agent = follower(control, node)?;
        agent.spawn()?;
        Ok(Self::Ours(agent))
    }

    /// Starts kube-proxy on a node that nobody has served yet, as quick as [`Running::ours`].
    ///
    /// # Errors
    /// It cannot be started.
    pub fn kube(control: &ControlPlane, node: &Node, mode: Mode) -> Result<Self> {
        KubeProxy::spawn_with(control, node, mode, QUICK).map(Self::Kube)
    }

    /// Starts kube-proxy as it is by default, as [`Running::following`].
    ///
    /// # Errors
    /// It cannot be started.
    pub fn kube_by_default(control: &ControlPlane, node: &Node, mode: Mode) -> Result<Self> {
        KubeProxy::spawn_with(control, node, mode, DEFAULT).map(Self::Kube)
    }

    /// Waits until its rules are complete: how long after `start` that was.
    ///
    /// # Errors
    /// Not within `limit`.
    pub fn wait_complete(&mut self, start: Instant, limit: Duration) -> Result<Duration> {
        match self {
            Self::Ours(agent) => agent.wait_ready_within(limit)?,
            Self::Kube(proxy) => proxy.wait_synced_within(limit)?,
        }
        Ok(start.elapsed())
    }

    /// What it and its children have used up.
    ///
    /// # Errors
    /// It does not run.
    pub fn cpu(&self) -> Result<Cpu> {
        let (place, pid) = (self.place(), self.pid()?);
        let all = fs::read_to_string(place.cgroup.join("cpu.stat"))?;
        let process = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        cpu(&all, &process).with_context(|| format!("no CPU time in {all:?} and {process:?}"))
    }

    /// Its process id.
    ///
    /// # Errors
    /// It does not run.
    pub fn pid(&self) -> Result<u32> {
        match self {
            Self::Ours(agent) => agent.pid(),
            Self::Kube(proxy) => Ok(proxy.pid()),
        }
    }

    fn place(&self) -> &Place {
        match self {
            Self::Ours(agent) => agent.place(),
            Self::Kube(proxy) => proxy.place(),
        }
    }

    /// Ends it; its rules stay.
    ///
    /// # Errors
    /// It ended before.
    pub fn stop(self) -> Result<()> {
        match self {
            Self::Ours(mut agent) => agent.stop(),
            Self::Kube(proxy) => proxy.stop(),
        }
    }
}

/// An agent with both layers that follows the API server; not started.
///
/// # Errors
/// The API server refuses its Node.
pub fn follower(control: &ControlPlane, node: &Node) -> Result<Agent> {
    control.apply_node(node)?;
    let unused = Manifests::new(&node.state_dir(), "unused")?;
    let mut agent = Agent::new(node, &unused, &["--cluster-cidr", POD_NETWORKS])?;
    agent.follow_api(&control.kubeconfig()?);
    Ok(agent)
}

/// From `cpu.stat` of a cgroup and `stat` of a process (proc_pid_stat(5), fields 16 and 17: children that were waited for).
fn cpu(all: &str, process: &str) -> Option<Cpu> {
    /// USER_HZ, the same on every architecture that runs here.
    const TICKS_PER_SECOND: f64 = 100.0;
    let usage = all
        .lines()
        .find_map(|line| line.strip_prefix("usage_usec "))?;
    // The second field, the name, may have spaces in it.
    let mut fields = process.rsplit_once(") ")?.1.split(' ').skip(13);
    let mut ticks = || fields.next()?.parse::<f64>().ok();
    Some(Cpu {
        all_s: usage.parse::<f64>().ok()? / 1e6,
        tools_user_s: ticks()? / TICKS_PER_SECOND,
        tools_kernel_s: ticks()? / TICKS_PER_SECOND,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_read_of_the_cgroup_and_of_the_children() {
        let all = "usage_usec 2500000\nuser_usec 1\n";
        let process = "7 (a b) S 1 7 7 0 -1 4194560 115 9 0 0 11 12 150 25 20 0 4 0 100";
        let expected = Cpu {
            all_s: 2.5,
            tools_user_s: 1.5,
            tools_kernel_s: 0.25,
        };
        assert_eq!(cpu(all, process), Some(expected));
        assert_eq!(cpu("", process), None);
    }
}
