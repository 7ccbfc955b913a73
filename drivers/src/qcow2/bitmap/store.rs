//! Writing the persistent bitmaps: that they are in use, and at the end what they hold.

use super::{Bitmap, Stored};
use crate::dirty_bitmap::DirtyBitmap;
use crate::qcow2::Qcow2;
use crate::qcow2::bitmap_directory::{BitmapCluster, BitmapEntry, write_directory};
use crate::qcow2::extension::BitmapsExtension;
use crate::qcow2::geometry::TABLE_ENTRY_BYTES;
use crate::qcow2::header::{Header, feature};
use crate::qcow2::layers::Layers;
use crate::qcow2::overlap::Structure;
use crate::qcow2::refcounts::HostRun;
use blockplex_graph::{Child, Error, RequestFlags, Result};
use blockplex_io::buffer::IoBuffer;

/// Clusters in a row, as they are given back.
type Run = (u64, u64);

impl Qcow2 {
    /// Marks every stored bitmap in the directory as in use, durably (P1). With the header.
    pub(in crate::qcow2) async fn mark_bitmaps_in_use(
        &self,
        file: &Child,
        header: &Header,
    ) -> Result<()> {
        let Some(place) = header.consistent_bitmaps() else { return Ok(()) };
        let entries: Vec<BitmapEntry> = {
            let state = self.bitmaps.state.lock();
            let stored = state.list.iter().filter_map(|bitmap| bitmap.stored.as_ref());
            stored.map(|stored| BitmapEntry { in_use: true, ..stored.entry.clone() }).collect()
        };
        let bytes = write_directory(entries.iter());
        // The same entries with other flags have the same length.
        debug_assert_eq!(bytes.len() as u64, place.directory_size, "another directory");
        let buffer = IoBuffer::from_slice(&bytes);
        file.write(place.directory_offset, buffer, RequestFlags::default()).await?;
        file.flush().await
    }

    /// Stores all persistent bitmaps (P2), if the image was prepared for writing, so that what the
    /// file has of them is out of date.
    pub(in crate::qcow2) async fn store_bitmaps(&self, layers: &Layers) -> Result<()> {
        let (list, obsolete) = {
            let state = self.bitmaps.state.lock();
            (state.list.clone(), state.obsolete.clone())
        };
        let is_stored = list.iter().any(|bitmap| bitmap.persistent || bitmap.stored.is_some());
        if !self.may_write_now() || !is_stored && obsolete.is_empty() {
            return Ok(());
        }
        let mut new: Vec<Run> = Vec::new();
        match self.write_bitmaps(layers, &list, &mut new).await {
            Ok((entries, place)) => {
                self.name_directory(layers, entries.len() as u32, place).await?;
                let old = self.obsolete_runs(layers, &list, obsolete).await;
                self.give_back(layers, old).await;
                self.bitmaps.state.lock().obsolete.clear();
                Ok(())
            }
            Err(error) => {
                self.give_back(layers, new).await;
                Err(error)
            }
        }
    }

    /// Writes bits, tables and directory to new places, and makes them durable. `new` gets the
    /// clusters.
    async fn write_bitmaps(
        &self,
        layers: &Layers,
        list: &[Bitmap],
        new: &mut Vec<Run>,
    ) -> Result<(Vec<BitmapEntry>, Option<(HostRun, u64)>)> {
        let mut entries = Vec::new();
        for bitmap in list.iter().filter(|bitmap| bitmap.persistent) {
            match (&bitmap.bits, &bitmap.stored) {
                (Some(bits), _) => {
                    entries.push(self.write_bitmap(layers, bitmap, bits, new).await?);
                }
                // It stays what it is: of no use, until somebody removes it.
                (None, Some(stored)) => entries.push(stored.entry.clone()),
                (None, None) => {}
            }
        }
        let mut place = None;
        if !entries.is_empty() {
            let bytes = write_directory(entries.iter());
            let length = bytes.len() as u64;
            let run = self.write_new_metadata(layers, Structure::BitmapDirectory, bytes).await?;
            new.push((run.offset, run.clusters));
            place = Some((run, length));
        }
        self.flush(layers).await?;
        Ok((entries, place))
    }

    async fn write_bitmap(
        &self,
        layers: &Layers,
        bitmap: &Bitmap,
        bits: &DirtyBitmap,
        new: &mut Vec<Run>,
    ) -> Result<BitmapEntry> {
        let cluster_size = self.geometry.cluster_size();
        let per_cluster = cluster_size * 8;
        let count = bits.chunks().div_ceil(per_cluster).max(1);
        let mut table = Vec::with_capacity((count * TABLE_ENTRY_BYTES) as usize);
        for index in 0..count {
            let cluster = match bits.bytes_at(index * per_cluster, cluster_size as usize) {
                None => BitmapCluster::Zeros,
                Some(bytes) if bytes.iter().all(|byte| *byte == 0xff) => BitmapCluster::Ones,
                Some(bytes) => {
                    let run = self.write_new_cluster(layers, bytes).await?;
                    new.push((run.offset, 1));
                    BitmapCluster::Stored(run.offset)
                }
            };
            table.extend(cluster.encode().to_be_bytes());
        }
        let run = self.write_new_metadata(layers, Structure::Other, table).await?;
        new.push((run.offset, run.clusters));
        Ok(BitmapEntry {
            table_offset: run.offset,
            // At most 2^29 bytes of bits in clusters of 2^9 bytes or more.
            table_entries: count as u32,
            in_use: false,
            auto: bitmap.recording,
            granularity_bits: bitmap.granularity_bits,
            name: bitmap.name.clone(),
        })
    }

