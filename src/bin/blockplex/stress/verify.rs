//! Judges every read of an iothread.
//!
//! A [`Model`] belongs to one iothread and knows what the sectors the thread
//! owns may contain. Each operation is *begun* before it is submitted and
//! *ended* when it has completed; in between, the [`Ticket`] stands for it.
//!
//! A read is judged sector by sector:
//! - Own sectors have to contain what their `history` allows.
//! - Sectors of other threads have to be zero, or bear the stamp of this disk,
//!   this sector and its owner: whole, at the right place, not of an earlier
//!   run. How old they may be only their owner knows. A damaged one may have
//!   been caught while its owner was writing, which this thread cannot know, so
//!   the read is repeated; what stays damaged is a fault.
//! - Sectors of nobody have to be zero.
//!
//! The disk is taken to be zero at first.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};

use super::block_pattern::{Observation, SECTOR_BYTES, Stamp, observe};
use super::history::{History, Rest, Seen, Value};
use super::layout::{Extent, Layout};
use super::plan::Operation;
use crate::random::{GOLDEN, mix};

/// How often a read that found a damaged foreign sector is made. A torn read is
/// rare; so many in a row on one sector do not happen by chance.
const READ_ATTEMPTS: u32 = 16;

/// An operation between its begin and its end.
#[derive(Debug)]
#[must_use = "an operation that was begun has to be ended"]
pub struct Ticket {
    operation: Operation,
    /// When it began, by the model's counter.
    began: u64,
    /// The sequence number its sectors bear, if it writes.
    sequence: u64,
    /// How often it was made before, if it reads.
    repeats: u32,
}

impl Ticket {
    /// What to do.
    pub fn operation(&self) -> Operation {
        self.operation
    }
}

/// How an operation ended.
#[derive(Clone, Copy, Debug)]
pub enum Completion<'a> {
    /// It succeeded. A read brings its data, a block for the extent it was
    /// asked for; anything else brings nothing.
    Done(&'a [u8]),
    /// It failed. A write may or may not have had its effect.
    Failed,
}

/// What is to be said about an operation.
#[derive(Debug)]
#[must_use = "a mismatch has to be counted, a repeated read to be made"]
pub enum Verdict {
    /// Nothing.
    Clean,
    /// The read has to be made again, under this ticket.
    ReadAgain(Ticket),
    /// It read what must not be there.
    Mismatch(Mismatch),
}

/// A sector that contains what must not be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// The sector.
    pub sector: u64,
    /// What is wrong with it.
    pub fault: Fault,
}

/// What can be wrong with a sector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It contains what nobody wrote.
    Damaged {
        /// The first wrong byte.
        first_wrong: usize,
    },
    /// It contains data of another disk, or of an earlier run.
    OtherDisk(Stamp),
    /// It contains data of another sector.
    Misplaced(Stamp),
    /// It contains data of a thread that does not own it.
    WrongWriter(Stamp),
    /// It should be zero, for nobody ever wrote it.
    NeverWritten(Stamp),
    /// It contains what was there once, or is not there yet.
    Illegal {
        /// What it contains.
        found: Value,
        /// What it may contain.
        legal: Vec<Value>,
    },
    /// The read brought fewer bytes than it was asked for.
    Short,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "sector {}: ", self.sector)?;
        match &self.fault {
            Fault::Damaged { first_wrong } => {
                write!(formatter, "damaged from byte {first_wrong} on")
            }
            Fault::OtherDisk(stamp) => {
                write!(formatter, "data of another disk or run, {:#018x}", stamp.disk)
            }
            Fault::Misplaced(stamp) => write!(
                formatter,
                "data of sector {} (iothread {}, write {})",
                stamp.sector, stamp.writer, stamp.sequence
            ),
            Fault::WrongWriter(stamp) => {
                write!(formatter, "written by iothread {}, which does not own it", stamp.writer)
            }
            Fault::NeverWritten(stamp) => {
                write!(formatter, "written by iothread {}, though nobody's", stamp.writer)
            }
            Fault::Illegal { found, legal } => {
                write!(formatter, "contains {found}, but may only contain ")?;
                for (index, value) in legal.iter().enumerate() {
                    let separator = if index > 0 { " or " } else { "" };
                    write!(formatter, "{separator}{value}")?;
                }
                Ok(())
            }
            Fault::Short => formatter.write_str("not read, though the request succeeded"),
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::ZERO => formatter.write_str("zeroes"),
            Self(sequence) => write!(formatter, "write {sequence}"),
        }
    }
}

