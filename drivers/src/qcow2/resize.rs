//! Changing the length of the disk: what is refused, and growing (`shrink` does the other).
//!
//! A larger L1 table is written whole to a new place and made durable; then one write of one
//! header sector changes size, place and length together (Q14). Lookups go on meanwhile: the table
//! in memory does not move.

use super::Qcow2;
use super::discard::DiscardReason;
use super::entry::Version;
use super::geometry::TABLE_ENTRY_BYTES;
use super::header_update::{DISK_FIELDS, Switch, disk_fields};
use super::layers::Layers;
use super::limbo::Freed;
use super::overlap::Structure;
use super::refcounts::HostRun;
use blockplex_graph::{DebugEvent, Error, ErrorKind, Preallocation, RequestFlags, Result};
use blockplex_io::buffer::{IoBuffer, IoVector};
use std::sync::atomic::Ordering;

impl Qcow2 {
    /// Bytes of the virtual disk.
    pub(super) fn disk_size(&self) -> u64 {
        // Acquire: partner of the Release in `resize`; a larger size comes with its table.
        self.size.load(Ordering::Acquire)
    }

    /// Sets the length of the disk, in bytes; new space reads as zeros, and is taken as `mode` says.
    pub(super) async fn resize(
        &self,
        layers: &Layers,
        size: u64,
        mode: Preallocation,
    ) -> Result<()> {
        self.prepare_data(layers).await?;
        let _turn = self.resizing.lock().await;
        self.check_size(size, mode).await?;
        self.bitmaps.check_size(size)?;
        if size < self.disk_size() {
            self.shrink(layers, size).await?;
            self.bitmaps.set_size(size);
            return Ok(());
        }
        self.grow(layers, size, mode).await
    }

    /// Refuses sizes that cannot be.
    async fn check_size(&self, size: u64, mode: Preallocation) -> Result<()> {
        let refuse = |kind, text: String| Err(Error::new(kind, text));
        if !size.is_multiple_of(512) {
            let text = format!("the new size {size} is not a multiple of 512");
            return refuse(ErrorKind::InvalidArgument, text);
        }
        if size > self.geometry.max_guest_size() {
            let most = self.geometry.max_guest_size();
            let text = format!("size {size} exceeds {most}, the most with this cluster size");
            return refuse(ErrorKind::InvalidArgument, text);
        }
        if size < self.disk_size() && mode != Preallocation::Off {
            let text = "preallocation cannot be used for shrinking an image";
            return refuse(ErrorKind::InvalidArgument, text.into());
        }
        // Its snapshots do not say how large the disk was.
        if self.version < Version::V3 && self.header.lock().await.snapshot_count > 0 {
            let text = "Can't resize a v2 image which has snapshots";
            return refuse(ErrorKind::NotSupported, text.into());
        }
        Ok(())
    }

