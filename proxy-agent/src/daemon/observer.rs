//! What kube-proxy's metrics say beside the syncs themselves: how soon a change of endpoints is in the kernel, and how many
//! service ports a Local policy leaves without endpoints.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use crate::{
    metrics::{FamilyLabel, KubeProxyMetrics, PolicyLabels},
    model::{Model, Objects, Slice, Update},
    state::{Family, FrontendKind, ServiceName, ServicePort, ServiceState, TrafficPolicy},
    sync::{Compiled, Scope, SyncStatus},
};

/// Watches what the layer that speaks for the node is given, and what becomes of it.
#[derive(Debug)]
pub struct Observer {
    metrics: KubeProxyMetrics,
    /// Changes that were triggered before are not ours: they were in a former agent's kernel.
    since: SystemTime,
    /// When the changes of endpoints were triggered that wait for the layer.
    waiting: BTreeMap<ServiceName, Vec<(Family, SystemTime)>>,
    /// Of those that it syncs.
    taken: Vec<(Family, SystemTime)>,
    is_taken: bool,
    without_local: BTreeMap<ServicePort, WithoutLocal>,
}

/// Policies for which a service port has no endpoint here, although it has some elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct WithoutLocal {
    internal: bool,
    external: bool,
}

impl WithoutLocal {
    /// As kube-proxy counts (pkg/proxy/iptables/proxier.go, `syncProxyRules`, v1.36); none if nothing is missing.
    fn of(service: &ServiceState) -> Option<Self> {
        let has_local = service
            .backends
            .iter()
            .any(|backend| backend.state.in_local);
        if has_local || service.backends.is_empty() {
            return None;
        }
        let is_external = |kind| kind != FrontendKind::ClusterIp;
        let mut kinds = service.frontends.iter().map(|frontend| frontend.kind);
        let found = Self {
            internal: service.internal_policy == TrafficPolicy::Local,
            external: service.external_policy == TrafficPolicy::Local && kinds.any(is_external),
        };
        (found.internal || found.external).then_some(found)
    }
}

impl Observer {
    /// Counts from now on.
    pub fn new(metrics: KubeProxyMetrics, now: SystemTime) -> Self {
        Self {
            metrics,
            since: now,
            waiting: BTreeMap::new(),
            taken: Vec::new(),
            is_taken: false,
            without_local: BTreeMap::new(),
        }
    }

    /// A source delivers; `model` does not have it yet.
    pub fn note(&mut self, update: &Update, model: &Model, now: SystemTime) {
        let Update::Objects(Objects {
            services, slices, ..
        }) = update
        else {
            return;
        };
        if services.is_empty() && slices.is_empty() {
            return;
        }
        self.metrics.queued(services.len(), slices.len(), now);
        for (name, slice) in slices {
            match slice {
                Some(slice) => self.triggered(slice),
                // As in kube-proxy: what waited for the Service of a slice that goes is told no more.
                None => drop(
                    model
                        .service_of(name)
                        .and_then(|of| self.waiting.remove(of)),
                ),
            }
        }
    }

    fn triggered(&mut self, slice: &Slice) {
        if let Some(at) = slice.triggered.filter(|at| *at >= self.since) {
            let of_service = self.waiting.entry(slice.service.clone()).or_default();
            of_service.push((slice.family, at));
        }
    }

    /// The layer takes what waits.
    pub fn taken(&mut self, compiled: &Compiled) {
        self.metrics.taken();
        self.is_taken = true;
        self.taken
            .extend(std::mem::take(&mut self.waiting).into_values().flatten());
        match &compiled.scope {
            Scope::All => self.without_local.clear(),
            Scope::Part(dirty) => {
                let is_meant =
                    |port: &ServicePort, _: &mut _| dirty.services.contains(&port.service);
                self.without_local.extract_if(.., is_meant).for_each(drop);
            }
        }
        let found = compiled.state.services.iter();
        let found =
            found.filter_map(|(port, service)| Some((port.clone(), WithoutLocal::of(service)?)));
        self.without_local.extend(found);
    }

