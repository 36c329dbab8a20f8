//! ServiceCIDRs of a real API server, with kube-proxy's mode nftables.

use std::{collections::BTreeSet, time::Duration};

use anyhow::ensure;
use proxy_tests::{
    kube::{KUBE_PROXY, NOBODY, SERVICE_NETWORKS, Variant},
    scenario::SOON,
    wait_for,
};

use crate::cluster::Cluster;

const ARGS: [&str; 2] = ["--proxy-mode", "nftables"];
/// The API server makes them of its own arguments.
const FIRST: [&str; 2] = SERVICE_NETWORKS;
const MORE: [&str; 2] = ["10.200.0.0/16", "fd00:10:200::/112"];
/// The longest wait between two tries, and some.
const RECOVERY: Duration = Duration::from_secs(120);
/// What the agent may list and watch beside ServiceCIDRs.
const RIGHTS: [(&str, &str); 3] = [
    ("", "services"),
    ("", "nodes"),
    ("discovery.k8s.io", "endpointslices"),
];

/// The networks in which the rules drop what no Service has.
fn dropped(c: &Cluster) -> anyhow::Result<BTreeSet<String>> {
    let rules = c.rules(Variant::Nft)?;
    let rules = rules
        .lines()
        .filter(|rule| rule.contains("a ServiceCIDR has this address"));
    let networks = rules.filter_map(|rule| rule.strip_prefix("-A KUBE-SERVICES -d "));
    let networks = networks.filter_map(|rest| rest.split(' ').next());
    Ok(networks.map(str::to_owned).collect())
}

fn wait_dropped(c: &Cluster, wanted: &[&str], limit: Duration) -> anyhow::Result<()> {
    let wanted: BTreeSet<String> = wanted.iter().map(|&network| network.to_owned()).collect();
    wait_for("the networks are those", limit, || {
        let found = dropped(c)?;
        ensure!(found == wanted, "{found:?} instead of {wanted:?}");
        Ok(())
    })
}

#[test]
#[ignore = "needs root and eBPF"]
fn service_cidrs_come_go_and_outlive_their_watch() {
    Cluster::run("service-cidrs", Variant::Nft, &ARGS, |c| {
        let (near, far) = (c.scenario.near.clone(), c.scenario.far.clone());
        c.control.apply_node(&c.scenario.a)?;
        c.apply(&[&near])?;
        // kube-proxy's own rights are enough.
        c.follow(KUBE_PROXY)?;
        wait_dropped(c, &FIRST, SOON)?;
        c.wait_served_by(&[&near])?;
        c.control.apply_service_cidr("more", &MORE)?;
        wait_dropped(c, &[FIRST, MORE].concat(), SOON)?;
        c.control.stop_api();
        c.wait_log("what is known stays in use, trying again")?;
        wait_dropped(c, &[FIRST, MORE].concat(), SOON)?;
        c.control.start_api(&[])?;
        c.control.delete_service_cidr("more")?;
        wait_dropped(c, &FIRST, RECOVERY)?;
        c.apply(&[&far])?;
        c.wait_problems(RECOVERY, |count| count == 0.0)?;
        c.wait_served_by(&[&far])
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn without_the_right_to_service_cidrs_everything_else_goes_on() {
    Cluster::run("service-cidrs-right", Variant::Nft, &ARGS, |c| {
        let near = c.scenario.near.clone();
        c.control.apply_node(&c.scenario.a)?;
        c.apply(&[&near])?;
        c.control.grant(NOBODY, &RIGHTS)?;
        c.follow(NOBODY)?;
        c.wait_log(
            r#"{apiGroups: ["networking.k8s.io"], resources: ["servicecidrs"], verbs: ["list", "watch"]}"#,
        )?;
        c.wait_served_by(&[&near])?;
        ensure!(dropped(c)?.is_empty());
        let all = [&RIGHTS[..], &[("networking.k8s.io", "servicecidrs")]].concat();
        c.control.grant(NOBODY, &all)?;
        wait_dropped(c, &FIRST, RECOVERY)
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn an_api_server_that_serves_none_is_followed_without() {
    Cluster::run("service-cidrs-none", Variant::Nft, &ARGS, |c| {
        let (near, far) = (c.scenario.near.clone(), c.scenario.far.clone());
        c.control.apply_node(&c.scenario.a)?;
        c.apply(&[&near])?;
        c.control.stop_api();
        // The last one that can do without them itself.
        c.control.start_api(&[
            "--emulated-version=1.33",
            "--feature-gates=MultiCIDRServiceAllocator=false",
            "--runtime-config=networking.k8s.io/v1/servicecidrs=false",
        ])?;
        c.follow(KUBE_PROXY)?;
        c.wait_log("this API server does not serve them: going on without")?;
        c.wait_served_by(&[&near])?;
        c.apply(&[&far])?;
        c.wait_served_by(&[&far])?;
        ensure!(dropped(c)?.is_empty());
        Ok(())
    });
}
