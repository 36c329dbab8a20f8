//! What was true when, and which answers it allows.

use std::collections::BTreeSet;

use proxy_tests::load::{Record, now_ns};

use super::stalls::Stalls;

/// How long an endpoint may still answer after the file that removed it was in place: 100 ms, the 20 ms of quiet that
/// the agent waits for, and as much for a test that shares its cores with the load. Time in which a core was away does not
/// count.
const GRACE_NS: u64 = 140_000_000;

/// How far back the changes reach that an agent may leave undone when it is killed on a busy machine.
const UNDONE_NS: u64 = 1_000_000_000;

/// Which identities a Service's endpoints have.
pub type Members = BTreeSet<[u8; 8]>;

/// Who may answer at each target, from one moment on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Truth {
    /// Service of each target.
    pub owner: Vec<usize>,
    /// Endpoints of each Service.
    pub members: Vec<Members>,
}

#[derive(Debug)]
struct Round {
    from_ns: u64,
    until_ns: u64,
    truth: Truth,
}

/// All truths in order.
#[derive(Debug, Default)]
pub struct Timeline {
    rounds: Vec<Round>,
    stalls: Stalls,
}

impl Timeline {
    /// Says that `truth` is about to be made true, before its file is written.
    pub fn begin(&mut self, truth: Truth) {
        self.rounds.push(Round {
            from_ns: now_ns(),
            until_ns: u64::MAX,
            truth,
        });
    }

    /// Says that the file is in place, and the agent alive: the earlier truths end.
    pub fn replaced(&mut self) {
        let until_ns = now_ns();
        let count = self.rounds.len().saturating_sub(1);
        for round in self
            .rounds
            .iter_mut()
            .take(count)
            .rev()
            .take_while(|r| r.until_ns == u64::MAX)
        {
            round.until_ns = until_ns;
        }
    }

    /// Says that the agent is dead: it may not have come to the last changes, so what was true before them goes on.
    pub fn frozen(&mut self) {
        let since = now_ns().saturating_sub(UNDONE_NS);
        for round in self
            .rounds
            .iter_mut()
            .filter(|round| round.until_ns >= since)
        {
            round.until_ns = u64::MAX;
        }
    }

    /// Takes note of when a core was away.
    pub fn excuse(&mut self, stalls: Stalls) {
        self.stalls = stalls;
    }

    /// Rounds so far.
    pub fn len(&self) -> usize {
        self.rounds.len()
    }

    /// Whether an answer was right. Which Service has an address and which endpoints a Service has are two facts, and
    /// either may be as old as the grace: they do not change in one step in the kernel.
    pub fn allows(&self, record: &Record) -> bool {
        let member = |round: &Round, owner| is_member(round, owner, record);
        let both = |round: &Round| owner(round, record).is_some_and(|owner| member(round, owner));
        self.recent(record).any(both)
            || self.recent(record).any(|round| {
                let owner = owner(round, record);
                owner.is_some_and(|owner| self.recent(record).any(|round| member(round, owner)))
            })
    }

    /// Why an answer was wrong.
    pub fn complaint(&self, record: &Record) -> String {
        let owners: BTreeSet<_> = self
            .recent(record)
            .filter_map(|round| owner(round, record))
            .collect();
        let belonged = |round: &&Round| owners.iter().any(|&owner| is_member(round, owner, record));
        let last = self
            .rounds
            .iter()
            .take(self.began(record))
            .rev()
            .find(belonged);
        let who = String::from_utf8_lossy(&record.identity);
        let (who, target) = (who.trim_end_matches('\0'), record.target);
        match last.map(|round| self.late_ns(round, record) / 1_000_000) {
            Some(late) => format!("{who} answered target {target} {late} ms after it was removed"),
            None => format!("{who} answered target {target} of {owners:?}"),
        }
    }

    /// Rounds that may have been true while the answer was on its way, the latest first.
    fn recent(&self, record: &Record) -> impl Iterator<Item = &Round> {
        let rounds = self.rounds.iter().take(self.began(record)).rev();
        rounds.take_while(|round| self.late_ns(round, record) <= GRACE_NS)
    }

    /// How long a round had been over when the connection began.
    fn late_ns(&self, round: &Round, record: &Record) -> u64 {
        let late = record.start_ns.saturating_sub(round.until_ns);
        late.saturating_sub(self.stalls.within(round.until_ns, record.start_ns))
    }

    /// Rounds begin in order; those that began after the answer cannot matter.
    fn began(&self, record: &Record) -> usize {
        self.rounds
            .partition_point(|round| round.from_ns <= record.end_ns)
    }
}

fn owner(round: &Round, record: &Record) -> Option<usize> {
    round
        .truth
        .owner
        .get(usize::try_from(record.target).ok()?)
        .copied()
}

fn is_member(round: &Round, service: usize, record: &Record) -> bool {
    let members = round.truth.members.get(service);
    members.is_some_and(|members| members.contains(&record.identity))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_right_until_a_grace_after_its_endpoint_went() {
        let truth = |name: &str| Truth {
            owner: vec![0],
            members: vec![BTreeSet::from([Record::identity_of(name)])],
        };
        let mut timeline = Timeline::default();
        timeline.begin(truth("a"));
        timeline.begin(truth("b"));
        timeline.replaced();
        let end = timeline.rounds[0].until_ns;
        let record = |at_ns, name| Record {
            start_ns: at_ns,
            end_ns: at_ns + 1,
            target: 0,
            identity: Record::identity_of(name),
        };
        assert!(timeline.allows(&record(end + GRACE_NS, "a")));
        assert!(timeline.allows(&record(end + GRACE_NS, "b")));
        assert!(!timeline.allows(&record(end + GRACE_NS + 1, "a")));
        assert!(!timeline.allows(&record(end, "c")));
        assert!(!timeline.allows(&record(0, "b")));
    }
}
