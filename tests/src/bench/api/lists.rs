//! A bare list: everything that a proxy reads at its start, in the forms that there are, read and thrown away.

use std::{
    pin::pin,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use futures_util::AsyncReadExt as _;
use http::{Request, header::ACCEPT};
use kube::Client;
use serde_json::{Value, json};

use super::wire::Wire;

/// What the proxies list, with the selector that all of them have.
const COLLECTIONS: [&str; 2] = [
    "/api/v1/services",
    "/apis/discovery.k8s.io/v1/endpointslices",
];
const SELECTOR: &str =
    "labelSelector=!service.kubernetes.io/service-proxy-name,!service.kubernetes.io/headless";
/// Of a bookmark that says that the list is complete.
const COMPLETE: &[u8] = b"k8s.io/initial-events-end";
/// Such a bookmark is shorter, and so is what comes before the objects of a page.
const ENVELOPE: usize = 2_048;
const ROUNDS: usize = 5;

/// How a list is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// As the agent does: JSON, a watch that begins with what there is.
    JsonStreamed,
    /// JSON, 500 objects a page: as the agent does where the server does not stream.
    JsonPaged,
    /// As kube-proxy does.
    ProtobufStreamed,
}

impl Form {
    pub const ALL: [Self; 3] = [Self::JsonStreamed, Self::JsonPaged, Self::ProtobufStreamed];

    fn name(self) -> &'static str {
        match self {
            Self::JsonStreamed => "JSON, streamed",
            Self::JsonPaged => "JSON, pages of 500",
            Self::ProtobufStreamed => "protobuf, streamed",
        }
    }

    fn content_type(self) -> &'static str {
        match self {
            Self::JsonStreamed | Self::JsonPaged => "application/json",
            Self::ProtobufStreamed => "application/vnd.kubernetes.protobuf;stream=watch",
        }
    }
}

/// How long the list of both collections took, side by side.
#[derive(Clone, Copy, Debug)]
pub(super) struct Listed {
    form: Form,
    /// The median of some.
    pub took: Duration,
    bytes: u64,
}

impl Listed {
    /// For the report.
    pub fn row(&self) -> Value {
        json!({
            "what": "bare list", "form": self.form.name(),
            "took_s": self.took.as_secs_f64(), "megabytes": self.bytes as f64 / 1e6,
        })
    }
}

/// Lists everything in a form, several times.
pub(super) fn list(wire: &Wire, form: Form) -> Result<Listed> {
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let client = wire.client();
        rounds.push(wire.run(async move {
            let start = Instant::now();
            let [services, slices] = COLLECTIONS.map(|path| {
                let client = client.clone();
                tokio::spawn(async move {
                    match form {
                        Form::JsonPaged => pages(&client, path, form).await,
                        Form::JsonStreamed | Form::ProtobufStreamed => {
                            stream(&client, path, form).await
                        }
                    }
                })
            });
            let bytes = services.await?? + slices.await??;
            Ok((start.elapsed(), bytes))
        })?);
    }
    rounds.sort();
    let (took, bytes) = rounds[ROUNDS / 2];
    Ok(Listed { form, took, bytes })
}

/// Reads one page after the other.
async fn pages(client: &Client, path: &str, form: Form) -> Result<u64> {
    let mut bytes = 0;
    let mut next = Some(String::new());
    while let Some(token) = next {
        let query = format!("{path}?{SELECTOR}&limit=500{token}");
        let mut head = Vec::new();
        bytes += read(client, &query, form, |part| {
            let room = ENVELOPE.saturating_sub(head.len());
            head.extend_from_slice(&part[..room.min(part.len())]);
            false
        })
        .await?;
        next = token_of(&head).map(|token| format!("&continue={token}"));
    }
    Ok(bytes)
}

/// Reads a watch until it has told everything.
async fn stream(client: &Client, path: &str, form: Form) -> Result<u64> {
    let query = format!(
        "{path}?{SELECTOR}&watch=1&sendInitialEvents=true&allowWatchBookmarks=true\
         &resourceVersionMatch=NotOlderThan&timeoutSeconds=290"
    );
    let mut tail = Vec::new();
    read(client, &query, form, |part| {
        // Nothing comes behind it: nothing changes meanwhile.
        tail.extend_from_slice(&part[part.len().saturating_sub(ENVELOPE)..]);
        tail.drain(..tail.len().saturating_sub(ENVELOPE));
        tail.windows(COMPLETE.len()).any(|word| word == COMPLETE)
    })
    .await
}

/// Reads an answer to its end, or until `is_complete` says so of its parts.
async fn read(
    client: &Client,
    query: &str,
    form: Form,
    mut is_complete: impl FnMut(&[u8]) -> bool,
) -> Result<u64> {
    let request = Request::get(query).header(ACCEPT, form.content_type());
    let answer = client.request_stream(request.body(Vec::new())?).await?;
    let mut answer = pin!(answer);
    let (mut buffer, mut bytes) = (vec![0; 256 * 1024], 0);
    loop {
        let count = answer.read(&mut buffer).await?;
        bytes += count as u64;
        let part = buffer.get(..count).context("more than there is room for")?;
        if count == 0 || is_complete(part) {
            return Ok(bytes);
        }
    }
}

/// What asks for the page after one that begins like this.
fn token_of(head: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(head);
    let (_, rest) = text.split_once("\"continue\":\"")?;
    let (token, _) = rest.split_once('"')?;
    Some(token.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_names_the_next_one_unless_it_is_the_last() {
        let head = br#"{"kind":"ServiceList","metadata":{"resourceVersion":"7","continue":"eyJ2"#;
        assert_eq!(token_of(head), None);
        let head =
            br#"{"metadata":{"resourceVersion":"7","continue":"eyJ2","remainingItemCount":3},"#;
        assert_eq!(token_of(head), Some("eyJ2".to_owned()));
        assert_eq!(
            token_of(br#"{"metadata":{"resourceVersion":"7"},"items""#),
            None
        );
    }
}
