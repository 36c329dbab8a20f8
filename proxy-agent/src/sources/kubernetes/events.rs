//! Writes Events to the API server, under kube-proxy's names: what looks for its Events finds ours.

use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
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
    let reporter = Reporter {
        controller: CONTROLLER.to_owned(),
        instance: Some(format!("{CONTROLLER}-{here}")),
    };
    let recorder = Recorder::new(client, reporter);
    let mut is_told = false;
    while let Some((event, written)) = letters.recv().await {
        let (event, about) = described(event, &here);
        match publish(&recorder, &event, &about).await {
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

async fn publish(
    recorder: &Recorder,
    event: &events::Event,
    about: &ObjectReference,
) -> Result<(), String> {
    let mut tries = 0;
    loop {
        let why = match timeout(PATIENCE, recorder.publish(event, about)).await {
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
