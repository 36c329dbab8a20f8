//! What the sources say, on its way to the layers: one model, and for each layer its own changes at its own pace.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use tokio::sync::watch;

use super::observer::Observer;
use crate::{
    compile::{self, Compiler, Problem},
    events::{Event, Events},
    health::checks::Checks,
    metrics::{LayerMetrics, Metrics},
    model::{Dirty, Model, Update},
    sync::{Compiled, Inbox, Scope, SyncStatus},
};

/// Takes in what the sources say, and tells each layer what it touches.
#[derive(Debug)]
pub struct Feeds {
    model: Arc<Mutex<Model>>,
    inboxes: Vec<Arc<Inbox>>,
    observer: Option<Arc<Mutex<Observer>>>,
    checks: watch::Sender<Checks>,
    events: Events,
    /// What the Node says of that; none while there has been no Node.
    eligible: watch::Sender<Option<bool>>,
}

/// What one layer is fed from.
#[derive(Clone, Debug)]
pub struct Feed {
    model: Arc<Mutex<Model>>,
    /// The changes that wait for the layer.
    pub inbox: Arc<Inbox>,
    /// The first layer tells what cannot be carried out: the others compile the same.
    tells: Option<Events>,
    /// Of the layer that speaks for the node.
    observer: Option<Arc<Mutex<Observer>>>,
}

impl Feeds {
    /// Of a model that is empty; what the cluster should know goes to `events`.
    pub fn new(model: Model, events: Events) -> Self {
        Self {
            model: Arc::new(Mutex::new(model)),
            inboxes: Vec::new(),
            observer: None,
            checks: watch::Sender::default(),
            events,
            eligible: watch::Sender::default(),
        }
    }

    /// Follows what load balancers are told: wakes when ports or addresses change.
    pub fn checks(&self) -> watch::Receiver<Checks> {
        self.checks.subscribe()
    }

    /// Follows whether the Node is one that load balancers may send traffic; none while there has been no Node.
    pub fn eligible(&self) -> watch::Receiver<Option<bool>> {
        self.eligible.subscribe()
    }

    /// One more layer, which counts there.
    pub fn add(&mut self, metrics: &LayerMetrics) -> Feed {
        let tells = self.inboxes.is_empty().then(|| self.events.clone());
        let inbox = Arc::new(Inbox::new(metrics.changes_pending.clone()));
        let observer = metrics.kube_proxy.clone().map(|metrics| {
            let observer = Observer::new(metrics, SystemTime::now());
            Arc::new(Mutex::new(observer))
        });
        if observer.is_some() {
            self.observer.clone_from(&observer);
        }
        self.inboxes.push(Arc::clone(&inbox));
        Feed {
            model: Arc::clone(&self.model),
            inbox,
            tells,
            observer,
        }
    }

    /// Takes in an update.
    pub fn update(&self, update: Update) {
        let (is_news, dirty, synced, complete) = {
            let mut model = lock(&self.model);
            let is_news = model.is_news(&update);
            if let Some(observer) = &self.observer {
                lock(observer).note(&update, &model, SystemTime::now());
            }
            let dirty = model.apply(update);
            self.checks
                .send_if_modified(|checks| note_checks(checks, &model, &dirty));
            self.eligible.send_replace(model.is_eligible());
            (is_news, dirty, model.is_synced(), model.is_complete())
        };
        for inbox in &self.inboxes {
            if is_news {
                inbox.touch(&dirty);
            }
            inbox.push(dirty.clone().into());
            inbox.sources(synced, complete);
        }
    }

    /// Ends the loops of the layers after the turns they are in.
    pub fn stop(&self) {
        for inbox in &self.inboxes {
            inbox.stop();
        }
    }
}

impl Feed {
    /// Compiles `scope`, and tells what of it cannot be carried out.
    pub fn compile(&self, compiler: &mut Compiler, scope: &Scope, metrics: &Metrics) -> Compiled {
        let (compiled, problems) = Compiled::of(compiler, &lock(&self.model), scope);
        if let Some(events) = &self.tells {
            tell(&problems, compiler, metrics, events);
        }
        if let Some(observer) = &self.observer {
            lock(observer).taken(&compiled);
        }
        compiled
    }

