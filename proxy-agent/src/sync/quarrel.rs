//! How soon what somebody else changed is repaired: at once, unless somebody changes it again and again.

use std::time::{Duration, Instant};

/// So many repairs come at once.
const AT_ONCE: u32 = 4;
/// Wait before the next one; doubles with each.
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// Longest wait, and the peace after which all is forgotten.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// Repairs that followed upon each other: whoever undoes them is not fought at full speed.
#[derive(Debug, Default)]
pub struct Quarrel {
    repairs: u32,
    last: Option<Instant>,
}

impl Quarrel {
    /// Something was repaired at `now`.
    pub fn repaired(&mut self, now: Instant) {
        let wait = self.wait();
        let is_over = self
            .last
            .is_none_or(|last| now.saturating_duration_since(last) > wait + LONGEST_WAIT);
        self.repairs = if is_over { 1 } else { self.repairs + 1 };
        self.last = Some(now);
    }

    /// When a change that was noticed at `now` is to be repaired.
    pub fn next(&self, now: Instant) -> Instant {
        self.last.map_or(now, |last| now.max(last + self.wait()))
    }

    fn wait(&self) -> Duration {
        match self.repairs.checked_sub(AT_ONCE) {
            None => Duration::ZERO,
            Some(more) => FIRST_WAIT
                .saturating_mul(1 << more.min(16))
                .min(LONGEST_WAIT),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_undoes_every_repair_at_once_is_answered_slower_and_slower_until_there_is_peace() {
        let mut quarrel = Quarrel::default();
        let mut now = Instant::now();
        let mut waits = Vec::new();
        for _ in 0..14 {
            let next = quarrel.next(now);
            waits.push((next - now).as_millis());
            now = next;
            quarrel.repaired(now);
        }
        let expected = [
            0, 0, 0, 0, 500, 1000, 2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000, 60_000,
        ];
        assert_eq!(waits, expected);
        now += 2 * LONGEST_WAIT + Duration::from_secs(1);
        assert_eq!(quarrel.next(now), now);
        quarrel.repaired(now);
        assert_eq!(quarrel.next(now), now);
    }
}
