//! Reads that tier 1 cannot answer: slices to be loaded, compressed clusters; and the old contents
//! that a copy-on-write needs.

use super::Qcow2;
use super::codec::{CodecError, Decompressor};
use super::join::join_all;
use super::layers::Layers;
use super::lookup::{Extent, Place};
use super::slice::Slice;
use blockplex_graph::driver::LocalFuture;
use blockplex_graph::{DebugEvent, Error, ErrorKind, Result};
use blockplex_io::buffer::IoVector;

/// Pieces of one read that run side by side.
const PARALLEL: usize = 32;
/// Decompressors that are kept for the next read.
const SPARE_DECOMPRESSORS: usize = 8;

impl Qcow2 {
    /// Fills `vector` from `offset` on. Holds a pin from before the first look-up to the end of
    /// the last transfer.
    pub(super) async fn read(&self, layers: &Layers, offset: u64, vector: &IoVector) -> Result<()> {
        let hold = self.hold(layers);
        let result = self.read_pieces(layers, offset, vector).await;
        hold.release();
        result
    }

    async fn read_pieces(&self, layers: &Layers, offset: u64, vector: &IoVector) -> Result<()> {
        let length = vector.len() as u64;
        let mut pieces: Vec<LocalFuture<'_, Result<()>>> = Vec::new();
        let mut done = 0;
        let mut looked_up = Ok(());
        while done < length {
            let at = offset + done;
            let extent = self.look_up(at, length - done);
            if extent.place == Place::Missing {
                if let Err(error) = self.slice(layers, self.position(at).number).await {
                    looked_up = Err(error);
                    break;
                }
                continue;
            }
            let part = vector.slice(done as usize, extent.length as usize);
            pieces.push(Box::pin(self.read_extent(layers, at, extent.place, part)));
            done += extent.length;
            if pieces.len() == PARALLEL {
                join_all(std::mem::take(&mut pieces)).await?;
            }
        }
        join_all(pieces).await.and(looked_up)
    }

    /// Fills `vector` from one extent, whose first byte is at guest offset `at`.
    async fn read_extent(
        &self,
        layers: &Layers,
        at: u64,
        place: Place,
        vector: IoVector,
    ) -> Result<()> {
        match place {
            Place::Data { host, .. } => self.read_data(layers, (host, at), vector).await,
            Place::Unallocated => read_backing(layers, at, vector).await,
            Place::Zero => {
                vector.fill(0, vector.len(), 0);
                Ok(())
            }
            // It would have been encrypted before, if at all: nobody can tell what it holds.
            Place::Compressed { .. } if self.encryption.is_some() => {
                let text = format!("guest offset {at:#x}: compressed data in an encrypted image");
                Err(Error::new(ErrorKind::Corrupt, text))
            }
            Place::Compressed { host, length } => {
                self.read_compressed(layers, at, (host, length), vector).await
            }
            Place::Bad(fault) => Err(self.fail_at(layers, at, fault).await),
            Place::Missing => Err(Error::new(ErrorKind::Io, "a slice went away under a reader")),
        }
    }

    /// Memory for `length` bytes of one guest cluster from `at` on, as they are before a write, and
    /// in `reads` what fills it; none when they are zeros. `slice` maps them.
    pub(super) fn old_contents<'a>(
        &'a self,
        layers: &'a Layers,
        slice: &Slice,
        (at, length): (u64, u64),
        reads: &mut Vec<LocalFuture<'a, Result<()>>>,
    ) -> Option<IoVector> {
        // What lies past the end of the disk is never the backing's: a disk that grows grows with
        // zeros.
        let inside = match at >= self.vm_state_start() {
            true => length,
            false => self.disk_size().saturating_sub(at).min(length),
        };
        let mut memory = None;
        let mut done = 0;
        while done < inside {
            let position = self.position(at + done);
            let Extent { place, length: count } =
                self.extent_in(slice, position.index, position.in_cluster, inside - done);
            let reads_zero = match place {
                Place::Zero => true,
                Place::Unallocated => at + done >= layers.backing_length(),
                _ => false,
            };
            if !reads_zero {
                let memory = memory.get_or_insert_with(|| IoVector::zeroed(length as usize));
                let part = memory.slice(done as usize, count as usize);
                reads.push(Box::pin(self.read_extent(layers, at + done, place, part)));
            }
            done += count;
        }
        memory
    }

    /// The part of a compressed cluster that `vector` takes, from guest offset `at` on.
    async fn read_compressed(
        &self,
        layers: &Layers,
        at: u64,
        (host, length): (u64, u64),
        vector: IoVector,
    ) -> Result<()> {
        let stored = layers.file.length().saturating_sub(host).min(length) as usize;
        let compressed = IoVector::zeroed(stored);
        layers.file.announce(DebugEvent::ReadCompressed).await;
        layers.file.read(host, compressed.clone()).await?;
        let spare = self.decompressors.clone();
        let (kind, bits) = (self.information.compression_type, self.geometry.cluster_bits());
        let work = move || {
            // Taken here, not when the work is queued: there are as many as threads that work.
            let resting = spare.lock().pop();
            let mut decompressor = match resting {
                Some(decompressor) => decompressor,
                None => Decompressor::new(kind, bits)?,
            };
            let mut cluster = vec![0; 1 << bits];
            let result = decompressor.decompress(&compressed.to_vec(), &mut cluster);
            result?;
            let mut spare = spare.lock();
            if spare.len() < SPARE_DECOMPRESSORS {
                spare.push(decompressor);
            }
            Ok::<_, CodecError>(cluster)
        };
        let cluster = layers.file.local().blocking(work).await.map_err(|error| {
            let text = format!("guest offset {at:#x}: {error}");
            Error::new(ErrorKind::Corrupt, text).caused_by(error)
        })?;
        let start = self.geometry.in_cluster(at) as usize;
        let wanted = cluster.get(start..start + vector.len());
        vector.copy_from_slice(0, wanted.unwrap_or_default());
        Ok(())
    }
}

/// Fills `vector` from the backing node: zeros without one, and past its end.
pub(super) async fn read_backing(layers: &Layers, at: u64, vector: IoVector) -> Result<()> {
    let length = vector.len() as u64;
    let inside = layers.backing_length().saturating_sub(at).min(length);
    vector.fill(inside as usize, (length - inside) as usize, 0);
    match &layers.backing {
        Some(backing) if inside > 0 => {
            layers.file.announce(DebugEvent::ReadBackingAio).await;
            backing.read(at, vector.slice(0, inside as usize)).await
        }
        _ => Ok(()),
    }
}
