//! Overlap checks: no write goes where metadata of another kind is.
//!
//! Where metadata is, is known at all times (`refcounts::metadata`): it is never handed out, and an
//! L2 entry that points onto it is refused when its slice is loaded. What is checked here is what
//! such care cannot see, since it comes later or from tables that lie on each other: before every
//! write of data, and before every write of L1, L2 and refcount tables, the place is looked up.
//! On the short way of a write that is a look into a bitmap without a lock.
//!
//! - **OC1** A write that hits metadata of a kind that is watched, other than its own, is not made:
//!   the image is marked corrupt, the request fails.
//!
//! Which kinds are watched is the option `overlap-check`, with the names and templates of QEMU.

use super::Qcow2;
use super::geometry::TABLE_ENTRY_BYTES;
use super::layers::FILE;
use super::snapshot::Snapshot;
use super::{entry::L1Entry, snapshot::read_l1};
use blockplex_graph::{Child, Error, ErrorKind, Result};

/// A kind of metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Structure {
    /// The header cluster.
    MainHeader,
    /// The L1 table of the disk.
    ActiveL1,
    /// Its L2 tables.
    ActiveL2,
    /// Refcount blocks.
    RefcountBlock,
    /// The refcount table.
    RefcountTable,
    /// The snapshot table.
    SnapshotTable,
    /// The L1 tables of snapshots.
    InactiveL1,
    /// The L2 tables of snapshots.
    InactiveL2,
    /// The directory of bitmaps.
    BitmapDirectory,
    /// The rest: bitmaps and their tables, the header of encryption. Never handed out, and watched
    /// with every template but `none`.
    Other,
}

use Structure::{
    ActiveL1, ActiveL2, BitmapDirectory, InactiveL1, InactiveL2, MainHeader, Other, RefcountBlock,
    RefcountTable, SnapshotTable,
};

impl Structure {
    /// The kinds that have an option of their own, by its name.
    pub const NAMED: [(&str, Structure); 9] = [
        ("main-header", MainHeader),
        ("active-l1", ActiveL1),
        ("active-l2", ActiveL2),
        ("refcount-table", RefcountTable),
        ("refcount-block", RefcountBlock),
        ("snapshot-table", SnapshotTable),
        ("inactive-l1", InactiveL1),
        ("inactive-l2", InactiveL2),
        ("bitmap-directory", BitmapDirectory),
    ];

    pub(super) fn bit(self) -> u16 {
        1 << self as u16
    }

    pub(super) fn described(self) -> &'static str {
        match self {
            MainHeader => "qcow2_header",
            ActiveL1 => "active L1 table",
            ActiveL2 => "active L2 table",
            RefcountBlock => "refcount block",
            RefcountTable => "refcount table",
            SnapshotTable => "snapshot table",
            InactiveL1 => "inactive L1 table",
            InactiveL2 => "inactive L2 table",
            BitmapDirectory => "bitmap directory",
            Other => "other metadata",
        }
    }
}

/// Which kinds of metadata are watched.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct OverlapChecks(u16);

impl OverlapChecks {
    /// Template `none`: nothing.
    pub const NONE: OverlapChecks = OverlapChecks(0);
    /// Template `constant`: what costs the same whatever the image's size.
    pub const CONSTANT: OverlapChecks = OverlapChecks::NONE
        .and(MainHeader)
        .and(ActiveL1)
        .and(RefcountTable)
        .and(SnapshotTable)
        .and(BitmapDirectory)
        .and(Other);
    /// Template `cached`: what is known without reading more.
    pub const CACHED: OverlapChecks =
        OverlapChecks::CONSTANT.and(ActiveL2).and(RefcountBlock).and(InactiveL1);
    /// Template `all`: also the snapshots' L2 tables.
    pub const ALL: OverlapChecks = OverlapChecks::CACHED.and(InactiveL2);

