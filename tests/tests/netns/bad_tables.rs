//! Tables that others have filled, also under names of ours: what is theirs stays, and traffic goes on.

use std::fs;

use anyhow::{Context as _, ensure};
use proxy_tests::{
    Scenario,
    bystander::{Bystanders, web},
    kube::Variant,
    scenario::{SOON, TCP_TARGET, in_mode},
    wait_for,
};

const FOREIGN: u32 = 10_000;

/// A node in whose tables somebody was before the agent.
struct Node {
    s: Scenario,
    /// Of the family and the variant.
    tools: String,
}

impl Node {
    fn new(name: &str, mode: &str, v6: bool, variant: Variant) -> anyhow::Result<Self> {
        let s = Scenario::without_agent(name, v6, &in_mode(mode))?;
        variant.hint(&s.a)?;
        let family = if v6 { "ip6tables" } else { "iptables" };
        let tools = format!("{family}-{}", variant.name());
        Ok(Self { s, tools })
    }

    /// Writes a table as somebody else.
    fn write(&self, table: &str, lines: &str) -> anyhow::Result<()> {
        let file = self.s.topology.state_dir().join(table);
        fs::write(&file, format!("*{table}\n{lines}COMMIT\n"))?;
        let restore = format!("{}-restore", self.tools);
        let file = file.display().to_string();
        self.s
            .a
            .output(&restore, &["--noflush", "-w", "10", &file])
            .map(drop)
    }

    /// What the tables hold, without counters, times and what has a name of ours.
    fn foreign(&self) -> anyhow::Result<String> {
        let mut found = String::new();
        for table in ["nat", "filter"] {
            let text = self
                .s
                .a
                .output(&format!("{}-save", self.tools), &["-t", table])?;
            for line in text.lines().filter(|line| !line.starts_with('#')) {
                let line = line.split(" [").next().unwrap_or_default();
                let is_ours = line.contains("KUBE-") || line.contains("PROXY-AGENT-");
                if !is_ours || line.contains("MINE") {
                    found += line;
                    found.push('\n');
                }
            }
        }
        Ok(found)
    }

    /// A Service, served to a pod and to somebody outside.
    fn serve(&self, bystanders: &Bystanders, number: u8) -> anyhow::Result<()> {
        self.s.manifests.put(&web(&self.s, number, TCP_TARGET))?;
        bystanders.wait_served(&self.s, number)
    }
}

const EACH: [(&str, bool, Variant); 3] = [
    ("iptables", false, Variant::Nft),
    ("iptables", true, Variant::Legacy),
    ("ebpf", false, Variant::Legacy),
];

#[test]
#[ignore = "needs root and eBPF"]
fn ten_thousand_rules_of_others_stay_as_they_are() {
    for (mode, v6, variant) in EACH {
        let body = || {
            let mut node = Node::new("bad-tables-full", mode, v6, variant)?;
            for (table, builtin) in [("nat", "PREROUTING"), ("filter", "FORWARD")] {
                let mut lines = ":MINE - [0:0]\n".to_owned();
                for number in 0..FOREIGN / 2 {
                    let address = match v6 {
                        true => format!("2001:db8:ffff::{number:x}/128"),
                        false => format!("198.18.{}.{}/32", number / 250, number % 250),
                    };
                    lines += &format!(
                        "-A MINE -s {address} -p tcp -m comment --comment \"number {number}\" -m tcp --dport 9 -j RETURN\n"
                    );
                }
                node.write(table, &format!("{lines}-A {builtin} -j MINE\n"))?;
            }
            let before = node.foreign()?;
            ensure!(before.lines().count() > FOREIGN as usize);
            node.s.agent.spawn()?;
            node.s.agent.wait_ready()?;
            let bystanders = Bystanders::start(&node.s)?;
            node.serve(&bystanders, 1)?;
            ensure!(node.foreign()? == before, "changed by the agent");
            bystanders.ensure_served()?;
            node.s.agent.stop()?;
            node.s.agent.text(&["cleanup"])?;
            ensure!(node.foreign()? == before, "changed by cleanup");
            Ok(())
        };
        body().unwrap_or_else(|error| panic!("{mode}, {variant:?}: {error:?}"));
    }
}

