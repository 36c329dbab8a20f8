//! Checks who uses whom: `layers.toml` says for each module what it may use of its own crate, and which other crates it
//! must not name.
//!
//! Reads the source as text: comments are cut off, and so is everything after `#[cfg(test)]`, because tests may arrange
//! with anything. Paths that begin with `super` stay inside a layer by convention and are not followed.

use std::{
    collections::BTreeMap,
    fmt, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::process::Workspace;

/// Package → module → rule. The rule of the longest module path that a file lies under is its rule.
type Rules = BTreeMap<String, BTreeMap<String, Rule>>;

/// What one module may use.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    /// Modules of the same crate, with what is below them; its own is always allowed. `*` is all.
    may: Vec<String>,
    /// Modules of the same crate in spite of `may`, and other crates.
    #[serde(default)]
    not: Vec<String>,
    /// The sentence shown with a violation.
    why: String,
}

/// A line that breaks a rule.
#[derive(Debug, PartialEq, Eq)]
struct Violation {
    file: PathBuf,
    line: usize,
    module: String,
    used: String,
    why: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            file,
            line,
            module,
            used,
            why,
        } = self;
        write!(
            f,
            "{}:{line}: `{module}` must not use `{used}`: {why}",
            file.display()
        )
    }
}

/// `cargo xtask layers`.
///
/// # Errors
/// Every violation, with file and line; and modules without a rule.
pub fn check(workspace: &Workspace) -> Result<()> {
    let path = workspace.root.join("xtask/layers.toml");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let rules: Rules =
        toml::from_str(&text).with_context(|| format!("cannot read {}", path.display()))?;
    let mut wrong = Vec::new();
    let mut files = 0;
    for (package, rules) in &rules {
        let source = Path::new(package).join("src");
        for file in rust_files(&workspace.root, &source)? {
            let text = fs::read_to_string(workspace.root.join(&file))
                .with_context(|| format!("cannot read {}", file.display()))?;
            let module = module_of(file.strip_prefix(&source).unwrap_or(&file));
            files += 1;
            match rule_for(rules, &module) {
                Some(rule) => wrong.extend(
                    violations(rule, &module, &file, &text)
                        .iter()
                        .map(ToString::to_string),
                ),
                None => wrong.push(format!(
                    "{}: `{module}` has no rule in xtask/layers.toml",
                    file.display()
                )),
            }
        }
    }
    if wrong.is_empty() {
        println!("layers: {files} files keep to xtask/layers.toml");
        return Ok(());
    }
    bail!(
        "{} violations of xtask/layers.toml\n{}",
        wrong.len(),
        wrong.join("\n")
    )
}

