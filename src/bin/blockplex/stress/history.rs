//! What one sector may contain, given the operations on it.
//!
//! All operations on a sector that change it are begun and ended by the thread
//! that owns it, so their order is known. They may overlap; then the sector
//! gets one of their values, nobody knows which until it is read. A
//! [`History`] keeps every value that may still be seen, by the rules of an
//! atomic register, sector by sector:
//!
//! - R1: a read may return a write's value only if the write began before the
//!   read ended.
//! - R2: a value is *dead* from the end of a later write on, if that write began
//!   after the value's own write had ended. A read that begins then must not
//!   return it; one that began before may.
//! - R3: once a read has returned a value, every value whose write had ended
//!   before that read began has been replaced by it, and is dead from then on.
//!   So what was read once does not change back.
//! - R4: an operation that may or may not have an effect (a discard, or one that
//!   failed) adds its value but kills none.
//!
//! Times are a counter of the owner that rises with every begin and end, so no
//! two are equal.
//!
//! Without reads in flight there are at most about twice as many values as there
//! were operations in flight at a time; a read in flight adds those written
//! since it began, all of which it may return.
//!
//! One thing the promise "old or new, sector by sector" cannot be held to: while
//! a write is in flight, the host's page cache may give a read part of a sector
//! old and part of it new. So a damaged sector is a fault only if no write
//! overlapped the read.

/// The content of a sector: the sequence number of the write that made it, or
/// zero for zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Value(pub u64);

impl Value {
    /// Zeroes.
    pub const ZERO: Self = Self(0);
}

/// What is left of a history when nothing is in flight: a value, or that value
/// or zeroes. Eight bytes, because a disk has many sectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rest(u64);

impl Rest {
    const OR_ZERO: u64 = 1 << 63;

    fn new(value: Value, or_zero: bool) -> Self {
        // A sequence number never gets there: at one a nanosecond it would take
        // 292 years.
        debug_assert!(value.0 < Self::OR_ZERO);
        Self(value.0 | if or_zero { Self::OR_ZERO } else { 0 })
    }

    fn values(self) -> impl Iterator<Item = Value> {
        let value = Value(self.0 & !Self::OR_ZERO);
        let zero = (self.0 & Self::OR_ZERO != 0).then_some(Value::ZERO);
        std::iter::once(value).chain(zero)
    }
}

/// What a read found in the sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// A whole value.
    Value(Value),
    /// Something that no write wrote.
    Damaged,
    /// The read failed, or was given up: it says nothing.
    Nothing,
}

/// A value that may be seen.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    value: Value,
    began: u64,
    /// `None` while its operation is in flight.
    ended: Option<u64>,
    /// From when on it is dead; only ever after `ended`.
    dead: Option<u64>,
}

/// The history of one sector, as far as it still matters.
#[derive(Clone, Debug)]
pub struct History {
    candidates: Vec<Candidate>,
    /// When each read in flight began.
    readers: Vec<u64>,
}

impl History {
    /// The history of a sector that has come to rest.
    pub fn resume(rest: Rest) -> Self {
        // The time of these is before everything else (the counter starts at 1).
        let past = |value| Candidate { value, began: 0, ended: Some(0), dead: None };
        Self { candidates: rest.values().map(past).collect(), readers: Vec::new() }
    }

    /// What is left, if nothing is in flight and two words can say it.
    pub fn rest(&self) -> Option<Rest> {
        let idle = self.readers.is_empty() && self.candidates.iter().all(|c| c.ended.is_some());
        if !idle {
            return None;
        }
        // Without readers, `prune` has left only live candidates.
        let mut other = None;
        let mut zero = false;
        for candidate in &self.candidates {
            match other {
                _ if candidate.value == Value::ZERO => zero = true,
                None => other = Some(candidate.value),
                Some(value) if value == candidate.value => {}
                Some(_) => return None,
            }
        }
        Some(Rest::new(other.unwrap_or(Value::ZERO), zero && other.is_some()))
    }

    /// An operation that makes the sector `value` begins.
    pub fn begin_write(&mut self, value: Value, now: u64) {
        self.candidates.push(Candidate { value, began: now, ended: None, dead: None });
    }

    /// The operation begun at `began` ends; `certain` if it has surely had its
    /// effect (R4).
    pub fn end_write(&mut self, began: u64, now: u64, certain: bool) {
        let mut value = None;
        for candidate in &mut self.candidates {
            if candidate.began == began {
                candidate.ended = Some(now);
                value = Some(candidate.value);
            } else if certain && candidate.ended.is_some_and(|ended| ended < began) {
                candidate.kill(now); // R2
            }
        }
        // Of equal values that have ended, the last to begin outlives the
        // others and serves every read in flight, all of which end later.
        if let Some(value) = value {
            self.candidates.retain(|each| {
                each.value != value || each.ended.is_none() || each.ended == Some(now)
            });
        }
        self.prune();
    }

    /// A read begins.
    pub fn begin_read(&mut self, now: u64) {
        self.readers.push(now);
    }

    /// The read begun at `began` ends.
    ///
    /// # Errors
    /// If it may not have seen that: the values it may have seen.
    pub fn end_read(&mut self, began: u64, now: u64, seen: Seen) -> Result<(), Vec<Value>> {
        if let Some(index) = self.readers.iter().position(|&reader| reader == began) {
            self.readers.swap_remove(index);
        }
        // R1 holds for all candidates: they have begun by now.
        let alive = |each: &&Candidate| each.dead.is_none_or(|dead| began < dead);
        let legal = match seen {
            Seen::Nothing => true,
            Seen::Damaged => {
                self.candidates.iter().any(|each| each.ended.is_none_or(|t| t > began))
            }
            Seen::Value(value) => self.candidates.iter().filter(alive).any(|c| c.value == value),
        };
        let verdict = if legal {
            Ok(())
        } else {
            Err(self.candidates.iter().filter(alive).map(|each| each.value).collect())
        };
        if let (Seen::Value(value), true) = (seen, legal) {
            self.learn(value, began, now);
        }
        self.prune();
        verdict
    }

    /// R3, for a read from `began` to `now` that returned `value`.
    fn learn(&mut self, value: Value, began: u64, now: u64) {
        // The values replaced were so when the value's own operation had ended,
        // and when it was seen: whichever was first.
        let replaced = self
            .candidates
            .iter()
            .filter(|each| each.value == value)
            .map(|each| each.ended.map_or(now, |ended| ended.min(now)))
            .max()
            .unwrap_or(now);
        for candidate in &mut self.candidates {
            if candidate.value != value && candidate.ended.is_some_and(|ended| ended < began) {
                candidate.kill(replaced);
            }
        }
    }

    /// Forgets the values that no read, in flight or to come, may return.
    fn prune(&mut self) {
        let readers = &self.readers;
        self.candidates
            .retain(|each| each.dead.is_none_or(|dead| readers.iter().any(|&r| r < dead)));
        debug_assert!(!self.candidates.is_empty(), "a sector always contains something");
    }
}

impl Candidate {
    fn kill(&mut self, at: u64) {
        self.dead = Some(self.dead.map_or(at, |dead| dead.min(at)));
    }
}

#[cfg(test)]
mod tests;
