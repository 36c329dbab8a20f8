//! `check`: can this node run eBPF, and is the kernel's state what it should be?

use std::collections::BTreeMap;

use proxy_ebpf::abi::{ABI_VERSION, Meta, meta_flags};
use serde::Serialize;

use super::{
    desired::Desired,
    print::{Report, columns},
    rehearse::Rehearsal,
};
use crate::{
    backends::{
        Error,
        ebpf::probe,
        iptables::host::{Choice, affinity::AffinityRoom, is_in_kernel},
    },
    state::Family,
};

const NS_PER_SECOND: u64 = 1_000_000_000;
/// The agent writes its heartbeat every second; this much later it is late, not merely busy.
const LATE_SECONDS: u64 = 5;

/// Verdict on one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// Worth knowing, no trouble by itself.
    Note,
    /// Not what it should be.
    Differs,
    /// Lacking: the agent cannot run without it.
    Missing,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub what: String,
    /// Verdict.
    pub state: State,
    /// What was seen, and what to do about it.
    pub detail: String,
}

impl Finding {
    /// A finding.
    pub fn new(what: impl Into<String>, state: State, detail: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            state,
            detail: detail.into(),
        }
    }
}

/// `check`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Findings(pub Vec<Finding>);

impl Findings {
    /// The worst of all.
    pub fn worst(&self) -> State {
        self.0
            .iter()
            .map(|finding| finding.state)
            .max()
            .unwrap_or(State::Ok)
    }
}

impl Report for Findings {
    fn table(&self) -> String {
        let row = |finding: &Finding| {
            let state = match finding.state {
                State::Ok => "ok",
                State::Note => "note",
                State::Differs => "DIFFERS",
                State::Missing => "MISSING",
            };
            [
                finding.what.clone(),
                state.to_owned(),
                finding.detail.clone(),
            ]
        };
        columns(
            ["WHAT", "STATE", "DETAIL"],
            &self.0.iter().map(row).collect::<Vec<_>>(),
        )
    }
}

/// What the node offers the socket layer. What is missing is worth a note only where none `is_wanted`.
pub fn node(report: &probe::Report, is_wanted: bool) -> Vec<Finding> {
    let kernel = Finding::new("kernel", State::Ok, report.kernel.clone());
    let missing = report.missing.iter().map(|missing| {
        let state = if missing.is_required && is_wanted {
            State::Missing
        } else {
            State::Note
        };
        Finding::new(missing.need.to_string(), state, missing.text.clone())
    });
    let usable = report
        .is_usable()
        .then(|| Finding::new("socket layer", State::Ok, "this node can run it"));
    std::iter::once(kernel)
        .chain(missing)
        .chain(usable)
        .collect()
}

/// What the node offers the packet layer, and whether the agent `is_lost` without it.
pub fn packets(choice: &Result<Choice, Error>, is_lost: bool) -> Vec<Finding> {
    let finding = |state, detail| Finding::new("packet layer", state, detail);
    match choice {
        Ok(Choice {
            variant,
            why,
            version,
            stale,
        }) => {
            let usable = format!("iptables {version}, {variant}: {why}");
            let stale = stale.map(|stale| finding(State::Differs, stale.to_string()));
            std::iter::once(finding(State::Ok, usable))
                .chain(stale)
                .collect()
        }
        Err(error) if is_lost => vec![finding(State::Missing, error.to_string())],
        Err(error) => vec![finding(State::Note, error.to_string())],
    }
}

/// The families that the packet layer cannot serve, and why.
pub fn families(lacks: &BTreeMap<Family, String>) -> impl Iterator<Item = Finding> {
    lacks.iter().map(|(family, error)| {
        let state = match is_in_kernel(*family) {
            true => State::Missing,
            false => State::Note,
        };
        let detail = format!("what arrives over {family} is not served: {error}");
        Finding::new("packet layer", state, detail)
    })
}

/// Whether session affinity holds for as many clients as it should.
pub fn affinity(room: AffinityRoom) -> Finding {
    let state = match room {
        AffinityRoom::Sets => State::Ok,
        AffinityRoom::Lists(_) | AffinityRoom::None => State::Note,
    };
    Finding::new("session affinity", state, room.to_string())
}

/// What is wrong in the sources.
pub fn sources(desired: &Desired) -> Vec<Finding> {
    let broken = desired
        .broken
        .iter()
        .map(|problem| Finding::new("source", State::Differs, problem.to_string()));
    let problems = desired
        .problems
        .iter()
        .map(|problem| Finding::new("services", State::Differs, problem.to_string()));
    broken.chain(problems).collect()
}

/// What the source asks for and a layer lacks, or the other way round.
pub fn drift(Rehearsal { layer, changes }: &Rehearsal) -> Finding {
    let what = format!("{layer} layer's state");
    let Some(first) = changes.first() else {
        return Finding::new(what, State::Ok, "is what the source asks for");
    };
    let count = changes.len();
    let detail = format!(
        "{count} differ from the source, the first: {} {}; `proxy-agent plan` lists them",
        first.action, first.object
    );
    Finding::new(what, State::Differs, detail)
}

