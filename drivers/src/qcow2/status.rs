//! Block status: where an extent's data is.
//!
//! An extent is as long as its L2 table tells, and ends where its place in the file ends. A cluster that is kept for zeros, or for subclusters that nobody wrote, has a place, too.
//!
//! In an image whose clusters were mapped before they were written to, the file is asked as well: its
//! holes read as zeros. Whether an image is such a one is guessed once, by how much less storage the
//! file takes than its clusters in use would.

use super::Qcow2;
use super::entry::{Cluster, L2Entry};
use super::layers::Layers;
use super::lookup::{Extent, Place};
use super::slice::Slice;
use blockplex_graph::{BlockStatus, Result};
use blockplex_io::event_loop::yield_now;
use std::sync::atomic::{AtomicU8, Ordering};

/// Clusters that are counted before other tasks get a turn.
const TURN: u64 = 1 << 14;

/// Whether the image was preallocated without storage: not known, no, yes.
#[derive(Default)]
pub(super) struct Preallocated(AtomicU8);

impl Qcow2 {
    /// The extent that starts at `offset`, looking at most `length` far.
    pub(super) async fn status(
        &self,
        layers: &Layers,
        offset: u64,
        length: u64,
    ) -> Result<BlockStatus> {
        let extent = self.longest_extent(layers, offset, length).await?;
        let length = extent.length;
        let found = BlockStatus { length, allocated: true, ..BlockStatus::default() };
        Ok(match extent.place {
            Place::Data { host, .. } => self.data_status(layers, host, found).await?,
            Place::Compressed { .. } => BlockStatus { data: true, compressed: true, ..found },
            Place::Zero => {
                let found = BlockStatus { zero: true, ..found };
                self.with_kept_place(layers, offset, found)
            }
            Place::Bad(fault) => return Err(self.fail_at(layers, offset, fault).await),
            Place::Unallocated | Place::Missing => {
                self.backing_status(layers, offset, length).await?
            }
        })
    }

    /// The extent at `offset`, as far as its L2 table tells.
    async fn longest_extent(&self, layers: &Layers, offset: u64, length: u64) -> Result<Extent> {
        let mut extent = self.loaded_extent(layers, offset, length).await?;
        let table = self.l1_index(self.position(offset).number);
        while extent.length < length && !matches!(extent.place, Place::Compressed { .. }) {
            let end = offset + extent.length;
            let position = self.position(end);
            let is_next_slice = (position.index, position.in_cluster) == (0, 0);
            if !is_next_slice || self.l1_index(position.number) != table {
                break;
            }
            let next = self.loaded_extent(layers, end, length - extent.length).await?;
            if !next.follows(&extent) {
                break;
            }
            extent.length += next.length;
        }
        Ok(extent)
    }

    /// The extent at `offset`, as far as its slice tells, which is loaded if need be.
    pub(super) async fn loaded_extent(
        &self,
        layers: &Layers,
        offset: u64,
        length: u64,
    ) -> Result<Extent> {
        loop {
            let extent = self.look_up(offset, length);
            if extent.place != Place::Missing {
                return Ok(extent);
            }
            let hold = self.hold(layers);
            let loaded = self.slice(layers, self.position(offset).number).await;
            hold.release();
            loaded?;
        }
    }

    fn file_of_data(&self, layers: &Layers) -> Option<blockplex_graph::NodeId> {
        self.data(layers).ok().map(|data| data.view().id())
    }

    /// The status of data, which is at `host`.
    async fn data_status(
        &self,
        layers: &Layers,
        host: u64,
        found: BlockStatus,
    ) -> Result<BlockStatus> {
        if self.encryption.is_some() {
            // Who reads the file at its place finds something else; nor does a hole read as zeros.
            return Ok(BlockStatus { data: true, ..found });
        }
        let file = self.file_of_data(layers);
        let found = BlockStatus { data: true, offset: Some(host), file, ..found };
        if !self.is_preallocated(layers).await {
            return Ok(found);
        }
        let below = layers.file.block_status(host, found.length).await?;
        Ok(match below.length {
            // Past the end of the file.
            0 => BlockStatus { zero: true, ..found },
            length => BlockStatus { length: length.min(found.length), zero: below.zero, ..found },
        })
    }

