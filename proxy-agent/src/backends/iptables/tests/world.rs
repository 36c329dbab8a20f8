//! Small clusters in which trees split, sets come and go, and frontends share addresses.

use super::*;

/// A stream of small numbers.
struct Draw(u64);

impl Draw {
    fn below(&mut self, limit: u64) -> u64 {
        // splitmix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 27)) % limit
    }

    fn policy(&mut self) -> TrafficPolicy {
        match self.below(3) {
            0 => TrafficPolicy::Local,
            _ => TrafficPolicy::Cluster,
        }
    }
}

pub fn name(id: u8) -> ServiceName {
    ServiceName::new("default", &format!("service-{id}"))
}

/// The Service number `id` in one of many shapes, in one or both families.
pub fn service_of(id: u8, seed: u64) -> Vec<ServiceState> {
    let mut draw = Draw(seed);
    let families = match draw.below(4) {
        0 => vec![Family::V4, Family::V6],
        1 => vec![Family::V6],
        _ => vec![Family::V4],
    };
    families
        .into_iter()
        .map(|family| state(id, family, &mut draw))
        .collect()
}

fn state(id: u8, family: Family, draw: &mut Draw) -> ServiceState {
    let port = u16::from(id);
    let frontend = |address: String, port, kind| Frontend {
        address: ip(family, &address),
        port,
        kind,
        on_local_link: false,
    };
    let mut frontends = vec![frontend(
        format!("10.{}.0.{id}", 96 + draw.below(2)),
        80,
        FrontendKind::ClusterIp,
    )];
    if draw.below(2) == 0 {
        frontends.push(frontend(
            "0.0.0.0".into(),
            30_000 + 9 * port,
            FrontendKind::NodePort,
        ));
    }
    // Many Services share one address.
    if draw.below(2) == 0 {
        frontends.push(frontend(
            "198.51.100.1".into(),
            8_000 + 5 * port,
            FrontendKind::LoadBalancer,
        ));
    }
    if draw.below(4) == 0 {
        frontends.push(frontend(
            format!("203.0.113.{id}"),
            80,
            FrontendKind::ExternalIp,
        ));
    }
    let count = [0, 1, 1, 2, 3, 3, 4, 40, 90][draw.below(9) as usize];
    let backends = (0..count).filter_map(|n| {
        let is_here = draw.below(8) == 0;
        let address = format!("10.244.{}.{n}", u8::from(!is_here));
        let mut endpoint = endpoint(ip(family, &address), is_here);
        endpoint.state.in_cluster = draw.below(9) > 0;
        (draw.below(5) > 0).then_some(endpoint)
    });
    let backends = backends.collect();
    let ranges = draw.below(3) == 0 && family == Family::V4;
    ServiceState {
        key: ServicePort {
            service: name(id),
            port: "http".into(),
            protocol: if id.is_multiple_of(3) {
                Protocol::Udp
            } else {
                Protocol::Tcp
            },
            family,
        },
        frontends,
        backends,
        affinity_seconds: [None, None, Some(60), Some(10_800)][draw.below(4) as usize],
        internal_policy: draw.policy(),
        external_policy: draw.policy(),
        source_ranges: ranges
            .then(|| "203.0.113.0/24".parse().unwrap())
            .into_iter()
            .collect(),
        admits_node: false,
        health_check_port: (draw.below(4) == 0)
            .then(|| 31_000 + 2 * port + u16::from(family == Family::V6)),
    }
}
