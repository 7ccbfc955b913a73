//! An image that holds nothing: what it was reads like its backing node, or as zeros.
//!
//! - **ME1** All at once, where nothing but the disk uses clusters: the L1 table becomes empty,
//!   durably; only then do the refcounts, written whole, count nothing but the metadata that is
//!   left. A crash in between leaves clusters that nobody uses, nothing worse.
//! - **ME2** Step by step otherwise (version 2, snapshots, bitmaps, encryption, an external data
//!   file): every cluster is dropped by itself.

use super::Qcow2;
use super::entry::Version;
use super::layers::Layers;
use blockplex_graph::{DebugEvent, NodeIo, Result};

impl Qcow2 {
    /// Drops everything that the disk holds, and makes the file as small as it can be. Management
    /// work: no request runs. Durable on return.
    ///
    /// # Errors
    ///
    /// As for any write; some of the disk may be gone then, and the image is whole. When its
    /// refcounts could not be written, it takes a flush before anything can be allocated.
    pub async fn make_empty(&self, io: &NodeIo) -> Result<()> {
        let layers = Layers::of(io)?;
        layers.file.announce(DebugEvent::EmptyImagePrepare).await;
        self.prepare_data(&layers).await?;
        let _turn = self.resizing.lock().await;
        let _everything = self.ranges.lock(0..u64::MAX).await;
        // What was freed before is to be free before the refcounts are counted anew.
        self.flush(&layers).await?;
        self.flush(&layers).await?;
        if self.limbo.is_empty() && self.is_all_disk().await {
            self.empty_at_once(&layers).await?;
        } else {
            self.drop_locked(&layers, 0, self.disk_size()).await?;
            self.flush(&layers).await?;
            self.drop_tables(0..self.geometry.l1_entries_for(self.disk_size()));
        }
        self.flush(&layers).await?;
        self.shrink_file(&layers).await;
        self.flush(&layers).await
    }

    /// Whether nothing but the disk and the tables uses clusters (ME1).
    async fn is_all_disk(&self) -> bool {
        let header = self.header.lock().await;
        self.version >= Version::V3
            && self.external.is_none()
            && self.bad_tables.is_empty()
            && header.snapshot_count == 0
            && header.crypt_method == 0
            && header.extensions.bitmaps.is_none()
            && header.extensions.crypto_header.is_none()
    }

    /// ME1.
    async fn empty_at_once(&self, layers: &Layers) -> Result<()> {
        let (offset, entries) = self.l1.place();
        for index in 0..entries {
            if self.l1.get(index) != 0 {
                self.l1.set(index, 0);
            }
        }
        self.flush(layers).await?;
        // The tables that they are of are gone.
        self.slices.clear();
        debug_assert!((0..entries).all(|index| self.l1.get(index) == 0), "ME1");
        let used = self.refcounts.count_only((offset, entries * 8));
        self.between_rounds(async || self.full_round(layers).await).await?;
        self.discard_gaps(layers, &used).await;
        Ok(())
    }

    /// Tells the file that it need not keep what lies between these clusters.
    async fn discard_gaps(&self, layers: &Layers, used: &[u64]) {
        let bits = self.geometry.cluster_bits();
        for pair in used.windows(2) {
            let &[before, after] = pair else { continue };
            let (start, end) = ((before + 1) << bits, after << bits);
            // A hint.
            if start < end
                && let Err(error) = layers.file.discard(start, end - start).await
            {
                tracing::debug!(%error, start, "the file did not take a discard");
            }
        }
    }
}