    /// Adds the place that is kept for an extent, and ends the extent where that ends.
    fn with_kept_place(&self, layers: &Layers, offset: u64, found: BlockStatus) -> BlockStatus {
        if self.encryption.is_some() {
            return found;
        }
        let position = self.position(offset);
        // Without a table, or with one that has left the cache since: nothing that is known of.
        let Some(first) = self.kept_place(offset) else { return found };
        let cluster_size = self.geometry.cluster_size();
        let start = offset - position.in_cluster;
        let mut kept = cluster_size;
        while position.in_cluster + found.length > kept {
            if self.kept_place(start + kept) != Some(first.map(|host| host + kept)) {
                break;
            }
            kept += cluster_size;
        }
        BlockStatus {
            length: found.length.min(kept - position.in_cluster),
            offset: first.map(|host| host + position.in_cluster),
            file: first.and_then(|_| self.file_of_data(layers)),
            ..found
        }
    }

    /// The place, if any, of the cluster at a guest offset, which is not, or not all, data; none
    /// when its slice is not in memory.
    fn kept_place(&self, offset: u64) -> Option<Option<u64>> {
        let position = self.position(offset);
        self.slices.with(position.number, |slice| self.kept_place_in(slice, position.index))
    }

    fn kept_place_in(&self, slice: &Slice, index: usize) -> Option<u64> {
        match L2Entry::decode(slice.entry(index), &self.geometry, self.version).ok()? {
            Cluster::Zero { host, .. } => host,
            Cluster::Normal { host, .. } => Some(host),
            _ => None,
        }
    }

    /// The status of what this image does not have.
    async fn backing_status(
        &self,
        layers: &Layers,
        offset: u64,
        length: u64,
    ) -> Result<BlockStatus> {
        let inside = layers.backing_length().saturating_sub(offset).min(length);
        if inside > 0
            && let Some(backing) = &layers.backing
        {
            let below = backing.block_status(offset, inside).await?;
            return Ok(BlockStatus {
                length: below.length.clamp(1, inside),
                allocated: false,
                backed: below.allocated || below.backed,
                allocated_below: below.is_present(),
                depth: below.depth + 1,
                ..below
            });
        }
        // What a node further down may hold here is hidden by the end of the backing node.
        let backed = layers.backing.is_some();
        let found = BlockStatus { length, zero: true, backed, ..BlockStatus::default() };
        Ok(self.with_kept_place(layers, offset, found))
    }

    /// Whether clusters were mapped before anything was written to them. Asked once.
    async fn is_preallocated(&self, layers: &Layers) -> bool {
        const NO: u8 = 1;
        const YES: u8 = 2;
        // Relaxed, both: whoever does not know it yet finds it out for himself.
        match self.preallocated.0.load(Ordering::Relaxed) {
            0 => {}
            known => return known == YES,
        }
        // What cannot be found out is taken for an ordinary image.
        let found = self.takes_less_than_it_uses(layers).await.unwrap_or(false);
        self.preallocated.0.store(if found { YES } else { NO }, Ordering::Relaxed);
        found
    }

    async fn takes_less_than_it_uses(&self, layers: &Layers) -> Result<bool> {
        let file = layers.file.view();
        let Some(taken) = file.driver().allocated_bytes(file) else { return Ok(false) };
        if self.external.is_some() {
            return Ok(false);
        }
        let taken = taken >> self.geometry.cluster_bits();
        // Some clusters more than there is storage for: not just sparse ends of clusters.
        let enough = (taken.saturating_mul(10) / 9).max(taken + 2);
        let clusters = self.geometry.clusters_for(layers.file.length());
        let mut used = 0;
        for cluster in 0..clusters {
            if used + (clusters - cluster) < enough {
                return Ok(false);
            }
            if used >= enough {
                break;
            }
            let offset = cluster << self.geometry.cluster_bits();
            if self.refcounts.refcount(&layers.file, offset).await? > 0 {
                used += 1;
            }
            if cluster % TURN == TURN - 1 {
                yield_now().await;
            }
        }
        Ok(used >= enough)
    }
}
