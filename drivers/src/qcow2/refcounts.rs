//! The refcounts of an image, as the rest of the driver uses them: allocate, release, write back.
//!
//! `allocation` knows which clusters are free; here are the reads that it asks for, and what
//! write-back needs. The refcounts in memory may be written at any moment: increments come before
//! anything refers to a cluster, decrements are made only when what referred to it is gone from
//! the disk (see `limbo`).

mod allocation;
mod block;
mod cluster_set;
mod extent;
mod metadata;
mod packing;
mod shrinking;

pub(super) use allocation::{AllocationError, HostRun};

use super::geometry::{Geometry, TABLE_ENTRY_BYTES};
use super::locks::{self, Ranked};
use super::overlap::{OverlapChecks, Structure};
use crate::dirty_bitmap::tree::{MAX_CHUNKS, Tree};
use allocation::{Allocation, Attempt};
use block::Block;
use blockplex_graph::{Child, DebugEvent, Error, ErrorKind, Result};
use blockplex_io::buffer::IoVector;
use blockplex_io::lock::RangeLock;
use extent::FileExtent;
use parking_lot::Mutex;
use std::sync::Arc;

/// Entries of the table that are written together: a sector of 512 bytes.
const SECTOR_ENTRIES: u64 = 64;
/// Free runs that are too short and are passed over in the search for a longer one.
const MAX_SHORT_RUNS: usize = 16;

/// See the page.
pub(super) struct Refcounts {
    cluster_bits: u32,
    /// The clusters of watched metadata.
    watched: Arc<Tree>,
    allocation: Mutex<Allocation>,
    /// Turns to read a block.
    loading: Ranked<RangeLock, { locks::REFCOUNT_BLOCK }>,
    /// How far the file reaches.
    file_extent: FileExtent,
}

/// What of the refcounts has to be written, in this order with a flush before each but the first:
/// blocks, table, (for a table in a new place) the header.
#[derive(Default)]
pub(super) struct RefcountWork {
    /// Offset in the file, and bytes.
    pub(super) blocks: Vec<(u64, Vec<u8>)>,
    taken_blocks: Vec<(u64, usize, usize)>,
    pub(super) table: Vec<(u64, Vec<u8>)>,
    taken_entries: Vec<u64>,
    /// Offset and clusters of a table in a new place; it is all in `table`.
    pub(super) moved: Option<(u64, u64)>,
}

impl RefcountWork {
    pub(super) fn is_empty(&self) -> bool {
        self.blocks.is_empty() && self.table.is_empty()
    }
}

impl Refcounts {
    /// The refcounts with this table at `offset` (bytes), of a file of this length. `cache_bytes`
    /// bounds the blocks in memory; there are four at least.
    pub(super) fn new(
        geometry: Geometry,
        table: Vec<u64>,
        offset: u64,
        file_length: u64,
        cache_bytes: u64,
    ) -> Refcounts {
        let bytes = table.len() as u64 * TABLE_ENTRY_BYTES;
        let place = (offset, geometry.clusters_for(bytes));
        let allocation = Allocation::new(geometry, table, place, file_length);
        let refcounts = Refcounts {
            cluster_bits: geometry.cluster_bits(),
            watched: allocation.metadata.watched(),
            allocation: Mutex::new(allocation),
            loading: Ranked::new(RangeLock::new()),
            file_extent: FileExtent::new(&geometry, file_length),
        };
        refcounts.set_cache_bytes(cache_bytes);
        refcounts
    }

    /// Bounds the blocks in memory.
    pub(super) fn set_cache_bytes(&self, bytes: u64) {
        let mut allocation = self.allocation.lock();
        let blocks = bytes >> allocation.geometry.cluster_bits();
        allocation.max_blocks = blocks.max(4) as usize;
    }

    /// Forgets the blocks that were not used since the last call and are as in the file.
    pub(super) fn remove_unused(&self) {
        self.allocation.lock().remove_unused();
    }

    /// Blocks that differ from the file.
    pub(super) fn dirty_blocks(&self) -> usize {
        self.allocation.lock().blocks.values().filter(|block| !block.is_clean()).count()
    }

    /// Blocks in memory now.
    #[cfg(test)]
    pub(super) fn blocks_in_memory(&self) -> usize {
        self.allocation.lock().blocks.len()
    }

    /// Remembers that `length` bytes at `offset` hold metadata of this kind.
    pub(super) fn add_metadata(&self, structure: Structure, offset: u64, length: u64) {
        let mut allocation = self.allocation.lock();
        let first = offset >> allocation.geometry.cluster_bits();
        let count = allocation.geometry.clusters_for(length);
        allocation.metadata.extend(first..first + count, structure);
    }

