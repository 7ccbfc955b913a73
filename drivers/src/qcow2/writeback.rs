//! The order in which metadata reaches the disk.
//!
//! A *round* writes back everything that was dirty when it began:
//!
//! | step | what | then |
//! |---|---|---|
//! | 1 | snapshots: first L1, then slices, then refcounts | |
//! | 2 | refcount blocks | flush, the external data file as well |
//! | 3 | refcount table (and the header, if the table moved) | flush (each) |
//! | 4 | L2 slices and L1 table | flush |
//!
//! Steps without work cost nothing, so a round with nothing dirty is one flush. What it gives:
//!
//! - **W1** Data and refcount increments are durable before an L2 entry that needs them is
//!   written. An entry enters a snapshot only after it was committed; its data and its increment
//!   came before, so the flush of step 2 covers the data and the refcounts of step 1, taken last,
//!   hold the increment.
//! - **W2** A new L2 table is durable before the L1 entry that names it is written: it is written
//!   whole, as zeros or a copy, before the entry changes in memory, and the flush of step 2 comes
//!   between. So its slices need no flush of their own before the L1 table.
//! - **W3** A refcount decrement is written only after the change that dropped the reference is
//!   durable: it is not even made in memory before that (`limbo`).
//! - **W4** Refcount blocks are durable before the refcount table names them, and a table in a new
//!   place before the header does.
//! - **W5** Whoever waits for a round gets one that began after he came: a flush covers every
//!   write that had completed before it (P2, Q16). Others that came before it began share it.
//! - With lazy refcounts a round has no step 2 and 3 (but for the flush of step 2): the dirty bit
//!   stands in for W1 and W4 (Y1 in `lazy_refcounts`).
//! - **W6** A round that fails leaves everything dirty that it had taken.

use super::Qcow2;
use super::discard::DiscardReason;
use super::header::Header;
use super::join::join_all;
use super::l1_table::DirtySector;
use super::layers::Layers;
use super::limbo::Freed;
use super::locks::{self, Ranked};
use super::overlap::Structure;
use super::refcounts::{HostRun, RefcountWork};
use super::slice_cache::DirtySlice;
use blockplex_graph::driver::LocalFuture;
use blockplex_graph::{Child, DebugEvent, Error, RequestFlags, Result};
use blockplex_io::buffer::IoBuffer;
use blockplex_io::lock::CoMutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Writes that run side by side.
const PARALLEL: usize = 32;
/// Bytes of one write, unless a single part has more.
const MAX_WRITE: usize = 1 << 20;
/// Bytes of the writes that run side by side.
const MAX_BATCH: usize = 4 << 20;
/// The most rounds before an image is closed: one for what is dirty, one for what was freed before
/// it, one for the refcount table that the first one freed, and one for what that leaves.
const LAST_ROUNDS: usize = 4;
/// The header fields of the refcount table: offset and clusters.
const REFCOUNT_TABLE_OFFSET: u64 = 48;

/// The rounds of an image, numbered from 1.
pub(super) struct Rounds {
    turn: Ranked<CoMutex<()>, { locks::ROUND }>,
    begun: AtomicU64,
    /// The last one that succeeded.
    succeeded: AtomicU64,
}

impl Rounds {
    pub(super) fn new() -> Rounds {
        let zero = || AtomicU64::new(0);
        Rounds { turn: Ranked::new(CoMutex::new(())), begun: zero(), succeeded: zero() }
    }

    /// The last round that has begun.
    pub(super) fn begun(&self) -> u64 {
        // SeqCst, here and where rounds begin: what was changed before this look is in the round
        // after the one it gives.
        self.begun.load(Ordering::SeqCst)
    }

    /// The last round that has succeeded.
    pub(super) fn succeeded(&self) -> u64 {
        self.succeeded.load(Ordering::SeqCst)
    }
}

/// What a round has taken.
#[derive(Default)]
struct Work {
    sectors: Vec<DirtySector>,
    slices: Vec<DirtySlice>,
    refcounts: RefcountWork,
}

impl Work {
    fn is_empty(&self) -> bool {
        self.sectors.is_empty() && self.slices.is_empty() && self.refcounts.is_empty()
    }
}

/// The work of a round, on its way to the disk. When it is torn down with its loop, what was taken is
/// dirty again (W6), and since some of it may still reach the file, the image is given up (I3).
struct Taken<'a> {
    image: &'a Qcow2,
    work: Work,
    defers: bool,
    ended: bool,
}

