//! Tools that refuse, crash, hang or are not there: what they are not needed for goes on, and all of it when they work.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proxy_tests::{
    Scenario,
    bystander::{Bystanders, node_port, web},
    kube::Variant,
    scenario::{SOON, TCP_TARGET, fails_with, in_mode, reaches},
    tools::Tools,
    wait_for,
};

const LEFT_OUT: &str = "proxy_agent_left_out";
/// Where the pods serve as well; so is called what a tool refuses.
const REFUSED_TARGET: u16 = 9_191;

/// An agent whose `iptables-restore` does, while the file "bad" is there, what a script says first.
struct BadTool {
    s: Scenario,
    bad: PathBuf,
}

impl BadTool {
    /// In the script, `$input` is the file with the tool's input, and `$bad` the file "bad".
    fn start(mode: &str, v6: bool, variant: Variant, script: &str) -> anyhow::Result<Self> {
        let name = format!("bad-tool-{mode}-{}", variant.name());
        let mut s = Scenario::without_agent(&name, v6, &in_mode(mode))?;
        variant.hint(&s.a)?;
        let tools = Tools::new(s.topology.state_dir().join("tools"), &mut s.agent)?;
        let bad = tools.folder().join("bad");
        let tool = format!(
            "{}-{}-restore",
            if v6 { "ip6tables" } else { "iptables" },
            variant.name()
        );
        tools.put(
            &tool,
            &format!(
                "bad={}\ninput=$bad.$$\ntrap 'rm -f $input' EXIT\ncat > $input\n\
                if [ -e $bad ]; then\n{script}\nfi\n/usr/sbin/{tool} \"$@\" < $input",
                bad.display()
            ),
        )?;
        s.agent.spawn()?;
        s.agent.wait_ready()?;
        Ok(Self { s, bad })
    }

    fn break_it(&self, text: &str) -> anyhow::Result<()> {
        Ok(fs::write(&self.bad, text)?)
    }

    fn mend_it(&self) -> anyhow::Result<()> {
        Ok(fs::remove_file(&self.bad)?)
    }
}

/// Runs `body` with a bad tool in both modes, with each family and variant.
fn each(script: &str, body: impl Fn(&BadTool) -> anyhow::Result<()>) {
    for mode in ["iptables", "ebpf"] {
        for variant in [Variant::Nft, Variant::Legacy] {
            for v6 in [false, true] {
                let tool = BadTool::start(mode, v6, variant, script).expect("a cluster");
                body(&tool).unwrap_or_else(|error| panic!("{mode}, {variant:?}, {v6}: {error:?}"));
            }
        }
    }
}

#[test]
#[ignore = "needs root and eBPF"]
fn what_iptables_refuses_costs_one_service_which_is_named_and_tried_again() {
    let script = "line=$(grep -n -m1 -F -- \"$(cat $bad)\" $input | cut -d: -f1)\n\
        [ -z \"$line\" ] || { echo \"iptables-restore: line $line failed\" >&2; exit 1; }";
    each(script, |tool| {
        let s = &tool.s;
        s.near.serve_tcp(REFUSED_TARGET)?;
        let bystanders = Bystanders::start(s)?;
        tool.break_it(&format!(":{REFUSED_TARGET}"))?;
        s.manifests.put(&web(s, 1, REFUSED_TARGET))?;
        s.manifests.put(&web(s, 2, TCP_TARGET))?;
        bystanders.wait_served(s, 2)?;
        s.agent.wait_metric(LEFT_OUT, "", |count| count == 1.0)?;
        let log = s.agent.log();
        let told = log
            .lines()
            .find(|line| line.contains("service=default/web-1:http"));
        let told = told.with_context(|| log.clone())?;
        let line = told.split_once("iptables-restore: line ");
        let line = line.and_then(|(_, rest)| rest.split_once(" failed"));
        ensure!(
            line.is_some_and(|(number, _)| number.parse::<u32>().is_ok()),
            "{told}"
        );
        ensure!(!log.contains("service=default/web-2"), "{log}");
        let node_port = (s.a.address(s.v6), node_port(1)).into();
        let outside = bystanders.outsider().ask_tcp(node_port);
        fails_with(outside, libc::ECONNREFUSED)?;
        tool.mend_it()?;
        bystanders.wait_served(s, 1)?;
        s.agent.wait_metric(LEFT_OUT, "", |count| count == 0.0)?;
        ensure!(
            s.agent
                .metric("proxy_agent_drift_repairs_total", "packet")?
                == 0.0
        );
        bystanders.ensure_served()
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_tool_that_crashes_is_told_with_its_signal_and_tried_again() {
    each("kill -SEGV $$", |tool| {
        let s = &tool.s;
        let bystanders = Bystanders::start(s)?;
        tool.break_it("")?;
        s.manifests.put(&web(s, 1, TCP_TARGET))?;
        s.agent.wait_log("ended with signal 11")?;
        let errors = "proxy_agent_sync_errors_total";
        s.agent
            .wait_metric(errors, "packet", |errors| errors >= 1.0)?;
        tool.mend_it()?;
        bystanders.wait_served(s, 1)?;
        bystanders.ensure_served()
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_tool_that_hangs_holds_up_nothing_but_rules() {
    each("echo $$ > $bad.pid; exec sleep 600", |tool| {
        let s = &tool.s;
        let bystanders = Bystanders::start(s)?;
        tool.break_it("")?;
        let web = web(s, 1, TCP_TARGET).port("dns", "UDP", 53, 5353);
        s.manifests.put(&web)?;
        let hung = wait_for("the tool hangs", SOON, || {
            let pid = fs::read_to_string(tool.bad.with_extension("pid"))?;
            Ok(Pid::from_raw(pid.trim().parse()?))
        })?;
        if s.a.bpf_dir().join("links/connect4").exists() {
            s.settle()?;
            reaches(&s.client.peer()?, s.vip(1), &["near"])?;
        }
        let pending = "proxy_agent_changes_pending";
        s.agent
            .wait_metric(pending, "packet", |pending| pending > 0.0)?;
        tool.mend_it()?;
        // As the agent does when it has waited long enough.
        kill(hung, Signal::SIGKILL)?;
        bystanders.wait_served(s, 1)?;
        bystanders.ensure_served()
    });
}
