//! From a Service to one of its endpoints.
//!
//! Few endpoints are a ladder of rules, each with the chance that makes all equal. Many are first drawn by groups, so that
//! nobody walks a ladder of a thousand rules and a change rewrites the chains of one group. The group of an endpoint is a
//! function of the endpoint alone.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
    iter,
    net::SocketAddr,
};

use super::{
    super::{
        Key,
        names::{ChainName, ServiceNames},
        rule::{Match, Rule, Target, host, is, set_name},
        tables::{AddressSet, Table},
    },
    Body, Rules, Sink,
};
use crate::state::{Backend, Family, ServiceState};

/// As many endpoints are a ladder.
const LADDER: usize = 32;
/// Groups of groups, at most: 16,384 endpoints have a ladder of 32, more a longer one. See [`super::tree::DEPTH`].
const LEVELS: usize = 3;
/// More are drawn by so many groups: at 33 endpoints a quarter of a rule for each is added.
const GROUPS: usize = 8;
/// Longest timeout that the API allows (86,400 s, five digits in the name of a set).
const LONGEST: u32 = 86_400;

/// How clients stick to endpoints.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Affinity {
    None,
    /// In an ipset for each endpoint and each group.
    Sets(u32),
    /// In xt_recent's list for each endpoint: 100 clients at most, as kube-proxy does it.
    Recent(u32),
}

/// The endpoints of one service port, and how to reach them.
pub(super) struct Choice<'a> {
    family: Family,
    names: &'a ServiceNames,
    state: &'a ServiceState,
    affinity: Affinity,
    mark: u32,
}

/// Endpoints below a chain.
struct Node<'a> {
    members: Vec<&'a Backend>,
    /// One digit for each group above.
    path: String,
}

impl<'a> Choice<'a> {
    pub(super) fn new(rules: &Rules, names: &'a ServiceNames, state: &'a ServiceState) -> Self {
        let affinity = match state.affinity_seconds {
            None => Affinity::None,
            Some(seconds) if rules.features.ipset => Affinity::Sets(seconds.min(LONGEST)),
            Some(seconds) if rules.features.recent => Affinity::Recent(seconds),
            Some(_) => Affinity::None,
        };
        Self {
            family: state.key.family,
            names,
            state,
            affinity,
            mark: rules.masquerade_mark,
        }
    }

    /// Appends to `body`, that of `chain`, what leads to one of `members`, and renders what is below.
    pub(super) fn render(
        &self,
        chain: ChainName,
        members: Vec<&'a Backend>,
        mut body: Body,
        sink: &mut Sink<'_>,
    ) {
        let node = Node::root(members);
        match self.affinity {
            Affinity::None => {}
            Affinity::Sets(seconds) => self.check_sets(chain, &node, seconds, &mut body, sink),
            Affinity::Recent(seconds) => {
                for member in &node.members {
                    let list = self.endpoint(member);
                    body.push(&Rule {
                        matches: &[Match::Seen { list, seconds }],
                        ..self.rule(Target::Jump(list))
                    });
                }
            }
        }
        self.draw(chain, &node, &mut body, sink);
        body.send(self.family, Table::Nat, chain, sink);
    }

