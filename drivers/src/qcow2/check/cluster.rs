//! The entries of one L2 table, as a check sees them.

use super::image::Image;
use super::references::{COPIED, References, TableUse};
use super::report::{CheckReport, Finding};
use crate::qcow2::geometry::Geometry;

const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits of a standard entry that mean nothing.
const RESERVED: u64 = !(COPIED | COMPRESSED | OFFSET | ZERO);

/// An entry as it stands in the table.
#[derive(Clone, Copy, Debug)]
pub(super) struct RawEntry {
    pub(super) index: u64,
    pub(super) raw: u64,
    /// The subclusters with data (low half) and those that read as zeros (high half).
    bitmap: u64,
}

/// What an entry names, whether or not it is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Nothing,
    Compressed { host: u64, length: u64 },
    Cluster { host: u64 },
}

/// The entries of a table.
pub(super) fn entries<'a>(
    geometry: &Geometry,
    table: &'a [u8],
) -> impl Iterator<Item = RawEntry> + use<'a> {
    let width = if geometry.extended_l2() { 16 } else { 8 };
    (0..).zip(table.chunks_exact(width)).map(|(index, bytes)| RawEntry {
        index,
        raw: crate::qcow2::extension::be64(bytes, 0).unwrap_or(0),
        bitmap: crate::qcow2::extension::be64(bytes, 8).unwrap_or(0),
    })
}

impl RawEntry {
    pub(super) fn kind(&self, image: &Image<'_>) -> Kind {
        if self.raw & COMPRESSED != 0 {
            let shift = image.geometry.compressed_count_shift();
            let host = self.raw & ((1 << shift) - 1);
            let sectors = (self.raw & !(COPIED | COMPRESSED)) >> shift;
            return Kind::Compressed { host, length: (sectors + 1) * 512 - host % 512 };
        }
        let host = self.raw & OFFSET;
        // A data file has a first cluster as any other.
        if host == 0 && !(image.has_data_file() && self.raw & COPIED != 0) {
            return Kind::Nothing;
        }
        Kind::Cluster { host }
    }

    /// The entry for the same zeros without a place.
    pub(super) fn without_place(&self, image: &Image<'_>) -> u64 {
        if image.geometry.extended_l2() { 0 } else { ZERO }
    }

    /// Whether the cluster, which has a place, reads as zeros as a whole.
    pub(super) fn is_preallocated(&self, image: &Image<'_>) -> bool {
        match image.geometry.extended_l2() {
            true => self.bitmap & 0xffff_ffff == 0,
            false => self.raw & ZERO != 0,
        }
    }
}

/// Counts what a table that `used` describes names.
pub(super) fn collect(
    image: &Image<'_>,
    references: &mut References,
    report: &mut CheckReport,
    used: TableUse,
    table: &[u8],
) {
    let mut expected = None;
    for entry in entries(&image.geometry, table) {
        if entry.raw & COMPRESSED == 0 && entry.raw & RESERVED != 0 {
            report.found(Finding::ReservedL2(entry.raw));
        }
        let zero_allowed = !image.is_version_2() && !image.geometry.extended_l2();
        if entry.raw & (COMPRESSED | ZERO) == ZERO && !zero_allowed {
            report.found(Finding::ZeroFlag(entry.raw));
        }
        match entry.kind(image) {
            Kind::Nothing => look_at_nothing(image, report, entry),
            Kind::Compressed { host, length } => {
                references.has_compressed = true;
                if look_at_compressed(image, report, entry, host) {
                    references.refer_data(image, report, host, length, used.uses);
                    report.allocated_clusters += used.active;
                    report.fragmented_clusters += used.active;
                    report.compressed_clusters += used.active;
                }
            }
            Kind::Cluster { host } => {
                if !look_at_cluster(image, references, report, used, entry, host) {
                    continue;
                }
                report.allocated_clusters += used.active;
                if expected.is_some_and(|expected| expected != host) {
                    report.fragmented_clusters += used.active;
                }
                expected = host.checked_add(image.geometry.cluster_size());
                if !image.has_data_file() {
                    let size = image.geometry.cluster_size();
                    references.refer_data(image, report, host, size, used.uses);
                }
            }
        }
    }
}

fn look_at_nothing(image: &Image<'_>, report: &mut CheckReport, entry: RawEntry) {
    if entry.raw & COPIED != 0 {
        report.found(Finding::CopiedNothing { table: "L2", raw: entry.raw });
    }
    if image.geometry.extended_l2() && entry.bitmap & 0xffff_ffff != 0 {
        report.found(Finding::UnallocatedBitmap);
    }
}

/// Whether the references of the entry count.
fn look_at_compressed(
    image: &Image<'_>,
    report: &mut CheckReport,
    entry: RawEntry,
    host: u64,
) -> bool {
    let RawEntry { index, raw, .. } = entry;
    if raw & COPIED != 0 {
        report.found(Finding::CompressedCopied(host));
    }
    if image.has_data_file() {
        report.found(Finding::CompressedWithDataFile { index, raw });
        return false;
    }
    if image.geometry.extended_l2() && entry.bitmap != 0 {
        report.found(Finding::CompressedWithBitmap { index, raw });
        return false;
    }
    true
}

/// Whether the references of the entry count.
fn look_at_cluster(
    image: &Image<'_>,
    references: &mut References,
    report: &mut CheckReport,
    used: TableUse,
    entry: RawEntry,
    host: u64,
) -> bool {
    let geometry = &image.geometry;
    if geometry.extended_l2() && entry.bitmap >> 32 & entry.bitmap & 0xffff_ffff != 0 {
        report.found(Finding::BadBitmap(host));
        return false;
    }
    if !geometry.is_aligned(host) {
        let preallocated = entry.is_preallocated(image);
        report.found(Finding::UnalignedCluster { offset: host, preallocated });
        // What reads as zeros can do without the place.
        if preallocated {
            references.has_misplaced_zeroes = true;
            return false;
        }
    }
    if image.has_data_file() {
        let guest = geometry.guest_offset(used.index, entry.index as u32);
        if let Some(guest) = guest.filter(|guest| used.active > 0 && *guest != host) {
            report.found(Finding::WrongDataOffset { offset: host, guest });
        }
    }
    true
}
