//! The rules one by one, then all together against a simulated register.

use super::*;
use crate::random::Random;

const A: Value = Value(1);
const B: Value = Value(2);

fn empty() -> History {
    History::resume(Rest::default())
}

/// Reads from `began` to `began + 1`.
fn reads(history: &mut History, began: u64, value: Value) -> bool {
    history.begin_read(began);
    history.end_read(began, began + 1, Seen::Value(value)).is_ok()
}

fn write(history: &mut History, value: Value, began: u64, ended: u64) {
    history.begin_write(value, began);
    history.end_write(began, ended, true);
}

#[test]
fn a_completed_write_replaces_what_was_there() {
    let mut history = empty();
    write(&mut history, A, 1, 2);
    assert!(!reads(&mut history, 3, Value::ZERO));
    assert!(reads(&mut history, 5, A));
    write(&mut history, B, 7, 8);
    assert!(!reads(&mut history, 9, A), "stale");
    assert!(reads(&mut history, 11, B));
    assert_eq!(history.rest(), Some(Rest::new(B, false)));
}

#[test]
fn a_write_in_flight_may_be_seen_or_not_but_not_taken_back() {
    let mut history = empty();
    history.begin_write(A, 1);
    assert!(reads(&mut history, 2, Value::ZERO));
    assert!(reads(&mut history, 4, A));
    assert!(!reads(&mut history, 6, Value::ZERO), "flip-flop");
    history.end_write(1, 8, true);
    assert!(reads(&mut history, 9, A));
}

#[test]
fn a_read_that_began_before_a_write_ended_may_see_the_old_value() {
    let mut history = empty();
    history.begin_write(A, 1);
    history.begin_read(2);
    history.end_write(1, 3, true);
    assert!(history.end_read(2, 4, Seen::Value(Value::ZERO)).is_ok());
    assert!(!reads(&mut history, 5, Value::ZERO));
}

#[test]
fn of_two_overlapping_writes_either_stays() {
    for (stays, gone) in [(A, B), (B, A)] {
        let mut history = empty();
        history.begin_write(A, 1);
        history.begin_write(B, 2);
        history.end_write(1, 3, true);
        history.end_write(2, 4, true);
        assert_eq!(history.rest(), None, "undecided");
        assert!(reads(&mut history, 5, stays));
        assert!(!reads(&mut history, 7, gone));
        assert_eq!(history.rest(), Some(Rest::new(stays, false)));
    }
}

#[test]
fn two_overlapping_reads_do_not_disagree_about_the_past() {
    let mut history = empty();
    history.begin_write(A, 1);
    history.begin_write(B, 2);
    history.end_write(1, 3, true);
    history.end_write(2, 4, true);
    history.begin_read(5);
    history.begin_read(6);
    assert!(history.end_read(5, 7, Seen::Value(A)).is_ok());
    assert!(history.end_read(6, 8, Seen::Value(B)).is_err());
}

#[test]
fn a_discard_leaves_the_old_value_or_zeroes_until_one_is_seen() {
    let mut discarded = empty();
    write(&mut discarded, A, 1, 2);
    discarded.begin_write(Value::ZERO, 3);
    discarded.end_write(3, 4, false);
    assert_eq!(discarded.rest(), Some(Rest::new(A, true)));
    for (seen, other) in [(A, Value::ZERO), (Value::ZERO, A)] {
        let mut history = History::resume(discarded.rest().unwrap());
        assert!(reads(&mut history, 5, seen));
        assert!(!reads(&mut history, 7, other));
    }
    write(&mut discarded, B, 9, 10);
    assert!(!reads(&mut discarded, 11, Value::ZERO));
    assert!(!reads(&mut discarded, 13, A));
}

#[test]
fn a_failed_write_may_have_happened() {
    let mut history = empty();
    history.begin_write(A, 1);
    history.end_write(1, 2, false);
    assert_eq!(history.rest(), Some(Rest::new(A, true)));
    assert!(reads(&mut history, 3, A));
}

#[test]
fn damage_is_excused_only_by_a_write_at_the_same_time() {
    let mut history = empty();
    history.begin_read(1);
    assert!(history.end_read(1, 2, Seen::Damaged).is_err());
    history.begin_read(3);
    write(&mut history, A, 4, 5);
    assert!(history.end_read(3, 6, Seen::Damaged).is_ok());
    history.begin_read(7);
    assert!(history.end_read(7, 8, Seen::Damaged).is_err());
}

