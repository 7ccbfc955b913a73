//! The snapshot table in the file: reading it at open, and replacing it.

use super::Snapshot;
use crate::qcow2::Qcow2;
use crate::qcow2::discard::DiscardReason;
use crate::qcow2::format_error::{FormatError, Place};
use crate::qcow2::geometry::{Geometry, TABLE_ENTRY_BYTES};
use crate::qcow2::header::Header;
use crate::qcow2::header_update::Switch;
use crate::qcow2::layers::Layers;
use crate::qcow2::limbo::Freed;
use crate::qcow2::overlap::Structure;
use crate::qcow2::refcounts::{HostRun, Refcounts};
use crate::qcow2::snapshot_table::{MAX_SNAPSHOT_TABLE_BYTES, Parsed, SnapshotEntry};
use blockplex_graph::{Child, Error, ErrorKind, RequestFlags, Result};
use blockplex_io::buffer::{IoBuffer, IoVector};

/// Bytes of the table that are read at once.
const PIECE: u64 = 256 << 10;
/// The header fields of the table: count and offset.
const COUNT_OFFSET: u64 = 60;
/// Clusters of snapshots' L1 tables that are remembered as metadata, at most.
const MAX_REMEMBERED: u64 = 1 << 20;

/// The table as it stands in the file.
pub(in crate::qcow2) struct Table {
    pub(in crate::qcow2) entries: Vec<SnapshotEntry>,
    /// Its bytes.
    pub(in crate::qcow2) bytes: u64,
}

/// Reads the table that the header names, which the header's rules have placed in the file
/// (S03, S04, S07, S08). Reads no more of the file than the table has, rounded up to pieces.
pub(in crate::qcow2) async fn read(
    file: &Child,
    header: &Header,
    file_length: u64,
) -> Result<Table> {
    let mut entries = Vec::new();
    let (mut buffer, mut used) = (Vec::new(), 0_usize);
    let mut read_to = header.snapshots_offset;
    let mut bytes = 0;
    while (entries.len() as u32) < header.snapshot_count {
        let number = entries.len() as u32;
        match SnapshotEntry::parse(buffer.get(used..).unwrap_or_default(), number)? {
            Parsed::Entry(entry, length) => {
                entries.push(entry);
                used += length;
                bytes += length as u64;
            }
            Parsed::Needs(length) => {
                let have = (buffer.len() - used) as u64;
                let end = bytes + length as u64;
                if end > MAX_SNAPSHOT_TABLE_BYTES {
                    let rule = format!("exceeds {MAX_SNAPSHOT_TABLE_BYTES} bytes");
                    return Err(FormatError::number(
                        "snapshot table of",
                        end,
                        Place::Elsewhere,
                        rule,
                    )
                    .into());
                }
                // The padding of the last entry may be missing.
                let missing = (length as u64 - have).saturating_sub(7).max(1);
                if file_length.saturating_sub(read_to) < missing {
                    let rule = format!("reaches past the end of the file at {file_length:#x}");
                    let number = number.into();
                    return Err(FormatError::number(
                        "snapshot table entry",
                        number,
                        Place::Elsewhere,
                        rule,
                    )
                    .into());
                }
                buffer.drain(..used);
                used = 0;
                let piece = PIECE.max(length as u64 - have).min(file_length - read_to);
                let memory = IoVector::zeroed(piece as usize);
                file.read(read_to, memory.clone()).await?;
                buffer.extend(memory.to_vec());
                read_to += piece;
                if read_to == file_length {
                    // Padding that the file does not have.
                    buffer.resize(buffer.len() + 8, 0);
                }
            }
        }
    }
    Ok(Table { entries, bytes })
}

/// Judges what the entries say, and tells the refcounts where the table and the snapshots' L1
/// tables are. An entry that cannot be used is kept all the same: it does not stand in the way of
/// anything else (S01, S02, S05, S06).
pub(in crate::qcow2) fn admit(
    table: Table,
    header: &Header,
    refcounts: &Refcounts,
    file_length: u64,
) -> Vec<Snapshot> {
    let geometry = header.geometry();
    if !table.entries.is_empty() {
        refcounts.add_metadata(Structure::SnapshotTable, header.snapshots_offset, table.bytes);
    }
    let mut remembered = 0;
    let mut judge = |entry: &SnapshotEntry| {
        if let Some(problem) = problem_of(entry, &geometry, file_length) {
            return Some(Error::new(ErrorKind::InvalidArgument, problem));
        }
        let clusters = geometry.clusters_for(u64::from(entry.l1_size) * TABLE_ENTRY_BYTES);
        remembered += clusters;
        let corrupt = |text: String| Some(Error::new(ErrorKind::Corrupt, text));
        let start = entry.l1_table_offset;
        if remembered > MAX_REMEMBERED {
            remembered -= clusters;
            return corrupt(format!("more than {MAX_REMEMBERED} clusters of L1 tables"));
        }
        for cluster in 0..clusters {
            let offset = start + (cluster << geometry.cluster_bits());
            if !refcounts.add_metadata_cluster(Structure::InactiveL1, offset) {
                // Whoever writes the one would write the other.
                refcounts.overlay_metadata(Structure::InactiveL1, offset);
                return corrupt(format!("its L1 table at {start:#x} lies on other metadata"));
            }
        }
        None
    };
    let snapshot = |entry: SnapshotEntry| {
        let problem = judge(&entry);
        Snapshot { entry, problem }
    };
    table.entries.into_iter().map(snapshot).collect()
}

