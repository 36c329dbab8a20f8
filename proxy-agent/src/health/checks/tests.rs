use std::{
    io::{Read, Write},
    net::{Ipv4Addr, Ipv6Addr, TcpStream},
    sync::Arc,
    time::Duration,
};

use tokio::sync::mpsc;

use super::*;
use crate::{
    events::Letter,
    health::{SelfTest, Watched},
    sync::{Inbox, SyncStatus},
};

const PATIENCE: Duration = Duration::from_secs(10);

/// Servers at work on loopback, and what they are told.
struct World {
    checks: watch::Sender<Checks>,
    layer: watch::Sender<SyncStatus>,
    failed: Gauge,
    told: mpsc::Receiver<Letter>,
}

impl World {
    fn start(services: &[(&str, u16, usize)]) -> Self {
        let checks = Checks {
            services: of(services),
            addresses: [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()].into(),
        };
        let layer = watch::Sender::new(SyncStatus {
            is_synced: true,
            ..SyncStatus::default()
        });
        let long_ago = Instant::now().checked_sub(PATIENCE * 60).unwrap();
        let health = health(&layer, long_ago);
        let checks = watch::Sender::new(checks);
        let failed = Gauge::default();
        let (events, told) = Events::channel();
        tokio::spawn(serve(checks.subscribe(), health, failed.clone(), events));
        Self {
            checks,
            layer,
            failed,
            told,
        }
    }

    fn set(&self, services: &[(&str, u16, usize)]) {
        let services = of(services);
        self.checks.send_modify(|checks| checks.services = services);
    }
}

fn health(layer: &watch::Sender<SyncStatus>, started: Instant) -> Health {
    Health {
        layers: vec![Watched {
            status: layer.subscribe(),
            inbox: Arc::new(Inbox::new(Gauge::default())),
        }],
        self_test: watch::channel(SelfTest::Passed).1,
        trouble: watch::channel(None).1,
        eligible: watch::channel(None).1,
        needs_no_node: true,
        patience: Duration::from_secs(60),
        started,
    }
}

/// "namespace/name", port, endpoints in both families.
fn of(services: &[(&str, u16, usize)]) -> BTreeMap<ServiceName, HealthCheck> {
    let check = |(name, port, endpoints): &(&str, u16, usize)| {
        let (namespace, name) = name.split_once('/').unwrap();
        let check = HealthCheck {
            port: *port,
            endpoints: vec![(Family::V4, *endpoints), (Family::V6, *endpoints)],
        };
        (ServiceName::new(namespace, name), check)
    };
    services.iter().map(check).collect()
}