    /// As [`Refcounts::add_metadata`] for one cluster; false if it was known already.
    pub(super) fn add_metadata_cluster(&self, structure: Structure, offset: u64) -> bool {
        let mut allocation = self.allocation.lock();
        let cluster = offset >> allocation.geometry.cluster_bits();
        allocation.metadata.insert(cluster, structure)
    }

    /// Remembers that a cluster holds metadata of this kind, whatever else it holds.
    pub(super) fn overlay_metadata(&self, structure: Structure, offset: u64) {
        let mut allocation = self.allocation.lock();
        let cluster = offset >> allocation.geometry.cluster_bits();
        allocation.metadata.overlay(cluster, structure);
    }

    /// Remembers that of all clusters these hold metadata of this kind.
    pub(super) fn replace_overlay(&self, structure: Structure, offsets: &[u64]) {
        let mut allocation = self.allocation.lock();
        let bits = allocation.geometry.cluster_bits();
        allocation.metadata.forget(structure);
        for offset in offsets {
            allocation.metadata.overlay(offset >> bits, structure);
        }
    }

    /// Which kinds of metadata are watched.
    pub(super) fn checks(&self) -> OverlapChecks {
        self.allocation.lock().metadata.checks()
    }

    /// Watches these kinds of metadata.
    pub(super) fn set_checks(&self, checks: OverlapChecks) {
        self.allocation.lock().metadata.set_checks(checks);
    }

    /// Whether a range may lie on metadata that is watched. Any thread; takes no lock.
    #[inline]
    pub(super) fn touches_watched(&self, offset: u64, length: u64) -> bool {
        let last = offset.saturating_add(length.saturating_sub(1)) >> self.cluster_bits;
        // Beyond what the map without a lock reaches, ask the other one.
        last >= MAX_CHUNKS || self.watched.touches(offset >> self.cluster_bits, last)
    }

    /// The watched kind of metadata, other than `own`, that lies in a range.
    pub(super) fn find_overlap(
        &self,
        offset: u64,
        length: u64,
        own: &[Structure],
    ) -> Option<Structure> {
        let last = offset.saturating_add(length.saturating_sub(1)) >> self.cluster_bits;
        let own = own.iter().fold(0, |bits, structure| bits | structure.bit());
        let allocation = self.allocation.lock();
        allocation.metadata.find(offset >> self.cluster_bits..last + 1, own)
    }

    /// Calls `look` with a test of whether a host offset lies in metadata.
    pub(super) fn with_metadata<R>(&self, look: impl FnOnce(&dyn Fn(u64) -> bool) -> R) -> R {
        let allocation = self.allocation.lock();
        let bits = allocation.geometry.cluster_bits();
        look(&|offset| allocation.metadata.contains(offset >> bits))
    }

    /// Makes free clusters in a row used: at least one, at most `want`.
    pub(super) async fn allocate(&self, file: &Child, want: u64) -> Result<HostRun> {
        file.announce(DebugEvent::ClusterAlloc).await;
        file.announce(DebugEvent::RefblockAlloc).await;
        let run = self.retry(file, |allocation| allocation.allocate(want)).await?;
        self.cover(file, run).await
    }

    /// Makes `count` clusters in a row used: the first such row, unless many shorter ones lie before
    /// it; then at the end.
    pub(super) async fn allocate_row(&self, file: &Child, count: u64) -> Result<HostRun> {
        let mut short = Vec::new();
        let mut found = None;
        while found.is_none() && short.len() < MAX_SHORT_RUNS {
            let run = self.allocate(file, count).await?;
            match run.clusters == count {
                true => found = Some(run),
                false => short.push(run),
            }
        }
        for run in short {
            self.release(file, run.offset, run.clusters).await?;
        }
        match found {
            Some(run) => Ok(run),
            None => self.allocate_tail(file, count).await,
        }
    }

    /// Makes `count` clusters in a row at the end used.
    async fn allocate_tail(&self, file: &Child, count: u64) -> Result<HostRun> {
        file.announce(DebugEvent::ClusterAlloc).await;
        file.announce(DebugEvent::RefblockAlloc).await;
        let run = self.retry(file, |allocation| allocation.allocate_tail(count)).await?;
        self.cover(file, run).await
    }

    /// A place for `size` bytes of a compressed cluster, at most a cluster; other compressed
    /// clusters are before and behind it.
    pub(super) async fn allocate_bytes(&self, file: &Child, size: u64) -> Result<u64> {
        let offset = self.retry(file, |allocation| allocation.allocate_bytes(size)).await?;
        if let Err(error) = self.extend_file(file).await {
            self.release_bytes(file, offset, size).await?;
            return Err(error);
        }
        Ok(offset)
    }

