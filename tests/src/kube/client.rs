//! Requests to the API server, by curl: one process for many requests, all over one connection.

use std::{
    fmt::Write as _,
    io::Write as _,
    process::{Child, Output, Stdio},
};

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::place::Place;

/// What authenticates the tests.
pub(super) const TOKEN: &str = "proxy-tests";

/// A client of the API server at `server` (`https://…`), in its network namespace.
#[derive(Clone, Debug)]
pub(super) struct Client {
    pub(super) place: Place,
    pub(super) server: String,
}

/// One request.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Request {
    method: &'static str,
    path: String,
    /// Of the body.
    content_type: &'static str,
    body: Option<Value>,
}

impl Request {
    pub(super) fn get(path: &str) -> Self {
        Self::new("GET", path)
    }

    pub(super) fn delete(path: &str) -> Self {
        Self::new("DELETE", path)
    }

    /// Makes an object that is not there, in the collection at `path`.
    pub(super) fn create(path: &str, object: Value) -> Self {
        Self {
            body: Some(object),
            ..Self::new("POST", path)
        }
    }

    /// Makes an object, or brings it to this state (server-side apply).
    pub(super) fn apply(path: &str, object: Value) -> Self {
        Self {
            content_type: "application/apply-patch+yaml",
            body: Some(object),
            ..Self::new("PATCH", &format!("{path}?fieldManager=tests&force=true"))
        }
    }

    /// Replaces the fields that `patch` names (RFC 7386).
    pub(super) fn merge(path: &str, patch: Value) -> Self {
        Self {
            content_type: "application/merge-patch+json",
            body: Some(patch),
            ..Self::new("PATCH", path)
        }
    }

    fn new(method: &'static str, path: &str) -> Self {
        Self {
            method,
            path: path.to_owned(),
            content_type: "application/json",
            body: None,
        }
    }

    /// The lines of curl's configuration.
    fn write(&self, server: &str, text: &mut String) {
        let mut line = |name: &str, value: &str| {
            let quoted = value.replace('\\', "\\\\").replace('"', "\\\"");
            writeln!(text, "{name} = \"{quoted}\"").expect("writing to a String does not fail");
        };
        line("url", &format!("{server}{}", self.path));
        line("request", self.method);
        line("header", &format!("Authorization: Bearer {TOKEN}"));
        line("header", &format!("Content-Type: {}", self.content_type));
        if let Some(body) = &self.body {
            line("data-raw", &body.to_string());
        }
        text.push_str("insecure\nsilent\nshow-error\nfail-with-body\nmax-time = 60\n");
    }
}

impl Client {
    /// Sends requests one after the other; all of them must succeed. What was answered, one after the other.
    ///
    /// # Errors
    /// One was refused: what the server says, or no connection.
    pub(super) fn send(&self, requests: &[Request]) -> anyhow::Result<String> {
        let mut text = String::from("fail-early\n");
        for (number, request) in requests.iter().enumerate() {
            text.push_str(if number > 0 { "next\n" } else { "" });
            request.write(&self.server, &mut text);
        }
        let mut command = self.place.command("curl")?;
        command.args(["--config", "-"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let child = command.stderr(Stdio::piped()).spawn();
        let output = feed(child.context("cannot start curl")?, text)?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "{}: {} {}",
            self.server,
            errors.trim(),
            last_part(&said)
        );
        Ok(said)
    }
}

fn feed(mut child: Child, text: String) -> anyhow::Result<Output> {
    let mut stdin = child.stdin.take().context("curl has no input")?;
    let writer = std::thread::spawn(move || stdin.write_all(text.as_bytes()));
    let output = child.wait_with_output()?;
    // curl that ends early says why itself.
    drop(writer.join());
    Ok(output)
}

/// The end of a long answer.
fn last_part(text: &str) -> &str {
    let from = text.len().saturating_sub(2000);
    text.get(from..).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_written_as_curl_reads_it() {
        let mut text = String::new();
        let object = serde_json::json!({"a": "\"\\"});
        Request::apply("/api/v1/x", object).write("https://s", &mut text);
        let expected = r#"url = "https://s/api/v1/x?fieldManager=tests&force=true"
request = "PATCH"
header = "Authorization: Bearer proxy-tests"
header = "Content-Type: application/apply-patch+yaml"
data-raw = "{\"a\":\"\\\"\\\\\"}"
"#;
        assert!(text.starts_with(expected), "{text}");
    }
}
