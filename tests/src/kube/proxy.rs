//! The real kube-proxy on a node.

use std::{
    fmt, fs,
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use super::{Component, ControlPlane};
use crate::{Node, agent::sum_of, let_run, place::Place, wait_for};

/// Longest start: the first sync of a small cluster takes a second on a quiet machine.
const START: Duration = Duration::from_secs(120);

/// Between two looks at its metrics: each costs it milliseconds, which its start would otherwise have.
const LOOK: Duration = Duration::from_millis(50);

/// How it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// By iptables.
    Iptables(Variant),
    /// By a table of its own in nftables.
    Nftables,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Iptables(variant) => write!(f, "iptables-{}", variant.name()),
            Self::Nftables => f.write_str("nftables"),
        }
    }
}

/// Which tools `iptables` stands for on a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// `iptables-nft`.
    Nft,
    /// `iptables-legacy`.
    Legacy,
}

impl Variant {
    /// As in the names of the tools.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nft => "nft",
            Self::Legacy => "legacy",
        }
    }

    /// Makes the chain by which kubelet tells everybody that this variant is the node's.
    ///
    /// # Errors
    /// The tools are missing.
    pub fn hint(self, node: &Node) -> anyhow::Result<()> {
        for family in ["iptables", "ip6tables"] {
            let tool = format!("{family}-{}", self.name());
            node.output(&tool, &["-t", "mangle", "-N", "KUBE-IPTABLES-HINT"])?;
        }
        Ok(())
    }

    /// A folder in which `iptables` and its siblings are those of this variant.
    fn folder(self, parent: &Path) -> anyhow::Result<PathBuf> {
        let folder = parent.join(format!("iptables-{}", self.name()));
        if folder.is_dir() {
            return Ok(folder);
        }
        fs::create_dir_all(&folder)?;
        let multi = format!("/usr/sbin/xtables-{}-multi", self.name());
        ensure!(Path::new(&multi).exists(), "no {multi}");
        for family in ["iptables", "ip6tables"] {
            for verb in ["", "-save", "-restore"] {
                symlink(&multi, folder.join(format!("{family}{verb}")))?;
            }
        }
        Ok(folder)
    }
}

/// When it works, in the words of its configuration.
#[derive(Clone, Copy, Debug)]
pub struct Periods {
    /// Shortest time between two changes of the rules.
    pub min_sync: &'static str,
    /// Between two looks at its canary, and between attempts after a failure.
    pub sync: &'static str,
}

/// Changes soon, and a look at the canary soon.
const QUICK: Periods = Periods {
    min_sync: "100ms",
    sync: "1s",
};

/// kube-proxy, running.
#[derive(Debug)]
pub struct KubeProxy {
    place: Place,
    metrics: SocketAddr,
    config: PathBuf,
    component: Component,
}

impl KubeProxy {
    /// Starts one on `node`; its metrics are at 127.0.0.1:10249 unless that is taken.
    ///
    /// # Errors
    /// It is missing, or cannot be started.
    pub fn spawn(control: &ControlPlane, node: &Node, mode: Mode) -> anyhow::Result<Self> {
        Self::spawn_with(control, node, mode, QUICK)
    }

    /// As [`KubeProxy::spawn`], with other periods.
    ///
    /// # Errors
    /// As there.
    pub fn spawn_with(
        control: &ControlPlane,
        node: &Node,
        mode: Mode,
        periods: Periods,
    ) -> anyhow::Result<Self> {
        Self::spawn_by(control, node, mode, periods, json!({}))
    }

    /// Starts one by a file that an agent can read as well: `own` are the options that only the agent has.
    ///
    /// # Errors
    /// As [`KubeProxy::spawn`].
    pub fn spawn_sharing(
        control: &ControlPlane,
        node: &Node,
        mode: Mode,
        own: Value,
    ) -> anyhow::Result<Self> {
        Self::spawn_by(control, node, mode, QUICK, own)
    }

    fn spawn_by(
        control: &ControlPlane,
        node: &Node,
        mode: Mode,
        periods: Periods,
        own: Value,
    ) -> anyhow::Result<Self> {
        control.apply_node(node)?;
        let metrics = SocketAddr::from((Ipv4Addr::LOCALHOST, 10249));
        let content = configuration(control, node, mode, metrics, periods, own)?;
        let dir = node.state_dir();
        let config = dir.join(format!("{}-kube-proxy.json", node.name()));
        fs::write(&config, content.to_string())?;
        let place = node.place_in("kube-proxy")?;
        let variant = match mode {
            Mode::Iptables(variant) => variant,
            // What it removes at its start.
            Mode::Nftables => Variant::Nft,
        };
        let first = variant.folder(&dir)?;
        let mut path = first.into_os_string();
        path.push(":/usr/sbin:/usr/bin:/sbin:/bin");
        let log = dir.join(format!("{}-kube-proxy.log", node.name()));
        let component = Component::start("kube-proxy", &place, &log, |command| {
            command.arg(format!("--config={}", config.display()));
            command.arg(format!("--hostname-override={}", node.name()));
            command.env("PATH", path);
        })?;
        Ok(Self {
            place,
            metrics,
            config,
            component,
        })
    }

