//! What a check says: findings, one by one, and the numbers.

use blockplex_graph::Error;
use std::fmt;

/// The most findings that are kept word for word; more are only counted.
const MAX_FINDINGS: usize = 100_000;

/// One thing that is not as it should be. Displayed, it is the line that the peer prints where it
/// has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::qcow2) enum Finding {
    ReservedL1(u64),
    CopiedNothing { table: &'static str, raw: u64 },
    UnalignedTable(u64),
    SharedTable { offset: u64, uses: u64 },
    PastEnd { offset: u64, size: u64 },
    CutTable(u64),
    Unread(u64),
    Overflow(u64),
    ReservedL2(u64),
    ZeroFlag(u64),
    CompressedCopied(u64),
    CompressedWithDataFile { index: u64, raw: u64 },
    CompressedWithBitmap { index: u64, raw: u64 },
    BadBitmap(u64),
    UnallocatedBitmap,
    UnalignedCluster { offset: u64, preallocated: bool },
    WrongDataOffset { offset: u64, guest: u64 },
    SnapshotsWithDataFile(u32),
    SnapshotL1Unaligned { name: String, offset: u64 },
    SnapshotL1Large { name: String, entries: u32 },
    SnapshotExtra { index: u32, bytes: u32 },
    SnapshotIncomplete(u32),
    SnapshotsOverhanging(u32),
    SnapshotTable(String),
    Bitmaps(String),
    RefcountTable(String),
    BlockReserved(u64),
    BlockUnaligned(u64),
    BlockOutside(u64),
    BlockRefcount { index: u64, refcount: u64 },
    Overlap { what: &'static str, offset: u64 },
    Cluster { cluster: u64, refcount: u64, reference: u64 },
    CopiedTable { index: u64, raw: u64, refcount: u64 },
    CopiedData { raw: u64, refcount: u64 },
}

/// What follows from a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) enum Weight {
    /// Unused clusters.
    Leak,
    /// Wrong, and it is known what would be right.
    Repairable,
    /// Wrong, and only a new refcount structure helps.
    Rebuild,
    /// Wrong, and what would be right is not in the image.
    Final,
}

impl Finding {
    /// Whether leaks can be repaired all the same, though this needs a new refcount structure: no
    /// block that is there is wrong.
    fn is_apart_from_leaks(&self) -> bool {
        matches!(
            self,
            Finding::BlockOutside(_)
                | Finding::SnapshotExtra { .. }
                | Finding::SnapshotIncomplete(_)
        )
    }

    pub(in crate::qcow2) fn weight(&self) -> Weight {
        match self {
            Finding::Cluster { refcount, reference, .. } if refcount > reference => Weight::Leak,
            Finding::Cluster { refcount: 0, .. }
            | Finding::RefcountTable(_)
            | Finding::BlockReserved(_)
            | Finding::BlockUnaligned(_)
            | Finding::BlockOutside(_)
            | Finding::BlockRefcount { .. }
            | Finding::SnapshotExtra { .. }
            | Finding::SnapshotIncomplete(_)
            | Finding::SnapshotsOverhanging(_) => Weight::Rebuild,
            Finding::Cluster { .. }
            | Finding::CopiedTable { .. }
            | Finding::CopiedData { .. }
            | Finding::UnalignedCluster { preallocated: true, .. } => Weight::Repairable,
            _ => Weight::Final,
        }
    }
}

/// A line of a report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckMessage {
    content: Content,
    /// Whether it says what was repaired, not what was found.
    pub repaired: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Content {
    Finding(Finding),
    Note(String),
}

impl fmt::Display for CheckMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.content {
            Content::Finding(finding) => finding.write(self.repaired, f),
            Content::Note(text) => f.write_str(text),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(false, f)
    }
}

impl Finding {
    fn write(&self, repaired: bool, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = match self.weight() {
            _ if repaired => "Repairing",
            Weight::Leak => "Leaked",
            _ => "ERROR",
        };
        match self {
            Finding::SnapshotsWithDataFile(_)
            | Finding::SnapshotL1Unaligned { .. }
            | Finding::SnapshotL1Large { .. }
            | Finding::SnapshotExtra { .. }
            | Finding::SnapshotIncomplete(_)
            | Finding::SnapshotsOverhanging(_)
            | Finding::SnapshotTable(_)
            | Finding::Bitmaps(_) => self.write_part(verb, f),
            Finding::RefcountTable(text) => write!(f, "{verb} {text}"),
            Finding::BlockReserved(index) => {
                write!(f, "{verb} refcount table entry {index} has reserved bits set")
            }
            Finding::BlockUnaligned(index) => write!(
                f,
                "{verb} refcount block {index} is not cluster aligned; refcount table entry \
                 corrupted"
            ),
            Finding::BlockOutside(index) => {
                write!(f, "{verb} refcount block {index} is outside image")
            }
            Finding::BlockRefcount { index, refcount } => {
                write!(f, "{verb} refcount block {index} refcount={refcount}")
            }
            Finding::Cluster { cluster, refcount, reference } => {
                write!(f, "{verb} cluster {cluster} refcount={refcount} reference={reference}")
            }
            Finding::CopiedTable { index, raw, refcount } => write!(
                f,
                "{verb} OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={raw:x} \
                 refcount={refcount}"
            ),
            Finding::CopiedData { raw, refcount } => {
                write!(f, "{verb} OFLAG_COPIED data cluster: l2_entry={raw:x} refcount={refcount}")
            }
            _ => self.write_mapping(verb, f),
        }
    }

