//! Which host clusters are free: the refcounts in memory and the search through them.
//!
//! Everything here is synchronous, under one short mutex. What needs a block that is not in memory
//! says so ([`Attempt::Load`]) without having changed anything, and is tried again.
//!
//! New blocks count themselves: a missing block is put into the very cluster that was looked for,
//! which is free, as nothing counts it. The table grows in memory, too; write-back puts it in its
//! new place before anything that depends on it.

use super::block::Block;
use super::metadata::Metadata;
use crate::qcow2::geometry::{Geometry, HOST_OFFSET_LIMIT};
use crate::qcow2::overlap::Structure;
use std::collections::{BTreeSet, HashMap};

/// The free refcounts of a block that was not looked at yet.
pub(super) const UNKNOWN: u32 = u32::MAX;

/// The refcounts of an image. See the page.
pub(super) struct Allocation {
    pub(super) geometry: Geometry,
    /// The refcount table: where the blocks are, 0 where there is none.
    pub(super) table: Vec<u64>,
    /// The zero refcounts of each block, or [`UNKNOWN`].
    pub(super) free: Vec<u32>,
    /// Where the table is in the file: offset and clusters.
    pub(super) place: (u64, u64),
    /// Where the table is going to be, since it has grown.
    pub(super) next_place: Option<(u64, u64)>,
    /// Entries of the table that differ from the file.
    pub(super) dirty_entries: BTreeSet<u64>,
    pub(super) blocks: HashMap<u64, Block>,
    pub(super) max_blocks: usize,
    clock: u64,
    /// What the clock was when unused blocks were last removed.
    cleaned: u64,
    /// No cluster before it is free.
    pub(super) hint: u64,
    /// No cluster from here on was handed out since the image was opened, and all of them lie
    /// past what was then the end of the file: they read as zeros.
    pub(super) fresh: u64,
    /// Header, tables and blocks: what must never be handed out.
    pub(super) metadata: Metadata,
    /// Clusters (first, count) of tables that grew again before they were written.
    pub(super) abandoned: Vec<(u64, u64)>,
    /// Where the next compressed cluster goes, in a host cluster that others are in (`packing`).
    pub(super) packing: Option<u64>,
    /// Where the last cluster ends that is not used to its end, as far as anybody said so.
    pub(super) short_end: Option<u64>,
    /// The file still has refcount blocks, whole ones, that nothing here knows: no cluster may be
    /// handed out before a write-back has ended that.
    pub(super) unsettled: bool,
}

/// Host clusters in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) struct HostRun {
    /// The first byte.
    pub(in crate::qcow2) offset: u64,
    /// How many.
    pub(in crate::qcow2) clusters: u64,
    /// They read as zeros.
    pub(in crate::qcow2) zeroed: bool,
}

/// How a try ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Attempt<T> {
    Done(T),
    /// Load the block of this table entry and try again.
    Load(u64),
    Failed(AllocationError),
}

/// Why refcounts could not be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) enum AllocationError {
    /// The refcount table has its largest size.
    Full,
    /// The cluster at this offset is not counted, and holds metadata.
    Overlap(u64),
    /// The cluster at this offset is in use, and its refcount is 0.
    Uncounted(u64),
    /// The cluster at this offset has the largest refcount, which is this.
    Overflow(u64, u64),
    /// The refcounts in the file are those of an image that was not yet made empty.
    Unsettled,
}

impl Allocation {
    pub(super) fn new(
        geometry: Geometry,
        table: Vec<u64>,
        place: (u64, u64),
        file_length: u64,
    ) -> Allocation {
        let free = vec![UNKNOWN; table.len()];
        Allocation {
            geometry,
            table,
            free,
            place,
            next_place: None,
            dirty_entries: BTreeSet::new(),
            blocks: HashMap::new(),
            max_blocks: 4,
            clock: 0,
            cleaned: 0,
            hint: 1,
            fresh: geometry.clusters_for(file_length),
            metadata: Metadata::new(),
            abandoned: Vec::new(),
            packing: None,
            short_end: None,
            unsettled: false,
        }
    }

