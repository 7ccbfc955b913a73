//! The refcounts as they stand in the image, against the references that there are.
//!
//! A refcount block that lies on top of something else makes its table entry a liar, or the pointer
//! to the other thing. The entry is, and the refcounts can be made anew, when what is in the block
//! denies clusters that are in use; otherwise nobody knows.

use super::counters::{CHUNK, Counters, Marks};
use super::image::Image;
use super::references::References;
use super::report::{CheckReport, Finding};
use crate::qcow2::refcount_block;
use blockplex_graph::Result;
use std::collections::{BTreeMap, BTreeSet};

/// What the refcount structure says.
#[derive(Default)]
pub(super) struct Counted {
    /// The blocks that can be read, by the entry of the table; none twice.
    pub(super) blocks: BTreeMap<u64, u64>,
    /// The clusters of the structure itself, each as often as it was counted as a reference.
    pub(super) own: Vec<u64>,
    /// Blocks that lie on top of something else.
    suspects: BTreeSet<u64>,
    /// Clusters that are in use and have another refcount than references, and their refcounts.
    differing: Marks,
    refcounts: Counters,
}

impl Counted {
    /// The refcount of a cluster that is in use.
    pub(super) fn refcount(&self, references: &Counters, cluster: u64) -> u64 {
        match self.differing.contains(cluster) {
            true => self.refcounts.get(cluster),
            false => references.get(cluster),
        }
    }

    /// Reads the refcount structure, and compares it with `references`, to which its own clusters
    /// are added.
    pub(super) async fn compare(
        image: &Image<'_>,
        references: &mut References,
        report: &mut CheckReport,
    ) -> Result<Counted> {
        let mut counted = Counted::default();
        if references.has_refcount_table {
            counted.add_table(image, references, report).await?;
        }
        counted.compare_all(image, &references.counters, report).await?;
        Ok(counted)
    }

    /// Counts the structure itself.
    async fn add_table(
        &mut self,
        image: &Image<'_>,
        references: &mut References,
        report: &mut CheckReport,
    ) -> Result<()> {
        let geometry = &image.geometry;
        let offset = image.header.refcount_table_offset;
        let entries = geometry.refcount_table_entries(image.header.refcount_table_clusters);
        let first = offset >> geometry.cluster_bits();
        self.own.extend(first..first + u64::from(image.header.refcount_table_clusters));
        let mut blocks = Vec::new();
        image
            .for_each_entry(offset, entries, |index, raw| {
                let block = raw & !0x1ff;
                if raw & 0x1ff != 0 {
                    report.found(Finding::BlockReserved(index));
                } else if !geometry.is_aligned(block) {
                    report.found(Finding::BlockUnaligned(index));
                } else if image.is_outside(block, geometry.cluster_size()) {
                    report.found(Finding::BlockOutside(index));
                } else if block != 0 {
                    blocks.push((index, block));
                }
            })
            .await?;
        let mut uses: BTreeMap<u64, u64> = BTreeMap::new();
        for (index, block) in blocks {
            let cluster = block >> geometry.cluster_bits();
            let used = uses.entry(cluster).or_insert(0);
            *used += 1;
            self.own.push(cluster);
            let refcount = references.counters.add(cluster, 1);
            if refcount != 1 {
                report.found(Finding::BlockRefcount { index, refcount });
            }
            if refcount > *used {
                self.suspects.insert(index);
            }
            if *used == 1 {
                self.blocks.insert(index, block);
            }
        }
        Ok(())
    }

    async fn compare_all(
        &mut self,
        image: &Image<'_>,
        references: &Counters,
        report: &mut CheckReport,
    ) -> Result<()> {
        let per_block = image.geometry.refcounts_per_block();
        let last = references.last_counted().map_or(0, |last| last + 1);
        let end = image.clusters().max(last);
        let blocks = self.blocks.clone();
        let mut highest = 0;
        let mut next = 0;
        loop {
            let with_block = blocks.range(next..).next().map(|(index, _)| *index);
            let with_use = references.next_counted(next * per_block).map(|at| at / per_block);
            let Some(index) = with_block.into_iter().chain(with_use).min() else { break };
            let block = match blocks.get(&index) {
                Some(offset) => Some(image.read(*offset, image.geometry.cluster_size()).await?),
                None => None,
            };
            let used = self.compare_block(image, references, report, index, block.as_deref(), end);
            highest = used.unwrap_or(0).max(highest);
            next = index + 1;
        }
        report.image_end_offset = (highest + 1) << image.geometry.cluster_bits();
        Ok(())
    }

    /// Compares what one block counts, with no block for one that is not there. Gives the last
    /// cluster before `end` that is in use or counted.
    fn compare_block(
        &mut self,
        image: &Image<'_>,
        references: &Counters,
        report: &mut CheckReport,
        index: u64,
        block: Option<&[u8]>,
        end: u64,
    ) -> Option<u64> {
        let per_block = image.geometry.refcounts_per_block();
        let order = image.geometry.refcount_order();
        let start = index * per_block;
        let mut highest = None;
        let mut denies = false;
        for first in (start..start + per_block).step_by(CHUNK as usize) {
            let is_unused = references.chunk(first).is_none();
            if is_unused && block.is_none_or(|block| counts_nothing(block, order, first - start)) {
                continue;
            }
            for cluster in first..first + CHUNK {
                let reference = references.get(cluster);
                let in_block = (cluster - start) as usize;
                let refcount = block.and_then(|block| refcount_block::get(block, order, in_block));
                let refcount = refcount.unwrap_or(0);
                if (refcount > 0 || reference > 0) && cluster < end {
                    highest = Some(cluster);
                }
                if refcount == reference {
                    continue;
                }
                denies |= refcount == 0;
                report.found(Finding::Cluster { cluster, refcount, reference });
                if reference > 0 {
                    self.differing.insert(cluster);
                    self.refcounts.set(cluster, refcount);
                }
            }
        }
        if self.suspects.contains(&index) && !denies {
            let offset = self.blocks.get(&index).copied().unwrap_or(0);
            report.found(Finding::Overlap { what: "refcount block", offset });
        }
        highest
    }
}

/// Whether the refcounts of a chunk are all 0, the chunk beginning with the refcount `at`.
fn counts_nothing(block: &[u8], order: u32, at: u64) -> bool {
    // At most 2 MiB.
    let (start, length) = (((at << order) / 8) as usize, ((CHUNK << order) / 8) as usize);
    block.get(start..start + length).is_none_or(|bytes| bytes.iter().all(|byte| *byte == 0))
}