    /// One that serves, started as by [`KubeProxy::spawn_sharing`].
    ///
    /// # Errors
    /// As [`KubeProxy::start`].
    pub fn start_sharing(
        control: &ControlPlane,
        node: &Node,
        mode: Mode,
        own: Value,
    ) -> anyhow::Result<Self> {
        let mut proxy = Self::spawn_sharing(control, node, mode, own)?;
        proxy.wait_synced()?;
        Ok(proxy)
    }

    /// One that serves.
    ///
    /// # Errors
    /// As [`KubeProxy::spawn`], or it does not get there.
    pub fn start(control: &ControlPlane, node: &Node, mode: Mode) -> anyhow::Result<Self> {
        let mut proxy = Self::spawn(control, node, mode)?;
        proxy.wait_synced()?;
        Ok(proxy)
    }

    /// Waits until it has written the rules of both families once; its port must not be somebody else's.
    ///
    /// # Errors
    /// It does not in time.
    pub fn wait_synced(&mut self) -> anyhow::Result<()> {
        self.wait_synced_within(START)
    }

    /// As [`KubeProxy::wait_synced`], for starts that take long.
    ///
    /// # Errors
    /// As there.
    pub fn wait_synced_within(&mut self, limit: Duration) -> anyhow::Result<()> {
        wait_for("kube-proxy has synced", limit, || {
            let alive = self.component.ensure_alive();
            if alive.is_err() {
                return Ok(alive);
            }
            for family in ["IPv4", "IPv6"] {
                let syncs = self.metric(
                    "kubeproxy_sync_proxy_rules_duration_seconds_count",
                    &format!("ip_family=\"{family}\""),
                )?;
                if syncs < 1.0 {
                    let_run(LOOK);
                    bail!("no sync of {family} yet");
                }
            }
            Ok(Ok(()))
        })
        .and_then(|alive| alive)
        .with_context(|| self.component.last_words())
    }

    /// Sum of the samples of a metric whose labels contain `labels`.
    ///
    /// # Errors
    /// No answer.
    pub fn metric(&self, name: &str, labels: &str) -> anyhow::Result<f64> {
        let (status, body) = self.place.http_get(self.metrics, "/metrics")?;
        ensure!(status == 200, "/metrics: {status}");
        Ok(sum_of(&body, name, labels))
    }

    /// Kills it as the kernel would for want of memory.
    ///
    /// # Errors
    /// It ended before.
    pub fn kill9(mut self) -> anyhow::Result<()> {
        self.component.ensure_alive()?;
        self.component.child.kill()?;
        self.component.child.wait()?;
        Ok(())
    }

    /// Asks it to end, and waits until it did.
    ///
    /// # Errors
    /// It ended before.
    pub fn stop(mut self) -> anyhow::Result<()> {
        self.component.ensure_alive()?;
        let pid = self.component.child.id().try_into()?;
        kill(Pid::from_raw(pid), Signal::SIGTERM)?;
        self.component.child.wait()?;
        Ok(())
    }

    /// Its configuration.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Where it runs.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.component.child.id()
    }

    /// The end of its log.
    pub fn last_words(&self) -> String {
        self.component.last_words()
    }
}

fn configuration(
    control: &ControlPlane,
    node: &Node,
    mode: Mode,
    metrics: SocketAddr,
    periods: Periods,
    mut own: Value,
) -> anyhow::Result<Value> {
    own["bpfDir"] = node.bpf_dir().display().to_string().into();
    own["cgroup"] = node.cgroup().display().to_string().into();
    let kubeconfig = control.kubeconfig()?;
    let word = match mode {
        Mode::Iptables(_) => "iptables",
        Mode::Nftables => "nftables",
    };
    let periods = json!({"minSyncPeriod": periods.min_sync, "syncPeriod": periods.sync});
    Ok(json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": word,
        "clusterCIDR": "10.244.0.0/16,fd00:10:244::/48",
        "metricsBindAddress": metrics.to_string(),
        "healthzBindAddress": "127.0.0.1:10256",
        "clientConnection": {"kubeconfig": kubeconfig, "qps": 1000.0, "burst": 2000},
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        "iptables": periods,
        "nftables": periods,
        "logging": {"verbosity": 2},
        "proxyAgent": own,
    }))
}
