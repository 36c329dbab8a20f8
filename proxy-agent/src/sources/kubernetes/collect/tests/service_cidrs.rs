use serde_json::json;

use super::*;

fn service_cidr(name: &str, cidrs: &[&str]) -> networking::ServiceCIDR {
    read(json!({"metadata": {"name": name}, "spec": {"cidrs": cidrs}}))
}

/// One that has read everything but ServiceCIDRs, which it wants.
fn waiting() -> Collector {
    let mut collector = Collector::new(NodeName::new("node-a"), Server::Name, true);
    take(&mut collector, list(Item::Service, vec![service("a", 80)]));
    take(&mut collector, list(Item::Slice, Vec::new()));
    take(
        &mut collector,
        list(Item::Node, vec![node("node-a", "zone-a")]),
    );
    collector
}

/// Networks of changed ServiceCIDRs, each behind its name; a name alone is one that is gone.
fn networks(objects: &Objects) -> Vec<String> {
    let cidrs = objects.service_cidrs.iter();
    let text = cidrs.map(|(name, cidr)| {
        let networks = cidr.iter().flat_map(|cidr| cidr.networks.iter());
        let networks: String = networks.map(|network| format!(" {network}")).collect();
        format!("{name}{networks}")
    });
    text.collect()
}

#[test]
fn service_cidrs_are_in_what_is_told_first_and_then_followed() {
    let mut collector = waiting();
    let [both, more] = [
        service_cidr("kubernetes", &["10.96.0.0/16", "fd00:10:96::/112"]),
        service_cidr("more", &["10.97.0.0/16", "nonsense"]),
    ];
    for item in list(Item::ServiceCidr, vec![both.clone()]) {
        assert!(collector.waits() && collector.objects().is_none());
        collector.take(item);
    }
    let first = collector.objects().unwrap();
    assert_eq!(
        networks(&first),
        ["kubernetes 10.96.0.0/16 fd00:10:96::/112"]
    );
    assert_eq!(told(&first), ["default/a"]);
    let heard = [Event::Apply(more), Event::Delete(both)].map(event_of);
    take(&mut collector, heard.map(Item::ServiceCidr));
    let next = collector.objects().unwrap();
    assert_eq!(networks(&next), ["more 10.97.0.0/16", "kubernetes"]);
    let problems: Vec<_> = collector
        .problems()
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        problems,
        ["ServiceCIDR more: spec.cidrs[1]: \"nonsense\" is not a CIDR; left out, the rest is used"]
    );
    // A watch that is lost ends nothing; a list that lacks one does.
    take(
        &mut collector,
        [Item::ServiceCidr(Heard::Failed("lost".to_owned()))],
    );
    assert_eq!(collector.objects(), None);
    assert_eq!(collector.problems()[1].to_string(), "ServiceCIDRs: lost");
    take(&mut collector, list(Item::ServiceCidr, Vec::new()));
    assert_eq!(networks(&collector.objects().unwrap()), ["more"]);
    assert_eq!(collector.problems(), []);
}

#[test]
fn nobody_waits_for_service_cidrs_that_are_refused_or_not_served() {
    for (heard, problems) in [
        (Heard::Failed("forbidden".to_owned()), 1),
        (Heard::Unserved, 0),
    ] {
        let mut collector = waiting();
        assert_eq!(collector.objects(), None);
        collector.take(Item::ServiceCidr(heard));
        let objects = collector.objects().unwrap();
        assert!(objects.complete && objects.service_cidrs.is_empty());
        assert_eq!(collector.problems().len(), problems);
        // They come all the same.
        let late = vec![service_cidr("kubernetes", &["10.96.0.0/16"])];
        take(&mut collector, list(Item::ServiceCidr, late));
        let objects = collector.objects().unwrap();
        assert_eq!(networks(&objects), ["kubernetes 10.96.0.0/16"]);
    }
    let mut silent = waiting();
    silent.go_on();
    assert!(silent.objects().unwrap().complete);
}
