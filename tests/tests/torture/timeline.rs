//! What was true when, and which answers it allows.

use std::{collections::BTreeSet, time::Duration};

use proxy_tests::load::{Record, now_ns};

/// How long an endpoint may still answer after the file that removed it was in place: 100 ms, the 20 ms of quiet that
/// the agent waits for, and as much for a test that shares its cores with the load.
pub const GRACE: Duration = Duration::from_millis(140);

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
pub struct Timeline(Vec<Round>);

impl Timeline {
    /// Says that `truth` is about to be made true, before its file is written.
    pub fn begin(&mut self, truth: Truth) {
        self.0.push(Round {
            from_ns: now_ns(),
            until_ns: u64::MAX,
            truth,
        });
    }

    /// Says that the file is in place, and the agent alive: the earlier truths end.
    pub fn replaced(&mut self) {
        let until_ns = now_ns();
        let count = self.0.len().saturating_sub(1);
        for round in self
            .0
            .iter_mut()
            .take(count)
            .rev()
            .take_while(|r| r.until_ns == u64::MAX)
        {
            round.until_ns = until_ns;
        }
    }

    /// Rounds so far.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Why an answer was wrong; none if it was right.
    pub fn judge(&self, record: &Record) -> Option<String> {
        let grace = u64::try_from(GRACE.as_nanos()).unwrap_or(u64::MAX);
        let target = usize::try_from(record.target).ok()?;
        let allowed = |round: &Round| {
            let service = round.truth.owner.get(target);
            let members = service.and_then(|service| round.truth.members.get(*service));
            members.is_some_and(|members| members.contains(&record.identity))
        };
        // Rounds begin in order; those that began after the answer cannot matter.
        let began = self
            .0
            .partition_point(|round| round.from_ns <= record.end_ns);
        let mut stale_ns = None;
        for round in self.0.iter().take(began).rev() {
            if allowed(round) {
                let late = record.start_ns.saturating_sub(round.until_ns);
                if late <= grace {
                    return None;
                }
                stale_ns = Some(late);
                break;
            }
        }
        let who = String::from_utf8_lossy(&record.identity)
            .trim_end_matches('\0')
            .to_owned();
        Some(match stale_ns {
            Some(late) => format!(
                "{who} answered target {target}, {} ms after it was removed",
                late / 1_000_000
            ),
            None => format!("{who} answered target {target}, whose Service it never belonged to"),
        })
    }
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
        let end = timeline.0[0].until_ns;
        let record = |at_ns, name| Record {
            start_ns: at_ns,
            end_ns: at_ns + 1,
            target: 0,
            identity: Record::identity_of(name),
        };
        let grace = u64::try_from(GRACE.as_nanos()).unwrap();
        assert_eq!(timeline.judge(&record(end + grace, "a")), None);
        assert_eq!(timeline.judge(&record(end + grace, "b")), None);
        assert!(timeline.judge(&record(end + grace + 1, "a")).is_some());
        assert!(timeline.judge(&record(end, "c")).is_some());
        assert!(timeline.judge(&record(0, "b")).is_some());
    }
}
