use super::*;
use crate::{
    abi::{MemberWord, kind},
    lb::tests::{Fake, addr, to},
};

const SECOND_NS: u64 = 1_000_000_000;
/// A tenth of a second before a choice is forgotten, and after it.
const KEPT_NS: u64 = IDLE_NS - SECOND_NS / 10;
const FORGOTTEN_NS: u64 = IDLE_NS + SECOND_NS / 10;
const HIT: Hit = Hit {
    service: 1,
    kind: kind::CLUSTER_IP,
};

fn udp(vip: &str, seconds: u64) -> Request {
    let request = to(vip, 53);
    Request {
        protocol: UDP,
        now_ns: request.now_ns + seconds * SECOND_NS,
        ..request
    }
}

fn backend(fake: &Fake, member: u32) -> Backend {
    let found = fake.members[&member];
    Backend {
        addr: found.addr,
        port: found.port,
        service: 1,
        member,
        generation: found.word.generation(),
    }
}

fn send(socket: &mut Socket, request: &Request, backend: &Backend) {
    let place = socket.place(request).expect("room");
    place.record(request, backend, peer_flags::USED);
}

fn kill(fake: &mut Fake, member: u32) {
    let word = &mut fake.members.get_mut(&member).unwrap().word;
    *word = MemberWord::new(word.generation() + 1, 0);
}

#[test]
fn a_choice_is_kept_until_it_is_idle_or_dead_or_its_frontend_moves() {
    let mut fake = Fake::of_members(1);
    let mut socket = Socket::default();
    send(&mut socket, &udp("10.96.0.1", 0), &backend(&fake, 0));
    let stands = |socket: &mut Socket, fake: &Fake, request: &Request, hit: Hit| {
        socket.choice(fake, request, hit).is_some()
    };
    assert!(stands(&mut socket, &fake, &udp("10.96.0.1", 120), HIT));
    assert!(!stands(&mut socket, &fake, &udp("10.96.0.1", 121), HIT));
    assert!(!stands(&mut socket, &fake, &udp("10.96.0.2", 0), HIT));
    let moved = Hit { service: 2, ..HIT };
    assert!(!stands(&mut socket, &fake, &udp("10.96.0.1", 0), moved));
    kill(&mut fake, 0);
    assert!(!stands(&mut socket, &fake, &udp("10.96.0.1", 0), HIT));
}

fn later(request: &Request, by_ns: u64) -> Request {
    Request {
        now_ns: request.now_ns + by_ns,
        ..*request
    }
}

#[test]
fn a_choice_is_forgotten_two_minutes_after_its_last_use() {
    assert_eq!((KEPT_NS, FORGOTTEN_NS), (119_900_000_000, 120_100_000_000));
    let fake = Fake::of_members(1);
    let mut socket = Socket::default();
    let mut request = udp("10.96.0.1", 0);
    send(&mut socket, &request, &backend(&fake, 0));
    // As often as it is used in time; each use counts from then on.
    for _ in 0..5 {
        assert_eq!(
            socket.choice(&fake, &later(&request, FORGOTTEN_NS), HIT),
            None
        );
        request = later(&request, KEPT_NS);
        let kept = socket.choice(&fake, &request, HIT);
        kept.expect("the choice is kept").last_used_ns = request.now_ns;
    }
}

#[test]
fn a_full_socket_forgets_as_its_choices_do() {
    let fake = Fake::of_members(1);
    let mut socket = Socket::default();
    let request = udp("10.96.0.1", 0);
    for vip in ["10.96.0.1", "10.96.0.2", "10.96.0.3", "10.96.0.4"] {
        send(&mut socket, &udp(vip, 0), &backend(&fake, 0));
    }
    let other = udp("10.96.0.5", 0);
    assert_eq!(socket.place(&later(&other, KEPT_NS)), None);
    assert!(socket.place(&later(&other, FORGOTTEN_NS)).is_some());
    let used = socket.choice(&fake, &later(&request, KEPT_NS), HIT);
    used.expect("the choice is kept").last_used_ns += KEPT_NS;
    let place = socket.place(&later(&other, FORGOTTEN_NS)).unwrap();
    assert_eq!(place.vip, addr("10.96.0.2"), "not the one that was used");
}

