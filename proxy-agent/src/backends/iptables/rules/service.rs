//! The chains of one service port, and what its frontends are dispatched to.

use super::{
    super::{
        names::{ChainName, ServiceNames},
        rule::{Match, Rule, Target, host, is, is_not},
        tables::Table,
    },
    Body, Rules, Sink,
    choice::Choice,
    tree::{Leaf, LeafKey, Root, Verdict},
};
use crate::state::{Backend, Frontend, FrontendKind, Protocol, ServiceState, TrafficPolicy};

/// What the rule for a port at which load balancers ask says after the name of its owner.
pub(super) const HEALTH_CHECK: &str = "health check node port";

/// What becomes of the traffic of one kind.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// To the endpoints that the policy reaches.
    Served,
    /// There are endpoints, none that the policy reaches: dropped, so that a load balancer tries another node.
    Dropped,
    /// There is no endpoint.
    Rejected,
}

/// A service port, and what it has.
struct Service<'a> {
    rules: &'a Rules,
    state: &'a ServiceState,
    names: ServiceNames,
    /// Endpoints of the cluster.
    cluster: Vec<&'a Backend>,
    /// Endpoints of this node.
    local: Vec<&'a Backend>,
}

/// Renders the chains of a service port, and returns what its frontends are dispatched to.
pub(in super::super) fn render(
    rules: &Rules,
    state: &ServiceState,
    sink: &mut Sink<'_>,
) -> Vec<(LeafKey, Leaf)> {
    let of = |is_in: fn(&Backend) -> bool| state.backends.iter().filter(|b| is_in(b)).collect();
    let service = Service {
        rules,
        state,
        names: ServiceNames::new(&state.key),
        cluster: of(|backend| backend.state.in_cluster),
        local: of(|backend| backend.state.in_local),
    };
    service.policy_chains(sink);
    if let Some(external) = service.external_target() {
        if external == service.names.external {
            service.external_chain(sink);
        }
        if service.has_firewall() {
            service.firewall_chain(external, sink);
        }
    }
    service.leaves()
}