    /// What is wrong with snapshots and bitmaps.
    fn write_part(&self, verb: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Finding::SnapshotsWithDataFile(count) => {
                write!(f, "{verb} {count} snapshots in image with data file")
            }
            Finding::SnapshotL1Unaligned { name, offset } => write!(
                f,
                "{verb} snapshot {name} l1_offset={offset:#x}: L1 table is not cluster aligned; \
                 snapshot table entry corrupted"
            ),
            Finding::SnapshotL1Large { name, entries } => write!(
                f,
                "{verb} snapshot {name} l1_size={entries:#x}: L1 table is too large; snapshot \
                 table entry corrupted"
            ),
            Finding::SnapshotExtra { index, bytes } if verb == "Repairing" => write!(
                f,
                "Discarding too much extra metadata in snapshot table entry {index} ({bytes} > \
                 1024)"
            ),
            Finding::SnapshotExtra { index, .. } => {
                write!(f, "{verb} Too much extra metadata in snapshot table entry {index}")
            }
            Finding::SnapshotIncomplete(index) => {
                write!(f, "{verb} snapshot table entry {index} is incomplete")
            }
            Finding::SnapshotsOverhanging(count) if verb == "Repairing" => {
                write!(f, "Discarding {count} overhanging snapshots")
            }
            Finding::SnapshotsOverhanging(_) => write!(f, "{verb} snapshot table too large"),
            Finding::SnapshotTable(text) => {
                write!(f, "{verb} failed to read the snapshot table: {text}")
            }
            Finding::Bitmaps(text) => write!(f, "{verb} bitmaps: {text}"),
            _ => Ok(()),
        }
    }

    /// What is wrong with the tables that map the disk.
    fn write_mapping(&self, verb: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Finding::ReservedL1(raw) => {
                write!(f, "{verb} found L1 entry with reserved bits set: {raw:x}")
            }
            Finding::CopiedNothing { table, raw } => {
                write!(f, "{verb} {table} entry {raw:x} has the COPIED flag but no cluster")
            }
            Finding::UnalignedTable(offset) => write!(
                f,
                "{verb} l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted"
            ),
            Finding::SharedTable { offset, uses } => {
                write!(f, "{verb} l2_offset={offset:x}: {uses} L1 entries have this one table")
            }
            Finding::PastEnd { offset, size } => write!(
                f,
                "{verb}: counting reference for region exceeding the end of the file by one \
                 cluster or more: offset {offset:#x} size {size:#x}"
            ),
            Finding::CutTable(offset) => {
                write!(f, "{verb} l2_offset={offset:x}: the file ends within the table")
            }
            Finding::Unread(offset) => write!(f, "{verb}: the table at {offset:#x} cannot be read"),
            Finding::Overflow(offset) => write!(
                f,
                "{verb}: overflow cluster offset={offset:#x}\nUse qemu-img amend to increase the \
                 refcount entry width or qemu-img convert to create a clean copy if the image \
                 cannot be opened for writing"
            ),
            Finding::ReservedL2(raw) => {
                write!(f, "{verb} found l2 entry with reserved bits set: {raw:x}")
            }
            Finding::ZeroFlag(raw) => {
                write!(f, "{verb} l2 entry {raw:x} has a zero flag, which this image cannot have")
            }
            Finding::CompressedCopied(offset) => write!(
                f,
                "{verb}: coffset={offset:#x}: copied flag must never be set for compressed clusters"
            ),
            Finding::CompressedWithDataFile { index, raw } => {
                write!(f, "{verb} compressed cluster {index} with data file, entry={raw:#x}")
            }
            Finding::CompressedWithBitmap { index, raw } => write!(
                f,
                "{verb} compressed cluster {index} with non-zero subcluster allocation bitmap, \
                 entry={raw:#x}"
            ),
            Finding::BadBitmap(offset) => write!(
                f,
                "{verb} offset={offset:x}: Allocated cluster has corrupted subcluster allocation \
                 bitmap"
            ),
            Finding::UnallocatedBitmap => {
                write!(f, "{verb}: Unallocated cluster has non-zero subcluster allocation map")
            }
            Finding::UnalignedCluster { offset, preallocated } => {
                let kind = if *preallocated { "Preallocated" } else { "Data" };
                write!(
                    f,
                    "{verb} offset={offset:x}: {kind} cluster is not properly aligned; L2 entry \
                     corrupted."
                )
            }
            Finding::WrongDataOffset { offset, guest } => write!(
                f,
                "{verb} offset={offset:x}: the cluster has another place in the data file than \
                 the {guest:x} of the disk"
            ),
            Finding::Overlap { what, offset } => {
                write!(f, "{verb} the {what} at offset {offset:#x} is used for something else, too")
            }
            _ => Ok(()),
        }
    }
}

