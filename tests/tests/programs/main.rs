//! The kernel programs, by real system calls: what a client sees, and every counter after each step.

use std::{
    io::{self, ErrorKind},
    net::{SocketAddr, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    time::Duration,
};

use anyhow::Context;
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrStorage, connect,
        getpeername, socket,
    },
};
use proxy_ebpf::{
    abi::{Policy, Reason, TCP, UDP, frontend_flags, kind, meta_flags, node_address_flags},
    lb::Scope,
};
use proxy_tests::programs::{
    self, BACKENDS_V4, BACKENDS_V6, NODE, Programs, now_ns, with_programs,
};

mod connections;

const SERVICE: u32 = 3;
const VIPS: [&str; 2] = ["10.96.0.1", "fd00:10:96::1"];
const BACKENDS: [[&str; 4]; 2] = [BACKENDS_V4, BACKENDS_V6];
const WILDCARDS: [&str; 2] = ["0.0.0.0:0", "[::]:0"];

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().expect("an address"), port)
}

fn mapped(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) => SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()),
        SocketAddr::V6(_) => address,
    }
}

/// A datagram socket that gives up waiting after two seconds.
fn udp_socket(bound: &str) -> anyhow::Result<UdpSocket> {
    let socket = UdpSocket::bind(bound)?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    Ok(socket)
}

/// Servers at port 8080 of the first `count` backends, made where no hook sees them.
fn udp_servers(programs: &Programs, family: usize, count: usize) -> anyhow::Result<Vec<UdpSocket>> {
    programs.outside(|| {
        let addresses = BACKENDS[family][..count].iter();
        addresses
            .map(|address| udp_socket(&at(address, 8080).to_string()))
            .collect()
    })
}

/// The Service with the first `count` backends, at VIP:53/UDP, :80/TCP and :80/UDP.
fn serve(programs: &mut Programs, family: usize, count: usize) -> anyhow::Result<()> {
    set_backends(programs, family, 0..count);
    for (port, protocol) in [(53, UDP), (80, TCP), (80, UDP)] {
        programs.add_cluster_ip(SERVICE, at(VIPS[family], port), protocol)?;
    }
    Ok(())
}

fn set_backends(programs: &mut Programs, family: usize, range: std::ops::Range<usize>) {
    set_backends_with(programs, family, range, Policy::new(0, 0));
}

fn set_backends_with(
    programs: &mut Programs,
    family: usize,
    range: std::ops::Range<usize>,
    policy: Policy,
) {
    let backends: Vec<_> = range
        .map(|index| (index as u32 + 1, at(BACKENDS[family][index], 8080)))
        .collect();
    programs.set_backends(SERVICE, &backends, 0, policy);
}

/// Sends from `client`, answers from whichever server got it: that server, and whom the client thinks it heard.
fn ask(
    client: &UdpSocket,
    to: SocketAddr,
    servers: &[UdpSocket],
) -> anyhow::Result<(usize, SocketAddr)> {
    client.send_to(b"question", to)?;
    let (index, from) = receive(servers)?;
    servers[index].send_to(b"answer", from)?;
    Ok((index, client.recv_from(&mut [0; 16])?.1))
}

