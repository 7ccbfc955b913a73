//! Internal snapshots: taking, removing and going back to states of the disk inside of the image.
//!
//! A snapshot is a copy of the L1 table, and one reference more to everything that it leads to.
//! All of this is management work: no request reaches the node meanwhile
//! ([`Blockplex::manage`](https://docs.rs/blockplex)). A crash at any moment leaves the old state
//! or the new one, and at worst clusters that are counted too often, never too rarely:
//!
//! - **N1** Flags before counts: a COPIED flag is cleared, durably, before the refcount rises
//!   above 1, and set after it has durably fallen to 1. So no entry that says "ours alone" stands
//!   for a shared cluster at any time; the contrary only costs a copy.
//! - **N2** Counts before names: references are counted, durably, before a table or the header
//!   names what they belong to; they are given back only after it durably does not any more.
//! - **N3** One write of one sector of the header switches: to another snapshot table, or to
//!   another L1 table together with the size of the disk.
//! - **N4** What fails before the switch is undone in memory and, as far as the file lets it, on
//!   the disk; what fails after it is left as leaks, and said.
//! - **N5** While flags and counts disagree, the image has the dirty bit: whoever opens it for
//!   writing after a crash makes them agree. Version 2 has no such bit; there a check finds flags
//!   that are clear and could be set.
//!
//! | operation | flags cleared | counted | switched | given back | flags set |
//! |---|---|---|---|---|---|
//! | create | of the disk | of the disk | snapshot table | VM state of the disk | |
//! | apply | of the snapshot | of the snapshot | L1 table and size | of the disk as it was | |
//! | delete | | | snapshot table | of the snapshot | of the disk |

mod references;
mod selector;
pub(super) mod table;
mod vm_state;

pub use selector::SnapshotSelector;

use super::Qcow2;
use super::discard::DiscardReason;
use super::geometry::TABLE_ENTRY_BYTES;
use super::header::{MAX_SNAPSHOTS, feature};
use super::header_update::{DISK_FIELDS, Switch, disk_fields};
use super::layers::Layers;
use super::limbo::Freed;
use super::locks::Held;
use super::overlap::Structure;
use super::snapshot_table::{SnapshotEntry, next_id};
use blockplex_graph::{Child, Error, ErrorKind, NodeIo, Result};
use blockplex_io::buffer::IoVector;
use blockplex_io::lock::CoMutexGuard;
use references::Marks;
use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

/// The most bytes of a name: more do not fit QEMU's tools.
pub const MAX_SNAPSHOT_NAME_BYTES: usize = 255;
/// One internal snapshot of an open image.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// What the table says of it. Text in it comes from the image: escape it before showing it.
    pub entry: SnapshotEntry,
    /// Why it cannot be used.
    pub problem: Option<Error>,
}

/// The snapshots of an image.
#[derive(Default)]
pub(super) struct Snapshots {
    pub(super) list: Vec<Snapshot>,
    /// Clusters of the table in the file.
    pub(super) table_clusters: u64,
}

/// A snapshot to be taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSnapshot {
    /// Its name, at most 255 bytes without NUL; another one may have the same.
    pub name: Vec<u8>,
    /// Its time; the present without one.
    pub date: Option<SystemTime>,
    /// How long the guest has run, in nanoseconds.
    pub vm_clock_nanoseconds: u64,
    /// Bytes of the VM state that was written ([`Qcow2::write_vm_state`]); 0 without one.
    pub vm_state_size: u64,
    /// Instructions that the guest has run.
    pub instruction_count: Option<u64>,
}

impl NewSnapshot {
    /// A snapshot of the disk alone, taken now, as `qemu-img snapshot -c` makes it.
    pub fn of_disk(name: impl Into<Vec<u8>>) -> NewSnapshot {
        NewSnapshot {
            name: name.into(),
            date: None,
            vm_clock_nanoseconds: 0,
            vm_state_size: 0,
            instruction_count: Some(0),
        }
    }
}

impl Qcow2 {
    /// The snapshots, in the order of the table. Any thread.
    pub fn snapshots(&self) -> Vec<Snapshot> {
        self.snapshots.lock().list.clone()
    }