/// Why a snapshot cannot be used, as far as its entry alone says so.
fn problem_of(entry: &SnapshotEntry, geometry: &Geometry, file_length: u64) -> Option<String> {
    let (offset, entries) = (entry.l1_table_offset, u64::from(entry.l1_size));
    if entries > geometry.max_l1_entries() {
        let most = geometry.max_l1_entries();
        return Some(format!("its L1 table of {entries} entries exceeds {most}"));
    }
    if entries > 0 && (offset == 0 || !geometry.is_aligned(offset)) {
        return Some(format!("its L1 table offset {offset:#x} is no cluster of the file"));
    }
    let end = offset.checked_add(entries * TABLE_ENTRY_BYTES);
    if end.is_none_or(|end| end > file_length) {
        return Some(format!("its L1 table at {offset:#x} reaches past the end of the file"));
    }
    if entry.disk_size.is_some_and(|size| size > geometry.max_guest_size()) {
        let most = geometry.max_guest_size();
        return Some(format!("its disk of {:?} bytes exceeds {most}", entry.disk_size));
    }
    None
}

/// A new table that is in the file and that the header does not name yet.
pub(super) struct NewTable {
    place: Option<HostRun>,
    count: u32,
}

impl Qcow2 {
    /// Writes a table of `entries` to a new place. Nothing of it is durable yet.
    pub(super) async fn write_snapshot_table(
        &self,
        layers: &Layers,
        entries: &[SnapshotEntry],
    ) -> Result<NewTable> {
        let mut bytes = Vec::new();
        for entry in entries {
            entry.write(self.disk_size(), &mut bytes);
        }
        if bytes.len() as u64 > MAX_SNAPSHOT_TABLE_BYTES {
            let text = format!("a snapshot table of more than {MAX_SNAPSHOT_TABLE_BYTES} bytes");
            return Err(Error::new(ErrorKind::LimitExceeded, text));
        }
        // At most 65536, as was checked before one was added.
        let count = entries.len() as u32;
        if entries.is_empty() {
            return Ok(NewTable { place: None, count });
        }
        let place = self.write_new_metadata(layers, Structure::SnapshotTable, bytes).await?;
        Ok(NewTable { place: Some(place), count })
    }

    /// Writes metadata to clusters of its own, padded with zeros. Nothing of it is durable yet.
    pub(in crate::qcow2) async fn write_new_metadata(
        &self,
        layers: &Layers,
        structure: Structure,
        mut bytes: Vec<u8>,
    ) -> Result<HostRun> {
        let length = bytes.len() as u64;
        let clusters = self.geometry.clusters_for(length).max(1);
        let allocated = self.refcounts.allocate_row(&layers.file, clusters).await;
        let run = self.judge(&layers.file, allocated).await?;
        bytes.resize((clusters << self.geometry.cluster_bits()) as usize, 0);
        let buffer = IoBuffer::from_slice(&bytes);
        match layers.file.write(run.offset, buffer, RequestFlags::default()).await {
            Ok(()) => {
                self.refcounts.add_metadata(structure, run.offset, bytes.len() as u64);
                self.refcounts.note_short_end(run.offset + length);
                Ok(run)
            }
            Err(error) => Err(self.abandon(layers, run, error).await),
        }
    }

    /// Gives back a table that the header was never told of.
    pub(super) async fn abandon_table(
        &self,
        layers: &Layers,
        table: NewTable,
        error: Error,
    ) -> Error {
        match table.place {
            Some(run) => self.abandon(layers, run, error).await,
            None => error,
        }
    }

    /// Makes the header name a table that is durable, in one write; the old one is freed. Gives the
    /// new one back when the header does not name it.
    pub(super) async fn switch_snapshot_table(
        &self,
        layers: &Layers,
        table: NewTable,
        snapshots: Vec<Snapshot>,
    ) -> Result<(), (Error, Switch)> {
        let fields = |count: u32, offset: u64| {
            let mut bytes = count.to_be_bytes().to_vec();
            bytes.extend(offset.to_be_bytes());
            bytes
        };
        let offset = table.place.map_or(0, |run| run.offset);
        let mut header = self.header.lock().await;
        let old = header.snapshots_offset;
        let before = fields(header.snapshot_count, old);
        let after = fields(table.count, offset);
        match self.switch_header(&layers.file, COUNT_OFFSET, &before, &after).await {
            Ok(()) => {}
            Err((error, Switch::NotMade)) => {
                drop(header);
                let error = self.abandon_table(layers, table, error).await;
                return Err((error, Switch::NotMade));
            }
            in_doubt => return in_doubt,
        }
        (header.snapshot_count, header.snapshots_offset) = (table.count, offset);
        drop(header);
        let clusters = table.place.map_or(0, |run| run.clusters);
        let old_clusters = {
            let mut state = self.snapshots.lock();
            state.list = snapshots;
            std::mem::replace(&mut state.table_clusters, clusters)
        };
        if old_clusters > 0 {
            self.free(Freed {
                offset: old,
                clusters: old_clusters,
                discard: self.passes_discard(DiscardReason::Other),
            });
        }
        Ok(())
    }
}