/// Whichever server has got a datagram, and from whom; delivery over `lo` is done when `send()` returns.
fn receive(servers: &[UdpSocket]) -> anyhow::Result<(usize, SocketAddr)> {
    for (index, server) in servers.iter().enumerate() {
        server.set_nonblocking(true)?;
        match server.recv_from(&mut [0; 16]) {
            Ok((_, from)) => return Ok((index, from)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
    anyhow::bail!("no server got it")
}

fn errno(error: &io::Error) -> Option<Errno> {
    error.raw_os_error().map(Errno::from_raw)
}

#[test]
#[ignore = "needs CAP_BPF"]
fn every_program_passes_the_verifier() -> anyhow::Result<()> {
    for (can_refuse, log) in [(true, false), (true, true), (false, false)] {
        let object = programs::object(can_refuse, log)?;
        let loaded = object.load(&programs::make_maps(&object)?)?;
        assert_eq!(loaded.left_out, [], "refuse {can_refuse}, log {log}");
        assert_eq!(loaded.programs.len(), 13);
    }
    Ok(())
}

#[test]
#[ignore = "needs CAP_BPF"]
fn connections_without_a_usable_endpoint_are_refused() -> anyhow::Result<()> {
    for family in [0, 1] {
        with_programs(|programs| {
            serve(programs, family, 0)?;
            let error = TcpStream::connect(at(VIPS[family], 80)).unwrap_err();
            assert_eq!(errno(&error), Some(Errno::ECONNREFUSED));
            assert_eq!(programs.counted()?, [(Reason::NoEndpoints, 1)]);
            assert_eq!(programs.stats(SERVICE).refused, 1);
            let error = TcpStream::connect(at(VIPS[family], 81)).unwrap_err();
            assert_eq!(errno(&error), Some(Errno::ECONNREFUSED));
            assert_eq!(programs.counted()?, [(Reason::UnknownPort, 1)]);

            let client = udp_socket(WILDCARDS[family])?;
            for (port, reason) in [(53, Reason::NoEndpoints), (54, Reason::UnknownPort)] {
                let error = client.send_to(b"?", at(VIPS[family], port)).unwrap_err();
                assert_eq!(errno(&error), Some(Errno::ECONNREFUSED));
                assert_eq!(programs.counted()?, [(reason, 1)]);
                client.connect(at(VIPS[family], port))?;
                assert_eq!(programs.counted()?, [(Reason::UdpConnectPassed, 1)]);
                assert_eq!(client.peer_addr()?, at(VIPS[family], port));
                assert_eq!(programs.counted()?, [(Reason::ReplyUntouched, 1)]);
            }
            assert_eq!(programs.stats(SERVICE).refused, 2);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
#[ignore = "needs CAP_BPF"]
fn replies_to_datagrams_show_the_vip_also_on_v6_sockets() -> anyhow::Result<()> {
    for (family, client, wants_mapped) in [(0, 0, false), (1, 1, false), (0, 1, true)] {
        with_programs(|programs| {
            serve(programs, family, 1)?;
            let servers = udp_servers(programs, family, 1)?;
            let client = udp_socket(WILDCARDS[client])?;
            let vip = at(VIPS[family], 53);
            let vip = if wants_mapped { mapped(vip) } else { vip };
            for _ in 0..3 {
                assert_eq!(ask(&client, vip, &servers)?, (0, vip));
                assert_eq!(
                    programs.counted()?,
                    [(Reason::Sent, 1), (Reason::ReplyTranslated, 1)]
                );
            }
            assert_eq!(programs.stats(SERVICE).datagrams, 3);

            let listed = programs.list_sockets()?;
            let mut peers = listed.iter().flat_map(|record| record.socket.peers);
            let peer = peers.next().expect("one socket");
            assert_eq!((peer.member, peer.service), (1, SERVICE));
            assert!(peers.all(|peer| peer.flags == 0));
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
#[ignore = "needs CAP_BPF"]
fn a_socket_keeps_its_backend_until_that_stops_serving() -> anyhow::Result<()> {
    with_programs(|programs| {
        serve(programs, 0, 2)?;
        let servers = udp_servers(programs, 0, 4)?;
        let client = udp_socket(WILDCARDS[0])?;
        let vip = at(VIPS[0], 53);
        let (mut current, _) = ask(&client, vip, &servers)?;
        for _ in 0..20 {
            assert_eq!(ask(&client, vip, &servers)?, (current, vip));
        }
        // In no set any more, but serving: draining. It stays.
        let others = [2, 3];
        set_backends(programs, 0, 2..4);
        assert_eq!(ask(&client, vip, &servers)?, (current, vip));
        for _ in 0..20 {
            // Asked, not yet answered, when it goes.
            client.send_to(b"question", vip)?;
            let (asked, from) = receive(&servers)?;
            assert_eq!(asked, current);
            programs.retire(current as u32 + 1);
            set_backends(programs, 0, 2..4);
            let (next, heard) = ask(&client, vip, &servers)?;
            assert!(others.contains(&next), "{next}");
            assert_eq!(heard, vip);
            servers[asked].send_to(b"late answer", from)?;
            assert_eq!(client.recv_from(&mut [0; 16])?.1, vip);
            current = next;
        }
        programs.counted()?;
        let idle = now_ns()?;
        assert_eq!(ask(&client, vip, &servers)?, (current, vip));
        assert!(programs.list_sockets()?.iter().any(|record| {
            record
                .socket
                .peers
                .iter()
                .any(|peer| peer.last_used_ns > idle)
        }));
        Ok(())
    })
}

#[test]
#[ignore = "needs CAP_BPF"]
fn a_choice_in_use_is_kept_and_an_idle_one_is_made_anew() -> anyhow::Result<()> {
    let (kept, forgotten) = (Duration::from_secs(119), Duration::from_millis(120_100));
    for family in [0, 1] {
        with_programs(|programs| {
            serve(programs, family, 1)?;
            let servers = udp_servers(programs, family, 2)?;
            let client = udp_socket(WILDCARDS[family])?;
            let vip = at(VIPS[family], 53);
            assert_eq!(ask(&client, vip, &servers)?, (0, vip));
            // The first one drains: it serves on whom it has, and a new choice is the second one.
            set_backends(programs, family, 1..2);
            for _ in 0..3 {
                programs.age(&client, kept)?;
                assert_eq!(ask(&client, vip, &servers)?, (0, vip));
            }
            programs.age(&client, forgotten)?;
            assert_eq!(ask(&client, vip, &servers)?, (1, vip));
            // An answer is a use too.
            set_backends(programs, family, 0..1);
            client.send_to(b"question", vip)?;
            let (index, from) = receive(&servers)?;
            programs.age(&client, forgotten)?;
            servers[index].send_to(b"late answer", from)?;
            assert_eq!(client.recv_from(&mut [0; 16])?.1, vip);
            assert_eq!(ask(&client, vip, &servers)?, (1, vip));
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
#[ignore = "needs CAP_BPF"]
fn more_vips_than_a_socket_holds_are_answered_by_their_own_names() -> anyhow::Result<()> {
    with_programs(|programs| {
        let servers = udp_servers(programs, 0, 4)?;
        let vips: Vec<_> = (1..=6).map(|n| at(&format!("10.96.1.{n}"), 53)).collect();
        for (index, vip) in vips.iter().enumerate() {
            let service = index as u32;
            let backend = at(BACKENDS_V4[index % 4], 8080);
            programs.set_backends(service, &[(service + 1, backend)], 0, Policy::new(0, 0));
            programs.add_cluster_ip(service, *vip, UDP)?;
        }
        let client = udp_socket(WILDCARDS[0])?;
        let plain = [(Reason::Sent, 1), (Reason::ReplyTranslated, 1)];
        for (index, vip) in vips.iter().enumerate() {
            assert_eq!(ask(&client, *vip, &servers)?, (index % 4, *vip));
            let counted = programs.counted()?;
            if index < 4 {
                assert_eq!(counted, plain);
            } else {
                let overflow = (Reason::PeerOverflow, 1);
                assert_eq!(counted, [plain[0], plain[1], overflow]);
            }
        }
        // Each backend of the first two now stands for two VIPs: a reply belongs to the one that was used last.
        for index in [0, 4, 0, 5, 1, 5, 4] {
            let vip = vips[index];
            assert_eq!(ask(&client, vip, &servers)?, (index % 4, vip));
            assert_eq!(programs.counted()?, plain, "found again");
        }
        Ok(())
    })
}

#[test]
#[ignore = "needs CAP_BPF"]
fn a_connected_datagram_socket_hears_the_vip_until_it_connects_elsewhere() -> anyhow::Result<()> {
    for (family, client, wants_mapped) in [(0, 0, false), (1, 1, false), (0, 1, true)] {
        with_programs(|programs| {
            serve(programs, family, 1)?;
            let servers = udp_servers(programs, family, 2)?;
            let client = udp_socket(WILDCARDS[client])?;
            let map = |address| {
                if wants_mapped {
                    mapped(address)
                } else {
                    address
                }
            };
            let vip = map(at(VIPS[family], 53));
            client.connect(vip)?;
            assert_eq!(programs.counted()?, [(Reason::Connected, 1)]);
            client.send(b"question")?;
            let (_, from) = receive(&servers)?;
            servers[0].send_to(b"answer", from)?;
            assert_eq!(client.recv_from(&mut [0; 16])?.1, vip);
            assert_eq!(client.peer_addr()?, vip);
            let mut expected = vec![
                (Reason::ReplyTranslated, 1),
                (Reason::PeerNameTranslated, 1),
            ];
            if wants_mapped {
                // The one send() of a connected socket that runs a hook: udpv6_sendmsg() names the peer to udp_sendmsg().
                expected.push((Reason::NotAService, 1));
            }
            assert_eq!(programs.counted()?, expected);
            // To the VIP by name, on the connected socket: anybody else's answer would not be let in.
            for _ in 0..8 {
                set_backends(programs, family, 0..2);
                assert_eq!(ask(&client, vip, &servers)?, (0, vip));
            }
            programs.counted()?;
            let elsewhere = map(at(BACKENDS[family][1], 8080));
            client.connect(elsewhere)?;
            assert_eq!(client.peer_addr()?, elsewhere);
            client.send(b"question")?;
            let (_, from) = receive(&servers)?;
            servers[1].send_to(b"answer", from)?;
            assert_eq!(client.recv_from(&mut [0; 16])?.1, elsewhere);
            let passed = if wants_mapped { 2 } else { 1 };
            assert_eq!(
                programs.counted()?,
                [(Reason::NotAService, passed), (Reason::ReplyUntouched, 2)]
            );
            assert_eq!(programs.list_sockets()?, []);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
#[ignore = "needs CAP_BPF"]
fn node_ports_are_served_at_the_nodes_addresses_and_on_the_hosts_loopback() -> anyhow::Result<()> {
    with_programs(|programs| {
        for family in [0, 1] {
            set_backends(programs, family, 0..1);
            let wildcard = ["0.0.0.0", "::"][family];
            programs.add_frontend(SERVICE, at(wildcard, 30080), UDP, kind::NODE_PORT, 0)?;
            programs.add_node_address(NODE[family], node_address_flags::NODE_PORTS)?;
            let servers = udp_servers(programs, family, 1)?;
            let client = udp_socket(WILDCARDS[family])?;
            let loopback = ["127.0.0.1", "::1"][family];
            for address in [NODE[family], loopback] {
                let node_port = at(address, 30080);
                assert_eq!(ask(&client, node_port, &servers)?, (0, node_port));
                assert_eq!(
                    programs.counted()?,
                    [(Reason::Sent, 1), (Reason::ReplyTranslated, 1)]
                );
                client.send_to(b"?", at(address, 9))?;
                assert_eq!(programs.counted()?, [(Reason::NotAService, 1)]);
            }
            // Bound to loopback: from there no backend can be reached.
            let bound = udp_socket(&at(loopback, 0).to_string())?;
            bound.send_to(b"?", at(loopback, 30080))?;
            bound.connect(at(loopback, 30080))?;
            assert_eq!(programs.counted()?, [(Reason::ForeignLoopback, 2)]);
        }
        // The same as a pod: its loopback is its own.
        programs.set_meta(|meta| meta.netns_cookie += 1);
        for (family, loopback) in [(0, "127.0.0.1"), (1, "::1"), (0, "0.0.0.0"), (1, "::")] {
            let client = udp_socket(WILDCARDS[family])?;
            client.send_to(b"?", at(loopback, 30080))?;
            client.connect(at(loopback, 30080))?;
            assert_eq!(programs.counted()?, [(Reason::ForeignLoopback, 2)]);
            let client = udp_socket(WILDCARDS[family])?;
            client.connect(at(NODE[family], 30080))?;
            assert_eq!(programs.counted()?, [(Reason::Connected, 1)]);
        }
        Ok(())
    })
}

/// Connects and sends: both are passed, for the same reason.
fn assert_passes(programs: &mut Programs, to: SocketAddr, reason: Reason) -> anyhow::Result<()> {
    let client = udp_socket(WILDCARDS[usize::from(to.is_ipv6())])?;
    client.send_to(b"?", to)?;
    client.connect(to)?;
    assert_eq!(programs.counted()?, [(reason, 2)], "{to}");
    assert_eq!(client.peer_addr()?, to);
    assert_eq!(programs.counted()?, [(Reason::ReplyUntouched, 1)]);
    Ok(())
}

#[test]
#[ignore = "needs CAP_BPF"]
fn an_excluded_cgroup_and_its_children_are_left_alone() -> anyhow::Result<()> {
    with_programs(|programs| {
        serve(programs, 0, 1)?;
        programs.opt_out(1 << 60)?;
        let client = udp_socket(WILDCARDS[0])?;
        client.connect(at(VIPS[0], 53))?;
        assert_eq!(
            programs.counted()?,
            [(Reason::Connected, 1)],
            "another cgroup"
        );
        programs.opt_out(programs.cgroup_id()?)?;
        assert_passes(programs, at(VIPS[0], 53), Reason::OptedOut)?;
        assert_passes(programs, at(VIPS[0], 54), Reason::OptedOut)?;
        programs.in_child(|programs| assert_passes(programs, at(VIPS[0], 53), Reason::OptedOut))?;
        assert_passes(programs, at("10.1.2.3", 53), Reason::NotAService)
    })
}

#[test]
#[ignore = "needs CAP_BPF"]
fn pods_are_left_alone_where_only_the_node_is_served() -> anyhow::Result<()> {
    with_programs(|programs| {
        serve(programs, 0, 1)?;
        programs.set_meta(|meta| meta.flags |= meta_flags::HOST_ONLY);
        udp_socket(WILDCARDS[0])?.connect(at(VIPS[0], 53))?;
        assert_eq!(
            programs.counted()?,
            [(Reason::Connected, 1)],
            "in the node's own network namespace"
        );
        programs.set_meta(|meta| meta.netns_cookie += 1);
        assert_passes(programs, at(VIPS[0], 53), Reason::PodSocket)?;
        assert_passes(programs, at("10.1.2.3", 53), Reason::NotAService)
    })
}

#[test]
#[ignore = "needs CAP_BPF"]
fn an_expired_lease_leaves_new_traffic_alone_and_still_undoes_old() -> anyhow::Result<()> {
    with_programs(|programs| {
        serve(programs, 0, 1)?;
        let servers = udp_servers(programs, 0, 1)?;
        let now = now_ns()?;
        let lease_ns = 3_600_000_000_000;
        programs.set_meta(|meta| (meta.lease_ns, meta.heartbeat_ns) = (lease_ns, now));
        let client = udp_socket(WILDCARDS[0])?;
        client.send_to(b"question", at(VIPS[0], 53))?;
        let connected = udp_socket(WILDCARDS[0])?;
        connected.connect(at(VIPS[0], 53))?;
        assert_eq!(
            programs.counted()?,
            [(Reason::Connected, 1), (Reason::Sent, 1)]
        );

        programs.set_meta(|meta| (meta.lease_ns, meta.heartbeat_ns) = (1, now));
        assert_passes(programs, at(VIPS[0], 53), Reason::LeaseExpired)?;
        let (_, from) = receive(&servers)?;
        servers[0].send_to(b"answer", from)?;
        assert_eq!(client.recv_from(&mut [0; 16])?.1, at(VIPS[0], 53));
        assert_eq!(connected.peer_addr()?, at(VIPS[0], 53));
        assert_eq!(
            programs.counted()?,
            [
                (Reason::ReplyTranslated, 1),
                (Reason::PeerNameTranslated, 1)
            ]
        );
        Ok(())
    })
}

#[test]
#[ignore = "needs CAP_BPF"]
fn what_others_serve_is_left_to_them() -> anyhow::Result<()> {
    with_programs(|programs| {
        set_backends(programs, 0, 0..1);
        let (ranges, local) = (at("203.0.113.1", 53), at("10.96.0.10", 53));
        let flag = frontend_flags::SOURCE_RANGES;
        programs.add_frontend(SERVICE, ranges, UDP, kind::LOAD_BALANCER, flag)?;
        let flag = frontend_flags::ON_LOCAL_LINK;
        programs.add_frontend(SERVICE, local, UDP, kind::CLUSTER_IP, flag)?;
        assert_passes(programs, ranges, Reason::SourceRanges)?;
        assert_passes(programs, local, Reason::OnLocalLink)?;
        // An address that is no ClusterIP may have ports of its own.
        assert_passes(programs, at("203.0.113.1", 22), Reason::NotAService)
    })
}

#[test]
#[ignore = "needs CAP_BPF"]
fn maps_that_contradict_themselves_leave_traffic_alone() -> anyhow::Result<()> {
    with_programs(|programs| {
        serve(programs, 0, 1)?;
        programs.contend(SERVICE, Scope::Cluster);
        assert_passes(programs, at(VIPS[0], 53), Reason::Contended)?;
        programs.add_cluster_ip(1_000_000, at("10.96.0.2", 53), UDP)?;
        assert_passes(programs, at("10.96.0.2", 53), Reason::BrokenMap)?;
        // An element that was given to another key meanwhile is looked up again.
        let recycled = at("203.0.113.1", 53);
        programs.add_frontend(SERVICE, recycled, UDP, kind::EXTERNAL_IP, 0)?;
        programs.corrupt_frontend(recycled, UDP)?;
        udp_socket(WILDCARDS[0])?.connect(recycled)?;
        assert_eq!(
            programs.counted()?,
            [(Reason::NotAService, 1), (Reason::Recycled, 1)]
        );
        Ok(())
    })
}

/// Where the last connect() went.
fn newest_member(programs: &Programs) -> anyhow::Result<u32> {
    let listed = programs.list_sockets()?;
    let peers = listed.iter().map(|record| record.socket.peers[0]);
    let newest = peers.max_by_key(|peer| peer.last_used_ns);
    Ok(newest.context("no socket is translated")?.member)
}

#[test]
#[ignore = "needs CAP_BPF"]
fn affinity_brings_a_namespace_back_to_its_backend() -> anyhow::Result<()> {
    with_programs(|programs| {
        serve(programs, 0, 0)?;
        set_backends_with(programs, 0, 0..4, Policy::new(0, 10_800));
        let member = |programs: &Programs| -> anyhow::Result<u32> {
            let client = udp_socket(WILDCARDS[0])?;
            client.connect(at(VIPS[0], 53))?;
            newest_member(programs)
        };
        let first = member(programs)?;
        assert_eq!(programs.counted()?, [(Reason::Connected, 1)]);
        for _ in 0..16 {
            assert_eq!(member(programs)?, first);
            assert_eq!(
                programs.counted()?,
                [(Reason::Connected, 1), (Reason::AffinityHit, 1)]
            );
        }
        programs.retire(first);
        let rest: Vec<usize> = (0..4).filter(|index| *index as u32 + 1 != first).collect();
        let backends: Vec<_> = rest
            .iter()
            .map(|index| (*index as u32 + 1, at(BACKENDS_V4[*index], 8080)))
            .collect();
        programs.set_backends(SERVICE, &backends, 0, Policy::new(0, 10_800));
        assert_ne!(member(programs)?, first);
        assert_eq!(programs.counted()?, [(Reason::Connected, 1)]);
        Ok(())
    })
}

#[test]
#[ignore = "needs CAP_BPF"]
fn internal_policy_local_uses_the_local_set() -> anyhow::Result<()> {
    with_programs(|programs| {
        serve(programs, 0, 0)?;
        let backends = [0, 1, 2].map(|index| (index + 1, at(BACKENDS_V4[index as usize], 8080)));
        let policy = Policy::new(Policy::INTERNAL_LOCAL, 0);
        programs.set_backends(SERVICE, &backends, 1, policy);
        let servers = udp_servers(programs, 0, 3)?;
        for _ in 0..16 {
            let client = udp_socket(WILDCARDS[0])?;
            assert_eq!(ask(&client, at(VIPS[0], 53), &servers)?.0, 0);
        }
        programs.set_backends(SERVICE, &backends, 0, policy);
        let client = udp_socket(WILDCARDS[0])?;
        let error = client.send_to(b"?", at(VIPS[0], 53)).unwrap_err();
        assert_eq!(errno(&error), Some(Errno::ECONNREFUSED));
        Ok(())
    })
}

#[test]
#[ignore = "needs CAP_BPF"]
fn every_backend_gets_its_share() -> anyhow::Result<()> {
    with_programs(|programs| {
        serve(programs, 0, 4)?;
        let mut chosen = [0_u32; 4];
        for _ in 0..2_000 {
            let client = UdpSocket::bind(WILDCARDS[0])?;
            client.connect(at(VIPS[0], 53))?;
            chosen[newest_member(programs)? as usize - 1] += 1;
        }
        assert_eq!(programs.stats(SERVICE).connections, 2_000);
        // Six standard deviations of a binomial with mean 500.
        assert!(
            chosen.iter().all(|count| count.abs_diff(500) < 117),
            "{chosen:?}"
        );
        Ok(())
    })
}

#[test]
#[ignore = "needs CAP_BPF"]
fn without_room_for_storage_a_socket_stays_untranslated() -> anyhow::Result<()> {
    with_programs(|programs| {
        serve(programs, 0, 1)?;
        std::fs::write("/proc/sys/net/core/optmem_max", "0")?;
        assert_passes(programs, at(VIPS[0], 53), Reason::NoStorage)
    })
}

#[test]
#[ignore = "needs CAP_BPF"]
fn other_protocols_are_not_looked_at() -> anyhow::Result<()> {
    with_programs(|programs| {
        serve(programs, 0, 1)?;
        std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0")?;
        let icmp = SockProtocol::Icmp;
        let ping = socket(
            AddressFamily::Inet,
            SockType::Datagram,
            SockFlag::empty(),
            icmp,
        )?;
        connect(ping.as_raw_fd(), &SockaddrIn::new(10, 96, 0, 1, 0))?;
        assert_eq!(programs.counted()?, [(Reason::OtherProtocol, 1)]);
        Ok(())
    })
}

#[test]
#[ignore = "needs CAP_BPF"]
fn a_connected_socket_of_a_dead_backend_is_destroyed() -> anyhow::Result<()> {
    for (family, client, wants_mapped) in [(0, 0, false), (1, 1, false), (0, 1, true)] {
        with_programs(|programs| {
            serve(programs, family, 1)?;
            let servers = udp_servers(programs, family, 2)?;
            let vip = at(VIPS[family], 53);
            let vip = if wants_mapped { mapped(vip) } else { vip };
            let [connected, sender, disconnected] = [(); 3].map(|()| udp_socket(WILDCARDS[client]));
            let (connected, sender, disconnected) = (connected?, sender?, disconnected?);
            connected.connect(vip)?;
            sender.send_to(b"question", vip)?;
            disconnected.connect(vip)?;
            disconnect(&disconnected)?;
            programs.kill_dead()?;
            connected.send(b"question")?;
            programs.counted()?;

            programs.retire(1);
            set_backends(programs, family, 1..2);
            programs.kill_dead()?;
            assert_eq!(programs.counted()?, [(Reason::SocketDestroyed, 1)]);

            let error = connected.recv(&mut [0; 16]).unwrap_err();
            assert_eq!(errno(&error), Some(Errno::ECONNABORTED));
            connected.connect(vip)?;
            connected.send(b"question")?;
            let (index, _) = receive(&servers[1..])?;
            assert_eq!(index, 0);
            assert_eq!(ask(&sender, vip, &servers[1..])?, (0, vip));
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
#[ignore = "needs CAP_BPF"]
fn sockets_are_led_to_their_members_when_indices_were_lost() -> anyhow::Result<()> {
    for (family, client, wants_mapped) in [(0, 0, false), (1, 1, false), (0, 1, true)] {
        with_programs(|programs| {
            serve(programs, family, 2)?;
            let servers = udp_servers(programs, family, 2)?;
            let vip = at(VIPS[family], 53);
            let vip = if wants_mapped { mapped(vip) } else { vip };
            let chosen = |programs: &mut Programs, wanted: usize| -> anyhow::Result<UdpSocket> {
                set_backends(programs, family, wanted..wanted + 1);
                let socket = udp_socket(WILDCARDS[client])?;
                socket.connect(vip)?;
                Ok(socket)
            };
            let (stays, goes) = (chosen(programs, 0)?, chosen(programs, 1)?);
            set_backends(programs, family, 0..1);
            let sender = udp_socket(WILDCARDS[client])?;
            assert_eq!(ask(&sender, vip, &servers)?, (0, vip));
            // A repair: another service, other members, and the second endpoint is gone.
            programs.set_meta(|meta| meta.flags |= meta_flags::UNBOUND);
            let backends: Vec<_> = [(7, 0), (8, 2), (9, 3)]
                .map(|(member, index)| (member, at(BACKENDS[family][index], 8080)))
                .into();
            programs.retire(1);
            programs.retire(2);
            programs.set_backends(SERVICE + 1, &backends, 0, Policy::new(0, 0));
            programs.add_cluster_ip(SERVICE + 1, at(VIPS[family], 53), UDP)?;
            programs.counted()?;
            programs.kill_dead()?;
            assert_eq!(
                programs.counted()?,
                [],
                "not while it is unknown who is dead"
            );

            programs.bind(&[7, 8, 9])?;
            programs.set_meta(|meta| meta.flags &= !meta_flags::UNBOUND);
            programs.kill_dead()?;
            assert_eq!(programs.counted()?, [(Reason::SocketDestroyed, 1)]);
            let error = goes.recv(&mut [0; 16]).unwrap_err();
            assert_eq!(errno(&error), Some(Errno::ECONNABORTED));
            assert_eq!(stays.peer_addr()?, vip);
            for _ in 0..8 {
                assert_eq!(ask(&sender, vip, &servers)?, (0, vip));
            }
            programs.counted()?;
            programs.retire(7);
            programs.kill_dead()?;
            assert_eq!(programs.counted()?, [(Reason::SocketDestroyed, 1)]);
            let error = stays.recv(&mut [0; 16]).unwrap_err();
            assert_eq!(errno(&error), Some(Errno::ECONNABORTED));
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
#[ignore = "needs CAP_BPF"]
fn a_disconnected_datagram_socket_survives_its_former_backend() -> anyhow::Result<()> {
    for (family, client, wants_mapped) in [(0, 0, false), (1, 1, false), (0, 1, true)] {
        with_programs(|programs| {
            serve(programs, family, 1)?;
            let servers = udp_servers(programs, family, 2)?;
            let map = |address| match wants_mapped {
                true => mapped(address),
                false => address,
            };
            let (vip, backend) = (
                map(at(VIPS[family], 53)),
                map(at(BACKENDS[family][0], 8080)),
            );
            let [connected, disconnected, elsewhere] =
                [(); 3].map(|()| udp_socket(WILDCARDS[client]));
            let (connected, disconnected, elsewhere) = (connected?, disconnected?, elsewhere?);
            for socket in [&connected, &disconnected, &elsewhere] {
                socket.connect(vip)?;
                assert_eq!(socket.peer_addr()?, vip);
            }
            disconnect(&disconnected)?;
            disconnect(&elsewhere)?;
            assert_eq!(
                programs.counted()?,
                [(Reason::Connected, 3), (Reason::PeerNameTranslated, 3)]
            );
            // What it is connected to now is no Service, though a Service led there before.
            elsewhere.connect(backend)?;
            assert_eq!(elsewhere.peer_addr()?, backend);
            assert_eq!(
                programs.counted()?,
                [(Reason::NotAService, 1), (Reason::ReplyUntouched, 1)]
            );
            assert_eq!(ask(&disconnected, vip, &servers)?, (0, vip));
            programs.counted()?;

            programs.retire(1);
            set_backends(programs, family, 1..2);
            programs.kill_dead()?;
            assert_eq!(programs.counted()?, [(Reason::SocketDestroyed, 1)]);
            let error = connected.recv(&mut [0; 16]).unwrap_err();
            assert_eq!(errno(&error), Some(Errno::ECONNABORTED));
            // By name, an IPv6 socket would not hear its new backend: the kernel (6.18) lets in its former peer only.
            disconnected.connect(vip)?;
            for (socket, server, peer) in [(&elsewhere, 0, backend), (&disconnected, 1, vip)] {
                assert_eq!(socket.peer_addr()?, peer);
                socket.send(b"question")?;
                let (index, from) = receive(&servers)?;
                servers[index].send_to(b"answer", from)?;
                let (_, heard) = socket.recv_from(&mut [0; 16])?;
                assert_eq!((index, heard), (server, peer));
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// `connect(AF_UNSPEC)`: the kernel does not know a peer afterwards.
fn disconnect(socket: &impl AsRawFd) -> anyhow::Result<()> {
    let mut unspecified = libc::sockaddr_in::from(SockaddrIn::new(0, 0, 0, 0, 0));
    unspecified.sin_family = libc::AF_UNSPEC as libc::sa_family_t;
    connect(socket.as_raw_fd(), &SockaddrIn::from(unspecified))?;
    let peer = getpeername::<SockaddrStorage>(socket.as_raw_fd());
    anyhow::ensure!(peer == Err(Errno::ENOTCONN), "{peer:?}");
    Ok(())
}