    async fn grow(&self, layers: &Layers, size: u64, mode: Preallocation) -> Result<()> {
        let old = self.disk_size();
        // First: a data file that is too long does no harm.
        self.resize_data_file(layers, size, mode).await?;
        self.between_rounds(async || self.write_size(layers, size).await).await?;
        let cluster_end = self.geometry.align_up(old).unwrap_or(u64::MAX);
        // Nothing should be there; but what is there is not the new disk's.
        self.drop_clusters(layers, cluster_end, size).await?;
        if mode != Preallocation::Off && self.external.is_none() {
            // A cluster that shows the backing node must go on showing it.
            let first = if layers.backing.is_some() { cluster_end } else { old };
            self.preallocate(layers, first, size, mode).await?;
        }
        // Before anybody can reach it.
        let stored = matches!(mode, Preallocation::Falloc | Preallocation::Full);
        // What has storage of its own, which is zero, shows nothing.
        let shown = if stored && self.external.is_none() { cluster_end.min(size) } else { size };
        self.clear_new_space(layers, old, shown).await?;
        if self.data_is_raw() || (mode != Preallocation::Off && self.external.is_some()) {
            self.map_data_file(layers, old, size).await?;
        }
        // Before the size: what is written there from then on is marked.
        self.bitmaps.set_size(size);
        // Release: partner of the Acquire in `disk_size`.
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Makes new space zero: the tail of the last cluster, and what a longer backing node would show.
    async fn clear_new_space(&self, layers: &Layers, old: u64, size: u64) -> Result<()> {
        let nothing_shows = layers.backing_length() <= old;
        let cluster_end = self.geometry.align_up(old).unwrap_or(u64::MAX).min(size);
        let mut start = old;
        let end = if nothing_shows { cluster_end } else { size };
        if nothing_shows && self.is_zero(layers, start, end - start).await? {
            return Ok(());
        }
        if !nothing_shows {
            let unit = self.geometry.subcluster_size();
            start = old.next_multiple_of(unit).min(size);
            self.write_zeros_out(layers, old, start).await?;
        }
        if start == end {
            return Ok(());
        }
        match self.write_zeroes(layers, start, end - start, false).await {
            Err(error) if error.kind() == ErrorKind::NotSupported => {
                self.write_zeros_out(layers, start, end).await
            }
            result => result,
        }
    }

    async fn write_zeros_out(&self, layers: &Layers, start: u64, end: u64) -> Result<()> {
        let zeros = IoVector::zeroed((end - start).min(1 << 20) as usize);
        let mut at = start;
        while at < end {
            let count = (end - at).min(1 << 20);
            self.write(layers, at, &zeros.slice(0, count as usize)).await?;
            at += count;
        }
        Ok(())
    }

    /// Writes the new size, with a larger L1 table if it takes one (HU1). With the turn of a round.
    pub(super) async fn write_size(&self, layers: &Layers, size: u64) -> Result<()> {
        let (old_offset, old_entries) = self.l1.place();
        let entries = self.geometry.l1_entries_for(size).max(old_entries);
        let moved = match entries > old_entries {
            true => Some(self.write_l1(layers, entries).await?),
            false => None,
        };
        let offset = moved.as_ref().map_or(old_offset, |(run, _)| run.offset);
        let mut header = self.header.lock().await;
        let before = disk_fields(&header, header.size, header.l1_size, header.l1_table_offset);
        // At most 2^22 entries: the size was checked.
        let after = disk_fields(&header, size, entries as u32, offset);
        if moved.is_some() {
            layers.file.announce(DebugEvent::L1GrowActivateTable).await;
        }
        let switched = self.switch_header(&layers.file, DISK_FIELDS, &before, &after).await;
        if let Err((error, switch)) = switched {
            drop(header);
            return Err(match moved {
                Some((run, _)) if switch == Switch::NotMade => {
                    self.abandon(layers, run, error).await
                }
                _ => error,
            });
        }
        (header.size, header.l1_size, header.l1_table_offset) = (size, entries as u32, offset);
        drop(header);
        if let Some((_, table)) = moved {
            self.l1.moved(offset, entries, &table);
            let clusters = self.geometry.clusters_for(old_entries * TABLE_ENTRY_BYTES);
            if clusters > 0 {
                let discard = self.passes_discard(DiscardReason::Other);
                self.free(Freed { offset: old_offset, clusters, discard });
            }
        }
        Ok(())
    }

    /// Writes an L1 table of `entries` entries to a new place and makes it, its refcounts, and all
    /// that it names durable. It is the table of a round, no younger: an entry that came after it
    /// would name what is not durable, one that the round has and the table has not would be lost
    /// to whoever waits for the round.
    async fn write_l1(&self, layers: &Layers, entries: u64) -> Result<(HostRun, Vec<u8>)> {
        let bytes = entries * TABLE_ENTRY_BYTES;
        let clusters = self.geometry.clusters_for(bytes);
        layers.file.announce(DebugEvent::L1GrowAllocTable).await;
        let allocated = self.refcounts.allocate_row(&layers.file, clusters).await;
        let run = self.judge(&layers.file, allocated).await?;
        self.refcounts.add_metadata(Structure::ActiveL1, run.offset, bytes);
        match self.write_table_of_round(layers, run, entries).await {
            Ok(table) => {
                self.refcounts.note_short_end(run.offset + bytes);
                Ok((run, table))
            }
            Err(error) => Err(self.abandon(layers, run, error).await),
        }
    }

    async fn write_table_of_round(
        &self,
        layers: &Layers,
        run: HostRun,
        entries: u64,
    ) -> Result<Vec<u8>> {
        let table = self.round_with_table(layers, entries).await?;
        let mut whole = IoBuffer::zeroed((run.clusters << self.geometry.cluster_bits()) as usize);
        whole[..table.len()].copy_from_slice(&table);
        layers.file.announce(DebugEvent::L1GrowWriteTable).await;
        layers.file.write(run.offset, whole, RequestFlags::default()).await?;
        layers.file.flush().await?;
        Ok(table)
    }
}