/// A port that nobody listens at, in neither family.
fn free_port() -> u16 {
    loop {
        let probe = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = probe.local_addr().unwrap().port();
        if std::net::TcpListener::bind((Ipv6Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

/// The whole answer, or none when nobody listens, or no longer.
async fn ask(ip: IpAddr, port: u16) -> Option<String> {
    let ask = move || {
        let mut stream = TcpStream::connect((ip, port)).ok()?;
        stream
            .write_all(b"GET /any/path HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            .ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    };
    tokio::task::spawn_blocking(ask).await.unwrap()
}

/// Asks until the answer is as wanted.
async fn wait(ip: IpAddr, port: u16, wanted: impl Fn(Option<&str>) -> bool) -> Option<String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = ask(ip, port).await;
        if wanted(answer.as_deref()) {
            return answer;
        }
        assert!(Instant::now() < deadline, "{ip}:{port}: {answer:?}");
        sleep(Duration::from_millis(5)).await;
    }
}

fn is(status: &'static str) -> impl Fn(Option<&str>) -> bool {
    move |answer| answer.is_some_and(|answer| answer.starts_with(&format!("HTTP/1.1 {status}")))
}

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

#[tokio::test]
async fn both_families_are_told_what_kube_proxy_would_say() {
    let port = free_port();
    let world = World::start(&[("default/web", port, 2)]);
    for ip in [V4, V6] {
        let answer = wait(ip, port, is("200")).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert_eq!(
            body,
            "{\n\t\"service\": {\n\t\t\"namespace\": \"default\",\n\t\t\"name\": \"web\"\n\t},\n\t\"localEndpoints\": 2,\n\t\"serviceProxyHealthy\": true\n}"
        );
        for header in [
            "content-type: application/json",
            "x-content-type-options: nosniff",
            "x-load-balancing-endpoint-weight: 2",
        ] {
            assert!(head.lines().any(|line| line == header), "{head}");
        }
    }
    // Nobody is woken for it.
    world.checks.send_if_modified(|checks| {
        checks.services = of(&[("default/web", port, 0)]);
        false
    });
    let answer = ask(V4, port).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert!(answer.contains("\"localEndpoints\": 0"), "{answer}");
}

#[tokio::test]
async fn a_proxy_that_is_stuck_sends_load_balancers_away() {
    let port = free_port();
    let world = World::start(&[("default/web", port, 1)]);
    wait(V4, port, is("200")).await;
    world
        .layer
        .send_modify(|status| status.last_error = Some("no memory".to_owned()));
    let answer = wait(V4, port, is("503")).await.unwrap();
    assert!(
        answer.contains("\"serviceProxyHealthy\": false"),
        "{answer}"
    );
    assert!(answer.contains("\"localEndpoints\": 1"), "{answer}");
}

#[tokio::test]
async fn servers_move_with_their_port_and_end_with_their_service() {
    let (first, second) = (free_port(), free_port());
    let world = World::start(&[("default/a", first, 1)]);
    wait(V6, first, is("200")).await;
    world.set(&[("default/a", second, 1)]);
    wait(V6, second, is("200")).await;
    assert_eq!(ask(V6, first).await, None);
    // Another Service may have the port at once.
    world.set(&[("default/b", second, 0)]);
    let answer = wait(V6, second, is("503")).await.unwrap();
    assert!(answer.contains("\"name\": \"b\""), "{answer}");
    world.set(&[]);
    wait(V6, second, |answer| answer.is_none()).await;
    assert_eq!(world.failed.get(), 0);
}

#[tokio::test]
async fn a_taken_port_is_counted_and_told_and_the_others_go_on() {
    let (taken, free) = (free_port(), free_port());
    let other = std::net::TcpListener::bind((V4, taken)).unwrap();
    let mut world = World::start(&[
        ("default/a", taken, 1),
        ("default/b", free, 1),
        ("default/c", free, 0),
    ]);
    wait(V4, free, is("200")).await;
    // Of two that want one port, the first by name has it.
    assert_eq!(world.failed.get(), 2);
    let mut told = Vec::new();
    while let Ok((Event::NoHealthCheck { service, .. }, None)) = world.told.try_recv() {
        told.push(service.to_string());
    }
    assert_eq!(told, ["default/a", "default/c"]);
    drop(other);
    world.set(&[("default/a", taken, 1), ("default/b", free, 1)]);
    wait(V4, taken, is("200")).await;
    assert_eq!(world.failed.get(), 0);
}

#[tokio::test]
async fn an_address_that_is_gone_is_no_error_and_the_others_are_asked() {
    let port = free_port();
    let world = World::start(&[]);
    world.checks.send_modify(|checks| {
        checks.services = of(&[("default/web", port, 1)]);
        checks.addresses = ["198.51.100.1".parse().unwrap(), V6].into();
    });
    wait(V6, port, is("200")).await;
    assert_eq!((ask(V4, port).await, world.failed.get()), (None, 0));
}

#[tokio::test]
async fn nobody_is_answered_before_the_layers_serve() {
    let port = free_port();
    let layer = watch::Sender::new(SyncStatus::default());
    let health = health(&layer, Instant::now());
    let checks = Checks {
        services: of(&[("default/web", port, 1)]),
        addresses: [V4].into(),
    };
    let (_kept, checks) = watch::channel(checks);
    tokio::spawn(serve(checks, health, Gauge::default(), Events::default()));
    tokio::task::yield_now().await;
    assert_eq!(ask(V4, port).await, None);
    layer.send_modify(|status| status.is_synced = true);
    wait(V4, port, is("200")).await;
}
