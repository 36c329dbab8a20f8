//! Who hands out free slots and free indices. Pure bookkeeping: nothing here touches a map.

use std::collections::{BTreeMap, BTreeSet};

/// Free ranges of an array; best fit, neighbours are merged.
///
/// Everything at and beyond `next` has never been given out and needs no entry.
#[derive(Debug, Default)]
pub struct Extents {
    by_base: BTreeMap<u32, u32>,
    by_len: BTreeSet<(u32, u32)>,
    next: u32,
    free: u32,
}

impl Extents {
    /// The base of `len` free entries below `capacity`.
    pub fn take(&mut self, len: u32, capacity: u32) -> Option<u32> {
        if let Some(&(found, base)) = self.by_len.range((len, 0)..).next() {
            self.remove(base, found);
            if found > len {
                self.insert(base + len, found - len);
            }
            return Some(base);
        }
        let end = self.next.checked_add(len)?;
        if end > capacity {
            return None;
        }
        let base = self.next;
        self.next = end;
        Some(base)
    }

    /// Gives back entries that were taken, or that were never handed out because somebody else had them.
    pub fn release(&mut self, base: u32, len: u32) {
        let (mut base, mut len) = (base, len);
        if len == 0 {
            return;
        }
        if let Some((&before, &found)) = self.by_base.range(..base).next_back()
            && before + found == base
        {
            self.remove(before, found);
            (base, len) = (before, found + len);
        }
        if let Some(&found) = self.by_base.get(&(base + len)) {
            self.remove(base + len, found);
            len += found;
        }
        if base + len == self.next {
            self.next = base;
        } else {
            self.insert(base, len);
        }
    }

    /// Says that nothing below `end` is free unless it is released.
    pub fn start_at(end: u32) -> Self {
        Self {
            next: end,
            ..Self::default()
        }
    }

    /// Free entries below `capacity`, in ranges of any length.
    pub fn available(&self, capacity: u32) -> u32 {
        self.free + capacity.saturating_sub(self.next)
    }

    /// Which entries below `capacity` are free.
    pub fn free_map(&self, capacity: u32) -> Vec<bool> {
        let mut map = vec![false; capacity as usize];
        let tail = (self.next, capacity.saturating_sub(self.next));
        for (base, len) in self.by_base.iter().map(|(b, l)| (*b, *l)).chain([tail]) {
            if let Some(range) = map.get_mut(base as usize..(base + len) as usize) {
                range.fill(true);
            }
        }
        map
    }

    fn insert(&mut self, base: u32, len: u32) {
        self.by_base.insert(base, len);
        self.by_len.insert((len, base));
        self.free += len;
    }

    fn remove(&mut self, base: u32, len: u32) {
        self.by_base.remove(&base);
        self.by_len.remove(&(len, base));
        self.free -= len;
    }
}

/// Free indices of an array.
#[derive(Debug, Default)]
pub struct Pool {
    free: Vec<u32>,
    next: u32,
}

impl Pool {
    /// A free index below `capacity`.
    pub fn take(&mut self, capacity: u32) -> Option<u32> {
        if let Some(index) = self.free.pop() {
            return Some(index);
        }
        if self.next >= capacity {
            return None;
        }
        self.next += 1;
        Some(self.next - 1)
    }

    /// Gives back an index.
    pub fn release(&mut self, index: u32) {
        self.free.push(index);
    }

    /// Says that nothing below `end` is free unless it is released.
    pub fn start_at(end: u32) -> Self {
        Self {
            free: Vec::new(),
            next: end,
        }
    }

    /// Which indices below `capacity` are free.
    pub fn free_map(&self, capacity: u32) -> Vec<bool> {
        let mut map: Vec<_> = (0..capacity).map(|index| index >= self.next).collect();
        for index in &self.free {
            if let Some(free) = map.get_mut(*index as usize) {
                *free = true;
            }
        }
        map
    }

    /// Free indices below `capacity`.
    pub fn available(&self, capacity: u32) -> u32 {
        self.free.len() as u32 + capacity.saturating_sub(self.next)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_smallest_range_that_fits_is_taken() {
        let mut extents = Extents::default();
        let bases: Vec<_> = [8, 1, 3, 1, 5]
            .map(|len| extents.take(len, 18).unwrap())
            .into();
        assert_eq!(bases, [0, 8, 9, 12, 13]);
        assert_eq!(extents.take(1, 18), None);
        extents.release(0, 8);
        extents.release(9, 3);
        assert_eq!(extents.take(2, 18), Some(9));
        assert_eq!(extents.available(18), 9);
    }

    proptest! {
        #[test]
        fn ranges_in_use_never_overlap_and_everything_comes_back(
            steps in prop::collection::vec((1_u32..9, any::<prop::sample::Index>(), any::<bool>()), 1..200),
        ) {
            let (mut extents, mut used) = (Extents::default(), Vec::<(u32, u32)>::new());
            for (len, at, give_back) in steps {
                if give_back && !used.is_empty() {
                    let (base, len) = used.swap_remove(at.index(used.len()));
                    extents.release(base, len);
                } else if let Some(base) = extents.take(len, 64) {
                    prop_assert!(base + len <= 64);
                    prop_assert!(used.iter().all(|&(b, l)| base + len <= b || b + l <= base));
                    used.push((base, len));
                }
                let held: u32 = used.iter().map(|(_, len)| len).sum();
                prop_assert_eq!(extents.available(64), 64 - held);
            }
            for (base, len) in used {
                extents.release(base, len);
            }
            prop_assert_eq!(extents.take(64, 64), Some(0));
        }
    }
}
