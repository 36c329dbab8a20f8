//! Ordinary manifests become the desired state and then maps and rules, written down in `tests/golden/<case>`.
//!
//! Each case is a folder of manifests as seen from `node-a`; `addresses.txt` names other node addresses than the usual ones.
//! `BLESS=1` (`cargo xtask bless`) rewrites what is expected: review the difference.

#![expect(clippy::unwrap_used, reason = "all of it is a test")]

use std::{
    collections::BTreeSet,
    env,
    fmt::Write,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use proxy_agent::{
    backends::{
        Backend, Bounds,
        ebpf::{EbpfBackend, describe, simulated::Simulated},
        iptables,
        iptables::rules::{Features, LocalPods, NodePorts, Rules},
    },
    compile::{Compiled, Compiler},
    model::{Model, NodeName, Update},
    sources::file::Manifests,
    state::{DesiredState, Family},
};

const NODE: &str = "node-a";
const ADDRESSES: &str = "192.168.0.1 fd00:192:168::1 fe80::1";

fn cases() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let entries = fs::read_dir(folder).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let mut cases: Vec<_> = paths.filter(|path| path.is_dir()).collect();
    cases.sort();
    cases
}

/// Compiles a case; the text lists problems after the state.
fn compile(case: &Path) -> (String, DesiredState) {
    let here = NodeName::new(NODE);
    let mut manifests = Manifests::new(case, here.clone());
    let objects = manifests.scan(&BTreeSet::new(), &mut |_| {}).unwrap();
    let addresses =
        fs::read_to_string(case.join("addresses.txt")).unwrap_or_else(|_| ADDRESSES.into());
    let addresses = addresses
        .split_whitespace()
        .map(|ip| ip.parse::<IpAddr>().unwrap());
    let mut model = Model::new(here);
    model.apply(Update::Objects(objects));
    model.apply(Update::Addresses(addresses.collect()));
    let Compiled {
        state, problems, ..
    } = Compiler::default().compile_all(&model);
    let mut text = state.to_string();
    for problem in manifests.problems() {
        let problem = problem.to_string();
        let name = problem
            .split_once(&format!("{}/", case.display()))
            .map(|(_, name)| name);
        let _ = writeln!(
            text,
            "source: {}",
            name.unwrap_or(&problem)
                .replace(&format!("{}/", case.display()), "")
        );
    }
    for problem in problems {
        let _ = writeln!(text, "problem: {problem}");
    }
    (text, state)
}

/// The maps of the socket layer after `state` was applied to empty ones.
fn maps(state: &DesiredState) -> String {
    let mut backend = EbpfBackend::new(Simulated::checked());
    let observed = backend.observe().unwrap();
    let plan = backend.plan(&observed, state, Bounds::default());
    backend.apply(&plan, state).unwrap();
    describe(backend.store()).unwrap()
}

/// kube-proxy's defaults, on a host that can do everything, with the pod networks known.
fn rules_of_node() -> Rules {
    let networks = ["10.244.0.0/16", "fd00:10:244::/56"];
    Rules {
        families: [Family::V4, Family::V6].into(),
        masquerade_mark: 0x4000,
        masquerade_all: false,
        local_pods: LocalPods::Networks(networks.map(|net| net.parse().unwrap()).into()),
        node_ports: NodePorts::All,
        localhost_node_ports: true,
        conntrack_liberal: false,
        service_networks: Some(Vec::new()),
        features: Features {
            random_fully: true,
            ipset: true,
            recent: true,
            nfacct: false,
        },
    }
}

/// The rules of the packet layer that `state` adds to those of a cluster without Services.
fn rules(state: &DesiredState) -> String {
    let text = iptables::describe(&rules_of_node(), state);
    let constant = iptables::describe(&rules_of_node(), &DesiredState::default());
    let constant: BTreeSet<&str> = constant
        .lines()
        .filter(|line| !line.starts_with('*'))
        .collect();
    let mut lines = text
        .lines()
        .filter(|line| !constant.contains(line))
        .peekable();
    let mut added = String::new();
    while let Some(line) = lines.next() {
        let is_header = |line: &str| line.starts_with('*');
        let is_empty = lines.peek().is_none_or(|next| is_header(next));
        if !(is_header(line) && is_empty) {
            let _ = writeln!(added, "{line}");
        }
    }
    added
}

fn check(file: &Path, actual: &str, failures: &mut Vec<String>) {
    if env::var_os("BLESS").is_some() {
        fs::write(file, actual).unwrap();
        return;
    }
    let expected = fs::read_to_string(file).unwrap_or_default();
    if expected != actual {
        failures.push(format!(
            "{}\n--- expected\n{expected}--- found\n{actual}",
            file.display()
        ));
    }
}

#[test]
fn manifests_become_the_expected_state_maps_and_rules() {
    let mut failures = Vec::new();
    for case in cases() {
        let (text, state) = compile(&case);
        check(&case.join("state.txt"), &text, &mut failures);
        check(&case.join("maps.txt"), &maps(&state), &mut failures);
        check(&case.join("rules.txt"), &rules(&state), &mut failures);
    }
    assert!(
        failures.is_empty(),
        "{} files differ; if they should, `cargo xtask bless`\n{}",
        failures.len(),
        failures.join("\n")
    );
}

#[test]
fn a_cluster_without_services_has_these_rules() {
    let text = iptables::describe(&rules_of_node(), &DesiredState::default());
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/rules.txt");
    let mut failures = Vec::new();
    check(&file, &text, &mut failures);
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn every_case_says_why_it_is_there() {
    for case in cases() {
        let text = fs::read_to_string(case.join("objects.yaml")).unwrap();
        assert!(text.starts_with("# "), "{}", case.display());
    }
}
