//! Health and metrics: whoever asks kube-proxy for them gets the same from the agent.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, ensure};
use proxy_tests::{
    Node,
    kube::{KubeProxy, Mode, Variant},
    scenario::SOON,
    wait_for,
};
use serde_json::{Value, json};

use crate::cluster::Cluster;

/// Status line and headers that clients read, in lower case, and the body.
fn ask(node: &Node, at: &str) -> anyhow::Result<(Vec<String>, String)> {
    let url = format!("http://127.0.0.1:{at}");
    let answer = node.output("curl", &["--silent", "--show-error", "--include", &url])?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP")?;
    let is_read = |line: &&str| {
        ["http/1.1", "content-type", "x-content-type-options"]
            .iter()
            .any(|name| line.starts_with(name))
    };
    let head = head.to_lowercase();
    // Formats and escapes that a client may ask for.
    let head = head
        .lines()
        .filter(is_read)
        .map(|line| line.replace("; escaping=underscores", ""));
    let mut head: Vec<String> = head.collect();
    head.sort();
    Ok((head, body.to_owned()))
}

/// The fields of an answer, in their order, with those below them.
fn fields(body: &str) -> Vec<&str> {
    // A name is followed by a colon outside of quotes.
    let quoted = body.split('"').skip(1).step_by(2);
    let rest = body.split('"').skip(2).step_by(2);
    let names = quoted.zip(rest).filter(|(_, rest)| rest.starts_with(':'));
    names.map(|(name, _)| name).collect()
}

/// What a metric is, apart from its values.
#[derive(Debug, Default, PartialEq)]
struct Metric {
    kind: String,
    help: String,
    /// Names of its samples with their labels, without values; of buckets the bounds too.
    samples: BTreeSet<String>,
}

/// What client-go alone has: a client of another make has no cache of transports, no limit of its own, and no counts of
/// plugins and sizes. Dashboards ask for none of them.
const CLIENT_GO: [&str; 13] = [
    "dns_resolution_duration_seconds",
    "exec_plugin_call_total",
    "exec_plugin_certificate_rotation_age",
    "exec_plugin_policy_call_total",
    "exec_plugin_ttl_seconds",
    "rate_limiter_duration_seconds",
    "request_retries_total",
    "request_size_bytes",
    "response_size_bytes",
    "transport_ca_reload_total",
    "transport_cache_entries",
    "transport_cert_rotation_gc_calls_total",
    "transport_create_calls_total",
];

/// kube-proxy's own metrics in a text, and those of its client.
fn metrics(text: &str) -> BTreeMap<String, Metric> {
    let mut found: BTreeMap<String, Metric> = BTreeMap::new();
    for line in text.lines() {
        let words: Vec<&str> = line.splitn(4, ' ').collect();
        if let ["#", what, name, rest] = words[..] {
            let metric = found.entry(name.to_owned()).or_default();
            match what {
                "TYPE" => rest.clone_into(&mut metric.kind),
                _ => rest.clone_into(&mut metric.help),
            }
            continue;
        }
        let Some((sample, _)) = line.rsplit_once(' ') else {
            continue;
        };
        let (name, labels) = sample.split_once('{').unwrap_or((sample, ""));
        let labels = labels.trim_end_matches('}').split(',');
        let labels: BTreeSet<&str> = labels.filter(|label| !label.is_empty()).collect();
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| {
            let base = name.strip_suffix(end)?;
            found.contains_key(base).then(|| base.to_owned())
        });
        let metric = found.entry(base.unwrap_or_else(|| name.to_owned()));
        metric
            .or_default()
            .samples
            .insert(format!("{name} {labels:?}"));
    }
    found.retain(|name, _| name.starts_with("kubeproxy_") || name.starts_with("rest_client_"));
    found
}

/// What both proxies answer, after a few changes.
fn answers(c: &Cluster) -> anyhow::Result<Answers> {
    let node = &c.scenario.a;
    c.apply(&[&c.scenario.near])?;
    c.wait_served_by(&[&c.scenario.near])?;
    // Also of what was asked before.
    for path in ["10256/healthz", "10256/livez"] {
        ask(node, path)?;
    }
    // A sync and its metrics come one after the other, and so do the families.
    let text = wait_for("a sync is counted", SOON, || {
        let (_, text) = ask(node, "10249/metrics")?;
        for family in ["IPv4", "IPv6"] {
            let count = "kubeproxy_network_programming_duration_seconds_count";
            let count = format!("{count}{{ip_family=\"{family}\"}}");
            ensure!(text.contains(&count), "no {count} in {text}");
        }
        Ok(text)
    })?;
    let body_of = |path| ask(node, path).map(|(_, body)| body);
    Ok(Answers {
        metrics: metrics(&text),
        heads: [
            "10256/healthz",
            "10256/livez",
            "10249/proxyMode",
            "10249/configz",
            "10249/metrics",
            "10249/healthz",
        ]
        .into_iter()
        .map(|path| Ok((path, ask(node, path)?.0)))
        .collect::<anyhow::Result<_>>()?,
        healthz: body_of("10256/healthz")?,
        livez: body_of("10256/livez")?,
        configz: serde_json::from_str(&body_of("10249/configz")?)?,
    })
}

