//! The manifests below `deploy/`: kubectl builds them, and a real API server takes them, every field known to it.

use std::{collections::BTreeSet, fs, path::PathBuf};

use anyhow::{Context, ensure};
use proxy_tests::kube::Variant;
use serde_json::{Value, json};

use crate::{cluster::Cluster, pod::CAPABILITIES};

const FOLDERS: [&str; 7] = [
    "overlays/kubeadm",
    "overlays/standalone",
    "overlays/k3s",
    "overlays/opt-out",
    "overlays/migration",
    "cleanup/own",
    "cleanup/kube-proxy",
];

pub fn deploy(path: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "..", "deploy", path]
        .iter()
        .collect()
}

fn daemonset(c: &Cluster, name: &str) -> anyhow::Result<Value> {
    let args = [
        "--namespace=kube-system",
        "get",
        "daemonset",
        name,
        "--output=json",
    ];
    let text = c.control.kubectl(&args)?;
    Ok(serde_json::from_str(&text)?)
}

#[test]
#[ignore = "needs root"]
fn every_overlay_is_applied_as_its_users_would() {
    Cluster::run("deploy", Variant::Nft, &[], |c| {
        for folder in FOLDERS {
            let folder = deploy(folder);
            let folder = folder.display().to_string();
            let file = |verb| {
                c.control
                    .kubectl(&[verb, "--validate=strict", "--kustomize", &folder])
            };
            file("apply").with_context(|| folder.clone())?;
            c.control.kubectl(&["delete", "--kustomize", &folder])?;
        }
        let base = deploy("overlays/kubeadm").display().to_string();
        c.control.kubectl(&["apply", "--kustomize", &base])?;
        let pod = &daemonset(c, "proxy-agent")?["spec"]["template"]["spec"];
        let added = &pod["containers"][0]["securityContext"]["capabilities"]["add"];
        let added: Vec<String> = serde_json::from_value(added.clone())?;
        let tested = CAPABILITIES.map(str::to_uppercase);
        assert_eq!(added, tested, "what the pod gets is what is tested");
        assert_eq!(pod["hostNetwork"], true);
        assert_eq!(pod["priorityClassName"], "system-node-critical");
        assert_eq!(pod["tolerations"], json!([{"operator": "Exists"}]));
        assert_eq!(pod["nodeSelector"], json!({"kubernetes.io/os": "linux"}));
        let seccomp = json!({"seccompProfile": {"type": "RuntimeDefault"}});
        assert_eq!(pod["securityContext"], seccomp);
        let container = &pod["containers"][0];
        let own = json!({
            "allowPrivilegeEscalation": false,
            "appArmorProfile": {"type": "Unconfined"},
            "capabilities": {"add": tested, "drop": ["ALL"]},
            "readOnlyRootFilesystem": true,
            "seLinuxOptions": {"type": "spc_t"},
        });
        assert_eq!(container["securityContext"], own);
        assert_eq!(
            container["resources"]["limits"],
            Value::Null,
            "the maps may grow"
        );
        let named = |kind| {
            let args = ["get", kind, "--output=name"];
            let text = c.control.kubectl(&args)?;
            let ours = text.lines().filter(|line| line.contains("proxy-agent"));
            anyhow::Ok(ours.map(str::to_owned).collect::<Vec<_>>())
        };
        ensure!(named("clusterroles")?.is_empty(), "rights of its own");
        let bindings = named("clusterrolebindings")?;
        assert_eq!(bindings.len(), 1, "{bindings:?}");
        let binding = c.control.kubectl(&["get", &bindings[0], "--output=json"])?;
        let binding: Value = serde_json::from_str(&binding)?;
        assert_eq!(binding["roleRef"]["name"], "system:node-proxier");
        Ok(())
    });
}

#[test]
#[ignore = "needs root"]
fn the_swap_changes_the_image_and_adds_mounts_and_nothing_else() {
    Cluster::run("deploy-swap", Variant::Nft, &[], |c| {
        let before = kubeadms_daemonset();
        let file = c.scenario.topology.state_dir().join("kube-proxy.json");
        fs::write(&file, before.to_string())?;
        c.control
            .kubectl(&["apply", "--filename", &file.display().to_string()])?;
        let mut before = daemonset(c, "kube-proxy")?["spec"]["template"]["spec"].clone();
        let patch = deploy("overlays/kubeadm/swap.yaml").display().to_string();
        let target = [
            "--namespace=kube-system",
            "patch",
            "daemonset",
            "kube-proxy",
        ];
        c.control
            .kubectl(&[&target[..], &["--patch-file", &patch]].concat())?;
        let mut after = daemonset(c, "kube-proxy")?["spec"]["template"]["spec"].clone();

        let container = &mut after["containers"][0];
        ensure!(
            container["image"] == "localhost/proxy-agent:0.1.0",
            "{container}"
        );
        container["image"] = before["containers"][0]["image"].clone();
        let entries = |list: Value| -> BTreeSet<String> {
            let list = list.as_array().into_iter().flatten();
            list.map(Value::to_string).collect()
        };
        let take = |spec: &mut Value| {
            let mounts = entries(spec["containers"][0]["volumeMounts"].take());
            (mounts, entries(spec["volumes"].take()))
        };
        let (mounts_before, volumes_before) = take(&mut before);
        let (mounts, volumes) = take(&mut after);
        for (after, before) in [(mounts, mounts_before), (volumes, volumes_before)] {
            ensure!(after.is_superset(&before), "{before:#?} {after:#?}");
            ensure!(after.len() == before.len() + 3, "{after:#?}");
        }
        assert_eq!(after, before);
        Ok(())
    });
}

/// As kubeadm makes it (cmd/kubeadm/app/phases/addons/proxy/manifests.go, v1.36).
pub fn kubeadms_daemonset() -> Value {
    let labels = json!({"k8s-app": "kube-proxy"});
    let command = [
        "/usr/local/bin/kube-proxy",
        "--config=/var/lib/kube-proxy/config.conf",
        "--hostname-override=$(NODE_NAME)",
    ];
    let container = json!({
        "name": "kube-proxy",
        "image": "registry.k8s.io/kube-proxy:v1.36.3",
        "imagePullPolicy": "IfNotPresent",
        "command": command,
        "env": [{"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}],
        "securityContext": {"privileged": true},
        "volumeMounts": [
            {"name": "kube-proxy", "mountPath": "/var/lib/kube-proxy"},
            {"name": "xtables-lock", "mountPath": "/run/xtables.lock"},
            {"name": "lib-modules", "mountPath": "/lib/modules", "readOnly": true},
        ],
    });
    json!({
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": "kube-proxy", "namespace": "kube-system", "labels": labels},
        "spec": {
            "selector": {"matchLabels": labels},
            "updateStrategy": {"type": "RollingUpdate"},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "priorityClassName": "system-node-critical",
                    "containers": [container],
                    "hostNetwork": true,
                    "serviceAccountName": "kube-proxy",
                    "volumes": [
                        {"name": "kube-proxy", "configMap": {"name": "kube-proxy"}},
                        {"name": "xtables-lock", "hostPath": {"path": "/run/xtables.lock", "type": "FileOrCreate"}},
                        {"name": "lib-modules", "hostPath": {"path": "/lib/modules"}},
                    ],
                    "tolerations": [{"operator": "Exists"}],
                    "nodeSelector": {"kubernetes.io/os": "linux"},
                },
            },
        },
    })
}
