//! Writes: in place where that is allowed, else into new clusters.
//!
//! An allocating write goes: range lock, look-up, allocate, old contents of the ragged ends, one
//! write, commit. Until the commit nobody knows of the new clusters; a failure before it gives them
//! back (D2). A request that is torn down before it (with its loop) gives nothing back, since its
//! I/O may still be running: its clusters are lost to the image, never used twice (C06, C07). When its
//! place was not a new one, what it fills around its data could come after others: then the image is
//! given up (I3).
//!
//! New clusters past the old end of the file read as zeros; so a write that leaves the rest of its
//! cluster zero writes nothing but its data there.

use super::Qcow2;
use super::entry::{Cluster, L2Entry};
use super::join::join_all;
use super::layers::Layers;
use super::limbo::Freed;
use super::locks::Held;
use super::lookup::{Fault, Place, SlicePosition};
use super::refcounts::HostRun;
use super::slice::{Slice, SliceEditor};
use super::subclusters::Fill;
use blockplex_graph::{DebugEvent, Error, ErrorKind, Result};
use blockplex_io::buffer::IoVector;
use blockplex_io::lock::RangeGuard;
use std::sync::Arc;

/// The most guest bytes that one step changes.
pub(super) const MAX_STEP: u64 = 2 << 20;

/// What a step of a write does.
enum Step {
    /// The clusters are there and nobody else's.
    InPlace { host: u64 },
    /// Zero clusters that kept theirs.
    Reuse { host: u64 },
    /// Clusters are needed.
    Allocate,
}

impl Qcow2 {
    /// Writes `vector` at `offset`.
    pub(super) async fn write(
        &self,
        layers: &Layers,
        offset: u64,
        vector: &IoVector,
    ) -> Result<()> {
        self.prepare_data(layers).await?;
        let length = vector.len() as u64;
        let mut done = 0;
        while done < length {
            let at = offset + done;
            let part = (length - done).min(MAX_STEP).min(self.position(at).rest);
            let start = self.geometry.align_down(at);
            let end = self.geometry.align_up(at + part).unwrap_or(u64::MAX);
            let guard = self.ranges.lock(start..end).await;
            self.check_inside(layers, end)?;
            let hold = self.hold(layers);
            let part = vector.slice(done as usize, part as usize);
            let written = self.write_step(layers, at, part, guard).await;
            hold.release();
            done += written?;
        }
        self.relieve(layers).await
    }

    /// Writes the beginning of `vector` at `at`; says how much. The range is locked and lies in
    /// one slice.
    async fn write_step(
        &self,
        layers: &Layers,
        at: u64,
        vector: IoVector,
        guard: Held<RangeGuard<'_>>,
    ) -> Result<u64> {
        let position = self.position(at);
        let slice = self.own_slice(layers, position.number).await?;
        let cluster_size = self.geometry.cluster_size();
        let (step, clusters) = match self.step(&slice, &position, vector.len() as u64) {
            Ok(step) => step,
            Err(fault) => return Err(self.fail_write(layers, at, fault).await),
        };
        let fits = |clusters: u64| {
            (clusters * cluster_size - position.in_cluster).min(vector.len() as u64)
        };
        let (run, allocated) = match step {
            Step::InPlace { host } => {
                let part = vector.slice(0, fits(clusters) as usize);
                let length = part.len() as u64;
                let host = host + position.in_cluster;
                // As in tier 1, the pin is enough. Many small writes that waited for the first one
                // to allocate their cluster go on together.
                drop(guard);
                self.write_data(layers, (host, at), part).await?;
                return Ok(length);
            }
            Step::Reuse { host } => (HostRun { offset: host, clusters, zeroed: false }, false),
            // Every cluster has its place there.
            Step::Allocate if self.external.is_some() => {
                let offset = at - position.in_cluster;
                (HostRun { offset, clusters, zeroed: false }, false)
            }
            Step::Allocate => {
                let allocated = self.refcounts.allocate(&layers.file, clusters).await;
                (self.judge(&layers.file, allocated).await?, true)
            }
        };
        let data = vector.slice(0, fits(run.clusters) as usize);
        let length = data.len() as u64;
        if allocated {
            self.assert_counted(run);
        }
        // What is torn down on its way to a place that others write to as well, with bytes around its
        // own, could come after them (I3).
        let doubt = (!allocated).then(|| self.doubt());
        let fill = self.fill_of(&slice, &position, run, length);
        let ended = match self.write_clusters(layers, at, &slice, (run, fill), data).await {
            Ok(()) => self.commit(&slice, &position, run, (length, fill)),
            failed => failed,
        };
        if let Some(doubt) = doubt {
            doubt.settle();
        }
        match ended {
            Ok(()) => Ok(length),
            Err(error) if allocated => Err(self.abandon(layers, run, error).await),
            Err(error) => Err(error),
        }
    }

