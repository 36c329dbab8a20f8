use std::{
    net::{SocketAddr, UdpSocket},
    process::{Command, Stdio},
    sync::Arc,
};

use super::{answers::Flow, table::creation::create, *};
use crate::{
    backends::{
        in_namespace::in_namespace,
        nfnetlink::{BUFFER_BYTES, Message, Requests, Socket},
    },
    state::{Backend, BackendState, Family, Frontend, FrontendKind, ServiceName, TrafficPolicy},
};

/// A UDP Service with a ClusterIP and a node port.
pub(super) fn udp_service(
    name: &str,
    cluster_ip: &str,
    node_port: u16,
    backends: &[&str],
) -> ServiceState {
    let vip: SocketAddr = cluster_ip.parse().unwrap();
    let family = Family::of(vip.ip());
    let frontend = |address, port, kind| Frontend {
        address,
        port,
        kind,
        on_local_link: false,
    };
    let backends = backends.iter().map(|backend| {
        let backend: SocketAddr = backend.parse().unwrap();
        Backend {
            address: backend.ip(),
            port: backend.port(),
            state: BackendState::default(),
        }
    });
    ServiceState {
        key: ServicePort {
            service: ServiceName::new("default", name),
            port: Arc::from(""),
            protocol: Protocol::Udp,
            family,
        },
        frontends: vec![
            frontend(vip.ip(), vip.port(), FrontendKind::ClusterIp),
            frontend(family.unspecified(), node_port, FrontendKind::NodePort),
        ],
        backends: backends.collect(),
        affinity_seconds: None,
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        source_ranges: Vec::new(),
        admits_node: false,
        health_check_port: None,
    }
}

fn run(command: &str) {
    let mut words = command.split_whitespace();
    let mut program = Command::new(words.next().unwrap());
    let status = program.args(words).stdout(Stdio::null()).status().unwrap();
    assert!(status.success(), "{command}");
}

/// Adds flows, 200 a datagram.
fn add(flows: &[(SocketAddr, Flow)]) {
    let socket = Socket::open(None).unwrap();
    socket.set_room(1 << 20).unwrap();
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut requests = Requests::default();
    for part in flows.chunks(200) {
        for (client, flow) in part {
            create(&mut requests, *client, flow);
        }
        socket.send(&requests).unwrap();
        requests.clear();
        while let Some(answers) = socket.try_receive(&mut buffer).unwrap() {
            for answer in answers {
                assert_eq!(answer, Message::Answer(0));
            }
        }
    }
}

/// A client with a number.
fn client(number: u32) -> SocketAddr {
    let [_, high, middle, low] = (number / 60_000).to_be_bytes();
    let port = 1024 + (number % 60_000) as u16;
    SocketAddr::new([10, high, middle, low].into(), port)
}

fn flows(count: u32, protocol: Protocol, to: &str, answered_by: &str) -> Vec<(SocketAddr, Flow)> {
    let flow = Flow {
        protocol,
        to: to.parse().unwrap(),
        answered_by: answered_by.parse().unwrap(),
        is_answered: false,
    };
    (0..count).map(|number| (client(number), flow)).collect()
}

#[test]
#[ignore = "needs root"]
fn stale_flows_are_deleted_and_nothing_else() {
    in_namespace(|| {
        let (vip, old, new) = ("10.96.0.10:53", "10.244.0.2:53", "10.244.0.3:53");
        let add = |count, to, by| add(&flows(count, Protocol::Udp, to, by));
        add(5_000, vip, old);
        add(3_000, "10.96.0.11:53", new);
        add(3_000, "8.8.8.8:53", "8.8.8.8:53");
        let service = udp_service("dns", vip, 30053, &[new]);
        let other = udp_service("other", "10.96.0.11:53", 30054, &[new]);
        let answers = Answers::of([&service, &other], []);
        let cleaned = clean(&answers).unwrap();
        let expected = Cleaned {
            seen: 11_000,
            deleted: ByFamily { v4: 5_000, v6: 0 },
            kept: 0,
        };
        assert_eq!(cleaned, expected);
        let expected = Cleaned {
            seen: 6_000,
            ..Cleaned::default()
        };
        assert_eq!(clean(&answers).unwrap(), expected);
        // The last endpoint goes.
        let service = udp_service("other", "10.96.0.11:53", 30054, &[]);
        let cleaned = clean(&Answers::of([&service], [])).unwrap();
        assert_eq!(cleaned.deleted.sum(), 3_000);
    });
}

#[test]
#[ignore = "needs root"]
fn connections_that_nobody_answers_and_nobody_translated_are_deleted_and_no_others() {
    in_namespace(|| {
        let (vip, backend) = ("10.96.0.10:80", "10.244.0.2:8080");
        let tcp = |count, by| flows(count, Protocol::Tcp, vip, by);
        let mut answered = tcp(3_000, vip);
        for (client, flow) in &mut answered {
            client.set_ip([11, 0, 0, 1].into());
            flow.is_answered = true;
        }
        let mut translated = tcp(2_000, backend);
        for (client, _) in &mut translated {
            client.set_ip([11, 0, 0, 2].into());
        }
        for flows in [tcp(5_000, vip), answered, translated] {
            add(&flows);
        }
        let mut service = udp_service("web", vip, 30080, &[backend]);
        service.key.protocol = Protocol::Tcp;
        let answers = Answers::of([&service], []);
        let cleaned = clean(&answers).unwrap();
        assert_eq!((cleaned.deleted.sum(), cleaned.kept), (5_000, 0));
        let left = clean(&answers).unwrap();
        assert_eq!(left.deleted.sum(), 0);
        // The kernel keeps the answered ones to itself since 5.19.
        assert!([2_000, 5_000].contains(&left.seen), "{left:?}");
    });
}