    fn rule(&self, target: Target) -> Rule<'a> {
        Rule::new(self.family, target)
    }

    fn endpoint(&self, backend: &Backend) -> ChainName {
        self.names.endpoint(address(backend))
    }

    /// Sends clients that stick to an endpoint there.
    fn check_sets(
        &self,
        chain: ChainName,
        node: &Node<'_>,
        seconds: u32,
        body: &mut Body,
        sink: &mut Sink<'_>,
    ) {
        let check = |set, target, body: &mut Body| {
            body.push(&Rule {
                matches: &[Match::SourceIn(set, seconds)],
                ..self.rule(Target::Jump(target))
            });
        };
        if node.is_ladder() {
            for member in &node.members {
                let set = self.endpoint(member);
                check(set, set, body);
            }
            return;
        }
        for group in node.groups() {
            if let [member] = group.members.as_slice() {
                let set = self.endpoint(member);
                check(set, set, body);
                continue;
            }
            let below = self.names.group("KUBE-SVC-A-", &chain, &group.path);
            check(self.clients(&group.path), below, body);
            let mut of_group = Body::default();
            self.check_sets(chain, &group, seconds, &mut of_group, sink);
            of_group.send(self.family, Table::Nat, below, sink);
        }
    }

    /// The set of the clients of a group.
    fn clients(&self, path: &str) -> ChainName {
        self.names.group("KUBE-GRP-", &self.family, path)
    }

    /// Draws one of the endpoints.
    fn draw(&self, chain: ChainName, node: &Node<'_>, body: &mut Body, sink: &mut Sink<'_>) {
        let mut left = node.members.len();
        let mut step = |weight: usize, rule: Rule<'_>, body: &mut Body| {
            let chance = [Match::Chance {
                hits: weight,
                of: left,
            }];
            body.push(&Rule {
                matches: &chance[..usize::from(weight < left)],
                ..rule
            });
            left -= weight;
        };
        if node.is_ladder() {
            for member in &node.members {
                step(1, self.to(member), body);
            }
            return;
        }
        for group in node.groups() {
            let rule = match group.members.as_slice() {
                [member] => self.to(member),
                _ => {
                    let below = self.names.group("KUBE-SVC-G-", &chain, &group.path);
                    let mut of_group = Body::default();
                    self.draw(chain, &group, &mut of_group, sink);
                    of_group.send(self.family, Table::Nat, below, sink);
                    self.rule(Target::Jump(below))
                }
            };
            step(group.members.len(), rule, body);
        }
    }

    /// Sends a packet to an endpoint.
    fn to(&self, backend: &Backend) -> Rule<'a> {
        if self.has_chain(backend) {
            self.rule(Target::Jump(self.endpoint(backend)))
        } else {
            Rule {
                protocol: Some(self.state.key.protocol),
                ..self.rule(Target::Translate(address(backend)))
            }
        }
    }

    /// Only an endpoint of this node can be its own client here, and only affinity has something to note.
    fn has_chain(&self, backend: &Backend) -> bool {
        backend.state.on_this_node || self.affinity != Affinity::None
    }

    /// The KUBE-SEP- chains and the sets of the endpoints that are drawn from one of `drawn`.
    pub(super) fn endpoints(&self, drawn: [Vec<&'a Backend>; 2], sink: &mut Sink<'_>) {
        let mut levels = BTreeMap::new();
        for members in drawn {
            Node::root(members).levels(&mut levels);
        }
        let own = |(member, _): &(&Backend, _)| self.has_chain(member);
        for (member, level) in levels.into_iter().filter(own) {
            let chain = self.endpoint(member);
            let mut body = Body::default();
            if member.state.on_this_node {
                // A client that reaches itself has to see the node as its peer, or it would answer itself directly.
                body.push(&Rule {
                    source: is(host(member.address)),
                    ..self.rule(Target::SetMark(self.mark))
                });
            }
            let see = [Match::See(chain)];
            let mut sees = 0;
            match self.affinity {
                Affinity::None => {}
                Affinity::Recent(_) => sees = 1,
                Affinity::Sets(seconds) => {
                    let path: String = (0..level).map(|at| digit(group(member, at))).collect();
                    let groups = (1..=level).map(|end| self.clients(&path[..end]));
                    for set in iter::once(chain).chain(groups) {
                        body.push(&self.rule(Target::Remember(set, seconds)));
                        let set = AddressSet {
                            name: set_name(set, seconds),
                            family: self.family,
                            timeout_seconds: seconds,
                        };
                        sink(Key::Set(set), "");
                    }
                }
            }
            body.push(&Rule {
                protocol: Some(self.state.key.protocol),
                matches: &see[..sees],
                ..self.rule(Target::Translate(address(member)))
            });
            body.send(self.family, Table::Nat, chain, sink);
        }
    }
}

impl<'a> Node<'a> {
    fn root(members: Vec<&'a Backend>) -> Self {
        let path = String::new();
        Self { members, path }
    }

    fn is_ladder(&self) -> bool {
        self.members.len() <= LADDER || self.path.len() == LEVELS
    }

    /// Those that are not empty.
    fn groups(&self) -> impl Iterator<Item = Node<'a>> {
        let level = self.path.len();
        let mut members: [Vec<&'a Backend>; GROUPS] = Default::default();
        for member in &self.members {
            members[group(member, level)].push(*member);
        }
        let nodes = members.into_iter().enumerate().map(|(at, members)| {
            let mut path = self.path.clone();
            path.push(digit(at));
            Node { members, path }
        });
        nodes.filter(|node| !node.members.is_empty())
    }

    /// Notes how many groups lie above each endpoint, the most of several trees.
    fn levels(&self, found: &mut BTreeMap<&'a Backend, usize>) {
        let level = self.path.len();
        if self.is_ladder() {
            for member in &self.members {
                note(found, member, level);
            }
            return;
        }
        for node in self.groups() {
            match node.members.as_slice() {
                [member] => note(found, member, level),
                _ => node.levels(found),
            }
        }
    }
}

fn note<'a>(found: &mut BTreeMap<&'a Backend, usize>, member: &'a Backend, level: usize) {
    let known = found.entry(member).or_default();
    *known = level.max(*known);
}

fn address(backend: &Backend) -> SocketAddr {
    SocketAddr::new(backend.address, backend.port)
}

fn digit(group: usize) -> char {
    char::from(b'0' + group as u8)
}

/// Which group of a level an endpoint belongs to: three bits of its hash.
fn group(backend: &Backend, level: usize) -> usize {
    let mut hasher = DefaultHasher::new();
    address(backend).hash(&mut hasher);
    (hasher.finish() >> (3 * level)) as usize % GROUPS
}
