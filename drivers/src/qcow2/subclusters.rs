//! Extended L2 entries in the driver: look-up and writes by subclusters.
//!
//! U1. Both words of an entry are read as one and changed as one (S3), and every decision about a
//!     change is made under the slice's editor or the cluster's range lock: a bit of a neighbour is
//!     never lost (Q19).
//! U2. A write into a cluster's own place fills up to the borders of the subclusters that were not
//!     allocated, and touches no byte beyond them: allocated ones may be written in place at the same
//!     time.
//! U3. A new place takes over all subclusters that the old one had allocated, so that what lies
//!     between the first and the last of them and the data is written with it.
//! U4. A cluster in which nothing is allocated may keep its place: a later write goes there.

use super::Qcow2;
use super::entry::{Cluster, L2Entry};
use super::lookup::{Extent, Fault, Place, SlicePosition};
use super::refcounts::HostRun;
use super::slice::Slice;
use super::subcluster::{SUBCLUSTERS, Subcluster, Subclusters, mask};
use blockplex_graph::{Error, ErrorKind, Result};
use std::sync::Arc;

/// Bytes before and after the data of an allocating write that are written with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fill {
    pub(super) head: u64,
    pub(super) tail: u64,
}

impl Qcow2 {
    /// What an extended entry of `slice` says.
    pub(super) fn decode_extended(
        &self,
        slice: &Slice,
        index: usize,
        (raw, word): (u64, u64),
    ) -> Result<(Cluster, Subclusters), Fault> {
        if slice.is_suspect(index) {
            return Err(Fault::Misplaced(raw));
        }
        let cluster = L2Entry::decode(raw, &self.geometry, self.version).map_err(Fault::Entry)?;
        let subclusters = Subclusters::from_word(word);
        subclusters.check(raw, cluster).map_err(Fault::Entry)?;
        Ok((cluster, subclusters))
    }

    /// As [`Qcow2::extent_in`], of extended entries.
    pub(super) fn subcluster_extent(
        &self,
        slice: &Slice,
        index: usize,
        in_cluster: u64,
        length: u64,
    ) -> Extent {
        let cluster_size = self.geometry.cluster_size();
        let (first, mut end) = self.subcluster_run(slice, index, in_cluster);
        let mut next = 1;
        if !matches!(first, Place::Compressed { .. } | Place::Bad(_)) {
            while end == next * cluster_size && end - in_cluster < length {
                let (place, run) = self.subcluster_run(slice, index + next as usize, 0);
                let goes_on = match (first, place) {
                    (Place::Data { host, copied }, Place::Data { host: then, copied: also }) => {
                        copied == also && host + next * cluster_size == then
                    }
                    (first, then) => first == then,
                };
                if !goes_on {
                    break;
                }
                end += run;
                next += 1;
            }
        }
        let place = match first {
            Place::Data { host, copied } => Place::Data { host: host + in_cluster, copied },
            other => other,
        };
        Extent { place, length: (end - in_cluster).min(length) }
    }

    /// What byte `in_cluster` of a cluster belongs to (for data: where the cluster is), and the byte
    /// of the cluster at which that ends.
    fn subcluster_run(&self, slice: &Slice, index: usize, in_cluster: u64) -> (Place, u64) {
        let (cluster, subclusters) = match self.decode_extended(slice, index, slice.pair(index)) {
            Ok(entry) => entry,
            Err(fault) => return (Place::Bad(fault), self.geometry.cluster_size()),
        };
        if let Cluster::Compressed { host, length } = cluster {
            return (Place::Compressed { host, length }, self.geometry.cluster_size());
        }
        let size = self.geometry.subcluster_size();
        let (kind, end) = subclusters.run((in_cluster / size) as u32);
        let place = match (kind, cluster) {
            (Subcluster::Data, Cluster::Normal { host, copied }) => Place::Data { host, copied },
            (Subcluster::Zero, _) => Place::Zero,
            _ => Place::Unallocated,
        };
        (place, u64::from(end) * size)
    }

    /// Whether all of `touched` can be written in place; else whether their cluster has a place of
    /// its own. Gives that place.
    pub(super) fn own_place(
        &self,
        slice: &Slice,
        index: usize,
        touched: u32,
    ) -> Result<Option<(u64, bool)>, Fault> {
        let (cluster, subclusters) = self.decode_extended(slice, index, slice.pair(index))?;
        Ok(match cluster {
            Cluster::Normal { host, copied: true }
                if self.is_covered(host, self.geometry.cluster_size()) =>
            {
                Some((host, subclusters.allocated & touched == touched))
            }
            _ => None,
        })
    }

    /// The subclusters of cluster `number` (from the one at `position` on) that `length` bytes from
    /// there on touch.
    pub(super) fn touched(&self, position: &SlicePosition, length: u64, number: u64) -> u32 {
        let cluster_size = self.geometry.cluster_size();
        let size = self.geometry.subcluster_size();
        let start = if number == 0 { position.in_cluster } else { 0 };
        let end = (position.in_cluster + length).saturating_sub(number * cluster_size);
        mask((start / size) as u32, end.min(cluster_size).div_ceil(size) as u32)
    }

