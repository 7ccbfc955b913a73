//! The persistent bitmaps, as a check sees them. Nothing of them is repaired: a bitmap that is
//! wrong can only be removed, which its owner must want.

use super::image::Image;
use super::references::References;
use super::report::{CheckReport, Finding};
use crate::qcow2::extension::{be32, be64};
use crate::qcow2::format_error::escaped;
use blockplex_graph::Result;
use std::collections::BTreeSet;

/// The fixed fields of a directory entry.
const FIXED: usize = 24;
const KNOWN_FLAGS: u32 = 7;
/// The type of a dirty bitmap.
const DIRTY: u8 = 1;
/// What a granularity may be, as its base-2 logarithm.
const GRANULARITY: std::ops::RangeInclusive<u8> = 9..=31;
/// The most entries of a table.
const MAX_TABLE_ENTRIES: u64 = 0x800_0000;
/// The most bytes of a name.
const MAX_NAME: usize = 1023;
/// A table entry: bits 9 to 55 are the offset, bit 0 says that all bits are set.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Counts the directory, and the tables of the bitmaps.
pub(super) async fn collect_tables(
    image: &Image<'_>,
    references: &mut References,
    report: &mut CheckReport,
) -> Result<()> {
    // The header's rules have made sure that the directory lies in the file.
    let Some(place) = image.header.consistent_bitmaps().copied() else { return Ok(()) };
    let (offset, size) = (place.directory_offset, place.directory_size);
    if !references.claim(image, report, "bitmap directory", offset, size) {
        return Ok(());
    }
    let directory = image.read(offset, size).await?;
    let mut names = BTreeSet::new();
    let mut rest = &directory[..];
    for number in 0..place.count {
        let Some((entry, name, after)) = next_entry(rest) else {
            let text = format!("entry {number} reaches past the end of the directory");
            report.found(Finding::Bitmaps(text));
            return Ok(());
        };
        rest = after;
        let fault = fault_of(entry, name);
        let fault = fault.or_else(|| (!names.insert(name)).then_some("is there twice"));
        if let Some(fault) = fault {
            report.found(Finding::Bitmaps(format!("bitmap {} {fault}", escaped(name))));
            continue;
        }
        let table = be64(entry, 0).unwrap_or(0);
        let entries = u64::from(be32(entry, 8).unwrap_or(0));
        if table == 0 || !image.geometry.is_aligned(table) {
            let text = format!("bitmap {}: no table can be at {table:#x}", escaped(name));
            report.found(Finding::Bitmaps(text));
        } else if table.checked_add(entries * 8).is_none_or(|end| end > image.length) {
            let text = format!("bitmap {}: its table ends past the file", escaped(name));
            report.found(Finding::Bitmaps(text));
        } else if references.claim(image, report, "bitmap table", table, entries * 8) {
            references.bitmap_tables.push((table, entries));
        }
    }
    if !rest.is_empty() {
        let text = format!("{} bytes of the directory are no entries", rest.len());
        report.found(Finding::Bitmaps(text));
    }
    Ok(())
}

/// The fixed fields of the first entry, its name, and what comes behind it.
fn next_entry(directory: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let entry = directory.get(..FIXED)?;
    let name_length = usize::from(u16::from_be_bytes([*entry.get(18)?, *entry.get(19)?]));
    let name_at = FIXED.checked_add(be32(entry, 20)? as usize)?;
    let end = name_at.checked_add(name_length)?;
    let name = directory.get(name_at..end)?;
    Some((entry, name, directory.get(end.next_multiple_of(8)..)?))
}

fn fault_of(entry: &[u8], name: &[u8]) -> Option<&'static str> {
    let kind = entry.get(16).copied();
    let granularity = entry.get(17).copied().unwrap_or(0);
    let entries = u64::from(be32(entry, 8).unwrap_or(0));
    if !(1..=MAX_NAME).contains(&name.len()) {
        return Some("has a name of a length that none has");
    }
    if be32(entry, 12).unwrap_or(0) & !KNOWN_FLAGS != 0 {
        return Some("has unknown flags");
    }
    if kind != Some(DIRTY) {
        return Some("is of an unknown type");
    }
    if be32(entry, 20) != Some(0) {
        return Some("has extra data, which is not supported");
    }
    if !GRANULARITY.contains(&granularity) {
        return Some("has an impossible granularity");
    }
    if entries == 0 || entries > MAX_TABLE_ENTRIES {
        return Some("has a table of an impossible size");
    }
    None
}

/// Counts the clusters of the bitmaps.
pub(super) async fn collect_clusters(
    image: &Image<'_>,
    references: &mut References,
    report: &mut CheckReport,
) -> Result<()> {
    for (table, entries) in std::mem::take(&mut references.bitmap_tables) {
        let mut clusters = Vec::new();
        let read = image.for_each_entry(table, entries, |_, raw| {
            let offset = raw & OFFSET;
            let is_wrong = raw & !(OFFSET | 1) != 0
                || !image.geometry.is_aligned(offset)
                || offset != 0 && raw & 1 != 0;
            if is_wrong {
                let text = format!("the table entry {raw:#x} is impossible");
                report.found(Finding::Bitmaps(text));
            } else if offset != 0 {
                clusters.push(offset);
            }
        });
        if read.await.is_err() {
            report.found(Finding::Unread(table));
        }
        for offset in clusters {
            let size = image.geometry.cluster_size();
            references.refer_data(image, report, offset, size, 1);
        }
    }
    Ok(())
}
