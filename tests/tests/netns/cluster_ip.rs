//! ClusterIPs: who is reached, what is refused, and which address the client sees.

use std::net::{IpAddr, SocketAddr};

use anyhow::ensure;
use proxy_tests::{
    Service,
    peer::PATIENCE,
    scenario::{
        OFTEN, TCP, TCP_TARGET, UDP, each_family, fails_with, in_family, passes, reaches, refuses,
        who_tcp,
    },
};

#[test]
#[ignore = "needs root and eBPF"]
fn a_cluster_ip_reaches_every_endpoint_from_pods_and_the_host() {
    each_family("cluster-ip", |s| {
        let web = s
            .service("web", 1)
            .endpoint(s.endpoint(&s.near))
            .endpoint(s.endpoint(&s.far));
        s.apply(&web)?;
        reaches(&s.client.peer()?, s.vip(1), &["near", "far"])?;
        reaches(&s.a.peer()?, s.vip(1), &["near", "far"])?;
        // A pod may reach itself through its own Service.
        reaches(&s.near.peer()?, s.vip(1), &["near", "far"])
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn changed_endpoints_take_over() {
    each_family("changed", |s| {
        let web = s.service("web", 1);
        s.apply(&web.clone().endpoint(s.endpoint(&s.near)))?;
        reaches(&s.client.peer()?, s.vip(1), &["near"])?;
        s.apply(&web.endpoint(s.endpoint(&s.far)))?;
        reaches(&s.client.peer()?, s.vip(1), &["far"])?;
        s.manifests.remove("web")?;
        s.settle_packets()?;
        passes(&s.client.peer()?, (s.vip(1), TCP).into())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn established_connections_outlive_their_endpoint() {
    each_family("established", |s| {
        let web = s.service("web", 1);
        s.apply(&web.clone().endpoint(s.endpoint(&s.far)))?;
        let connection = s.client.peer()?.connect_tcp((s.vip(1), TCP).into())?;
        connection.receive(PATIENCE)?;
        s.apply(&web.endpoint(s.endpoint(&s.near)))?;
        ensure!(connection.ask()? == "far", "the connection has moved");
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_service_without_endpoints_is_refused() {
    each_family("no-endpoints", |s| {
        s.apply(
            &s.service("web", 1)
                .endpoint(s.endpoint(&s.near).not_ready()),
        )?;
        for client in [s.client.peer()?, s.a.peer()?] {
            refuses(&client, s.vip(1), TCP, UDP)?;
        }
        s.agent
            .wait_metric("proxy_agent_refused_total", "", |refused| refused >= 4.0)
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_udp_connect_is_never_refused() {
    each_family("udp-connect", |s| {
        s.apply(&s.service("web", 1))?;
        let peer = s.client.peer()?;
        for port in [UDP, 54] {
            let to = SocketAddr::from((s.vip(1), port));
            peer.open_udp_for(to)?.connect(to)?;
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn an_unknown_port_of_a_cluster_ip_is_refused() {
    each_family("unknown-port", |s| {
        s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.near)))?;
        // The ports exist, with the other protocol.
        refuses(&s.client.peer()?, s.vip(1), UDP, TCP)?;
        refuses(&s.client.peer()?, s.vip(1), 81, 54)
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn what_is_no_service_is_left_alone() {
    each_family("no-service", |s| {
        s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.near)))?;
        let peer = s.client.peer()?;
        ensure!(peer.ask_tcp((s.far.address(s.v6), TCP_TARGET).into())? == "far");
        passes(&peer, (s.vip(2), TCP).into())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn the_client_sees_the_address_it_asked_for() {
    each_family("seen-address", |s| {
        s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.far)))?;
        let peer = s.client.peer()?;
        let (tcp, udp): (SocketAddr, SocketAddr) = ((s.vip(1), TCP).into(), (s.vip(1), UDP).into());
        assert_eq!(peer.connect_tcp(tcp)?.peer_address()?, tcp);

        let unconnected = peer.open_udp_for(udp)?;
        assert_eq!(unconnected.ask_to(udp)?, ("far".to_owned(), udp));

        let connected = peer.open_udp_for(udp)?;
        connected.connect(udp)?;
        assert_eq!(connected.peer_address()?, udp);
        assert_eq!(connected.ask()?, "far");
        // To somebody else: the old translation is forgotten.
        let direct = SocketAddr::from((s.near.address(s.v6), 5353));
        connected.connect(direct)?;
        assert_eq!(connected.peer_address()?, direct);
        assert_eq!(connected.ask()?, "near");
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn v4_mapped_sockets_are_served() {
    in_family("v4-mapped", false, &[], |s| {
        s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.far)))?;
        let IpAddr::V4(vip) = s.vip(1) else {
            anyhow::bail!("not IPv4")
        };
        let mapped = IpAddr::V6(vip.to_ipv6_mapped());
        let peer = s.client.peer()?;
        let (tcp, udp): (SocketAddr, SocketAddr) = ((mapped, TCP).into(), (mapped, UDP).into());
        reaches(&peer, mapped, &["far"])?;
        assert_eq!(peer.connect_tcp(tcp)?.peer_address()?, tcp);
        assert_eq!(
            peer.open_udp_for(udp)?.ask_to(udp)?,
            ("far".to_owned(), udp)
        );
        let connected = peer.open_udp_for(udp)?;
        connected.connect(udp)?;
        assert_eq!(
            (connected.peer_address()?, connected.ask()?),
            (udp, "far".to_owned())
        );
        refuses(&peer, mapped, 81, 54)
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn both_families_of_one_service_are_served_apart() {
    in_family("dual-stack", false, &[], |s| {
        let vips: [IpAddr; 2] = ["10.96.0.1".parse()?, "fd00:10:96::1".parse()?];
        let service = |v6_far: bool| {
            let web = Service::new("web", &vips)
                .port("http", "TCP", TCP, TCP_TARGET)
                .port("dns", "UDP", UDP, 5353)
                .endpoint(proxy_tests::Endpoint::new(s.near.v4().into(), "node-a"));
            let far = proxy_tests::Endpoint::new(s.far.v6().into(), "node-b");
            if v6_far { web.endpoint(far) } else { web }
        };
        s.apply(&service(true))?;
        let peer = s.client.peer()?;
        reaches(&peer, vips[0], &["near"])?;
        reaches(&peer, vips[1], &["far"])?;
        s.apply(&service(false))?;
        reaches(&peer, vips[0], &["near"])?;
        refuses(&peer, vips[1], TCP, UDP)
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn of_two_services_with_one_address_the_loser_is_reported() {
    each_family("two-owners", |s| {
        let first = s.service("first", 1).endpoint(s.endpoint(&s.near));
        let second = s.service("second", 1).endpoint(s.endpoint(&s.far));
        s.apply(&first)?;
        s.apply(&second)?;
        let to = SocketAddr::from((s.vip(1), TCP));
        assert_eq!(
            who_tcp(&s.client.peer()?, to, OFTEN)?.len(),
            1,
            "both answer"
        );
        s.agent.wait_log("default/second")?;
        s.manifests.remove("first")?;
        s.settle()?;
        reaches(&s.client.peer()?, s.vip(1), &["far"])
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn one_port_number_of_both_protocols_is_two_ports() {
    each_family("two-protocols", |s| {
        let only_udp = Service::new("only-udp", &[s.vip(1)])
            .port("dns", "UDP", UDP, 5353)
            .endpoint(s.endpoint(&s.near));
        s.apply(&only_udp)?;
        let peer = s.client.peer()?;
        assert_eq!(peer.ask_udp((s.vip(1), UDP).into())?, "near");
        fails_with(peer.ask_tcp((s.vip(1), UDP).into()), libc::ECONNREFUSED)
    });
}
