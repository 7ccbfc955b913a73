//! The bytes of a fresh image: header, refcount table, refcount blocks, L1 table, in that order
//! and without a gap, as the peer lays them out.
//!
//! The layout is computed as a whole before anything is written, so that a large L1 table gets
//! all the refcount blocks that it needs at once, and an option that cannot be is refused while
//! there is still nothing to undo. Nothing is preallocated here.

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

use super::encryption::CreateEncryption;
use super::extension::{CryptoHeaderExtension, MAX_BACKING_FORMAT_BYTES, MAX_FILE_NAME_BYTES};
use super::format_error::{FormatError, FormatErrorKind, Place, escaped};
use super::geometry::{
    Geometry, MAX_CLUSTER_BITS, MIN_CLUSTER_BITS, MIN_EXTENDED_L2_CLUSTER_BITS, TABLE_ENTRY_BYTES,
};
use super::header::{CompressionType, Header, Version, encryption, feature};
use super::refcount_block;
use crate::crypto::luks;
use blockplex_graph::Preallocation;
use std::ops::Range;

/// What a new image should be. The names are those of the peer's creation options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// The bytes of the virtual disk, a multiple of 512.
    pub size: u64,
    /// `compat`: the format version.
    pub version: Version,
    /// The bytes of a cluster: a power of two, 512 to 2 MiB.
    pub cluster_size: u64,
    /// `extended_l2`: whether clusters have 32 subclusters; needs clusters of 16 KiB or more.
    pub extended_l2: bool,
    /// The bits of a refcount: a power of two, 1 to 64.
    pub refcount_bits: u32,
    /// How compressed clusters will be compressed.
    pub compression_type: CompressionType,
    /// Whether refcounts may be written late.
    pub lazy_refcounts: bool,
    /// `backing_file`: the name of the backing file.
    pub backing_name: Option<Vec<u8>>,
    /// `backing_fmt`: its format; must be given with a backing file, only then.
    pub backing_format: Option<Vec<u8>>,
    /// `data_file`: the name of the external data file, as it is to stand in the image.
    pub data_file: Option<Vec<u8>>,
    /// `data_file_raw`: whether that file must be a whole raw image at all times.
    pub data_file_raw: bool,
    /// `encrypt.*`: how the guest's data will be encrypted.
    pub encryption: Option<CreateEncryption>,
    /// What is done about the space of the disk.
    pub preallocation: Preallocation,
}

impl CreateOptions {
    /// The defaults of the peer: version 3, clusters of 64 KiB, 16-bit refcounts, deflate.
    pub fn new(size: u64) -> Self {
        CreateOptions {
            size,
            version: Version::V3,
            cluster_size: 65536,
            extended_l2: false,
            refcount_bits: 16,
            compression_type: CompressionType::Deflate,
            lazy_refcounts: false,
            backing_name: None,
            backing_format: None,
            data_file: None,
            data_file_raw: false,
            encryption: None,
            preallocation: Preallocation::Off,
        }
    }
}

/// A fresh image, ready to be written.
///
/// Write the header (the first of [`ImageLayout::writes`]) last, after a flush: until then the
/// file is no qcow2 image, afterwards it is a whole one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageLayout {
    /// The header.
    pub header: Header,
    /// File offset in bytes and contents, in ascending order: header, refcount table, refcount
    /// blocks. All of whole clusters.
    pub writes: Vec<(u64, Vec<u8>)>,
    /// The bytes of the file that must read as zeros: the L1 table. In a file that was just
    /// created they do, once it has its length.
    pub zeros: Range<u64>,
    /// The bytes that the file must have: like the peer's, it ends with the last L1 entry, or with
    /// the cluster of a key header behind that.
    pub file_length: u64,
}

/// How many clusters each structure has, the header being one.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Sizes {
    refcount_table: u64,
    refcount_blocks: u64,
    l1_table: u64,
    encryption_header: u64,
}

impl ImageLayout {
    /// The layout of an image with these options. Any thread may call this.
    ///
    /// # Errors
    ///
    /// [`FormatErrorKind::InvalidOption`] when an option is out of range or contradicts another;
    /// [`FormatErrorKind::NoSpace`] when the names do not fit into the header cluster.
    pub fn new(options: &CreateOptions) -> Result<Self, FormatError> {
        let geometry = checked_geometry(options)?;
        check_version(options)?;
        check_backing(options)?;
        check_data_file(options)?;
        check_encryption(options)?;
        let sizes = sizes(options, &geometry);
        let header = header(options, &geometry, sizes);
        let mut writes = vec![(0, header.to_bytes()?)];
        writes.extend(refcount_structures(&geometry, sizes));
        let whole = sizes.total() * geometry.cluster_size();
        let zeros = whole - sizes.zeros() * geometry.cluster_size();
        let file_length = match sizes.encryption_header {
            0 => zeros + u64::from(header.l1_size) * TABLE_ENTRY_BYTES,
            _ => whole,
        };
        Ok(ImageLayout { header, writes, zeros: zeros..file_length, file_length })
    }
}

