//! Keeps what an overlay shows while its backing file becomes another: where the overlay holds
//! nothing and the two backing files differ, it gets what it shows now.
//!
//! Lanes take ranges in order. What the overlay shows is read from the overlay itself, through its
//! old backing file, which stays below it meanwhile; so a cluster that is written in part keeps
//! the right rest.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockplex::io::lock::CoMutex;
use blockplex::{Error, IoBuffer};
use parking_lot::Mutex;

use crate::img::disk::{Disk, OpenDisk};
use crate::img::progress::InOrder;
use crate::img::{lanes, zeroes};
use crate::tool::message::strerror;

/// The most bytes that are compared at once: the largest cluster.
const BUFFER: u64 = 2 << 20;

/// Ranges in flight.
const LANES: usize = 4;

/// A merge. See the page.
pub struct Merge {
    /// The overlay on its old backing file.
    pub overlay: Disk,
    /// The new backing file; none: zeros.
    pub new: Option<Disk>,
    /// What is written is whole units of so many bytes.
    pub unit: u64,
    /// Zeros can be stored as such: else they are data, since what is not stored will show
    /// through.
    pub zero_clusters: bool,
    /// Write compressed.
    pub compress: bool,
    /// How many images up the new backing file is in the old chain: what the chain holds there or
    /// below does not change.
    pub shared_depth: Option<u32>,
    /// Told of the ranges that have been dealt with.
    pub progress: InOrder,
}

struct Run {
    merge: Merge,
    position: CoMutex<u64>,
    stop: AtomicBool,
    problem: Mutex<Option<String>>,
}

impl Merge {
    /// What a range counts that had to be looked at; as in QEMU, whatever its length.
    fn percent(&self) -> f32 {
        let length = self.overlay.length();
        100.0 / (length / length.clamp(1, BUFFER)) as f32
    }

    /// Does it.
    ///
    /// # Errors
    /// What went wrong first, as it is to be printed.
    pub fn run(self) -> Result<(), String> {
        let run = Arc::new(Run {
            merge: self,
            position: CoMutex::new(0),
            stop: AtomicBool::new(false),
            problem: Mutex::new(None),
        });
        let shared = run.clone();
        let ended = lanes::run(LANES, move |_| {
            let run = shared.clone();
            async move {
                let mut lane = Lane::open(&run)?;
                if let Err(problem) = lane.work().await {
                    // Relaxed: a hint; the problem lies under the lock.
                    run.stop.store(true, Ordering::Relaxed);
                    run.problem.lock().get_or_insert(problem);
                }
                Ok::<_, Error>(())
            }
        });
        ended.map_err(|error| error.to_string())?;
        let problem = run.problem.lock().take();
        problem.map_or(Ok(()), Err)
    }
}

struct Lane<'a> {
    run: &'a Run,
    overlay: OpenDisk,
    new: Option<OpenDisk>,
    /// What the overlay shows, and what the new backing file shows.
    buffers: [IoBuffer; 2],
}

const OLD: usize = 0;
const NEW: usize = 1;