    /// Tells what was taken, once the kernel holds it; `status` is of after the sync that took it. What comes while somebody
    /// else serves the node is not ours to tell of.
    pub fn tell(&mut self, status: &SyncStatus, now: SystemTime) {
        if status.is_synced && !status.is_serving {
            self.metrics.taken();
            self.waiting.clear();
        }
        if status.last_error.is_some() || !std::mem::take(&mut self.is_taken) {
            return;
        }
        for (family, at) in self.taken.drain(..) {
            // A clock that is behind the one of who triggered it.
            let elapsed = now.duration_since(at).unwrap_or(Duration::ZERO);
            let label = FamilyLabel {
                ip_family: family.name(),
            };
            let histogram = self.metrics.programming.get_or_create(&label);
            histogram.observe(elapsed.as_secs_f64());
        }
        for family in [Family::V4, Family::V6] {
            let count = |lacks: fn(&WithoutLocal) -> bool| {
                let found = self.without_local.iter();
                let found = found.filter(|(port, of)| port.family == family && lacks(of));
                found.count()
            };
            for (traffic_policy, count) in [
                ("internal", count(|of| of.internal)),
                ("external", count(|of| of.external)),
            ] {
                let labels = PolicyLabels {
                    ip_family: family.name(),
                    traffic_policy,
                };
                let gauge = self.metrics.no_local_endpoints.get_or_create(&labels);
                gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        model::{Endpoint, NodeName, SliceName},
        state::{Backend, BackendState, DesiredState, Frontend, Protocol},
    };

    const START: Duration = Duration::from_secs(1_000_000);

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + START + Duration::from_secs(seconds)
    }

    fn slice(service: &str, triggered: SystemTime) -> Update {
        let endpoint = Endpoint::ready([10, 244, 0, 1].into());
        let service = ServiceName::new("default", service);
        let mut slice = Slice::new(service, Family::V4, Vec::new(), vec![endpoint]);
        slice.triggered = Some(triggered);
        objects("a", Some(slice))
    }

    fn objects(name: &str, slice: Option<Slice>) -> Update {
        Update::Objects(Objects {
            slices: vec![(SliceName::new("default", name), slice.map(Arc::new))],
            complete: true,
            ..Objects::default()
        })
    }

    fn status(error: Option<&str>) -> SyncStatus {
        SyncStatus {
            last_error: error.map(str::to_owned),
            ..SyncStatus::default()
        }
    }

    #[test]
    fn a_change_counts_from_its_trigger_to_the_sync_that_went_in() {
        let metrics = KubeProxyMetrics::default();
        let mut observer = Observer::new(metrics.clone(), at(0));
        let mut model = Model::new(NodeName::new("node-a"));
        let mut note = |observer: &mut Observer, update: Update| {
            observer.note(&update, &model, at(10));
            model.apply(update);
        };
        note(&mut observer, slice("old", at(0) - Duration::from_secs(1)));
        note(&mut observer, slice("web", at(3)));
        note(&mut observer, slice("gone", at(4)));
        note(&mut observer, objects("a", None));
        note(&mut observer, slice("late", at(60)));
        assert_eq!(metrics.endpoint_changes.get(), 5);
        assert_eq!(metrics.endpoint_changes_pending.get(), 5);
        observer.taken(&Compiled::default());
        assert_eq!(metrics.endpoint_changes_pending.get(), 0);
        let text = || {
            crate::metrics::Metrics {
                kube_proxy: metrics.clone(),
                ..Default::default()
            }
            .text()
        };
        let line = |end: &str| format!("kubeproxy_network_programming_duration_seconds_{end}");
        observer.tell(&status(Some("no memory")), at(11));
        assert!(!text().contains(&line("count")));
        for _ in 0..2 {
            observer.tell(&status(None), at(12));
            for end in [
                "count{ip_family=\"IPv4\"} 2",
                // The clock of whoever triggered the last one is ahead.
                "sum{ip_family=\"IPv4\"} 9.0",
                "bucket{le=\"0\",ip_family=\"IPv4\"} 1",
                "bucket{le=\"9\",ip_family=\"IPv4\"} 2",
            ] {
                let text = text();
                assert!(
                    text.lines().any(|found| found == line(end)),
                    "no {end} in\n{text}"
                );
            }
        }
    }

    #[test]
    fn a_change_that_somebody_else_serves_is_not_told_of() {
        let metrics = KubeProxyMetrics::default();
        let mut observer = Observer::new(metrics.clone(), at(0));
        let model = Model::new(NodeName::new("node-a"));
        let observing = SyncStatus {
            is_synced: true,
            ..SyncStatus::default()
        };
        observer.note(&slice("web", at(3)), &model, at(4));
        observer.tell(&observing, at(5));
        assert!(observer.waiting.is_empty());
        assert_eq!(metrics.endpoint_changes_pending.get(), 0);
        observer.note(&slice("web", at(1_000)), &model, at(1_001));
        observer.taken(&Compiled::default());
        observer.tell(&status(None), at(1_002));
        let all = crate::metrics::Metrics {
            kube_proxy: metrics,
            ..Default::default()
        };
        let sum = "kubeproxy_network_programming_duration_seconds_sum{ip_family=\"IPv4\"} 2.0";
        let text = all.text();
        assert!(text.lines().any(|line| line == sum), "{text}");
    }

    #[test]
    fn service_ports_that_a_local_policy_leaves_without_endpoints_are_counted() {
        let metrics = KubeProxyMetrics::default();
        let mut observer = Observer::new(metrics.clone(), at(0));
        let port = |name: &str| ServicePort {
            service: ServiceName::new("default", name),
            port: "".into(),
            protocol: Protocol::Tcp,
            family: Family::V4,
        };
        let frontend = |kind| Frontend {
            address: [10, 0, 0, 1].into(),
            port: 80,
            kind,
            on_local_link: false,
        };
        let backend = |in_local| Backend {
            address: [10, 244, 0, 1].into(),
            port: 80,
            state: BackendState {
                in_local,
                ..BackendState::default()
            },
        };
        let service = |name, kinds: &[FrontendKind], backends: &[Backend]| ServiceState {
            key: port(name),
            frontends: kinds.iter().map(|kind| frontend(*kind)).collect(),
            backends: backends.to_vec(),
            affinity_seconds: None,
            internal_policy: TrafficPolicy::Local,
            external_policy: TrafficPolicy::Local,
            source_ranges: Vec::new(),
            admits_node: false,
            health_check_port: None,
        };
        use FrontendKind::{ClusterIp, NodePort};
        let state = |services: Vec<ServiceState>| DesiredState {
            services: services
                .into_iter()
                .map(|of| (of.key.clone(), of))
                .collect(),
            ..DesiredState::default()
        };
        let counts = || {
            ["internal", "external"].map(|traffic_policy| {
                let ip_family = "IPv4";
                let labels = PolicyLabels {
                    ip_family,
                    traffic_policy,
                };
                metrics.no_local_endpoints.get_or_create(&labels).get()
            })
        };
        let mut sync = |scope, services| {
            let state = state(services);
            observer.taken(&Compiled { scope, state });
            observer.tell(&status(None), at(1));
        };
        sync(
            Scope::All,
            vec![
                service("inside", &[ClusterIp], &[backend(false)]),
                service("both", &[ClusterIp, NodePort], &[backend(false)]),
                service(
                    "here",
                    &[ClusterIp, NodePort],
                    &[backend(false), backend(true)],
                ),
                service("nowhere", &[ClusterIp, NodePort], &[]),
            ],
        );
        assert_eq!(counts(), [2, 1]);
        let part = |name: &str| {
            Scope::Part(crate::model::Dirty {
                services: [ServiceName::new("default", name)].into(),
                ..Default::default()
            })
        };
        sync(part("both"), Vec::new());
        assert_eq!(counts(), [1, 0]);
        sync(
            part("here"),
            vec![service("here", &[NodePort], &[backend(false)])],
        );
        assert_eq!(counts(), [2, 1]);
    }
}