#[test]
fn connections_are_looked_at_when_their_frontends_get_rules() {
    let (sender, cleaned) = mpsc::channel();
    let mut cleaner = Cleaner {
        thread: sender,
        known: Changed::new(),
        waiting: Changed::new(),
    };
    let web = |backends: &[&str]| {
        let mut service = udp_service("web", "10.96.0.10:80", 30080, backends);
        service.key.protocol = Protocol::Tcp;
        service
    };
    let name = BTreeSet::from([ServiceName::new("default", "web")]);
    let mut is_looked_at = |scope, service: Option<ServiceState>| {
        let services = service.map(|service| (service.key.clone(), service));
        let state = DesiredState {
            services: services.into_iter().collect(),
            ..DesiredState::default()
        };
        cleaner.note(scope, &state);
        cleaner.clean();
        cleaned.try_recv().is_ok()
    };
    let (one, other) = (["10.244.0.2:8080"], ["10.244.0.3:8080"]);
    assert!(is_looked_at(None, Some(web(&one))), "first of all");
    assert!(!is_looked_at(Some(&name), Some(web(&other))), "an endpoint");
    let mut more = web(&other);
    more.frontends[1].port += 1;
    assert!(is_looked_at(Some(&name), Some(more.clone())), "a node port");
    assert!(is_looked_at(None, Some(more)), "rules were repaired");
    assert!(!is_looked_at(Some(&name), None), "the Service is gone");
    assert!(is_looked_at(Some(&name), Some(web(&one))), "it is back");
}

struct World {
    vip: SocketAddr,
    old: SocketAddr,
    new: SocketAddr,
    tool: &'static str,
}

fn worlds() -> [World; 2] {
    let world = |vip: &str, old: &str, new: &str, tool| World {
        vip: vip.parse().unwrap(),
        old: old.parse().unwrap(),
        new: new.parse().unwrap(),
        tool,
    };
    [
        world(
            "10.96.0.10:53",
            "10.1.1.1:5301",
            "10.1.1.1:5302",
            "iptables",
        ),
        world(
            "[fd00:96::a]:53",
            "[fd00:1::1]:5301",
            "[fd00:1::1]:5302",
            "ip6tables",
        ),
    ]
}

/// A server that answers its name, on a thread.
fn serve(address: SocketAddr, name: &'static str) {
    let socket = UdpSocket::bind(address).unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 16];
        while let Ok((_, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(name.as_bytes(), from);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn a_client_that_keeps_its_port_reaches_the_new_endpoint() {
    in_namespace(|| {
        for command in [
            "ip link set lo up",
            "ip addr add 10.1.1.1/32 dev lo",
            "ip addr add fd00:1::1/128 dev lo nodad",
            "ip route add default dev lo",
            "ip -6 route add default dev lo",
        ] {
            run(command);
        }
        let (sender, cleaned) = mpsc::channel();
        let mut cleaner = Cleaner::start(move |cleaned, _| sender.send(cleaned).unwrap()).unwrap();
        for World {
            vip,
            old,
            new,
            tool,
        } in worlds()
        {
            serve(old, "old");
            serve(new, "new");
            let rule = |verb: &str, to: SocketAddr| {
                let (vip, port) = (vip.ip(), vip.port());
                run(&format!(
                    "{tool} -w -t nat {verb} OUTPUT -p udp -d {vip} --dport {port} -j DNAT --to-destination {to}"
                ));
            };
            rule("-A", old);
            let client = UdpSocket::bind((old.ip(), 0)).unwrap();
            client
                .set_read_timeout(Some(Duration::from_secs(5)))
                .unwrap();
            let ask = || {
                let mut answer = [0; 16];
                client.send_to(b"?", vip).unwrap();
                let (read, from) = client.recv_from(&mut answer).unwrap();
                assert_eq!(from, vip);
                String::from_utf8_lossy(&answer[..read]).into_owned()
            };
            assert_eq!(ask(), "old");
            rule("-D", old);
            rule("-A", new);
            assert_eq!(ask(), "old", "the kernel goes on as it began");
            let service = udp_service("dns", &vip.to_string(), 30053, &[&new.to_string()]);
            let name = BTreeSet::from([service.key.service.clone()]);
            let state = DesiredState {
                services: [(service.key.clone(), service)].into(),
                ..DesiredState::default()
            };
            let mut deleted = |state| {
                cleaner.note(Some(&name), state);
                cleaner.clean();
                let cleaned = cleaned.recv_timeout(Duration::from_secs(10)).unwrap();
                cleaned.unwrap().deleted.sum()
            };
            assert_eq!(deleted(&state), 1);
            assert_eq!(ask(), "new");
            assert_eq!(deleted(&DesiredState::default()), 1, "the Service is gone");
        }
    });
}

#[test]
#[ignore = "needs root"]
fn without_udp_services_the_kernel_is_not_asked() {
    in_namespace(|| {
        assert_eq!(clean(&Answers::default()).unwrap(), Cleaned::default());
    });
}