#[test]
fn replies_of_a_replaced_backend_still_show_the_vip() {
    let mut fake = Fake::of_members(2);
    let mut socket = Socket::default();
    let (old, new) = (backend(&fake, 0), backend(&fake, 1));
    send(&mut socket, &udp("10.96.0.1", 0), &old);
    kill(&mut fake, 0);
    send(&mut socket, &udp("10.96.0.1", 1), &new);
    for from in [old, new] {
        let peer = socket.sender(&from.addr, from.port).unwrap();
        assert_eq!(peer.vip, addr("10.96.0.1"));
    }
    let request = udp("10.96.0.1", 2);
    assert_eq!(socket.choice(&fake, &request, HIT).unwrap().member, 1);
}

#[test]
fn a_reply_belongs_to_the_frontend_that_was_used_last() {
    let fake = Fake::of_members(1);
    let mut socket = Socket::default();
    let only = backend(&fake, 0);
    send(&mut socket, &udp("10.96.0.1", 0), &only);
    send(&mut socket, &udp("10.96.0.2", 1), &only);
    let sender = |socket: &mut Socket| socket.sender(&only.addr, only.port).unwrap().vip;
    assert_eq!(sender(&mut socket), addr("10.96.0.2"));
    socket
        .choice(&fake, &udp("10.96.0.1", 2), HIT)
        .unwrap()
        .last_used_ns += 2 * SECOND_NS;
    assert_eq!(sender(&mut socket), addr("10.96.0.1"));
    assert_eq!(socket.sender(&only.addr, Be16::new(1)), None);
}

#[test]
fn a_full_socket_gives_up_idle_entries_and_its_own_old_choices_only() {
    let fake = Fake::of_members(5);
    let mut socket = Socket::default();
    for (seconds, vip) in ["10.96.0.1", "10.96.0.2", "10.96.0.3", "10.96.0.4"]
        .iter()
        .enumerate()
    {
        assert!(!socket.is_full());
        let member = u32::try_from(seconds).unwrap();
        let request = udp(vip, seconds as u64);
        send(&mut socket, &request, &backend(&fake, member));
    }
    assert!(socket.is_full());
    assert_eq!(socket.place(&udp("10.96.0.5", 4)), None);
    let own = socket.place(&udp("10.96.0.3", 4)).unwrap();
    assert_eq!(own.vip, addr("10.96.0.3"));
    let idle = socket.place(&udp("10.96.0.5", 122)).unwrap();
    assert_eq!(idle.vip, addr("10.96.0.1"));
}

#[test]
fn connecting_forgets_the_rest_and_is_not_overwritten_by_sending() {
    let fake = Fake::of_members(5);
    let mut socket = Socket::default();
    for (seconds, vip) in ["10.96.0.1", "10.96.0.2", "10.96.0.3", "10.96.0.4"]
        .iter()
        .enumerate()
    {
        send(&mut socket, &udp(vip, seconds as u64), &backend(&fake, 0));
    }
    let connected = backend(&fake, 4);
    socket.connect(&udp("10.96.0.9", 5), &connected);
    assert_eq!(socket.netns_cookie, udp("10.96.0.9", 5).netns_cookie);
    assert!(socket.peers[1..].iter().all(|peer| peer.flags == 0));
    let peer = *socket
        .connected_to(&connected.addr, connected.port)
        .unwrap();
    assert_eq!((peer.vip, peer.member), (addr("10.96.0.9"), 4));
    // A connected choice does not grow old: answers of another backend would be dropped.
    let much_later = udp("10.96.0.9", 9_999);
    assert!(socket.choice(&fake, &much_later, HIT).is_some());
    for vip in ["10.96.0.1", "10.96.0.2", "10.96.0.3"] {
        send(&mut socket, &udp(vip, 9_999), &backend(&fake, 0));
    }
    assert_eq!(socket.place(&udp("10.96.0.4", 9_999)), None);
    assert_eq!(socket.peers[0], peer);
}