    /// Takes a snapshot of the disk; gives its entry. Management work.
    ///
    /// # Errors
    ///
    /// `NotSupported`: the image has an external data file; `InvalidArgument`: the name, or a
    /// refcount that cannot grow with `refcount_bits` (T14b); `LimitExceeded`: too many snapshots;
    /// and those of writing. Then there is no snapshot.
    pub async fn create_snapshot(&self, io: &NodeIo, new: NewSnapshot) -> Result<SnapshotEntry> {
        let layers = Layers::of(io)?;
        let _turn = self.begin_snapshot_work(&layers).await?;
        let mut snapshots = self.snapshots();
        if snapshots.len() >= MAX_SNAPSHOTS as usize {
            let text = format!("the image has {MAX_SNAPSHOTS} snapshots, the most there can be");
            return Err(Error::new(ErrorKind::LimitExceeded, text));
        }
        let mut entry = self.new_entry(new, &snapshots)?;
        let words = self.disk_l1();
        let checked = self.check_references(&layers.file, &words).await;
        self.judge(&layers.file, checked).await?;
        self.hold_mark(&layers.file).await?;
        let marked = self.mark_disk(&layers, Marks::Clear).await;
        let created = match marked {
            Ok(()) => self.count_and_name(&layers, &mut entry, &mut snapshots).await,
            Err(error) => Err(error),
        };
        if let Err(error) = created {
            return Err(self.undo_marks(&layers, error).await);
        }
        self.watch_inactive_tables(&layers.file).await?;
        // The snapshot is there, whatever becomes of this.
        if let Err(error) = self.drop_vm_state(&layers).await {
            tracing::warn!(%error, "the VM state of a snapshot stays on the disk, too");
        }
        self.release_mark();
        self.flush(&layers).await?;
        Ok(entry)
    }

    /// Removes a snapshot; gives its entry. Management work.
    ///
    /// # Errors
    ///
    /// `NotFound`; what the snapshot's problem is; and those of writing. After an error the
    /// snapshot may be gone and its clusters lost to the image until a repair finds them.
    pub async fn delete_snapshot(
        &self,
        io: &NodeIo,
        which: &SnapshotSelector,
    ) -> Result<SnapshotEntry> {
        let layers = Layers::of(io)?;
        let _turn = self.begin_snapshot_work(&layers).await?;
        let mut snapshots = self.snapshots();
        let gone = snapshots.remove(which.find(&snapshots)?);
        let words = self.l1_of(&layers, &gone).await?;
        let entries: Vec<_> = snapshots.iter().map(|snapshot| snapshot.entry.clone()).collect();
        let table = self.write_snapshot_table(&layers, &entries).await?;
        if let Err(error) = self.flush(&layers).await {
            return Err(self.abandon_table(&layers, table, error).await);
        }
        let switched = self.switch_snapshot_table(&layers, table, snapshots).await;
        switched.map_err(|(error, _)| error)?;
        self.watch_inactive_tables(&layers.file).await?;
        self.hold_mark(&layers.file).await?;
        let dropped = self.drop_references(&layers, &words).await;
        if gone.entry.l1_size > 0 {
            let clusters = self.geometry.clusters_for(words.len() as u64 * TABLE_ENTRY_BYTES);
            let offset = gone.entry.l1_table_offset;
            self.free(Freed {
                offset,
                clusters,
                discard: self.passes_discard(DiscardReason::Snapshot),
            });
        }
        self.judge(&layers.file, dropped).await?;
        self.flush(&layers).await?;
        self.mark_disk(&layers, Marks::ByRefcount).await?;
        self.release_mark();
        self.flush(&layers).await?;
        Ok(gone.entry)
    }

