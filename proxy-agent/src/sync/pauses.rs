//! How long a layer waits: after errors, and for the next look at the kernel.

use std::time::Duration;

/// After the first of a row of errors; doubles with each.
const FIRST_RETRY: Duration = Duration::from_millis(10);
/// After an error at most.
const LAST_RETRY: Duration = Duration::from_secs(30);
/// Between two audits of the kernel, if it is read in no time.
pub const AUDIT_EVERY: Duration = Duration::from_secs(60);
/// An audit waits so many times as long as the last one took: rules of 100,000 endpoints take seconds, in which no change is
/// carried out.
const AUDIT_PAUSE: u32 = 20;

/// When what has failed so often before is tried again.
pub fn retry_after(failures: u32) -> Duration {
    FIRST_RETRY
        .saturating_mul(1 << failures.min(16))
        .min(LAST_RETRY)
}

/// When the next audit follows one that took this long.
pub fn audit_after(took: Duration) -> Duration {
    AUDIT_EVERY.max(took.saturating_mul(AUDIT_PAUSE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_audit_takes_a_twentieth_of_the_time_at_most() {
        let seconds = Duration::from_secs;
        for (took, after) in [(0, 60), (3, 60), (4, 80), (20, 400)] {
            assert_eq!(audit_after(seconds(took)), seconds(after));
        }
    }

    #[test]
    fn errors_are_answered_slower_and_slower_but_not_for_ever() {
        assert_eq!(retry_after(0), FIRST_RETRY);
        assert_eq!(retry_after(1), 2 * FIRST_RETRY);
        assert_eq!(retry_after(60), LAST_RETRY);
    }
}
