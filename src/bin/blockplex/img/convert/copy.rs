//! The copy: lanes take chunks from the walk, read them, and write what the target does not show
//! by itself.
//!
//! | what the walk says | what is written |
//! |---|---|
//! | data | the runs that are not zeros; zeros as zeros, unless the target reads so by itself |
//! | zeros | zeros, unless the target reads so by itself; with no sparse size, data of zeros |
//! | backed | nothing |
//!
//! Memory: one buffer a lane. Without leave to write out of order, a chunk is written when the
//! one before has been ([`Turn`]).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blockplex::io::lock::CoMutex;
use blockplex::{Error, IoBuffer, Local};
use parking_lot::Mutex;

use super::offload::Offload;
use super::walk::{Chunk, Kind, Walk};
use crate::img::disk::{Disk, OpenDisk, SECTOR};
use crate::img::lanes;
use crate::img::progress::Progress;
use crate::img::rate::RateLimit;
use crate::img::turn::Turn;
use crate::img::zeroes::Sparse;
use crate::tool::message::strerror;

/// One of the images to copy.
#[derive(Debug)]
pub struct Source {
    pub disk: Disk,
    /// Where it begins on the disk that all sources make up.
    pub start: u64,
    /// The length of its own backing file; 0 without.
    pub backing_length: u64,
}

impl Source {
    /// Where the next source begins.
    pub fn end(&self) -> u64 {
        self.start + self.disk.length()
    }
}

/// The target's backing file.
#[derive(Clone, Copy, Debug)]
pub struct TargetBacking {
    /// Its length; none when it is not known.
    pub length: Option<u64>,
}

/// How to copy.
pub struct How {
    /// Chunks in flight.
    pub lanes: usize,
    /// Chunks are written in the order of the disk.
    pub in_order: bool,
    /// How zeros in data are found; none: they are written like data.
    pub sparse: Option<Sparse>,
    /// Data is not searched for zeros, and zeros that do not fill granules of so many bytes are
    /// written like data.
    pub granule: Option<u64>,
    /// The most bytes of data in a chunk; whole clusters when they are compressed.
    pub buffer_bytes: u64,
    /// Compress, in clusters of so many bytes.
    pub compressed_cluster: Option<u64>,
    /// Take what cannot be read for zeros.
    pub salvage: bool,
    /// Say nothing of what could not be read.
    pub quiet: bool,
    /// What shows where nothing is written.
    pub target_backing: Option<TargetBacking>,
    /// What is not written reads as zeros.
    pub zero_init: bool,
    /// Bytes a second at most.
    pub rate: Option<u64>,
    /// Lets the file system copy.
    pub offload: Option<Offload>,
}

/// A part of a chunk that is copied by itself when it may be: a whole chunk's buffers would push
/// each other out of the processor's cache, and each of their pages is a fault at first.
const PIECE: u64 = 512 << 10;

impl How {
    /// Whether chunks may be copied in pieces: in any order, and as the pieces show no zeros that
    /// the chunk does not.
    fn may_be_cut(&self) -> bool {
        let sees_the_same = self.sparse.is_none_or(|sparse| sparse.shortest == sparse.granule);
        !self.in_order && self.compressed_cluster.is_none() && sees_the_same
    }
}

/// What a copy was doing when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    Status,
    Reading,
    Writing,
}

/// Why a copy failed, and where.
#[derive(Debug)]
pub struct CopyError {
    pub doing: Doing,
    pub offset: u64,
    pub error: Error,
}

impl fmt::Display for CopyError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (offset, reason) = (self.offset, reason(&self.error));
        match self.doing {
            Doing::Status => {
                write!(formatter, "error while reading block status at offset {offset}: {reason}")
            }
            Doing::Reading => write!(formatter, "error while reading at byte {offset}: {reason}"),
            Doing::Writing => write!(formatter, "error while writing at byte {offset}: {reason}"),
        }
    }
}

impl std::error::Error for CopyError {}

/// A copy. See the page.
pub struct Copy {
    /// What warnings begin with.
    name: String,
    sources: Vec<Source>,
    total: u64,
    target: Disk,
    how: How,
    rate: Option<RateLimit>,
    progress: Arc<Progress>,
    /// The bytes that count as 100 %: those of data, once they have been counted.
    whole: AtomicU64,
    walk: CoMutex<Walk>,
    turn: Turn,
    stop: AtomicBool,
    error: Mutex<Option<CopyError>>,
}

impl Copy {
    /// A copy of the sources, which lie one after the other from 0 on.
    pub fn new(
        name: String,
        sources: Vec<Source>,
        target: Disk,
        how: How,
        progress: Arc<Progress>,
    ) -> Copy {
        Copy {
            name,
            total: sources.last().map_or(0, Source::end),
            sources,
            target,
            rate: how.rate.map(RateLimit::new),
            how,
            progress,
            whole: AtomicU64::new(0),
            walk: CoMutex::new(Walk::new()),
            turn: Turn::default(),
            stop: AtomicBool::new(false),
            error: Mutex::new(None),
        }
    }

