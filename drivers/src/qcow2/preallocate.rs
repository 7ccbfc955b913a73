//! Clusters that are mapped before anything is written to them.
//!
//! An entry may name them as they are when they come from past the end of what was used of the
//! file, where it reads as zeros; others are zeroed first.

use super::Qcow2;
use super::entry::{Cluster, L2Entry};
use super::layers::Layers;
use super::refcounts::HostRun;
use super::slice::Slice;
use blockplex_graph::{Preallocation, RequestFlags, Result};
use blockplex_io::buffer::IoVector;

/// The zeros that are written at once.
const CHUNK: u64 = 1 << 20;

impl Qcow2 {
    /// Maps the clusters of a guest range, unless they are, and takes their storage as `mode` says.
    /// Where they are not mapped they must read as zeros.
    pub(super) async fn preallocate(
        &self,
        layers: &Layers,
        start: u64,
        end: u64,
        mode: Preallocation,
    ) -> Result<()> {
        let mut at = self.geometry.align_down(start);
        let end = self.geometry.align_up(end).unwrap_or(u64::MAX);
        while at < end {
            let stop = end.min(at + self.position(at).rest);
            let guard = self.ranges.lock(at..stop).await;
            let hold = self.hold(layers);
            let done = self.preallocate_in_slice(layers, at, stop, mode).await;
            hold.release();
            drop(guard);
            done?;
            self.relieve(layers).await?;
            at = stop;
        }
        Ok(())
    }

    async fn preallocate_in_slice(
        &self,
        layers: &Layers,
        start: u64,
        end: u64,
        mode: Preallocation,
    ) -> Result<()> {
        let position = self.position(start);
        let slice = self.own_slice(layers, position.number).await?;
        let last = position.index + self.geometry.clusters_for(end - start) as usize;
        let mut index = position.index;
        while index < last {
            let run = (index..last).take_while(|at| self.is_unmapped(&slice, *at)).count();
            if run == 0 {
                index += 1;
                continue;
            }
            let allocated = self.refcounts.allocate(&layers.file, run as u64).await;
            let clusters = self.judge(&layers.file, allocated).await?;
            let ended = match self.take_storage(layers, clusters, mode).await {
                Ok(()) => self.commit_reserved(&slice, index, clusters),
                failed => failed,
            };
            if let Err(error) = ended {
                return Err(self.abandon(layers, clusters, error).await);
            }
            index += clusters.clusters as usize;
        }
        Ok(())
    }

    fn is_unmapped(&self, slice: &Slice, index: usize) -> bool {
        let entry = L2Entry::decode(slice.entry(index), &self.geometry, self.version);
        matches!(entry, Ok(Cluster::Unallocated | Cluster::Zero { host: None, .. }))
    }

    async fn take_storage(&self, layers: &Layers, run: HostRun, mode: Preallocation) -> Result<()> {
        let length = run.clusters << self.geometry.cluster_bits();
        match mode {
            Preallocation::Off | Preallocation::Metadata if run.zeroed => Ok(()),
            // Zeros that keep their storage: the file may have been made longer before, without.
            Preallocation::Off | Preallocation::Metadata | Preallocation::Falloc => {
                layers.file.write_zeroes(run.offset, length, RequestFlags::default()).await
            }
            Preallocation::Full => {
                let zeros = IoVector::zeroed(length.min(CHUNK) as usize);
                let mut done = 0;
                while done < length {
                    let part = zeros.slice(0, (length - done).min(CHUNK) as usize);
                    let count = part.len() as u64;
                    let flags = RequestFlags::default();
                    layers.file.write(run.offset + done, part, flags).await?;
                    done += count;
                }
                Ok(())
            }
        }
    }
}
