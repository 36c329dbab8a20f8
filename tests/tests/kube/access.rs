//! How the agent proves who it is to the API server, and what becomes of a node whose agent cannot, or that meets another
//! server than its own.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::ensure;
use jiff::Timestamp;
use proxy_tests::{
    agent::HEALTHZ,
    kube::{KUBE_PROXY, NOBODY, Server, Variant},
    scenario::SOON,
    topology::SWITCH,
    wait_for,
};
use serde_json::{Value, json};

use crate::cluster::{Cluster, assert_none_failed};

/// Who has the role `system:node-proxier` by name.
const USER: &str = "system:kube-proxy";
/// A token is read again within a minute, and the longest wait between two tries is another.
const RECOVERY: Duration = Duration::from_secs(180);
const UNAUTHORIZED: &str = "the API server does not know who this is";
const EARLY: &str = "certificate not valid yet";
const ARGS: [&str; 2] = ["--mode", "iptables"];

/// A program of this text.
fn script(path: &Path, text: &str) -> anyhow::Result<PathBuf> {
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(path.to_owned())
}

/// A plugin that gives this credential.
fn plugin(c: &Cluster, name: &str, status: &Value) -> anyhow::Result<Value> {
    let version = "client.authentication.k8s.io/v1";
    let credential = json!({"apiVersion": version, "kind": "ExecCredential", "status": status});
    let path = c.scenario.topology.state_dir().join(name);
    let text = format!("#!/bin/sh\ncat <<'END'\n{credential}\nEND\n");
    let command = script(&path, &text)?;
    Ok(json!({"exec": {"apiVersion": version, "command": command, "interactiveMode": "Never"}}))
}

/// The agent follows the API server, by which it is let in.
fn serves(c: &mut Cluster, kubeconfig: &Path) -> anyhow::Result<()> {
    let (near, far) = (c.scenario.near.clone(), c.scenario.far.clone());
    c.apply(&[&near])?;
    c.scenario.agent.follow_api(kubeconfig);
    c.scenario.agent.spawn()?;
    c.scenario.agent.wait_ready()?;
    c.wait_served_by(&[&near])?;
    c.apply(&[&far])?;
    c.wait_served_by(&[&far])?;
    c.scenario.agent.stop()
}

#[test]
#[ignore = "needs root"]
fn a_client_certificate_and_plugins_are_who_the_agent_is() {
    Cluster::run("access", Variant::Nft, &ARGS, |c| {
        c.control.apply_node(&c.scenario.a)?;
        let certificate = c.control.client_certificate(USER, false)?;
        let text =
            |field: &str| fs::read_to_string(certificate[field].as_str().unwrap_or_default());
        let by_certificate = json!({
            "clientCertificateData": text("client-certificate")?,
            "clientKeyData": text("client-key")?,
        });
        let soon = Timestamp::now() + Duration::from_secs(90);
        let by_token = json!({"token": KUBE_PROXY, "expirationTimestamp": soon.to_string()});
        for (name, user) in [
            ("certificate", certificate),
            ("plugin-token", plugin(c, "plugin-token", &by_token)?),
            (
                "plugin-certificate",
                plugin(c, "plugin-certificate", &by_certificate)?,
            ),
        ] {
            println!("{name}");
            let kubeconfig = c.control.kubeconfig_for(name, &user, Server::Own)?;
            serves(c, &kubeconfig)?;
        }
        Ok(())
    });
}

/// A program that becomes the agent in a pod's view of its ServiceAccount, and in nothing else of a pod.
fn in_a_pod(c: &Cluster, account: &Path) -> anyhow::Result<PathBuf> {
    let state = c.scenario.topology.state_dir();
    let (agent, account) = (c.scenario.agent.binary().display(), account.display());
    let run = state.join("run");
    fs::create_dir_all(&run)?;
    let run = run.display();
    let text = format!(
        "#!/bin/sh\nexec unshare --mount sh -e -c '
mount --rbind /run {run}
mount -t tmpfs none /run
mkdir -p /run/netns /run/secrets/kubernetes.io/serviceaccount
mount --rbind {run}/netns /run/netns
touch /run/xtables.lock
mount --bind {run}/xtables.lock /run/xtables.lock
mount --bind {account} /run/secrets/kubernetes.io/serviceaccount
export KUBERNETES_SERVICE_HOST={SWITCH} KUBERNETES_SERVICE_PORT=6443
exec {agent} \"$@\"
' sh \"$@\"\n"
    );
    script(&state.join("in-a-pod"), &text)
}

