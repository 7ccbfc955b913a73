//! Where the guest's clusters are: in the image's file, or in an external data file.
//!
//! In an external data file every guest cluster has its place at its own offset, for ever. So
//! nothing there is counted, nothing is compressed, and no cluster is ever used for another one:
//! what the rest of the driver does to keep places from being used again does not concern it.
//!
//! X1. An entry names a guest cluster's own offset in the data file, or no place at all. Others are
//!     found when a slice is loaded and fail as damage.
//! X2. The data file reaches over the whole disk before the first write, and nothing is written to
//!     it past the end of the disk, but by what was in flight when the disk shrank: it ends where the
//!     disk ends.
//! X3. A raw data file (autoclear bit 1) reads, by itself, like the disk: what the entries say to
//!     be zeros is zeros there *before* they say so, and what a late write left behind the end of a
//!     disk that shrank is zeroed before it is mapped. Only a write in place that is in flight beside
//!     the zeros may differ: the disk then shows the zeros, the file the write.
//! X4. A hole is made in the data file under the range lock and before the entry changes: later it
//!     could hit what was written to the same place meanwhile.
//! X5. A flush reaches the data file before any entry that needs it is written (W1).

use super::Qcow2;
use super::entry::{Cluster, EntryError, L2Entry};
use super::join::join_all;
use super::layers::Layers;
use super::locks::{self, Ranked};
use super::lookup::Place;
use super::slice::SliceNumber;
use super::subcluster::Subclusters;
use blockplex_graph::{Child, DebugEvent, Error, ErrorKind, Preallocation, RequestFlags, Result};
use blockplex_io::buffer::IoVector;
use blockplex_io::lock::CoMutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What an image with an external data file knows of it.
#[derive(Default)]
pub(super) struct ExternalData {
    /// See X3.
    raw: bool,
    /// How far the data file is known to reach, in bytes: where the disk ends; 0 before the first
    /// write.
    length: AtomicU64,
    /// The disk has shrunk since the image was opened: what lies past its end was never the file's own.
    shrunk: AtomicBool,
    /// The turn to change its length.
    growing: Ranked<CoMutex<()>, { locks::LEAF }>,
}

impl ExternalData {
    pub(super) fn new(raw: bool) -> ExternalData {
        ExternalData { raw, ..ExternalData::default() }
    }

    fn length(&self) -> u64 {
        // Acquire: partner of the Release in `set_length`; the file has that length.
        self.length.load(Ordering::Acquire)
    }

    async fn set_length(&self, data: &Child, length: u64, mode: Preallocation) -> Result<()> {
        let mode = match mode {
            // To map it is not the data file's business; nor is there anything to be taken.
            Preallocation::Metadata => Preallocation::Off,
            _ if data.length() >= length => Preallocation::Off,
            mode => mode,
        };
        match data.truncate_with(length, mode).await {
            Err(error) if mode != Preallocation::Off => return Err(error),
            Err(error) if error.kind() == ErrorKind::NotSupported => {
                let has = data.length();
                if has < length {
                    let text = format!(
                        "the external data file has {has} bytes, too few for a disk of {length}"
                    );
                    return Err(Error::new(ErrorKind::NoSpace, text).caused_by(error));
                }
            }
            result => result?,
        }
        // Release: partner of the Acquire in `length`.
        self.length.store(length, Ordering::Release);
        Ok(())
    }
}

impl Qcow2 {
    /// Whether there is an external data file that must be a raw image at all times (X3).
    pub(super) fn data_is_raw(&self) -> bool {
        self.external.as_ref().is_some_and(|external| external.raw)
    }