impl Taken<'_> {
    /// Ends it; gives the clusters (offset, count) of refcount tables that are not used any more.
    fn end(mut self, written: bool) -> Vec<(u64, u64)> {
        self.settle(written)
    }

    fn settle(&mut self, written: bool) -> Vec<(u64, u64)> {
        self.ended = true;
        let Work { sectors, slices, refcounts } = std::mem::take(&mut self.work);
        let unused = match self.defers {
            true => Vec::new(),
            false => self.image.refcounts.settle(&refcounts, written),
        };
        if !written {
            self.image.l1.put_back(&sectors);
            self.image.slices.put_back(slices);
        }
        unused
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.image.give_up();
            self.settle(false);
        }
    }
}

impl Qcow2 {
    /// Makes everything durable that has completed (W5).
    pub(super) async fn flush(&self, layers: &Layers) -> Result<()> {
        layers.file.announce(DebugEvent::FlushToOs).await;
        if self.read_only {
            layers.file.announce(DebugEvent::FlushToDisk).await;
            return self.flush_files(layers).await;
        }
        let before = self.rounds.begun();
        let turn = self.rounds.turn.lock().await;
        if self.rounds.succeeded() <= before {
            self.round(layers).await?;
        }
        debug_assert!(self.rounds.succeeded() > before, "W5");
        drop(turn);
        self.recycle(layers).await;
        Ok(())
    }

    /// Writes back if so much is dirty, or waits to become free, that it is time.
    pub(super) async fn relieve(&self, layers: &Layers) -> Result<()> {
        if !self.slices.wants_write_back() && !self.limbo.is_large() {
            return Ok(());
        }
        self.flush(layers).await
    }

    /// Runs `work` between two rounds.
    pub(super) async fn between_rounds<T>(
        &self,
        work: impl AsyncFnOnce() -> Result<T>,
    ) -> Result<T> {
        let _turn = self.rounds.turn.lock().await;
        work().await
    }

    /// One round. Only with the turn. It may leave the refcounts out (`lazy_refcounts`).
    pub(super) async fn round(&self, layers: &Layers) -> Result<()> {
        let defers = self.defers_refcounts(&layers.file).await?;
        self.write_round(layers, defers, 0).await?;
        if !defers && self.may_mark_clean() {
            return self.mark_clean(&layers.file).await;
        }
        Ok(())
    }

    /// One round that leaves nothing out. Only with the turn.
    pub(super) async fn full_round(&self, layers: &Layers) -> Result<()> {
        self.write_round(layers, false, 0).await.map(drop)
    }

    /// One round; gives the L1 table that it began with, as the bytes of `entries` entries. Only with
    /// the turn.
    pub(super) async fn round_with_table(&self, layers: &Layers, entries: u64) -> Result<Vec<u8>> {
        let defers = self.defers_refcounts(&layers.file).await?;
        self.write_round(layers, defers, entries).await
    }

    async fn write_round(&self, layers: &Layers, defers: bool, entries: u64) -> Result<Vec<u8>> {
        self.check_known()?;
        let number = self.rounds.begun.fetch_add(1, Ordering::SeqCst) + 1;
        let (sectors, table) = self.l1.take_dirty(entries);
        let slices = self.slices.take_dirty();
        let refcounts = match defers {
            true => RefcountWork::default(),
            false => self.refcounts.take_dirty(),
        };
        let work = Work { sectors, slices, refcounts };
        debug_assert!(work.is_empty() || self.is_prepared(), "I1: metadata of an unprepared image");
        self.assert_may_defer(defers);
        let unused = self.write_taken(layers, work, defers).await?;
        self.rounds.succeeded.store(number, Ordering::SeqCst);
        if !defers {
            self.nothing_deferred();
        }
        self.slices.trim();
        self.free_unused(unused);
        Ok(table)
    }

    /// Writes the refcounts alone, durably, between two rounds (Y4).
    pub(super) async fn write_refcounts(&self, layers: &Layers) -> Result<()> {
        let _turn = self.rounds.turn.lock().await;
        self.check_known()?;
        let work = Work { refcounts: self.refcounts.take_dirty(), ..Work::default() };
        let unused = self.write_taken(layers, work, false).await?;
        self.free_unused(unused);
        Ok(())
    }

    /// Gives the clusters of refcount tables that are not used any more.
    async fn write_taken(
        &self,
        layers: &Layers,
        work: Work,
        defers: bool,
    ) -> Result<Vec<(u64, u64)>> {
        let taken = Taken { image: self, work, defers, ended: false };
        let result = self.write_work(layers, &taken.work).await;
        let unused = taken.end(result.is_ok());
        result.map(|()| unused)
    }

    fn free_unused(&self, unused: Vec<(u64, u64)>) {
        for (offset, clusters) in unused {
            let discard = self.passes_discard(DiscardReason::Other);
            self.free(Freed { offset, clusters, discard });
        }
    }

