//! What `iptables-restore` says when it refuses a transaction: each variant and version in words of its own.

use super::{Output, run::end};

/// Exit code of a tool that did not get the lock (`RESOURCE_PROBLEM`, include/xtables.h).
const RESOURCE_PROBLEM: i32 = 4;

/// Whether the tool gave up waiting for the lock.
pub fn is_locked(output: &Output) -> bool {
    output.code == Some(RESOURCE_PROBLEM) && output.stderr.contains("xtables lock")
}

/// Number of the refused line, counted from 1.
///
/// The forms: "line 5 failed", "Error occurred at line: 5", "line 5: RULE_APPEND failed (…)", "COMMIT expected at line 5".
pub fn line(stderr: &str) -> Option<usize> {
    let mut words = stderr.split_whitespace();
    let mut found = None;
    while let Some(word) = words.next() {
        if matches!(word, "line" | "line:")
            && let Some(number) = words.next()
        {
            let digits = number.trim_end_matches(|c: char| !c.is_ascii_digit());
            found = found.or_else(|| digits.parse().ok());
        }
    }
    found
}

/// What it says, as one line without the usage hint; how it ended, where it says nothing.
pub fn message(output: &Output) -> String {
    let lines = output.stderr.lines().map(str::trim);
    let said = lines.filter(|line| !line.is_empty() && !line.starts_with("Try `"));
    let said = said.collect::<Vec<_>>().join("; ");
    match said.is_empty() {
        true => format!("it ended with {}", end(output)),
        false => said,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_found_in_the_words_of_each_variant() {
        for (text, expected) in [
            ("iptables-restore: line 5 failed\n", Some(5)),
            (
                "iptables-restore v1.8.9 (legacy): Couldn't load match `x'\n\nError occurred at line: 3\nTry `iptables-restore -h' or 'iptables-restore --help' for more information.\n",
                Some(3),
            ),
            (
                "iptables-restore v1.8.9 (nf_tables): \nline 4: RULE_APPEND failed (No such file or directory): rule in chain KUBE-SVC-A\n",
                Some(4),
            ),
            ("ip6tables-restore: COMMIT expected at line 7\n", Some(7)),
            ("iptables-restore: unable to initialize table 'nat'\n", None),
        ] {
            assert_eq!(line(text), expected, "{text}");
        }
    }

    #[test]
    fn the_message_is_one_line_without_hints_and_never_empty() {
        let said = |stderr: &str| {
            message(&Output {
                signal: Some(9),
                stderr: stderr.to_owned(),
                ..Output::default()
            })
        };
        let text = "a: no such match\n\nError occurred at line: 3\nTry `a -h' for more.\n";
        assert_eq!(said(text), "a: no such match; Error occurred at line: 3");
        assert_eq!(said(""), "it ended with signal 9");
    }

    #[test]
    fn only_the_lock_is_taken_for_the_lock() {
        let output = |code, stderr: &str| Output {
            code: Some(code),
            stderr: stderr.to_owned(),
            ..Output::default()
        };
        let held = "Another app is currently holding the xtables lock. Stopped waiting after 5s.";
        assert!(is_locked(&output(4, held)));
        assert!(!is_locked(&output(4, "line 3: RULE_APPEND failed")));
        assert!(!is_locked(&output(1, held)));
    }
}
