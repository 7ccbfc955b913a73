//! What becomes of entries that are erased: worked out first, so that nothing has changed when an
//! entry turns out damaged, and so that holes come before entries (see the page above).

use super::{Erase, Qcow2};
use crate::qcow2::entry::{Cluster, L2Entry, Version};
use crate::qcow2::lookup::{Fault, Place};
use crate::qcow2::slice::Slice;
use crate::qcow2::subcluster::{Subcluster, Subclusters, mask};

/// How clusters are erased.
#[derive(Clone, Copy)]
pub(super) struct Manner {
    pub(super) erase: Erase,
    /// What the image does not name, a backing node shows.
    pub(super) has_backing: bool,
    /// Clusters that are not needed keep their place (`discard-no-unref`).
    pub(super) keep: bool,
}

impl Manner {
    /// Whether the old bytes are of no more use.
    fn gives_back(self) -> bool {
        self.erase != Erase::Zero
    }

    /// Whether what the image does not name is named now: zeros that were asked for, and, after a
    /// discard, what a backing node would show.
    fn names_nothing(self) -> bool {
        self.has_backing || matches!(self.erase, Erase::Zero | Erase::Unmap)
    }

    /// Whether a cluster of the image's own keeps its place.
    fn keeps_place(self) -> bool {
        self.keep || self.erase == Erase::Zero
    }
}

/// See the page. Offsets in bytes.
#[derive(Default)]
pub(super) struct Plan {
    /// Index in the slice, and the new words; the second one only of extended entries.
    pub(super) changes: Vec<(usize, u64, u64)>,
    /// Entries whose places nothing refers to afterwards.
    pub(super) freed: Vec<u64>,
    /// Start and length of what is kept in the file and need not keep its bytes.
    pub(super) holes: Vec<(u64, u64)>,
    /// Start and end of guest ranges that can only be written over.
    pub(super) left: Vec<(u64, u64)>,
}

impl Plan {
    fn add_hole(&mut self, offset: u64, length: u64) {
        match self.holes.last_mut() {
            Some(last) if last.0 + last.1 == offset => last.1 += length,
            _ => self.holes.push((offset, length)),
        }
    }
}

impl Qcow2 {
    /// Plans to erase the guest range from `start` to `end`, whole units that `slice` maps. Its range
    /// is locked.
    pub(super) fn plan_erasure(
        &self,
        slice: &Slice,
        (start, end): (u64, u64),
        manner: Manner,
    ) -> Result<Plan, Fault> {
        let mut plan = Plan::default();
        let mut at = start;
        while at < end {
            let index = self.position(at).index;
            let stop = end.min(self.geometry.align_down(at) + self.geometry.cluster_size());
            if self.geometry.extended_l2() {
                self.plan_subclusters(slice, index, (at, stop), manner, &mut plan)?;
            } else {
                self.plan_cluster(slice, index, manner, &mut plan)?;
            }
            at = stop;
        }
        Ok(plan)
    }

    fn plan_cluster(
        &self,
        slice: &Slice,
        index: usize,
        manner: Manner,
        plan: &mut Plan,
    ) -> Result<(), Fault> {
        let old = slice.entry(index);
        if let Place::Bad(fault) = self.decode(slice, index, old) {
            return Err(fault);
        }
        let Some(new) = self.erased(old, manner) else { return Ok(()) };
        // A version 2 entry has no zero flag: what cannot be encoded stays as it is.
        let Ok(raw) = L2Entry::encode(new, &self.geometry, self.version) else { return Ok(()) };
        plan.changes.push((index, raw, 0));
        match new {
            Cluster::Zero { host: Some(host), .. } if manner.gives_back() => {
                plan.add_hole(host, self.geometry.cluster_size());
            }
            Cluster::Zero { host: Some(_), .. } => {}
            _ => plan.freed.push(old),
        }
        Ok(())
    }

    /// What becomes of an entry; none when it stays. See the table above.
    fn erased(&self, raw: u64, manner: Manner) -> Option<Cluster> {
        let nothing = Cluster::Zero { host: None, copied: false };
        let gone = if self.version < Version::V3 { Cluster::Unallocated } else { nothing };
        match L2Entry::decode(raw, &self.geometry, self.version).ok()? {
            Cluster::Unallocated if manner.erase == Erase::Drop => None,
            _ if manner.erase == Erase::Drop => Some(Cluster::Unallocated),
            Cluster::Unallocated => manner.names_nothing().then_some(gone),
            Cluster::Zero { host: None, .. } => None,
            Cluster::Zero { host: Some(_), copied: true } if manner.keeps_place() => None,
            Cluster::Normal { host, copied: true } if manner.keeps_place() => {
                Some(Cluster::Zero { host: Some(host), copied: true })
            }
            _ => Some(gone),
        }
    }

    /// Plans for the part of one cluster from guest offset `start` to `end`.
    fn plan_subclusters(
        &self,
        slice: &Slice,
        index: usize,
        (start, end): (u64, u64),
        manner: Manner,
        plan: &mut Plan,
    ) -> Result<(), Fault> {
        let size = self.geometry.subcluster_size();
        let first = self.geometry.in_cluster(start);
        let erased = mask((first / size) as u32, ((first + end - start) / size) as u32);
        let (raw, word) = slice.pair(index);
        let (cluster, old) = self.decode_extended(slice, index, (raw, word))?;
        if manner.erase == Erase::Drop {
            if (raw, word) != (0, 0) {
                plan.changes.push((index, 0, 0));
                plan.freed.push(raw);
            }
            return Ok(());
        }
        let shown = if manner.names_nothing() { u32::MAX } else { old.allocated };
        let new = match erased {
            u32::MAX if raw != 0 || manner.names_nothing() => Subclusters::ALL_ZERO,
            _ => Subclusters {
                allocated: old.allocated & !erased,
                zero: old.zero | (erased & shown),
            },
        };
        let (host, copied) = match cluster {
            Cluster::Normal { host, copied } => (host, copied),
            Cluster::Compressed { .. } if erased != u32::MAX => {
                plan.left.push((start, end));
                return Ok(());
            }
            Cluster::Compressed { .. } => {
                plan.changes.push((index, 0, new.word()));
                plan.freed.push(raw);
                return Ok(());
            }
            _ => {
                if new != old {
                    plan.changes.push((index, raw, new.word()));
                }
                return Ok(());
            }
        };
        if new.allocated == 0 && !(copied && manner.keeps_place()) {
            plan.changes.push((index, 0, new.word()));
            plan.freed.push(raw);
            return Ok(());
        }
        if new == old {
            return Ok(());
        }
        plan.changes.push((index, raw, new.word()));
        if copied && manner.gives_back() {
            let given = Subclusters { allocated: old.allocated & erased, zero: 0 };
            let mut at = 0;
            while at < 32 {
                let (kind, next) = given.run(at);
                if kind == Subcluster::Data {
                    plan.add_hole(host + u64::from(at) * size, u64::from(next - at) * size);
                }
                at = next;
            }
        }
        Ok(())
    }
}
