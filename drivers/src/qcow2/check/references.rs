//! Who refers to which host cluster: the walk over everything that the header leads to.
//!
//! First come the structures, then the clusters that they name. Two structures in one place, or a
//! disk's cluster on top of a structure, cannot be repaired: one of the two pointers is wrong, and
//! nobody knows which. Where one of them is the refcount structure it is known, as that can be made
//! anew (see `compare`).
//!
//! A table that many refer to (every snapshot refers to the tables that it shares with the disk) is
//! read once, and what is in it counts as often as it is referred to. Tables that overlap are not
//! followed. So the work is bounded by the file, whatever it claims.

use super::counters::{Counters, Marks};
use super::image::Image;
use super::report::{CheckReport, Finding};
use super::{bitmaps, cluster, snapshots};
use crate::qcow2::geometry::TABLE_ENTRY_BYTES;
use blockplex_graph::Result;
use std::collections::BTreeMap;

/// An L1 entry: bits 9 to 55 are the offset, bit 63 says that the refcount is 1.
const L1_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
pub(super) const COPIED: u64 = 1 << 63;

/// Who refers to an L2 table.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::qcow2) struct TableUse {
    /// All L1 entries that do.
    pub(in crate::qcow2) uses: u64,
    /// Those of the disk itself.
    pub(in crate::qcow2) active: u64,
    /// The last of those.
    pub(super) index: u64,
}

/// See the page.
#[derive(Default)]
pub(in crate::qcow2) struct References {
    /// How often each cluster is referred to.
    pub(in crate::qcow2) counters: Counters,
    /// Clusters of structures.
    structures: Marks,
    /// The L2 tables.
    pub(in crate::qcow2) tables: BTreeMap<u64, TableUse>,
    /// The refcount table lies in the file, and nothing else there.
    pub(super) has_refcount_table: bool,
    pub(super) snapshots: snapshots::Table,
    /// The clusters of the snapshot table.
    pub(super) snapshot_table: std::ops::Range<u64>,
    /// Offset and entries of the tables of the persistent bitmaps.
    pub(super) bitmap_tables: Vec<(u64, u64)>,
    /// There are compressed clusters.
    pub(in crate::qcow2) has_compressed: bool,
    /// The entry of some zero cluster has a place where no cluster is.
    pub(super) has_misplaced_zeroes: bool,
}

impl References {
    /// Walks over the image. What is wrong goes into `report`.
    pub(super) async fn collect(image: &Image<'_>, report: &mut CheckReport) -> Result<References> {
        let mut references = References::default();
        references.claim(image, report, "header", 0, image.geometry.cluster_size());
        let (l1, entries) = (image.header.l1_table_offset, u64::from(image.header.l1_size));
        references.add_l1_table(image, report, l1, entries, true).await?;
        snapshots::collect(image, &mut references, report).await?;
        references.claim_refcount_table(image, report);
        if let Some(crypto) = image.header.extensions.crypto_header {
            references.claim(image, report, "encryption header", crypto.offset, crypto.length);
        }
        bitmaps::collect_tables(image, &mut references, report).await?;
        references.claim_l2_tables(image, report);
        references.add_clusters(image, report).await?;
        bitmaps::collect_clusters(image, &mut references, report).await?;
        Ok(references)
    }

    /// Counts a structure. False when it cannot be followed: it is outside of the file, or on top
    /// of another.
    pub(super) fn claim(
        &mut self,
        image: &Image<'_>,
        report: &mut CheckReport,
        what: &'static str,
        offset: u64,
        size: u64,
    ) -> bool {
        // Up to the first that is taken: every step but the last marks a cluster that was free, so
        // that many tables in one place cost no more than one.
        let is_alone = image.is_outside(offset, size)
            || clusters_of(image, offset, size).all(|cluster| self.structures.insert(cluster));
        if !is_alone {
            report.found(Finding::Overlap { what, offset });
        }
        let counts = is_alone || size <= image.geometry.cluster_size();
        counts && self.refer(image, report, offset, size, 1) && is_alone
    }

    /// Counts references to the clusters of a range. False when it is outside of the file.
    pub(super) fn refer(
        &mut self,
        image: &Image<'_>,
        report: &mut CheckReport,
        offset: u64,
        size: u64,
        times: u64,
    ) -> bool {
        if size == 0 {
            return true;
        }
        if image.is_outside(offset, size) {
            report.found(Finding::PastEnd { offset, size });
            return false;
        }
        let most = image.geometry.max_refcount();
        for cluster in clusters_of(image, offset, size) {
            if self.counters.add(cluster, times) > most {
                report.found(Finding::Overflow(cluster << image.geometry.cluster_bits()));
            }
        }
        true
    }