    /// Makes free clusters in a row used: at least one, at most `want`.
    pub(super) fn allocate(&mut self, want: u64) -> Attempt<HostRun> {
        if self.unsettled {
            return Attempt::Failed(AllocationError::Unsettled);
        }
        let per_block = self.geometry.refcounts_per_block();
        loop {
            let cluster = self.hint;
            let index = cluster / per_block;
            if cluster >= self.cluster_limit() {
                return Attempt::Failed(AllocationError::Full);
            }
            match self.table.get(index as usize) {
                None => match self.grow_table(index) {
                    Attempt::Done(()) => continue,
                    Attempt::Load(index) => return Attempt::Load(index),
                    Attempt::Failed(error) => return Attempt::Failed(error),
                },
                Some(0) => {
                    if self.metadata.contains(cluster) {
                        return self.overlap(cluster);
                    }
                    self.add_block(index, cluster);
                    self.count_first(cluster, 1);
                    continue;
                }
                Some(_) => {}
            }
            if self.free.get(index as usize) == Some(&0) {
                self.hint = (index + 1) * per_block;
                continue;
            }
            let Some(block) = self.block(index) else { return Attempt::Load(index) };
            let Some((at, run)) = block.free_run((cluster % per_block) as usize, want) else {
                self.hint = (index + 1) * per_block;
                continue;
            };
            return self.take(index * per_block + at as u64, run);
        }
    }

    /// Makes the free clusters at `first` used.
    fn take(&mut self, first: u64, mut run: u64) -> Attempt<HostRun> {
        if first < self.fresh {
            run = run.min(self.fresh - first);
        }
        let taken = (first..first + run).find(|cluster| self.metadata.contains(*cluster));
        if let Some(cluster) = taken {
            return self.overlap(cluster);
        }
        let zeroed = first >= self.fresh;
        self.count_first(first, run);
        self.hint = first + run;
        Attempt::Done(HostRun { offset: self.offset_of(first), clusters: run, zeroed })
    }

    /// Makes `count` free clusters in a row at the end used.
    pub(super) fn allocate_tail(&mut self, count: u64) -> Attempt<HostRun> {
        if self.unsettled {
            return Attempt::Failed(AllocationError::Unsettled);
        }
        loop {
            let entries = self.table.len() as u64;
            let plan = match self.plan_tail(count) {
                Attempt::Done(plan) => plan,
                Attempt::Load(index) => return Attempt::Load(index),
                Attempt::Failed(error) => return Attempt::Failed(error),
            };
            let last = (plan.end - 1) / self.geometry.refcounts_per_block();
            if last < entries {
                return self.take_plan(&plan, count);
            }
            match self.grow_table(last) {
                Attempt::Done(()) => {}
                Attempt::Load(index) => return Attempt::Load(index),
                Attempt::Failed(error) => return Attempt::Failed(error),
            }
        }
    }

    /// One reference more to a cluster that has some.
    pub(super) fn retain(&mut self, cluster: u64) -> Attempt<()> {
        let per_block = self.geometry.refcounts_per_block();
        let index = cluster / per_block;
        let uncounted = Attempt::Failed(AllocationError::Uncounted(self.offset_of(cluster)));
        let offset = self.offset_of(cluster);
        let limit = self.geometry.max_refcount();
        if self.table.get(index as usize).is_none_or(|offset| *offset == 0) {
            return uncounted;
        }
        let Some(block) = self.block(index) else { return Attempt::Load(index) };
        let at = (cluster % per_block) as usize;
        match block.get(at) {
            0 => uncounted,
            count if count >= limit || block.set(at, count + 1).is_err() => {
                Attempt::Failed(AllocationError::Overflow(offset, limit))
            }
            _ => Attempt::Done(()),
        }
    }

    /// One reference less to a cluster; the refcount that is left.
    pub(super) fn release(&mut self, cluster: u64) -> Attempt<u64> {
        let per_block = self.geometry.refcounts_per_block();
        let index = cluster / per_block;
        let uncounted = Attempt::Failed(AllocationError::Uncounted(self.offset_of(cluster)));
        if self.table.get(index as usize).is_none_or(|offset| *offset == 0) {
            return uncounted;
        }
        let Some(block) = self.block(index) else { return Attempt::Load(index) };
        let at = (cluster % per_block) as usize;
        let Some(left) = block.get(at).checked_sub(1) else { return uncounted };
        if block.set(at, left).is_err() {
            return uncounted;
        }
        let free = block.free();
        self.set_free(index, free);
        if left == 0 {
            self.hint = self.hint.min(cluster);
            self.metadata.remove(cluster);
            self.stop_packing_in(cluster);
        }
        Attempt::Done(left)
    }