    /// What is to be done with the first clusters of `length` bytes at `position`, and with how many
    /// of them.
    fn step(
        &self,
        slice: &Slice,
        position: &SlicePosition,
        length: u64,
    ) -> Result<(Step, u64), Fault> {
        let cluster_size = self.geometry.cluster_size();
        let wanted = (position.in_cluster + length).div_ceil(cluster_size);
        let kind = |number: u64| {
            let index = position.index + number as usize;
            if self.geometry.extended_l2() {
                let touched = self.touched(position, length, number);
                return Ok(match self.own_place(slice, index, touched)? {
                    Some((host, true)) => Step::InPlace { host },
                    Some((host, false)) => Step::Reuse { host },
                    None => Step::Allocate,
                });
            }
            let raw = slice.entry(index);
            match self.decode(slice, index, raw) {
                Place::Bad(fault) => Err(fault),
                Place::Data { host, copied: true } if self.is_covered(host, cluster_size) => {
                    Ok(Step::InPlace { host })
                }
                Place::Zero => match L2Entry::decode(raw, &self.geometry, self.version) {
                    Ok(Cluster::Zero { host: Some(host), copied: true })
                        if self.is_covered(host, cluster_size) =>
                    {
                        Ok(Step::Reuse { host })
                    }
                    _ => Ok(Step::Allocate),
                },
                _ => Ok(Step::Allocate),
            }
        };
        let mut first = kind(0)?;
        // Nothing of a cluster that may be written in place meanwhile is written as it was: who is
        // to be one write with zero clusters must be covered.
        let covered = |number: u64| {
            let end = position.in_cluster + length;
            (number > 0 || position.in_cluster == 0)
                && (number + 1) << self.geometry.cluster_bits() <= end
        };
        let mut count = 1;
        while count < wanted {
            let distance = count << self.geometry.cluster_bits();
            let same = match (&first, kind(count)) {
                (Step::InPlace { host }, Ok(Step::InPlace { host: next }))
                | (Step::Reuse { host }, Ok(Step::Reuse { host: next })) => host + distance == next,
                (Step::Allocate, Ok(Step::Allocate)) => true,
                (Step::Reuse { host }, Ok(Step::InPlace { host: next })) => {
                    host + distance == next && covered(count)
                }
                (&Step::InPlace { host }, Ok(Step::Reuse { host: next })) => {
                    let joined = host + distance == next && covered(0);
                    if joined {
                        first = Step::Reuse { host };
                    }
                    joined
                }
                _ => false,
            };
            if !same {
                break;
            }
            count += 1;
        }
        Ok((first, count))
    }