impl<'a> Lane<'a> {
    fn open(run: &'a Run) -> Result<Lane<'a>, Error> {
        let new = run.merge.new.as_ref().map(Disk::open).transpose()?;
        let size = BUFFER.min(run.merge.overlay.length()) as usize;
        let buffers = [IoBuffer::zeroed(size), IoBuffer::zeroed(size)];
        Ok(Lane { run, overlay: run.merge.overlay.open()?, new, buffers })
    }

    async fn work(&mut self) -> Result<(), String> {
        while let Some((offset, length, is_shown)) = self.take().await? {
            if !is_shown {
                self.keep(offset, length).await?;
            }
            let percent = if is_shown { 0.0 } else { self.run.merge.percent() };
            self.run.merge.progress.done(offset, length, percent);
        }
        Ok(())
    }

    /// The next range, and whether it shows the same afterwards, whatever the files hold.
    async fn take(&self) -> Result<Option<(u64, u64, bool)>, String> {
        let merge = &self.run.merge;
        let mut position = self.run.position.lock().await;
        let offset = *position;
        let left = merge.overlay.length().saturating_sub(offset);
        if left == 0 || self.run.stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let (mut length, is_shown) = self.look(offset, left).await?;
        // However many extents the files below show here, they are read as one.
        while !is_shown && length < left.min(BUFFER) {
            let (more, is_shown) = self.look(offset + length, left - length).await?;
            if is_shown {
                break;
            }
            length += more.min(BUFFER - length);
        }
        *position += length;
        Ok(Some((offset, length, is_shown)))
    }

    /// How far from `offset` on it is the same whether what is there shows afterwards.
    async fn look(&self, offset: u64, left: u64) -> Result<(u64, bool), String> {
        let merge = &self.run.merge;
        let status = self.overlay.status(offset, left).await.map_err(|error| {
            format!("error while reading image metadata: {}", strerror(error.errno()))
        })?;
        let whole = status.length - status.length % merge.unit;
        let is_shared = match merge.shared_depth {
            // What nobody holds, nobody will hold.
            Some(shared) => !status.backed || status.depth >= shared,
            None => false,
        };
        Ok(if status.allocated {
            (status.length, true)
        } else if is_shared && whole > 0 {
            (whole, true)
        } else {
            // A unit that the overlay does not hold, it does not hold in part either.
            (status.length.min(BUFFER).next_multiple_of(merge.unit).min(left), false)
        })
    }

    /// Writes to the overlay where the new backing file differs from what it shows.
    async fn keep(&mut self, offset: u64, length: u64) -> Result<(), String> {
        self.read(OLD, offset, length).await.map_err(|error| {
            format!("error while reading from old backing file: {}", strerror(error.errno()))
        })?;
        self.read(NEW, offset, length).await.map_err(|error| {
            format!("error while reading from new backing file: {}", strerror(error.errno()))
        })?;
        let mut done = 0;
        while done < length {
            let (same, changed) = self.next_change(done as usize, length as usize);
            done += same;
            if changed > 0 {
                self.write(offset + done, done as usize, changed).await.map_err(|error| {
                    format!("Error while writing to COW image: {}", strerror(error.errno()))
                })?;
            }
            done += changed;
        }
        Ok(())
    }

    /// From position `start` on: the bytes of whole units that are the same, and of those that
    /// are not, after them.
    fn next_change(&self, start: usize, end: usize) -> (u64, u64) {
        let unit = self.run.merge.unit as usize;
        let bytes = |index: usize| self.buffers[index].get(start..end).unwrap_or_default();
        let pairs = || bytes(OLD).chunks(unit).zip(bytes(NEW).chunks(unit));
        let length = |units: usize| (units * unit).min(end - start) as u64;
        let same = pairs().take_while(|(old, new)| old == new).count();
        let changed = pairs().skip(same).take_while(|(old, new)| old != new).count();
        (length(same), length(same + changed) - length(same))
    }

    async fn write(&mut self, offset: u64, at: usize, length: u64) -> Result<(), Error> {
        let end = at + length as usize;
        let bytes = self.buffers[OLD].get(at..end).unwrap_or_default();
        if self.run.merge.zero_clusters && zeroes::is_zero(bytes) {
            return self.overlay.write_zeroes(offset, length).await;
        }
        let buffer = std::mem::replace(&mut self.buffers[OLD], IoBuffer::zeroed(0));
        let compress = self.run.merge.compress;
        let (buffer, result) =
            self.overlay.write(offset, buffer, at, length as usize, compress).await;
        self.buffers[OLD] = buffer;
        result
    }

    async fn read(&mut self, index: usize, offset: u64, length: u64) -> Result<(), Error> {
        let disk = if index == OLD { Some(&self.overlay) } else { self.new.as_ref() };
        let Some(disk) = disk else {
            self.buffers[index].fill(0);
            return Ok(());
        };
        let buffer = std::mem::replace(&mut self.buffers[index], IoBuffer::zeroed(0));
        let (buffer, result) = disk.read(offset, buffer, 0, length as usize).await;
        self.buffers[index] = buffer;
        result
    }
}
