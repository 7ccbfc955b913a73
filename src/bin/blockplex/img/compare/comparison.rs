//! The comparison of two disks: lanes compare chunks side by side; of what they find, the finding
//! at the lowest offset counts, as if the disks had been walked through in order.

use std::cmp::min;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockplex::io::lock::CoMutex;
use blockplex::{BlockStatus, Error, IoBuffer};
use parking_lot::Mutex;

use crate::img::disk::{Disk, OpenDisk, SECTOR};
use crate::img::progress::InOrder;
use crate::img::{lanes, zeroes};

/// The most bytes that are compared at once.
const BUFFER: u64 = 2 << 20;

/// Chunks in flight.
const LANES: usize = 8;

/// One of the two disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    First,
    Second,
}

/// What is found first.
#[derive(Debug)]
pub enum Finding {
    /// The contents differ.
    Content,
    /// The block status differs, which a strict comparison looks at.
    Status,
    /// The block status could not be had.
    StatusError(Side),
    /// The data could not be read.
    ReadError(Side, Error),
}

/// A range of two disks, or of one that is to be zeros.
pub struct Comparison {
    /// The disks; the second is none where the first is to be zeros.
    first: Disk,
    second: Option<Disk>,
    /// What the first disk is to the caller.
    first_is: Side,
    end: u64,
    strict: bool,
    moved: Moved,
    position: CoMutex<u64>,
    stop: AtomicBool,
    found: Mutex<Option<(u64, Finding)>>,
}

/// How far a comparison has come.
pub struct Moved {
    pub parts: InOrder,
    /// The bytes that count 100 %.
    pub whole: u64,
}

impl Moved {
    fn on(&self, offset: u64, length: u64) {
        self.parts.done(offset, length, length as f32 / self.whole as f32 * 100.0);
    }
}

/// What is to be done with a chunk.
#[derive(Clone, Copy, Debug)]
enum Check {
    Nothing,
    Both,
    IsZero(Side),
}

impl Comparison {
    /// The comparison of the first `end` bytes of two disks.
    pub fn of_both(first: Disk, second: Disk, end: u64, strict: bool, moved: Moved) -> Comparison {
        Comparison::new(0, end, first, Some(second), Side::First, strict, moved)
    }

    /// The comparison of one disk's rest from `start` on with zeros.
    pub fn with_zeros(disk: Disk, side: Side, start: u64, moved: Moved) -> Comparison {
        let end = disk.length();
        Comparison::new(start, end, disk, None, side, false, moved)
    }

    fn new(
        start: u64,
        end: u64,
        first: Disk,
        second: Option<Disk>,
        first_is: Side,
        strict: bool,
        moved: Moved,
    ) -> Comparison {
        Comparison {
            first,
            second,
            first_is,
            end,
            strict,
            moved,
            position: CoMutex::new(start),
            stop: AtomicBool::new(false),
            found: Mutex::new(None),
        }
    }

    /// Runs it: the finding at the lowest offset; none when all is equal.
    ///
    /// # Errors
    /// What keeps the lanes from being started.
    pub fn run(self) -> Result<Option<(u64, Finding)>, Error> {
        let comparison = Arc::new(self);
        let shared = comparison.clone();
        lanes::run(LANES, move |_| {
            let comparison = shared.clone();
            async move { Lane::open(&comparison)?.work().await }
        })?;
        let found = comparison.found.lock().take();
        Ok(found)
    }

    fn report(&self, offset: u64, finding: Finding) {
        // Relaxed: a hint; what was found lies under the lock.
        self.stop.store(true, Ordering::Relaxed);
        let mut found = self.found.lock();
        if found.as_ref().is_none_or(|(lowest, _)| offset < *lowest) {
            *found = Some((offset, finding));
        }
    }
}

struct Lane<'a> {
    comparison: &'a Comparison,
    first: OpenDisk,
    second: Option<OpenDisk>,
    buffers: [IoBuffer; 2],
}

