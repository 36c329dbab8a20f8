//! With the real tools, each test for both variants, in a network namespace of its own.

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use super::*;
use crate::backends::in_namespace::in_namespace;

const RULES: &str = "*nat\n:KUBE-SERVICES - [0:0]\n-A KUBE-SERVICES -j RETURN\n-A OUTPUT -j KUBE-SERVICES\nCOMMIT\n";
const CHANGE: &str = "*nat\n:KUBE-SVC-A - [0:0]\n-A KUBE-SVC-A -j RETURN\nCOMMIT\n";

/// The tools of a variant.
#[derive(Clone, Copy)]
struct Tools {
    variant: &'static str,
}

impl Tools {
    fn run(self, args: &str) {
        let mut words = args.split_whitespace();
        let tool = words.next().unwrap();
        let name = tool.replacen("tables", &format!("tables-{}", self.variant), 1);
        let output = Command::new(&name).args(words).output().unwrap();
        assert!(output.status.success(), "{name} {args}: {output:?}");
    }

    fn restore(self, family: Family, text: &str) {
        let prefix = match family {
            Family::V4 => "iptables",
            Family::V6 => "ip6tables",
        };
        let mut child = Command::new(format!("{prefix}-{}-restore", self.variant))
            .arg("--noflush")
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(text.as_bytes()).unwrap();
        drop(stdin);
        assert!(child.wait().unwrap().success(), "{text}");
    }

    fn watch(self) -> Watch {
        Watch::open(self.variant == "nft").unwrap()
    }
}

fn each_variant(test: impl Fn(Tools) + Sync) {
    for variant in ["nft", "legacy"] {
        println!("with iptables-{variant}");
        in_namespace(|| test(Tools { variant }));
    }
}

#[test]
#[ignore = "needs root"]
fn a_flush_of_one_table_is_noticed_in_either_family() {
    each_variant(|tools| {
        for family in [Family::V4, Family::V6] {
            tools.restore(family, RULES);
        }
        let mut watch = tools.watch();
        assert!(!watch.has_changed().unwrap());
        for flush in ["iptables -t nat -F", "ip6tables -t nat -F"] {
            tools.run(flush);
            assert!(watch.has_changed().unwrap(), "{flush}");
            assert!(!watch.has_changed().unwrap(), "told once");
        }
    });
}

#[test]
#[ignore = "needs root"]
fn every_way_of_taking_our_rules_away_is_noticed() {
    each_variant(|tools| {
        tools.restore(Family::V4, RULES);
        let mut watch = tools.watch();
        for destruction in [
            "iptables -t nat -F KUBE-SERVICES",
            "iptables -t nat -F OUTPUT",
            "iptables -t nat -D OUTPUT -j KUBE-SERVICES",
            "iptables -t nat -R KUBE-SERVICES 1 -p tcp -m tcp --dport 80 -j ACCEPT",
            "iptables -t nat -I KUBE-SERVICES -j ACCEPT",
        ] {
            tools.restore(Family::V4, "*nat\n-F\n-X\nCOMMIT\n");
            tools.restore(Family::V4, RULES);
            watch.has_changed().unwrap();
            tools.run(destruction);
            assert!(watch.has_changed().unwrap(), "{destruction}");
        }
    });
}

#[test]
#[ignore = "needs root"]
fn what_we_write_is_not_taken_for_somebody_elses() {
    each_variant(|tools| {
        tools.restore(Family::V4, RULES);
        let mut watch = tools.watch();
        for family in [Family::V4, Family::V6] {
            for text in [RULES, CHANGE, CHANGE] {
                watch.pause().unwrap();
                tools.restore(family, text);
                watch.resume(family, Table::Nat, true).unwrap();
                assert!(!watch.has_changed().unwrap(), "{family}: {text}");
            }
        }
        tools.run("iptables -t nat -F");
        assert!(watch.has_changed().unwrap());
    });
}

#[test]
#[ignore = "needs root"]
fn a_refused_change_of_ours_is_none() {
    each_variant(|tools| {
        tools.restore(Family::V4, RULES);
        let mut watch = tools.watch();
        watch.pause().unwrap();
        watch.resume(Family::V4, Table::Nat, false).unwrap();
        assert!(!watch.has_changed().unwrap());
    });
}

#[test]
#[ignore = "needs root"]
fn somebody_who_writes_while_we_do_is_noticed() {
    each_variant(|tools| {
        for table in ["filter", "nat"] {
            tools.run(&format!("iptables -t {table} -N KUBE-FORWARD"));
        }
        let mut watch = tools.watch();
        watch.pause().unwrap();
        tools.restore(Family::V4, CHANGE);
        tools.run("iptables -t filter -A KUBE-FORWARD -j ACCEPT");
        watch.resume(Family::V4, Table::Nat, true).unwrap();
        assert!(watch.has_changed().unwrap());
        // And what was there before we began is not forgotten.
        tools.run("iptables -t filter -F KUBE-FORWARD");
        watch.pause().unwrap();
        tools.restore(Family::V4, CHANGE);
        watch.resume(Family::V4, Table::Nat, true).unwrap();
        assert!(watch.has_changed().unwrap());
    });
}

#[test]
#[ignore = "needs root"]
fn other_peoples_rules_are_their_own_business_in_the_nft_variant() {
    in_namespace(|| {
        let tools = Tools { variant: "nft" };
        tools.restore(Family::V4, RULES);
        let mut watch = tools.watch();
        for change in [
            "iptables -t nat -N CNI-HOSTPORT-DNAT",
            "iptables -t nat -A OUTPUT -j CNI-HOSTPORT-DNAT",
            "iptables -t nat -A CNI-HOSTPORT-DNAT -p tcp --dport 80 -j DNAT --to-destination 10.0.0.1",
            "iptables -t nat -D OUTPUT -j CNI-HOSTPORT-DNAT",
            "iptables -t mangle -N KUBE-KUBELET-CANARY",
        ] {
            tools.run(change);
            assert!(!watch.has_changed().unwrap(), "{change}");
        }
    });
}

#[test]
#[ignore = "needs root"]
fn a_table_is_not_made_by_watching_it() {
    in_namespace(|| {
        let mut watch = Watch::open(false).unwrap();
        assert!(!watch.has_changed().unwrap());
        let names = std::fs::read_to_string("/proc/thread-self/net/ip_tables_names").unwrap();
        assert_eq!(names, "");
    });
}

#[test]
#[ignore = "needs root"]
fn more_than_the_socket_holds_is_noticed_among_10_000_rules_of_others() {
    each_variant(|tools| {
        let mut foreign = "*nat\n:FOREIGN - [0:0]\n".to_owned();
        for number in 0..10_000 {
            let (high, low) = (number / 256, number % 256);
            foreign.push_str(&format!("-A FOREIGN -d 192.0.{high}.{low}/32 -j RETURN\n"));
        }
        foreign.push_str("COMMIT\n");
        tools.restore(Family::V4, RULES);
        tools.restore(Family::V4, &foreign);
        let mut watch = tools.watch();
        assert!(!watch.has_changed().unwrap());
        tools.run("iptables -t nat -F");
        assert!(watch.has_changed().unwrap());
        assert!(!watch.has_changed().unwrap());
        tools.run("iptables -t nat -A KUBE-SERVICES -j RETURN");
        assert!(watch.has_changed().unwrap(), "it goes on after that");
    });
}