impl Sizes {
    /// Clusters of the image.
    fn total(&self) -> u64 {
        1 + self.refcount_table + self.refcount_blocks + self.zeros()
    }

    /// Clusters at the end of the image that hold zeros.
    fn zeros(&self) -> u64 {
        self.l1_table + self.encryption_header
    }
}

fn invalid(field: &'static str, value: impl ToString, rule: impl Into<String>) -> FormatError {
    FormatError::text(field, value.to_string(), Place::Elsewhere, rule)
        .of_kind(FormatErrorKind::InvalidOption)
}

fn checked_geometry(options: &CreateOptions) -> Result<Geometry, FormatError> {
    let CreateOptions { size, cluster_size, refcount_bits, .. } = *options;
    let cluster_range = 1_u64 << MIN_CLUSTER_BITS..=1_u64 << MAX_CLUSTER_BITS;
    if !cluster_size.is_power_of_two() || !cluster_range.contains(&cluster_size) {
        let rule = "is not a power of two from 512 to 2097152";
        return Err(invalid("cluster_size", cluster_size, rule));
    }
    if !refcount_bits.is_power_of_two() || refcount_bits > 64 {
        let rule = "is not a power of two from 1 to 64";
        return Err(invalid("refcount_bits", refcount_bits, rule));
    }
    let bits = cluster_size.trailing_zeros();
    if options.extended_l2 && bits < MIN_EXTENDED_L2_CLUSTER_BITS {
        let rule =
            format!("needs a cluster_size of at least {}", 1 << MIN_EXTENDED_L2_CLUSTER_BITS);
        return Err(invalid("extended_l2", "on", rule));
    }
    let geometry = Geometry::new(bits, refcount_bits.trailing_zeros(), options.extended_l2)?
        .with_external_data(options.data_file.is_some());
    if !size.is_multiple_of(512) {
        return Err(invalid("size", size, "is not a multiple of 512"));
    }
    if size > geometry.max_guest_size() {
        let most = geometry.max_guest_size();
        let rule = format!("exceeds {most}, the most with clusters of {cluster_size} bytes");
        return Err(invalid("size", size, rule));
    }
    Ok(geometry)
}

fn check_version(options: &CreateOptions) -> Result<(), FormatError> {
    let needs_v3 = "needs version 3 (compat=1.1)";
    if options.version >= Version::V3 {
        return Ok(());
    }
    if options.lazy_refcounts {
        return Err(invalid("lazy_refcounts", "on", needs_v3));
    }
    if options.refcount_bits != 16 {
        return Err(invalid("refcount_bits", options.refcount_bits, needs_v3));
    }
    if options.extended_l2 {
        return Err(invalid("extended_l2", "on", needs_v3));
    }
    if options.data_file.is_some() {
        return Err(invalid("data_file", "a name", needs_v3));
    }
    if options.compression_type == CompressionType::Zstd {
        return Err(invalid("compression_type", "zstd", needs_v3));
    }
    Ok(())
}

fn check_backing(options: &CreateOptions) -> Result<(), FormatError> {
    // What is allocated hides the backing file; only subclusters do not.
    let hides = options.preallocation != Preallocation::Off && !options.extended_l2;
    if hides && options.backing_name.is_some() {
        let rule = "goes with a backing file only if extended_l2 is on";
        return Err(invalid("preallocation", options.preallocation.name(), rule));
    }
    match (&options.backing_name, &options.backing_format) {
        (None, None) => Ok(()),
        (None, Some(format)) => {
            Err(invalid("backing_fmt", escaped(format), "is given without backing_file"))
        }
        // Guessing a format lets the contents of a raw image decide what is opened.
        (Some(name), None) => {
            Err(invalid("backing_file", escaped(name), "is given without backing_fmt"))
        }
        (Some(_), Some(format)) => {
            let bytes = 1..=MAX_BACKING_FORMAT_BYTES;
            if bytes.contains(&format.len()) && !format.contains(&0) {
                return Ok(());
            }
            let rule = format!("is not 1 to {MAX_BACKING_FORMAT_BYTES} bytes without NUL");
            Err(invalid("backing_fmt", escaped(format), rule))
        }
    }
}

fn check_data_file(options: &CreateOptions) -> Result<(), FormatError> {
    let Some(name) = &options.data_file else {
        return match options.data_file_raw {
            true => Err(invalid("data_file_raw", "on", "needs data_file")),
            false => Ok(()),
        };
    };
    if !(1..=MAX_FILE_NAME_BYTES).contains(&name.len()) || name.contains(&0) {
        let rule = format!("is not 1 to {MAX_FILE_NAME_BYTES} bytes without NUL");
        return Err(invalid("data_file", escaped(name), rule));
    }
    // A raw image shows nothing of a backing file.
    if options.data_file_raw && options.backing_name.is_some() {
        return Err(invalid("data_file_raw", "on", "does not go with backing_file"));
    }
    Ok(())
}

