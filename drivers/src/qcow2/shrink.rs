//! A smaller disk, and a smaller file.
//!
//! - **H1** The smaller size is published first, and then all guest ranges are locked: whoever
//!   changes something asks with his lock whether that is still inside the disk (Q20). Writes in
//!   place that came before end where they were told to: limbo keeps their clusters until then.
//! - **H2** What lies past the new end is unallocated, durably, before L1 entries go; and both
//!   before the header says the smaller size. So a crash leaves the old disk, with zeros (or what
//!   backs it) at its end, or the new one; and a disk that grows again has nothing left there.
//! - **H3** Refcount blocks that count nothing but themselves go from the end of the table, and
//!   the table is durable without them before anything else happens to their clusters.
//! - **H4** The file is cut behind its last cluster in use, when the refcounts say so durably or
//!   say more. What cannot be cut stays: that is no failure of the request.

use super::Qcow2;
use super::entry::L1Entry;
use super::erase::Erase;
use super::layers::Layers;
use super::limbo::Freed;
use blockplex_graph::{DebugEvent, Error, ErrorKind, Preallocation, Result};
use std::sync::atomic::Ordering;

impl Qcow2 {
    /// Fails a guest's change of what lies before `end` when the disk does not have all these
    /// clusters any more (H1). With the lock of the range.
    pub(super) fn check_inside(&self, layers: &Layers, end: u64) -> Result<()> {
        let disk = self.geometry.align_up(self.disk_size()).unwrap_or(u64::MAX);
        if layers.guest && end > disk {
            let text = format!("guest offset {end:#x}: the disk ends before it by now");
            return Err(Error::new(ErrorKind::OutOfRange, text));
        }
        Ok(())
    }

    /// Makes the disk smaller. With the turn to resize.
    pub(super) async fn shrink(&self, layers: &Layers, size: u64) -> Result<()> {
        let old = self.disk_size();
        let store = |size| self.size.store(size, Ordering::Release);
        store(size);
        let _everything = self.ranges.lock(0..u64::MAX).await;
        let result = self.cut_disk(layers, size, old).await;
        if result.is_err() && self.header.lock().await.size == old {
            store(old);
        }
        result?;
        self.resize_data_file(layers, size, Preallocation::Off).await?;
        self.shrink_file(layers).await;
        Ok(())
    }

    /// H2.
    async fn cut_disk(&self, layers: &Layers, size: u64, old: u64) -> Result<()> {
        let first = self.geometry.align_up(size).unwrap_or(u64::MAX);
        self.drop_locked(layers, first, old).await?;
        self.flush(layers).await?;
        layers.file.announce(DebugEvent::L1ShrinkWriteTable).await;
        let indexes = self.geometry.l1_entries_for(size)..self.geometry.l1_entries_for(old);
        self.drop_tables(indexes.clone());
        self.flush(layers).await?;
        debug_assert!(indexes.into_iter().all(|index| self.l1.get(index) == 0), "H2");
        layers.file.announce(DebugEvent::L1ShrinkFreeL2Clusters).await;
        self.between_rounds(async || self.write_size(layers, size).await).await
    }

    /// Takes empty L2 tables out of the L1 table.
    pub(super) fn drop_tables(&self, indexes: std::ops::Range<u64>) {
        for index in indexes {
            if let Ok(L1Entry::Table { host, .. }) =
                L1Entry::decode(self.l1.get(index), &self.geometry)
            {
                self.l1.set(index, 0);
                self.free(Freed { offset: host, clusters: 1, discard: true });
            }
        }
    }

    /// Makes the guest clusters of a range unallocated.
    pub(super) async fn drop_clusters(&self, layers: &Layers, first: u64, end: u64) -> Result<()> {
        if first >= end {
            return Ok(());
        }
        let _range = self.ranges.lock(first..u64::MAX).await;
        self.drop_locked(layers, first, end).await
    }

    /// As [`Qcow2::drop_clusters`], with the lock of the range and of all behind it.
    pub(super) async fn drop_locked(&self, layers: &Layers, first: u64, end: u64) -> Result<()> {
        let end = self.geometry.align_up(end).unwrap_or(u64::MAX);
        let mut at = first;
        while at < end {
            let position = self.position(at);
            let index = self.l1_index(position.number);
            if L1Entry::decode(self.l1.get(index), &self.geometry) == Ok(L1Entry::Unallocated) {
                at = (index + 1).saturating_mul(self.geometry.bytes_per_l1_entry());
                continue;
            }
            let stop = end.min(at + position.rest);
            let hold = self.hold(layers);
            let dropped = self.drop_in_slice(layers, at, stop).await;
            hold.release();
            dropped?;
            self.relieve(layers).await?;
            at = stop;
        }
        Ok(())
    }

    async fn drop_in_slice(&self, layers: &Layers, at: u64, end: u64) -> Result<()> {
        // In memory first: what is not there yet would get a table of its own.
        self.slice(layers, self.position(at).number).await?;
        self.erase_step(layers, (at, end), Erase::Drop).await.map(drop)
    }

    /// H3 and H4. While nothing allocates: with all guest ranges locked.
    pub(super) async fn shrink_file(&self, layers: &Layers) {
        // What was freed is free in memory only after the round that made it so.
        let shrunk = match self.flush(layers).await {
            Ok(()) => self.between_rounds(async || self.cut_file(layers).await).await,
            failed => failed,
        };
        if let Err(error) = shrunk {
            tracing::warn!(%error, "the file of a qcow2 image could not be made smaller");
        }
    }

    async fn cut_file(&self, layers: &Layers) -> Result<()> {
        let dropped = self.refcounts.drop_empty_blocks(&layers.file).await?;
        if let Err(error) = self.full_round(layers).await {
            self.refcounts.restore_blocks(&dropped);
            return Err(error);
        }
        for block in dropped {
            if !block.counts_itself {
                self.refcounts.release(&layers.file, block.offset, 1).await?;
            }
        }
        self.full_round(layers).await?;
        self.refcounts.cut_file(&layers.file).await
    }
}
