//! External IPs and addresses of a load balancer.

use std::time::Duration;

use std::net::IpAddr;

use proxy_tests::scenario::{TCP, each_family, fails_with, passes, reaches, refuses};
use serde_json::json;

#[test]
#[ignore = "needs root and eBPF"]
fn an_external_ip_reaches_the_endpoints() {
    each_family("external-ip", |s| {
        let web = s
            .service("web", 1)
            .spec("externalIPs", json!([s.outside(1)]))
            .endpoint(s.endpoint(&s.near))
            .endpoint(s.endpoint(&s.far));
        s.apply(&web)?;
        reaches(&s.client.peer()?, s.outside(1), &["near", "far"])?;
        // Unlike a ClusterIP, it may be somebody's address: other ports are not ours.
        passes(&s.client.peer()?, (s.outside(1), 81).into())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_load_balancer_address_is_served_unless_its_mode_is_proxy() {
    each_family("load-balancer", |s| {
        let web = s
            .service("web", 1)
            .load_balancer(s.outside(1), "VIP")
            .load_balancer(s.outside(2), "Proxy")
            .endpoint(s.endpoint(&s.near))
            .endpoint(s.endpoint(&s.far));
        s.apply(&web)?;
        let peer = s.client.peer()?;
        reaches(&peer, s.outside(1), &["near", "far"])?;
        passes(&peer, (s.outside(2), TCP).into())
    });
}

/// The socket layer does not know the address that a client will have: it leaves these to the packet layer.
#[test]
#[ignore = "needs root and eBPF"]
fn source_ranges_hold_for_pods_and_for_the_node_itself() {
    each_family("source-ranges", |s| {
        let (none, all) = match s.v6 {
            true => ("2001:db8:1::/64", "::/0"),
            false => ("198.51.100.0/24", "0.0.0.0/0"),
        };
        let web = |range: &str| {
            s.service("web", 1)
                .load_balancer(s.outside(1), "VIP")
                .spec("externalIPs", json!([s.outside(2)]))
                .spec("loadBalancerSourceRanges", json!([range]))
                .endpoint(s.endpoint(&s.near))
        };
        let peers = [s.client.peer()?, s.a.peer()?];
        s.manifests.put(&web(none))?;
        s.settle_packets()?;
        for peer in &peers {
            let patience = Duration::from_millis(400);
            let denied = peer.connect_tcp_from((s.outside(1), TCP).into(), None, patience);
            fails_with(denied, libc::ETIMEDOUT)?;
            reaches(peer, s.vip(1), &["near"])?;
            reaches(peer, s.outside(2), &["near"])?;
        }
        s.agent
            .wait_metric("proxy_agent_passed_total", "source", |passed| passed >= 2.0)?;
        s.manifests.put(&web(all))?;
        s.settle_packets()?;
        for peer in &peers {
            reaches(peer, s.outside(1), &["near"])?;
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn from_the_node_an_external_address_reaches_the_whole_cluster() {
    each_family("external-local", |s| {
        let web = s
            .service("web", 1)
            .spec("externalIPs", json!([s.outside(1)]))
            .load_balancer(s.outside(2), "VIP")
            .spec("externalTrafficPolicy", "Local")
            .endpoint(s.endpoint(&s.far));
        s.apply(&web)?;
        for address in [s.outside(1), s.outside(2), s.vip(1)] {
            reaches(&s.client.peer()?, address, &["far"])?;
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn an_external_ip_of_the_node_itself_does_not_take_its_other_ports() {
    each_family("node-as-external", |s| {
        let node: IpAddr = s.a.address(s.v6);
        let web = s
            .service("web", 1)
            .spec("externalIPs", json!([node]))
            .endpoint(s.endpoint(&s.far));
        s.apply(&web)?;
        reaches(&s.client.peer()?, node, &["far"])?;
        s.a.peer()?.serve_tcp((s.unspecified(), 22).into(), "ssh")?;
        assert_eq!(s.client.ask_tcp((node, 22).into())?, "ssh");
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn an_external_ip_without_endpoints_is_refused() {
    each_family("external-empty", |s| {
        s.apply(
            &s.service("web", 1)
                .spec("externalIPs", json!([s.outside(1)])),
        )?;
        refuses(&s.client.peer()?, s.outside(1), 80, 53)
    });
}
