//! The packaged servers that run in the pods.

use std::{
    fs::{self, File, Permissions},
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    process::{Command, Output, Stdio},
    time::Duration,
};

use anyhow::ensure;

use crate::{Pod, Topology, wait_for};

const START: Duration = Duration::from_secs(10);

/// A web server: at / the pod's name, at /cgi-bin/source the name and the client's address, "web-1@192.168.77.100".
pub(super) fn start_web(topology: &Topology, pod: &Pod) -> anyhow::Result<()> {
    let root = topology.state_dir().join(pod.name());
    fs::create_dir_all(&root)?;
    fs::write(root.join("index.html"), format!("{}\n", pod.name()))?;
    let script = root.join("cgi-bin/source");
    fs::create_dir_all(root.join("cgi-bin"))?;
    fs::write(&script, source_script(pod.name()))?;
    fs::set_permissions(&script, Permissions::from_mode(0o755))?;
    let mut command = pod.place().command("busybox")?;
    command
        .args(["httpd", "-f", "-p", "[::]:8080", "-h"])
        .arg(&root);
    start(topology, pod, command)?;
    wait_for("the web server answers", START, || {
        let (status, body) = pod
            .place()
            .http_get(SocketAddr::from((pod.v4(), 8080)), "/")?;
        ensure!(status == 200, "{status} {body}");
        Ok(())
    })
}

/// A DNS server that knows one name, and says who it is.
pub(super) fn start_dns(topology: &Topology, pod: &Pod) -> anyhow::Result<()> {
    let mut command = pod.place().dns_server()?;
    command.args(["--log-facility=-", "--local=/cluster.local/"]);
    command.arg("--host-record=web.default.svc.cluster.local,10.96.0.80,fd00:10:96::80");
    command.arg(format!("--txt-record=whoami.cluster.local,{}", pod.name()));
    start(topology, pod, command)?;
    let dig = || -> anyhow::Result<Output> {
        let mut dig = pod.place().command("dig")?;
        dig.args([
            "@127.0.0.1",
            "+short",
            "+tries=1",
            "+timeout=1",
            "TXT",
            "whoami.cluster.local",
        ]);
        Ok(dig.output()?)
    };
    wait_for("the DNS server answers", START, || {
        let output = dig()?;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stdout)
        );
        Ok(())
    })
}

/// httpd writes an IPv6 address in brackets, and an IPv4 one as v4-mapped.
fn source_script(pod: &str) -> String {
    format!(
        r#"#!/bin/sh
source=${{REMOTE_ADDR#[}}
source=${{source%]}}
printf 'Content-Type: text/plain\r\n\r\n{pod}@%s\n' "${{source#::ffff:}}"
"#
    )
}

fn start(topology: &Topology, pod: &Pod, mut command: Command) -> anyhow::Result<()> {
    let log = File::create(topology.state_dir().join(format!("{}.log", pod.name())))?;
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    let child = command.spawn()?;
    // The janitor ends it, by its cgroup.
    drop(child);
    Ok(())
}
