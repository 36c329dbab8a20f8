//! UDP sockets: choices that last, replaced endpoints, sockets of dead ones.

use std::{
    io,
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use proxy_tests::{
    Pod, Scenario, Service,
    peer::PATIENCE,
    scenario::{SOON, UDP, UDP_TARGET, each_family, passes},
    wait_for,
};

#[test]
#[ignore = "needs root and eBPF"]
fn an_unconnected_socket_stays_with_its_endpoint() {
    each_family("udp-stays", |s| {
        let both = s
            .service("dns", 1)
            .endpoint(s.endpoint(&s.near))
            .endpoint(s.endpoint(&s.far));
        s.apply(&both)?;
        let to = SocketAddr::from((s.vip(1), UDP));
        let socket = s.client.peer()?.open_udp_for(to)?;
        let first = socket.ask_to(to)?;
        for _ in 0..20 {
            assert_eq!(socket.ask_to(to)?, first);
        }
        // While it is used, it stays where it is, whoever else comes.
        let (more, also) = (s.near.peer()?, s.endpoint(&s.near).at_port(5354));
        more.serve_udp((s.unspecified(), 5354).into(), "also near")?;
        s.apply(&both.endpoint(also))?;
        for _ in 0..20 {
            assert_eq!(socket.ask_to(to)?, first);
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn an_unconnected_socket_follows_a_replaced_endpoint() {
    each_family("udp-follows", |s| {
        let dns = s.service("dns", 1);
        let to = SocketAddr::from((s.vip(1), UDP));
        let socket = s.client.peer()?.open_udp_for(to)?;
        for (pod, name) in [(&s.near, "near"), (&s.far, "far"), (&s.near, "near")] {
            s.apply(&dns.clone().endpoint(s.endpoint(pod)))?;
            assert_eq!(socket.ask_to(to)?, (name.to_owned(), to));
        }
        Ok(())
    });
}

/// What the kernel translates packet by packet would lead there for as long as packets come.
#[test]
#[ignore = "needs root and eBPF"]
fn a_client_outside_follows_a_replaced_endpoint() {
    const NODE_PORT: u16 = 30_053;
    each_family("udp-outside", |s| {
        let outsider = s.topology.outsider()?.peer()?;
        let dns = || {
            Service::new("dns", &[s.vip(1)])
                .port("dns", "UDP", UDP, UDP_TARGET)
                .node_port(NODE_PORT)
        };
        let to = SocketAddr::from((s.a.address(s.v6), NODE_PORT));
        let socket = outsider.open_udp_for(to)?;
        for (pod, name) in [(&s.near, "near"), (&s.far, "far"), (&s.near, "near")] {
            s.apply(&dns().endpoint(s.endpoint(pod)))?;
            wait_for("the flow is forgotten", SOON, || {
                let (answer, from) = socket.ask_to(to)?;
                ensure!(from == to && answer == name, "{answer} from {from}");
                Ok(())
            })?;
        }
        s.manifests.remove("dns")?;
        wait_for("the Service is gone", SOON, || {
            ensure!(socket.ask_to(to).is_err());
            Ok(())
        })?;
        s.agent
            .wait_metric("proxy_agent_conntrack_flows_deleted_total", "", |deleted| {
                deleted >= 3.0
            })
    });
}

/// The rules keep an endpoint that no file names yet, and so do its flows.
#[test]
#[ignore = "needs root and eBPF"]
fn a_client_outside_keeps_its_flow_while_a_broken_file_hides_its_endpoint() {
    const NODE_PORT: u16 = 30_053;
    each_family("udp-broken-start", |s| {
        let outsider = s.topology.outsider()?.peer()?;
        let to = SocketAddr::from((s.a.address(s.v6), NODE_PORT));
        let socket = outsider.open_udp_for(to)?;
        let write = |s: &Scenario, pod: &Pod| {
            let dns = Service::new("dns", &[s.vip(1)])
                .port("dns", "UDP", UDP, UDP_TARGET)
                .node_port(NODE_PORT)
                .endpoint(s.endpoint(pod));
            let [service, slice] = &dns.objects()[..] else {
                bail!("not one slice: {dns:?}");
            };
            s.manifests.write("service.yaml", &service.to_string())?;
            s.manifests.write("slice.yaml", &slice.to_string())?;
            s.settle_packets()
        };
        write(s, &s.near)?;
        ensure!(socket.ask_to(to)?.0 == "near");
        s.agent.kill9()?;
        s.manifests.write("slice.yaml", "kind: [")?;
        s.agent.spawn()?;
        s.agent.wait_log("slice.yaml")?;
        // What the first sync would have forgotten, it has when the second one is over.
        for _ in 0..2 {
            s.settle_packets()?;
        }
        ensure!(socket.ask_to(to)?.0 == "near");
        write(s, &s.far)?;
        wait_for("the flow is forgotten", SOON, || {
            ensure!(socket.ask_to(to)?.0 == "far");
            Ok(())
        })?;
        let deleted = s
            .agent
            .metric("proxy_agent_conntrack_flows_deleted_total", "")?;
        ensure!(deleted == 1.0, "{deleted} flows were forgotten");
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn one_socket_may_talk_to_several_services() {
    each_family("udp-several", |s| {
        for number in 1..=6 {
            let pod = if number % 2 == 0 { &s.near } else { &s.far };
            s.manifests.put(
                &s.service(&format!("s{number}"), number)
                    .endpoint(s.endpoint(pod)),
            )?;
        }
        s.settle()?;
        let socket = s.client.peer()?.open_udp_for((s.vip(1), UDP).into())?;
        for _ in 0..2 {
            for number in 1..=6 {
                let to = SocketAddr::from((s.vip(number), UDP));
                let (who, from) = socket.ask_to(to)?;
                ensure!(from == to, "an answer of {to} came from {from} ({who})");
            }
        }
        // One that is no Service is none of our business.
        let direct = SocketAddr::from((s.b.address(s.v6), 5353));
        s.b.peer()?.serve_udp(direct, "host")?;
        assert_eq!(socket.ask_to(direct)?, ("host".to_owned(), direct));
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_connected_socket_of_a_removed_endpoint_gets_an_error_at_once() {
    each_family("udp-dead", |s| {
        let dns = s.service("dns", 1);
        let to = SocketAddr::from((s.vip(1), UDP));
        s.apply(&dns.clone().endpoint(s.endpoint(&s.near)))?;
        let socket = s.client.peer()?.open_udp_for(to)?;
        socket.connect(to)?;
        assert_eq!(socket.ask()?, "near");

        let start = Instant::now();
        s.manifests.put(&dns.endpoint(s.endpoint(&s.far)))?;
        let error = socket.receive(Duration::from_secs(3)).unwrap_err();
        let elapsed = start.elapsed();
        ensure!(
            error.kind() != io::ErrorKind::WouldBlock,
            "no error within {elapsed:?}"
        );
        println!("{error} {elapsed:?} after the file was changed");
        // How fast that is, the torture tests measure, which run alone.
        ensure!(
            elapsed < Duration::from_secs(1),
            "{error} after {elapsed:?}"
        );

        let again = s.client.peer()?.open_udp_for(to)?;
        again.connect(to)?;
        assert_eq!(again.ask()?, "far");
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn other_connected_sockets_live_on() {
    each_family("udp-alive", |s| {
        let dns = s.service("dns", 1);
        let both = dns
            .clone()
            .endpoint(s.endpoint(&s.near))
            .endpoint(s.endpoint(&s.far));
        s.apply(&both)?;
        let to = SocketAddr::from((s.vip(1), UDP));
        let peer = s.client.peer()?;
        let mut sockets = Vec::new();
        for _ in 0..20 {
            let socket = peer.open_udp_for(to)?;
            socket.connect(to)?;
            let who = socket.ask()?;
            sockets.push((socket, who));
        }
        let direct = peer.open_udp_for(to)?;
        direct.connect((s.near.address(s.v6), 5353).into())?;
        s.apply(&dns.endpoint(s.endpoint(&s.far)))?;
        for (socket, who) in &sockets {
            let answer = socket.ask();
            match who.as_str() {
                "far" => assert_eq!(answer?, "far"),
                _ => ensure!(answer.is_err(), "a socket of {who} got {answer:?}"),
            }
        }
        // Connected past the Service: nobody's business.
        assert_eq!(direct.ask()?, "near");
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_draining_endpoint_keeps_its_sockets() {
    each_family("udp-draining", |s| {
        let dns = s.service("dns", 1);
        s.apply(&dns.clone().endpoint(s.endpoint(&s.near)))?;
        let to = SocketAddr::from((s.vip(1), UDP));
        let peer = s.client.peer()?;
        let (connected, unconnected) = (peer.open_udp_for(to)?, peer.open_udp_for(to)?);
        connected.connect(to)?;
        assert_eq!(unconnected.ask_to(to)?.0, "near");
        let draining = dns.endpoint(s.endpoint(&s.near).terminating());
        s.apply(&draining.endpoint(s.endpoint(&s.far)))?;
        assert_eq!(
            (connected.ask()?, unconnected.ask_to(to)?.0),
            ("near".into(), "near".into())
        );
        assert_eq!(peer.ask_udp(to)?, "far");
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_tcp_connection_leaves_udp_alone() {
    each_family("udp-only", |s| {
        let only_tcp = proxy_tests::Service::new("web", &[s.vip(1)])
            .port("http", "TCP", 80, 8080)
            .spec("externalIPs", serde_json::json!([s.outside(1)]))
            .endpoint(s.endpoint(&s.near));
        s.apply(&only_tcp)?;
        let peer = s.client.peer()?;
        assert_eq!(peer.ask_tcp((s.outside(1), 80).into())?, "near");
        passes(&peer, (s.outside(1), 53).into())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn an_answer_that_comes_during_a_cleanup_is_still_the_services() {
    each_family("udp-cleanup", |s| {
        let port = UDP_TARGET + 1;
        let server = s.near.peer()?.open_udp((s.unspecified(), port).into())?;
        let endpoint = s.endpoint(&s.near).at_port(port);
        s.apply(&s.service("dns", 1).endpoint(endpoint))?;
        s.agent.stop()?;
        let to = SocketAddr::from((s.vip(1), UDP));
        let client = s.client.peer()?.open_udp_for(to)?;
        client.send_to("?", to)?;
        let (_, from) = server.receive(PATIENCE)?;
        let connects = s.a.bpf_dir().join("links/connect4");
        ensure!(connects.exists(), "no hook at {}", connects.display());
        thread::scope(|scope| {
            let cleanup = scope.spawn(|| s.agent.text(&["cleanup"]));
            wait_for("nothing is translated any more", SOON, || {
                ensure!(!connects.exists(), "connect4 is still attached");
                Ok(())
            })?;
            server.send_to("late", from.context("no sender")?)?;
            let heard = client.receive(PATIENCE)?;
            ensure!(heard == ("late".to_owned(), Some(to)), "{heard:?}");
            cleanup.join().expect("no panic").map(drop)
        })?;
        ensure!(!s.a.bpf_dir().exists(), "the directory is still there");
        Ok(())
    });
}