    /// Writes one cluster of metadata where there is room.
    async fn write_new_cluster(&self, layers: &Layers, bytes: Vec<u8>) -> Result<HostRun> {
        let allocated = self.refcounts.allocate(&layers.file, 1).await;
        let run = self.judge(&layers.file, allocated).await?;
        let buffer = IoBuffer::from_slice(&bytes);
        match layers.file.write(run.offset, buffer, RequestFlags::default()).await {
            Ok(()) => {
                self.refcounts.add_metadata_cluster(Structure::Other, run.offset);
                Ok(run)
            }
            Err(error) => Err(self.abandon(layers, run, error).await),
        }
    }

    /// Makes the header name the new directory, which is durable, or none; the old one is given
    /// back.
    async fn name_directory(
        &self,
        layers: &Layers,
        count: u32,
        place: Option<(HostRun, u64)>,
    ) -> Result<()> {
        let mut old = None;
        let extension = place.map(|(run, length)| BitmapsExtension {
            count,
            reserved: 0,
            directory_size: length,
            directory_offset: run.offset,
        });
        self.update_header(&layers.file, |header| {
            old = header.consistent_bitmaps().copied();
            match extension {
                Some(_) => header.autoclear_features |= feature::BITMAPS,
                None => header.autoclear_features &= !feature::BITMAPS,
            }
            header.extensions.bitmaps = extension;
            Ok(())
        })
        .await?;
        if let Some(old) = old {
            let clusters = self.geometry.clusters_for(old.directory_size);
            self.give_back(layers, vec![(old.directory_offset, clusters)]).await;
        }
        Ok(())
    }

    /// The clusters of what was stored before and is not any more.
    async fn obsolete_runs(
        &self,
        layers: &Layers,
        list: &[Bitmap],
        mut obsolete: Vec<Stored>,
    ) -> Vec<Run> {
        let replaced = list.iter().filter(|bitmap| bitmap.bits.is_some() || !bitmap.persistent);
        obsolete.extend(replaced.filter_map(|bitmap| bitmap.stored.clone()));
        let mut runs = Vec::new();
        for Stored { entry, clusters } in obsolete {
            let table_bytes = u64::from(entry.table_entries) * TABLE_ENTRY_BYTES;
            let table = (entry.table_offset, self.geometry.clusters_for(table_bytes));
            match clusters {
                Some(clusters) => {
                    runs.push(table);
                    runs.extend(clusters.into_iter().map(|offset| (offset, 1)));
                }
                None => match self.unchecked_runs(layers, &entry, table).await {
                    Ok(found) => runs.extend(found),
                    Err(error) => {
                        tracing::warn!(%error, "the clusters of a removed bitmap are left as leaks");
                    }
                },
            }
        }
        runs
    }

    /// The clusters of a bitmap that was not loaded, since it was in use: as far as they are in the
    /// file and nothing else was seen to use them.
    async fn unchecked_runs(
        &self,
        layers: &Layers,
        entry: &BitmapEntry,
        table: Run,
    ) -> Result<Vec<Run>> {
        let table_bytes = u64::from(entry.table_entries) * TABLE_ENTRY_BYTES;
        let bytes = super::load::read(&layers.file, entry.table_offset, table_bytes).await?;
        let mut runs = Vec::new();
        let bits = self.geometry.cluster_bits();
        let clusters = (0..table.1).map(|at| Some(BitmapCluster::Stored(table.0 + (at << bits))));
        let words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word));
        let stored = words.map(|raw| BitmapCluster::decode(raw, &self.geometry));
        for cluster in clusters.chain(stored) {
            if let Some(BitmapCluster::Stored(offset)) = cluster
                && offset + self.geometry.cluster_size() <= layers.file.length()
                && self.refcounts.refcount(&layers.file, offset).await? > 0
                && self.refcounts.add_metadata_cluster(Structure::Other, offset)
            {
                runs.push((offset, 1));
            }
        }
        Ok(runs)
    }

    /// One reference less to clusters that nothing names any more. What fails is lost to the image.
    async fn give_back(&self, layers: &Layers, runs: Vec<Run>) {
        for (offset, clusters) in runs {
            let released = self.refcounts.release(&layers.file, offset, clusters).await;
            if let Err(error) = self.judge(&layers.file, released).await {
                let error: Error = error;
                tracing::warn!(%error, offset, "clusters of a bitmap are lost");
            }
        }
    }
}