/// What a check found, under the names of the peer's report.
#[derive(Clone, Debug, Default)]
pub struct CheckReport {
    /// Damage that is still there.
    pub corruptions: u64,
    /// Clusters that are marked as used and that nobody uses, and that still are.
    pub leaks: u64,
    /// Damage that was repaired.
    pub corruptions_fixed: u64,
    /// Unused clusters that are free now.
    pub leaks_fixed: u64,
    /// What could not be looked at.
    pub check_errors: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Those that have a place in the file.
    pub allocated_clusters: u64,
    /// Those of them that do not follow the one before.
    pub fragmented_clusters: u64,
    /// Those of them that are compressed.
    pub compressed_clusters: u64,
    /// The end of the last cluster in use, in bytes.
    pub image_end_offset: u64,
    /// One line for everything that was found or repaired, and where it ends, why.
    pub messages: Vec<CheckMessage>,
    /// How many lines there would be beside those.
    pub messages_left_out: u64,
    /// Why the check, or the repair that was asked for, did not come to its end.
    pub failure: Option<Error>,
    /// Some damage needs a new refcount structure.
    pub(super) needs_rebuild: bool,
    /// And before that, no leak can be repaired.
    pub(super) leaks_need_rebuild: bool,
    /// Some damage cannot be repaired.
    pub(super) is_beyond_repair: bool,
}

impl CheckReport {
    /// Nothing is wrong now.
    pub fn is_clean(&self) -> bool {
        self.failure.is_none() && self.corruptions + self.leaks + self.check_errors == 0
    }

    /// How `qemu-img check` exits on it: 0 clean, 1 the check did not succeed, 2 corrupt, 3 only
    /// leaks.
    pub fn exit_code(&self) -> u8 {
        match self {
            _ if self.failure.is_some() || self.check_errors > 0 => 1,
            _ if self.corruptions > 0 => 2,
            _ if self.leaks > 0 => 3,
            _ => 0,
        }
    }

    pub(super) fn note(&mut self, text: impl Into<String>) {
        self.push(Content::Note(text.into()), false);
    }

    /// Counts a finding and keeps it.
    pub(super) fn found(&mut self, finding: Finding) {
        match finding.weight() {
            Weight::Leak => self.leaks += 1,
            Weight::Repairable => self.corruptions += 1,
            Weight::Rebuild => {
                self.corruptions += 1;
                self.needs_rebuild = true;
                self.leaks_need_rebuild |= !finding.is_apart_from_leaks();
            }
            Weight::Final => {
                self.corruptions += 1;
                self.is_beyond_repair = true;
            }
        }
        if matches!(finding, Finding::Unread(_)) {
            self.check_errors += 1;
        }
        self.push(Content::Finding(finding), false);
    }

    /// Counts a finding and keeps it, as something that is being put right if `repairs`.
    pub(super) fn found_and_repaired(&mut self, finding: Finding, repairs: bool) {
        self.corruptions += 1;
        self.push(Content::Finding(finding), repairs);
    }

    /// Says of all findings so far that `which` picks that they were repaired.
    pub(super) fn say_repaired(&mut self, which: impl Fn(&Finding) -> bool) {
        let found: Vec<Finding> = self.findings().filter(|f| which(f)).cloned().collect();
        for finding in found {
            self.push(Content::Finding(finding), true);
        }
    }

    /// What was found, as far as it was kept.
    pub(super) fn findings(&self) -> impl Iterator<Item = &Finding> {
        self.messages.iter().filter_map(|message| match &message.content {
            Content::Finding(finding) if !message.repaired => Some(finding),
            _ => None,
        })
    }

    /// All leaks are gone.
    pub(super) fn leaks_are_fixed(&mut self) {
        self.leaks_fixed += std::mem::take(&mut self.leaks);
    }

    /// All damage is gone.
    pub(super) fn corruptions_are_fixed(&mut self) {
        self.corruptions_fixed += std::mem::take(&mut self.corruptions);
    }

    fn push(&mut self, content: Content, repaired: bool) {
        if self.messages.len() < MAX_FINDINGS {
            self.messages.push(CheckMessage { content, repaired });
        } else {
            self.messages_left_out += 1;
        }
    }
}
