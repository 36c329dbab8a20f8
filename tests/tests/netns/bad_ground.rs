//! Machines on which the agent cannot work: it says what is missing and what to do, and what worked goes on working.

use std::{fs, os::unix::process::CommandExt};

use anyhow::{Context, ensure};
use proxy_tests::{
    Scenario,
    scenario::{in_family, reaches},
};

/// Runs the agent in a mount namespace of its own after a preparation by the shell: exit code and everything it wrote.
fn run_after(s: &Scenario, preparation: &str) -> anyhow::Result<(Option<i32>, String)> {
    let agent = proxy_tests::agent::agent_binary()?;
    let mut command = s.a.place().command("unshare")?;
    command.args([
        "--mount",
        "sh",
        "-e",
        "-c",
        &format!("{preparation}\nexec \"$@\""),
    ]);
    command.arg("sh").arg(agent).args(s.agent.global_args());
    command
        .args(["run", "--mode", "ebpf", "--manifests"])
        .arg(s.manifests.dir());
    let output = command.output()?;
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    Ok((output.status.code(), text))
}

#[test]
#[ignore = "needs root and eBPF"]
fn what_the_machine_lacks_is_named_with_its_remedy() {
    in_family("lacking", false, &[], |s| {
        s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.near)))?;
        s.agent.stop()?;
        let cgroup = proxy_tests::names::cgroup2_root()?;
        let cases = [
            ("umount -l /sys/fs/bpf".to_owned(), "mount -t bpf"),
            (format!("umount -l {}", cgroup.display()), "cgroup"),
            ("mount -t tmpfs none /sys/kernel/btf".to_owned(), "BTF"),
        ];
        for (preparation, word) in cases {
            let (exit, text) = run_after(s, &preparation)?;
            ensure!(
                exit == Some(1) && text.contains(word),
                "{preparation}: {exit:?} {text}"
            );
            reaches(&s.client.peer()?, s.vip(1), &["near"])?;
        }
        s.agent.spawn()?;
        s.agent.wait_ready()
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn without_root_the_agent_says_so() {
    in_family("no-root", false, &[], |s| {
        s.agent.stop()?;
        let binary = s.topology.state_dir().join("proxy-agent");
        fs::copy(proxy_tests::agent::agent_binary()?, &binary)?;
        let mut command = std::process::Command::new(&binary);
        command
            .args(s.agent.global_args())
            .args(["run", "--mode", "ebpf", "--manifests"])
            .arg(s.manifests.dir());
        let output = command.uid(65534).gid(65534).output()?;
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        ensure!(!output.status.success(), "{text}");
        ensure!(text.contains("root") || text.contains("CAP_BPF"), "{text}");
        Ok(())
    });
}

/// Runs the agent with one argument replaced: exit code and everything it wrote.
fn run_with(s: &Scenario, flag: &str, value: &str) -> anyhow::Result<(Option<i32>, String)> {
    let mut args: Vec<String> = s.agent.global_args().into();
    let at = args
        .iter()
        .position(|arg| arg == flag)
        .context("no such flag")?;
    value.clone_into(&mut args[at + 1]);
    let mut command = s.a.place().command(proxy_tests::agent::agent_binary()?)?;
    command
        .args(args)
        .args(["run", "--mode", "ebpf", "--manifests"])
        .arg(s.manifests.dir());
    let output = command.output()?;
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    Ok((output.status.code(), text))
}

#[test]
#[ignore = "needs root and eBPF"]
fn wrong_directories_are_named() {
    in_family("wrong-dirs", false, &[], |s| {
        s.agent.stop()?;
        let state = s.topology.state_dir().display().to_string();
        let cases = [
            ("--bpf-dir", format!("{state}/not-bpffs"), "mount -t bpf"),
            ("--cgroup", state.clone(), "cgroup"),
            ("--cgroup", "/nowhere".to_owned(), "/nowhere"),
        ];
        for (flag, value, word) in cases {
            let (exit, text) = run_with(s, flag, &value)?;
            ensure!(
                exit == Some(1) && text.contains(word),
                "{flag} {value}: {exit:?} {text}"
            );
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn without_manifests_the_agent_says_what_is_missing() {
    in_family("no-source", false, &[], |s| {
        s.agent.stop()?;
        let output = s.agent.run(&["run"])?;
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        ensure!(
            !output.status.success() && text.contains("--manifests"),
            "{text}"
        );
        Ok(())
    });
}

/// As in a pod that is not privileged: what is mounted at the usual place begins at the container's own cgroup.
#[test]
#[ignore = "needs root and eBPF"]
fn a_containers_own_part_of_the_cgroups_is_not_taken_for_the_nodes() {
    in_family("part", false, &[], |s| {
        let root = proxy_tests::names::cgroup2_root()?;
        let root = root.display();
        let node = s.topology.state_dir().join("node-cgroup");
        fs::create_dir(&node)?;
        let node = node.display();
        let own = format!("umount -l {root}; mount -t cgroup2 none {root}");
        let agent = proxy_tests::agent::agent_binary()?;
        for (preparation, expected) in [
            (own.clone(), "only a part of the node's cgroup v2 hierarchy"),
            (
                format!("mount --bind {root} {node}; {own}"),
                "this node can run it",
            ),
        ] {
            let mut command = s.agent.place().command("unshare")?;
            let script = format!("{preparation}; exec \"$@\"");
            command.args(["--mount", "--cgroup", "sh", "-e", "-c", &script, "sh"]);
            let output = command.arg(&agent).arg("check").output()?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            ensure!(text.contains(expected), "{preparation}: {output:?}");
        }
        Ok(())
    });
}