    /// How much data a copy will take on, by the block status of all sources.
    fn measure(self: &Arc<Self>) -> Result<u64, Box<dyn std::error::Error>> {
        let sum = Arc::new(Mutex::new(Ok(0)));
        let (copy, result) = (self.clone(), sum.clone());
        lanes::run(1, move |_| {
            let (copy, result) = (copy.clone(), result.clone());
            async move {
                let disks = copy.open_sources()?;
                let measured = copy.sum(&disks).await;
                *result.lock() = measured;
                Ok::<_, Error>(())
            }
        })?;
        let result = std::mem::replace(&mut *sum.lock(), Ok(0));
        Ok(result?)
    }

    async fn sum(&self, disks: &[OpenDisk]) -> Result<u64, CopyError> {
        let mut walk = Walk::new();
        while walk.next(self, disks).await?.is_some() {}
        Ok(walk.cost)
    }

    /// Copies everything.
    ///
    /// # Errors
    /// The failure at the lowest offset, or whatever kept the lanes from being started.
    pub fn run(self: &Arc<Self>) -> Result<(), Box<dyn std::error::Error>> {
        // Nobody is kept waiting for a line that nobody looks at.
        let whole = if self.progress.is_shown() { self.measure()? } else { self.total };
        self.whole.store(whole, Ordering::Relaxed);
        let copy = self.clone();
        lanes::run(self.how.lanes, move |local| lane(copy.clone(), local))?;
        match self.error.lock().take() {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }

    pub fn total(&self) -> u64 {
        self.total
    }

    pub fn how(&self) -> &How {
        &self.how
    }

    /// The source that the disk's byte at `offset` belongs to, and its index.
    pub fn source_at(&self, offset: u64) -> (usize, &Source) {
        let index = self.sources.partition_point(|source| source.end() <= offset);
        (index, &self.sources[index])
    }

    /// Says what was passed over.
    pub fn warn(&self, text: fmt::Arguments<'_>) {
        if !self.how.quiet {
            eprintln!("{}: warning: {text}", self.name);
        }
    }

    /// The next chunk. Progress is told of it at once: in the order of the disk.
    async fn take(&self, disks: &[OpenDisk]) -> Result<Option<Chunk>, CopyError> {
        let mut walk = self.walk.lock().await;
        let before = walk.cost;
        let chunk = walk.next(self, disks).await?;
        // Relaxed: it was set before the lanes were started.
        let whole = self.whole.load(Ordering::Relaxed);
        if walk.cost > before && whole > 0 {
            self.progress.set((walk.cost as f64 * 100.0 / whole as f64) as f32);
        }
        Ok(chunk)
    }

    fn open_sources(&self) -> Result<Vec<OpenDisk>, Error> {
        self.sources.iter().map(|source| source.disk.open()).collect()
    }

    /// Stops all lanes. Of several failures, the one at the lowest offset is kept.
    fn fail(&self, error: Option<CopyError>) {
        if let Some(error) = error {
            let mut first = self.error.lock();
            if first.as_ref().is_none_or(|first| error.offset < first.offset) {
                *first = Some(error);
            }
        }
        self.stop.store(true, Ordering::Relaxed);
        self.turn.end();
    }
}

/// Lets the other lanes go when one ends early, however that comes about.
struct Watch<'a>(&'a Copy, bool);

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if !self.1 {
            self.0.fail(None);
        }
    }
}

async fn lane(copy: Arc<Copy>, local: Local) -> Result<(), Error> {
    let mut watch = Watch(&copy, false);
    let mut lane = Lane {
        copy: &copy,
        local,
        sources: copy.open_sources()?,
        target: copy.target.open()?,
        buffer: IoBuffer::zeroed(0),
    };
    match lane.work().await {
        Ok(()) => watch.1 = true,
        Err(error) => copy.fail(Some(error)),
    }
    Ok(())
}

struct Lane<'a> {
    copy: &'a Copy,
    local: Local,
    sources: Vec<OpenDisk>,
    target: OpenDisk,
    buffer: IoBuffer,
}

