extern crate std;

use core::cell::{Cell, RefCell};
use std::{collections::HashMap, vec, vec::Vec};

use super::*;
use crate::abi::SCTP;

const SECOND_NS: u64 = 1_000_000_000;
const NETNS: u64 = 77;

/// Maps in memory. `scripted_sets` are answers of [`Tables::set`] before the entry itself: a writer at work.
#[derive(Default)]
pub(crate) struct Fake {
    frontends: HashMap<FrontendKey, FrontendValue>,
    recycled: Cell<Option<FrontendValue>>,
    cluster_ips: Vec<Addr>,
    node_addresses: HashMap<Addr, u32>,
    services: HashMap<u32, (SetWord, SetWord, Policy)>,
    scripted_sets: RefCell<Vec<SetWord>>,
    slots: HashMap<u32, Slot>,
    pub(crate) members: HashMap<u32, Member>,
    affinity: RefCell<HashMap<AffinityKey, AffinityValue>>,
    notes: RefCell<Vec<Reason>>,
}

impl Tables for Fake {
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        self.recycled
            .take()
            .or_else(|| self.frontends.get(key).copied())
    }

    fn is_cluster_ip(&self, addr: &Addr) -> bool {
        self.cluster_ips.contains(addr)
    }

    fn node_address(&self, addr: &Addr) -> Option<u32> {
        self.node_addresses.get(addr).copied()
    }

    fn set(&self, service: u32, scope: Scope) -> Option<SetWord> {
        if let Some(word) = self.scripted_sets.borrow_mut().pop() {
            return Some(word);
        }
        let (cluster, local, _) = self.services.get(&service)?;
        Some(match scope {
            Scope::Cluster => *cluster,
            Scope::Local => *local,
        })
    }

    fn policy(&self, service: u32) -> Option<Policy> {
        self.services.get(&service).map(|(_, _, policy)| *policy)
    }

    fn slot(&self, index: u32) -> Option<Slot> {
        self.slots.get(&index).copied()
    }

    fn member(&self, index: u32) -> Option<Member> {
        self.members.get(&index).copied()
    }

    fn affinity(&self, key: &AffinityKey) -> Option<AffinityValue> {
        self.affinity.borrow().get(key).copied()
    }

    fn remember(&self, key: &AffinityKey, value: &AffinityValue) {
        self.affinity.borrow_mut().insert(*key, *value);
    }

    fn note(&self, reason: Reason) {
        self.notes.borrow_mut().push(reason);
    }
}

impl Fake {
    /// Service 1 at 10.96.0.1:80/TCP with members 0.. at `10.244.0.<member>`, those from `local_from` on also local.
    fn with_members(count: u32, local_from: u32) -> Self {
        let mut fake = Self::default();
        fake.serve("10.96.0.1", 80, kind::CLUSTER_IP, 0);
        fake.cluster_ips.push(addr("10.96.0.1"));
        for member in 0..count {
            fake.add_member(member, member >= local_from);
            fake.put_slot(100 + member, member, 5);
            fake.put_slot(200 + member, member, 6);
        }
        let cluster = SetWord::new(100, count, 5);
        let local = SetWord::new(200 + local_from, count - local_from, 6);
        fake.services.insert(1, (cluster, local, Policy::new(0, 0)));
        fake
    }

    fn serve(&mut self, at: &str, port: u16, kind: u8, flags: u8) {
        let key = FrontendKey::new(addr(at), Be16::new(port), TCP);
        let value = FrontendValue::new(&key, 1, kind, flags);
        self.frontends.insert(key, value);
    }

    fn add_member(&mut self, index: u32, is_local: bool) {
        let mut bits = MemberWord::SERVING | MemberWord::IN_CLUSTER;
        if is_local {
            bits |= MemberWord::IN_LOCAL | MemberWord::ON_THIS_NODE;
        }
        let member = Member {
            word: MemberWord::new(index + 1, bits),
            service: 1,
            port: Be16::new(8080),
            addr: addr(&std::format!("10.244.0.{index}")),
            ..Member::default()
        };
        self.members.insert(index, member);
    }