#[test]
#[ignore = "needs root"]
fn in_a_pod_its_service_account_is_who_the_agent_is_and_its_token_may_change() {
    Cluster::run("access-pod", Variant::Nft, &ARGS, |c| {
        let (near, far) = (c.scenario.near.clone(), c.scenario.far.clone());
        let outsider = c.scenario.topology.outsider()?;
        c.control.apply_node(&c.scenario.a)?;
        c.apply(&[&near])?;
        let account = c.control.service_account("first")?;
        let wrapper = in_a_pod(c, &account)?;
        c.scenario.agent.use_binary(&wrapper);
        c.scenario.agent.follow_own_cluster();
        c.scenario.agent.spawn()?;
        c.scenario.agent.wait_ready()?;
        c.wait_served_by(&[&near])?;
        let loads = c.load(&outsider)?;
        // As kubelet does before a token runs out.
        c.control.service_account("second")?;
        c.control.delete_secret("first")?;
        c.control.stop_api();
        c.wait_problems(SOON, |count| count > 0.0)?;
        c.control.start_api(&[])?;
        c.apply(&[&far])?;
        c.wait_problems(RECOVERY, |count| count == 0.0)?;
        c.wait_served_by(&[&far])?;
        assert_none_failed(loads)
    });
}

#[test]
#[ignore = "needs root"]
fn a_node_whose_agent_is_not_let_in_goes_on_and_is_told_why() {
    Cluster::run("access-bad", Variant::Nft, &ARGS, |c| {
        let (near, far) = (c.scenario.near.clone(), c.scenario.far.clone());
        let outsider = c.scenario.topology.outsider()?;
        c.control.apply_node(&c.scenario.a)?;
        c.apply(&[&near])?;
        let good = c.control.kubeconfig_of(KUBE_PROXY)?;
        c.scenario.agent.follow_api(&good);
        c.scenario.agent.spawn()?;
        c.scenario.agent.wait_ready()?;
        c.wait_served_by(&[&near])?;
        let loads = c.load(&outsider)?;
        let token = json!({"token": KUBE_PROXY});
        let expired = c.control.client_certificate(USER, true)?;
        let control = &c.control;
        control.grant(NOBODY, &[("", "services"), ("", "nodes")])?;
        for (name, user, server, said) in [
            (
                "unknown",
                &json!({"token": "unknown"}),
                Server::Any,
                UNAUTHORIZED,
            ),
            ("expired", &expired, Server::Any, UNAUTHORIZED),
            (
                "another",
                &token,
                Server::Another,
                "invalid peer certificate",
            ),
            (
                NOBODY,
                &json!({"token": NOBODY}),
                Server::Any,
                r#"resources: ["endpointslices"], verbs: ["list", "watch"]}"#,
            ),
        ] {
            println!("{name}");
            let bad = c.control.kubeconfig_for(name, user, server)?;
            c.scenario.agent.kill9()?;
            c.scenario
                .agent
                .add_flag(&format!("--kubeconfig={}", bad.display()));
            c.scenario.agent.spawn()?;
            wait_for("the agent says what it waits for", SOON, || {
                let (status, body) = c.scenario.agent.place().http_get(HEALTHZ, "/readyz")?;
                ensure!(status == 503 && body.contains(said), "{status} {body}");
                Ok(())
            })?;
            c.wait_served_by(&[&near])?;
        }
        // One that is not there.
        c.scenario.agent.kill9()?;
        c.scenario.agent.add_flag("--kubeconfig=/nowhere");
        c.scenario.agent.spawn()?;
        let (code, log) = c.scenario.agent.wait_end()?;
        ensure!(
            code == Some(1) && log.contains("cannot use the kubeconfig /nowhere"),
            "{log}"
        );
        c.wait_served_by(&[&near])?;
        c.scenario
            .agent
            .add_flag(&format!("--kubeconfig={}", good.display()));
        c.scenario.agent.spawn()?;
        c.scenario.agent.wait_ready()?;
        c.apply(&[&far])?;
        c.wait_served_by(&[&far])?;
        assert_none_failed(loads)
    });
}

#[test]
#[ignore = "needs root"]
fn a_clock_that_is_an_hour_behind_is_told_and_costs_nothing() {
    Cluster::run("access-clock", Variant::Nft, &ARGS, |c| {
        let (near, far) = (c.scenario.near.clone(), c.scenario.far.clone());
        let outsider = c.scenario.topology.outsider()?;
        c.control.apply_node(&c.scenario.a)?;
        c.apply(&[&near])?;
        let user = json!({"token": KUBE_PROXY});
        let kubeconfig = c.control.kubeconfig_for("careful", &user, Server::Own)?;
        c.scenario.agent.follow_api(&kubeconfig);
        c.scenario.agent.spawn()?;
        c.scenario.agent.wait_ready()?;
        c.wait_served_by(&[&near])?;
        let loads = c.load(&outsider)?;
        let early = c.control.early_certificate()?;
        c.control.stop_api();
        c.control.start_api(&early.each_ref().map(String::as_str))?;
        c.wait_log(EARLY)?;
        c.scenario.agent.kill9()?;
        c.scenario.agent.spawn()?;
        wait_for("the agent says what it waits for", SOON, || {
            let (status, body) = c.scenario.agent.place().http_get(HEALTHZ, "/readyz")?;
            ensure!(status == 503 && body.contains(EARLY), "{status} {body}");
            Ok(())
        })?;
        c.wait_served_by(&[&near])?;
        // The clock is right again.
        c.control.stop_api();
        c.control.start_api(&[])?;
        c.scenario.agent.wait_ready_within(RECOVERY)?;
        c.apply(&[&far])?;
        c.wait_served_by(&[&far])?;
        assert_none_failed(loads)
    });
}
