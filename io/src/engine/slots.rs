//! Who is told when an operation completes: a slab of sinks, named by index and generation.
//!
//! S1. A taken slot is free: each operation completes exactly once. A completion whose generation
//!     does not match names a slot that was reused, which is a bug of ours or of the kernel.

use super::{OpId, Sink};
use std::rc::Rc;

const NO_SLOT: u32 = u32::MAX;

struct Slot {
    generation: u32,
    /// The next free slot, while this one is free.
    next_free: u32,
    is_poll: bool,
    token: u64,
    sink: Option<Rc<dyn Sink>>,
}

/// The slab.
pub(super) struct Slots {
    list: Vec<Slot>,
    free: u32,
    busy: usize,
}

impl Slots {
    pub(super) fn new() -> Slots {
        Slots { list: Vec::new(), free: NO_SLOT, busy: 0 }
    }

    /// How many operations have not completed.
    pub(super) fn busy(&self) -> usize {
        self.busy
    }

    pub(super) fn insert(&mut self, sink: Rc<dyn Sink>, token: u64, is_poll: bool) -> OpId {
        self.busy += 1;
        if self.free == NO_SLOT {
            let index = u32::try_from(self.list.len()).expect("memory ends before the indices do");
            self.list.push(Slot {
                generation: 0,
                next_free: NO_SLOT,
                is_poll,
                token,
                sink: Some(sink),
            });
            return OpId::new(index, 0);
        }
        let index = self.free;
        let slot = &mut self.list[index as usize];
        self.free = slot.next_free;
        slot.is_poll = is_poll;
        slot.token = token;
        slot.sink = Some(sink);
        OpId::new(index, slot.generation)
    }

    /// Frees the slot and says whom to tell (S1).
    pub(super) fn take(&mut self, id: OpId) -> Option<(Rc<dyn Sink>, u64)> {
        let slot = self.list.get_mut(id.index() as usize)?;
        if slot.generation != id.generation() {
            return None;
        }
        let sink = slot.sink.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        slot.next_free = self.free;
        self.free = id.index();
        self.busy -= 1;
        Some((sink, slot.token))
    }

    /// Whether the operation has not completed.
    pub(super) fn is_busy(&self, id: OpId) -> bool {
        self.list
            .get(id.index() as usize)
            .is_some_and(|slot| slot.generation == id.generation() && slot.sink.is_some())
    }

    /// All operations that have not completed, or only those that wait for readiness.
    pub(super) fn all_busy(&self, only_polls: bool) -> Vec<OpId> {
        (0..)
            .zip(&self.list)
            .filter(|(_, slot)| slot.sink.is_some() && (slot.is_poll || !only_polls))
            .map(|(index, slot)| OpId::new(index, slot.generation))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nobody;
    impl Sink for Nobody {
        fn complete(&self, _: u64, _: i32) {}
    }

    #[test]
    fn a_completion_takes_its_slot_once_and_a_stale_name_takes_nothing() {
        let mut slots = Slots::new();
        let first = slots.insert(Rc::new(Nobody), 7, false);
        assert!(slots.is_busy(first));
        assert_eq!(slots.take(first).map(|(_, token)| token), Some(7));
        assert!(slots.take(first).is_none());
        let second = slots.insert(Rc::new(Nobody), 8, true);
        assert_eq!(second.index(), first.index(), "the slot is reused");
        assert!(!slots.is_busy(first));
        assert!(slots.take(first).is_none());
        let third = slots.insert(Rc::new(Nobody), 9, false);
        assert_eq!(slots.all_busy(true), [second]);
        assert_eq!(slots.all_busy(false), [second, third]);
        assert_eq!(slots.busy(), 2);
    }
}