    /// The refcount of a cluster.
    pub(super) fn refcount(&mut self, cluster: u64) -> Attempt<u64> {
        let per_block = self.geometry.refcounts_per_block();
        let index = cluster / per_block;
        if self.table.get(index as usize).is_none_or(|offset| *offset == 0) {
            return Attempt::Done(0);
        }
        match self.block(index) {
            Some(block) => Attempt::Done(block.get((cluster % per_block) as usize)),
            None => Attempt::Load(index),
        }
    }

    /// Keeps a block that was read, and lets old ones go.
    pub(super) fn insert_block(&mut self, index: u64, block: Block) {
        self.set_free(index, block.free());
        self.blocks.entry(index).or_insert(block);
        while self.blocks.len() > self.max_blocks {
            let clean = self.blocks.iter().filter(|(at, block)| **at != index && block.is_clean());
            let Some(oldest) = clean.min_by_key(|(_, block)| block.stamp).map(|(at, _)| *at) else {
                break;
            };
            self.blocks.remove(&oldest);
        }
    }

    /// Lets the blocks go that were not used since the last call.
    pub(super) fn remove_unused(&mut self) {
        let before = std::mem::replace(&mut self.cleaned, self.clock);
        self.blocks.retain(|_, block| !block.is_clean() || block.stamp > before);
    }

    /// Makes the table longer, so that it has an entry `index`. It gets a new place at the end.
    fn grow_table(&mut self, index: u64) -> Attempt<()> {
        let per_cluster = self.geometry.cluster_size() / 8;
        let most = self.geometry.max_refcount_table_clusters();
        let length = self.table.len() as u64;
        let mut clusters = ((index + 1).max(length) + length / 2).div_ceil(per_cluster);
        loop {
            if index / per_cluster >= most {
                return Attempt::Failed(AllocationError::Full);
            }
            clusters = clusters.min(most);
            let entries = clusters * per_cluster;
            let plan = match self.plan_tail(clusters) {
                Attempt::Done(plan) => plan,
                Attempt::Load(index) => return Attempt::Load(index),
                Attempt::Failed(error) => return Attempt::Failed(error),
            };
            let last = (plan.end - 1) / self.geometry.refcounts_per_block();
            if last >= entries {
                if clusters >= most {
                    return Attempt::Failed(AllocationError::Full);
                }
                clusters += 1;
                continue;
            }
            self.table.resize(entries as usize, 0);
            self.free.resize(entries as usize, UNKNOWN);
            let run = match self.take_plan(&plan, clusters) {
                Attempt::Done(run) => run,
                Attempt::Load(index) => return Attempt::Load(index),
                Attempt::Failed(error) => return Attempt::Failed(error),
            };
            let first = run.offset >> self.geometry.cluster_bits();
            self.metadata.extend(first..first + clusters, Structure::RefcountTable);
            if let Some((offset, clusters)) = self.next_place.replace((run.offset, clusters)) {
                self.abandoned.push((offset >> self.geometry.cluster_bits(), clusters));
            }
            return Attempt::Done(());
        }
    }