#[test]
fn a_disconnected_socket_is_not_taken_for_connected() {
    let fake = Fake::of_members(2);
    let mut socket = Socket::default();
    let chosen = backend(&fake, 0);
    socket.connect(&udp("10.96.0.1", 0), &chosen);
    let unspecified = Addr::UNSPECIFIED_V4;
    assert_eq!(socket.connected_to(&unspecified, Be16(0)), None);
    assert_eq!(socket.connected_to(&chosen.addr, Be16::new(1)), None);
    let mut sent = Socket::default();
    send(&mut sent, &udp("10.96.0.1", 0), &chosen);
    assert_eq!(sent.connected_to(&chosen.addr, chosen.port), None);
}

#[test]
fn an_entry_is_its_owners_and_only_while_the_kernel_agrees() {
    let fake = Fake::of_members(2);
    let (chosen, other) = (backend(&fake, 0), backend(&fake, 1));
    let mut entry = Connection {
        owner: 7,
        ..Connection::default()
    };
    assert_eq!(entry.connected_to(7, &chosen.addr, chosen.port), None);
    entry.connect(&to("10.96.0.1", 80), &chosen);
    let peer = entry.connected_to(7, &chosen.addr, chosen.port);
    assert_eq!(peer.map(|peer| peer.vip), Some(addr("10.96.0.1")));
    assert_eq!(entry.connected_to(8, &chosen.addr, chosen.port), None);
    assert_eq!(entry.connected_to(7, &other.addr, other.port), None);
    assert_ne!(Connection::index(7), Connection::index(8));
    let same = 7 + u64::from(CONNECTION_ENTRIES);
    assert_eq!(Connection::index(7), Connection::index(same));
}

#[test]
fn a_member_that_is_another_endpoint_now_does_not_keep_a_choice() {
    let mut fake = Fake::of_members(1);
    let mut socket = Socket::default();
    send(&mut socket, &udp("10.96.0.1", 0), &backend(&fake, 0));
    let request = udp("10.96.0.1", 1);
    assert!(socket.choice(&fake, &request, HIT).is_some());
    fake.members.get_mut(&0).unwrap().addr = addr("10.244.0.77");
    assert!(socket.choice(&fake, &request, HIT).is_none());
    assert_eq!(socket.choice(&Fake::default(), &request, HIT), None);
}

#[test]
fn only_connected_datagram_sockets_of_gone_backends_are_dead() {
    let mut fake = Fake::of_members(1);
    let chosen = backend(&fake, 0);
    let (mut connected, mut sent, mut stream) =
        (Socket::default(), Socket::default(), Socket::default());
    connected.connect(&udp("10.96.0.1", 0), &chosen);
    send(&mut sent, &udp("10.96.0.1", 0), &chosen);
    stream.connect(&to("10.96.0.1", 80), &chosen);
    let dead = |fake: &Fake| [connected, sent, stream].map(|socket| socket.peers[0].is_dead(fake));
    assert_eq!(dead(&fake), [false; 3]);
    kill(&mut fake, 0);
    assert_eq!(dead(&fake), [true, false, false]);
}

#[test]
fn a_peer_is_led_to_its_member_by_service_address_and_port() {
    let mut fake = Fake::of_members(2);
    let chosen = backend(&fake, 0);
    let mut socket = Socket::default();
    let request = to("10.96.0.1", 80);
    send(&mut socket, &request, &chosen);
    let lost = socket.peers[0];
    // Indices were given anew: the endpoint is member 9, of whatever service has the frontend.
    let member = fake.members.remove(&0).unwrap();
    fake.members.insert(9, member);
    let binding = |key: &BindingKey| {
        let expected = (chosen.addr, chosen.port, 1);
        ((key.addr, key.port, key.service) == expected).then_some(Binding {
            member: 9,
            generation: chosen.generation,
        })
    };
    let mut peer = lost;
    peer.bind(&fake, |_| None);
    assert_eq!(peer, lost, "gone");
    peer.bind(&Fake::default(), binding);
    assert_eq!(peer, lost, "no frontend");
    peer.bind(&fake, binding);
    assert_eq!((peer.service, peer.member), (1, 9));
    assert!(peer.stands(&fake, &request, HIT));
    let bound = peer;
    peer.bind(&fake, |_| panic!("it is right already"));
    assert_eq!(peer, bound);
}
