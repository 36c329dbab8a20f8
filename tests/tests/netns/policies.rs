//! Which endpoints are used: traffic policies, topology, terminating endpoints, labels that exclude.

use proxy_tests::scenario::{TCP, UDP, each_family, passes, reaches, refuses};

#[test]
#[ignore = "needs root and eBPF"]
fn internal_policy_local_stays_on_the_node() {
    each_family("internal-local", |s| {
        let web = s.service("web", 1).spec("internalTrafficPolicy", "Local");
        let both = web
            .clone()
            .endpoint(s.endpoint(&s.near))
            .endpoint(s.endpoint(&s.far));
        s.apply(&both)?;
        reaches(&s.client.peer()?, s.vip(1), &["near"])?;
        s.apply(&web.endpoint(s.endpoint(&s.far)))?;
        refuses(&s.client.peer()?, s.vip(1), TCP, UDP)
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn terminating_endpoints_serve_only_when_nothing_is_ready() {
    each_family("terminating", |s| {
        let web = s.service("web", 1);
        let draining = web.clone().endpoint(s.endpoint(&s.far).terminating());
        s.apply(&draining.clone().endpoint(s.endpoint(&s.near)))?;
        reaches(&s.client.peer()?, s.vip(1), &["near"])?;
        s.apply(&draining)?;
        reaches(&s.client.peer()?, s.vip(1), &["far"])?;
        s.apply(&web.endpoint(s.endpoint(&s.far).conditions(false, false, true)))?;
        refuses(&s.client.peer()?, s.vip(1), TCP, UDP)
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn zone_hints_keep_traffic_in_the_zone() {
    each_family("zones", |s| {
        let web = s.service("web", 1);
        let (near, far) = (s.endpoint(&s.near), s.endpoint(&s.far));
        let hinted = [
            near.clone().for_zone("zone-a"),
            far.clone().for_zone("zone-b"),
        ];
        s.apply(&web.clone().endpoints(hinted))?;
        reaches(&s.client.peer()?, s.vip(1), &["near"])?;
        // One without a hint: all hints are ignored.
        s.apply(
            &web.clone()
                .endpoints([near.clone().for_zone("zone-a"), far.clone()]),
        )?;
        reaches(&s.client.peer()?, s.vip(1), &["near", "far"])?;
        // None for this zone: the same.
        s.apply(&web.endpoints([near.for_zone("zone-c"), far.for_zone("zone-b")]))?;
        reaches(&s.client.peer()?, s.vip(1), &["near", "far"])
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_node_that_moves_to_another_zone_follows_its_hints() {
    each_family("zone-move", |s| {
        let (near, far) = (s.endpoint(&s.near), s.endpoint(&s.far));
        let hinted = [near.for_zone("zone-a"), far.for_zone("zone-b")];
        s.apply(&s.service("web", 1).endpoints(hinted))?;
        reaches(&s.client.peer()?, s.vip(1), &["near"])?;
        s.manifests.put_node("node-a", "zone-b")?;
        s.settle()?;
        reaches(&s.client.peer()?, s.vip(1), &["far"])
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn node_hints_keep_traffic_on_the_node() {
    each_family("node-hints", |s| {
        let (near, far) = (s.endpoint(&s.near), s.endpoint(&s.far));
        let hinted = [near.for_node("node-a"), far.for_node("node-b")];
        s.apply(&s.service("web", 1).endpoints(hinted))?;
        reaches(&s.client.peer()?, s.vip(1), &["near"])
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn services_of_another_proxy_and_headless_ones_are_left_alone() {
    each_family("excluded", |s| {
        for label in [
            "service.kubernetes.io/service-proxy-name",
            "service.kubernetes.io/headless",
        ] {
            let web = s.service("web", 1).endpoint(s.endpoint(&s.near));
            s.apply(&web)?;
            reaches(&s.client.peer()?, s.vip(1), &["near"])?;
            s.apply(&web.label(label, "other"))?;
            s.settle_packets()?;
            passes(&s.client.peer()?, (s.vip(1), TCP).into())?;
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn external_names_and_services_without_cluster_ip_are_skipped() {
    each_family("skipped", |s| {
        let name = "apiVersion: v1\nkind: Service\nmetadata: {name: name, namespace: default}\n\
            spec: {type: ExternalName, externalName: example.com}\n";
        s.manifests.write("name.yaml", name)?;
        let missing = "apiVersion: v1\nkind: Service\nmetadata: {name: missing, namespace: default}\n\
            spec: {ports: [{port: 80}]}\n";
        s.manifests.write("missing.yaml", missing)?;
        s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.near)))?;
        reaches(&s.client.peer()?, s.vip(1), &["near"])?;
        s.agent.wait_log("default/missing")
    });
}
