//! The agent as a process on a node.

use std::{
    env,
    fs::{self, File},
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Output, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::{
    manifests::Manifests,
    place::{Place, built_binary},
    topology::Node,
    wait_for,
};

/// How long a start may take on a busy machine.
const START: Duration = Duration::from_secs(60);
/// Where an agent serves its health.
pub const HEALTHZ: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 10256);
/// Where an agent serves its metrics.
pub const METRICS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);

/// An agent, running or not. Dropping it kills the process and, in a failing test, prints its log.
#[derive(Debug)]
pub struct Agent {
    node: Node,
    place: Place,
    binary: PathBuf,
    args: Vec<String>,
    /// Everything that it runs with: no flag says which node is meant.
    is_bare: bool,
    log: PathBuf,
    nice: i32,
    path: Option<String>,
    child: Option<Child>,
}

/// The binary under test.
///
/// # Errors
/// It was not built.
pub fn agent_binary() -> anyhow::Result<PathBuf> {
    built_binary("PROXY_AGENT", "proxy-agent")
}

impl Agent {
    /// An agent for `node` that follows `manifests`; not started.
    ///
    /// # Errors
    /// The binary was not built.
    pub fn new(node: &Node, manifests: &Manifests, extra: &[&str]) -> anyhow::Result<Self> {
        let mut args = vec!["run".to_owned()];
        args.extend([
            "--manifests".to_owned(),
            manifests.dir().display().to_string(),
        ]);
        args.extend(["--healthz-bind-address".to_owned(), HEALTHZ.to_string()]);
        args.extend(["--metrics-bind-address".to_owned(), METRICS.to_string()]);
        args.extend(extra.iter().map(|&arg| arg.to_owned()));
        Ok(Self {
            node: node.clone(),
            place: node.place_in("agent")?,
            binary: agent_binary()?,
            args,
            is_bare: false,
            log: node.state_dir().join(format!("{}-agent.log", node.name())),
            nice: 0,
            path: None,
            child: None,
        })
    }

    /// An agent that is ready.
    ///
    /// # Errors
    /// It did not become ready; its log is in the error.
    pub fn start(node: &Node, manifests: &Manifests, extra: &[&str]) -> anyhow::Result<Self> {
        let mut agent = Self::new(node, manifests, extra)?;
        agent.spawn()?;
        agent.wait_ready()?;
        Ok(agent)
    }

    /// Runs it at this nice value.
    #[must_use]
    pub fn with_priority(mut self, nice: i32) -> Self {
        self.nice = nice;
        self
    }

    /// Has it follow an API server instead of files, from the next start on.
    pub fn follow_api(&mut self, kubeconfig: &Path) {
        if let Some(at) = self.args.iter().position(|arg| arg == "--manifests") {
            let followed = ["--kubeconfig".to_owned(), kubeconfig.display().to_string()];
            self.args.splice(at..at + 2, followed);
        }
    }

    /// Has it follow the cluster that it is a pod of, from the next start on.
    pub fn follow_own_cluster(&mut self) {
        if let Some(at) = self.args.iter().position(|arg| arg == "--manifests") {
            self.args.drain(at..at + 2);
        }
    }

    /// One flag more, which wins over those before, from the next start on.
    pub fn add_flag(&mut self, flag: &str) {
        self.args.push(flag.to_owned());
    }

    /// Has it follow files all the same.
    pub fn follow_manifests(&mut self, manifests: &Manifests) {
        self.add_flag(&format!("--manifests={}", manifests.dir().display()));
    }

    /// Has it read a configuration, with the flags of kube-proxy's DaemonSet and no others, from the next start on.
    pub fn read_config(&mut self, config: &Path) {
        self.is_bare = true;
        self.args = vec![
            format!("--config={}", config.display()),
            format!("--hostname-override={}", self.node.name()),
        ];
    }

    /// Uses another binary from the next start on.
    pub fn use_binary(&mut self, binary: &Path) {
        binary.clone_into(&mut self.binary);
    }

    /// From the next start on it finds the programs in this folder before those of the machine.
    ///
    /// # Errors
    /// The path of this process is no text.
    pub fn prefer(&mut self, folder: &Path) -> anyhow::Result<()> {
        let path = env::var("PATH")?;
        self.path = Some(format!("{}:{path}", folder.display()));
        Ok(())
    }

