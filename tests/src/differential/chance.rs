//! Numbers by chance, the same for the same seed (SplitMix64).

/// A sequence of them.
#[derive(Clone, Debug)]
pub(super) struct Chance(u64);

impl Chance {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(super) fn one_in(&mut self, of: u64) -> bool {
        self.next().is_multiple_of(of)
    }

    pub(super) fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        let length = choices.len() as u64;
        let at = usize::try_from(self.next() % length).expect("an index");
        choices[at]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_says_what_comes() {
        let numbers = |seed| {
            let mut chance = Chance::new(seed);
            [chance.next(), chance.next()]
        };
        assert_eq!(numbers(7), numbers(7));
        assert_ne!(numbers(7), numbers(8));
    }
}