/// All `.rs` files under a folder, relative to the root; tests apart.
fn rust_files(root: &Path, folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries = fs::read_dir(root.join(folder))
        .with_context(|| format!("cannot list {}", folder.display()))?;
    for entry in entries {
        let entry = entry?;
        let path = folder.join(entry.file_name());
        if path.file_stem().is_some_and(|stem| stem == "tests") {
            continue;
        }
        if entry.file_type()?.is_dir() {
            found.extend(rust_files(root, &path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// `backends/ebpf/maps.rs` → `backends::ebpf::maps`; `lib.rs` and `main.rs` are `lib` and `main`.
fn module_of(file: &Path) -> String {
    let parts: Vec<_> = file
        .with_extension("")
        .iter()
        .map(|part| part.to_string_lossy().into_owned())
        .collect();
    parts.join("::")
}

fn rule_for<'a>(rules: &'a BTreeMap<String, Rule>, module: &str) -> Option<&'a Rule> {
    rules
        .iter()
        .filter(|(name, _)| is_under(module, name))
        .max_by_key(|(name, _)| name.len())
        .map(|(_, rule)| rule)
}

/// `backends::ebpf::maps` is under `backends::ebpf` and under itself, not under `backends::eb`.
fn is_under(path: &str, above: &str) -> bool {
    path.strip_prefix(above)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

fn violations(rule: &Rule, module: &str, file: &Path, text: &str) -> Vec<Violation> {
    let code = code_of(text);
    let top = module.split("::").next().unwrap_or(module);
    let mut found = Vec::new();
    let mut report = |at: usize, used: String| {
        let line = code[..at].matches('\n').count() + 1;
        found.push(Violation {
            file: file.into(),
            line,
            module: module.into(),
            used,
            why: rule.why.clone(),
        });
    };
    for (at, path) in paths(&code, "crate") {
        // Inside a folder of modules all know each other, unless a rule for one of them says more.
        let own = is_under(&path, top) || !path.starts_with(|c: char| c.is_lowercase());
        let may = own
            || rule
                .may
                .iter()
                .any(|may| may == "*" || is_under(&path, may));
        if !may || rule.not.iter().any(|not| is_under(&path, not)) {
            report(at, format!("crate::{path}"));
        }
    }
    for name in &rule.not {
        for (at, path) in paths(&code, name) {
            report(at, format!("{name}::{path}"));
        }
    }
    found
}

/// The text with comments and tests blanked, line by line, so that positions give line numbers.
fn code_of(text: &str) -> String {
    let code = text.split("#[cfg(test)]").next().unwrap_or(text);
    let uncommented = |line: &str| line.split("//").next().unwrap_or(line).to_owned();
    code.lines().map(uncommented).collect::<Vec<_>>().join("\n")
}

/// All paths that begin with `head::`, groups taken apart, each with its position. `head` may have `::` itself.
fn paths(code: &str, head: &str) -> Vec<(usize, String)> {
    let start = format!("{head}::");
    let mut found = Vec::new();
    for (at, _) in code.match_indices(&start) {
        // `my_crate::` and `other::crate::` are something else.
        if code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':') {
            continue;
        }
        expand(code, at + start.len(), "", &mut found);
    }
    found
}

/// Reads one tree of a `use`, or a plain path; returns where it ends.
fn expand(code: &str, mut at: usize, above: &str, found: &mut Vec<(usize, String)>) -> usize {
    let begin = at;
    let mut path = above.to_owned();
    loop {
        let rest = &code[at..];
        let name = rest
            .find(|c: char| !(c.is_alphanumeric() || c == '_'))
            .unwrap_or(rest.len());
        path.push_str(&rest[..name]);
        at += name;
        if !code[at..].starts_with("::") {
            break;
        }
        at += 2;
        path.push_str("::");
    }
    if !code[at..].starts_with('{') {
        found.push((begin, path.trim_end_matches("::").to_owned()));
        return at;
    }
    at += 1;
    loop {
        at += code[at..].len()
            - code[at..]
                .trim_start_matches(|c: char| c.is_whitespace() || c == ',')
                .len();
        if code[at..].starts_with('}') || at >= code.len() {
            return (at + 1).min(code.len());
        }
        let end = expand(code, at, &path, found);
        // Past `as name`, `*`, and whatever else stands before the next comma or bracket.
        at = end + code[end..].find([',', '}']).unwrap_or(code.len() - end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(may: &[&str], not: &[&str]) -> Rule {
        let own = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Rule {
            may: own(may),
            not: own(not),
            why: "pure".into(),
        }
    }

    fn used(rule: &Rule, module: &str, text: &str) -> Vec<(usize, String)> {
        violations(rule, module, Path::new("x.rs"), text)
            .into_iter()
            .map(|v| (v.line, v.used))
            .collect()
    }

    #[test]
    fn a_module_outside_the_list_is_a_violation_at_its_line() {
        let text = "//! Pure.\n\nuse crate::model::Model;\nuse crate::backends::Backend;\n";
        let found = used(&rule(&["model"], &[]), "compile", text);
        assert_eq!(found, [(4, "crate::backends::Backend".to_owned())]);
    }

    #[test]
    fn groups_over_several_lines_are_taken_apart() {
        let text = "use crate::{\n    model::{Model, service::Port as P},\n    sources::{self, file::*},\n};\n";
        let found = used(&rule(&["model"], &[]), "compile", text);
        let lines: Vec<_> = found
            .iter()
            .map(|(line, used)| format!("{line} {used}"))
            .collect();
        assert_eq!(lines, ["3 crate::sources::self", "3 crate::sources::file"]);
    }

    #[test]
    fn a_denied_part_of_an_allowed_module_and_a_denied_crate_are_violations() {
        let text =
            "use aya::Ebpf;\nfn f(b: &crate::backends::ebpf::X, c: &crate::backends::Backend) {}\n";
        let found = used(
            &rule(&["backends"], &["backends::ebpf", "aya"]),
            "sync",
            text,
        );
        let names: Vec<_> = found.into_iter().map(|(_, used)| used).collect();
        assert_eq!(names, ["crate::backends::ebpf::X", "aya::Ebpf"]);
    }

    #[test]
    fn comments_tests_and_the_own_module_are_free() {
        let text = "// use crate::sync::X;\nuse crate::compile::frontends::F;\nuse crate::Error;\n\
            #[cfg(test)]\nmod tests { use crate::sync::X; }\n";
        assert_eq!(used(&rule(&[], &[]), "compile::endpoints", text), []);
    }

    #[test]
    fn the_rule_of_the_nearest_module_above_holds() {
        let rules = BTreeMap::from([
            ("backends".to_owned(), rule(&["state"], &[])),
            ("backends::ebpf".to_owned(), rule(&["plan"], &[])),
        ]);
        assert_eq!(
            rule_for(&rules, "backends::ebpf::maps").unwrap().may,
            ["plan"]
        );
        assert_eq!(rule_for(&rules, "backends::memory").unwrap().may, ["state"]);
        assert!(rule_for(&rules, "backends_of_others").is_none());
    }
}