    fn put_slot(&mut self, index: u32, member: u32, generation: u32) {
        let found = self.members[&member];
        let slot = Slot {
            addr: found.addr,
            port: found.port,
            member,
            generation,
            member_generation: found.word.generation(),
            ..Slot::default()
        };
        self.slots.insert(index, slot);
    }

    fn set_policy(&mut self, policy: Policy) {
        self.services.get_mut(&1).unwrap().2 = policy;
    }

    fn decide(&self, request: &Request) -> Verdict {
        match find(self, request) {
            Ok(hit) => choose(self, hit, request),
            Err(verdict) => verdict,
        }
    }

    fn member_for(&self, request: &Request) -> u32 {
        match self.decide(request) {
            Verdict::Translate(backend) => backend.member,
            other => panic!("{other:?}"),
        }
    }
}

pub(crate) fn addr(text: &str) -> Addr {
    text.parse::<core::net::IpAddr>().unwrap().into()
}

pub(crate) fn to(at: &str, port: u16) -> Request {
    Request {
        addr: addr(at),
        port: Be16::new(port),
        protocol: TCP,
        on_host: false,
        from_loopback: false,
        netns_cookie: NETNS,
        now_ns: 1_000 * SECOND_NS,
        random: 0,
    }
}

/// xorshift32: the tests' random numbers are the same every time.
struct Xorshift(u32);

impl Xorshift {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        self.0
    }
}

#[test]
fn a_cluster_ip_leads_to_the_backend_that_the_random_number_names() {
    let fake = Fake::with_members(4, 4);
    let request = Request {
        random: 0x8000_0000,
        ..to("10.96.0.1", 80)
    };
    let backend = Backend {
        addr: addr("10.244.0.2"),
        port: Be16::new(8080),
        service: 1,
        member: 2,
        generation: 3,
    };
    assert_eq!(fake.decide(&request), Verdict::Translate(backend));
    assert_eq!(*fake.notes.borrow(), vec![]);
}

#[test]
fn the_largest_random_number_stays_within_the_set() {
    let fake = Fake::with_members(3, 3);
    let request = Request {
        random: u32::MAX,
        ..to("10.96.0.1", 80)
    };
    assert_eq!(fake.member_for(&request), 2);
}

#[test]
fn only_tcp_and_udp_are_looked_at() {
    let fake = Fake::with_members(1, 1);
    let request = Request {
        protocol: SCTP,
        ..to("10.96.0.1", 80)
    };
    assert_eq!(fake.decide(&request), Verdict::Pass(Reason::OtherProtocol));
}

#[test]
fn an_unknown_port_is_refused_at_a_cluster_ip_and_passed_elsewhere() {
    let mut fake = Fake::with_members(1, 1);
    assert_eq!(
        fake.decide(&to("10.96.0.1", 81)),
        Verdict::Refuse(Reason::UnknownPort)
    );
    // UDP of a TCP Service is an unknown port too.
    let udp = Request {
        protocol: UDP,
        ..to("10.96.0.1", 80)
    };
    assert_eq!(fake.decide(&udp), Verdict::Refuse(Reason::UnknownPort));
    fake.serve("203.0.113.9", 80, kind::EXTERNAL_IP, 0);
    assert_eq!(
        fake.decide(&to("203.0.113.9", 22)),
        Verdict::Pass(Reason::NotAService)
    );
}

#[test]
fn a_service_without_endpoints_is_refused() {
    let mut fake = Fake::with_members(1, 1);
    fake.services.get_mut(&1).unwrap().0 = SetWord::new(0, 0, 7);
    assert_eq!(
        fake.decide(&to("10.96.0.1", 80)),
        Verdict::Refuse(Reason::NoEndpoints)
    );
}