/// What META says of the maps and their agent. `now_ns` is CLOCK_MONOTONIC.
pub fn maps(meta: &Meta, now_ns: u64) -> Vec<Finding> {
    let version = if meta.abi_version == ABI_VERSION {
        Finding::new("layout", State::Ok, format!("version {ABI_VERSION}"))
    } else {
        let found = meta.abi_version;
        let detail = format!(
            "version {found}, this agent has {ABI_VERSION}: `run` moves the maps over without a gap"
        );
        Finding::new("layout", State::Differs, detail)
    };
    let complete = if meta.flags & meta_flags::COMPLETE != 0 {
        Finding::new(
            "maps",
            State::Ok,
            format!("complete, generation {}", meta.generation),
        )
    } else {
        Finding::new(
            "maps",
            State::Differs,
            "never filled completely: the hooks translate nothing; start the agent, its log says why",
        )
    };
    vec![version, complete, agent(meta, now_ns)]
}

fn agent(meta: &Meta, now_ns: u64) -> Finding {
    let age = now_ns.saturating_sub(meta.heartbeat_ns) / NS_PER_SECOND;
    let lease = meta.lease_ns / NS_PER_SECOND;
    match (meta.heartbeat_ns, age) {
        (0, _) => Finding::new("agent", State::Note, "none has vouched for these maps yet"),
        (_, age) if age <= LATE_SECONDS => Finding::new(
            "agent",
            State::Ok,
            format!("alive, last heartbeat {age} s ago"),
        ),
        (_, age) if lease > 0 && age >= lease => Finding::new(
            "agent",
            State::Differs,
            format!(
                "gone for {age} s, longer than the lease of {lease} s: connections go to the packet layer; start the agent"
            ),
        ),
        (_, age) => Finding::new(
            "agent",
            State::Note,
            format!("no heartbeat for {age} s: not running; what is in the maps goes on serving"),
        ),
    }
}

/// Which hooks are attached, each with the id of its program. `needed` are those that the socket layer cannot do without.
pub fn hooks(attached: &BTreeMap<&'static str, u32>, needed: &[&'static str]) -> Finding {
    let missing: Vec<&str> = needed
        .iter()
        .filter(|hook| !attached.contains_key(*hook))
        .copied()
        .collect();
    if missing.is_empty() {
        let names: Vec<&str> = attached.keys().copied().collect();
        return Finding::new("hooks", State::Ok, names.join(", "));
    }
    Finding::new(
        "hooks",
        State::Differs,
        format!("not attached: {}; start the agent", missing.join(", ")),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backends::iptables::host::{Stale, Variant};
    use crate::debug::fixture::{NOW_NS, contents};

    fn states(meta: &Meta) -> Vec<State> {
        maps(meta, NOW_NS)
            .iter()
            .map(|finding| finding.state)
            .collect()
    }

    #[test]
    fn complete_maps_with_a_living_agent_are_as_they_should_be() {
        assert_eq!(states(&contents().meta), [State::Ok; 3]);
    }

    #[test]
    fn an_absent_agent_is_a_note_until_the_lease_is_over() {
        let mut meta = contents().meta;
        meta.heartbeat_ns = NOW_NS - 40 * NS_PER_SECOND;
        assert_eq!(states(&meta)[2], State::Note);
        meta.lease_ns = 30 * NS_PER_SECOND;
        let findings = maps(&meta, NOW_NS);
        assert_eq!(findings[2].state, State::Differs);
        assert!(
            findings[2].detail.contains("gone for 40 s"),
            "{}",
            findings[2].detail
        );
        meta.flags = 0;
        meta.abi_version = ABI_VERSION + 1;
        assert_eq!(states(&meta), [State::Differs; 3]);
    }

    #[test]
    fn tools_that_nothing_works_without_are_missing() {
        let none = || Err(Error::Unusable("iptables is not in PATH".to_owned()));
        assert_eq!(packets(&none(), true)[0].state, State::Missing);
        assert_eq!(packets(&none(), false)[0].state, State::Note);
    }

    #[test]
    fn a_family_that_cannot_be_served_is_missing() {
        let lacks = BTreeMap::from([(Family::V4, "no such table".to_owned())]);
        let findings: Vec<_> = families(&lacks).collect();
        assert_eq!(findings[0].state, State::Missing);
        let said = "what arrives over IPv4 is not served: no such table";
        assert_eq!(findings[0].detail, said);
    }

    #[test]
    fn stale_rules_in_the_other_variant_differ() {
        let mut choice = Choice {
            variant: Variant::Nft,
            why: "it has 9 rules, legacy 3".to_owned(),
            version: "1.8.9".to_owned(),
            stale: None,
        };
        let states = |choice: &Choice| {
            let findings = packets(&Ok(choice.clone()), true).into_iter();
            findings.map(|finding| finding.state).collect::<Vec<_>>()
        };
        assert_eq!(states(&choice), [State::Ok]);
        choice.stale = Some(Stale {
            kept: Variant::Nft,
            holds: Variant::Legacy,
        });
        assert_eq!(states(&choice), [State::Ok, State::Differs]);
    }

    #[test]
    fn a_hook_that_is_not_attached_is_named() {
        let attached = BTreeMap::from([("connect4", 7)]);
        assert_eq!(hooks(&attached, &["connect4"]).state, State::Ok);
        let finding = hooks(&attached, &["connect4", "sendmsg4"]);
        assert_eq!(finding.detail, "not attached: sendmsg4; start the agent");
        let findings = Findings(vec![hooks(&attached, &["connect4"]), finding]);
        assert_eq!(findings.worst(), State::Differs);
        assert!(findings.table().contains("DIFFERS"));
    }
}
