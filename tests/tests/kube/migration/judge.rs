//! Which failures there were, and whether they had to be.

use std::fmt;

use anyhow::ensure;
use proxy_tests::{
    flows::Client,
    load::{Failure, Record},
};

use super::{
    changes::Life,
    traffic::{Seen, Who},
};

/// A proxy that is told to stop may not have come to the changes of the last second.
const UNDONE_NS: u64 = 1_000_000_000;
/// Wrong ones that are spelled out.
const SHOWN: usize = 20;

/// Some time.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// [`proxy_tests::load::now_ns`].
    pub from_ns: u64,
    /// The same.
    pub until_ns: u64,
}

impl Span {
    fn contains(self, ns: u64) -> bool {
        (self.from_ns..=self.until_ns).contains(&ns)
    }
}

/// What may fail, and when.
#[derive(Debug, Default)]
pub struct Excuses {
    /// Neither proxy was there to follow changes.
    pub unfollowed: Vec<Span>,
    /// The sockets of the node believed an agent that was gone.
    pub lease: Option<Span>,
    /// kube-proxy had removed one kind of rules, and not yet written the other.
    pub gap: Option<Span>,
    /// Nothing of the agent was left: what fails is kube-proxy's.
    pub alone: Option<Span>,
}

/// How often what happened.
#[derive(Debug, Default)]
struct Counts {
    answered: usize,
    unfollowed: usize,
    lease: usize,
    gap: usize,
    alone: usize,
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            answered,
            unfollowed,
            lease,
            gap,
            alone,
        } = self;
        write!(
            f,
            "{answered} answered; to endpoints that were gone: {unfollowed} while nobody followed, {lease} while the lease ran \
             out; {gap} failed in kube-proxy's start-up gap, {alone} under kube-proxy alone"
        )
    }
}

/// An answer of a pod that is gone stands for a connection that failed. Everything has to be excused; what was is printed.
pub fn judge(name: &str, seen: &[Seen], lives: &[Life], excuses: &Excuses) -> anyhow::Result<()> {
    let mut wrong = Vec::new();
    for Seen {
        who,
        report,
        records,
    } in seen
    {
        let mut counts = Counts {
            answered: records.len(),
            ..Counts::default()
        };
        for record in records {
            let Some(life) = ended_before(record, lives) else {
                continue;
            };
            match excuses.of_late_answer(*who, record, life) {
                Some(Late::Unfollowed) => counts.unfollowed += 1,
                Some(Late::Lease) => counts.lease += 1,
                None => wrong.push(complaint(*who, record, life)),
            }
        }
        ensure!(
            report.failed == report.failures.len() as u64,
            "too many failures to look at"
        );
        for failure in &report.failures {
            let is_in = |span: Option<Span>| span.is_some_and(|of| of.contains(failure.start_ns));
            if is_in(excuses.gap) {
                counts.gap += 1;
            } else if is_in(excuses.alone) {
                counts.alone += 1;
            } else {
                wrong.push(describe(*who, failure));
            }
        }
        println!("{name}, {who}: {counts}");
        ensure!(counts.answered > 100, "{who:?} had hardly an answer");
    }
    let shown = &wrong[..wrong.len().min(SHOWN)];
    ensure!(
        wrong.is_empty(),
        "{} of these, with {excuses:#?}: {shown:#?}",
        wrong.len()
    );
    Ok(())
}

/// Everybody had an answer of an endpoint that had come in this time.
pub fn ensure_followed(seen: &[Seen], lives: &[Life], span: Span) -> anyhow::Result<()> {
    for Seen { who, records, .. } in seen {
        let is_new = |record: &Record| {
            let lives = lives.iter().filter(|life| life.identity == record.identity);
            let mut lives = lives.filter(|life| span.contains(life.from_ns));
            lives.any(|life| life.from_ns <= record.end_ns && record.end_ns <= span.until_ns)
        };
        ensure!(
            records.iter().any(is_new),
            "{who:?} met no new endpoint in {span:?}"
        );
    }
    Ok(())
}

enum Late {
    Unfollowed,
    Lease,
}

impl Excuses {
    /// Excused is who could not know: what the life's end followed from was told when nobody listened any more.
    fn of_late_answer(&self, who: Who, record: &Record, life: &Life) -> Option<Late> {
        let applies = |span: &Span| {
            span.contains(record.start_ns) && life.told_ns + UNDONE_NS >= span.from_ns
        };
        if self.unfollowed.iter().any(applies) {
            return Some(Late::Unfollowed);
        }
        let has_sockets = who.client != Client::Outside;
        (has_sockets && self.lease.as_ref().is_some_and(applies)).then_some(Late::Lease)
    }
}

/// The life of the pod that answered, if that was over when the connection began.
fn ended_before<'a>(record: &Record, lives: &'a [Life]) -> Option<&'a Life> {
    let mut own = lives.iter().filter(|life| life.identity == record.identity);
    let last = own.rfind(|life| life.from_ns <= record.end_ns)?;
    (last.ended_ns < record.start_ns).then_some(last)
}

fn complaint(who: Who, record: &Record, life: &Life) -> String {
    let late = (record.start_ns - life.ended_ns) / 1_000_000;
    let name = String::from_utf8_lossy(&record.identity);
    let name = name.trim_end_matches('\0');
    format!(
        "{who:?}, target {}, at {}: {name} answered {late} ms after it was gone",
        record.target, record.start_ns
    )
}

fn describe(who: Who, failure: &Failure) -> String {
    format!("{who:?}: {failure:?}")
}