#[test]
fn a_node_port_is_served_at_the_nodes_own_addresses_only() {
    let mut fake = Fake::with_members(1, 1);
    fake.serve("0.0.0.0", 30080, kind::NODE_PORT, 0);
    fake.serve("::", 30080, kind::NODE_PORT, 0);
    fake.node_addresses = HashMap::from([
        (addr("192.168.0.2"), node_address_flags::NODE_PORTS),
        (addr("fd00::2"), node_address_flags::NODE_PORTS),
        (addr("192.168.1.2"), 0),
    ]);
    for at in ["192.168.0.2", "fd00::2"] {
        assert_eq!(fake.member_for(&to(at, 30080)), 0, "{at}");
        assert_eq!(
            fake.decide(&to(at, 22)),
            Verdict::Pass(Reason::NotAService),
            "{at}"
        );
    }
    for at in ["192.168.1.2", "192.168.0.3"] {
        assert_eq!(
            fake.decide(&to(at, 30080)),
            Verdict::Pass(Reason::NotAService),
            "{at}"
        );
    }
}

#[test]
fn loopback_node_ports_belong_to_the_hosts_namespace() {
    let mut fake = Fake::with_members(1, 1);
    fake.serve("0.0.0.0", 30080, kind::NODE_PORT, 0);
    fake.serve("::", 30080, kind::NODE_PORT, 0);
    // Connecting to the unspecified address means loopback (ip_route_output_key(), tcp_v6_connect()).
    for at in ["127.0.0.1", "127.8.8.8", "::1", "0.0.0.0", "::"] {
        let pod = to(at, 30080);
        let host = Request {
            on_host: true,
            ..pod
        };
        assert_eq!(fake.member_for(&host), 0, "{at}");
        assert_eq!(
            fake.decide(&pod),
            Verdict::Pass(Reason::ForeignLoopback),
            "{at}"
        );
        let other_port = Request {
            port: Be16::new(80),
            ..host
        };
        assert_eq!(
            fake.decide(&other_port),
            Verdict::Pass(Reason::NotAService),
            "{at}"
        );
    }
}

#[test]
fn a_socket_bound_to_loopback_is_left_alone() {
    let fake = Fake::with_members(1, 1);
    let request = Request {
        from_loopback: true,
        ..to("10.96.0.1", 80)
    };
    assert_eq!(
        fake.decide(&request),
        Verdict::Pass(Reason::ForeignLoopback)
    );
}

#[test]
fn flags_of_the_frontend_leave_it_to_others() {
    let mut fake = Fake::with_members(1, 1);
    let cases = [
        (frontend_flags::SOURCE_RANGES, Reason::SourceRanges),
        (frontend_flags::ON_LOCAL_LINK, Reason::OnLocalLink),
    ];
    for (flags, reason) in cases {
        fake.serve("10.96.0.1", 80, kind::CLUSTER_IP, flags);
        assert_eq!(fake.decide(&to("10.96.0.1", 80)), Verdict::Pass(reason));
    }
}

#[test]
fn internal_policy_local_uses_the_local_set_and_only_for_cluster_ips() {
    let mut fake = Fake::with_members(4, 3);
    fake.serve("203.0.113.9", 80, kind::LOAD_BALANCER, 0);
    fake.set_policy(Policy::new(Policy::INTERNAL_LOCAL, 0));
    assert_eq!(fake.member_for(&to("10.96.0.1", 80)), 3);
    assert_eq!(fake.member_for(&to("203.0.113.9", 80)), 0);
}

#[test]
fn external_policy_local_does_not_concern_the_nodes_own_sockets() {
    let mut fake = Fake::with_members(4, 3);
    fake.set_policy(Policy::new(Policy::EXTERNAL_LOCAL, 0));
    for (at, kind) in [
        ("203.0.113.9", kind::LOAD_BALANCER),
        ("203.0.113.10", kind::EXTERNAL_IP),
    ] {
        fake.serve(at, 80, kind, 0);
        assert_eq!(fake.member_for(&to(at, 80)), 0);
    }
}

