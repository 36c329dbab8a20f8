//! The text that Prometheus reads, in the older of its two formats, which everything understands and kube-proxy answers with.

/// OpenMetrics 1.0 as Prometheus text 0.0.4: counters are named with their `_total`, whole numbers of buckets have no
/// fraction, and nothing marks the end.
pub fn prometheus(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len());
    // A counter's HELP comes before its TYPE.
    let mut lines = open_metrics.lines().peekable();
    while let Some(line) = lines.next() {
        if line == "# EOF" {
            continue;
        }
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, help) = help.split_once(' ').unwrap_or((help, ""));
            let is_counter = lines.peek() == Some(&format!("# TYPE {name} counter").as_str());
            let total = if is_counter { "_total" } else { "" };
            // The encoder ends each with a full stop.
            let help = help.strip_suffix('.').unwrap_or(help);
            text.push_str(&format!("# HELP {name}{total} {help}\n"));
        } else if let Some(name) = counter_of(line) {
            text.push_str(&format!("# TYPE {name}_total counter\n"));
        } else {
            text.push_str(&without_fraction(line));
            text.push('\n');
        }
    }
    text
}

fn counter_of(line: &str) -> Option<&str> {
    line.strip_prefix("# TYPE ")?.strip_suffix(" counter")
}

/// `le="1.0"` is `le="1"`.
fn without_fraction(line: &str) -> String {
    let Some((before, rest)) = line.split_once("le=\"") else {
        return line.to_owned();
    };
    let Some((bound, after)) = rest.split_once('"') else {
        return line.to_owned();
    };
    let bound = bound.strip_suffix(".0").unwrap_or(bound);
    format!("{before}le=\"{bound}\"{after}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_metrics_becomes_the_older_text() {
        let open = "# HELP a Things that happened.\n# TYPE a counter\na_total{x=\"y\"} 3\n\
                    # HELP b Seconds.\n# TYPE b histogram\nb_sum 0.5\nb_count 1\nb_bucket{le=\"0.5\"} 1\nb_bucket{le=\"1.0\",x=\"y\"} 1\n\
                    # HELP c_total Not a counter.\n# TYPE c_total gauge\nc_total 1\n# EOF\n";
        let text = "# HELP a_total Things that happened\n# TYPE a_total counter\na_total{x=\"y\"} 3\n\
                    # HELP b Seconds\n# TYPE b histogram\nb_sum 0.5\nb_count 1\nb_bucket{le=\"0.5\"} 1\nb_bucket{le=\"1\",x=\"y\"} 1\n\
                    # HELP c_total Not a counter\n# TYPE c_total gauge\nc_total 1\n";
        assert_eq!(prometheus(open), text);
    }
}