    /// One reference less to the clusters of a place of compressed data.
    pub(super) async fn release_bytes(&self, file: &Child, offset: u64, size: u64) -> Result<()> {
        let geometry = self.allocation.lock().geometry;
        let first = geometry.align_down(offset);
        self.release(file, first, geometry.clusters_for(offset + size - first)).await
    }

    /// Whether the cluster at `offset` has one reference left, and gets no other: what has the
    /// last one may discard its bytes.
    pub(super) async fn claim_last(&self, file: &Child, offset: u64) -> Result<bool> {
        self.retry(file, |allocation| {
            let cluster = offset >> allocation.geometry.cluster_bits();
            allocation.claim_last(cluster)
        })
        .await
    }

    /// Makes the file reach over a run that was just allocated, or gives it back.
    async fn cover(&self, file: &Child, run: HostRun) -> Result<HostRun> {
        match self.extend_file(file).await {
            Ok(()) => Ok(run),
            Err(error) => {
                self.release(file, run.offset, run.clusters).await?;
                Err(error)
            }
        }
    }

    /// Makes the file reach over every cluster that was handed out. Before any write to one.
    pub(super) async fn extend_file(&self, file: &Child) -> Result<()> {
        self.file_extent.cover(file, || self.allocation.lock().used_end()).await
    }

    /// Cuts off what the file was extended by and does not need. When nothing else uses it.
    pub(super) async fn trim_file(&self, file: &Child) -> Result<()> {
        self.file_extent.trim(file, || self.allocation.lock().file_end()).await
    }

    /// Remembers that of the cluster that `end` lies in, which was just handed out, the bytes from
    /// there on are not used.
    pub(super) fn note_short_end(&self, end: u64) {
        let mut allocation = self.allocation.lock();
        if !allocation.geometry.is_aligned(end) {
            allocation.short_end = Some(end);
        }
    }

    /// Whether the file reaches over `length` bytes at `offset`: only then may they be written.
    pub(super) fn is_covered(&self, offset: u64, length: u64) -> bool {
        self.file_extent.covers(offset, length)
    }

    /// One reference less to `clusters` clusters from `offset` on.
    pub(super) async fn release(&self, file: &Child, offset: u64, clusters: u64) -> Result<()> {
        file.announce(DebugEvent::ClusterFree).await;
        let bits = self.allocation.lock().geometry.cluster_bits();
        for cluster in offset >> bits..(offset >> bits) + clusters {
            self.retry(file, |allocation| allocation.release(cluster)).await?;
        }
        Ok(())
    }

    /// One reference more to `clusters` clusters from `offset` on, which have some; on an error to
    /// none of them.
    pub(super) async fn retain(&self, file: &Child, offset: u64, clusters: u64) -> Result<()> {
        let bits = self.allocation.lock().geometry.cluster_bits();
        for at in 0..clusters {
            let cluster = (offset >> bits) + at;
            if let Err(error) = self.retry(file, |allocation| allocation.retain(cluster)).await {
                self.release(file, offset, at).await?;
                return Err(error);
            }
        }
        Ok(())
    }

    /// The error of a cluster at `offset` that already has the largest refcount.
    pub(super) fn overflow(&self, offset: u64) -> Error {
        let limit = self.allocation.lock().geometry.max_refcount();
        AllocationError::Overflow(offset, limit).into()
    }

    /// The refcount of the cluster at `offset`.
    pub(super) async fn refcount(&self, file: &Child, offset: u64) -> Result<u64> {
        self.retry(file, |allocation| {
            let cluster = offset >> allocation.geometry.cluster_bits();
            allocation.refcount(cluster)
        })
        .await
    }

    /// The refcount of the cluster at `offset`, if the block that counts it is in memory.
    pub(super) fn known_refcount(&self, offset: u64) -> Option<u64> {
        let mut allocation = self.allocation.lock();
        let cluster = offset >> allocation.geometry.cluster_bits();
        match allocation.refcount(cluster) {
            Attempt::Done(count) => Some(count),
            _ => None,
        }
    }

    /// The refcount table as it is now.
    pub(super) fn table(&self) -> Vec<u64> {
        self.allocation.lock().table.clone()
    }

    async fn retry<T>(
        &self,
        file: &Child,
        mut attempt: impl FnMut(&mut Allocation) -> Attempt<T>,
    ) -> Result<T> {
        loop {
            let outcome = attempt(&mut self.allocation.lock());
            match outcome {
                Attempt::Done(value) => return Ok(value),
                Attempt::Load(index) => self.load(file, index).await?,
                Attempt::Failed(error) => return Err(error.into()),
            }
        }
    }