impl<'a> Lane<'a> {
    fn open(comparison: &'a Comparison) -> Result<Lane<'a>, Error> {
        let second = comparison.second.as_ref().map(Disk::open).transpose()?;
        let size = min(BUFFER, comparison.end) as usize;
        let buffers = [IoBuffer::zeroed(size), IoBuffer::zeroed(size)];
        Ok(Lane { comparison, first: comparison.first.open()?, second, buffers })
    }

    async fn work(&mut self) -> Result<(), Error> {
        let comparison = self.comparison;
        // A chunk that has been taken is looked at, whatever is found meanwhile: it may lie lower.
        while let Some((offset, length, check)) = self.take().await {
            let finding = match check {
                Check::Nothing => None,
                Check::Both => self.compare(offset, length).await,
                Check::IsZero(side) => self.expect_zeros(side, offset, length).await,
            };
            match finding {
                // Nor do the chunks after it count, then.
                Some((offset, finding)) => comparison.report(offset, finding),
                None => comparison.moved.on(offset, length),
            }
        }
        Ok(())
    }

    /// Takes the next chunk, and what is to be done with it.
    async fn take(&self) -> Option<(u64, u64, Check)> {
        let comparison = self.comparison;
        let mut position = comparison.position.lock().await;
        let offset = *position;
        if offset >= comparison.end || comparison.stop.load(Ordering::Relaxed) {
            return None;
        }
        match self.look(offset, comparison.end - offset).await {
            Ok((length, check)) => {
                let most = if matches!(check, Check::Nothing) { length } else { BUFFER };
                let length = length.min(most);
                *position += length;
                Some((offset, length, check))
            }
            Err(finding) => {
                comparison.report(offset, finding);
                None
            }
        }
    }

    /// What the block status of both disks says.
    async fn look(&self, offset: u64, left: u64) -> Result<(u64, Check), Finding> {
        let comparison = self.comparison;
        let first = self.first.status(offset, left).await;
        let first = first.map_err(|_| Finding::StatusError(comparison.first_is))?;
        let Some(second) = &self.second else {
            let data = is_present(&first) && !first.zero;
            let check = if data { Check::IsZero(Side::First) } else { Check::Nothing };
            return Ok((first.length, check));
        };
        let second = second.status(offset, left).await;
        let second = second.map_err(|_| Finding::StatusError(Side::Second))?;
        if comparison.strict && !is_alike(&first, &second) {
            return Err(Finding::Status);
        }
        let check = match (is_present(&first), is_present(&second)) {
            _ if first.zero && second.zero => Check::Nothing,
            (true, true) => Check::Both,
            (true, false) => Check::IsZero(Side::First),
            (false, true) => Check::IsZero(Side::Second),
            (false, false) => Check::Nothing,
        };
        Ok((first.length.min(second.length), check))
    }

    async fn compare(&mut self, offset: u64, length: u64) -> Option<(u64, Finding)> {
        for side in [Side::First, Side::Second] {
            if let Err(error) = self.read(side, offset, length).await {
                return Some((offset, Finding::ReadError(side, error)));
            }
        }
        let [first, second] = &self.buffers;
        let (first, second) = (first.get(..length as usize)?, second.get(..length as usize)?);
        if first == second {
            return None;
        }
        let sectors = first.chunks(SECTOR as usize).zip(second.chunks(SECTOR as usize));
        let equal = sectors.take_while(|(first, second)| first == second).count() as u64;
        Some((offset + equal * SECTOR, Finding::Content))
    }

    async fn expect_zeros(
        &mut self,
        side: Side,
        offset: u64,
        length: u64,
    ) -> Option<(u64, Finding)> {
        if let Err(error) = self.read(side, offset, length).await {
            let side = if self.second.is_none() { self.comparison.first_is } else { side };
            return Some((offset, Finding::ReadError(side, error)));
        }
        let bytes = self.buffers[index(side)].get(..length as usize)?;
        if zeroes::is_zero(bytes) {
            return None;
        }
        let zeros = bytes.iter().take_while(|byte| **byte == 0).count() as u64;
        Some((offset + zeros, Finding::Content))
    }

    async fn read(&mut self, side: Side, offset: u64, length: u64) -> Result<(), Error> {
        let disk = match (side, &self.second) {
            (Side::Second, Some(second)) => second,
            _ => &self.first,
        };
        let buffer = std::mem::replace(&mut self.buffers[index(side)], IoBuffer::zeroed(0));
        let (buffer, result) = disk.read(offset, buffer, 0, length as usize).await;
        self.buffers[index(side)] = buffer;
        result
    }
}

fn index(side: Side) -> usize {
    match side {
        Side::First => 0,
        Side::Second => 1,
    }
}

/// Whether some image of the chain holds an extent.
fn is_present(status: &BlockStatus) -> bool {
    status.allocated || status.backed
}

/// Whether a strict comparison takes two extents for alike.
fn is_alike(first: &BlockStatus, second: &BlockStatus) -> bool {
    let flags = |status: &BlockStatus| {
        (status.data, status.zero, is_present(status), status.offset.is_some(), status.compressed)
    };
    flags(first) == flags(second)
}
