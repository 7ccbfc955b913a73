//! What an L1 table refers to: its L2 tables and their clusters, counted once more, once less, or
//! marked.
//!
//! All of it works on the tables in the file, with nothing dirty in memory and no request running.
//! A table is read once for each pass and never kept, so memory does not grow with the disk.

use crate::qcow2::Qcow2;
use crate::qcow2::discard::DiscardReason;
use crate::qcow2::entry::{COPIED, Cluster, L1Entry, L2Entry};
use crate::qcow2::layers::Layers;
use crate::qcow2::limbo::Freed;
use crate::qcow2::lookup::Fault;
use crate::qcow2::overlap::Structure;
use blockplex_graph::{Child, Error, ErrorKind, RequestFlags, Result};
use blockplex_io::buffer::{IoBuffer, IoVector};
use std::collections::HashSet;

/// Host clusters in a row that are referred to once by each of as many entries.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reference {
    pub(super) offset: u64,
    pub(super) clusters: u64,
}

/// What the COPIED flags are to say.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Marks {
    /// Nothing is ours alone.
    Clear,
    /// What has exactly one reference is.
    ByRefcount,
}

impl Qcow2 {
    /// Refuses an L1 table that names a table outside of the file or one table twice: walking it
    /// could take for ever, and counting it would be wrong.
    pub(super) fn check_l1(&self, file: &Child, l1: &[u64]) -> Result<()> {
        let mut seen = HashSet::new();
        for raw in l1 {
            let fault = match L1Entry::decode(*raw, &self.geometry) {
                Ok(L1Entry::Unallocated) => continue,
                Ok(L1Entry::Table { host, .. }) => {
                    let inside = host + self.geometry.cluster_size() <= file.length();
                    if inside && seen.insert(host) {
                        continue;
                    }
                    Fault::Table(*raw)
                }
                Err(error) => Fault::Entry(error),
            };
            return Err(fault.at(0));
        }
        Ok(())
    }

    /// Calls `visit` for every L2 table of `l1` and for every run of clusters that they name.
    pub(super) async fn visit_references(
        &self,
        file: &Child,
        l1: &[u64],
        mut visit: impl AsyncFnMut(Reference) -> Result<()>,
    ) -> Result<()> {
        for (index, raw) in (0..).zip(l1) {
            let Some(table) = self.table_of(index, *raw)? else { continue };
            let bytes = self.read_l2(file, table).await?;
            let mut run: Option<Reference> = None;
            for (entry, word) in self.words(&bytes) {
                let cluster = L2Entry::decode(word, &self.geometry, self.version)
                    .map_err(|error| Fault::Entry(error).at(self.guest_at(index, entry)))?;
                let Some(next) = self.reference_of(cluster) else { continue };
                let bits = self.geometry.cluster_bits();
                match &mut run {
                    Some(run) if run.offset + (run.clusters << bits) == next.offset => {
                        run.clusters += next.clusters;
                    }
                    run => {
                        if let Some(whole) = run.replace(next) {
                            visit(whole).await?;
                        }
                    }
                }
            }
            if let Some(run) = run {
                visit(run).await?;
            }
            // Last: who gives a table back may not need it any more.
            visit(Reference { offset: table, clusters: 1 }).await?;
        }
        Ok(())
    }

    /// Fails when some cluster of `l1` is not counted, or has no room for one reference more.
    pub(super) async fn check_references(&self, file: &Child, l1: &[u64]) -> Result<()> {
        let bits = self.geometry.cluster_bits();
        self.visit_references(file, l1, async |reference| {
            for at in 0..reference.clusters {
                let offset = reference.offset + (at << bits);
                match self.refcounts.refcount(file, offset).await? {
                    0 => {
                        let text = format!("the cluster at {offset:#x} is used and has refcount 0");
                        return Err(Error::new(ErrorKind::Corrupt, text));
                    }
                    count if count >= self.geometry.max_refcount() => {
                        return Err(self.refcounts.overflow(offset));
                    }
                    _ => {}
                }
            }
            Ok(())
        })
        .await
    }

    /// One reference more to everything that `l1` refers to; on an error, none.
    pub(super) async fn add_references(&self, file: &Child, l1: &[u64]) -> Result<()> {
        debug_assert!(l1.iter().all(|raw| raw & COPIED == 0), "N1: flags before counts");
        let mut added = 0_u64;
        let result = self
            .visit_references(file, l1, async |Reference { offset, clusters }| {
                self.refcounts.retain(file, offset, clusters).await?;
                added += 1;
                Ok(())
            })
            .await;
        let Err(error) = result else { return Ok(()) };
        let undone = self
            .visit_references(file, l1, async |Reference { offset, clusters }| {
                if added > 0 {
                    added -= 1;
                    self.refcounts.release(file, offset, clusters).await?;
                }
                Ok(())
            })
            .await;
        if let Err(error) = undone {
            tracing::warn!(%error, "references that were added in vain are left as leaks");
        }
        Err(error)
    }