    /// Steps 2 to 4.
    async fn write_work(&self, layers: &Layers, work: &Work) -> Result<()> {
        let file = &layers.file;
        let Work { sectors, slices, refcounts } = work;
        debug_assert!(!self.read_only || refcounts.is_empty() && slices.is_empty());
        if !refcounts.is_empty() {
            self.refcounts.extend_file(file).await?;
        }
        self.check_work(file, work).await?;
        announce_blocks(file, work).await;
        write_all(file, refcounts.blocks.iter().map(|(at, bytes)| (*at, bytes))).await?;
        if slices.is_empty() && sectors.is_empty() {
            file.announce(DebugEvent::FlushToDisk).await;
        }
        self.flush_files(layers).await?;
        if !refcounts.table.is_empty() {
            let grows = refcounts.moved.is_some();
            let (table, hookup) =
                (DebugEvent::RefblockAllocWriteTable, DebugEvent::RefblockAllocHookup);
            file.announce(if grows { table } else { hookup }).await;
            write_all(file, refcounts.table.iter().map(|(at, bytes)| (*at, bytes))).await?;
            file.flush().await?;
        }
        if let Some((offset, clusters)) = refcounts.moved {
            file.announce(DebugEvent::RefblockAllocSwitchTable).await;
            let mut header = self.header.lock().await;
            header.refcount_table_offset = offset;
            // At most 8 MiB of clusters.
            header.refcount_table_clusters = clusters as u32;
            write_refcount_place(file, &header).await?;
            file.flush().await?;
        }
        if slices.is_empty() && sectors.is_empty() {
            return Ok(());
        }
        let mut writes = Vec::with_capacity(slices.len() + sectors.len());
        for DirtySlice { slice, bytes } in slices {
            let offset = self.slice_offset(slice.number());
            let guest = self.guest_of(slice.number());
            writes.push((offset.map_err(|fault| fault.at(guest))?, bytes));
        }
        writes.extend(sectors.iter().map(|sector| (sector.offset, &sector.bytes)));
        writes.sort_unstable_by_key(|(offset, _)| *offset);
        announce_tables(file, work).await;
        write_all(file, writes.into_iter()).await?;
        file.announce(DebugEvent::FlushToDisk).await;
        file.flush().await
    }

    /// Refuses a round that would write one table over another (OC1).
    async fn check_work(&self, file: &Child, work: &Work) -> Result<()> {
        let Work { sectors, slices, refcounts } = work;
        let (blocks, table) = (refcounts.blocks.iter(), refcounts.table.iter());
        let blocks = blocks.map(|(at, bytes)| (*at, bytes.len(), Structure::RefcountBlock));
        let table = table.map(|(at, bytes)| (*at, bytes.len(), Structure::RefcountTable));
        let sectors = sectors.iter().map(|s| (s.offset, s.bytes.len(), Structure::ActiveL1));
        let slices = slices.iter().filter_map(|DirtySlice { slice, bytes }| {
            let offset = self.slice_offset(slice.number()).ok()?;
            Some((offset, bytes.len(), Structure::ActiveL2))
        });
        for (offset, length, own) in blocks.chain(table).chain(sectors).chain(slices) {
            self.check_write(file, (offset, length as u64), &[own]).await?;
        }
        Ok(())
    }

    /// Makes clusters free that nobody uses any more. What fails here is lost to the image, and no
    /// fault of the request that happened to come by.
    async fn recycle(&self, layers: &Layers) {
        if self.limbo.is_empty() {
            return;
        }
        for _ in 0..3 {
            self.grace.try_advance();
        }
        for freed in self.limbo.take_ready(&self.grace, self.rounds.succeeded()) {
            let released = self.release(&layers.file, freed).await;
            if let Err(error) = self.judge(&layers.file, released).await {
                tracing::warn!(%error, ?freed, "freed clusters of a qcow2 image are lost");
            }
        }
    }

    /// Gives back what nothing refers to any more, on the disk either.
    pub(super) async fn release(&self, file: &Child, freed: Freed) -> Result<()> {
        let Freed { offset, clusters, discard } = freed;
        if discard {
            self.discard_unshared(file, offset, clusters).await?;
        }
        self.refcounts.release(file, offset, clusters).await
    }

