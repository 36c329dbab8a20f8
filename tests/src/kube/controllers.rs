//! A control plane whose controllers work, and its administrator's tool.

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use anyhow::{Context, ensure};

use super::{Component, ControlPlane, tool};
use crate::Topology;

impl ControlPlane {
    /// One that also fills EndpointSlices, makes pods, and finds nodes for them.
    ///
    /// # Errors
    /// The components are missing, or do not start.
    pub fn start_with_controllers(topology: &Topology) -> anyhow::Result<Self> {
        let mut control = Self::start_api_with(topology, &[])?;
        let kubeconfig = control.kubeconfig()?.display().to_string();
        let file = |name: &str| control.dir.join(name).display().to_string();
        let (key, authority) = (file("sa.key"), file("certs/apiserver.crt"));
        let controllers: [(&str, &[&str]); 2] = [
            (
                "kube-controller-manager",
                &[
                    "--service-account-private-key-file",
                    &key,
                    "--root-ca-file",
                    &authority,
                    // Within seconds, as small clusters of developers have it: a node that is made is usable.
                    "--node-monitor-period=1s",
                ],
            ),
            ("kube-scheduler", &[]),
        ];
        let mut started = Vec::new();
        for (name, more) in controllers {
            let log = control.dir.join(format!("{name}.log"));
            started.push(Component::start(
                name,
                &control.client.place,
                &log,
                |command| {
                    command.args(["--kubeconfig", &kubeconfig, "--leader-elect=false"]);
                    command.args(["--bind-address", "127.0.0.1"]);
                    command.args(more);
                },
            )?);
        }
        control.controllers = started;
        Ok(control)
    }

    /// What kubectl prints for the cluster's administrator.
    ///
    /// # Errors
    /// It fails: what it says.
    pub fn kubectl(&self, args: &[&str]) -> anyhow::Result<String> {
        self.run_kubectl(args, "")
    }

    /// Applies manifests.
    ///
    /// # Errors
    /// The API server refuses, or a field is unknown.
    pub fn apply_manifests(&self, yaml: &str) -> anyhow::Result<()> {
        let args = ["apply", "--validate=strict", "--filename=-"];
        self.run_kubectl(&args, yaml).map(drop)
    }

    fn run_kubectl(&self, args: &[&str], input: &str) -> anyhow::Result<String> {
        let mut command: Command = self.client.place.command(tool("kubectl")?)?;
        command.arg("--kubeconfig").arg(self.kubeconfig()?);
        command.args(args).stdin(Stdio::piped());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot start kubectl")?;
        let mut stdin = child.stdin.take().context("kubectl has no input")?;
        // Less than a pipe holds, so it need not read while it answers.
        stdin.write_all(input.as_bytes())?;
        drop(stdin);
        let output = child.wait_with_output()?;
        let said = String::from_utf8(output.stdout)?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "kubectl {args:?}: {errors}{said}");
        Ok(said)
    }
}