#[test]
#[ignore = "needs root and eBPF"]
fn chains_of_others_with_names_of_ours_cost_nobody_anything() {
    for (mode, v6, variant) in EACH {
        let body = || {
            let mut node = Node::new("bad-tables-names", mode, v6, variant)?;
            // Rules of theirs in our chains; and ours by name that theirs lead to, so that they cannot go.
            node.write(
                "nat",
                ":KUBE-SERVICES - [0:0]\n:KUBE-SVC-D-00-2 - [0:0]\n:MINE - [0:0]\n\
                -A KUBE-SERVICES -p udp -j RETURN\n-A KUBE-SVC-D-00-2 -j RETURN\n\
                -A MINE -p tcp -m tcp --dport 9 -j KUBE-SVC-D-00-2\n-A PREROUTING -j MINE\n",
            )?;
            node.write(
                "filter",
                ":KUBE-FORWARD - [0:0]\n:PROXY-AGENT-C-00-2 - [0:0]\n:MINE - [0:0]\n\
                -A KUBE-FORWARD -j DROP\n-A MINE -p tcp -m tcp --dport 9 -j PROXY-AGENT-C-00-2\n\
                -A FORWARD -j MINE\n",
            )?;
            let before = node.foreign()?;
            node.s.agent.spawn()?;
            node.s.agent.wait_ready()?;
            let bystanders = Bystanders::start(&node.s)?;
            node.serve(&bystanders, 1)?;
            // While it runs.
            node.write(
                "nat",
                "-I KUBE-SERVICES -p tcp -m tcp --dport 9 -j RETURN\n",
            )?;
            wait_for("the rule is gone", SOON, || {
                let save = format!("{}-save", node.tools);
                let nat = node.s.a.output(&save, &["-t", "nat"])?;
                let is_left = nat.contains("-A KUBE-SERVICES -p tcp -m tcp --dport 9 -j RETURN");
                ensure!(!is_left, "{nat}");
                Ok(())
            })?;
            node.serve(&bystanders, 2)?;
            ensure!(node.foreign()? == before);
            bystanders.ensure_served()
        };
        body().unwrap_or_else(|error| panic!("{mode}, {variant:?}: {error:?}"));
    }
}

#[test]
#[ignore = "needs root and eBPF"]
fn the_chains_of_a_service_that_others_have_taken_serve_it_and_cleanup_says_what_stays() {
    for (mode, v6, variant) in EACH {
        let body = || {
            let mut node = Node::new("bad-tables-service", mode, v6, variant)?;
            let save = |node: &Node| {
                let save = format!("{}-save", node.tools);
                node.s.a.output(&save, &["-t", "nat"])
            };
            // The names are a function of the Service: taken from a former run.
            node.s.agent.spawn()?;
            node.s.agent.wait_ready()?;
            node.s.manifests.put(&web(&node.s, 1, TCP_TARGET))?;
            let chain = wait_for("the rules of the Service", SOON, || {
                let nat = save(&node)?;
                let is_jump = |line: &&str| line.contains("default/web-1:http cluster IP");
                let jump = nat.lines().find(is_jump).context("a jump")?;
                Ok(jump.rsplit(' ').next().context("a chain")?.to_owned())
            })?;
            node.s.agent.stop()?;
            node.s.agent.text(&["cleanup"])?;
            ensure!(!save(&node)?.contains(&chain));

            node.write(
                "nat",
                &format!(
                    ":{chain} - [0:0]\n:MINE - [0:0]\n-A {chain} -j ACCEPT\n\
                    -A MINE -p tcp -m tcp --dport 9 -j {chain}\n-A PREROUTING -j MINE\n"
                ),
            )?;
            let before = node.foreign()?;
            node.s.agent.spawn()?;
            node.s.agent.wait_ready()?;
            let bystanders = Bystanders::start(&node.s)?;
            bystanders.wait_served(&node.s, 1)?;
            let theirs = format!("-A {chain} -j ACCEPT");
            ensure!(!save(&node)?.contains(&theirs));
            // While it runs.
            node.write("nat", &format!("-I {chain} -j ACCEPT\n"))?;
            wait_for("the rule is gone", SOON, || {
                let nat = save(&node)?;
                ensure!(!nat.contains(&theirs), "{nat}");
                Ok(())
            })?;
            bystanders.wait_served(&node.s, 1)?;
            ensure!(node.foreign()? == before);
            bystanders.ensure_served()?;

            node.s.agent.stop()?;
            let output = node.s.agent.run(&["cleanup"])?;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(output.status.success(), "{said}");
            ensure!(
                said.contains(&chain) && said.contains("somebody else"),
                "{said}"
            );
            ensure!(node.foreign()? == before);
            Ok(())
        };
        body().unwrap_or_else(|error| panic!("{mode}, {variant:?}: {error:?}"));
    }
}