    /// Counts what was compiled, once the kernel holds it.
    pub fn tend(&self, status: &SyncStatus) {
        if let Some(observer) = &self.observer {
            lock(observer).tell(status, SystemTime::now());
        }
    }
}

/// Brings what load balancers are told level with the model; whether they ask elsewhere now.
fn note_checks(checks: &mut Checks, model: &Model, dirty: &Dirty) -> bool {
    let mut moved = false;
    for name in &dirty.services {
        let check = compile::health::check(model, name);
        let port = check.as_ref().map(|check| check.port);
        let before = match check {
            Some(check) => checks.services.insert(name.clone(), check),
            None => checks.services.remove(name),
        };
        moved |= before.map(|check| check.port) != port;
    }
    if dirty.addresses {
        let addresses = compile::health::addresses(model);
        moved |= checks.addresses != addresses;
        checks.addresses = addresses;
    }
    moved
}

/// Logs problems that have come up, tells who lost an address, and says how many problems there are.
fn tell(new: &[Problem], compiler: &Compiler, metrics: &Metrics, events: &Events) {
    for problem in new {
        tracing::warn!(service = %problem.service(), error = %problem, "not carried out");
        match problem {
            Problem::Taken { service, .. } => events.tell(Event::AddressTaken {
                service: service.clone(),
                why: problem.to_string(),
            }),
            Problem::Forbidden { .. } => {}
        }
    }
    let count = compiler.problems().count();
    metrics
        .problems
        .set(i64::try_from(count).unwrap_or(i64::MAX));
}

/// Either is changed whole or not at all, even by a thread that panics.
fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::{
        metrics::Voice,
        model::{Node, NodeName, Objects},
    };

    #[test]
    fn other_networks_of_the_nodes_pods_concern_everything() {
        let mut feeds = Feeds::new(Model::new(NodeName::new("node-a")), Events::default());
        let feed = feeds.add(&Metrics::default().layer("test", Voice::Own));
        let node = |network: &str| {
            let node = Node {
                pod_networks: [network.parse().unwrap()].into(),
                ..Node::default()
            };
            Update::Objects(Objects {
                node: Some(Some(Arc::new(node))),
                complete: true,
                ..Objects::default()
            })
        };
        feeds.update(Update::Addresses([[10, 0, 0, 1].into()].into()));
        feeds.update(node("10.244.1.0/24"));
        let take = || feed.inbox.wait(None, Instant::now()).scope;
        assert_eq!(take(), Scope::All);
        feeds.update(node("10.244.1.0/24"));
        assert!(take().is_empty());
        feeds.update(node("10.244.2.0/24"));
        assert_eq!(take(), Scope::All);
        let mut compiler = Compiler::default();
        let compiled = feed.compile(&mut compiler, &Scope::All, &Metrics::default());
        let expected: Vec<ipnet::IpNet> = vec!["10.244.2.0/24".parse().unwrap()];
        assert_eq!(compiled.state.pod_networks, expected);
    }

    #[test]
    fn each_layer_gets_every_change_whatever_the_other_one_does() {
        let mut feeds = Feeds::new(Model::new(NodeName::new("node-a")), Events::default());
        let metrics = Metrics::default();
        let slow = metrics.layer("slow", Voice::Node);
        let first = feeds.add(&metrics.layer("fast", Voice::Own));
        let second = feeds.add(&slow);
        feeds.update(Update::Addresses([[10, 0, 0, 1].into()].into()));
        feeds.update(Update::Objects(Objects {
            complete: true,
            ..Objects::default()
        }));
        let take = |feed: &Feed| feed.inbox.wait(None, Instant::now());
        assert_eq!(take(&first).scope, Scope::All);
        feeds.update(Update::Addresses([[10, 0, 0, 2].into()].into()));
        let addresses = Scope::Part(Dirty {
            addresses: true,
            ..Dirty::default()
        });
        assert_eq!(take(&first).scope, addresses);
        // The other one has been busy all the time.
        assert_eq!(
            (take(&second).scope, slow.changes_pending.get()),
            (Scope::All, 2)
        );
        feeds.stop();
        assert!(take(&first).stop && take(&second).stop);
    }
}