    /// The child that holds the guest's clusters.
    pub(super) fn data<'a>(&self, layers: &'a Layers) -> Result<&'a Child> {
        match (&self.external, &layers.data) {
            (None, _) => Ok(&layers.file),
            (Some(_), Some(data)) => Ok(data),
            (Some(_), None) => {
                let text = "the image was opened without its external data file";
                Err(Error::new(ErrorKind::NotSupported, text))
            }
        }
    }

    /// Fills `vector` from the place of guest offset `guest`.
    pub(super) async fn read_data(
        &self,
        layers: &Layers,
        (host, guest): (u64, u64),
        vector: IoVector,
    ) -> Result<()> {
        layers.file.announce(DebugEvent::ReadAio).await;
        let data = self.data(layers)?;
        match &self.encryption {
            None => data.read(host, vector).await,
            Some(encryption) => {
                // Where the file ends there is no ciphertext: zeros, as in any image (EN1).
                let there = self.covered_part(host, vector.len() as u64) as usize;
                vector.fill(there, vector.len() - there, 0);
                encryption.read(data, (host, guest), vector.slice(0, there)).await
            }
        }
    }

    /// How many of `length` bytes of a place the file reaches over, counted in clusters.
    fn covered_part(&self, host: u64, length: u64) -> u64 {
        if self.is_covered(host, length) {
            return length;
        }
        let cluster_size = self.geometry.cluster_size();
        let in_cluster = host % cluster_size;
        let ends = (1..).map(|clusters| clusters * cluster_size - in_cluster);
        let covered = ends.take_while(|end| *end < length && self.is_covered(host, *end));
        covered.last().unwrap_or(0)
    }

    /// Writes `vector` to the place of guest offset `guest`.
    pub(super) async fn write_data(
        &self,
        layers: &Layers,
        (host, guest): (u64, u64),
        vector: IoVector,
    ) -> Result<()> {
        let length = vector.len() as u64;
        let inside = self.external.is_some() || self.is_covered(host, length);
        debug_assert!(inside, "E1: {length} bytes at {host:#x}");
        self.check_data_write(&layers.file, host, length).await?;
        layers.file.announce(DebugEvent::WriteAio).await;
        let data = self.data(layers)?;
        match &self.encryption {
            None => data.write(host, vector, RequestFlags::default()).await,
            Some(encryption) => encryption.write(data, (host, guest), vector).await,
        }
    }

    /// Whether the file reaches over `length` bytes of a place: only then may they be overwritten.
    pub(super) fn is_covered(&self, host: u64, length: u64) -> bool {
        match &self.external {
            None => self.refcounts.is_covered(host, length),
            Some(external) => {
                let end = self.geometry.align_up(external.length()).unwrap_or(u64::MAX);
                host.saturating_add(length) <= end
            }
        }
    }

    /// How much of `tail` bytes after guest offset `end` may be written with it (X2).
    pub(super) fn writable_tail(&self, end: u64, tail: u64) -> u64 {
        match &self.external {
            None => tail,
            Some(external) => external.length().saturating_sub(end).min(tail),
        }
    }

    /// First of every change of data: the image may be written to, and its data file reaches over
    /// the disk (X2).
    pub(super) async fn prepare_data(&self, layers: &Layers) -> Result<()> {
        self.check_key()?;
        self.prepare_for_writing(&layers.file).await?;
        let Some(external) = &self.external else { return Ok(()) };
        if external.length() > 0 {
            return Ok(());
        }
        let data = self.data(layers)?;
        let _turn = external.growing.lock().await;
        if external.length() == 0 {
            // A longer file stays as it is until the disk is resized.
            let length = self.disk_size().max(data.length());
            if data.length() < length {
                external.set_length(data, length, Preallocation::Off).await?;
            } else {
                external.length.store(self.disk_size(), Ordering::Release);
            }
        }
        Ok(())
    }

    /// Gives the data file the length of the disk.
    pub(super) async fn resize_data_file(
        &self,
        layers: &Layers,
        size: u64,
        mode: Preallocation,
    ) -> Result<()> {
        let Some(external) = &self.external else { return Ok(()) };
        let data = self.data(layers)?;
        let _turn = external.growing.lock().await;
        let (disk, has) = (self.disk_size(), data.length().min(size));
        // Nobody may write there before it is known to have ended.
        let doubt = self.doubt();
        let changed = self.change_data_file(external, data, (disk, has, size), mode).await;
        doubt.settle();
        changed
    }

    async fn change_data_file(
        &self,
        external: &ExternalData,
        data: &Child,
        (disk, has, size): (u64, u64, u64),
        mode: Preallocation,
    ) -> Result<()> {
        external.set_length(data, size, mode).await?;
        // Relaxed, both: with the turn to resize.
        if size <= disk {
            external.shrunk.store(true, Ordering::Relaxed);
        }
        // A write that was late when the disk shrank left bytes behind its end. Where nothing is mapped
        // nobody sees them; what was there when the image was opened is shown, as by the peer.
        let is_seen = external.raw || mode != Preallocation::Off;
        if has > disk && is_seen && external.shrunk.load(Ordering::Relaxed) {
            data.write_zeroes(disk, has - disk, RequestFlags::default()).await?;
        }
        Ok(())
    }

    /// Makes durable what was written to the data file and the file, the former first or at once.
    pub(super) async fn flush_files(&self, layers: &Layers) -> Result<()> {
        match &layers.data {
            None => layers.file.flush().await,
            Some(data) => {
                join_all(vec![Box::pin(data.flush()), Box::pin(layers.file.flush())]).await
            }
        }
    }

    /// What the data file is told before guest clusters become zeros (X3, X4): zeros if it must
    /// show them itself, else, with `discard`, that it need not keep them. The range is locked.
    pub(super) async fn erase_data(
        &self,
        layers: &Layers,
        (start, end): (u64, u64),
        discard: bool,
    ) -> Result<()> {
        let Some(external) = &self.external else { return Ok(()) };
        let end = end.min(external.length());
        if start >= end {
            return Ok(());
        }
        let data = self.data(layers)?;
        if external.raw {
            let flags = RequestFlags { may_unmap: discard, ..RequestFlags::default() };
            return data.write_zeroes(start, end - start, flags).await;
        }
        if discard && let Err(error) = data.discard(start, end - start).await {
            // A hint.
            tracing::debug!(%error, start, "the data file did not take a discard");
        }
        Ok(())
    }

    /// Gives all clusters of a range their places in the data file, which must read as zeros there
    /// where nothing was mapped. With a raw data file the whole disk is mapped always.
    pub(super) async fn map_data_file(&self, layers: &Layers, start: u64, end: u64) -> Result<()> {
        let mut at = self.geometry.align_down(start);
        while at < end {
            let position = self.position(at);
            let stop = end.min(at + position.rest);
            let guard = self.ranges.lock(at..stop).await;
            let hold = self.hold(layers);
            let mapped = self.map_in_slice(layers, position.number, at, stop).await;
            hold.release();
            drop(guard);
            mapped?;
            self.relieve(layers).await?;
            at = stop;
        }
        Ok(())
    }

    async fn map_in_slice(
        &self,
        layers: &Layers,
        number: SliceNumber,
        start: u64,
        end: u64,
    ) -> Result<()> {
        let slice = self.own_slice(layers, number).await?;
        let first = self.position(start).index;
        let count = self.geometry.clusters_for(end - start);
        self.slices.change(&slice, |editor| {
            for (step, index) in (0..count).zip(first..) {
                let host = start + (step << self.geometry.cluster_bits());
                let is_free = match self.geometry.extended_l2() {
                    true => editor.pair(index) == (0, 0),
                    false => self.decode(&slice, index, editor.get(index)) == Place::Unallocated,
                };
                // An offset past 2^56 cannot be: the disk is smaller.
                if is_free && let Ok((raw, word)) = self.mapped_place(host) {
                    match self.geometry.extended_l2() {
                        true => editor.set_pair(index, raw, word),
                        false => editor.set(index, raw),
                    }
                }
            }
        });
        Ok(())
    }

    /// The entry of a cluster whose place reads as zeros: it is data, unless it is encrypted, for
    /// which zeros are noise.
    fn mapped_place(&self, host: u64) -> Result<(u64, u64), EntryError> {
        let (extended, plain) = (self.geometry.extended_l2(), self.zeros_are_zeros());
        let cluster = match extended || plain {
            true => Cluster::Normal { host, copied: true },
            false => Cluster::Zero { host: Some(host), copied: true },
        };
        let subclusters = if plain { Subclusters::ALL_DATA } else { Subclusters::ALL_ZERO };
        Ok((L2Entry::encode(cluster, &self.geometry, self.version)?, subclusters.word()))
    }
}
