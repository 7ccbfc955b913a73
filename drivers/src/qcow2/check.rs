//! Checking an image, and repairing it: on its file, not on an open image, as many images that need
//! it cannot be opened.
//!
//! ```text
//!   references ──► who refers to which cluster ─┐
//!                                               ├─► compare ──► copied ──► report
//!   refcount structure ──► what is counted ─────┘                 │
//!                                       repair: raise ► flags ► lower ► header
//! ```
//!
//! The verdict is that of the peer, or harsher: what this crate's driver refuses to read is never
//! called clean. A repair happens as a whole or not at all, and finds nothing to do the second time:
//!
//! - **K1** Damage that leaves open what would be right (a pointer outside of the file, reserved
//!   bits, two structures in one place, an unreadable table) ends a repair before anything is
//!   written: while it is not known what is used, nothing can be given free.
//! - **K2** Refcounts are raised before anything else changes, and lowered, durably, after that; so
//!   a crash leaves leaks at worst, and flags that the next repair finds.
//! - **K3** A refcount structure that has gaps is not mended but made anew elsewhere, and takes the
//!   place of the old one by one write (see `rebuild`).
//! - **K4** Memory and time follow what is in the file, not what is claimed: no table is followed
//!   that lies outside of it or on top of another.
//! - **K5** The dirty and corrupt bits go last, and only from an image without damage.
//!
//! Not repaired, though the peer tries: a refcount block past the end of the file by making the
//! file so long (the structure is made anew), tables of snapshots that lie on each other.

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

mod bitmaps;
mod cluster;
mod compare;
mod copied;
pub(in crate::qcow2) mod counters;
pub(in crate::qcow2) mod image;
pub(in crate::qcow2) mod rebuild;
pub(in crate::qcow2) mod references;
mod repair;
mod report;
mod snapshots;

pub use report::{CheckMessage, CheckReport};

use super::geometry::Geometry;
use super::header::feature;
use blockplex_graph::{Child, Error, ErrorKind, Result};
use compare::Counted;
use copied::{Against, Pass};
use image::Image;
use rebuild::{HeaderChange, change_header};
use references::References;
use report::Finding;

/// What is to be repaired.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fix {
    /// Nothing; the file need not be writable.
    #[default]
    None,
    /// Only leaks: clusters that nobody uses become free.
    Leaks,
    /// Everything that can be.
    All,
}

/// How to check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckOptions {
    /// What is to be repaired.
    pub fix: Fix,
}

/// Checks the image in `file`, which no node has open as an image, and repairs what `options` say.
/// On a loop; a repair needs write and resize permission. A repaired image should be checked once
/// more, as the peer does: the numbers of the report are those before the repair.
///
/// An external data file is not needed for it: what is checked of it stands in the image.
///
/// # Errors
///
/// The header does not make sense or asks for unknown features, or the file fails. What goes wrong
/// once the check is under way stands in [`CheckReport::failure`].
pub async fn check(file: &Child, options: CheckOptions) -> Result<CheckReport> {
    let mut image = Image::open(file).await?;
    let forgotten = options.fix != Fix::None && image.forget_unknown_features();
    let mut report = CheckReport {
        total_clusters: image.geometry.clusters_for(image.header.size),
        ..CheckReport::default()
    };
    let mut work = Work::begin(&image, &mut report).await?;
    let fix = plan(options.fix, &mut report);
    if fix != Fix::None && forgotten {
        image.clear_unknown_features().await?;
    }
    let result = match fix {
        Fix::None if report.failure.is_some() => Ok(()),
        Fix::None => work.pass(Against::Refcounts).run(&mut report, false).await,
        Fix::Leaks => work.fix_leaks(&mut report).await,
        Fix::All => work.fix_all(&mut report).await,
    };
    if let Err(error) = result {
        report.failure = Some(error);
    }
    Ok(report)
}

/// What can be repaired of what should be (K1).
fn plan(wanted: Fix, report: &mut CheckReport) -> Fix {
    if wanted == Fix::None {
        return Fix::None;
    }
    if report.is_beyond_repair {
        report.note("Nothing is repaired: what some of the damaged entries meant is not known");
        return Fix::None;
    }
    if wanted == Fix::Leaks && report.leaks_need_rebuild {
        report.note("ERROR need to rebuild refcount structures");
        let text = "the refcount structure must be rebuilt, which fixing leaks does not do";
        report.failure = Some(Error::new(ErrorKind::Io, text));
        return Fix::None;
    }
    wanted
}

/// An image whose references and refcounts are known, and what can be done with it.
pub(in crate::qcow2) struct Work<'a> {
    pub(in crate::qcow2) image: &'a Image<'a>,
    pub(in crate::qcow2) references: References,
    counted: Counted,
}