#[test]
fn a_recycled_element_is_looked_up_again() {
    let mut fake = Fake::with_members(1, 1);
    let other = FrontendKey::new(addr("10.96.0.9"), Be16::new(1), TCP);
    let foreign = FrontendValue::new(&other, 9, kind::CLUSTER_IP, 0);
    fake.recycled.set(Some(foreign));
    assert_eq!(fake.member_for(&to("10.96.0.1", 80)), 0);
    assert_eq!(*fake.notes.borrow(), vec![Reason::Recycled]);
    // Gone by the second look: an unknown port of a ClusterIP, and nowhere else's backend.
    fake.frontends.clear();
    fake.recycled.set(Some(foreign));
    assert_eq!(
        fake.decide(&to("10.96.0.1", 80)),
        Verdict::Refuse(Reason::UnknownPort)
    );
}

#[test]
fn a_set_that_changed_meanwhile_is_read_again_up_to_four_times() {
    let fake = Fake::with_members(2, 2);
    let stale = SetWord::new(100, 2, 4);
    for attempts in 1..4 {
        *fake.scripted_sets.borrow_mut() = vec![stale; attempts];
        assert_eq!(fake.member_for(&to("10.96.0.1", 80)), 0, "{attempts}");
    }
    *fake.scripted_sets.borrow_mut() = vec![stale; 4];
    assert_eq!(
        fake.decide(&to("10.96.0.1", 80)),
        Verdict::Pass(Reason::Contended)
    );
}

#[test]
fn a_set_that_was_emptied_after_its_frontend_left_refuses_nobody() {
    let mut fake = Fake::with_members(2, 2);
    fake.services.insert(2, Default::default());
    let emptied = Hit {
        service: 2,
        kind: kind::CLUSTER_IP,
    };
    let request = to("10.96.0.1", 80);
    let verdict = choose(&fake, emptied, &request);
    assert!(matches!(verdict, Verdict::Translate(backend) if backend.service == 1));
    fake.frontends.clear();
    assert_eq!(
        choose(&fake, emptied, &request),
        Verdict::Refuse(Reason::UnknownPort)
    );
}

#[test]
fn missing_entries_leave_the_connection_untranslated() {
    let broken = Verdict::Pass(Reason::BrokenMap);
    let mut fake = Fake::with_members(1, 1);
    fake.slots.clear();
    assert_eq!(fake.decide(&to("10.96.0.1", 80)), broken);
    fake.services.clear();
    assert_eq!(fake.decide(&to("10.96.0.1", 80)), broken);
}

#[test]
fn affinity_keeps_a_client_until_it_has_been_away_too_long() {
    let mut fake = Fake::with_members(2, 2);
    fake.set_policy(Policy::new(0, 60));
    let first = to("10.96.0.1", 80);
    let later = |seconds: u64| Request {
        random: u32::MAX,
        now_ns: first.now_ns + seconds * SECOND_NS,
        ..first
    };
    assert_eq!(fake.member_for(&first), 0);
    assert_eq!(fake.member_for(&later(60)), 0);
    // Counted from the last connection, not from the first.
    assert_eq!(fake.member_for(&later(120)), 0);
    assert_eq!(*fake.notes.borrow(), vec![Reason::AffinityHit; 2]);
    assert_eq!(fake.member_for(&later(181)), 1);
    let stranger = Request {
        netns_cookie: 78,
        ..first
    };
    assert_eq!(fake.member_for(&stranger), 0);
}

#[test]
fn affinity_ends_with_its_member() {
    let changes: [fn(&mut Member); 3] = [
        |member| member.word = MemberWord::new(2, member.word.bits()),
        |member| member.word = MemberWord::new(1, MemberWord::SERVING),
        |member| member.service = 2,
    ];
    for change in changes {
        let mut fake = Fake::with_members(2, 2);
        fake.set_policy(Policy::new(0, 60));
        let first = to("10.96.0.1", 80);
        assert_eq!(fake.member_for(&first), 0);
        change(fake.members.get_mut(&0).unwrap());
        let again = Request {
            random: u32::MAX,
            ..first
        };
        assert_eq!(fake.member_for(&again), 1);
    }
}

