//! What is refused, dropped, passed on or answered, from a pod, the node and outside, in both modes.

mod world;

use std::net::IpAddr;

use anyhow::{Context, ensure};
use proxy_tests::{
    peer::PATIENCE,
    scenario::{OFTEN, SOON, TCP},
    wait_for,
};
use serde_json::json;

use world::{ALL, Client, EXTERNAL, Kind, Mode, ask, each, name};

#[test]
#[ignore = "needs root and eBPF"]
fn who_cannot_be_served_is_refused_or_dropped_as_kube_proxy_does_it() {
    each(|world| {
        let [near, far] = [&world.s.near, &world.s.far].map(|pod| world.s.endpoint(pod));
        let local = |number, policy: &str| {
            let service = world.service(number).spec(policy, "Local");
            service.endpoint(world.s.endpoint(&world.s.far))
        };
        world.apply(&[
            world.service(1),
            local(2, "internalTrafficPolicy"),
            local(3, "externalTrafficPolicy"),
            world.service(4).endpoint(near.clone()),
            world
                .service(5)
                .endpoints([near.clone().terminating(), far.clone().not_ready()]),
            world.service(6).endpoints([
                near.clone().for_zone("zone-a"),
                far.clone().for_zone("zone-b"),
            ]),
        ])?;
        for kind in [Kind::ClusterIp].into_iter().chain(EXTERNAL) {
            world.check("no endpoints", 1, [(Client::Pod, kind, "refused")])?;
            world.check("no endpoints", 1, [(Client::Outside, kind, "refused")])?;
            // Rejected in INPUT and FORWARD only, so what the node sends to no address of its own leaves it.
            let leaves = matches!(kind, Kind::LoadBalancer | Kind::ExternalIp);
            let of_node = match leaves {
                true => world.here("refused/passed", "passed"),
                false => "refused",
            };
            world.check("no endpoints", 1, [(Client::Node, kind, of_node)])?;
        }
        let on_loopback = (Client::Node, Kind::Loopback, "refused");
        world.check("no endpoints", 1, [on_loopback])?;
        let [alive, dropped, unknown] = [
            "far",
            world.here("refused/dropped", "dropped"),
            world.here("refused/passed", "passed"),
        ];
        world.check(
            "the path is alive",
            2,
            [(Client::Outside, Kind::NodePort, alive)],
        )?;
        world.check(
            "none here",
            2,
            [(Client::Outside, Kind::ClusterIp, "dropped")],
        )?;
        for client in [Client::Pod, Client::Node] {
            world.check("none here", 2, [(client, Kind::ClusterIp, dropped)])?;
            world.check("unknown port", 4, [(client, Kind::Unknown, unknown)])?;
        }
        for kind in EXTERNAL {
            let here = [Client::Pod, Client::Node];
            let served = here.map(|client| (client, kind, "far"));
            world.check("short circuit", 3, served)?;
            let outside = (Client::Outside, kind, "dropped");
            world.check("none here", 3, [outside])?;
        }
        for client in ALL {
            world.check("terminating", 5, [(client, Kind::NodePort, "near")])?;
            world.check("zone", 6, [(client, Kind::LoadBalancer, "near")])?;
        }
        // A pod that reaches itself: masqueraded, or else it would answer itself past the translation.
        let peer = world.s.near.peer()?;
        for _ in 0..OFTEN {
            let answer = peer.ask_tcp((world.s.vip(4), TCP).into())?;
            let (_, source) = answer.split_once(' ').context("no source")?;
            let is_own = source.parse::<IpAddr>()? == world.s.near.address(world.s.v6);
            ensure!(is_own == (world.mode == Mode::Ebpf), "hairpin: {answer}");
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn source_ranges_are_about_load_balancer_addresses_alone() {
    each(|world| {
        let ranges = |number, ranges: &[IpAddr]| {
            let length = if world.s.v6 { 128 } else { 32 };
            let ranges: Vec<_> = ranges.iter().map(|ip| format!(" {ip}/{length} ")).collect();
            let service = world
                .service(number)
                .endpoint(world.s.endpoint(&world.s.near));
            service.spec("loadBalancerSourceRanges", json!(ranges))
        };
        let v6 = world.s.v6;
        world.apply(&[
            ranges(1, &[world.outsider.address(v6)]),
            ranges(2, &[world.s.client.address(v6)]),
            ranges(3, &[world.s.a.address(v6)]),
        ])?;
        for (number, allowed) in [(1, Client::Outside), (2, Client::Pod), (3, Client::Node)] {
            for client in ALL {
                let balanced = if client == allowed { "near" } else { "dropped" };
                world.check("ranges", number, [(client, Kind::LoadBalancer, balanced)])?;
                for kind in [Kind::ClusterIp, Kind::NodePort, Kind::ExternalIp] {
                    world.check("not in question", number, [(client, kind, "near")])?;
                }
            }
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_node_that_has_the_load_balancers_address_may_send_from_it_if_the_node_may() {
    each(|world| {
        let v6 = world.s.v6;
        let length = if v6 { 128 } else { 32 };
        let of = |number, allowed: IpAddr| {
            let near = world.s.endpoint(&world.s.near);
            let service = world.service(number).endpoint(near);
            let range = format!("{allowed}/{length}");
            service.spec("loadBalancerSourceRanges", json!([range]))
        };
        world.apply(&[
            of(1, world.s.a.address(v6)),
            of(2, world.outsider.address(v6)),
        ])?;
        for (number, expected) in [(1, "near"), (2, "dropped")] {
            let (address, _) = world.address(number, Kind::LoadBalancer);
            world
                .s
                .a
                .ip(&format!("addr add {address}/{length} dev lo\n"))?;
            let own = (Client::Node, Kind::LoadBalancer, expected);
            world.check("sent from the address itself", number, [own])?;
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn more_clients_than_xt_recent_remembers_stay_with_their_endpoints() {
    each(|world| {
        let [near, far] = [&world.s.near, &world.s.far].map(|pod| world.s.endpoint(pod));
        let sticky = world.service(1).affinity(600);
        world.apply(&[sticky.clone().endpoints([near.clone(), far])])?;
        let clients = world.clients()?;
        let peer = world.outsider.peer()?;
        let (ip, [tcp, udp]) = world.address(1, Kind::LoadBalancer);
        let who = || -> anyhow::Result<Vec<[String; 2]>> {
            let each = clients.iter().map(|client| {
                let stream =
                    peer.connect_tcp_from((ip, tcp).into(), Some((*client, 0).into()), PATIENCE)?;
                let datagrams = peer.open_udp((*client, 0).into())?;
                datagrams.send_to("?", (ip, udp).into())?;
                Ok([stream.receive(PATIENCE)?, datagrams.receive(PATIENCE)?]
                    .map(|(answer, _)| name(&answer)))
            });
            each.collect()
        };
        let first = who()?;
        // Each port keeps its own choice: that all agree would happen once in 2^150 times.
        ensure!(first.iter().any(|[tcp, udp]| tcp != udp), "{first:?}");
        let again = who()?;
        ensure!(again == first, "{first:?} became {again:?}");
        let agent = &world.s.agent;
        let deleted = "proxy_agent_conntrack_flows_deleted_total";
        let before = agent.metric(deleted, "")?;
        world.apply(&[sticky.endpoint(near)])?;
        // A datagram from a port that was used before would go on with that flow.
        agent.wait_metric(deleted, "", |deleted| deleted > before)?;
        let left = who()?;
        ensure!(left.iter().flatten().all(|pod| pod == "near"), "{left:?}");
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn from_outside_connections_outlive_endpoints_and_datagrams_follow_them() {
    each(|world| {
        let [near, far] = [&world.s.near, &world.s.far].map(|pod| world.s.endpoint(pod));
        world.apply(&[world.service(1).endpoint(near)])?;
        let peer = world.outsider.peer()?;
        let mut open = Vec::new();
        for kind in EXTERNAL {
            let (ip, [tcp, udp]) = world.address(1, kind);
            let stream = peer.connect_tcp((ip, tcp).into())?;
            stream.receive(PATIENCE)?;
            let datagrams = peer.open_udp_for((ip, udp).into())?;
            datagrams.connect((ip, udp).into())?;
            ensure!(ask(&datagrams)? == "near");
            open.push((kind, stream, datagrams));
        }
        world.apply(&[world.service(1).endpoint(far)])?;
        for (kind, stream, datagrams) in &open {
            wait_for("datagrams follow", SOON, || {
                let who = ask(datagrams)?;
                ensure!(who == "far", "{who} by {kind:?}");
                Ok(())
            })?;
            ensure!(ask(stream)? == "near", "{kind:?}");
            world.check("new ones", 1, [(Client::Outside, *kind, "far")])?;
        }
        world.s.manifests.remove("web-1")?;
        world.s.settle_rules()?;
        for (kind, stream, _) in &open {
            let who = ask(stream).with_context(|| format!("{kind:?} without its Service"))?;
            ensure!(who == "near", "{who} by {kind:?}");
        }
        Ok(())
    });
}