    /// Tells the file which of these clusters it need not keep: those that have one reference
    /// left, ours. What a snapshot or another compressed cluster refers to is not ours to discard.
    async fn discard_unshared(&self, file: &Child, offset: u64, clusters: u64) -> Result<()> {
        let bits = self.geometry.cluster_bits();
        let mut start = 0;
        for at in 0..=clusters {
            let is_ours =
                at < clusters && self.refcounts.claim_last(file, offset + (at << bits)).await?;
            if is_ours {
                continue;
            }
            // A hint: what cannot be discarded is used again as it is.
            if at > start
                && let Err(error) =
                    file.discard(offset + (start << bits), (at - start) << bits).await
            {
                tracing::debug!(%error, offset, "the file did not take a discard");
            }
            start = at + 1;
        }
        Ok(())
    }

    /// W1, W2: what an entry is going to name is counted in memory, so that the round that takes the
    /// entry takes the counts, too.
    pub(super) fn assert_counted(&self, run: HostRun) {
        if cfg!(debug_assertions) && self.external.is_none() {
            let bits = self.geometry.cluster_bits();
            for offset in (0..run.clusters).map(|at| run.offset + (at << bits)) {
                let count = self.refcounts.known_refcount(offset);
                debug_assert_ne!(count, Some(0), "W1: {offset:#x} is not counted");
            }
        }
    }

    /// Undoes an allocation that nothing refers to and that no I/O goes to; gives `error` back.
    pub(super) async fn abandon(&self, layers: &Layers, run: HostRun, error: Error) -> Error {
        let released = self.refcounts.release(&layers.file, run.offset, run.clusters).await;
        if let Err(error) = released {
            tracing::warn!(%error, offset = run.offset, "clusters of a failed write are lost");
        }
        error
    }

    /// The last I/O: everything is written back, and everything that was freed is free.
    pub(super) async fn finish(&self, layers: &Layers) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.check_known()?;
        if self.is_broken() {
            // No metadata of a corrupt image is written any more.
            return self.flush_files(layers).await;
        }
        if !self.may_write_now() {
            // Nothing was ever written.
            return Ok(());
        }
        self.flush(layers).await?;
        let stored = self.store_bitmaps(layers).await;
        for _ in 0..LAST_ROUNDS {
            self.between_rounds(async || self.full_round(layers).await).await?;
            // What was freed is free in memory then; that is written, too.
            self.recycle(layers).await;
            if self.limbo.is_empty() && self.refcounts.dirty_blocks() == 0 {
                break;
            }
        }
        self.between_rounds(async || self.mark_clean(&layers.file).await).await?;
        self.refcounts.trim_file(&layers.file).await?;
        stored
    }
}

/// Says that refcount blocks are about to be written.
async fn announce_blocks(file: &Child, work: &Work) {
    if !work.refcounts.table.is_empty() {
        file.announce(DebugEvent::RefblockAllocWrite).await;
    }
    if !work.refcounts.blocks.is_empty() {
        file.announce(DebugEvent::RefblockUpdate).await;
        file.announce(DebugEvent::RefblockUpdatePart).await;
    }
}

/// Says that parts of L2 tables and of the L1 table are about to be written.
async fn announce_tables(file: &Child, work: &Work) {
    if !work.slices.is_empty() {
        file.announce(DebugEvent::L2Update).await;
    }
    if !work.sectors.is_empty() {
        file.announce(DebugEvent::L1Update).await;
    }
}

async fn write_refcount_place(file: &Child, header: &Header) -> Result<()> {
    let mut bytes = header.refcount_table_offset.to_be_bytes().to_vec();
    bytes.extend(header.refcount_table_clusters.to_be_bytes());
    let vector = IoBuffer::from_slice(&bytes);
    file.write(REFCOUNT_TABLE_OFFSET, vector, RequestFlags::default()).await
}

/// Writes all, some side by side; neighbours in one.
pub(super) async fn write_all<'a>(
    file: &Child,
    writes: impl Iterator<Item = (u64, &'a Vec<u8>)>,
) -> Result<()> {
    let mut writes = writes.peekable();
    let mut batch: Vec<LocalFuture<'_, Result<()>>> = Vec::new();
    let mut batched = 0;
    while let Some((start, first)) = writes.next() {
        let mut parts = vec![first];
        let mut length = first.len();
        while let Some((_, next)) = writes.next_if(|(offset, next)| {
            *offset == start + length as u64 && length + next.len() <= MAX_WRITE
        }) {
            length += next.len();
            parts.push(next);
        }
        let mut buffer = IoBuffer::zeroed(length);
        let mut rest = &mut buffer[..];
        for part in parts {
            let (this, next) = rest.split_at_mut(part.len());
            this.copy_from_slice(part);
            rest = next;
        }
        batch.push(Box::pin(file.write(start, buffer, RequestFlags::default())));
        batched += length;
        if batch.len() == PARALLEL || batched >= MAX_BATCH {
            join_all(std::mem::take(&mut batch)).await?;
            batched = 0;
        }
    }
    join_all(batch).await
}
