//! The qcow2 header: from bytes, with every rule checked, and back to bytes.
//!
//! A header is judged at one place, here, so that the driver never meets an impossible one.
//! There are three outcomes, and each names the field (Q3):
//!
//! - [`Header::parse`] fails: the image cannot be opened at all.
//! - [`Header::read_only_reasons`]: reading is safe, writing is not; the driver refuses it.
//! - [`Header::warnings`]: strange, but harmless.
//!
//! Unknown *incompatible* features do not parse: they may change what any other field means.
//!
//! What is deliberately not here: the snapshot table and the bitmap directory are not read (only
//! where they claim to be is checked), and whether the refcounts of the metadata are right is
//! the driver's question.
//!
//! | part | what it does |
//! |---|---|
//! | [`feature`] | the feature bits and their names |
//! | `fields` | fixed fields from bytes |
//! | `rules` | the rules between fields, and between fields and the file |
//! | `write` | the way back |

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

pub mod feature;
mod fields;
mod rules;
mod write;

pub use super::entry::Version;

use super::extension::Extensions;
use super::format_error::FormatError;
use super::geometry::Geometry;
use fields::Fields;

/// The most internal snapshots of an image.
pub const MAX_SNAPSHOTS: u32 = 65536;
/// The fewest bytes of an entry of the snapshot table.
pub const MIN_SNAPSHOT_ENTRY_BYTES: u64 = 40;
/// The least that must be read of a file for [`Header::cluster_bits_of`], in bytes.
pub const PROBE_BYTES: usize = 24;

/// How the compressed clusters of an image are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompressionType {
    /// Raw deflate; the format calls it `zlib`.
    Deflate,
    /// Zstandard; needs version 3.
    Zstd,
}

/// How a payload is encrypted.
pub mod encryption {
    /// Not at all.
    pub const NONE: u32 = 0;
    /// AES-CBC, the obsolete scheme.
    pub const AES: u32 = 1;
    /// LUKS, with its header in the image.
    pub const LUKS: u32 = 2;
}

/// A header. Plain data: who changes a field answers for it, [`Header::to_bytes`] refuses only
/// what cannot be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    geometry: Geometry,
    /// The format version.
    pub version: Version,
    /// The bytes of the virtual disk; need not be a multiple of anything.
    pub size: u64,
    /// See [`encryption`].
    pub crypt_method: u32,
    /// The entries of the L1 table.
    pub l1_size: u32,
    /// Where the L1 table is, in bytes; a cluster boundary.
    pub l1_table_offset: u64,
    /// Where the refcount table is, in bytes; a cluster boundary.
    pub refcount_table_offset: u64,
    /// The clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// The internal snapshots.
    pub snapshot_count: u32,
    /// Where the snapshot table is, in bytes; a cluster boundary. Means nothing without
    /// snapshots.
    pub snapshots_offset: u64,
    /// Features that a reader must know; see [`feature`]. The compression-type bit follows
    /// [`Header::compression_type`] when written.
    pub incompatible_features: u64,
    /// Features that need not be known; see [`feature`].
    pub compatible_features: u64,
    /// Features that a writer clears when it does not know them; see [`feature`]. Unknown bits
    /// stay here, so that a reader can show them, but are never written.
    pub autoclear_features: u64,
    /// How compressed clusters are compressed.
    pub compression_type: CompressionType,
    /// Header fields past those that are known, kept as they are; a multiple of 8 bytes.
    pub unknown_fields: Vec<u8>,
    /// The name of the backing file: not empty, without NUL, at most 1023 bytes, of any
    /// encoding.
    pub backing_name: Option<Vec<u8>>,
    /// The header extensions.
    pub extensions: Extensions,
    /// Why the image must not be written to. Empty when it may be.
    pub read_only_reasons: Vec<FormatError>,
    /// What is wrong without doing harm.
    pub warnings: Vec<FormatError>,
}

/// What a header is wanted for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// To use the image.
    Open,
    /// To check and perhaps repair it: what a repair rebuilds need not be there.
    Check,
}