/// What the sectors of one iothread may contain. Only that thread uses it.
#[derive(Debug)]
pub struct Model {
    layout: Layout,
    disk: u64,
    thread: u32,
    /// Rises with every begin and end.
    clock: u64,
    /// The sequence number of the last write.
    sequence: u64,
    /// Own sectors with nothing going on, by their number among those.
    rests: Vec<Rest>,
    /// Own sectors with something going on, or undecided.
    histories: HashMap<usize, History, BuildHasherDefault<IndexHasher>>,
}

/// Hashes sector numbers. They are the plan's own, so nobody can make them
/// collide on purpose, and the hash may be quick.
#[derive(Debug, Default)]
struct IndexHasher(u64);

impl Hasher for IndexHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_usize(usize::from(*byte));
        }
    }

    fn write_usize(&mut self, index: usize) {
        self.0 = mix(self.0.wrapping_add(GOLDEN) ^ index as u64);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

impl Model {
    /// The model of a thread of the layout. `disk` goes into every stamp; it
    /// should be another in each run.
    pub fn new(layout: &Layout, disk: u64, thread: u32) -> Self {
        Self {
            layout: *layout,
            disk,
            thread,
            clock: 0,
            sequence: 0,
            rests: vec![Rest::default(); layout.owned_sectors()],
            histories: HashMap::default(),
        }
    }

    /// An operation is about to be submitted.
    pub fn begin(&mut self, operation: Operation) -> Ticket {
        self.begin_attempt(operation, 0)
    }

    fn begin_attempt(&mut self, operation: Operation, repeats: u32) -> Ticket {
        let began = self.tick();
        match operation {
            Operation::Read(extent) => {
                self.each_own(extent, |history| history.begin_read(began));
            }
            Operation::Write { extent, .. } => {
                self.sequence += 1;
                let value = Value(self.sequence);
                self.each_own(extent, |history| history.begin_write(value, began));
            }
            Operation::WriteZeroes { extent, .. } | Operation::Discard(extent) => {
                self.each_own(extent, |history| history.begin_write(Value::ZERO, began));
            }
            Operation::Flush => {}
        }
        Ticket { operation, began, sequence: self.sequence, repeats }
    }

    /// The data that a write has to write, into a buffer of its length (more is
    /// left as it is). Other operations have none.
    pub fn fill(&self, ticket: &Ticket, buffer: &mut [u8]) {
        let Operation::Write { extent, .. } = ticket.operation else { return };
        let sectors = buffer.as_chunks_mut::<SECTOR_BYTES>().0;
        for (sector, bytes) in (extent.first..extent.first + extent.count).zip(sectors) {
            let (disk, writer, sequence) = (self.disk, self.thread, ticket.sequence);
            Stamp { disk, sector, writer, sequence }.write_to(bytes);
        }
    }

    /// An operation has completed.
    pub fn end(&mut self, ticket: Ticket, completion: Completion<'_>) -> Verdict {
        let now = self.tick();
        let succeeded = matches!(completion, Completion::Done(_));
        match ticket.operation {
            Operation::Read(extent) => return self.end_read(ticket, extent, completion, now),
            Operation::Write { extent, .. } | Operation::WriteZeroes { extent, .. } => {
                self.end_write(extent, ticket.began, now, succeeded);
            }
            // Advice, that may be followed or not.
            Operation::Discard(extent) => self.end_write(extent, ticket.began, now, false),
            Operation::Flush => {}
        }
        Verdict::Clean
    }

    fn end_write(&mut self, extent: Extent, began: u64, now: u64, certain: bool) {
        self.each_own(extent, |history| history.end_write(began, now, certain));
        self.settle(extent);
    }

    fn end_read(
        &mut self,
        ticket: Ticket,
        extent: Extent,
        completion: Completion<'_>,
        now: u64,
    ) -> Verdict {
        let mut certain = None;
        let mut torn = None;
        for (index, sector) in (extent.first..extent.first + extent.count).enumerate() {
            let observed = match completion {
                Completion::Failed => Ok(None),
                Completion::Done(data) => match data.as_chunks::<SECTOR_BYTES>().0.get(index) {
                    Some(bytes) => Ok(Some(observe(bytes))),
                    None => Err(Fault::Short),
                },
            };
            let Err(fault) = self.judge(sector, observed, ticket.began, now) else { continue };
            let foreign = self.own_index(sector).is_none();
            let slot = match fault {
                Fault::Damaged { .. } if foreign => &mut torn,
                _ => &mut certain,
            };
            slot.get_or_insert(Mismatch { sector, fault });
        }
        self.settle(extent);
        match (certain, torn) {
            (None, None) => Verdict::Clean,
            (None, Some(_)) if ticket.repeats + 1 < READ_ATTEMPTS => {
                Verdict::ReadAgain(self.begin_attempt(ticket.operation, ticket.repeats + 1))
            }
            (Some(mismatch), _) | (None, Some(mismatch)) => Verdict::Mismatch(mismatch),
        }
    }

    /// Ends the read of one sector and judges what was observed, if anything.
    fn judge(
        &mut self,
        sector: u64,
        observed: Result<Option<Observation>, Fault>,
        began: u64,
        now: u64,
    ) -> Result<(), Fault> {
        let identity = observed.and_then(|observed| match observed {
            Some(observation) => self.identify(sector, observation).map(Some),
            None => Ok(None),
        });
        let own = self.own_index(sector);
        // A read in flight has a history for each of its own sectors.
        let Some(history) = own.and_then(|index| self.histories.get_mut(&index)) else {
            return identity.map(|_| ());
        };
        let seen = match &identity {
            Ok(Some(value)) => Seen::Value(*value),
            Err(Fault::Damaged { .. }) => Seen::Damaged,
            Ok(None) | Err(_) => Seen::Nothing,
        };
        match (history.end_read(began, now, seen), identity) {
            // Damage that a write at the same time excuses.
            (Ok(()), Err(Fault::Damaged { .. })) => Ok(()),
            (Ok(()), identity) => identity.map(|_| ()),
            (Err(_), Err(fault)) => Err(fault),
            (Err(legal), Ok(found)) => {
                Err(Fault::Illegal { found: found.unwrap_or(Value::ZERO), legal })
            }
        }
    }

    /// Checks that a sector contains what belongs there, whenever it was
    /// written.
    fn identify(&self, sector: u64, observation: Observation) -> Result<Value, Fault> {
        let stamp = match observation {
            Observation::Zero => return Ok(Value::ZERO),
            Observation::Damaged { first_wrong } => return Err(Fault::Damaged { first_wrong }),
            Observation::Stamped(stamp) => stamp,
        };
        if stamp.disk != self.disk {
            return Err(Fault::OtherDisk(stamp));
        }
        if stamp.sector != sector {
            return Err(Fault::Misplaced(stamp));
        }
        match self.layout.place(sector) {
            None => Err(Fault::NeverWritten(stamp)),
            Some(place) if place.owner != stamp.writer => Err(Fault::WrongWriter(stamp)),
            Some(_) => Ok(Value(stamp.sequence)),
        }
    }

    /// The next moment.
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// The number of a sector among those of this thread; `None` if it is not.
    fn own_index(&self, sector: u64) -> Option<usize> {
        let place = self.layout.place(sector)?;
        (place.owner == self.thread).then_some(place.index)
    }

    /// Does something to the history of each own sector of an extent.
    fn each_own(&mut self, extent: Extent, mut act: impl FnMut(&mut History)) {
        for sector in extent.first..extent.first + extent.count {
            let Some(index) = self.own_index(sector) else { continue };
            let rests = &self.rests;
            let history =
                self.histories.entry(index).or_insert_with(|| History::resume(rests[index]));
            act(history);
        }
    }

    /// Puts the own sectors of an extent to rest that have nothing going on.
    fn settle(&mut self, extent: Extent) {
        for sector in extent.first..extent.first + extent.count {
            let Some(index) = self.own_index(sector) else { continue };
            if let Some(rest) = self.histories.get(&index).and_then(History::rest) {
                self.rests[index] = rest;
                self.histories.remove(&index);
            }
        }
    }
}

#[cfg(test)]
mod tests;