#[test]
fn many_discards_in_a_row_are_remembered_as_one() {
    let mut history = empty();
    write(&mut history, A, 1, 2);
    history.begin_read(3);
    for step in 0..1000 {
        history.begin_write(Value::ZERO, 4 + 2 * step);
        history.end_write(4 + 2 * step, 5 + 2 * step, false);
    }
    assert!(history.candidates.len() <= 2);
    assert!(history.end_read(3, 9999, Seen::Value(A)).is_ok());
}

/// An operation of the simulation: when it began, and what it does.
enum Flight {
    /// Not yet, or already, in the register; optional ones may never be.
    Write { began: u64, value: Value, applied: bool, certain: bool },
    /// What was in the register at some moment since it began, once looked.
    Read { began: u64, sampled: Option<Value> },
}

/// A register, the operations in flight on it, and all writes that ended.
struct Simulation {
    history: History,
    register: Value,
    flights: Vec<Flight>,
    /// Began, ended, value, for the definition of staleness.
    past: Vec<(u64, u64, Value)>,
    now: u64,
    sequence: u64,
}

impl Simulation {
    fn begin(&mut self, random: &mut Random) {
        self.now += 1;
        let began = self.now;
        if random.percent(50) {
            self.history.begin_read(began);
            self.flights.push(Flight::Read { began, sampled: None });
            return;
        }
        self.sequence += 1;
        let (value, certain) = match random.below(4) {
            0 => (Value::ZERO, random.percent(50)),
            _ => (Value(self.sequence), true),
        };
        self.history.begin_write(value, began);
        self.flights.push(Flight::Write { began, value, applied: false, certain });
    }

    /// An operation in flight takes its effect at this moment.
    fn take_effect(&mut self, index: usize) {
        match &mut self.flights[index] {
            Flight::Write { applied, value, .. } if !*applied => {
                *applied = true;
                self.register = *value;
            }
            Flight::Read { sampled, .. } if sampled.is_none() => *sampled = Some(self.register),
            _ => {}
        }
    }

    /// Ends an operation truthfully; a read's verdict must be good.
    fn end(&mut self, index: usize, random: &mut Random) {
        if !matches!(self.flights[index], Flight::Write { certain: false, .. })
            || random.percent(50)
        {
            self.take_effect(index);
        }
        self.now += 1;
        match self.flights.swap_remove(index) {
            Flight::Write { began, value, certain, .. } => {
                self.history.end_write(began, self.now, certain);
                if certain {
                    self.past.push((began, self.now, value));
                }
            }
            Flight::Read { began, sampled } => {
                let value = sampled.unwrap();
                let verdict = self.history.end_read(began, self.now, Seen::Value(value));
                assert_eq!(verdict, Ok(()), "a truthful read of {value:?} was accused");
            }
        }
    }

    /// A value that was replaced for good before `began`, if any: there is a
    /// write wholly between its own and the read.
    fn stale(&self, began: u64) -> Option<Value> {
        let newest = self.past.iter().filter(|write| write.1 < began).map(|write| write.0).max()?;
        let old = |write: &&(u64, u64, Value)| write.1 < newest && write.2 != Value::ZERO;
        self.past.iter().rev().find(old).map(|write| write.2)
    }
}

#[test]
fn a_register_is_never_accused_and_a_stale_one_always_is() {
    let mut stale_reads = 0;
    for seed in 0..200 {
        let mut random = Random::new(seed, 0);
        let (history, register) = (empty(), Value::ZERO);
        let (flights, past) = (Vec::new(), Vec::new());
        let mut simulation = Simulation { history, register, flights, past, now: 0, sequence: 0 };
        for _ in 0..300 {
            let index = random.below(simulation.flights.len() as u64) as usize;
            match random.below(3) {
                0 if simulation.flights.len() < 6 => simulation.begin(&mut random),
                1 if index < simulation.flights.len() => simulation.take_effect(index),
                _ if index < simulation.flights.len() => simulation.end(index, &mut random),
                _ => {}
            }
            if let Some(value) = simulation.stale(simulation.now + 1) {
                // A false answer does not disturb what is known.
                stale_reads += 1;
                simulation.now += 2;
                assert!(!reads(&mut simulation.history, simulation.now - 1, value), "seed {seed}");
            }
            // At most 6 in flight, as many that overlapped the last write to
            // end, and one of zeroes.
            let history = &simulation.history;
            assert!(!history.readers.is_empty() || history.candidates.len() <= 13);
        }
    }
    assert!(stale_reads > 1000);
}
