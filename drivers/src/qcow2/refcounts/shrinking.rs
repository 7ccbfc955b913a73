//! Fewer refcount blocks, and a shorter file: the truths are `shrink`'s (H3, H4). Nothing may
//! allocate meanwhile.

use super::allocation::{Allocation, Attempt};
use super::{Refcounts, block::Block};
use crate::qcow2::overlap::Structure;
use blockplex_graph::{Child, Result};
use std::collections::BTreeSet;

/// A refcount block that is not in the table any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) struct DroppedBlock {
    index: u64,
    /// Where it was.
    pub(in crate::qcow2) offset: u64,
    /// Its own cluster was counted in it, and is counted no more.
    pub(in crate::qcow2) counts_itself: bool,
}

impl Refcounts {
    /// Takes the blocks at the end of the table that count nothing but themselves out of it. When
    /// the table is not written, they must be put back.
    pub(in crate::qcow2) async fn drop_empty_blocks(
        &self,
        file: &Child,
    ) -> Result<Vec<DroppedBlock>> {
        let mut dropped = Vec::new();
        loop {
            match self.retry(file, Allocation::drop_last_block).await {
                Ok(Some(block)) => dropped.push(block),
                Ok(None) => return Ok(dropped),
                Err(error) => {
                    self.restore_blocks(&dropped);
                    return Err(error);
                }
            }
        }
    }

    /// Puts blocks back into the table.
    pub(in crate::qcow2) fn restore_blocks(&self, dropped: &[DroppedBlock]) {
        let mut allocation = self.allocation.lock();
        let bits = allocation.geometry.cluster_bits();
        for block in dropped {
            if let Some(entry) = allocation.table.get_mut(block.index as usize) {
                *entry = block.offset;
            }
            allocation.dirty_entries.insert(block.index);
            allocation.metadata.insert(block.offset >> bits, Structure::RefcountBlock);
        }
    }

    /// Cuts the file behind its last cluster in use.
    pub(in crate::qcow2) async fn cut_file(&self, file: &Child) -> Result<()> {
        let Some(end) = self.retry(file, Allocation::last_used_end).await? else { return Ok(()) };
        let (old, new) = {
            let mut allocation = self.allocation.lock();
            let old = allocation.fresh;
            (old, allocation.set_fresh(end.min(old)))
        };
        let cut = self.file_extent.cut(file, new).await;
        if cut.is_err() {
            self.allocation.lock().set_fresh(old);
        }
        cut
    }

    /// Counts nothing but the header, the table, `kept` (offset and bytes) and the blocks that
    /// this takes; gives the clusters that are in use now, in order. Nothing is handed out before
    /// that is written.
    pub(in crate::qcow2) fn count_only(&self, kept: (u64, u64)) -> Vec<u64> {
        self.allocation.lock().count_only(kept)
    }
}

impl Allocation {
    /// Takes the last block out of the table if it counts nothing but itself.
    fn drop_last_block(&mut self) -> Attempt<Option<DroppedBlock>> {
        let Some(index) = self.table.iter().rposition(|entry| *entry != 0) else {
            return Attempt::Done(None);
        };
        // The first one counts the header.
        if index == 0 {
            return Attempt::Done(None);
        }
        let index = index as u64;
        let per_block = self.geometry.refcounts_per_block();
        let offset = self.table.get(index as usize).copied().unwrap_or(0);
        let cluster = offset >> self.geometry.cluster_bits();
        let counts_itself = cluster / per_block == index;
        let Some(block) = self.block(index) else { return Attempt::Load(index) };
        let used = block.len() as u64 - block.free();
        let own = counts_itself && block.get((cluster % per_block) as usize) == 1;
        if used > u64::from(own) {
            return Attempt::Done(None);
        }
        if let Some(entry) = self.table.get_mut(index as usize) {
            *entry = 0;
        }
        self.dirty_entries.insert(index);
        self.blocks.remove(&index);
        self.set_free(index, u64::from(super::allocation::UNKNOWN));
        self.metadata.remove(cluster);
        Attempt::Done(Some(DroppedBlock { index, offset, counts_itself }))
    }

    /// The number of the cluster behind the last one that is counted; none when what is metadata
    /// lies behind it (the image is damaged).
    fn last_used_end(&mut self) -> Attempt<Option<u64>> {
        let per_block = self.geometry.refcounts_per_block();
        let Some(index) = self.table.iter().rposition(|entry| *entry != 0) else {
            return Attempt::Done(None);
        };
        let index = index as u64;
        let Some(block) = self.block(index) else { return Attempt::Load(index) };
        let Some(last) = block.last_used() else { return Attempt::Done(None) };
        let end = index * per_block + last as u64 + 1;
        let is_whole = self.metadata.ends_before(end);
        Attempt::Done(is_whole.then_some(end))
    }

    /// Says that no cluster from `end` on is in use; gives its offset.
    fn set_fresh(&mut self, end: u64) -> u64 {
        self.fresh = end;
        self.hint = self.hint.min(end);
        end << self.geometry.cluster_bits()
    }

    fn count_only(&mut self, (offset, bytes): (u64, u64)) -> Vec<u64> {
        let bits = self.geometry.cluster_bits();
        let per_block = self.geometry.refcounts_per_block();
        let (table, table_clusters) = self.place;
        let mut used: BTreeSet<u64> = BTreeSet::from([0]);
        used.extend((table >> bits..).take(table_clusters as usize));
        used.extend((offset >> bits..).take(self.geometry.clusters_for(bytes) as usize));
        // The blocks that count these, and those that count the blocks.
        let mut indexes = BTreeSet::new();
        loop {
            let needed: BTreeSet<u64> = used.iter().map(|cluster| cluster / per_block).collect();
            if needed == indexes {
                break;
            }
            indexes = needed;
            let entry = |index: &u64| self.table.get(*index as usize).copied().unwrap_or(0) >> bits;
            used.extend(indexes.iter().map(entry));
        }
        let size = self.geometry.cluster_size() as usize;
        self.forget_blocks();
        for (index, entry) in (0..).zip(&mut self.table) {
            if *entry != 0 && !indexes.contains(&index) {
                *entry = 0;
                self.dirty_entries.insert(index);
            }
        }
        for index in indexes {
            let mut block = Block::fresh(size, self.geometry.refcount_order());
            for cluster in used.range(index * per_block..(index + 1) * per_block) {
                // 1 fits every width, and the index is within the block.
                let set = block.set((cluster % per_block) as usize, 1);
                debug_assert!(set.is_ok(), "cluster {cluster}: {set:?}");
            }
            self.insert_block(index, block);
        }
        self.metadata.keep(|cluster| used.contains(&cluster));
        (self.hint, self.packing, self.unsettled) = (1, None, true);
        used.into_iter().collect()
    }

    /// Forgets all blocks: they are read anew.
    fn forget_blocks(&mut self) {
        self.blocks.clear();
        self.free.fill(super::allocation::UNKNOWN);
    }
}
