//! What a configuration file and the flags of kube-proxy's DaemonSet do to the process.

use std::{fs, net::SocketAddr};

use anyhow::ensure;
use proxy_tests::{
    Peer, Scenario,
    agent::HEALTHZ,
    scenario::{TCP, fails_with, in_family, reaches},
};
use serde_json::{Value, json};

/// Writes a configuration for this node; the agent reads it from the next start on, and its manifests as before.
fn configure(s: &mut Scenario, fields: &Value) -> anyhow::Result<std::path::PathBuf> {
    let mut config = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "hostnameOverride": s.a.name(),
        "clusterCIDR": "10.244.0.0/16,fd00:10:244::/48",
        "healthzBindAddress": HEALTHZ.to_string(),
        "conntrack": {"maxPerCore": 0},
        "oomScoreAdj": 0,
        "proxyAgent": {"mode": "ebpf", "bpfDir": s.a.bpf_dir(), "cgroup": s.a.cgroup()},
    });
    for (field, value) in fields.as_object().into_iter().flatten() {
        config[field] = value.clone();
    }
    let path = s.topology.state_dir().join("config.conf");
    // In its place at once: a watched file may be read at any time.
    fs::write(&path, config.to_string())?;
    s.agent.read_config(&path);
    s.agent.follow_manifests(&s.manifests);
    Ok(path)
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_change_of_the_file_ends_the_agent_and_the_next_one_obeys_it() {
    in_family("config", false, &[], |s| {
        s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.near)))?;
        let client = s.client.peer()?;
        s.agent.stop()?;
        let path = configure(s, &json!({"metricsBindAddress": "127.0.0.1:10249"}))?;
        s.agent.spawn()?;
        s.agent.wait_ready()?;
        reaches(&client, s.vip(1), &["near"])?;
        let (_, configz) =
            s.a.place()
                .http_get(proxy_tests::agent::METRICS, "/configz")?;
        let configz: Value = serde_json::from_str(&configz)?;
        let in_force = &configz["kubeproxy.config.k8s.io"];
        ensure!(in_force["hostnameOverride"] == s.a.name(), "{configz}");

        // As an editor does, and kubelet when a ConfigMap changes: the file that was read is still what it was.
        let other = path.with_extension("new");
        fs::copy(&path, &other)?;
        fs::rename(&other, &path)?;
        let (_, log) = (s.agent.wait_log("the file was deleted")?, s.agent.log());
        ensure!(!log.contains("was changed"), "{log}");
        s.agent.restart()?;
        fs::write(&path, fs::read_to_string(&path)? + "\n")?;
        let (code, log) = s.agent.wait_end()?;
        ensure!(
            code == Some(1) && log.contains("config.conf was changed"),
            "{log}"
        );
        reaches(&client, s.vip(1), &["near"])
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_wrong_file_is_refused_and_what_serves_goes_on() {
    in_family("config-wrong", false, &[], |s| {
        s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.near)))?;
        let client = s.client.peer()?;
        s.agent.stop()?;
        for (fields, expected) in [
            (
                json!({"iptables": {"masqueradeBit": 32}}),
                "iptables.masqueradeBit: 32 must be within the range [0, 31]",
            ),
            (
                json!({"mode": "kernelspace"}),
                "mode: \"kernelspace\": must be one of",
            ),
        ] {
            configure(s, &fields)?;
            s.agent.spawn()?;
            let (code, log) = s.agent.wait_end()?;
            ensure!(code == Some(1) && log.contains(expected), "{log}");
            reaches(&client, s.vip(1), &["near"])?;
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_taken_port_is_tried_again_or_ends_the_agent_as_the_configuration_says() {
    in_family("config-port", false, &[], |s| {
        s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.near)))?;
        let client = s.client.peer()?;
        s.agent.stop()?;
        for (field, name) in [
            ("metricsBindAddress", "metrics"),
            ("healthzBindAddress", "healthz"),
        ] {
            let taken: SocketAddr = "127.0.0.1:9999".parse()?;
            let somebody = Peer::start(s.a.place())?;
            somebody.serve_tcp(taken, "somebody")?;
            configure(
                s,
                &json!({field: taken.to_string(), "bindAddressHardFail": true}),
            )?;
            s.agent.spawn()?;
            let (code, log) = s.agent.wait_end()?;
            let expected = format!("cannot serve {name} at {taken}");
            ensure!(code == Some(1) && log.contains(&expected), "{log}");

            configure(s, &json!({field: taken.to_string()}))?;
            s.agent.spawn()?;
            s.agent
                .wait_log("cannot serve: is another proxy or agent on this port?")?;
            reaches(&client, s.vip(1), &["near"])?;
            drop(somebody);
            // It tries again every five seconds.
            s.agent
                .wait_log(&format!("serving server=\"{name}\" address={taken}"))?;
            s.agent.kill9()?;
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn an_unspecified_address_is_served_in_both_families() {
    let args = [
        "--healthz-bind-address",
        "0.0.0.0:10256",
        "--metrics-bind-address=",
    ];
    in_family("config-both", false, &args, |s| {
        for address in ["127.0.0.1:10256", "[::1]:10256"] {
            let (status, body) = s.a.place().http_get(address.parse()?, "/livez")?;
            ensure!(status == 200, "{address}: {status} {body}");
        }
        fails_with(
            s.a.peer()?.ask_tcp(proxy_tests::agent::METRICS),
            libc::ECONNREFUSED,
        )
    });
}

#[test]
#[ignore = "needs root"]
fn init_only_makes_the_settings_of_the_host_and_serves_nothing() {
    in_family("config-init", false, &[], |s| {
        s.agent.stop()?;
        let established = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established";
        let read = |s: &Scenario| s.a.output("cat", &[established]);
        let before: u64 = read(s)?.trim().parse()?;
        let wanted = format!("{}s", before + 7);
        let flags = [
            "--init-only",
            "--conntrack-tcp-timeout-established",
            &wanted,
        ];
        s.agent
            .text(&[&["run", "--conntrack-max-per-core=0"], &flags[..]].concat())?;
        ensure!(read(s)?.trim() == (before + 7).to_string(), "{}", read(s)?);
        // Which is the whole machine's, and not to be had from here.
        let output = s
            .agent
            .run(&["run", "--init-only", "--conntrack-min=2000000000"])?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1), "{said}");
        ensure!(
            said.contains("nf_conntrack_max") && said.contains("1 settings of the host"),
            "{said}"
        );
        fails_with(
            s.a.peer()?.ask_tcp(SocketAddr::new(HEALTHZ.ip(), TCP)),
            libc::ECONNREFUSED,
        )
    });
}

/// The agent itself may not: in its pod /proc/sys is read-only.
#[test]
#[ignore = "needs root and eBPF"]
fn init_only_sets_route_localnet_where_rules_alone_will_serve() {
    in_family("config-localnet", false, &[], |s| {
        s.agent.stop()?;
        let init = ["run", "--init-only", "--conntrack-max-per-core=0"];
        let is_set = || {
            let setting = "/proc/sys/net/ipv4/conf/all/route_localnet";
            anyhow::Ok(s.a.output("cat", &[setting])?.trim() == "1")
        };
        s.agent.text(&init)?;
        ensure!(!is_set()?, "the socket layer does without");
        let folder = s.topology.state_dir().join("no-bpffs");
        let mut command = s.agent.place().command(s.agent.binary())?;
        command.arg("--bpf-dir").arg(&folder).args(init);
        let output = command.output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{said}");
        ensure!(is_set()?, "{said}");
        Ok(())
    });
}
