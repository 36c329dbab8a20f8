//! The events of one kind of object, for ever: streamed lists where the server has them, else lists by pages.

use std::{fmt::Debug, pin::pin, time::Duration};

use futures_util::StreamExt as _;
use k8s_openapi::api::{core::v1, discovery::v1 as discovery, networking::v1 as networking};
use kube::{
    Api, Resource,
    runtime::{
        utils::Backoff as _,
        watcher::{self, DefaultBackoff, Event, InitialListStrategy},
    },
};
use serde::de::DeserializeOwned;
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};

use super::client::causes;

/// A streamed list has given no object for this long: an old server streams without ever saying that it is complete.
const STALLED: Duration = Duration::from_secs(15);

/// Without another error for this long after a try the kind is followed again: the watcher waits half a minute for a
/// connection, and does not tell that it goes on.
const QUIET: Duration = Duration::from_secs(40);

/// A server that does not serve a kind is asked for it again after this long: it may be upgraded.
const UNSERVED: Duration = Duration::from_secs(600);

/// What to follow of a kind: objects with, or without, these labels and fields.
#[derive(Clone, Debug, Default)]
pub struct Selector {
    /// Labels; none means all objects.
    pub labels: String,
    /// Fields.
    pub fields: String,
    /// Fields of objects that are of use to nobody: an old server does not know them, and sends all.
    pub spares: String,
    /// A server need not serve the kind at all.
    pub is_optional: bool,
}

/// What is heard of a kind.
#[derive(Debug)]
pub enum Item {
    /// Of Services.
    Service(Heard<v1::Service>),
    /// Of EndpointSlices.
    Slice(Heard<discovery::EndpointSlice>),
    /// Of the own Node.
    Node(Heard<v1::Node>),
    /// Of the node's pods.
    Pod(Heard<v1::Pod>),
    /// Of ServiceCIDRs.
    ServiceCidr(Heard<networking::ServiceCIDR>),
}

/// What is heard of the objects of one kind.
#[derive(Debug)]
pub enum Heard<K> {
    /// Something has happened to one. Boxed: a Node has kilobytes.
    Event(Box<Event<K>>),
    /// What keeps us from following them.
    Failed(String),
    /// They are followed again, and nothing has happened to them.
    Quiet,
    /// The server does not serve the kind, and need not.
    Unserved,
}

/// Follows until nobody takes events any more. After an error it waits, longer each time and by chance, a minute at most, and
/// goes on where it was if the server still knows that point, else with a new list.
pub async fn follow<K>(
    api: Api<K>,
    selector: Selector,
    item: fn(Heard<K>) -> Item,
    events: mpsc::Sender<Item>,
) where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let mut ways = ways(&selector).into_iter().peekable();
    while let Some(config) = ways.next() {
        let streams = config.initial_list_strategy == InitialListStrategy::StreamingList;
        let mut stream = pin!(kube::runtime::watcher(api.clone(), config));
        let mut backoff = DefaultBackoff::default();
        let (mut is_listing, mut has_failed, mut is_unserved) = (false, false, false);
        loop {
            let limit = match (streams && is_listing, has_failed) {
                (true, _) => STALLED,
                (false, true) => QUIET,
                (false, false) => Duration::MAX,
            };
            let next = timeout(limit, stream.next()).await;
            let pause = match &next {
                Ok(Some(Err(error))) => Some(pause(&mut backoff, error)),
                Ok(Some(Ok(_))) => {
                    backoff.reset();
                    None
                }
                Ok(None) | Err(_) => None,
            };
            let heard = match next {
                Ok(Some(Err(error))) if ways.peek().is_some() && is_refused(&error) => break,
                Ok(Some(Err(error))) if selector.is_optional && code(&error) == 404 => {
                    Heard::Unserved
                }
                Ok(Some(Err(error))) => Heard::Failed(explain::<K>(&error)),
                Ok(Some(Ok(event))) => Heard::Event(Box::new(event)),
                Err(_) if !is_listing => Heard::Quiet,
                // A stream that stalls; it never ends.
                Err(_) | Ok(None) => break,
            };
            is_listing = match &heard {
                Heard::Event(event) => matches!(**event, Event::Init | Event::InitApply(_)),
                Heard::Failed(_) | Heard::Quiet | Heard::Unserved => is_listing,
            };
            has_failed = matches!(heard, Heard::Failed(_));
            let was_unserved = is_unserved;
            is_unserved = matches!(heard, Heard::Unserved);
            if events.send(item(heard)).await.is_err() {
                return;
            }
            if is_unserved {
                if !was_unserved {
                    tracing::info!(kind = %K::kind(&()), "this API server does not serve them: going on without");
                }
                sleep(UNSERVED).await;
            }
            if let Some(pause) = pause {
                sleep(pause).await;
            }
        }
        tracing::info!(kind = %K::kind(&()), "this API server is too old for how it was asked: asking it in a plainer way");
    }
}

