//! The snapshot table, as a check sees it.
//!
//! What the peer repairs is repaired: entries past the limit go, extra data past its limit goes,
//! and an entry that lacks what version 3 wants gets it.

use super::image::Image;
use super::references::{References, clusters_of};
use super::report::{CheckReport, Finding};
use crate::qcow2::extension::{be32, be64};
use crate::qcow2::header::MAX_SNAPSHOTS;
use blockplex_graph::Result;

/// The fixed fields of an entry.
const FIXED: u64 = 40;
/// The field of the length of the extra data.
const EXTRA_AT: usize = 36;
/// The most bytes of the extra data of an entry.
const MAX_EXTRA: u32 = 1024;
/// The extra data that version 3 wants: the size of the VM state and of the disk.
const NEEDED_EXTRA: u32 = 16;
/// The most bytes of the table.
const MAX_TABLE: u64 = 1024 * MAX_SNAPSHOTS as u64;
/// Bytes that are read at once.
const WINDOW: u64 = 256 << 10;

/// What is known of the table.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Table {
    /// The entries that are to stay.
    pub(super) count: u32,
    /// They have to be written anew.
    pub(super) is_to_be_written: bool,
}

/// An entry: where it is, and how it is laid out.
struct Entry {
    fixed: Vec<u8>,
    extra: u32,
    identifier: u64,
    name: u64,
    /// The end of its last byte, without padding.
    end: u64,
}

/// A part of the file that is at hand.
#[derive(Default)]
struct Window {
    start: u64,
    bytes: Vec<u8>,
}

impl Window {
    async fn get(&mut self, image: &Image<'_>, at: u64, length: u64) -> Result<Vec<u8>> {
        let end = self.start + self.bytes.len() as u64;
        if at < self.start || at + length > end {
            self.bytes = image.read(at, WINDOW.max(length)).await?;
            self.start = at;
        }
        let from = (at - self.start) as usize;
        Ok(self.bytes.get(from..from + length as usize).unwrap_or_default().to_vec())
    }

    /// The entry at `at`; `None` when it does not end in the file.
    async fn entry(&mut self, image: &Image<'_>, at: u64) -> Result<Option<Entry>> {
        if at + FIXED > image.length {
            return Ok(None);
        }
        let fixed = self.get(image, at, FIXED).await?;
        let lengths = be32(&fixed, 12).unwrap_or(0);
        let (identifier, name) = (u64::from(lengths >> 16), u64::from(lengths & 0xffff));
        let extra = be32(&fixed, EXTRA_AT).unwrap_or(0);
        let end = at + FIXED + u64::from(extra) + identifier + name;
        Ok((end <= image.length).then_some(Entry { fixed, extra, identifier, name, end }))
    }
}

impl Entry {
    /// As the peer shows it: identifier and name.
    async fn shown_name(&self, image: &Image<'_>, window: &mut Window) -> Result<String> {
        let start = self.end - self.identifier - self.name;
        let bytes = window.get(image, start, self.identifier + self.name).await?;
        let (identifier, name) =
            bytes.split_at_checked(self.identifier as usize).unwrap_or_default();
        Ok(format!("{} ({})", identifier.escape_ascii(), name.escape_ascii()))
    }
}

/// Counts the snapshot table, and what its entries lead to.
pub(super) async fn collect(
    image: &Image<'_>,
    references: &mut References,
    report: &mut CheckReport,
) -> Result<()> {
    let (claimed, offset) = (image.header.snapshot_count, image.header.snapshots_offset);
    if claimed == 0 {
        return Ok(());
    }
    if image.has_data_file() {
        report.found(Finding::SnapshotsWithDataFile(claimed));
    }
    let mut table = Table { count: claimed.min(MAX_SNAPSHOTS), is_to_be_written: false };
    if !image.geometry.is_aligned(offset) || offset == 0 {
        let text = format!("its offset {offset:#x} is not a cluster of the file");
        report.found(Finding::SnapshotTable(text));
        return Ok(());
    }
    let mut window = Window::default();
    let mut at = offset;
    for index in 0..table.count {
        let Some(entry) = window.entry(image, at).await? else {
            let text = format!("entry {index} reaches past the end of the file");
            report.found(Finding::SnapshotTable(text));
            return Ok(());
        };
        if entry.end - offset > MAX_TABLE {
            table.count = index;
            break;
        }
        if entry.extra > MAX_EXTRA {
            report.found(Finding::SnapshotExtra { index, bytes: entry.extra });
            table.is_to_be_written = true;
        } else if entry.extra < NEEDED_EXTRA && !image.is_version_2() {
            report.found(Finding::SnapshotIncomplete(index));
            table.is_to_be_written = true;
        }
        add_l1_table(image, references, report, &entry, &mut window).await?;
        at = entry.end;
        // Every entry begins at a multiple of 8.
        at = at.next_multiple_of(8);
    }
    if table.count < claimed {
        report.found(Finding::SnapshotsOverhanging(claimed - table.count));
        table.is_to_be_written = true;
    }
    references.snapshots = table;
    if references.claim(image, report, "snapshot table", offset, at - offset) {
        references.snapshot_table = clusters_of(image, offset, at - offset);
    }
    Ok(())
}

async fn add_l1_table(
    image: &Image<'_>,
    references: &mut References,
    report: &mut CheckReport,
    entry: &Entry,
    window: &mut Window,
) -> Result<()> {
    let offset = be64(&entry.fixed, 0).unwrap_or(0);
    let entries = be32(&entry.fixed, 8).unwrap_or(0);
    if !image.geometry.is_aligned(offset) {
        let name = entry.shown_name(image, window).await?;
        report.found(Finding::SnapshotL1Unaligned { name, offset });
        return Ok(());
    }
    if u64::from(entries) > image.geometry.max_l1_entries() {
        let name = entry.shown_name(image, window).await?;
        report.found(Finding::SnapshotL1Large { name, entries });
        return Ok(());
    }
    references.add_l1_table(image, report, offset, entries.into(), false).await
}

/// The table as it should be: as many entries as `table` says, each within the limits.
pub(super) async fn rewritten(image: &Image<'_>, table: Table) -> Result<Vec<u8>> {
    let mut window = Window::default();
    let mut at = image.header.snapshots_offset;
    let mut bytes = Vec::new();
    for _ in 0..table.count {
        let Some(entry) = window.entry(image, at).await? else { break };
        let extra_at = at + FIXED;
        let mut extra = window.get(image, extra_at, entry.extra.min(MAX_EXTRA).into()).await?;
        if !image.is_version_2() && extra.len() < NEEDED_EXTRA as usize {
            complete(image, &entry.fixed, &mut extra);
        }
        let names = entry.identifier + entry.name;
        let names = window.get(image, entry.end - names, names).await?;
        bytes.extend(entry.fixed.iter().take(EXTRA_AT));
        bytes.extend((extra.len() as u32).to_be_bytes());
        bytes.extend(extra);
        bytes.extend(names);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        at = entry.end.next_multiple_of(8);
    }
    Ok(bytes)
}

/// What an entry means that says nothing of its sizes: that of the VM state stands in the fixed
/// fields, the disk has the size that it has now.
fn complete(image: &Image<'_>, fixed: &[u8], extra: &mut Vec<u8>) {
    if extra.len() < 8 {
        let state = u64::from(be32(fixed, 32).unwrap_or(0));
        *extra = state.to_be_bytes().to_vec();
    }
    extra.truncate(8);
    extra.extend(image.header.size.to_be_bytes());
}
