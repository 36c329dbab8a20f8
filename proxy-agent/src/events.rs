//! What the cluster is told about this node, on its way to whoever writes it down (Kubernetes Events).
//!
//! Nobody waits for an Event: what cannot be taken in at once is not told.

use std::time::Duration;

use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use crate::state::ServiceName;

/// Events on their way. More at once say nothing new.
const WAITING: usize = 32;
/// The last Event of a process is given this long.
const LAST: Duration = Duration::from_secs(2);

/// Something that somebody who looks at the cluster should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The agent has started.
    Started,
    /// There is no port for the health of the agent, and it ends.
    NoHealth(String),
    /// There is no port for its metrics, and it ends.
    NoMetrics(String),
    /// Load balancers get no answer about a Service.
    NoHealthCheck {
        /// The Service.
        service: ServiceName,
        /// Why.
        why: String,
    },
    /// Another Service has the address and port that this one claims.
    AddressTaken {
        /// Who does not get it.
        service: ServiceName,
        /// What, and who has it.
        why: String,
    },
}

/// An Event, and who waits until it is written.
pub type Letter = (Event, Option<oneshot::Sender<()>>);

/// Takes Events. A clone gives them to the same reader; the default gives them to nobody.
#[derive(Clone, Debug, Default)]
pub struct Events(Option<mpsc::Sender<Letter>>);

impl Events {
    /// A pair: who takes them, and who reads them.
    pub fn channel() -> (Self, mpsc::Receiver<Letter>) {
        let (sender, receiver) = mpsc::channel(WAITING);
        (Self(Some(sender)), receiver)
    }

    /// Tells, if there is room.
    pub fn tell(&self, event: Event) {
        if let Some(sender) = &self.0
            && sender.try_send((event, None)).is_err()
        {
            tracing::debug!("too many Events at once: one is not told");
        }
    }

    /// Tells before the process ends; waits until it is written, but not for long.
    pub async fn tell_last(&self, event: Event) {
        let Some(sender) = &self.0 else {
            return;
        };
        let (written, is_written) = oneshot::channel();
        if sender.try_send((event, Some(written))).is_ok() {
            // Written, refused, or too late: the process ends all the same.
            drop(timeout(LAST, is_written).await);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_for_a_reader_that_is_slow_gone_or_none() {
        Events::default().tell(Event::Started);
        let (events, mut reader) = Events::channel();
        for _ in 0..=WAITING {
            events.tell(Event::Started);
        }
        let mut count = 0;
        while reader.try_recv().is_ok() {
            count += 1;
        }
        assert_eq!(count, WAITING);
        drop(reader);
        events.tell(Event::Started);
    }

    #[tokio::test]
    async fn the_last_event_is_waited_for() {
        let (events, mut reader) = Events::channel();
        let read = async {
            let (event, written) = reader.recv().await.unwrap();
            assert_eq!(event, Event::NoMetrics("taken".to_owned()));
            written.unwrap().send(()).unwrap();
        };
        tokio::join!(events.tell_last(Event::NoMetrics("taken".to_owned())), read);
        drop(reader);
        events.tell_last(Event::Started).await;
        Events::default().tell_last(Event::Started).await;
    }
}