fn check_encryption(options: &CreateOptions) -> Result<(), FormatError> {
    let Some(encryption) = &options.encryption else { return Ok(()) };
    if let CreateEncryption::Luks(luks) = encryption
        && let Err(error) = luks.suite.check()
    {
        return Err(invalid("encrypt", "options", format!("do not go together: {error}")));
    }
    // Such an image shows the disk without this format, which would show ciphertext.
    if options.data_file_raw {
        return Err(invalid("data_file_raw", "on", "does not go with encryption"));
    }
    // Space that nothing was written to would be read as noise.
    let reserves = options.preallocation != Preallocation::Off;
    if reserves && options.version < Version::V3 {
        let rule = "goes with encryption only in version 3";
        return Err(invalid("preallocation", options.preallocation.name(), rule));
    }
    Ok(())
}

/// The smallest refcount structures that count themselves and everything else.
fn sizes(options: &CreateOptions, geometry: &Geometry) -> Sizes {
    let l1_bytes = geometry.l1_entries_for(options.size) * TABLE_ENTRY_BYTES;
    let mut sizes = Sizes {
        refcount_table: 1,
        refcount_blocks: 1,
        l1_table: geometry.clusters_for(l1_bytes),
        encryption_header: geometry.clusters_for(encryption_header_bytes(options)),
    };
    // Each round can only grow, by ever less: a block counts at least 64 clusters. The largest
    // case (512-byte clusters, 64-bit refcounts, 2^16 clusters of L1) has 1,041 blocks, far from
    // the limit of the table.
    loop {
        let blocks = sizes.total().div_ceil(geometry.refcounts_per_block());
        let next = Sizes {
            refcount_table: geometry.clusters_for(blocks * TABLE_ENTRY_BYTES),
            refcount_blocks: blocks,
            ..sizes
        };
        if next == sizes {
            return sizes;
        }
        sizes = next;
    }
}

fn header(options: &CreateOptions, geometry: &Geometry, sizes: Sizes) -> Header {
    let cluster_size = geometry.cluster_size();
    let mut header = Header::new(*geometry, options.version, options.size);
    header.compression_type = options.compression_type;
    if options.compression_type == CompressionType::Zstd {
        header.incompatible_features |= feature::COMPRESSION_TYPE;
    }
    if options.lazy_refcounts {
        header.compatible_features |= feature::LAZY_REFCOUNTS;
    }
    if options.extended_l2 {
        header.incompatible_features |= feature::EXTENDED_L2;
    }
    if options.data_file.is_some() {
        header.incompatible_features |= feature::DATA_FILE;
        header.extensions.data_file_name.clone_from(&options.data_file);
    }
    if options.data_file_raw {
        header.autoclear_features |= feature::RAW_DATA_FILE;
    }
    header.backing_name.clone_from(&options.backing_name);
    header.extensions.backing_format.clone_from(&options.backing_format);
    header.refcount_table_offset = cluster_size;
    // Both fit: at most 2^22 entries and a few clusters.
    header.refcount_table_clusters = sizes.refcount_table as u32;
    header.l1_size = geometry.l1_entries_for(options.size) as u32;
    if header.l1_size > 0 {
        let before = 1 + sizes.refcount_table + sizes.refcount_blocks;
        header.l1_table_offset = before * cluster_size;
    }
    header.crypt_method = match &options.encryption {
        None => encryption::NONE,
        Some(CreateEncryption::Aes(_)) => encryption::AES,
        Some(CreateEncryption::Luks(_)) => encryption::LUKS,
    };
    let length = encryption_header_bytes(options);
    header.extensions.crypto_header = (length > 0).then(|| CryptoHeaderExtension {
        offset: (sizes.total() - sizes.encryption_header) * cluster_size,
        length,
    });
    header
}

/// Bytes of the LUKS header; 0 without one.
fn encryption_header_bytes(options: &CreateOptions) -> u64 {
    match &options.encryption {
        Some(CreateEncryption::Luks(luks)) => luks::header_bytes(&luks.suite),
        Some(CreateEncryption::Aes(_)) | None => 0,
    }
}

/// The refcount table and its blocks, with their offsets.
fn refcount_structures(geometry: &Geometry, sizes: Sizes) -> Vec<(u64, Vec<u8>)> {
    let cluster_size = geometry.cluster_size();
    let first_block = (1 + sizes.refcount_table) * cluster_size;
    let offsets = (0..sizes.refcount_blocks).map(|block| first_block + block * cluster_size);
    let mut table: Vec<u8> = offsets.clone().flat_map(u64::to_be_bytes).collect();
    table.resize((sizes.refcount_table * cluster_size) as usize, 0);
    let mut writes = vec![(cluster_size, table)];
    let mut uncounted = sizes.total();
    for offset in offsets {
        let counted = uncounted.min(geometry.refcounts_per_block());
        uncounted -= counted;
        writes.push((offset, block_of_ones(geometry, counted as usize)));
    }
    writes
}

/// A refcount block whose first `count` refcounts are 1.
fn block_of_ones(geometry: &Geometry, count: usize) -> Vec<u8> {
    let mut block = vec![0; geometry.cluster_size() as usize];
    for index in 0..count {
        refcount_block::set(&mut block, geometry.refcount_order(), index, 1)
            .expect("count is at most the refcounts of a block, and 1 fits any width");
    }
    block
}

#[cfg(test)]
mod tests;