impl Lane<'_> {
    async fn work(&mut self) -> Result<(), CopyError> {
        let copy = self.copy;
        while !copy.stop.load(Ordering::Relaxed) {
            let Some(mut chunk) = copy.take(&self.sources).await? else { break };
            match chunk.kind {
                Kind::Data if self.offload(&chunk).await => chunk.kind = Kind::Backed,
                Kind::Data if copy.how.may_be_cut() => {
                    self.copy_in_pieces(&chunk).await?;
                    chunk.kind = Kind::Backed;
                }
                Kind::Data => self.read(&chunk).await.map_err(failed(Doing::Reading, &chunk))?,
                Kind::Zero if copy.how.sparse.is_none() => {
                    self.room(chunk.length as usize);
                    self.buffer.fill(0);
                    chunk.kind = Kind::Data;
                }
                Kind::Zero | Kind::Backed => {}
            }
            if copy.how.in_order && !copy.turn.wait(chunk.offset).await {
                break;
            }
            self.write(&chunk).await.map_err(failed(Doing::Writing, &chunk))?;
            if copy.how.in_order {
                copy.turn.pass(chunk.offset + chunk.length);
            }
        }
        Ok(())
    }

    /// Copies a chunk through a buffer that stays in the processor's cache.
    async fn copy_in_pieces(&mut self, chunk: &Chunk) -> Result<(), CopyError> {
        let end = chunk.offset + chunk.length;
        let mut offset = chunk.offset;
        while offset < end {
            let piece = Chunk { offset, length: (end - offset).min(PIECE), kind: chunk.kind };
            self.read(&piece).await.map_err(failed(Doing::Reading, chunk))?;
            self.write(&piece).await.map_err(failed(Doing::Writing, chunk))?;
            offset += piece.length;
        }
        Ok(())
    }

    /// Whether the file system has copied a chunk.
    async fn offload(&self, chunk: &Chunk) -> bool {
        let Some(offload) = &self.copy.how.offload else { return false };
        let inside = self.sources[0].inside(chunk.offset, chunk.length) == chunk.length;
        inside && offload.copy(&self.local, chunk.offset, chunk.length).await
    }

    /// Makes the buffer at least `length` long.
    fn room(&mut self, length: usize) {
        if self.buffer.len() < length {
            let how = &self.copy.how;
            let most = if how.may_be_cut() { PIECE } else { how.buffer_bytes };
            let most = most.min(self.copy.total) as usize;
            self.buffer = IoBuffer::zeroed(length.max(most));
        }
    }

    /// Fills the buffer with a chunk, which may lie in several sources.
    async fn read(&mut self, chunk: &Chunk) -> Result<(), Error> {
        self.room(chunk.length as usize);
        let mut done = 0;
        while done < chunk.length {
            let offset = chunk.offset + done;
            let (index, source) = self.copy.source_at(offset);
            let inside = offset - source.start;
            let length = (source.end() - offset).min(chunk.length - done);
            if let Err(error) = self.read_part(index, inside, done as usize, length).await {
                if !self.copy.how.salvage {
                    return Err(error);
                }
                self.salvage(index, inside, done, length).await;
            }
            done += length;
        }
        Ok(())
    }

    async fn read_part(
        &mut self,
        index: usize,
        inside: u64,
        at: usize,
        length: u64,
    ) -> Result<(), Error> {
        let buffer = std::mem::replace(&mut self.buffer, IoBuffer::zeroed(0));
        let (buffer, result) = self.sources[index].read(inside, buffer, at, length as usize).await;
        self.buffer = buffer;
        result
    }

    /// Reads sector by sector what could not be read at once; what cannot be read is zeros.
    async fn salvage(&mut self, index: usize, inside: u64, at: u64, length: u64) {
        let mut done = 0;
        while done < length {
            let part = SECTOR.min(length - done);
            let position = (at + done) as usize;
            let read = self.read_part(index, inside + done, position, part).await;
            if let Err(error) = read {
                let offset = self.copy.sources[index].start + inside + done;
                let reason = reason(&error);
                self.copy.warn(format_args!("error while reading offset {offset}: {reason}"));
                self.buffer[position..position + part as usize].fill(0);
            }
            done += part;
        }
    }

    async fn write(&mut self, chunk: &Chunk) -> Result<(), Error> {
        match chunk.kind {
            Kind::Data => self.write_runs(chunk).await,
            Kind::Zero => self.write_zeroes(chunk.offset, chunk.length).await,
            Kind::Backed => Ok(()),
        }
    }

    /// Writes a chunk from the buffer, its zeros as such.
    async fn write_runs(&mut self, chunk: &Chunk) -> Result<(), Error> {
        let mut done = 0;
        while done < chunk.length {
            let offset = chunk.offset + done;
            let rest = &self.buffer[done as usize..chunk.length as usize];
            let how = &self.copy.how;
            let (length, data) = match how.sparse.filter(|_| how.granule.is_none()) {
                Some(sparse) => {
                    let run = sparse.first_run(offset, rest);
                    (run.length as u64, run.data)
                }
                None => (rest.len() as u64, true),
            };
            if data {
                self.write_data(offset, done as usize, length).await?;
            } else {
                self.write_zeroes(offset, length).await?;
            }
            done += length;
        }
        Ok(())
    }

    async fn write_data(&mut self, offset: u64, at: usize, length: u64) -> Result<(), Error> {
        if let Some(rate) = &self.copy.rate {
            rate.pass(&self.local, length).await;
        }
        let buffer = std::mem::replace(&mut self.buffer, IoBuffer::zeroed(0));
        let compressed = self.copy.how.compressed_cluster.is_some();
        let (buffer, result) =
            self.target.write(offset, buffer, at, length as usize, compressed).await;
        self.buffer = buffer;
        result
    }

    async fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), Error> {
        if self.copy.how.zero_init {
            return Ok(());
        }
        self.target.write_zeroes(offset, length).await
    }
}

/// What went wrong with a chunk; told as the chunk's, wherever in it that was.
fn failed(doing: Doing, chunk: &Chunk) -> impl FnOnce(Error) -> CopyError + use<> {
    let offset = chunk.offset;
    move |error| CopyError { doing, offset, error }
}

/// The text of an error's errno.
pub fn reason(error: &Error) -> String {
    strerror(error.errno())
}
