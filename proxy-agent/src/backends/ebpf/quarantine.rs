//! What was freed, but may still be held by a reader.

use std::collections::VecDeque;

use super::store::{Capacity, Store};

/// Something that was freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freed {
    /// Index into SERVICES.
    Service(u32),
    /// Index into MEMBERS.
    Member(u32),
    /// Slots.
    Slots {
        /// The first.
        base: u32,
        /// How many.
        len: u32,
    },
}

/// What waits for a grace period.
#[derive(Debug, Default)]
pub struct Quarantine {
    /// No grace period has been started for these.
    new: Vec<Freed>,
    /// With the grace period that has to be over; numbers ascend.
    waiting: VecDeque<(u64, Freed)>,
    size: Capacity,
}

impl Quarantine {
    /// Puts something in.
    pub fn push(&mut self, freed: Freed) {
        self.count(freed, u32::wrapping_add);
        self.new.push(freed);
    }

    /// Starts the grace period of everything put in since the last one.
    pub fn start_grace(&mut self, store: &mut impl Store) {
        if !self.new.is_empty() {
            let number = store.start_grace();
            self.waiting
                .extend(self.new.drain(..).map(|freed| (number, freed)));
        }
    }

    /// Takes out something whose grace period is over, `over` being the last of those.
    pub fn pop(&mut self, over: u64) -> Option<Freed> {
        let (_, freed) = self.waiting.pop_front_if(|(number, _)| *number <= over)?;
        self.count(freed, u32::wrapping_sub);
        Some(freed)
    }

    /// The grace period that ends first.
    pub fn oldest(&self) -> Option<u64> {
        self.waiting.front().map(|(number, _)| *number)
    }

    /// How many services, members and slots are in here.
    pub fn size(&self) -> Capacity {
        self.size
    }

    fn count(&mut self, freed: Freed, change: fn(u32, u32) -> u32) {
        let (size, by) = match freed {
            Freed::Service(_) => (&mut self.size.services, 1),
            Freed::Member(_) => (&mut self.size.members, 1),
            Freed::Slots { len, .. } => (&mut self.size.slots, len),
        };
        *size = change(*size, by);
    }
}
