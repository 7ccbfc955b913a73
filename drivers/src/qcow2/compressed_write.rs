//! Compressed writes: whole clusters, into places that nothing was written to.
//!
//! The clusters of a request are compressed side by side on the threads for blocking work, so a
//! loop goes on serving others and several requests use all processors. Then each gets its place
//! in the order of the request, next to the one before it: range lock, place, data, commit, as
//! for any allocating write (D2, W1). What does not shrink is written as it is.
//!
//! The last cluster of the disk may be shorter; the rest of it is zeros.

use super::Qcow2;
use super::codec::{CodecError, Compressor};
use super::entry::{Cluster, L2Entry};
use super::header::feature;
use super::join::join_all;
use super::layers::Layers;
use super::refcounts::HostRun;
use super::slice::Slice;
use blockplex_graph::driver::LocalFuture;
use blockplex_graph::{DebugEvent, Error, ErrorKind, RequestFlags, Result};
use blockplex_io::buffer::{IoBuffer, IoVector};
use parking_lot::Mutex;
use std::sync::Arc;

/// Bytes that are compressed side by side for one request, unless a cluster is larger.
const BATCH: u64 = 4 << 20;
/// Compressors that are kept for the next write.
const SPARE_COMPRESSORS: usize = 8;

impl Qcow2 {
    /// Stores `vector` compressed at `offset`.
    pub(super) async fn write_compressed(
        &self,
        layers: &Layers,
        offset: u64,
        vector: &IoVector,
    ) -> Result<()> {
        self.prepare_for_writing(&layers.file).await?;
        self.check_compressible(offset, vector.len() as u64).await?;
        let cluster_size = self.geometry.cluster_size();
        let length = vector.len() as u64;
        let mut done = 0;
        while done < length {
            let end = length.min(done + BATCH.max(cluster_size));
            let starts: Vec<u64> = (done..end).step_by(cluster_size as usize).collect();
            let part = |start: u64| {
                vector.slice(start as usize, cluster_size.min(length - start) as usize)
            };
            let results: Vec<_> = starts.iter().map(|_| Mutex::new(None)).collect();
            let mut work: Vec<LocalFuture<'_, Result<()>>> = Vec::new();
            for (start, result) in starts.iter().zip(&results) {
                let data = part(*start);
                work.push(Box::pin(async move {
                    *result.lock() = self.compress(layers, data).await?;
                    Ok(())
                }));
            }
            join_all(work).await?;
            for (start, result) in starts.iter().zip(results) {
                let at = offset + start;
                match result.into_inner() {
                    Some(compressed) => self.store_compressed(layers, at, compressed).await?,
                    None => self.write(layers, at, &part(*start)).await?,
                }
            }
            done = end;
        }
        self.relieve(layers).await
    }

    /// Refuses what cannot be stored compressed.
    async fn check_compressible(&self, offset: u64, length: u64) -> Result<()> {
        let header = self.header.lock().await;
        let what = match (header.crypt_method, header.incompatible_features & feature::DATA_FILE) {
            (0, 0) => None,
            (0, _) => Some("an image with an external data file"),
            _ => Some("an encrypted image"),
        };
        drop(header);
        if let Some(what) = what {
            let text = format!("{what} cannot store data compressed");
            return Err(Error::new(ErrorKind::NotSupported, text));
        }
        let whole = |at: u64| self.geometry.is_aligned(at);
        let end = offset + length;
        if whole(offset) && (whole(end) || end == self.disk_size()) {
            return Ok(());
        }
        let text = format!(
            "a compressed write takes whole clusters of {} bytes",
            self.geometry.cluster_size()
        );
        Err(Error::new(ErrorKind::InvalidArgument, text))
    }

    /// The data of one cluster, compressed on another thread; none when that saves nothing.
    async fn compress(&self, layers: &Layers, data: IoVector) -> Result<Option<Vec<u8>>> {
        let spare = self.compressors.clone();
        let kind = self.information.compression_type;
        let cluster_size = self.geometry.cluster_size() as usize;
        let work = move || {
            // Taken here, not when the work is queued: there are as many as threads that work.
            let resting = spare.lock().pop();
            let mut compressor = match resting {
                Some(compressor) => compressor,
                None => Compressor::new(kind)?,
            };
            // A copy: the guest may change its memory meanwhile.
            let mut cluster = data.to_vec();
            cluster.resize(cluster_size, 0);
            let compressed = compressor.compress(&cluster);
            let mut spare = spare.lock();
            if spare.len() < SPARE_COMPRESSORS {
                spare.push(compressor);
            }
            Ok::<_, CodecError>(compressed)
        };
        let compressed = layers.file.local().blocking(work).await;
        compressed.map_err(|error| Error::new(ErrorKind::LimitExceeded, error.to_string()))
    }

    /// Writes the compressed bytes of the cluster at guest offset `at`.
    async fn store_compressed(&self, layers: &Layers, at: u64, bytes: Vec<u8>) -> Result<()> {
        let end = at + self.geometry.cluster_size();
        let guard = self.ranges.lock(at..end).await;
        self.check_inside(layers, end)?;
        let hold = self.hold(layers);
        let stored = self.store_locked(layers, at, &bytes).await;
        hold.release();
        drop(guard);
        stored
    }

    async fn store_locked(&self, layers: &Layers, at: u64, bytes: &[u8]) -> Result<()> {
        let position = self.position(at);
        let slice = self.own_slice(layers, position.number).await?;
        match L2Entry::decode(slice.entry(position.index), &self.geometry, self.version) {
            Ok(Cluster::Unallocated | Cluster::Zero { host: None, .. }) => {}
            Ok(_) => {
                let text = format!(
                    "guest offset {at:#x} is allocated: compressed data cannot overwrite it"
                );
                return Err(Error::new(ErrorKind::Io, text));
            }
            Err(error) => {
                let fault = super::lookup::Fault::Entry(error);
                return Err(self.fail_at(layers, at, fault).await);
            }
        }
        let size = bytes.len() as u64;
        layers.file.announce(DebugEvent::ClusterAllocBytes).await;
        let allocated = self.refcounts.allocate_bytes(&layers.file, size).await;
        let host = self.judge(&layers.file, allocated).await?;
        self.check_data_write(&layers.file, host, size).await?;
        debug_assert!(self.is_covered(host, size), "E1: {size} bytes at {host:#x}");
        let data = IoBuffer::from_slice(bytes);
        layers.file.announce(DebugEvent::L2UpdateCompressed).await;
        layers.file.announce(DebugEvent::WriteCompressed).await;
        let written = layers.file.write(host, data, RequestFlags::default()).await;
        match written.and_then(|()| self.commit_compressed(&slice, position.index, host, size)) {
            Ok(()) => Ok(()),
            Err(error) => {
                if let Err(lost) = self.refcounts.release_bytes(&layers.file, host, size).await {
                    tracing::warn!(%lost, host, "the place of a failed compressed write is lost");
                }
                Err(error)
            }
        }
    }

    fn commit_compressed(
        &self,
        slice: &Arc<Slice>,
        index: usize,
        host: u64,
        length: u64,
    ) -> Result<()> {
        let first = self.geometry.align_down(host);
        let clusters = self.geometry.clusters_for(host + length - first);
        self.assert_counted(HostRun { offset: first, clusters, zeroed: false });
        let entry = Cluster::Compressed { host, length };
        let raw = L2Entry::encode(entry, &self.geometry, self.version)
            .map_err(|error| Error::new(ErrorKind::NoSpace, error.to_string()))?;
        self.slices.change(slice, |editor| editor.set(index, raw));
        Ok(())
    }
}