    /// Writes new clusters: `data` for guest offset `at`, and around it, as far as `fill` says, what
    /// is there now.
    async fn write_clusters(
        &self,
        layers: &Layers,
        at: u64,
        slice: &Slice,
        (run, fill): (HostRun, Fill),
        data: IoVector,
    ) -> Result<()> {
        let position = self.position(at);
        let end = at + data.len() as u64;
        let covered = self.geometry.clusters_for(position.in_cluster + data.len() as u64);
        debug_assert!(covered <= run.clusters, "data beyond the clusters of a run");
        let (head, tail) = (fill.head, self.writable_tail(end, fill.tail));
        let mut reads = Vec::new();
        let before = self.old_contents(layers, slice, (at - head, head), &mut reads);
        let after = self.old_contents(layers, slice, (end, tail), &mut reads);
        if !reads.is_empty() {
            layers.file.announce(DebugEvent::CowRead).await;
        }
        join_all(reads).await?;
        let filler = |contents: Option<IoVector>, length: u64| match contents {
            None if length > 0 && !(run.zeroed && self.zeros_are_zeros()) => {
                Some(IoVector::zeroed(length as usize))
            }
            contents => contents,
        };
        let before = filler(before, head);
        let back = if before.is_some() { head } else { 0 };
        let start = (run.offset + position.in_cluster - back, at - back);
        let parts: Vec<IoVector> =
            [before, Some(data), filler(after, tail)].into_iter().flatten().collect();
        if parts.len() > 1 {
            layers.file.announce(DebugEvent::CowWrite).await;
        }
        let vector = match <[IoVector; 1]>::try_from(parts) {
            Ok([data]) => data,
            Err(parts) => IoVector::concatenate(&parts),
        };
        self.write_data(layers, start, vector).await
    }

    /// Makes the entries from the one at `position` on name the clusters of `run`, in which `written`
    /// was written, in one step. On an error nothing has changed.
    fn commit(
        &self,
        slice: &Arc<Slice>,
        position: &SlicePosition,
        run: HostRun,
        written: (u64, Fill),
    ) -> Result<()> {
        let old = match self.geometry.extended_l2() {
            true => self.commit_extended(slice, position, run, written)?,
            false => {
                let entry = Cluster::Normal { host: run.offset, copied: true };
                self.replace_entries(slice, position.index, run, entry)?
            }
        };
        for (step, raw) in (0..).zip(old) {
            let kept = run.offset + (step << self.geometry.cluster_bits());
            self.free_entry(raw, kept, false);
        }
        Ok(())
    }

    /// As `commit`, of clusters that nothing was written to and that read as zeros: what is mapped
    /// by subclusters goes on reading as it did.
    pub(super) fn commit_reserved(
        &self,
        slice: &Arc<Slice>,
        index: usize,
        run: HostRun,
    ) -> Result<()> {
        self.assert_counted(run);
        if self.geometry.extended_l2() {
            return self.reserve_extended(slice, index, run);
        }
        let reserved = match self.zeros_are_zeros() {
            true => Cluster::Normal { host: run.offset, copied: true },
            false => Cluster::Zero { host: Some(run.offset), copied: true },
        };
        for (step, raw) in (0..).zip(self.replace_entries(slice, index, run, reserved)?) {
            let kept = run.offset + (step << self.geometry.cluster_bits());
            self.free_entry(raw, kept, false);
        }
        Ok(())
    }

    /// Makes the entries of `run` like `entry`, which is the first. Gives those that were there.
    fn replace_entries(
        &self,
        slice: &Arc<Slice>,
        index: usize,
        run: HostRun,
        entry: Cluster,
    ) -> Result<Vec<u64>> {
        let first = L2Entry::encode(entry, &self.geometry, self.version)
            .map_err(|error| Error::new(ErrorKind::NoSpace, error.to_string()))?;
        let mut old = Vec::new();
        self.slices.change(slice, |editor: &mut SliceEditor<'_>| {
            for step in 0..run.clusters {
                let at = index + step as usize;
                old.push(editor.get(at));
                editor.set(at, first + (step << self.geometry.cluster_bits()));
            }
        });
        Ok(old)
    }

    /// Frees what an entry named that was replaced, unless that is `kept`.
    pub(super) fn free_entry(&self, raw: u64, kept: u64, discard: bool) {
        if self.external.is_some() {
            // Its place is the guest cluster's own for ever.
            return;
        }
        let (offset, clusters) = match L2Entry::decode(raw, &self.geometry, self.version) {
            Ok(Cluster::Normal { host, .. } | Cluster::Zero { host: Some(host), .. }) => (host, 1),
            Ok(Cluster::Compressed { host, length }) => {
                let first = self.geometry.align_down(host);
                (first, self.geometry.clusters_for(host + length - first))
            }
            _ => return,
        };
        if offset != kept {
            self.free(Freed { offset, clusters, discard });
        }
    }
}
