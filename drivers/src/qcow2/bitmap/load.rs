//! Reading the persistent bitmaps when an image is opened, with everything checked.
//!
//! Nothing is allocated on the word of the image alone: tables and bits are read from clusters that
//! the file has and that nothing else was seen to use, so that no two parts of the bitmaps are
//! in one place and the memory is bounded by the file.

use super::{Bitmap, Stored};
use crate::dirty_bitmap::DirtyBitmap;
use crate::qcow2::bitmap_directory::{
    BitmapCluster, BitmapEntry, DirectoryLimits, parse_directory,
};
use crate::qcow2::geometry::TABLE_ENTRY_BYTES;
use crate::qcow2::header::Header;
use crate::qcow2::overlap::Structure;
use crate::qcow2::refcounts::Refcounts;
use blockplex_graph::{Child, Error, Result};
use blockplex_io::buffer::IoVector;
use std::sync::Arc;

/// What the bitmaps are read with.
pub(in crate::qcow2) struct Source<'a> {
    pub(in crate::qcow2) file: &'a Child,
    pub(in crate::qcow2) header: &'a Header,
    pub(in crate::qcow2) refcounts: &'a Refcounts,
    pub(in crate::qcow2) file_length: u64,
    pub(in crate::qcow2) read_only: bool,
}

/// The entries of the directory, if the bitmaps are not stale.
pub(in crate::qcow2) async fn read_directory(
    file: &Child,
    header: &Header,
    file_length: u64,
) -> Result<Vec<BitmapEntry>> {
    let Some(place) = header.consistent_bitmaps() else { return Ok(Vec::new()) };
    // At most 64 MiB, and in the file: the header's rules.
    let bytes = read(file, place.directory_offset, place.directory_size).await?;
    let limits =
        DirectoryLimits { geometry: header.geometry(), disk_size: header.size, file_length };
    Ok(parse_directory(&bytes, place.count, &limits)?)
}

impl Source<'_> {
    /// The bitmaps of these entries.
    pub(in crate::qcow2) async fn load(&self, entries: &[BitmapEntry]) -> Result<Vec<Bitmap>> {
        let mut bitmaps = Vec::with_capacity(entries.len());
        for entry in entries {
            let bits = if entry.in_use { None } else { Some(self.bits_of(entry).await?) };
            let (bits, clusters) = match bits {
                Some((bits, clusters)) => (Some(Arc::new(bits)), Some(clusters)),
                None => (None, None),
            };
            bitmaps.push(Bitmap {
                name: entry.name.clone(),
                granularity_bits: entry.granularity_bits,
                recording: bits.is_some() && entry.auto,
                bits,
                persistent: true,
                stored: Some(Stored { entry: entry.clone(), clusters }),
            });
        }
        Ok(bitmaps)
    }

    /// The bits of a bitmap, and the clusters they are in.
    async fn bits_of(&self, entry: &BitmapEntry) -> Result<(DirtyBitmap, Vec<u64>)> {
        let geometry = self.header.geometry();
        let table_bytes = u64::from(entry.table_entries) * TABLE_ENTRY_BYTES;
        for cluster in 0..geometry.clusters_for(table_bytes) {
            let offset = entry.table_offset + (cluster << geometry.cluster_bits());
            self.claim(entry, "table", offset).await?;
        }
        let bits = DirtyBitmap::new(self.header.size, 1 << entry.granularity_bits)?;
        let table = read(self.file, entry.table_offset, table_bytes).await?;
        let per_cluster = geometry.cluster_size() * 8;
        let (mut clusters, mut ones) = (Vec::new(), 0..0);
        for (index, word) in (0..).zip(table.as_chunks::<8>().0) {
            let raw = u64::from_be_bytes(*word);
            let first = index * per_cluster;
            match BitmapCluster::decode(raw, &geometry) {
                None => {
                    let rule = format!("has the table entry {raw:#x}, which cannot be");
                    return Err(entry.fault(rule).into());
                }
                Some(BitmapCluster::Zeros) => {}
                // Whole runs at once: they need the least memory.
                Some(BitmapCluster::Ones) if ones.end == first => ones.end += per_cluster,
                Some(BitmapCluster::Ones) => {
                    bits.mark_chunks(ones.start, ones.end - ones.start);
                    ones = first..first + per_cluster;
                }
                Some(BitmapCluster::Stored(offset)) => {
                    self.claim(entry, "bits", offset).await?;
                    clusters.push(offset);
                    let bytes = read(self.file, offset, geometry.cluster_size()).await?;
                    bits.mark_bytes(first, &bytes);
                }
            }
        }
        bits.mark_chunks(ones.start, ones.end - ones.start);
        Ok((bits, clusters))
    }

    /// Makes sure that a cluster of a bitmap is the bitmap's alone (M09c).
    async fn claim(&self, entry: &BitmapEntry, what: &str, offset: u64) -> Result<()> {
        let fault = |rule: &str| -> Result<()> {
            Err(Error::from(entry.fault(format!("has {what} at {offset:#x}, {rule}"))))
        };
        let end = offset + self.header.geometry().cluster_size();
        let file_end = self.header.geometry().align_up(self.file_length).unwrap_or(u64::MAX);
        if end > file_end {
            return fault("past the end of the file");
        }
        if !self.refcounts.add_metadata_cluster(Structure::Other, offset) {
            return fault("where other metadata is");
        }
        if !self.read_only && self.refcounts.refcount(self.file, offset).await? == 0 {
            return fault("which has refcount 0: repair the image first");
        }
        Ok(())
    }
}

pub(super) async fn read(file: &Child, offset: u64, length: u64) -> Result<Vec<u8>> {
    let memory = IoVector::zeroed(length as usize);
    file.read(offset, memory.clone()).await?;
    Ok(memory.to_vec())
}
