//! What clients ask of a world, and what comes back.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::{Context, bail};

use super::{
    World,
    claims::{is_disputed, is_owner, owner},
    plan::{PORT, Plan, TRANSPORTS},
    unallocated,
};
use crate::{
    Pod, Scenario,
    flows::{Client, Target},
    peer::{Heard, Question, Transport},
    scenario::SOURCES,
};

/// Endpoints that serve answer one after the other by chance: of three each, except once in ten million times.
const OFTEN: usize = 45;
/// At which no Service listens.
const WRONG_PORT: u16 = 999;

/// One question.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Who asks.
    pub client: Client,
    /// The addresses of who asks.
    pub own: Vec<IpAddr>,
    /// Of which Service.
    pub service: String,
    /// What it is asked at; none: what no Service has at the moment.
    pub target: Option<Target>,
    /// Where.
    pub to: SocketAddr,
    /// How.
    pub transport: Transport,
    /// The Service is served there.
    pub is_frontend: bool,
    /// Load balancer's source ranges apply.
    pub has_ranges: bool,
    /// The pods of which one is to answer all the time.
    pub sticks_to_one_of: Option<BTreeSet<String>>,
    /// Where the same Service is asked at an address that nobody else claims, if others claim this one.
    pub owns_alone: Option<SocketAddr>,
    /// It is the Service's ClusterIP, and others are served there, too.
    pub is_disputed: bool,
}

/// What comes back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// These answer.
    Served {
        /// Their names; of a Service with affinity, that it is always the same.
        by: BTreeSet<String>,
        /// The addresses that they see as the client's.
        sees: BTreeSet<IpAddr>,
    },
    /// ECONNREFUSED.
    Refused,
    /// Nothing, or that there is no way.
    Silent,
    /// Something at first, and then an error: right for nobody.
    Unsteady(String),
}

/// Every question with its answer, by how it reads.
pub type Answers = BTreeMap<String, (Asked, Answer)>;

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            client,
            service,
            target,
            to,
            transport,
            ..
        } = self;
        let target = target.map_or("nobody".to_owned(), |target| format!("{target:?}"));
        write!(
            f,
            "{service}: {client:?} to {target} {to}/{}",
            transport.name()
        )
    }
}

impl Asked {
    /// Whether somebody answers there if no proxy prevents it, as [`super::serve_unallocated`] has it.
    pub fn is_served_elsewhere(&self) -> bool {
        self.to.ip() == unallocated::address(self.to.is_ipv6())
    }

    fn question(&self) -> Question {
        let Self {
            service,
            to,
            transport,
            ..
        } = self;
        // Who is remembered by one answer decides the next.
        let is_sticky = self.sticks_to_one_of.is_some();
        Question {
            to: *to,
            transport: *transport,
            group: is_sticky.then(|| format!("{service} {} {}", transport.name(), to.is_ipv6())),
        }
    }
}

/// Everything that these Services can be asked, by one client, and what is nobody's.
fn questions(moment: &Moment, client: Client, s: &Scenario, outsider: &Pod) -> Vec<Asked> {
    let Moment { plans, left } = moment;
    let own = [false, true]
        .map(|v6| own_addresses(client, v6, s, outsider))
        .concat();
    plans
        .iter()
        .flat_map(|plan| of_one(plan, plans, client, &own, s))
        .chain(of_nobody(left, client, &own))
        .collect()
}

/// At addresses of the ServiceCIDRs that no Service ever has, and at what Services had or will have.
fn of_nobody(
    left: &BTreeSet<(SocketAddr, Transport)>,
    client: Client,
    own: &[IpAddr],
) -> impl Iterator<Item = Asked> {
    let never = [false, true].map(|v6| {
        let to = (unallocated::address(v6), SOURCES).into();
        TRANSPORTS.map(|transport| (to, transport))
    });
    let all = never.concat().into_iter().chain(left.iter().copied());
    all.map(move |(to, transport)| Asked {
        client,
        own: own.to_vec(),
        service: "none".to_owned(),
        target: None,
        to,
        transport,
        is_frontend: false,
        has_ranges: false,
        sticks_to_one_of: None,
        owns_alone: None,
        is_disputed: false,
    })
}

