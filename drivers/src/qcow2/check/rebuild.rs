//! A new refcount structure, from the references that there are.
//!
//! It is written behind everything that is in use, and made durable, before one write of one header
//! sector makes it the image's: until then the image is as it was, and from then on the clusters of
//! the old structure are free, because the new one does not count them.

use super::counters::Counters;
use super::image::Image;
use crate::qcow2::geometry::{Geometry, TABLE_ENTRY_BYTES};
use crate::qcow2::header::Version;
use crate::qcow2::refcount_block;
use blockplex_graph::{Error, ErrorKind, Result};
use std::collections::BTreeSet;

/// Bytes of the header that are written as one.
const HEADER_SECTOR: u64 = 512;
/// Bytes that are written at once.
const PIECE: usize = 1 << 20;

/// Changes of header fields, all in the first sector.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::qcow2) struct HeaderChange {
    /// Offset and clusters of the refcount table.
    pub(in crate::qcow2) refcount_table: Option<(u64, u32)>,
    pub(in crate::qcow2) refcount_order: Option<u32>,
    /// Entries and offset of the snapshot table.
    pub(in crate::qcow2) snapshots: Option<(u32, u64)>,
    /// Incompatible features that are to be cleared.
    pub(in crate::qcow2) cleared: u64,
}

/// Where the parts of a new structure go: first the snapshot table, if there is a new one, then
/// the blocks, then the refcount table.
struct Plan {
    first: u64,
    /// The entries of the refcount table that have a block, in order.
    blocks: Vec<u64>,
    table_clusters: u64,
    end: u64,
}

/// Writes a refcount structure with the width of `geometry` for the clusters that `references`
/// counts, which are not those of the old structure; behind them and `used_end` (a cluster). With
/// `snapshots`, a new snapshot table and its entries, too. Says what the header has to say then.
pub(in crate::qcow2) async fn write_structure(
    image: &Image<'_>,
    geometry: &Geometry,
    references: &mut Counters,
    used_end: u64,
    snapshots: Option<(u32, Vec<u8>)>,
) -> Result<HeaderChange> {
    let table_bytes = snapshots.as_ref().map_or(0, |(_, bytes)| bytes.len() as u64);
    let snapshot_clusters = geometry.clusters_for(table_bytes);
    let plan = plan(geometry, references, used_end, snapshot_clusters)?;
    for cluster in plan.first..plan.end {
        references.set(cluster, 1);
    }
    let bits = geometry.cluster_bits();
    let end = plan.end << bits;
    if image.file.length() < end {
        image.file.truncate(end).await?;
    }
    let mut change = HeaderChange::default();
    if let Some((count, bytes)) = snapshots {
        let offset = if count > 0 { plan.first << bits } else { 0 };
        write_padded(image, plan.first << bits, bytes, snapshot_clusters << bits).await?;
        change.snapshots = Some((count, offset));
    }
    let first_block = plan.first + snapshot_clusters;
    for (cluster, index) in (first_block..).zip(&plan.blocks) {
        let block = block(geometry, references, *index)?;
        image.write(cluster << bits, &block).await?;
    }
    let place = first_block + plan.blocks.len() as u64;
    let mut table = vec![0; (plan.table_clusters << bits) as usize];
    for (cluster, index) in (first_block..).zip(&plan.blocks) {
        let at = (index * TABLE_ENTRY_BYTES) as usize;
        if let Some(entry) = table.get_mut(at..at + 8) {
            entry.copy_from_slice(&(cluster << bits).to_be_bytes());
        }
    }
    for (number, piece) in table.chunks(PIECE).enumerate() {
        image.write((place << bits) + (number * PIECE) as u64, piece).await?;
    }
    image.file.flush().await?;
    // At most 8 MiB, as planned.
    change.refcount_table = Some((place << bits, plan.table_clusters as u32));
    Ok(change)
}

/// Changes the header, in one write, and makes that durable.
pub(in crate::qcow2) async fn change_header(
    image: &Image<'_>,
    change: &HeaderChange,
) -> Result<()> {
    let mut sector = image.read(0, HEADER_SECTOR).await?;
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = sector.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    if let Some((offset, clusters)) = change.refcount_table {
        put(48, &offset.to_be_bytes());
        put(56, &clusters.to_be_bytes());
    }
    if let Some((count, offset)) = change.snapshots {
        put(60, &count.to_be_bytes());
        put(64, &offset.to_be_bytes());
    }
    if image.header.version >= Version::V3 {
        let features = image.header.incompatible_features & !change.cleared;
        put(72, &features.to_be_bytes());
        if let Some(order) = change.refcount_order {
            put(96, &order.to_be_bytes());
        }
    }
    image.write(0, &sector).await?;
    image.file.flush().await
}

fn plan(
    geometry: &Geometry,
    references: &Counters,
    used_end: u64,
    snapshot_clusters: u64,
) -> Result<Plan> {
    let per_block = geometry.refcounts_per_block();
    let mut used = BTreeSet::new();
    let mut next = Some(0);
    while let Some(cluster) = next.and_then(|at| references.next_counted(at)) {
        used.insert(cluster / per_block);
        next = (cluster / per_block + 1).checked_mul(per_block);
    }
    let first = references.last_counted().map_or(1, |last| last + 1).max(used_end);
    let most = geometry.max_refcount_table_clusters();
    let (mut blocks, mut table_clusters) = (used.len() as u64, 1);
    loop {
        let end = first + snapshot_clusters + blocks + table_clusters;
        let last = (end - 1) / per_block;
        let own = first / per_block..=last;
        let mut all = used.clone();
        all.extend(own);
        let needed = geometry.clusters_for((last + 1) * TABLE_ENTRY_BYTES);
        if needed > most {
            let text = "the refcount table would exceed its largest size";
            return Err(Error::new(ErrorKind::NoSpace, text));
        }
        // Both only grow from round to round, and with them the end by less and less.
        if all.len() as u64 <= blocks && needed <= table_clusters {
            let blocks = all.into_iter().collect::<Vec<_>>();
            let end = first + snapshot_clusters + blocks.len() as u64 + table_clusters;
            return Ok(Plan { first, blocks, table_clusters, end });
        }
        (blocks, table_clusters) = (all.len() as u64, needed.max(table_clusters));
    }
}

fn block(geometry: &Geometry, references: &Counters, index: u64) -> Result<Vec<u8>> {
    let per_block = geometry.refcounts_per_block();
    let mut block = vec![0; geometry.cluster_size() as usize];
    let start = index * per_block;
    for (cluster, count) in references.counted(start..start + per_block) {
        let at = (cluster - start) as usize;
        refcount_block::set(&mut block, geometry.refcount_order(), at, count).map_err(|_| {
            let bits = geometry.refcount_bits();
            let offset = cluster << geometry.cluster_bits();
            let text = format!(
                "a refcount of {bits} bits cannot hold the {count} references to the cluster at \
                 {offset:#x}"
            );
            Error::new(ErrorKind::InvalidArgument, text)
        })?;
    }
    Ok(block)
}

async fn write_padded(image: &Image<'_>, at: u64, mut bytes: Vec<u8>, size: u64) -> Result<()> {
    bytes.resize(size as usize, 0);
    for (number, piece) in bytes.chunks(PIECE).enumerate() {
        image.write(at + (number * PIECE) as u64, piece).await?;
    }
    Ok(())
}