#[test]
fn affinity_stays_within_the_set_that_the_frontend_uses() {
    let mut fake = Fake::with_members(2, 1);
    fake.serve("203.0.113.9", 80, kind::EXTERNAL_IP, 0);
    fake.set_policy(Policy::new(Policy::INTERNAL_LOCAL, 60));
    assert_eq!(fake.member_for(&to("203.0.113.9", 80)), 0);
    assert_eq!(fake.member_for(&to("10.96.0.1", 80)), 1);
}

#[test]
fn an_affinity_entry_of_another_key_is_not_believed() {
    let mut fake = Fake::with_members(2, 2);
    fake.set_policy(Policy::new(0, 60));
    let request = to("10.96.0.1", 80);
    assert_eq!(fake.member_for(&request), 0);
    for value in fake.affinity.borrow_mut().values_mut() {
        value.check ^= 1;
    }
    let again = Request {
        random: u32::MAX,
        ..request
    };
    assert_eq!(fake.member_for(&again), 1);
}

#[test]
fn backends_are_chosen_about_equally_often() {
    let fake = Fake::with_members(7, 7);
    let mut random = Xorshift(1);
    let mut chosen = [0_u32; 7];
    for _ in 0..70_000 {
        let request = Request {
            random: random.next(),
            ..to("10.96.0.1", 80)
        };
        chosen[fake.member_for(&request) as usize] += 1;
    }
    // Six standard deviations of a binomial with mean 10,000.
    assert!(
        chosen.iter().all(|count| count.abs_diff(10_000) < 560),
        "{chosen:?}"
    );
}

/// Whatever the maps hold, a translation names a member of the set that the policy prescribes.
#[test]
fn every_translation_leads_into_the_prescribed_set() {
    let mut random = Xorshift(7);
    for _ in 0..20_000 {
        let count = random.next() % 5;
        let local_from = random.next() % (count + 1);
        let mut fake = Fake::with_members(count, local_from);
        let is_local = random.next() < u32::MAX / 2;
        let seconds = random.next() % 2 * 60;
        let flags = if is_local { Policy::INTERNAL_LOCAL } else { 0 };
        fake.set_policy(Policy::new(flags, seconds));
        let mut request = to("10.96.0.1", 80);
        for _ in 0..3 {
            request.random = random.next();
            request.netns_cookie = u64::from(random.next() % 2);
            request.now_ns += u64::from(random.next() % 90) * SECOND_NS;
            let expected = if is_local { local_from } else { 0 }..count;
            match fake.decide(&request) {
                Verdict::Translate(backend) => {
                    assert!(expected.contains(&backend.member), "{backend:?}");
                    let member = fake.members[&backend.member];
                    assert_eq!((backend.addr, backend.port), (member.addr, member.port));
                    assert!(still_serves(&member, 1, backend.generation));
                }
                verdict => {
                    assert!(expected.is_empty());
                    assert_eq!(verdict, Verdict::Refuse(Reason::NoEndpoints));
                }
            }
        }
    }
}

#[test]
fn a_choice_stands_while_its_member_serves_or_drains() {
    let mut member = Fake::with_members(1, 1).members[&0];
    assert!(still_serves(&member, 1, 1));
    assert!(!still_serves(&member, 2, 1));
    assert!(!still_serves(&member, 1, 2));
    member.word = MemberWord::new(1, MemberWord::SERVING | MemberWord::TERMINATING);
    assert!(still_serves(&member, 1, 1));
    member.word = MemberWord::new(1, MemberWord::TERMINATING);
    assert!(!still_serves(&member, 1, 1));
}

impl Fake {
    /// A Service as [`Fake::with_members`] makes it, for the tests of what sockets remember.
    pub(crate) fn of_members(count: u32) -> Self {
        Self::with_members(count, count)
    }
}