fn of_one(plan: &Plan, plans: &[Plan], client: Client, own: &[IpAddr], s: &Scenario) -> Vec<Asked> {
    let candidates = plan.candidates(s).into_iter().map(str::to_owned);
    let candidates: BTreeSet<String> = candidates.collect();
    let mut found = Vec::new();
    for &v6 in plan.families {
        for transport in TRANSPORTS {
            let is_served = plan.transports.contains(&transport);
            let mut ask = |target, address: IpAddr, port: u16, is_frontend| {
                let is_sticky = plan.is_sticky && is_frontend && !candidates.is_empty();
                found.push(Asked {
                    client,
                    own: own.to_vec(),
                    service: plan.name(),
                    target: Some(target),
                    to: (address, port).into(),
                    transport,
                    is_frontend,
                    has_ranges: plan.ranges.is_some() && target == Target::LoadBalancer,
                    sticks_to_one_of: is_sticky.then(|| candidates.clone()),
                    owns_alone: None,
                    is_disputed: target == Target::ClusterIp
                        && is_frontend
                        && is_disputed(plan, plans, v6, transport),
                });
            };
            let is_own = |mode| mode == Some("VIP");
            // What only another serves there, that one is asked for.
            if is_served || !is_disputed(plan, plans, v6, transport) {
                ask(Target::ClusterIp, plan.vip(v6), PORT, is_served);
            }
            ask(Target::ClusterIp, plan.vip(v6), WRONG_PORT, false);
            if plan.has_node_ports {
                let port = plan.node_port(transport);
                ask(Target::NodePort, s.a.address(v6), port, is_served);
                // What becomes of SCTP there is in the flow matrix.
                if client == Client::Node && transport != Transport::Sctp {
                    ask(Target::LocalhostNodePort, loopback(v6), port, is_served);
                }
            }
            let node = plan.claims_node.then(|| s.a.address(v6));
            for address in [plan.external(v6), node].into_iter().flatten() {
                ask(Target::ExternalIp, address, PORT, is_served);
                ask(Target::ExternalIp, address, WRONG_PORT, false);
            }
            if let Some(address) = plan.balancer(v6) {
                let is_frontend = is_served && is_own(plan.balancer);
                ask(Target::LoadBalancer, address, PORT, is_frontend);
                ask(Target::LoadBalancer, address, WRONG_PORT, false);
            }
            if let Some((target, address, is_frontend)) = plan.claimed(v6) {
                let is_frontend = is_frontend && is_served;
                match owner(address, plans) {
                    Some(owner) if !is_frontend || owner.transports.contains(&transport) => {}
                    Some(_) => ask(target, address, PORT, true),
                    None => {
                        ask(target, address, PORT, is_frontend);
                        ask(target, address, WRONG_PORT, false);
                    }
                }
            }
            if let Some(shared) = plan.shared(v6)
                && is_served
                && is_owner(plan, plans, v6, transport)
            {
                ask(Target::ExternalIp, shared, PORT, true);
                let own = plan.external(v6).map(|own| (own, PORT).into());
                if let Some(last) = found.last_mut() {
                    last.owns_alone = own;
                }
            }
        }
    }
    found
}

fn loopback(v6: bool) -> IpAddr {
    match v6 {
        false => Ipv4Addr::LOCALHOST.into(),
        true => Ipv6Addr::LOCALHOST.into(),
    }
}

/// What there is to ask at one moment.
struct Moment {
    /// The oldest first.
    plans: Vec<Plan>,
    /// What Services have at other moments, and nobody has at this one.
    left: BTreeSet<(SocketAddr, Transport)>,
}