    async fn load(&self, file: &Child, index: u64) -> Result<()> {
        let _turn = self.loading.turn(index).await;
        let (offset, size, order) = {
            let allocation = self.allocation.lock();
            if allocation.blocks.contains_key(&index) {
                return Ok(());
            }
            let offset = allocation.table.get(index as usize).copied().unwrap_or(0);
            let geometry = allocation.geometry;
            (offset, geometry.cluster_size() as usize, geometry.refcount_order())
        };
        let memory = IoVector::zeroed(size);
        file.announce(DebugEvent::RefblockLoad).await;
        file.read(offset, memory.clone()).await?;
        let block = Block::new(memory.to_vec().into_boxed_slice(), order);
        self.allocation.lock().insert_block(index, block);
        Ok(())
    }

    /// Snapshots of what has changed. Whoever takes them calls [`Refcounts::settle`].
    pub(super) fn take_dirty(&self) -> RefcountWork {
        let mut allocation = self.allocation.lock();
        let Allocation { table, place, next_place, dirty_entries, blocks, .. } = &mut *allocation;
        let mut work = RefcountWork {
            blocks: Vec::new(),
            taken_blocks: Vec::new(),
            table: Vec::new(),
            taken_entries: std::mem::take(dirty_entries).into_iter().collect(),
            moved: *next_place,
        };
        for (index, block) in blocks {
            let offset = table.get(*index as usize).copied().unwrap_or(0);
            if let Some((start, bytes)) = block.take_dirty() {
                work.taken_blocks.push((*index, start, bytes.len()));
                work.blocks.push((offset + start as u64, bytes));
            }
        }
        work.blocks.sort_unstable_by_key(|(offset, _)| *offset);
        if let Some((offset, _)) = next_place {
            work.table
                .push((*offset, table.iter().flat_map(|entry| entry.to_be_bytes()).collect()));
            return work;
        }
        let mut sectors: Vec<u64> = work.taken_entries.iter().map(|e| e / SECTOR_ENTRIES).collect();
        sectors.dedup();
        for sector in sectors {
            let start = sector * SECTOR_ENTRIES;
            let entries = table.iter().skip(start as usize).take(SECTOR_ENTRIES as usize);
            let bytes = entries.flat_map(|entry| entry.to_be_bytes()).collect();
            work.table.push((place.0 + start * TABLE_ENTRY_BYTES, bytes));
        }
        work
    }

    /// Ends write-back of what was taken. On success gives the clusters (offset, count) of tables
    /// that are not used any more.
    pub(super) fn settle(&self, work: &RefcountWork, written: bool) -> Vec<(u64, u64)> {
        let mut allocation = self.allocation.lock();
        for (index, start, length) in &work.taken_blocks {
            if let Some(block) = allocation.blocks.get_mut(index) {
                block.writing = false;
                if !written {
                    block.put_back(*start, *length);
                }
            }
        }
        if !written {
            allocation.dirty_entries.extend(&work.taken_entries);
            return Vec::new();
        }
        allocation.unsettled = false;
        let bits = allocation.geometry.cluster_bits();
        let abandoned = std::mem::take(&mut allocation.abandoned);
        let mut unused: Vec<_> =
            abandoned.into_iter().map(|(first, count)| (first << bits, count)).collect();
        if let Some(place) = work.moved {
            // A table that has grown again meanwhile counts the place it just got as abandoned.
            unused.retain(|old| *old != place);
            unused.push(std::mem::replace(&mut allocation.place, place));
            if allocation.next_place == Some(place) {
                allocation.next_place = None;
            }
        }
        unused
    }
}

impl From<AllocationError> for Error {
    fn from(error: AllocationError) -> Error {
        match error {
            AllocationError::Unsettled => {
                let text = "the refcounts of an image that was made empty are not written yet: \
                            flush it first";
                Error::new(ErrorKind::Io, text)
            }
            AllocationError::Full => {
                let text = "the refcount table has its largest size: no more clusters";
                Error::new(ErrorKind::NoSpace, text)
            }
            AllocationError::Overlap(offset) => {
                let text =
                    format!("the cluster at {offset:#x} holds metadata, but its refcount is 0");
                Error::new(ErrorKind::Corrupt, text)
            }
            AllocationError::Overflow(offset, limit) => {
                let text = format!(
                    "the cluster at {offset:#x} has refcount {limit}, the most with the refcount \
                     width of this image"
                );
                Error::new(ErrorKind::InvalidArgument, text)
            }
            AllocationError::Uncounted(offset) => {
                let text = format!("the cluster at {offset:#x} is in use, but its refcount is 0");
                Error::new(ErrorKind::Corrupt, text)
            }
        }
    }
}
