//! Write-zeroes and discard: entries change, data does not move.
//!
//! | cluster | write-zeroes | write-zeroes, may unmap | discard |
//! |---|---|---|---|
//! | unallocated, no backing | stays | stays | stays |
//! | unallocated, backing | zero | zero | zero |
//! | zero, with a host cluster | stays | zero, freed | zero, freed |
//! | data, its own | zero, keeps its host cluster | zero, freed | zero, freed |
//! | data, shared; compressed | zero, freed | zero, freed | zero, freed |
//!
//! What lies past a new end of the disk, and everything when an image is emptied, is *dropped*: it
//! becomes unallocated, in any version.
//!
//! Version 2 has no zero clusters: there write-zeroes is left to the request path unless there is
//! nothing to do, and a discard unallocates, unless a backing node would shine through.
//! Parts of clusters are written (write-zeroes) or left alone (discard).

use super::Qcow2;
use super::entry::{Cluster, L2Entry, Version};
use super::layers::Layers;
use super::lookup::{Fault, Place};
use super::slice::Slice;
use blockplex_graph::{Error, ErrorKind, Result};
use blockplex_io::buffer::IoVector;
use blockplex_io::lock::RangeMode;
use std::sync::Arc;

/// What is done to whole clusters.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Erase {
    Zero,
    Unmap,
    Discard,
    Drop,
}

impl Qcow2 {
    /// Makes a range read as zeros.
    pub(super) async fn write_zeroes(
        &self,
        layers: &Layers,
        offset: u64,
        length: u64,
        may_unmap: bool,
    ) -> Result<()> {
        self.prepare_data(layers).await?;
        let end = offset + length;
        if self.version < Version::V3 && !self.is_zero(layers, offset, length).await? {
            let text = "version 2 has no zero clusters";
            return Err(Error::new(ErrorKind::NotSupported, text));
        }
        if self.version < Version::V3 {
            return Ok(());
        }
        let (first, last) = self.whole_clusters(offset, end);
        if first >= last {
            self.zero_part(layers, offset, end).await?;
        } else {
            self.zero_part(layers, offset, first).await?;
            let erase = if may_unmap { Erase::Unmap } else { Erase::Zero };
            self.erase_clusters(layers, first, last, erase).await?;
            self.zero_part(layers, last.min(end), end).await?;
        }
        self.relieve(layers).await
    }

    /// Discards the whole clusters of a range.
    pub(super) async fn discard(&self, layers: &Layers, offset: u64, length: u64) -> Result<()> {
        self.prepare_data(layers).await?;
        let (first, last) = self.whole_clusters(offset, offset + length);
        // What the image does not name, the backing node would show.
        if first < last && (self.version >= Version::V3 || layers.backing.is_none()) {
            self.erase_clusters(layers, first, last, Erase::Discard).await?;
        }
        self.relieve(layers).await
    }

    /// The whole clusters of a range; the last one of the disk counts as whole when the range
    /// reaches the end of the disk.
    fn whole_clusters(&self, offset: u64, end: u64) -> (u64, u64) {
        let first = self.geometry.align_up(offset).unwrap_or(u64::MAX);
        let last = if end >= self.disk_size() {
            self.geometry.align_up(end).unwrap_or(u64::MAX)
        } else {
            self.geometry.align_down(end)
        };
        (first, last)
    }

    /// Writes zeros to a part of a cluster, unless it reads as zeros.
    async fn zero_part(&self, layers: &Layers, start: u64, end: u64) -> Result<()> {
        let mut at = start;
        while at < end {
            let stop = end.min(self.geometry.align_down(at) + self.geometry.cluster_size());
            if !self.is_zero(layers, at, stop - at).await? {
                let zeros = IoVector::zeroed((stop - at) as usize);
                self.write(layers, at, &zeros).await?;
            }
            at = stop;
        }
        Ok(())
    }