    /// Finds `count` clusters in a row that nobody has used, with room before them for the blocks
    /// that are missing to count them. The table may be too short for it.
    fn plan_tail(&mut self, count: u64) -> Attempt<Plan> {
        let per_block = self.geometry.refcounts_per_block();
        let mut start = self.fresh.max(1);
        'search: loop {
            let mut missing = Vec::new();
            let end = loop {
                let end = start + missing.len() as u64 + count;
                let span = start / per_block..=(end - 1) / per_block;
                let is_missing =
                    |index: &u64| self.table.get(*index as usize).is_none_or(|e| *e == 0);
                let now: Vec<u64> = span.filter(is_missing).collect();
                if now.len() == missing.len() {
                    break end;
                }
                missing = now;
            };
            if end > self.cluster_limit() {
                return Attempt::Failed(AllocationError::Full);
            }
            for index in start / per_block..=(end - 1) / per_block {
                if self.table.get(index as usize).is_none_or(|entry| *entry == 0) {
                    continue;
                }
                let Some(block) = self.block(index) else { return Attempt::Load(index) };
                // A lost cluster past the end of the file: go behind it.
                let used = block.last_used().map(|at| index * per_block + at as u64);
                if let Some(used) = used.filter(|used| *used >= start) {
                    start = used + 1;
                    continue 'search;
                }
            }
            if let Some(cluster) = (start..end).find(|cluster| self.metadata.contains(*cluster)) {
                return self.overlap(cluster);
            }
            return Attempt::Done(Plan { start, missing, end });
        }
    }

    /// Makes the clusters of a plan used.
    fn take_plan(&mut self, plan: &Plan, count: u64) -> Attempt<HostRun> {
        // No block may go before its clusters are counted.
        let max_blocks = std::mem::replace(&mut self.max_blocks, usize::MAX);
        for (place, index) in (plan.start..).zip(&plan.missing) {
            self.add_block(*index, place);
        }
        self.count_first(plan.start, plan.end - plan.start);
        self.max_blocks = max_blocks;
        let first = plan.end - count;
        Attempt::Done(HostRun { offset: self.offset_of(first), clusters: count, zeroed: true })
    }

    /// Puts a missing block into a cluster, which is to be counted by the caller.
    fn add_block(&mut self, index: u64, cluster: u64) {
        let offset = self.offset_of(cluster);
        let size = self.geometry.cluster_size() as usize;
        if let Some(entry) = self.table.get_mut(index as usize) {
            *entry = offset;
        }
        self.dirty_entries.insert(index);
        self.metadata.insert(cluster, Structure::RefcountBlock);
        self.insert_block(index, Block::fresh(size, self.geometry.refcount_order()));
    }

    /// Sets the refcounts of free clusters, whose blocks are in memory, to 1.
    fn count_first(&mut self, first: u64, count: u64) {
        let per_block = self.geometry.refcounts_per_block();
        for cluster in first..first + count {
            let index = cluster / per_block;
            let Some(block) = self.block(index) else {
                debug_assert!(false, "the block of cluster {cluster} was looked at just now");
                continue;
            };
            // 1 fits every width, and the index is within the block.
            let set = block.set((cluster % per_block) as usize, 1);
            debug_assert!(set.is_ok(), "cluster {cluster}: {set:?}");
            let free = block.free();
            self.set_free(index, free);
        }
        self.fresh = self.fresh.max(first + count);
        let bits = self.geometry.cluster_bits();
        let is_taken = |end: &u64| (first..first + count).contains(&(end >> bits));
        self.short_end.take_if(|end| is_taken(end));
    }

    /// Where the file may end once nothing is handed out any more: behind the last byte that is
    /// in use in the last cluster, in bytes.
    pub(super) fn file_end(&self) -> u64 {
        let is_last = |end: &u64| end >> self.geometry.cluster_bits() == self.fresh - 1;
        let short = [self.packing, self.short_end].into_iter().flatten().find(is_last);
        short.unwrap_or_else(|| self.used_end())
    }

    /// The end of the last cluster that was ever handed out, or that the file had at first, in
    /// bytes.
    pub(super) fn used_end(&self) -> u64 {
        self.offset_of(self.fresh)
    }

    pub(super) fn block(&mut self, index: u64) -> Option<&mut Block> {
        self.clock += 1;
        let block = self.blocks.get_mut(&index)?;
        block.stamp = self.clock;
        Some(block)
    }

    pub(super) fn set_free(&mut self, index: u64, free: u64) {
        if let Some(slot) = self.free.get_mut(index as usize) {
            // At most 2^24 refcounts in a block.
            *slot = free as u32;
        }
    }

    fn overlap<T>(&self, cluster: u64) -> Attempt<T> {
        Attempt::Failed(AllocationError::Overlap(self.offset_of(cluster)))
    }

    fn offset_of(&self, cluster: u64) -> u64 {
        cluster << self.geometry.cluster_bits()
    }

    fn cluster_limit(&self) -> u64 {
        HOST_OFFSET_LIMIT >> self.geometry.cluster_bits()
    }
}

/// Clusters at the end: first the missing blocks, one each, then what was asked for.
struct Plan {
    start: u64,
    missing: Vec<u64>,
    end: u64,
}

#[cfg(test)]
mod tests;