impl<'a> Service<'a> {
    fn frontends(&self, kind: FrontendKind) -> impl Iterator<Item = &'a Frontend> {
        let frontends = self.state.frontends.iter();
        frontends.filter(move |frontend| frontend.kind == kind)
    }

    fn is_external(&self) -> bool {
        let mut frontends = self.state.frontends.iter();
        frontends.any(|frontend| frontend.kind != FrontendKind::ClusterIp)
    }

    fn has_endpoints(&self) -> bool {
        !self.cluster.is_empty() || !self.local.is_empty()
    }

    fn fate(&self, policy: TrafficPolicy) -> Fate {
        let reached = match policy {
            TrafficPolicy::Cluster => &self.cluster,
            TrafficPolicy::Local => &self.local,
        };
        match policy {
            _ if !reached.is_empty() => Fate::Served,
            // With a policy of Local, endpoints elsewhere are in no set, but they serve.
            TrafficPolicy::Local if !self.state.backends.is_empty() => Fate::Dropped,
            TrafficPolicy::Local | TrafficPolicy::Cluster => Fate::Rejected,
        }
    }

    /// The chain for what came to a node port, a load balancer's address or an external IP, while something serves it.
    ///
    /// With a policy of Local also without an endpoint that it reaches: for pods and for the node itself. With one of
    /// Cluster it is the chain of the endpoints.
    fn external_target(&self) -> Option<ChainName> {
        let policy = self.state.external_policy;
        match policy {
            _ if !self.is_external() => None,
            TrafficPolicy::Cluster => {
                (self.fate(policy) == Fate::Served).then(|| self.chain_of(policy))
            }
            TrafficPolicy::Local => self.has_endpoints().then_some(self.names.external),
        }
    }

    /// kube-proxy filters by source only while there are endpoints.
    fn has_firewall(&self) -> bool {
        let mut balanced = self.frontends(FrontendKind::LoadBalancer);
        !self.state.source_ranges.is_empty() && balanced.next().is_some()
    }

    fn rule(&self, target: Target) -> Rule<'a> {
        Rule::new(self.state.key.family, target)
    }

    /// As KUBE-MARK-MASQ does, without the way there.
    fn mark(&self) -> Target {
        Target::SetMark(self.rules.masquerade_mark)
    }

    fn chain_of(&self, policy: TrafficPolicy) -> ChainName {
        match policy {
            TrafficPolicy::Cluster => self.names.cluster,
            TrafficPolicy::Local => self.names.local,
        }
    }

    /// KUBE-SVC- and KUBE-SVL-, and the endpoints below them.
    fn policy_chains(&self, sink: &mut Sink<'_>) {
        let choice = Choice::new(self.rules, &self.names, self.state);
        for (policy, members) in [
            (TrafficPolicy::Cluster, &self.cluster),
            (TrafficPolicy::Local, &self.local),
        ] {
            if members.is_empty() {
                continue;
            }
            let mut body = Body::default();
            if policy == self.state.internal_policy {
                self.masquerade_to_cluster_ip(&mut body);
            }
            if self.external_target() == Some(self.chain_of(policy)) {
                self.masquerade_from_outside(&mut body);
            }
            choice.render(self.chain_of(policy), members.clone(), body, sink);
        }
        choice.endpoints([self.cluster.clone(), self.local.clone()], sink);
    }

    /// Who comes from outside of the pod networks may have been routed over this node only on the way there.
    fn masquerade_to_cluster_ip(&self, body: &mut Body) {
        for frontend in self.frontends(FrontendKind::ClusterIp) {
            let mut rule = Rule {
                destination: is(host(frontend.address)),
                protocol: Some(self.state.key.protocol),
                ports: Some((frontend.port, frontend.port)),
                ..self.rule(self.mark())
            };
            if !self.rules.masquerade_all {
                match self.rules.pods(self.state.key.family) {
                    Some(pods) => pods.restrict(&mut rule, true),
                    None => continue,
                }
            }
            body.push(&rule);
        }
    }

    /// An endpoint on another node answers to this one.
    fn masquerade_from_outside(&self, body: &mut Body) {
        let mut cluster_ips = self.frontends(FrontendKind::ClusterIp);
        let cluster_ip = cluster_ips.next().map(|frontend| host(frontend.address));
        body.push(&Rule {
            destination: cluster_ip.and_then(is_not),
            ..self.rule(self.mark())
        });
    }

    /// KUBE-EXT-: what came from outside, with a policy of Local.
    fn external_chain(&self, sink: &mut Sink<'_>) {
        let mut body = Body::default();
        if !self.cluster.is_empty() {
            self.short_circuit(&mut body);
        }
        if self.fate(self.state.external_policy) == Fate::Served {
            let chain = self.chain_of(self.state.external_policy);
            body.push(&self.rule(Target::Jump(chain)));
        }
        let family = self.state.key.family;
        body.send(family, Table::Nat, self.names.external, sink);
    }

    /// Pods and the node itself reach every endpoint, as if they had gone out to a load balancer and come back.
    fn short_circuit(&self, body: &mut Body) {
        let cluster = Target::Jump(self.names.cluster);
        if let Some(pods) = self.rules.pods(self.state.key.family) {
            let mut rule = self.rule(cluster);
            pods.restrict(&mut rule, false);
            body.push(&rule);
        }
        // The node's own source address may be the load balancer's.
        for target in [self.mark(), cluster] {
            body.push(&Rule {
                matches: &[Match::SourceIsLocal],
                ..self.rule(target)
            });
        }
    }

    /// KUBE-FW-: who is not allowed comes out at its end untranslated, and KUBE-PROXY-FIREWALL drops it.
    fn firewall_chain(&self, external: ChainName, sink: &mut Sink<'_>) {
        let mut body = Body::default();
        let external = Target::Jump(external);
        for range in &self.state.source_ranges {
            body.push(&Rule {
                source: is(range.trunc()),
                ..self.rule(external)
            });
        }
        // A load balancer's address that is assigned to this node is the source of what the node itself sends to it.
        if self.state.admits_node {
            for frontend in self.frontends(FrontendKind::LoadBalancer) {
                body.push(&Rule {
                    source: is(host(frontend.address)),
                    ..self.rule(external)
                });
            }
        }
        let family = self.state.key.family;
        body.send(family, Table::Nat, self.names.firewall, sink);
    }

    fn leaves(&self) -> Vec<(LeafKey, Leaf)> {
        let mut found = Vec::new();
        for frontend in &self.state.frontends {
            match frontend.kind {
                // A server on this node has it for itself (NodeLocal DNSCache).
                FrontendKind::ClusterIp if frontend.on_local_link => {}
                FrontendKind::ClusterIp => self.cluster_ip(frontend, &mut found),
                FrontendKind::NodePort | FrontendKind::LoadBalancer | FrontendKind::ExternalIp => {
                    self.external(frontend, &mut found)
                }
            }
        }
        found.extend(self.health_check());
        found
    }

    /// Load balancers ask in both families, whichever the Service has.
    fn health_check(&self) -> impl Iterator<Item = (LeafKey, Leaf)> {
        let port = self.state.health_check_port;
        let families = self.rules.families.iter();
        families.filter_map(move |&family| {
            let key = LeafKey {
                family,
                root: Root::HealthChecks,
                address: family.unspecified(),
                protocol: Protocol::Tcp,
                port: port?,
            };
            let leaf = Leaf {
                verdict: Verdict::Accept,
                owner: self.state.key.clone(),
                what: HEALTH_CHECK,
            };
            Some((key, leaf))
        })
    }

    fn cluster_ip(&self, frontend: &Frontend, found: &mut Vec<(LeafKey, Leaf)>) {
        let policy = self.state.internal_policy;
        let (root, verdict) = match self.fate(policy) {
            Fate::Served => (Root::Services, Verdict::Chain(self.chain_of(policy))),
            Fate::Dropped => (Root::ClusterRefused, Verdict::Drop),
            Fate::Rejected => (Root::ClusterRefused, Verdict::Reject),
        };
        found.push(self.leaf(root, frontend, verdict, "cluster IP"));
    }

    fn external(&self, frontend: &Frontend, found: &mut Vec<(LeafKey, Leaf)>) {
        let (dispatch, refuse, what) = match frontend.kind {
            FrontendKind::NodePort => (Root::NodePorts, Root::NodePortsRefused, "node port"),
            FrontendKind::LoadBalancer => {
                (Root::Services, Root::ExternalRefused, "loadbalancer IP")
            }
            FrontendKind::ExternalIp | FrontendKind::ClusterIp => {
                (Root::Services, Root::ExternalRefused, "external IP")
            }
        };
        if let Some(external) = self.external_target() {
            let filtered = frontend.kind == FrontendKind::LoadBalancer && self.has_firewall();
            let chain = if filtered {
                found.push(self.leaf(Root::Firewall, frontend, Verdict::Drop, "source ranges"));
                self.names.firewall
            } else {
                external
            };
            found.push(self.leaf(dispatch, frontend, Verdict::Chain(chain), what));
        }
        let verdict = match self.fate(self.state.external_policy) {
            Fate::Served => return,
            Fate::Dropped => Verdict::Drop,
            Fate::Rejected => Verdict::Reject,
        };
        found.push(self.leaf(refuse, frontend, verdict, what));
    }

    fn leaf(
        &self,
        root: Root,
        frontend: &Frontend,
        verdict: Verdict,
        what: &'static str,
    ) -> (LeafKey, Leaf) {
        let key = LeafKey {
            family: self.state.key.family,
            root,
            address: frontend.address,
            protocol: self.state.key.protocol,
            port: frontend.port,
        };
        let what = match verdict {
            Verdict::Reject => "has no endpoints",
            Verdict::Drop if root != Root::Firewall => "has no local endpoints",
            Verdict::Drop => "traffic not accepted by its source ranges",
            Verdict::Chain(_) | Verdict::Accept => what,
        };
        let owner = self.state.key.clone();
        let leaf = Leaf {
            verdict,
            owner,
            what,
        };
        (key, leaf)
    }
}