    /// The template of this name.
    pub fn template(name: &str) -> Option<OverlapChecks> {
        match name {
            "none" => Some(Self::NONE),
            "constant" => Some(Self::CONSTANT),
            "cached" => Some(Self::CACHED),
            "all" => Some(Self::ALL),
            _ => None,
        }
    }

    const fn and(self, structure: Structure) -> OverlapChecks {
        OverlapChecks(self.0 | 1 << structure as u16)
    }

    /// The same with one kind watched or not.
    #[must_use]
    pub fn with(self, structure: Structure, watched: bool) -> OverlapChecks {
        let bit = structure.bit();
        OverlapChecks(if watched { self.0 | bit } else { self.0 & !bit })
    }

    /// Whether a kind is watched.
    pub fn contains(self, structure: Structure) -> bool {
        self.0 & structure.bit() != 0
    }

    pub(super) fn bits(self) -> u16 {
        self.0
    }
}

impl Default for OverlapChecks {
    fn default() -> OverlapChecks {
        OverlapChecks::CACHED
    }
}

impl std::fmt::Debug for OverlapChecks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let watched = Structure::NAMED.iter().filter(|(_, structure)| self.contains(*structure));
        f.debug_set().entries(watched.map(|(name, _)| name)).finish()
    }
}

impl Qcow2 {
    /// Whether data at a host offset may lie on watched metadata. Any thread; takes no lock.
    #[inline]
    pub(super) fn may_hit_metadata(&self, host: u64, length: u64) -> bool {
        self.data_edge == FILE && self.refcounts.touches_watched(host, length)
    }

    /// Refuses a write of data that would hit metadata (OC1).
    pub(super) async fn check_data_write(
        &self,
        file: &Child,
        host: u64,
        length: u64,
    ) -> Result<()> {
        if self.may_hit_metadata(host, length) {
            return self.check_write(file, (host, length), &[]).await;
        }
        Ok(())
    }

    /// Refuses a write that would hit metadata of other kinds than `own` (OC1).
    pub(super) async fn check_write(
        &self,
        file: &Child,
        (offset, length): (u64, u64),
        own: &[Structure],
    ) -> Result<()> {
        let Some(hit) = self.refcounts.find_overlap(offset, length, own) else { return Ok(()) };
        let text = format!(
            "Preventing invalid write on metadata (overlaps with {}) at {offset:#x}",
            hit.described()
        );
        self.judge(file, Err(Error::new(ErrorKind::Corrupt, text))).await
    }

    /// Learns anew which L2 tables belong to snapshots, if those are watched: when the image has
    /// been opened, and after the snapshots have changed.
    pub(super) async fn watch_inactive_tables(&self, file: &Child) -> Result<()> {
        if !self.refcounts.checks().contains(InactiveL2) {
            return Ok(());
        }
        let tables = inactive_tables(file, &self.snapshots(), &self.geometry).await?;
        self.refcounts.replace_overlay(InactiveL2, &tables);
        Ok(())
    }
}

/// The most bytes of snapshots' L1 tables that are read for their L2 tables.
const MAX_READ: u64 = 64 << 20;

/// The L2 tables of the snapshots that can be used.
pub(super) async fn inactive_tables(
    file: &Child,
    snapshots: &[Snapshot],
    geometry: &super::geometry::Geometry,
) -> Result<Vec<u64>> {
    let (mut tables, mut read) = (Vec::new(), 0);
    for snapshot in snapshots.iter().filter(|snapshot| snapshot.problem.is_none()) {
        read += u64::from(snapshot.entry.l1_size) * TABLE_ENTRY_BYTES;
        if read > MAX_READ {
            let text = format!(
                "overlap-check.inactive-l2: the snapshots' L1 tables exceed {MAX_READ} bytes"
            );
            return Err(Error::new(ErrorKind::LimitExceeded, text));
        }
        let words = read_l1(file, &snapshot.entry).await?;
        tables.extend(words.into_iter().filter_map(|raw| match L1Entry::decode(raw, geometry) {
            Ok(L1Entry::Table { host, .. }) if host < file.length() => Some(host),
            _ => None,
        }));
    }
    Ok(tables)
}