    /// One reference less to everything that `l1` refers to, when nothing on the disk names it by
    /// way of `l1` any more.
    pub(super) async fn drop_references(&self, layers: &Layers, l1: &[u64]) -> Result<()> {
        // Without a request running there are no pins, unless one was torn down with its loop.
        let tag = self.grace.current();
        for _ in 0..4 {
            self.grace.try_advance();
        }
        let is_quiet = self.grace.elapsed(tag);
        self.visit_references(&layers.file, l1, async |Reference { offset, clusters }| {
            let freed =
                Freed { offset, clusters, discard: self.passes_discard(DiscardReason::Snapshot) };
            if is_quiet {
                return self.release(&layers.file, freed).await;
            }
            self.free(freed);
            Ok(())
        })
        .await
    }

    /// Sets the COPIED flags of the entries that `l1` leads to, in the L2 tables in the file; gives
    /// the entries of `l1` with theirs. Slices in memory are dropped by the caller.
    pub(super) async fn write_marks(
        &self,
        file: &Child,
        l1: &[u64],
        marks: Marks,
    ) -> Result<Vec<u64>> {
        let mut marked = l1.to_vec();
        for ((index, raw), marked) in (0..).zip(l1).zip(&mut marked) {
            let Some(table) = self.table_of(index, *raw)? else { continue };
            *marked = self.mark(file, *raw, table, marks).await?;
            let mut bytes = self.read_l2(file, table).await?;
            let mut changed = false;
            let stride = self.geometry.l2_entry_bytes() as usize;
            for entry in bytes.chunks_exact_mut(stride) {
                let Some(word) = entry.first_chunk_mut::<8>() else { continue };
                let raw = u64::from_be_bytes(*word);
                let host = match L2Entry::decode(raw, &self.geometry, self.version) {
                    Ok(Cluster::Normal { host, .. } | Cluster::Zero { host: Some(host), .. }) => {
                        host
                    }
                    _ => continue,
                };
                let new = self.mark(file, raw, host, marks).await?;
                changed |= new != raw;
                *word = new.to_be_bytes();
            }
            if changed {
                let own = [Structure::ActiveL2, Structure::InactiveL2];
                self.check_write(file, (table, 1), &own).await?;
                file.write(table, IoBuffer::from_slice(&bytes), RequestFlags::default()).await?;
            }
        }
        Ok(marked)
    }

    async fn mark(&self, file: &Child, raw: u64, host: u64, marks: Marks) -> Result<u64> {
        let is_ours = match marks {
            Marks::Clear => false,
            Marks::ByRefcount => self.refcounts.refcount(file, host).await? == 1,
        };
        Ok(if is_ours { raw | COPIED } else { raw & !COPIED })
    }

    /// The L2 table that an L1 entry names.
    fn table_of(&self, index: u64, raw: u64) -> Result<Option<u64>> {
        match L1Entry::decode(raw, &self.geometry) {
            Ok(L1Entry::Unallocated) => Ok(None),
            Ok(L1Entry::Table { host, .. }) => Ok(Some(host)),
            Err(error) => Err(Fault::Entry(error).at(self.guest_at(index, 0))),
        }
    }

    async fn read_l2(&self, file: &Child, offset: u64) -> Result<Vec<u8>> {
        let memory = IoVector::zeroed(self.geometry.cluster_size() as usize);
        file.read(offset, memory.clone()).await?;
        Ok(memory.to_vec())
    }

    /// The first words of the entries of an L2 table.
    fn words<'a>(&self, bytes: &'a [u8]) -> impl Iterator<Item = (u64, u64)> + use<'a> {
        let entries = bytes.chunks_exact(self.geometry.l2_entry_bytes() as usize);
        (0..).zip(
            entries.map(|entry| entry.first_chunk().map_or(0, |word| u64::from_be_bytes(*word))),
        )
    }

    fn reference_of(&self, cluster: Cluster) -> Option<Reference> {
        match cluster {
            Cluster::Normal { host, .. } | Cluster::Zero { host: Some(host), .. } => {
                Some(Reference { offset: host, clusters: 1 })
            }
            Cluster::Compressed { host, length } => {
                let offset = self.geometry.align_down(host);
                let clusters = self.geometry.clusters_for(host + length - offset);
                Some(Reference { offset, clusters })
            }
            _ => None,
        }
    }

    fn guest_at(&self, l1_index: u64, entry: u64) -> u64 {
        l1_index
            .saturating_mul(self.geometry.bytes_per_l1_entry())
            .saturating_add(entry << self.geometry.cluster_bits())
    }
}