    /// What has to be written around `length` bytes of data at `position` that go to `run`.
    pub(super) fn fill_of(
        &self,
        slice: &Slice,
        position: &SlicePosition,
        run: HostRun,
        length: u64,
    ) -> Fill {
        let cluster_size = self.geometry.cluster_size();
        let end = position.in_cluster + length;
        let clusters = self.geometry.clusters_for(end);
        if !self.geometry.extended_l2() {
            return Fill { head: position.in_cluster, tail: clusters * cluster_size - end };
        }
        let size = self.geometry.subcluster_size();
        let last = clusters.saturating_sub(1);
        let (before, _) = self.written_with(slice, position, run, (length, 0));
        let (_, after) = self.written_with(slice, position, run, (length, last));
        let head = position.in_cluster.saturating_sub(u64::from(before) * size);
        let end_in_last = end - last * cluster_size;
        let tail = (u64::from(after) * size).saturating_sub(end_in_last);
        // An allocated subcluster of the same place needs nothing (U2).
        let is_there = |number: u64, byte: u64| {
            self.stays(slice, position, run, number)
                .is_some_and(|bits| bits.allocated >> (byte / size) & 1 != 0)
        };
        Fill {
            head: if is_there(0, position.in_cluster) { 0 } else { head },
            tail: if is_there(last, end_in_last - 1) { 0 } else { tail },
        }
    }

    /// The subclusters of cluster `number` of a write, when it stays in its place.
    fn stays(
        &self,
        slice: &Slice,
        position: &SlicePosition,
        run: HostRun,
        number: u64,
    ) -> Option<Subclusters> {
        let index = position.index + number as usize;
        let place = run.offset + (number << self.geometry.cluster_bits());
        match self.decode_extended(slice, index, slice.pair(index)) {
            Ok((Cluster::Normal { host, .. }, subclusters)) if host == place => Some(subclusters),
            _ => None,
        }
    }

    /// The first subcluster of cluster `number` that is written by a write, and the one after the
    /// last.
    fn written_with(
        &self,
        slice: &Slice,
        position: &SlicePosition,
        run: HostRun,
        (length, number): (u64, u64),
    ) -> (u32, u32) {
        let index = position.index + number as usize;
        let mut written = self.touched(position, length, number);
        if self.stays(slice, position, run, number).is_none() {
            match self.decode_extended(slice, index, slice.pair(index)) {
                Ok((Cluster::Compressed { .. }, _)) => written = u32::MAX,
                Ok((_, subclusters)) => written |= subclusters.allocated,
                Err(_) => {}
            }
        }
        (written.trailing_zeros(), SUBCLUSTERS - written.leading_zeros())
    }

    /// Gives unmapped clusters their places in `run`; their subclusters stay what they are.
    pub(super) fn reserve_extended(
        &self,
        slice: &Arc<Slice>,
        index: usize,
        run: HostRun,
    ) -> Result<()> {
        let mut words = Vec::new();
        for number in 0..run.clusters {
            let host = run.offset + (number << self.geometry.cluster_bits());
            words.push(self.own_cluster(host)?);
        }
        self.slices.change(slice, |editor| {
            for (at, raw) in (index..).zip(words) {
                let (_, subclusters) = editor.pair(at);
                editor.set_pair(at, raw, subclusters);
            }
        });
        Ok(())
    }

    fn own_cluster(&self, host: u64) -> Result<u64> {
        let cluster = Cluster::Normal { host, copied: true };
        L2Entry::encode(cluster, &self.geometry, self.version)
            .map_err(|error| Error::new(ErrorKind::NoSpace, error.to_string()))
    }

    /// Makes the extended entries from the one at `position` on name the clusters of `run`, in which
    /// `length` bytes were written with `fill` around them. Gives the first words that were there.
    pub(super) fn commit_extended(
        &self,
        slice: &Arc<Slice>,
        position: &SlicePosition,
        run: HostRun,
        (length, fill): (u64, Fill),
    ) -> Result<Vec<u64>> {
        let start = position.in_cluster - fill.head;
        let written = SlicePosition { in_cluster: start, ..*position };
        let length = fill.head + length + fill.tail;
        let mut words = Vec::new();
        for number in 0..run.clusters {
            let host = run.offset + (number << self.geometry.cluster_bits());
            let raw = self.own_cluster(host)?;
            let new = self.touched(&written, length, number);
            let index = position.index + number as usize;
            let old = match self.decode_extended(slice, index, slice.pair(index)) {
                Ok((Cluster::Compressed { .. }, _)) | Err(_) => Subclusters::NONE,
                Ok((_, old)) => old,
            };
            let stays = self.stays(slice, position, run, number).is_some();
            debug_assert!(stays || old.allocated & !new == 0, "U3: a subcluster is left behind");
            let kept = if stays { old.allocated } else { 0 };
            let subclusters = Subclusters { allocated: kept | new, zero: old.zero & !new };
            words.push((index, raw, subclusters.word()));
        }
        // Nobody else has changed these entries meanwhile: their range is locked.
        Ok(self.slices.change(slice, |editor| {
            let replace = |(index, raw, word)| {
                let (old, _) = editor.pair(index);
                editor.set_pair(index, raw, word);
                old
            };
            words.into_iter().map(replace).collect()
        }))
    }
}
