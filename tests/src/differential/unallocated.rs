//! Addresses of the ServiceCIDRs that no Service has: whether packets to them go on is seen by who has them elsewhere.

use std::net::IpAddr;

use super::plan;
use crate::{Pod, Scenario, scenario::SOURCES};

/// As a Service of this number would have it, if there were so many.
const NUMBER: u8 = 99;

pub(super) fn address(v6: bool) -> IpAddr {
    plan::vip(NUMBER, v6)
}

/// Has a pod of the other node answer there while it is kept, and leads all clients, and its answers, by way of the agent's node.
///
/// # Errors
/// The kernel refuses.
pub fn serve_unallocated(s: &Scenario, outsider: &Pod) -> anyhow::Result<Pod> {
    let pod = s.b.pod("elsewhere")?;
    pod.peer()?.serve_sources(SOURCES, pod.name())?;
    for (v6, length, all, fresh) in [
        (false, "32", "0.0.0.0/0", ""),
        (true, "128", "::/0", " nodad"),
    ] {
        let to = format!("{}/{length}", address(v6));
        let (a, b) = (s.a.address(v6), s.b.address(v6));
        let gateway = gateway(pod.address(v6));
        pod.ip(&format!(
            "addr add {to} dev lo{fresh}\nroute replace {all} via {gateway} src {}\n",
            address(v6)
        ))?;
        s.b.ip(&format!(
            "route add {to} via {}\nroute add {}/{length} via {a}\n",
            pod.address(v6),
            outsider.address(v6)
        ))?;
        s.a.ip(&format!("route add {to} via {b}\n"))?;
        outsider.ip(&format!("route add {to} via {a}\n"))?;
    }
    Ok(pod)
}

/// The first address of a pod's network.
fn gateway(pod: IpAddr) -> IpAddr {
    match pod {
        IpAddr::V4(v4) => {
            let [a, b, c, _] = v4.octets();
            [a, b, c, 1].into()
        }
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            [a, b, c, d, 0, 0, 0, 1].into()
        }
    }
}
