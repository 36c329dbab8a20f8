//! Writes Events to the API server, under kube-proxy's names: what looks for its Events finds ours.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
};
use kube::{
    Api, Client,
    api::PostParams,
    runtime::events::{self, EventType, Recorder, Reporter},
};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};

use super::client::causes;
use crate::{
    events::{Event, Letter},
    model::NodeName,
};

const CONTROLLER: &str = "kube-proxy";
/// As client-go: an API server that does not answer is tried again so often, and so far apart (tools/events,
/// event_broadcaster.go, v0.36).
const TRIES: usize = 12;
const RETRY: Duration = Duration::from_secs(10);
/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Writes what comes until nobody tells anything any more. That it cannot be written is told once, until it can again.
pub async fn write(client: Client, here: NodeName, mut letters: mpsc::Receiver<Letter>) {
    let pen = Pen::new(client, &here);
    let mut is_told = false;
    while let Some((event, written)) = letters.recv().await {
        // Every node finds that.
        let is_shared = matches!(event, Event::AddressTaken { .. });
        let (event, about) = described(event, &here);
        match pen.write(&event, &about, is_shared).await {
            Ok(()) => is_told = false,
            Err(error) if is_told => tracing::debug!(%error, "cannot write an Event"),
            Err(error) => {
                is_told = true;
                tracing::warn!(
                    %error,
                    "cannot write an Event; the node is served all the same"
                );
            }
        }
        if let Some(written) = written {
            // Who waits may have gone.
            let _ = written.send(());
        }
    }
}

/// Writes Events in this node's name.
struct Pen {
    client: Client,
    instance: String,
    recorder: Recorder,
}

impl Pen {
    fn new(client: Client, here: &NodeName) -> Self {
        let instance = format!("{CONTROLLER}-{here}");
        let reporter = Reporter {
            controller: CONTROLLER.to_owned(),
            instance: Some(instance.clone()),
        };
        Self {
            recorder: Recorder::new(client.clone(), reporter),
            client,
            instance,
        }
    }

    async fn write(
        &self,
        event: &events::Event,
        about: &ObjectReference,
        is_shared: bool,
    ) -> Result<(), String> {
        let mut tries = 0;
        loop {
            let written = async {
                match is_shared {
                    true => self.create(event, about).await,
                    false => self.recorder.publish(event, about).await,
                }
            };
            let why = match timeout(PATIENCE, written).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(kube::Error::Api(status))) => return Err(refusal(&status)),
                Ok(Err(error)) => causes(&error),
                Err(_) => "no answer".to_owned(),
            };
            tries += 1;
            if tries == TRIES {
                return Err(why);
            }
            sleep(RETRY).await;
        }
    }

    /// Under a name that all nodes give it: thousands of them write one Event.
    async fn create(&self, event: &events::Event, about: &ObjectReference) -> kube::Result<()> {
        let mut hasher = DefaultHasher::new();
        (&event.reason, &event.note).hash(&mut hasher);
        let of = about.name.as_deref().unwrap_or_default();
        let object = v1::Event {
            metadata: ObjectMeta {
                name: Some(format!("{of}.{:x}", hasher.finish())),
                ..ObjectMeta::default()
            },
            action: Some(event.action.clone()),
            event_time: Some(MicroTime(Timestamp::now())),
            note: event.note.clone(),
            reason: Some(event.reason.clone()),
            regarding: Some(about.clone()),
            reporting_controller: Some(CONTROLLER.to_owned()),
            reporting_instance: Some(self.instance.clone()),
            type_: Some("Warning".to_owned()),
            ..v1::Event::default()
        };
        let namespace = about.namespace.as_deref().unwrap_or_default();
        let api: Api<v1::Event> = Api::namespaced(self.client.clone(), namespace);
        match api.create(&PostParams::default(), &object).await {
            // Somebody was faster.
            Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(()),
            other => other.map(drop),
        }
    }
}

/// What the API server says; for a right that is missing, which one.
fn refusal(status: &kube::core::Status) -> String {
    let remedy = match status.is_forbidden() {
        true => {
            "; its ClusterRole needs the rule {apiGroups: [\"events.k8s.io\"], resources: [\"events\"], verbs: [\"create\", \"patch\"]}"
        }
        false => "",
    };
    format!("{}{remedy}", status.message)
}

/// What is written about what. Reasons and actions are kube-proxy's where it has such an Event.
fn described(event: Event, here: &NodeName) -> (events::Event, ObjectReference) {
    let node = || ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Node".to_owned()),
        name: Some(here.to_string()),
        // kubelet's own Events have it too, and `kubectl describe node` shows only those.
        uid: Some(here.to_string()),
        ..ObjectReference::default()
    };
    let (type_, reason, action, note, about) = match event {
        Event::Started => (
            EventType::Normal,
            "Starting",
            "StartKubeProxy",
            None,
            node(),
        ),
        Event::NoHealth(why) => (
            EventType::Warning,
            "FailedToStartProxierHealthcheck",
            "StartKubeProxy",
            Some(why),
            node(),
        ),
        Event::NoMetrics(why) => (
            EventType::Warning,
            "FailedToStartMetricServer",
            "StartKubeProxy",
            Some(why),
            node(),
        ),
        Event::NoHealthCheck { service, why } => (
            EventType::Warning,
            "FailedToStartServiceHealthcheck",
            "Listen",
            Some(why),
            of_service(service.as_str()),
        ),
        Event::AddressTaken { service, why } => (
            EventType::Warning,
            "AddressTaken",
            "Serve",
            Some(why),
            of_service(service.as_str()),
        ),
    };
    let event = events::Event {
        type_,
        reason: reason.to_owned(),
        note,
        action: action.to_owned(),
        secondary: None,
    };
    (event, about)
}

fn of_service(name: &str) -> ObjectReference {
    let (namespace, name) = name.split_once('/').unwrap_or_default();
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Service".to_owned()),
        namespace: Some(namespace.to_owned()),
        name: Some(name.to_owned()),
        ..ObjectReference::default()
    }
}