struct Answers {
    metrics: BTreeMap<String, Metric>,
    heads: BTreeMap<&'static str, Vec<String>>,
    healthz: String,
    livez: String,
    configz: Value,
}

#[test]
#[ignore = "needs root"]
fn whoever_asks_kube_proxy_is_answered_the_same_by_the_agent() {
    for (name, mode, own) in [
        ("answers-iptables", Mode::Iptables(Variant::Nft), "iptables"),
        ("answers-nftables", Mode::Nftables, "ebpf"),
    ] {
        Cluster::run(name, Variant::Nft, &[], |c| {
            let node = c.scenario.a.clone();
            let own = json!({"mode": own});
            let kube_proxy = KubeProxy::start_sharing(&c.control, &node, mode, own)?;
            let its = answers(c)?;
            c.scenario.agent.read_config(kube_proxy.config());
            kube_proxy.stop()?;
            c.apply(&[])?;
            c.scenario.agent.spawn()?;
            c.scenario.agent.wait_ready()?;
            let ours = answers(c)?;

            for (name, metric) in &its.metrics {
                let of_client = name.strip_prefix("rest_client_");
                if of_client.is_some_and(|name| CLIENT_GO.contains(&name)) {
                    continue;
                }
                let found = ours
                    .metrics
                    .get(name)
                    .with_context(|| format!("no {name}"))?;
                ensure!(
                    found.kind == metric.kind && found.help == metric.help,
                    "{name}: {found:?} {metric:?}"
                );
                let missing: Vec<_> = metric.samples.difference(&found.samples).collect();
                ensure!(
                    missing.is_empty(),
                    "{name}: no {missing:#?} in {:#?}",
                    found.samples
                );
            }
            ensure!(its.metrics.len() >= 15, "{:?}", its.metrics.keys());
            for name in ["requests_total", "request_duration_seconds"] {
                let name = format!("rest_client_{name}");
                ensure!(its.metrics.contains_key(&name), "{:?}", its.metrics.keys());
            }
            assert_eq!(ours.heads, its.heads);
            for (ours, its) in [(&ours.healthz, &its.healthz), (&ours.livez, &its.livez)] {
                assert_eq!(fields(ours), fields(its), "{ours} {its}");
            }
            let (ours, its) = (ours.configz, its.configz);
            let group = "kubeproxy.config.k8s.io";
            let fields = its[group].as_object().into_iter().flatten();
            let missing: Vec<_> = fields
                .filter(|(field, _)| ours[group].get(field).is_none())
                .collect();
            ensure!(missing.is_empty(), "{missing:?} in {ours}");
            Ok(())
        });
    }
}

#[test]
#[ignore = "needs root"]
fn a_node_that_the_autoscaler_takes_away_gets_no_traffic_and_no_restart() {
    Cluster::run("eligible", Variant::Nft, &[], |c| {
        let node = c.scenario.a.clone();
        let own = json!({"mode": "iptables"});
        let kube_proxy =
            KubeProxy::start_sharing(&c.control, &node, Mode::Iptables(Variant::Nft), own)?;
        c.scenario.agent.read_config(kube_proxy.config());
        kube_proxy.stop()?;
        c.scenario.agent.spawn()?;
        c.scenario.agent.wait_ready()?;
        for (is_leaving, status, eligible) in
            [(false, 200, true), (true, 503, false), (false, 200, true)]
        {
            c.control.mark_node(&node, is_leaving)?;
            wait_for("the Node is heard of", SOON, || {
                let (head, body) = ask(&node, "10256/healthz")?;
                let body: Value = serde_json::from_str(&body)?;
                ensure!(
                    head.iter().any(|line| line.contains(&status.to_string())),
                    "{head:?}"
                );
                ensure!(
                    body["nodeEligible"] == eligible && body["healthy"] == true,
                    "{body}"
                );
                Ok(())
            })?;
            let (head, body) = ask(&node, "10256/livez")?;
            ensure!(
                head.iter().any(|line| line.contains("200")) && !body.contains("nodeEligible"),
                "{head:?} {body}"
            );
        }
        c.scenario
            .agent
            .wait_metric("kubeproxy_proxy_healthz_total", "code=\"503\"", |count| {
                count > 0.0
            })
    });
}
