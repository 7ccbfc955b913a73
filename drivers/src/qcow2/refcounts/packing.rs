//! Places for compressed clusters: byte after byte in host clusters that they share.
//!
//! - **PK1** Every compressed cluster counts once in each host cluster that it has a byte in. So a
//!   host cluster becomes free when the last of them goes.
//! - **PK2** Packing goes on only in a host cluster that is counted, and ends with the cluster's
//!   last reference, or before its bytes are discarded: nobody is given a place in a cluster that
//!   is free, or about to lose what it holds (Q04, Q08).
//! - **PK3** A place that reaches into a second host cluster gets the one that follows in the file,
//!   when that is the next free one; else it begins in a cluster of its own.

use super::allocation::{Allocation, Attempt};

impl Allocation {
    /// A place for `size` bytes, at most a cluster; counted.
    pub(super) fn allocate_bytes(&mut self, size: u64) -> Attempt<u64> {
        debug_assert!(size > 0 && size <= self.geometry.cluster_size(), "{size} bytes");
        let open = match self.open_place() {
            Attempt::Done(open) => open,
            Attempt::Load(index) => return Attempt::Load(index),
            Attempt::Failed(error) => return Attempt::Failed(error),
        };
        let room = open.map_or(0, |at| self.geometry.cluster_size() - self.geometry.in_cluster(at));
        let start = match open {
            Some(at) if room >= size => {
                self.count_again(at);
                at
            }
            open => {
                let next = match self.allocate(1) {
                    Attempt::Done(run) => run.offset,
                    Attempt::Load(index) => return Attempt::Load(index),
                    Attempt::Failed(error) => return Attempt::Failed(error),
                };
                match open {
                    Some(at) if at + room == next && self.count_again(at) => at,
                    _ => next,
                }
            }
        };
        let end = start + size;
        let is_counted = self.refcount(start >> self.geometry.cluster_bits()) != Attempt::Done(0);
        debug_assert!(is_counted, "PK2: a place in a free cluster");
        self.packing = (!self.geometry.is_aligned(end)).then_some(end);
        Attempt::Done(start)
    }

    /// Where packing goes on, in a cluster that can be counted once more.
    fn open_place(&mut self) -> Attempt<Option<u64>> {
        let Some(at) = self.packing else { return Attempt::Done(None) };
        let most = self.geometry.max_refcount();
        match self.refcount(at >> self.geometry.cluster_bits()) {
            Attempt::Done(count) => Attempt::Done((count > 0 && count < most).then_some(at)),
            Attempt::Load(index) => Attempt::Load(index),
            Attempt::Failed(error) => Attempt::Failed(error),
        }
    }

    /// One reference more to the cluster of `at`; false when its block is not in memory.
    fn count_again(&mut self, at: u64) -> bool {
        let cluster = at >> self.geometry.cluster_bits();
        let per_block = self.geometry.refcounts_per_block();
        let Some(block) = self.block(cluster / per_block) else { return false };
        let index = (cluster % per_block) as usize;
        let count = block.get(index);
        block.set(index, count + 1).is_ok()
    }

    /// Ends packing in a cluster (PK2).
    pub(super) fn stop_packing_in(&mut self, cluster: u64) {
        if self.packing.is_some_and(|at| at >> self.geometry.cluster_bits() == cluster) {
            self.packing = None;
        }
    }

    /// Whether what refers to a cluster is about to go, and nothing else does or will: then its
    /// bytes may be discarded.
    pub(super) fn claim_last(&mut self, cluster: u64) -> Attempt<bool> {
        match self.refcount(cluster) {
            Attempt::Done(count) => {
                if count == 1 {
                    self.stop_packing_in(cluster);
                }
                Attempt::Done(count == 1)
            }
            Attempt::Load(index) => Attempt::Load(index),
            Attempt::Failed(error) => Attempt::Failed(error),
        }
    }
}
