//! The folder of manifests: broken files, whole folders, symbolic links, and objects that cannot be.

use std::{fs, os::unix::fs::symlink};

use anyhow::ensure;
use proxy_tests::{
    Manifests, Scenario,
    scenario::{SOON, TCP, UDP, each_family, in_family, passes, reaches, refuses},
    wait_for,
};

#[test]
#[ignore = "needs root and eBPF"]
fn a_broken_file_keeps_its_last_good_content_and_holds_nobody_up() {
    each_family("broken-file", |s| {
        let web = s.service("web", 1).endpoint(s.endpoint(&s.near));
        s.apply(&web)?;
        s.manifests
            .write("web.yaml", "apiVersion: v1\nkind: Service\nspec: [\n")?;
        s.apply(&s.service("other", 2).endpoint(s.endpoint(&s.far)))?;
        let client = s.client.peer()?;
        reaches(&client, s.vip(1), &["near"])?;
        reaches(&client, s.vip(2), &["far"])?;
        s.agent.wait_log("web.yaml")?;
        s.agent
            .wait_metric("proxy_agent_source_errors_total", "", |errors| {
                errors >= 1.0
            })?;
        let check = s
            .agent
            .run(&["check", "--manifests", &s.manifests.dir().to_string_lossy()])?;
        let text = String::from_utf8_lossy(&check.stdout).into_owned();
        ensure!(text.contains("web.yaml"), "{text}");

        s.manifests
            .put(&s.service("web", 1).endpoint(s.endpoint(&s.far)))?;
        s.settle()?;
        reaches(&client, s.vip(1), &["far"])
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_broken_field_is_reported_with_file_and_field_and_the_rest_goes_on() {
    in_family("broken-field", false, &[], |s| {
        s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.near)))?;
        let web = s.service("web", 1).endpoint(s.endpoint(&s.near));
        let broken = web.to_yaml()?.replace("port: 80\n", "port: 0\n");
        s.manifests.write("web.yaml", &broken)?;
        s.settle()?;
        reaches(&s.client.peer()?, s.vip(1), &["near"])?;
        s.agent.wait_log("web.yaml")?;
        s.agent.wait_log("spec.ports[0].port")
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn with_a_broken_file_at_start_nothing_is_deleted_until_it_is_mended() {
    each_family("broken-start", |s| {
        let (web, other) = (s.service("web", 1), s.service("other", 2));
        s.manifests
            .put(&web.clone().endpoint(s.endpoint(&s.near)))?;
        s.apply(&other.endpoint(s.endpoint(&s.far)))?;
        s.agent.kill9()?;
        s.manifests.write("web.yaml", "kind: [")?;
        s.manifests.remove("other")?;
        s.agent.spawn()?;
        s.agent.wait_log("web.yaml")?;
        s.manifests
            .put(&s.service("third", 3).endpoint(s.endpoint(&s.far)))?;
        let client = s.client.peer()?;
        wait_for("a new Service is served", SOON, || {
            reaches(&client, s.vip(3), &["far"])
        })?;
        reaches(&client, s.vip(1), &["near"])?;
        reaches(&client, s.vip(2), &["far"])?;
        s.manifests.put(&web.endpoint(s.endpoint(&s.far)))?;
        wait_for("what is in no file is gone", SOON, || {
            passes(&client, (s.vip(2), TCP).into())
        })?;
        reaches(&client, s.vip(1), &["far"])
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_folder_that_vanishes_takes_nothing_with_it() {
    each_family("folder-gone", |s| {
        s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.near)))?;
        let aside = s.topology.state_dir().join("aside");
        fs::rename(s.manifests.dir(), &aside)?;
        s.agent.wait_log("manifests")?;
        reaches(&s.client.peer()?, s.vip(1), &["near"])?;
        // An agent that starts now ends at once, and takes nothing with it either.
        s.agent.kill9()?;
        s.agent.spawn()?;
        let (exit, log) = s.agent.wait_end()?;
        ensure!(
            exit == Some(1) && log.contains("--manifests"),
            "{exit:?} {log}"
        );
        reaches(&s.client.peer()?, s.vip(1), &["near"])?;
        fs::rename(&aside, s.manifests.dir())?;
        s.agent.spawn()?;
        s.agent.wait_ready()?;
        s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.far)))?;
        reaches(&s.client.peer()?, s.vip(1), &["far"])
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn deleted_files_delete_their_services() {
    each_family("files-gone", |s| {
        s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.near)))?;
        reaches(&s.client.peer()?, s.vip(1), &["near"])?;
        for file in fs::read_dir(s.manifests.dir())? {
            fs::remove_file(file?.path())?;
        }
        let client = s.client.peer()?;
        wait_for("the Service is gone", SOON, || {
            passes(&client, (s.vip(1), TCP).into())
        })?;
        s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.far)))?;
        reaches(&client, s.vip(1), &["far"])
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_config_map_volume_changes_at_once() {
    each_family("config-map", |s| {
        // As kubelet lays it out: file -> ..data/file, ..data -> a folder with a time in its name.
        let dir = s.manifests.dir().join("volume");
        let fill = |name: &str, pod| -> anyhow::Result<()> {
            let content = dir.join(name);
            fs::create_dir_all(&content)?;
            let web = s.service("web", 1).endpoint(s.endpoint(pod));
            fs::write(content.join("web.yaml"), web.to_yaml()?)?;
            symlink(name, dir.join("..data_tmp"))?;
            fs::rename(dir.join("..data_tmp"), dir.join("..data"))?;
            Ok(())
        };
        fs::create_dir_all(&dir)?;
        fill("..2026_01_01", &s.near)?;
        symlink("..data/web.yaml", dir.join("web.yaml"))?;
        s.settle()?;
        reaches(&s.client.peer()?, s.vip(1), &["near"])?;
        fill("..2026_01_02", &s.far)?;
        fs::remove_dir_all(dir.join("..2026_01_01"))?;
        s.settle()?;
        reaches(&s.client.peer()?, s.vip(1), &["far"])
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn json_lists_and_nested_folders_are_read() {
    each_family("json-list", |s| {
        let web = s.service("web", 1).endpoint(s.endpoint(&s.near));
        let list = serde_json::json!({"apiVersion": "v1", "kind": "List", "items": web.objects()});
        let nested = s.manifests.dir().join("a/b");
        fs::create_dir_all(&nested)?;
        fs::write(nested.join("web.json"), list.to_string())?;
        s.settle()?;
        reaches(&s.client.peer()?, s.vip(1), &["near"])
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn of_one_object_in_two_files_the_first_path_wins() {
    each_family("two-files", |s| {
        let web = s.service("web", 1);
        s.manifests.write(
            "b.yaml",
            &web.clone().endpoint(s.endpoint(&s.near)).to_yaml()?,
        )?;
        s.settle()?;
        reaches(&s.client.peer()?, s.vip(1), &["near"])?;
        s.manifests
            .write("a.yaml", &web.endpoint(s.endpoint(&s.far)).to_yaml()?)?;
        s.settle()?;
        reaches(&s.client.peer()?, s.vip(1), &["far"])?;
        s.agent.wait_log("b.yaml")
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn an_unreadable_file_is_named_and_the_others_serve() {
    in_family("unreadable", false, &[], |s| {
        symlink("/nowhere/at/all", s.manifests.dir().join("dangling.yaml"))?;
        symlink("loop.yaml", s.manifests.dir().join("loop.yaml"))?;
        fs::write(s.manifests.dir().join("binary.yaml"), [0xff, 0xfe, 0x00])?;
        s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.near)))?;
        reaches(&s.client.peer()?, s.vip(1), &["near"])?;
        ["loop.yaml", "binary.yaml"]
            .into_iter()
            .try_for_each(|file| s.agent.wait_log(file))
    });
}

/// Objects that cannot be, and a word of what is said about each.
fn impossible(s: &Scenario) -> Vec<(&'static str, String, &'static str)> {
    let yaml = |spec: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: bad, namespace: default}}\nspec: {spec}\n"
        )
    };
    let vip = s.vip(9);
    let long = "x".repeat(1 << 20);
    vec![
        (
            "port-zero",
            yaml(&format!("{{clusterIP: '{vip}', ports: [{{port: 0}}]}}")),
            "port",
        ),
        (
            "port-large",
            yaml(&format!("{{clusterIP: '{vip}', ports: [{{port: 65536}}]}}")),
            "port",
        ),
        (
            "address",
            yaml("{clusterIP: 10.96.0.300, ports: [{port: 80}]}"),
            "10.96.0.300",
        ),
        (
            "protocol",
            yaml(&format!(
                "{{clusterIP: '{vip}', ports: [{{port: 80, protocol: ICMP}}]}}"
            )),
            "ICMP",
        ),
        (
            "twice",
            yaml(&format!(
                "{{clusterIP: '{vip}', ports: [{{name: a, port: 80}}, {{name: b, port: 80}}]}}"
            )),
            "80",
        ),
        (
            "family",
            format!(
                "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
                metadata: {{name: bad, namespace: default, labels: {{kubernetes.io/service-name: web}}}}\n\
                addressType: {}\nports: [{{name: http, port: 80}}]\n\
                endpoints: [{{addresses: ['{}']}}]\n",
                if s.v6 { "IPv4" } else { "IPv6" },
                s.far.address(s.v6),
            ),
            "address",
        ),
        (
            "long",
            yaml(&format!(
                "{{clusterIP: '{vip}', ports: [{{name: {long}, port: 80}}]}}"
            )),
            "name",
        ),
    ]
}

#[test]
#[ignore = "needs root and eBPF"]
fn impossible_objects_are_reported_and_the_others_serve() {
    each_family("impossible", |s| {
        s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.near)))?;
        for (name, text, word) in impossible(s) {
            let before = s.agent.log().len();
            let file = format!("bad-{name}.yaml");
            s.manifests.write(&file, &text)?;
            s.settle()?;
            let log = s.agent.log().split_off(before);
            ensure!(
                log.contains(word) && log.contains("bad"),
                "{name}: {}",
                &log[..log.len().min(2000)]
            );
            ensure!(log.len() < 20_000, "{name}: {} bytes of log", log.len());
            reaches(&s.client.peer()?, s.vip(1), &["near"])?;
            fs::remove_file(s.manifests.dir().join(file))?;
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn backends_at_special_addresses_are_refused() {
    each_family("special-backends", |s| {
        let special = if s.v6 {
            vec!["::1", "fe80::1", "ff02::1", "::", "fd00:10:96::1"]
        } else {
            vec![
                "127.0.0.1",
                "169.254.169.254",
                "224.0.0.1",
                "0.0.0.0",
                "10.96.0.1",
            ]
        };
        s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.near)))?;
        for address in special {
            let bad = proxy_tests::Endpoint::new(address.parse()?, "node-a");
            s.apply(&s.service("bad", 2).endpoint(bad))?;
            refuses(&s.client.peer()?, s.vip(2), TCP, UDP)?;
            s.agent.wait_log(address)?;
        }
        reaches(&s.client.peer()?, s.vip(1), &["near"])
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_burst_of_changes_is_one_change_in_the_end() {
    in_family("burst", false, &[], |s| {
        for number in 1..=200_u8 {
            s.manifests.put(
                &s.service(&format!("s{number}"), number)
                    .endpoint(s.endpoint(&s.near)),
            )?;
        }
        s.settle()?;
        reaches(&s.client.peer()?, s.vip(200), &["near"])?;
        for number in 1..=200_u8 {
            s.manifests.remove(&format!("s{number}"))?;
        }
        s.settle_packets()?;
        passes(&s.client.peer()?, (s.vip(100), TCP).into())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_folder_that_does_not_exist_is_named() {
    in_family("no-folder", false, &[], |s| {
        s.agent.stop()?;
        let other = Manifests::new(&s.topology.state_dir(), "other")?;
        fs::remove_dir(other.dir())?;
        let output = s
            .agent
            .run(&["plan", "--manifests", &other.dir().to_string_lossy()])?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            output.status.code() == Some(1) && text.contains("other"),
            "{text}"
        );
        Ok(())
    });
}
