//! Node ports: on the node's own addresses, and on loopback for the host only.

use std::net::{IpAddr, SocketAddr};

use proxy_tests::{
    Scenario, Service,
    peer::PATIENCE,
    scenario::{
        OFTEN, SOON, TCP, TCP_TARGET, UDP, UDP_TARGET, each_family, fails_with, in_family, passes,
        who_tcp, who_udp,
    },
    wait_for,
};

const TCP_NODE: u16 = 30080;
const UDP_NODE: u16 = 30053;

fn with_node_ports(s: &Scenario) -> Service {
    Service::new("web", &[s.vip(1)])
        .port("http", "TCP", TCP, TCP_TARGET)
        .node_port(TCP_NODE)
        .port("dns", "UDP", UDP, UDP_TARGET)
        .node_port(UDP_NODE)
        .endpoint(s.endpoint(&s.near))
        .endpoint(s.endpoint(&s.far))
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_node_port_is_served_on_every_address_of_the_node() {
    each_family("node-port", |s| {
        s.apply(&with_node_ports(s))?;
        let bridge = if s.v6 {
            "fd00:10:244:1::1".parse()?
        } else {
            "10.244.1.1".parse()?
        };
        for client in [s.client.peer()?, s.a.peer()?] {
            for address in [s.a.address(s.v6), bridge] {
                let tcp = who_tcp(&client, (address, TCP_NODE).into(), OFTEN)?;
                let udp = who_udp(&client, (address, UDP_NODE).into(), OFTEN)?;
                assert_eq!((tcp.len(), udp.len()), (2, 2), "{address}: {tcp:?} {udp:?}");
            }
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn loopback_serves_node_ports_to_the_host_only() {
    each_family("loopback", |s| {
        s.apply(&with_node_ports(s))?;
        let tcp = SocketAddr::from((s.loopback(), TCP_NODE));
        let udp = SocketAddr::from((s.loopback(), UDP_NODE));
        let host = s.a.peer()?;
        assert_eq!(who_tcp(&host, tcp, OFTEN)?.len(), 2);
        assert_eq!(who_udp(&host, udp, OFTEN)?.len(), 2);

        // Nobody serves it in the pod, and then the pod itself does.
        let pod = s.client.peer()?;
        fails_with(pod.ask_tcp(tcp), libc::ECONNREFUSED)?;
        s.client.serve_tcp(TCP_NODE)?;
        s.client.serve_udp(UDP_NODE)?;
        assert_eq!(
            (pod.ask_tcp(tcp)?, pod.ask_udp(udp)?),
            ("client".into(), "client".into())
        );
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_socket_bound_to_loopback_is_left_alone() {
    each_family("bound", |s| {
        s.apply(&with_node_ports(s))?;
        let to = SocketAddr::from((s.loopback(), TCP_NODE));
        let from = SocketAddr::from((s.loopback(), 0));
        let connection = s.a.peer()?.connect_tcp_from(to, Some(from), PATIENCE);
        fails_with(connection, libc::ECONNREFUSED)
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn an_address_serves_node_ports_from_the_moment_it_is_assigned() {
    each_family("new-address", |s| {
        s.apply(&with_node_ports(s))?;
        let address = s.outside(7);
        let to = SocketAddr::from((address, TCP_NODE));
        let peer = s.client.peer()?;
        passes(&peer, to)?;
        let link = format!(
            "{address}/{} dev eth0",
            if s.v6 { "128 nodad" } else { "32" }
        );
        s.a.ip(&format!("addr add {link}\n"))?;
        wait_for("the new address serves", SOON, || Ok(peer.ask_tcp(to)?))?;
        assert_eq!(who_tcp(&peer, to, OFTEN)?.len(), 2);
        s.a.ip(&format!("addr del {}\n", link.replace(" nodad", "")))?;
        wait_for("the old address serves no more", SOON, || passes(&peer, to))
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn node_ports_are_served_on_the_listed_addresses_only_in_either_mode() {
    let listed = [
        "--nodeport-addresses",
        "192.168.77.0/24,fd00:192:168:77::/64",
    ];
    let iptables = [
        "--mode",
        "iptables",
        "--cluster-cidr",
        "10.244.0.0/16,fd00:10:244::/48",
    ];
    let modes = [listed.to_vec(), [&listed[..], &iptables].concat()];
    for (mode, v6) in modes.iter().flat_map(|mode| [(mode, false), (mode, true)]) {
        in_family("node-port-listed", v6, mode, |s| {
            let outsider = s.topology.outsider()?.peer()?;
            s.manifests.put(&with_node_ports(s))?;
            let (node, bridge, loopback, later) = match v6 {
                false => ("192.168.77.11", "10.244.1.1", "127.0.0.1", "192.168.77.77"),
                true => (
                    "fd00:192:168:77::11",
                    "fd00:10:244:1::1",
                    "::1",
                    "fd00:192:168:77::77",
                ),
            };
            let at = |address: &str| -> anyhow::Result<SocketAddr> {
                Ok((address.parse::<IpAddr>()?, TCP_NODE).into())
            };
            let pod = s.client.peer()?;
            for client in [&pod, &outsider] {
                wait_for("the listed address serves", SOON, || {
                    Ok(client.ask_tcp(at(node)?)?)
                })?;
            }
            // They arrive at the node itself, where nobody listens.
            fails_with(pod.ask_tcp(at(bridge)?), libc::ECONNREFUSED)?;
            if mode.len() > listed.len() {
                fails_with(s.a.peer()?.ask_tcp(at(loopback)?), libc::ECONNREFUSED)?;
            }
            // An address that comes later.
            let length = if v6 { "128 nodad" } else { "32" };
            s.a.ip(&format!("addr add {later}/{length} dev eth0\n"))?;
            for client in [&pod, &outsider] {
                wait_for("the new address serves", SOON, || {
                    Ok(client.ask_tcp(at(later)?)?)
                })?;
            }
            Ok(())
        });
    }
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_node_port_without_endpoints_is_refused() {
    each_family("node-port-empty", |s| {
        s.apply(&with_node_ports(s).endpoints([]))?;
        let to = SocketAddr::from((s.a.address(s.v6), TCP_NODE));
        fails_with(s.client.peer()?.ask_tcp(to), libc::ECONNREFUSED)?;
        let udp = SocketAddr::from((s.a.address(s.v6), UDP_NODE));
        let socket = s.client.peer()?.open_udp_for(udp)?;
        fails_with(socket.send_to("?", udp), libc::ECONNREFUSED)
    });
}