impl Moment {
    fn new(world: &World, moment: usize, s: &Scenario) -> Self {
        let plans = world.by_age(moment);
        let others = world.others(moment);
        let mut left: BTreeSet<_> = others
            .flat_map(|plan| plan.places(plan.transports, s))
            .collect();
        for plan in &plans {
            for place in plan.places(&TRANSPORTS, s) {
                left.remove(&place);
            }
        }
        Self { plans, left }
    }
}

/// Asks everything: a pod of the node, the node itself, and a machine outside, side by side.
pub(super) fn ask(
    world: &World,
    moment: usize,
    s: &Scenario,
    outsider: &Pod,
) -> anyhow::Result<Answers> {
    let moment = Moment::new(world, moment, s);
    let clients = [
        (Client::Pod, s.client.peer()?),
        (Client::Node, s.a.peer()?),
        (Client::Outside, outsider.peer()?),
    ];
    std::thread::scope(|scope| {
        let asking = clients.map(|(client, peer)| {
            let asked = questions(&moment, client, s, outsider);
            scope.spawn(move || -> anyhow::Result<Vec<(Asked, Heard)>> {
                let heard = peer.survey(asked.iter().map(Asked::question).collect(), OFTEN)?;
                Ok(asked.into_iter().zip(heard).collect())
            })
        });
        let mut all = Answers::new();
        for one in asking {
            let one = one
                .join()
                .map_err(|_| anyhow::anyhow!("a client panicked"))??;
            for (asked, heard) in one {
                let answer = asked.answer(heard).with_context(|| asked.to_string())?;
                all.insert(asked.to_string(), (asked, answer));
            }
        }
        Ok(all)
    })
}

impl Asked {
    fn answer(&self, heard: Heard) -> anyhow::Result<Answer> {
        let Heard { texts, error } = heard;
        match error {
            Some((errno, text)) if texts.is_empty() => return of_error(errno, &text),
            Some((_, text)) => return Ok(Answer::Unsteady(format!("{texts:?}, then {text}"))),
            None => {}
        }
        let (mut by, mut sees) = (BTreeSet::new(), BTreeSet::new());
        for text in texts {
            let (who, seen) = text.split_once(' ').with_context(|| format!("{text:?}"))?;
            by.insert(who.to_owned());
            let seen: IpAddr = seen.parse().with_context(|| format!("{text:?}"))?;
            sees.insert(seen.to_canonical());
        }
        if let Some(candidates) = &self.sticks_to_one_of
            && by.len() == 1
            && by.is_subset(candidates)
        {
            // Which one, and by which way it is reached, is chance.
            by = ["always the same".to_owned()].into();
            sees.clear();
        }
        Ok(Answer::Served { by, sees })
    }
}

fn of_error(errno: Option<i32>, text: &str) -> anyhow::Result<Answer> {
    match errno {
        Some(libc::ECONNREFUSED) => Ok(Answer::Refused),
        // Or nobody there has SCTP.
        Some(
            libc::ETIMEDOUT
            | libc::EAGAIN
            | libc::EHOSTUNREACH
            | libc::ENETUNREACH
            | libc::EINPROGRESS
            | libc::ENOPROTOOPT
            | libc::EPROTO,
        ) => Ok(Answer::Silent),
        _ => bail!("{text}"),
    }
}

/// The addresses that a client has in one family: the node has one towards the machines, and two towards its pods.
fn own_addresses(client: Client, v6: bool, s: &Scenario, outsider: &Pod) -> Vec<IpAddr> {
    match client {
        Client::Pod => vec![s.client.address(v6)],
        Client::Outside => vec![outsider.address(v6)],
        Client::Node => {
            let last = |last: u8| -> IpAddr {
                match s.client.address(v6) {
                    IpAddr::V4(pod) => {
                        let [a, b, c, _] = pod.octets();
                        [a, b, c, last].into()
                    }
                    IpAddr::V6(pod) => {
                        let [a, b, c, d, ..] = pod.segments();
                        Ipv6Addr::new(a, b, c, d, 0, 0, 0, last.into()).into()
                    }
                }
            };
            vec![s.a.address(v6), last(0), last(1)]
        }
    }
}