    /// Makes the disk what it was when the snapshot was taken, its size included; what it is now is
    /// lost. Gives the snapshot's entry. Management work.
    ///
    /// # Errors
    ///
    /// As for [`Qcow2::delete_snapshot`]; before the switch nothing has changed, after it the disk
    /// is the snapshot's.
    pub async fn apply_snapshot(
        &self,
        io: &NodeIo,
        which: &SnapshotSelector,
    ) -> Result<SnapshotEntry> {
        let layers = Layers::of(io)?;
        let _turn = self.begin_snapshot_work(&layers).await?;
        if !self.bitmaps.is_empty() {
            let text = "the disk has dirty bitmaps, which cannot follow it to a snapshot";
            return Err(Error::new(ErrorKind::Busy, text));
        }
        let snapshots = self.snapshots();
        let chosen = which.choose(&snapshots)?;
        let words = self.l1_of(&layers, chosen).await?;
        let size = chosen.entry.disk_size.unwrap_or_else(|| self.disk_size());
        let checked = self.check_references(&layers.file, &words).await;
        self.judge(&layers.file, checked).await?;
        self.hold_mark(&layers.file).await?;
        // Tables that the disk shares change under the slices in memory.
        let cleared = self.write_marks(&layers.file, &words, Marks::Clear).await;
        self.slices.clear();
        let words = cleared?;
        layers.file.flush().await?;
        self.add_references(&layers.file, &words).await?;
        let old = self.disk_l1();
        if let Err((error, switch)) = self.switch_disk(&layers, &words, size).await {
            if switch == Switch::NotMade
                && let Err(error) = self.drop_references(&layers, &words).await
            {
                tracing::warn!(%error, "references of a snapshot that was not applied leak");
            }
            return Err(error);
        }
        let dropped = self.drop_references(&layers, &old).await;
        self.judge(&layers.file, dropped).await?;
        self.release_mark();
        self.flush(&layers).await?;
        Ok(chosen.entry.clone())
    }

    /// What all of it begins with: the turn, an image that may be written to, nothing dirty, and
    /// tables that can be walked.
    async fn begin_snapshot_work(&self, layers: &Layers) -> Result<Held<CoMutexGuard<'_, ()>>> {
        self.prepare_for_writing(&layers.file).await?;
        let turn = self.resizing.lock().await;
        if self.header.lock().await.incompatible_features & feature::DATA_FILE != 0 {
            let text = "internal snapshots of an image with an external data file";
            return Err(Error::new(ErrorKind::NotSupported, text));
        }
        self.flush(layers).await?;
        if let Some(index) = self.bad_tables.first() {
            let text = format!("L1 entry {index} names no L2 table: repair the image first");
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        let checked = self.check_l1(&layers.file, &self.disk_l1());
        self.judge(&layers.file, checked).await?;
        Ok(turn)
    }