impl<'a> Work<'a> {
    async fn begin(image: &'a Image<'a>, report: &mut CheckReport) -> Result<Work<'a>> {
        let mut references = References::collect(image, report).await?;
        let counted = Counted::compare(image, &mut references, report).await?;
        Ok(Work { image, references, counted })
    }

    /// The same of an image that has no damage, leaks aside.
    ///
    /// # Errors
    ///
    /// `Corrupt`: it has, and is not changed before it was repaired.
    pub(in crate::qcow2) async fn of_sound(image: &'a Image<'a>) -> Result<Work<'a>> {
        let mut report = CheckReport::default();
        let work = Work::begin(image, &mut report).await?;
        // An entry of a snapshot that is only short is no damage of what is to be changed.
        let damage = report.findings().find(|finding| !is_leak(finding) && !is_short(finding));
        match damage {
            None => Ok(work),
            Some(finding) => {
                let text = format!("the image must be repaired first: {finding}");
                Err(Error::new(ErrorKind::Corrupt, text))
            }
        }
    }

    fn pass(&self, against: Against) -> Pass<'_> {
        let Work { image, references, counted } = self;
        Pass { image, references, counted, against }
    }

    async fn fix_leaks(&mut self, report: &mut CheckReport) -> Result<()> {
        if report.leaks > 0 {
            repair::lower(self.image, &self.counted, &self.references.counters).await?;
            report.say_repaired(is_leak);
            report.leaks_are_fixed();
        }
        // With right refcounts it is known what the flags are to be, as in the peer.
        let repairs = report.corruptions == 0;
        self.pass(Against::RefcountsWithoutLeaks).run(report, repairs).await?;
        if repairs {
            report.corruptions_are_fixed();
        }
        if report.corruptions > 0 {
            return Ok(());
        }
        self.settle(HeaderChange::default()).await
    }

    /// K2, K3.
    async fn fix_all(&mut self, report: &mut CheckReport) -> Result<()> {
        let mut change = HeaderChange::default();
        if !report.needs_rebuild && report.corruptions > 0 {
            repair::raise(self.image, &self.counted, &self.references.counters).await?;
        }
        if !report.needs_rebuild {
            report.say_repaired(|finding| matches!(finding, Finding::Cluster { .. }));
        }
        report.say_repaired(|finding| matches!(finding, Finding::UnalignedCluster { .. }));
        if report.needs_rebuild {
            report.note("Rebuilding refcount structure");
            // First of all, as the flags follow the references without the old structure.
            change = self.rebuild(report).await?;
            self.counted.own.sort_unstable();
            for cluster in &self.counted.own {
                report.note(format!("Repairing cluster {cluster} refcount=1 reference=0"));
            }
        }
        self.pass(Against::References).run(report, true).await?;
        self.image.file.flush().await?;
        if !report.needs_rebuild && report.leaks > 0 {
            repair::lower(self.image, &self.counted, &self.references.counters).await?;
        }
        self.settle(change).await?;
        report.leaks_are_fixed();
        report.corruptions_are_fixed();
        Ok(())
    }

    async fn rebuild(&mut self, report: &mut CheckReport) -> Result<HeaderChange> {
        let table = self.references.snapshots;
        if table.is_to_be_written {
            report.say_repaired(is_of_snapshots);
        }
        self.restructure(&self.image.geometry, table.is_to_be_written).await
    }

    /// Writes the refcount structure anew, with the width of `geometry`, and the snapshot table too
    /// if `snapshots`. Nothing of it is the image's before the header is changed as this says.
    pub(in crate::qcow2) async fn restructure(
        &mut self,
        geometry: &Geometry,
        snapshots: bool,
    ) -> Result<HeaderChange> {
        let References { counters, snapshots: table, snapshot_table, .. } = &mut self.references;
        let mut used_end = counters.last_counted().map_or(0, |last| last + 1);
        for cluster in &self.counted.own {
            counters.set(*cluster, counters.get(*cluster).saturating_sub(1));
            used_end = used_end.max(cluster + 1);
        }
        let mut entries = None;
        if snapshots {
            entries = Some((table.count, snapshots::rewritten(self.image, *table).await?));
            for cluster in snapshot_table.clone() {
                counters.set(cluster, counters.get(cluster).saturating_sub(1));
            }
        }
        rebuild::write_structure(self.image, geometry, counters, used_end, entries).await
    }

    /// K5.
    async fn settle(&self, mut change: HeaderChange) -> Result<()> {
        change.cleared = feature::DIRTY | feature::CORRUPT;
        let marks = self.image.header.incompatible_features & change.cleared;
        if marks == 0 && change.refcount_table.is_none() {
            return Ok(());
        }
        change_header(self.image, &change).await
    }
}

fn is_leak(finding: &Finding) -> bool {
    matches!(finding, Finding::Cluster { refcount, reference, .. } if refcount > reference)
}

fn is_short(finding: &Finding) -> bool {
    matches!(finding, Finding::SnapshotIncomplete(_))
}

fn is_of_snapshots(finding: &Finding) -> bool {
    matches!(
        finding,
        Finding::SnapshotExtra { .. }
            | Finding::SnapshotIncomplete(_)
            | Finding::SnapshotsOverhanging(_)
    )
}