impl Header {
    /// The header of a new image, with no tables, no features and no names.
    pub fn new(geometry: Geometry, version: Version, size: u64) -> Self {
        Header {
            geometry,
            version,
            size,
            crypt_method: encryption::NONE,
            l1_size: 0,
            l1_table_offset: 0,
            refcount_table_offset: 0,
            refcount_table_clusters: 0,
            snapshot_count: 0,
            snapshots_offset: 0,
            incompatible_features: 0,
            compatible_features: 0,
            autoclear_features: 0,
            compression_type: CompressionType::Deflate,
            unknown_fields: Vec::new(),
            backing_name: None,
            extensions: Extensions::default(),
            read_only_reasons: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// The base-2 logarithm of the cluster size, from the first [`PROBE_BYTES`] bytes of a file:
    /// so much must be read for [`Header::parse`]. Any thread may call this.
    ///
    /// # Errors
    ///
    /// This is no qcow2 image ([`FormatErrorKind::OtherFormat`](super::format_error::FormatErrorKind::OtherFormat)), not a known version, or the
    /// cluster size is out of range.
    pub fn cluster_bits_of(bytes: &[u8]) -> Result<u32, FormatError> {
        fields::cluster_bits(bytes)
    }

    /// The header in `bytes`, the first cluster of a file of `file_length` bytes (or as much of
    /// it as the file has; more is ignored). Any thread may call this.
    ///
    /// # Errors
    ///
    /// A field breaks a rule that even a reader depends on.
    pub fn parse(bytes: &[u8], file_length: u64) -> Result<Self, FormatError> {
        Self::parse_for(Purpose::Open, bytes, file_length)
    }

    /// Like [`Header::parse`], but an image without a refcount table, which a repair rebuilds,
    /// has it among its [`Header::read_only_reasons`] instead.
    ///
    /// # Errors
    ///
    /// As for [`Header::parse`].
    pub fn parse_for_check(bytes: &[u8], file_length: u64) -> Result<Self, FormatError> {
        Self::parse_for(Purpose::Check, bytes, file_length)
    }

    fn parse_for(purpose: Purpose, bytes: &[u8], file_length: u64) -> Result<Self, FormatError> {
        let fields = Fields::read(bytes)?;
        let extended_l2 = fields.incompatible_features & feature::EXTENDED_L2 != 0;
        let external_data = fields.incompatible_features & feature::DATA_FILE != 0;
        let geometry = Geometry::new(fields.cluster_bits, fields.refcount_order, extended_l2)?
            .with_external_data(external_data);
        // Nothing that the header speaks of lies past its cluster. At most 2 MiB: fits a usize.
        let cluster = geometry.cluster_size() as usize;
        let bytes = bytes.get(..cluster).unwrap_or(bytes);
        fields.check_length(cluster)?;
        let area_end = match fields.backing_offset {
            0 => cluster,
            // Past the cluster is refused with the name, below.
            offset => offset.min(cluster as u64) as usize,
        };
        let records = || super::extension::walk(bytes, fields.header_length as usize, area_end);
        feature::refuse_unknown(fields.incompatible_features, records)?;
        let mut header = Header {
            size: fields.size,
            crypt_method: fields.crypt_method,
            l1_size: fields.l1_size,
            l1_table_offset: fields.l1_table_offset,
            refcount_table_offset: fields.refcount_table_offset,
            refcount_table_clusters: fields.refcount_table_clusters,
            snapshot_count: fields.snapshot_count,
            snapshots_offset: fields.snapshots_offset,
            incompatible_features: fields.incompatible_features,
            compatible_features: fields.compatible_features,
            autoclear_features: fields.autoclear_features,
            compression_type: fields.compression()?,
            unknown_fields: fields.unknown(bytes)?,
            backing_name: fields.backing_name(bytes, cluster)?,
            extensions: Extensions::parse(records())?,
            ..Header::new(geometry, fields.version, 0)
        };
        header.check_rules(purpose, file_length)?;
        Ok(header)
    }

    /// Cluster and table arithmetic of this image.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Whether the refcounts may be wrong since the last writer did not get to close the image:
    /// they need a repair before the image is written to.
    pub fn is_dirty(&self) -> bool {
        self.incompatible_features & feature::DIRTY != 0
    }

    /// Whether a writer found the image corrupt. Such an image has a read-only reason, too.
    pub fn is_marked_corrupt(&self) -> bool {
        self.incompatible_features & feature::CORRUPT != 0
    }

    /// Whether the guest's data is in an external data file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible_features & feature::DATA_FILE != 0
    }

    /// Whether that file is to be a whole raw image at all times.
    pub fn has_raw_data_file(&self) -> bool {
        self.autoclear_features & feature::RAW_DATA_FILE != 0
    }

    /// Whether refcounts may be written late, under the dirty bit.
    pub fn has_lazy_refcounts(&self) -> bool {
        self.compatible_features & feature::LAZY_REFCOUNTS != 0
    }

    /// Where the persistent bitmaps are, if no writer that does not know them has made them
    /// stale.
    pub fn consistent_bitmaps(&self) -> Option<&super::extension::BitmapsExtension> {
        let consistent = self.autoclear_features & feature::BITMAPS != 0;
        self.extensions.bitmaps.as_ref().filter(|_| consistent)
    }
}

#[cfg(test)]
mod tests;
