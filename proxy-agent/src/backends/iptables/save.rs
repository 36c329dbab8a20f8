//! What `iptables-save` says of one table: digests of our chains, and what others have to do with them.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hasher},
};

use super::{
    names::ChainName,
    rules::{
        base::{self, Anchor},
        found,
        tree::{Leaf, LeafKey},
    },
    tables::Table,
};
use crate::{backends::Error, state::Family};

/// Digest of the rules of a chain, in their order.
#[derive(Default)]
struct Digest(DefaultHasher);

impl Digest {
    fn add(&mut self, rule: &str) {
        self.0.write(rule.as_bytes());
        self.0.write_u8(b'\n');
    }
}

/// Digest of the rules of a chain, one a line.
pub(super) fn digest(body: &str) -> u64 {
    let mut digest = Digest::default();
    for rule in body.lines() {
        digest.add(rule);
    }
    digest.0.finish()
}

/// One table.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Saved {
    /// Our chains, with digests.
    pub(super) chains: BTreeMap<ChainName, u64>,
    /// Which of the wanted anchors are there.
    pub(super) anchors: BTreeSet<Anchor>,
    /// Chains of ours that rules in other people's chains jump to.
    pub(super) referenced: BTreeSet<ChainName>,
    /// What the chains of many Services dispatch.
    pub(super) leaves: Vec<(LeafKey, Leaf)>,
    /// kubelet's chain is there.
    pub(super) has_kubelet_firewall: bool,
    /// How many rules our chains have.
    pub(super) rules: usize,
}

/// One line that says something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Line<'a> {
    /// There is a chain: its name, and its policy, which is "-" unless it is built in.
    Chain(&'a str, &'a str),
    /// A chain has a rule.
    Rule(&'a str, &'a str),
}

impl<'a> Line<'a> {
    fn read(line: &'a str) -> Option<Self> {
        let line = line.trim_end();
        if let Some(declared) = line.strip_prefix(':') {
            let (name, rest) = declared.split_once(' ').unwrap_or((declared, ""));
            let policy = rest.split(' ').next().unwrap_or_default();
            return Some(Self::Chain(name, policy));
        }
        let rule = line.strip_prefix("-A ")?;
        let (chain, rule) = rule.split_once(' ').unwrap_or((rule, ""));
        Some(Self::Rule(chain, rule))
    }
}

/// Where the text of a table begins, and where it ends.
#[derive(Default)]
struct Frame {
    has_begun: bool,
    has_ended: bool,
}

impl Frame {
    fn add(&mut self, line: &str) {
        self.has_begun |= line.starts_with('*');
        self.has_ended |= line == "COMMIT";
    }

    fn check(&self, table: Table) -> Result<(), Error> {
        if self.has_begun && !self.has_ended {
            return Err(Error::Unusable(format!(
                "cannot read table {table}: the text of iptables-save ends in the middle"
            )));
        }
        Ok(())
    }
}

/// The lines of the text of one table.
///
/// # Errors
/// The text ends in the middle.
pub(super) fn lines(text: &str, table: Table) -> Result<impl Iterator<Item = Line<'_>>, Error> {
    let mut frame = Frame::default();
    text.lines().for_each(|line| frame.add(line));
    frame.check(table)?;
    Ok(text.lines().filter_map(Line::read))
}

/// Reads the text of one table, line by line.
pub(super) struct Reader<'a> {
    family: Family,
    table: Table,
    anchors: &'a [Anchor],
    frame: Frame,
    digests: BTreeMap<ChainName, Digest>,
    saved: Saved,
}

impl<'a> Reader<'a> {
    /// Looks for `anchors` among the rules of others.
    pub(super) fn new(family: Family, table: Table, anchors: &'a [Anchor]) -> Self {
        Self {
            family,
            table,
            anchors,
            frame: Frame::default(),
            digests: BTreeMap::new(),
            saved: Saved::default(),
        }
    }