    /// Whether a range reads as zeros because of its entries.
    async fn is_zero(&self, layers: &Layers, offset: u64, length: u64) -> Result<bool> {
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let extent = self.look_up(at, end - at);
            match extent.place {
                Place::Missing => {
                    let hold = self.hold(layers);
                    let loaded = self.slice(layers, self.position(at).number).await;
                    hold.release();
                    loaded?;
                    continue;
                }
                Place::Zero => {}
                Place::Unallocated if at >= layers.backing_length() => {}
                _ => return Ok(false),
            }
            at += extent.length;
        }
        Ok(true)
    }

    async fn erase_clusters(
        &self,
        layers: &Layers,
        first: u64,
        last: u64,
        erase: Erase,
    ) -> Result<()> {
        let mut at = first;
        while at < last {
            let position = self.position(at);
            let end = last.min(at + position.rest);
            let guard = self.ranges.lock(at..end, RangeMode::Exclusive).await;
            self.check_inside(layers, end)?;
            let hold = self.hold(layers);
            let erased = self.erase_step(layers, at, end, erase).await;
            hold.release();
            drop(guard);
            erased?;
            self.relieve(layers).await?;
            at = end;
        }
        Ok(())
    }

    /// Erases whole clusters of one slice, whose range is locked.
    pub(super) async fn erase_step(
        &self,
        layers: &Layers,
        at: u64,
        end: u64,
        erase: Erase,
    ) -> Result<()> {
        let extent = self.look_up(at, end - at);
        let nothing = layers.backing.is_none() && extent.place == Place::Unallocated;
        if nothing && extent.length == end - at {
            return Ok(());
        }
        let position = self.position(at);
        let slice = self.own_slice(layers, position.number).await?;
        let count = self.geometry.clusters_for(end - at) as usize;
        let has_backing = layers.backing.is_some();
        self.erase_data(layers, (at, end), erase != Erase::Zero).await?;
        let old = match self.erase_entries(&slice, position.index, count, (erase, has_backing)) {
            Ok(old) => old,
            Err(fault) => return Err(self.fail_at(layers, at, fault).await),
        };
        for raw in old {
            self.free_entry(raw, 0, erase != Erase::Zero);
        }
        Ok(())
    }

    /// Changes the entries; gives those whose clusters are free now. Changes nothing on an error.
    fn erase_entries(
        &self,
        slice: &Arc<Slice>,
        index: usize,
        count: usize,
        (erase, has_backing): (Erase, bool),
    ) -> Result<Vec<u64>, Fault> {
        for at in index..index + count {
            if let Place::Bad(fault) = self.decode(slice, at, slice.entry(at)) {
                return Err(fault);
            }
        }
        let mut freed = Vec::new();
        self.slices.change(slice, |editor| {
            for at in index..index + count {
                let old = editor.get(at);
                let Some(new) = self.erased(old, erase, has_backing) else { continue };
                // A version 2 entry has no zero flag: what cannot be encoded stays as it is.
                let Ok(raw) = L2Entry::encode(new, &self.geometry, self.version) else { continue };
                editor.set(at, raw);
                if !matches!(new, Cluster::Zero { host: Some(_), .. }) {
                    freed.push(old);
                }
            }
        });
        Ok(freed)
    }

    /// What becomes of an entry; none when it stays. See the table at the top.
    fn erased(&self, raw: u64, erase: Erase, has_backing: bool) -> Option<Cluster> {
        let nothing = Cluster::Zero { host: None, copied: false };
        let gone = if self.version < Version::V3 { Cluster::Unallocated } else { nothing };
        match L2Entry::decode(raw, &self.geometry, self.version).ok()? {
            Cluster::Unallocated if erase == Erase::Drop => None,
            _ if erase == Erase::Drop => Some(Cluster::Unallocated),
            Cluster::Unallocated => has_backing.then_some(gone),
            Cluster::Zero { host: None, .. } => None,
            Cluster::Zero { host: Some(_), copied } if erase == Erase::Zero && copied => None,
            Cluster::Normal { host, copied: true } if erase == Erase::Zero => {
                Some(Cluster::Zero { host: Some(host), copied: true })
            }
            _ => Some(gone),
        }
    }
}