    /// Counts references to clusters that hold data.
    pub(super) fn refer_data(
        &mut self,
        image: &Image<'_>,
        report: &mut CheckReport,
        offset: u64,
        size: u64,
        times: u64,
    ) {
        if !self.refer(image, report, offset, size, times) {
            return;
        }
        if clusters_of(image, offset, size).any(|cluster| self.structures.contains(cluster)) {
            report.found(Finding::Overlap { what: "data", offset });
        }
    }

    /// Counts an L1 table, and takes note of the L2 tables that it names.
    pub(super) async fn add_l1_table(
        &mut self,
        image: &Image<'_>,
        report: &mut CheckReport,
        offset: u64,
        entries: u64,
        is_active: bool,
    ) -> Result<()> {
        let what = if is_active { "L1 table" } else { "L1 table of a snapshot" };
        if entries == 0 || !self.claim(image, report, what, offset, entries * TABLE_ENTRY_BYTES) {
            return Ok(());
        }
        let tables = &mut self.tables;
        let read = image.for_each_entry(offset, entries, |index, raw| {
            if raw == 0 {
                return;
            }
            if raw & !(L1_OFFSET | COPIED) != 0 {
                report.found(Finding::ReservedL1(raw));
            }
            let table = raw & L1_OFFSET;
            if table == 0 {
                report.found(Finding::CopiedNothing { table: "L1", raw });
            } else if !image.geometry.is_aligned(table) {
                report.found(Finding::UnalignedTable(table));
            } else if image.is_outside(table, image.geometry.cluster_size()) {
                let size = image.geometry.cluster_size();
                report.found(Finding::PastEnd { offset: table, size });
            } else {
                let place = tables.entry(table).or_default();
                place.uses += 1;
                if is_active {
                    place.active += 1;
                    place.index = index;
                }
            }
        });
        if read.await.is_err() {
            report.found(Finding::Unread(offset));
        }
        Ok(())
    }

    fn claim_refcount_table(&mut self, image: &Image<'_>, report: &mut CheckReport) {
        let offset = image.header.refcount_table_offset;
        let clusters = u64::from(image.header.refcount_table_clusters);
        // At most 8 MiB, as the header's rules have made sure.
        let bytes = clusters << image.geometry.cluster_bits();
        if clusters == 0 {
            report.found(Finding::RefcountTable("the image has no refcount table".to_owned()));
        } else if offset == 0 {
            let text = "the refcount table is said to be in the header".to_owned();
            report.found(Finding::RefcountTable(text));
        } else if image.is_outside(offset, bytes) {
            let text =
                format!("the refcount table at {offset:#x} reaches past the end of the file");
            report.found(Finding::RefcountTable(text));
        } else {
            self.has_refcount_table = self.claim(image, report, "refcount table", offset, bytes);
        }
    }

    fn claim_l2_tables(&mut self, image: &Image<'_>, report: &mut CheckReport) {
        let size = image.geometry.cluster_size();
        let tables = std::mem::take(&mut self.tables);
        for (&offset, used) in &tables {
            self.claim(image, report, "L2 table", offset, size);
            if used.uses > 1 {
                self.refer(image, report, offset, size, used.uses - 1);
            }
            if used.active > 1 {
                report.found(Finding::SharedTable { offset, uses: used.active });
            }
        }
        self.tables = tables;
    }

    /// Counts what the L2 tables name.
    async fn add_clusters(&mut self, image: &Image<'_>, report: &mut CheckReport) -> Result<()> {
        let size = image.geometry.cluster_size();
        let tables = std::mem::take(&mut self.tables);
        for (&offset, &used) in &tables {
            if offset + size > image.length {
                report.found(Finding::CutTable(offset));
                continue;
            }
            match image.read(offset, size).await {
                Ok(bytes) => cluster::collect(image, self, report, used, &bytes),
                Err(_) => report.found(Finding::Unread(offset)),
            }
        }
        self.tables = tables;
        Ok(())
    }
}

/// The numbers of the clusters that a range has a part of.
pub(super) fn clusters_of(image: &Image<'_>, offset: u64, size: u64) -> std::ops::Range<u64> {
    let bits = image.geometry.cluster_bits();
    match offset.checked_add(size.saturating_sub(1)) {
        Some(last) if size > 0 => offset >> bits..(last >> bits) + 1,
        _ => 0..0,
    }
}