/// How long to wait after an error; not long for a server that answers, and no longer knows where this was.
fn pause(backoff: &mut DefaultBackoff, error: &watcher::Error) -> Duration {
    if code(error) == 410 {
        backoff.reset();
    }
    // There is always one more.
    backoff.next().unwrap_or(QUIET)
}

/// How to follow a kind, the best way first: by a streamed list (the feature gate WatchList may be off), else by pages; and
/// both without what only spares the server.
fn ways(selector: &Selector) -> Vec<watcher::Config> {
    let Selector {
        labels,
        fields,
        spares,
        is_optional: _,
    } = selector;
    let more = (!spares.is_empty()).then(|| [fields.as_str(), spares].join(","));
    let more = more.map(|fields| fields.trim_start_matches(',').to_owned());
    let strategies = [
        InitialListStrategy::StreamingList,
        InitialListStrategy::ListWatch,
    ];
    let config = |fields: &str, strategy: &InitialListStrategy| watcher::Config {
        initial_list_strategy: strategy.clone(),
        label_selector: (!labels.is_empty()).then(|| labels.clone()),
        field_selector: (!fields.is_empty()).then(|| fields.to_owned()),
        ..watcher::Config::default()
    };
    let fields = more.into_iter().chain([fields.clone()]);
    fields
        .flat_map(|fields| {
            strategies
                .each_ref()
                .map(|strategy| config(&fields, strategy))
        })
        .collect()
}

/// Whether the server does not know what it is asked for.
fn is_refused(error: &watcher::Error) -> bool {
    let (watcher::Error::WatchStartFailed(kube::Error::Api(status))
    | watcher::Error::InitialListFailed(kube::Error::Api(status))) = error
    else {
        return false;
    };
    [400, 422].contains(&status.code)
}

/// The server's answer as HTTP has it; 0 if it was none.
fn code(error: &watcher::Error) -> u16 {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status)) => status.code,
        watcher::Error::WatchError(status) => status.code,
        _ => 0,
    }
}

/// What failed, and what to do about it; for a right that is missing, which one.
fn explain<K: Resource<DynamicType = ()>>(error: &watcher::Error) -> String {
    let resource = K::plural(&());
    let remedy = match code(error) {
        401 => "; the API server does not know who this is: are the credentials out of date, or for another cluster?".to_owned(),
        403 => format!(
            "; its ClusterRole needs the rule {{apiGroups: [\"{}\"], resources: [\"{resource}\"], verbs: [\"list\", \"watch\"]}}",
            K::group(&())
        ),
        _ => String::new(),
    };
    let text = causes(error);
    format!("{text}{remedy}; what is known stays in use, trying again")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_is_back_is_not_waited_for_as_one_that_is_gone() {
        let mut backoff = DefaultBackoff::default();
        let gone = watcher::Error::NoResourceVersion;
        let pauses: Vec<Duration> = (0..8).map(|_| pause(&mut backoff, &gone)).collect();
        assert!(pauses[0] < Duration::from_secs(2), "{pauses:?}");
        assert!(pauses[7] >= Duration::from_secs(30), "{pauses:?}");
        let expired = kube::core::Status {
            code: 410,
            ..kube::core::Status::default()
        };
        let expired = watcher::Error::WatchError(Box::new(expired));
        assert!(pause(&mut backoff, &expired) < Duration::from_secs(2));
    }

    #[test]
    fn what_only_spares_the_server_is_left_out_last() {
        let selector = |fields: &str, spares: &str| Selector {
            labels: "!a".to_owned(),
            fields: fields.to_owned(),
            spares: spares.to_owned(),
            is_optional: false,
        };
        let asked = |selector: &Selector| -> Vec<(bool, Option<String>)> {
            let ways = ways(selector).into_iter();
            ways.map(|way| {
                assert_eq!(way.label_selector.as_deref(), Some("!a"));
                let streams = way.initial_list_strategy == InitialListStrategy::StreamingList;
                (streams, way.field_selector)
            })
            .collect()
        };
        let both = |fields: Option<&str>| [true, false].map(|way| (way, fields.map(str::to_owned)));
        assert_eq!(asked(&selector("", "")), both(None));
        assert_eq!(asked(&selector("b=c", "")), both(Some("b=c")));
        let spared = [both(Some("d!=e")), both(None)].concat();
        assert_eq!(asked(&selector("", "d!=e")), spared);
        let spared = [both(Some("b=c,d!=e")), both(Some("b=c"))].concat();
        assert_eq!(asked(&selector("b=c", "d!=e")), spared);
    }
}