    /// Starts the process.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(&mut self) -> anyhow::Result<()> {
        let log = File::options().create(true).append(true).open(&self.log)?;
        let mut command = self.place.command("nice")?;
        command
            .args(["-n", &self.nice.to_string()])
            .arg(&self.binary);
        if !self.is_bare {
            command.args(self.global_args());
        }
        command.args(&self.args);
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        if let Some(path) = &self.path {
            command.env("PATH", path);
        }
        let child = command.spawn().context("cannot start the agent")?;
        ensure!(
            self.child.replace(child).is_none(),
            "the agent runs already"
        );
        Ok(())
    }

    /// Waits until it says that it is ready.
    ///
    /// # Errors
    /// It ended, or did not become ready in time.
    pub fn wait_ready(&mut self) -> anyhow::Result<()> {
        self.wait_ready_within(START)
    }

    /// As [`Agent::wait_ready`], for starts that take long.
    ///
    /// # Errors
    /// As there.
    pub fn wait_ready_within(&mut self, limit: Duration) -> anyhow::Result<()> {
        let ready = wait_for("the agent is ready", limit, || {
            let child = self.child.as_mut().context("not started")?;
            if let Some(status) = child.try_wait()? {
                return Ok(Err(status));
            }
            match self.place.http_get(HEALTHZ, "/readyz")? {
                (200, _) => Ok(Ok(())),
                (status, body) => bail!("/readyz: {status} {body}"),
            }
        });
        match ready {
            Ok(Ok(())) => Ok(()),
            Ok(Err(status)) => bail!("the agent ended with {status}:\n{}", self.log()),
            Err(error) => Err(error.context(self.log())),
        }
    }

    /// Kills the process as the kernel would for want of memory.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill9(&mut self) -> anyhow::Result<()> {
        let mut child = self.child.take().context("the agent does not run")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Asks it to end, and waits until it did.
    ///
    /// # Errors
    /// It does not run, or ended with an error.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        let mut child = self.child.take().context("the agent does not run")?;
        kill(Pid::from_raw(child.id().try_into()?), Signal::SIGTERM)?;
        let status = child.wait()?;
        ensure!(
            status.success(),
            "the agent ended with {status}:\n{}",
            self.log()
        );
        Ok(())
    }

    /// Waits until it ends by itself: the exit code, and what it wrote.
    ///
    /// # Errors
    /// It goes on running.
    pub fn wait_end(&mut self) -> anyhow::Result<(Option<i32>, String)> {
        let mut child = self.child.take().context("the agent does not run")?;
        let status = wait_for("the agent ends", START, || {
            child.try_wait()?.context("it still runs")
        });
        if status.is_err() {
            child.kill()?;
            child.wait()?;
        }
        Ok((status?.code(), self.log()))
    }

    /// Kills it, starts it, waits until it is ready.
    ///
    /// # Errors
    /// As those.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.kill9()?;
        self.spawn()?;
        self.wait_ready()
    }

    /// Its process id.
    ///
    /// # Errors
    /// It does not run.
    pub fn pid(&self) -> anyhow::Result<u32> {
        let child = self.child.as_ref().context("the agent does not run")?;
        Ok(child.id())
    }

    /// Where it runs.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// What it wrote so far, all starts together.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Runs a command of the agent's binary on the node; the running agent need not be alive.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn run(&self, args: &[&str]) -> anyhow::Result<Output> {
        let mut command = self.place.command(&self.binary)?;
        let output = command.args(self.global_args()).args(args).output();
        output.with_context(|| format!("cannot run the agent with {args:?}"))
    }

    /// As [`Agent::run`]: the standard output of a command that must succeed.
    ///
    /// # Errors
    /// It does not succeed.
    pub fn text(&self, args: &[&str]) -> anyhow::Result<String> {
        let output = self.run(args)?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "{args:?} ended with {}: {errors}",
            output.status
        );
        Ok(String::from_utf8(output.stdout)?)
    }

    /// As [`Agent::text`], with `-o json`.
    ///
    /// # Errors
    /// It does not succeed, or prints no JSON.
    pub fn json(&self, args: &[&str]) -> anyhow::Result<Value> {
        let text = self.text(&[args, &["-o", "json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("{args:?} printed {text:?}"))
    }

    /// Sum of the samples of a metric whose labels contain `labels`; none is zero.
    ///
    /// # Errors
    /// No answer.
    pub fn metric(&self, name: &str, labels: &str) -> anyhow::Result<f64> {
        let (status, body) = self.place.http_get(METRICS, "/metrics")?;
        ensure!(status == 200, "/metrics: {status}");
        Ok(sum_of(&body, name, labels))
    }

    /// Waits until a metric satisfies a condition.
    ///
    /// # Errors
    /// It did not in time.
    pub fn wait_metric(
        &self,
        name: &str,
        labels: &str,
        wanted: impl Fn(f64) -> bool,
    ) -> anyhow::Result<()> {
        wait_for(
            &format!("{name}{{{labels}}}"),
            Duration::from_secs(10),
            || {
                let value = self.metric(name, labels)?;
                ensure!(wanted(value), "it is {value}");
                Ok(())
            },
        )
    }

    /// Waits until its log contains `text`.
    ///
    /// # Errors
    /// It does not in time.
    pub fn wait_log(&self, text: &str) -> anyhow::Result<()> {
        wait_for(
            &format!("a line with {text:?}"),
            Duration::from_secs(10),
            || {
                let log = self.log();
                ensure!(log.contains(text), "{log}");
                Ok(())
            },
        )
    }

    /// Lets the process go on after this value is gone.
    pub fn leave(&mut self) {
        // Not waited for: it becomes a child of process 1.
        drop(self.child.take());
    }

    /// The binary.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// The node.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// The flags that say which node is meant.
    pub fn global_args(&self) -> [String; 6] {
        [
            "--node-name".to_owned(),
            self.node.name().to_owned(),
            "--cgroup".to_owned(),
            self.node.cgroup().display().to_string(),
            "--bpf-dir".to_owned(),
            self.node.bpf_dir().display().to_string(),
        ]
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("agent of {} ({}):", self.node.name(), self.place.nsenter());
            eprintln!("{}", self.log());
        }
        if let Some(mut child) = self.child.take() {
            // Gone already: nothing to do.
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// Sum of the samples of a metric in the text that Prometheus reads, whose labels contain `labels`.
pub fn sum_of(metrics: &str, name: &str, labels: &str) -> f64 {
    let value = |line: &str| {
        let rest = line.strip_prefix(name)?;
        let (head, value) = rest.rsplit_once(' ')?;
        let complete = head.is_empty() || head.starts_with('{');
        (complete && head.contains(labels)).then(|| value.parse::<f64>().ok())?
    };
    metrics.lines().filter_map(value).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_one_metric_are_added_by_label() {
        let text = "# TYPE a counter\na_total{x=\"1\"} 2\na_total{x=\"2\"} 3\na_totals 9\nb 1\n";
        assert_eq!(sum_of(text, "a_total", ""), 5.0);
        assert_eq!(sum_of(text, "a_total", "x=\"2\""), 3.0);
        assert_eq!(sum_of(text, "b", ""), 1.0);
    }
}