    fn new_entry(&self, new: NewSnapshot, others: &[Snapshot]) -> Result<SnapshotEntry> {
        let NewSnapshot { name, date, vm_clock_nanoseconds, vm_state_size, instruction_count } =
            new;
        if name.len() > MAX_SNAPSHOT_NAME_BYTES || name.contains(&0) {
            let text = format!(
                "a snapshot's name has at most {MAX_SNAPSHOT_NAME_BYTES} bytes, and no NUL"
            );
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
        let date = date.unwrap_or_else(SystemTime::now);
        let since = date.duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(SnapshotEntry {
            l1_table_offset: 0,
            l1_size: 0,
            id: next_id(others.iter().map(|snapshot| &snapshot.entry)),
            name,
            // The field has 32 bits.
            date_seconds: since.as_secs() as u32,
            date_nanoseconds: since.subsec_nanos(),
            vm_clock_nanoseconds,
            vm_state_size,
            disk_size: Some(self.disk_size()),
            instruction_count,
            unknown_extra: Vec::new(),
        })
    }

    /// The entries of the disk's L1 table.
    fn disk_l1(&self) -> Vec<u64> {
        let (_, entries) = self.l1.place();
        (0..entries).map(|index| self.l1.get(index)).collect()
    }

    /// Sets the COPIED flags of the disk, durably.
    async fn mark_disk(&self, layers: &Layers, marks: Marks) -> Result<()> {
        let words = self.disk_l1();
        let marked = self.write_marks(&layers.file, &words, marks).await;
        self.slices.clear();
        for (index, (old, new)) in (0..).zip(words.iter().zip(marked?)) {
            if *old != new {
                self.l1.set(index, new);
            }
        }
        self.flush(layers).await
    }

    /// After a failure: the flags say again what the refcounts say. Gives `error` back.
    async fn undo_marks(&self, layers: &Layers, error: Error) -> Error {
        match self.mark_disk(layers, Marks::ByRefcount).await {
            Ok(()) => self.release_mark(),
            Err(error) => tracing::warn!(%error, "COPIED flags are clear that could be set"),
        }
        error
    }

    /// The middle of creation (N2, N3): the copy of the L1 table, the references, the table.
    async fn count_and_name(
        &self,
        layers: &Layers,
        entry: &mut SnapshotEntry,
        snapshots: &mut Vec<Snapshot>,
    ) -> Result<()> {
        let words = self.disk_l1();
        let copy = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        let run = self.write_new_metadata(layers, Structure::InactiveL1, copy).await?;
        // At most 2^22 entries.
        (entry.l1_table_offset, entry.l1_size) = (run.offset, words.len() as u32);
        if let Err(error) = self.add_references(&layers.file, &words).await {
            return Err(self.abandon(layers, run, error).await);
        }
        snapshots.push(Snapshot { entry: entry.clone(), problem: None });
        let entries: Vec<_> = snapshots.iter().map(|snapshot| snapshot.entry.clone()).collect();
        let table = match self.write_snapshot_table(layers, &entries).await {
            Ok(table) => match self.flush(layers).await {
                Ok(()) => Ok(table),
                Err(error) => Err(self.abandon_table(layers, table, error).await),
            },
            Err(error) => Err(error),
        };
        let switched = match table {
            Ok(table) => self.switch_snapshot_table(layers, table, std::mem::take(snapshots)).await,
            Err(error) => Err((error, Switch::NotMade)),
        };
        match switched {
            Err((error, Switch::NotMade)) => {
                if let Err(error) = self.drop_references(layers, &words).await {
                    tracing::warn!(%error, "references of a snapshot that failed are left as leaks");
                }
                Err(self.abandon(layers, run, error).await)
            }
            switched => switched.map_err(|(error, _)| error),
        }
    }

    /// Makes `words` the disk's L1 table, in a new place, and `size` its size (N3).
    async fn switch_disk(
        &self,
        layers: &Layers,
        words: &[u64],
        size: u64,
    ) -> Result<(), (Error, Switch)> {
        let mut words = words.to_vec();
        let needed = self.geometry.l1_entries_for(size) as usize;
        words.resize(words.len().max(needed), 0);
        let copy = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        let not_made = |error| (error, Switch::NotMade);
        let run = self.write_new_metadata(layers, Structure::ActiveL1, copy).await;
        let run = run.map_err(not_made)?;
        if let Err(error) = self.flush(layers).await {
            return Err(not_made(self.abandon(layers, run, error).await));
        }
        let mut header = self.header.lock().await;
        // At most 2^22.
        let entries = words.len() as u32;
        let before = disk_fields(&header, header.size, header.l1_size, header.l1_table_offset);
        let after = disk_fields(&header, size, entries, run.offset);
        match self.switch_header(&layers.file, DISK_FIELDS, &before, &after).await {
            Ok(()) => {}
            Err((error, Switch::NotMade)) => {
                drop(header);
                return Err(not_made(self.abandon(layers, run, error).await));
            }
            in_doubt => return in_doubt,
        }
        (header.size, header.l1_size, header.l1_table_offset) = (size, entries, run.offset);
        drop(header);
        let (old, old_entries) = self.l1.place();
        self.l1.replace(run.offset, &words);
        self.slices.clear();
        // Release: partner of the Acquire in `disk_size`.
        self.size.store(size, Ordering::Release);
        let clusters = self.geometry.clusters_for(old_entries * TABLE_ENTRY_BYTES);
        if clusters > 0 {
            self.free(Freed {
                offset: old,
                clusters,
                discard: self.passes_discard(DiscardReason::Other),
            });
        }
        Ok(())
    }

    /// The L1 table of a snapshot, checked.
    async fn l1_of(&self, layers: &Layers, snapshot: &Snapshot) -> Result<Vec<u64>> {
        if let Some(problem) = &snapshot.problem {
            return self.judge(&layers.file, Err(problem.clone())).await;
        }
        let words = read_l1(&layers.file, &snapshot.entry).await?;
        let checked = self.check_l1(&layers.file, &words);
        self.judge(&layers.file, checked).await?;
        Ok(words)
    }
}

/// The L1 table of a snapshot that has no problem.
pub(super) async fn read_l1(file: &Child, entry: &SnapshotEntry) -> Result<Vec<u64>> {
    let memory = IoVector::zeroed(entry.l1_size as usize * TABLE_ENTRY_BYTES as usize);
    file.read(entry.l1_table_offset, memory.clone()).await?;
    let bytes = memory.to_vec();
    Ok(bytes.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word)).collect())
}
