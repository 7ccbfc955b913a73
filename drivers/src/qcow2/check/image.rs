//! The image that is checked: its header and its file, and nothing that a driver would keep.

use crate::qcow2::geometry::Geometry;
use crate::qcow2::header::{Header, PROBE_BYTES, Version, feature};
use blockplex_graph::{Child, RequestFlags, Result};
use blockplex_io::buffer::{IoBuffer, IoVector};

/// Bytes that are read at once.
const PIECE: u64 = 1 << 20;

/// The header field of the features that go when somebody writes who does not know them.
const AUTOCLEAR_FEATURES: u64 = 88;

/// See the page.
pub(in crate::qcow2) struct Image<'a> {
    pub(in crate::qcow2) file: &'a Child,
    pub(in crate::qcow2) header: Header,
    pub(in crate::qcow2) geometry: Geometry,
    /// Bytes of the file.
    pub(in crate::qcow2) length: u64,
}

impl<'a> Image<'a> {
    /// Reads the header, whatever is wrong with what a repair can rebuild.
    pub(in crate::qcow2) async fn open(file: &'a Child) -> Result<Image<'a>> {
        let length = file.length();
        let probe = read(file, 0, length.min(PROBE_BYTES as u64)).await?;
        let cluster_size = 1_u64 << Header::cluster_bits_of(&probe)?;
        let bytes = read(file, 0, length.min(cluster_size)).await?;
        let header = Header::parse_for_check(&bytes, length)?;
        let geometry = header.geometry();
        Ok(Image { file, header, geometry, length })
    }

    /// Leaves out the autoclear features that nobody here knows; says whether there are any. They
    /// are to be cleared in the file before anything else is written.
    pub(in crate::qcow2) fn forget_unknown_features(&mut self) -> bool {
        let kept = self.header.autoclear_features & feature::KNOWN_AUTOCLEAR;
        let all = std::mem::replace(&mut self.header.autoclear_features, kept);
        !self.is_version_2() && kept != all
    }

    /// Before the first write: features that nobody here knows may not stand what follows.
    pub(in crate::qcow2) async fn clear_unknown_features(&self) -> Result<()> {
        self.write(AUTOCLEAR_FEATURES, &self.header.autoclear_features.to_be_bytes()).await?;
        self.file.flush().await
    }

    /// Whether the disk's clusters are in another file.
    pub(super) fn has_data_file(&self) -> bool {
        self.header.incompatible_features & feature::DATA_FILE != 0
    }

    pub(super) fn is_version_2(&self) -> bool {
        self.header.version < Version::V3
    }

    /// Clusters that the file has a part of.
    pub(super) fn clusters(&self) -> u64 {
        self.geometry.clusters_for(self.length)
    }

    /// Whether `bytes` bytes at `offset` reach a whole cluster or more past the end: the file may
    /// end within its last cluster.
    pub(super) fn is_outside(&self, offset: u64, bytes: u64) -> bool {
        let limit = self.length.saturating_add(self.geometry.cluster_size());
        offset.checked_add(bytes).is_none_or(|end| end >= limit)
    }

    /// What stands at `offset`; past the end of the file, zeros.
    pub(in crate::qcow2) async fn read(&self, offset: u64, bytes: u64) -> Result<Vec<u8>> {
        read(self.file, offset, bytes).await
    }

    pub(in crate::qcow2) async fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file.write(offset, IoBuffer::from_slice(bytes), RequestFlags::default()).await
    }

    /// Calls `look` with every entry, and its index, of the table of `entries` entries at `offset`
    /// that lies in the file.
    pub(super) async fn for_each_entry(
        &self,
        offset: u64,
        entries: u64,
        mut look: impl FnMut(u64, u64),
    ) -> Result<()> {
        let mut index = 0;
        while index < entries {
            let count = (entries - index).min(PIECE / 8);
            let bytes = self.read(offset + index * 8, count * 8).await?;
            for (at, word) in (index..).zip(bytes.as_chunks::<8>().0) {
                look(at, u64::from_be_bytes(*word));
            }
            index += count;
        }
        Ok(())
    }
}

async fn read(file: &Child, offset: u64, bytes: u64) -> Result<Vec<u8>> {
    let memory = IoVector::zeroed(bytes as usize);
    file.read(offset, memory.clone()).await?;
    Ok(memory.to_vec())
}
