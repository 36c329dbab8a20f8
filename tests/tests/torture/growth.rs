//! Services that are more than one of the maps holds, for each map that follows the cluster.

use std::net::{IpAddr, Ipv4Addr};

use proxy_tests::{Endpoint, Service};

/// A map, and Services for which it has to grow when those before are there: just more than its first size, or than the
/// share of it that the agent uses before it makes a larger one.
pub type Growth = (&'static str, fn() -> Vec<Service>);

/// Each map once, and every one by its own kind of cluster.
pub const GROWTHS: [Growth; 5] = [
    ("SERVICES", one_with_many_ports),
    ("VIPS", many),
    ("FRONTENDS", one_with_many_external_ips),
    ("MEMBERS", || with_many_endpoints("wide", 2, 12)),
    ("SLOTS", || with_many_endpoints("wider", 3, 20)),
];

/// In 10.98.0.0/16.
fn vip(number: u16) -> IpAddr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(10, 98, high, low).into()
}

/// Of 11.0.0.0/8, where nobody is: these Services get no load.
fn endpoint(block: u8, number: u16) -> Endpoint {
    let [high, low] = number.to_be_bytes();
    Endpoint::new(Ipv4Addr::new(11, block, high, low).into(), "node-b")
}

/// 1,100 service ports; 1,024 fit.
fn one_with_many_ports() -> Vec<Service> {
    let service = Service::new("ports", &[vip(1)]).endpoint(endpoint(0, 1));
    let ports = 1000..2100;
    vec![ports.fold(service, |service, port| {
        service.port(&format!("p{port}"), "TCP", port, 8080)
    })]
}

/// 1,100 ClusterIPs; 1,024 fit.
fn many() -> Vec<Service> {
    let service = |number| {
        Service::new(&format!("many-{number}"), &[vip(100 + number)])
            .port("", "TCP", 80, 8080)
            .endpoint(endpoint(1, number))
    };
    (0..1100).map(service).collect()
}

/// 6,000 frontends beside the 2,200 of those above; 8,192 fit, because the growth before took some room for all.
fn one_with_many_external_ips() -> Vec<Service> {
    let external: Vec<IpAddr> = (0..6000_u16)
        .map(|number| {
            let [high, low] = number.to_be_bytes();
            Ipv4Addr::new(100, 64, high, low).into()
        })
        .collect();
    let service = Service::new("external", &[vip(2)])
        .port("", "TCP", 80, 8080)
        .spec("externalIPs", serde_json::json!(external));
    vec![service]
}

/// `count` Services of 1,000 endpoints: 13,107 members are used of 16,384 before the map grows, 32,768 slots of 65,536.
fn with_many_endpoints(name: &str, block: u8, count: u16) -> Vec<Service> {
    let service = |number: u16| {
        let endpoints = (0..1000).map(|n| endpoint(block, number * 1000 + n));
        Service::new(
            &format!("{name}-{number}"),
            &[vip(u16::from(block) * 0x1000 + number)],
        )
        .port("", "TCP", 80, 8080)
        .endpoints(endpoints)
    };
    (0..count).map(service).collect()
}
