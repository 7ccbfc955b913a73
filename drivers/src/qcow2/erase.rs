//! Write-zeroes and discard: entries change, data does not move.
//!
//! | cluster | write-zeroes | write-zeroes, may unmap | discard |
//! |---|---|---|---|
//! | unallocated, no backing | zero | zero | stays |
//! | unallocated, backing | zero | zero | zero |
//! | zero, with a host cluster | stays | zero, freed | zero, freed |
//! | data, its own | zero, keeps its host cluster | zero, freed | zero, freed |
//! | data, shared; compressed | zero, freed | zero, freed | zero, freed |
//!
//! With `discard-no-unref` clusters of the image's own are kept in all three columns, and the file is
//! told of a hole. With extended L2 all this holds for subclusters; a cluster gives its place back with
//! the last of its allocated subclusters, and a part of a compressed cluster is written over.
//!
//! A hole in a place that stays is made under the range lock and before the entry changes: later it
//! could hit what was written there meanwhile (Q08).
//!
//! What lies past a new end of the disk, and everything when an image is emptied, is *dropped*: it
//! becomes unallocated, in any version.
//!
//! Version 2 has no zero clusters: there both unallocate, unless a backing node would shine through;
//! then write-zeroes is left to the request path, and a discard does nothing.
//! Parts of units are written (write-zeroes) or left alone (discard).

mod plan;

