//! The COPIED flags: an entry of the disk has it when, and only when, the refcount of what it names
//! is 1.
//!
//! Only the disk's own tables count: those of a snapshot are looked at when it becomes the disk.

use super::cluster::{self, Kind};
use super::compare::Counted;
use super::image::Image;
use super::references::{COPIED, References};
use super::report::{CheckReport, Finding};
use crate::qcow2::geometry::TABLE_ENTRY_BYTES;
use blockplex_graph::Result;

/// Which refcount an entry is held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Against {
    /// The one that stands in the image.
    Refcounts,
    /// The same, but leaks are gone.
    RefcountsWithoutLeaks,
    /// What it is after the repair.
    References,
}

/// A pass over the disk's tables.
pub(super) struct Pass<'a> {
    pub(super) image: &'a Image<'a>,
    pub(super) references: &'a References,
    pub(super) counted: &'a Counted,
    pub(super) against: Against,
}

impl Pass<'_> {
    /// Looks at all flags, and puts right what is wrong if `repairs`.
    pub(super) async fn run(&self, report: &mut CheckReport, repairs: bool) -> Result<()> {
        self.pass_over_l1(report, repairs).await?;
        let all = repairs && self.references.has_misplaced_zeroes;
        for (&table, used) in &self.references.tables {
            if used.active > 0 || all {
                self.pass_over_l2(report, table, used.active > 0, repairs).await?;
            }
        }
        Ok(())
    }

    fn refcount(&self, offset: u64) -> u64 {
        let cluster = offset >> self.image.geometry.cluster_bits();
        let references = self.references.counters.get(cluster);
        match self.against {
            Against::References => references,
            Against::Refcounts => self.counted.refcount(&self.references.counters, cluster),
            Against::RefcountsWithoutLeaks => {
                self.counted.refcount(&self.references.counters, cluster).min(references)
            }
        }
    }

    async fn pass_over_l1(&self, report: &mut CheckReport, repairs: bool) -> Result<()> {
        let header = &self.image.header;
        let mut wrong = Vec::new();
        let entries = u64::from(header.l1_size);
        self.image
            .for_each_entry(header.l1_table_offset, entries, |index, raw| {
                let table = raw & 0x00ff_ffff_ffff_fe00;
                if table == 0 {
                    return;
                }
                let refcount = self.refcount(table);
                if (refcount == 1) != (raw & COPIED != 0) {
                    report
                        .found_and_repaired(Finding::CopiedTable { index, raw, refcount }, repairs);
                    wrong.push((index, raw ^ COPIED));
                }
            })
            .await?;
        if !repairs {
            return Ok(());
        }
        for (index, raw) in wrong {
            let place = header.l1_table_offset + index * TABLE_ENTRY_BYTES;
            self.image.write(place, &raw.to_be_bytes()).await?;
        }
        Ok(())
    }

    async fn pass_over_l2(
        &self,
        report: &mut CheckReport,
        table: u64,
        is_active: bool,
        repairs: bool,
    ) -> Result<()> {
        let image = self.image;
        // One that cannot be read was reported as such.
        let Ok(mut bytes) = image.read(table, image.geometry.cluster_size()).await else {
            return Ok(());
        };
        let mut changes = Vec::new();
        for entry in cluster::entries(&image.geometry, &bytes) {
            let Kind::Cluster { host } = entry.kind(image) else { continue };
            if !image.geometry.is_aligned(host) && entry.is_preallocated(image) {
                changes.push((entry.index, entry.without_place(image)));
                continue;
            }
            if !is_active {
                continue;
            }
            let refcount = if image.has_data_file() { 1 } else { self.refcount(host) };
            if (refcount == 1) != (entry.raw & COPIED != 0) {
                let finding = Finding::CopiedData { raw: entry.raw, refcount };
                report.found_and_repaired(finding, repairs);
                changes.push((entry.index, entry.raw ^ COPIED));
            }
        }
        if !repairs || changes.is_empty() {
            return Ok(());
        }
        for (index, raw) in changes {
            let at = (index * image.geometry.l2_entry_bytes()) as usize;
            if let Some(place) = bytes.get_mut(at..at + 8) {
                place.copy_from_slice(&raw.to_be_bytes());
            }
        }
        image.write(table, &bytes).await
    }
}