    /// Takes the next line.
    pub(super) fn add(&mut self, line: &str) {
        self.frame.add(line);
        match Line::read(line) {
            Some(Line::Chain(name, _)) => {
                self.saved.has_kubelet_firewall |= name == base::KUBELET_FIREWALL.as_str();
                if let Some(name) = ours(self.table, name) {
                    self.digests.entry(name).or_default();
                }
            }
            Some(Line::Rule(chain, rule)) => match ours(self.table, chain) {
                Some(chain) => {
                    self.digests.entry(chain).or_default().add(rule);
                    self.saved.rules += 1;
                    let leaf = found::leaf(self.family, self.table, chain, rule);
                    self.saved.leaves.extend(leaf);
                }
                None => self.saved.foreign(self.table, chain, rule, self.anchors),
            },
            None => {}
        }
    }

    /// What the lines say.
    ///
    /// # Errors
    /// They end in the middle.
    pub(super) fn finish(mut self) -> Result<Saved, Error> {
        self.frame.check(self.table)?;
        let digests = self.digests.into_iter();
        self.saved.chains = digests
            .map(|(name, digest)| (name, digest.0.finish()))
            .collect();
        Ok(self.saved)
    }
}

/// The name of a chain, if it is ours.
pub(super) fn ours(table: Table, chain: &str) -> Option<ChainName> {
    ChainName::new(chain).filter(|chain| base::is_ours(table, *chain))
}

impl Saved {
    /// A rule in a chain that is not ours.
    fn foreign(&mut self, table: Table, chain: &str, rule: &str, anchors: &[Anchor]) {
        let found = anchors
            .iter()
            .find(|anchor| (anchor.chain, anchor.rule) == (chain, rule));
        if let Some(own) = found {
            self.anchors.insert(*own);
            return;
        }
        self.referenced
            .extend(target(rule).and_then(|target| ours(table, target)));
    }
}

/// The target of a rule, or the chain that it leads to.
pub(super) fn target(rule: &str) -> Option<&str> {
    let mut words = rule.split(' ');
    words.find(|word| ["-j", "-g"].contains(word))?;
    words.next()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str, anchors: &[Anchor]) -> Result<Saved, Error> {
        let mut reader = Reader::new(Family::V4, Table::Nat, anchors);
        text.lines().for_each(|line| reader.add(line));
        reader.finish()
    }

    const TEXT: &str = r#"# Generated by iptables-save v1.8.9 (nf_tables)
*nat
:PREROUTING ACCEPT [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-A - [0:0]
:KUBE-SVC-B - [0:0]
:MINE - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -s 10.0.0.0/8 -j MINE
-A KUBE-SERVICES -j KUBE-SVC-A
-A KUBE-SERVICES -j RETURN
-A MINE -d 10.1.0.1/32 -j KUBE-SVC-B
COMMIT
# Completed
"#;

    #[test]
    fn our_chains_are_digested_and_foreign_rules_only_noted() {
        let anchor = Anchor {
            chain: "PREROUTING",
            rule: r#"-m comment --comment "kubernetes service portals" -j KUBE-SERVICES"#,
        };
        let absent = Anchor {
            chain: "OUTPUT",
            ..anchor
        };
        let name = |name| ChainName::new(name).unwrap();
        let expected = Saved {
            chains: BTreeMap::from([
                (name("KUBE-SERVICES"), digest("-j KUBE-SVC-A\n-j RETURN\n")),
                (name("KUBE-SVC-A"), digest("")),
                (name("KUBE-SVC-B"), digest("")),
            ]),
            anchors: BTreeSet::from([anchor]),
            referenced: BTreeSet::from([name("KUBE-SVC-B")]),
            leaves: Vec::new(),
            has_kubelet_firewall: false,
            rules: 2,
        };
        assert_eq!(parse(TEXT, &[anchor, absent]).unwrap(), expected);
        assert_eq!(parse("", &[anchor]).unwrap(), Saved::default());
    }

    #[test]
    fn a_space_at_the_end_of_a_rule_says_nothing() {
        // iptables-nft 1.8.7 has one where a rule has no target.
        let text = "*nat\n:KUBE-SVC-A - [0:0]\n-A KUBE-SVC-A -m mark --mark 0x1/0x1 \nCOMMIT\n";
        let saved = parse(text, &[]).unwrap();
        let found: Vec<u64> = saved.chains.into_values().collect();
        assert_eq!(found, [digest("-m mark --mark 0x1/0x1\n")]);
    }

    #[test]
    fn half_a_text_is_an_error() {
        let half = TEXT.strip_suffix("COMMIT\n# Completed\n").unwrap();
        assert!(parse(half, &[]).is_err());
    }
}