use super::Qcow2;
use super::discard::DiscardReason;
use super::entry::Version;
use super::layers::Layers;
use super::lookup::Place;
use blockplex_graph::{Error, ErrorKind, Result};
use blockplex_io::buffer::IoVector;
use plan::Manner;
use std::ops::Range;

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
        if self.version < Version::V3 && layers.backing.is_some() {
            let text = "version 2 has no zero clusters";
            return Err(Error::new(ErrorKind::NotSupported, text));
        }
        let (first, last) = self.whole_units(offset, end);
        let unmaps = may_unmap || self.version < Version::V3;
        let erase = if unmaps { Erase::Unmap } else { Erase::Zero };
        if first >= last {
            self.zero_part(layers, offset, end, erase).await?;
        } else {
            self.zero_part(layers, offset, first, erase).await?;
            self.erase_clusters(layers, first, last, erase).await?;
            self.zero_part(layers, last.min(end), end, erase).await?;
        }
        self.relieve(layers).await
    }

    /// Discards the whole clusters of a range.
    pub(super) async fn discard(&self, layers: &Layers, offset: u64, length: u64) -> Result<()> {
        self.prepare_data(layers).await?;
        let cluster_size = self.geometry.cluster_size();
        let (first, last) = self.whole(cluster_size, offset, offset + length);
        // What the image does not name, the backing node would show.
        if first < last && (self.version >= Version::V3 || layers.backing.is_none()) {
            self.erase_clusters(layers, first, last, Erase::Discard).await?;
        }
        self.relieve(layers).await
    }

    /// The whole units (clusters, or subclusters) of a range.
    fn whole_units(&self, offset: u64, end: u64) -> (u64, u64) {
        self.whole(self.geometry.subcluster_size(), offset, end)
    }

    /// The whole units of a range; the last cluster of the disk counts as whole when the range
    /// reaches the end of the disk.
    fn whole(&self, unit: u64, offset: u64, end: u64) -> (u64, u64) {
        let first = offset.checked_next_multiple_of(unit).unwrap_or(u64::MAX);
        let last = if end >= self.disk_size() {
            self.geometry.align_up(end).unwrap_or(u64::MAX)
        } else {
            end & !(unit - 1)
        };
        (first, last)
    }

    /// Makes parts of units zero: if nothing else is in its unit, by erasing that; else by writing
    /// zeros.
    async fn zero_part(&self, layers: &Layers, start: u64, end: u64, erase: Erase) -> Result<()> {
        let unit = self.geometry.subcluster_size();
        let mut at = start;
        while at < end {
            let first = at & !(unit - 1);
            let stop = end.min(first + unit);
            if !self.erase_empty_unit(layers, first, at..stop, erase).await? {
                let zeros = IoVector::zeroed((stop - at) as usize);
                self.write(layers, at, &zeros).await?;
            }
            at = stop;
        }
        Ok(())
    }

    /// Erases the unit that begins at guest offset `first` if all of it but `part` reads as zeros,
    /// and the image has no data of it; says whether that is so. Under the lock of its range nothing
    /// is written to it in between: what reads as zeros has no place that tier 1 could write to.
    async fn erase_empty_unit(
        &self,
        layers: &Layers,
        first: u64,
        part: Range<u64>,
        erase: Erase,
    ) -> Result<bool> {
        let end = first + self.geometry.subcluster_size();
        let cluster = self.geometry.align_down(first);
        let whole = cluster..cluster + self.geometry.cluster_size();
        let _guard = self.ranges.lock(whole).await;
        self.check_inside(layers, end)?;
        if !self.is_zero(layers, first, part.start - first).await?
            || !self.is_zero(layers, part.end, end - part.end).await?
            || !self.has_no_data(layers, part).await?
        {
            return Ok(false);
        }
        let hold = self.hold(layers);
        let erased = self.erase_step(layers, (first, end), erase).await;
        hold.release();
        Ok(erased?.is_empty())
    }

    /// Whether the image itself has no data for a range.
    async fn has_no_data(&self, layers: &Layers, range: Range<u64>) -> Result<bool> {
        let mut at = range.start;
        while at < range.end {
            let extent = self.loaded_extent(layers, at, range.end - at).await?;
            if !matches!(extent.place, Place::Zero | Place::Unallocated) {
                return Ok(false);
            }
            at += extent.length;
        }
        Ok(true)
    }

    /// Whether a range reads as zeros because of its entries, or of what its backing node says.
    pub(super) async fn is_zero(&self, layers: &Layers, offset: u64, length: u64) -> Result<bool> {
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let extent = self.loaded_extent(layers, at, end - at).await?;
            at += match extent.place {
                Place::Zero => extent.length,
                Place::Unallocated => match &layers.backing {
                    Some(backing) if at < backing.length() => {
                        let status = backing.block_status(at, extent.length).await?;
                        if !status.zero || status.length == 0 {
                            return Ok(false);
                        }
                        status.length
                    }
                    _ => extent.length,
                },
                _ => return Ok(false),
            };
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
            let whole =
                self.geometry.align_down(at)..self.geometry.align_up(end).unwrap_or(u64::MAX);
            let guard = self.ranges.lock(whole).await;
            self.check_inside(layers, end)?;
            let hold = self.hold(layers);
            let erased = self.erase_step(layers, (at, end), erase).await;
            hold.release();
            drop(guard);
            for (start, end) in erased? {
                if erase != Erase::Discard {
                    self.zero_part(layers, start, end, erase).await?;
                }
            }
            self.relieve(layers).await?;
            at = end;
        }
        Ok(())
    }

    /// Erases whole units of one slice, whose range is locked. Gives guest ranges that can only be
    /// written over.
    pub(super) async fn erase_step(
        &self,
        layers: &Layers,
        (at, end): (u64, u64),
        erase: Erase,
    ) -> Result<Vec<(u64, u64)>> {
        let extent = self.look_up(at, end - at);
        let nothing = layers.backing.is_none() && extent.place == Place::Unallocated;
        let names_nothing =
            self.version >= Version::V3 && matches!(erase, Erase::Zero | Erase::Unmap);
        if nothing && !names_nothing && extent.length == end - at {
            return Ok(Vec::new());
        }
        let slice = self.own_slice(layers, self.position(at).number).await?;
        let manner = Manner {
            erase,
            has_backing: layers.backing.is_some(),
            keep: erase != Erase::Drop && self.discards.keeps_places(),
        };
        let plan = match self.plan_erasure(&slice, (at, end), manner) {
            Ok(plan) => plan,
            Err(fault) => return Err(self.fail_at(layers, at, fault).await),
        };
        let passes = match erase {
            Erase::Zero => false,
            Erase::Unmap | Erase::Discard => self.passes_discard(DiscardReason::Request),
            Erase::Drop => true,
        };
        self.erase_data(layers, (at, end), passes).await?;
        if passes && self.external.is_none() {
            punch(layers, &plan.holes).await;
        }
        let extended = self.geometry.extended_l2();
        self.slices.change(&slice, |editor| {
            for (index, raw, word) in plan.changes {
                if extended {
                    editor.set_pair(index, raw, word);
                } else {
                    editor.set(index, raw);
                }
            }
        });
        for raw in plan.freed {
            self.free_entry(raw, 0, passes);
        }
        Ok(plan.left)
    }
}

/// Tells the file which parts of clusters that stay need not be kept.
async fn punch(layers: &Layers, holes: &[(u64, u64)]) {
    for (offset, length) in holes {
        // A hint.
        if let Err(error) = layers.file.discard(*offset, *length).await {
            tracing::debug!(%error, offset, "the file did not take a discard");
        }
    }
}
