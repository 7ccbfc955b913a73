//! The fixed fields of a header as they stand in the file, and the rules that concern one of
//! them alone.

use super::CompressionType;
use super::feature;
use crate::qcow2::entry::Version;
use crate::qcow2::extension::{MAX_FILE_NAME_BYTES, be32, be64};
use crate::qcow2::format_error::{FormatError, FormatErrorKind, Place, escaped};
use crate::qcow2::geometry::{MAX_CLUSTER_BITS, MIN_CLUSTER_BITS};

pub(super) const MAGIC: u32 = 0x5146_49fb;
/// The bytes of a version 2 header.
pub(super) const V2_LENGTH: u32 = 72;
/// The fewest bytes of a version 3 header.
const V3_MIN_LENGTH: u32 = 104;
/// The bytes of all fields that are known, as they are written.
pub(super) const V3_LENGTH: u32 = 112;
/// Where the compression type is, in headers that have it.
const COMPRESSION_TYPE_AT: usize = 104;
/// The refcount order of version 2: 16 bits.
const V2_REFCOUNT_ORDER: u32 = 4;

/// The fields, unchecked but for magic, version and cluster size.
pub(super) struct Fields {
    pub(super) version: Version,
    pub(super) backing_offset: u64,
    backing_length: u32,
    pub(super) cluster_bits: u32,
    pub(super) size: u64,
    pub(super) crypt_method: u32,
    pub(super) l1_size: u32,
    pub(super) l1_table_offset: u64,
    pub(super) refcount_table_offset: u64,
    pub(super) refcount_table_clusters: u32,
    pub(super) snapshot_count: u32,
    pub(super) snapshots_offset: u64,
    pub(super) incompatible_features: u64,
    pub(super) compatible_features: u64,
    pub(super) autoclear_features: u64,
    pub(super) refcount_order: u32,
    pub(super) header_length: u32,
    compression_type: u8,
}

/// The cluster size of the image that begins with `bytes`.
pub(super) fn cluster_bits(bytes: &[u8]) -> Result<u32, FormatError> {
    version(bytes)?;
    let bits = word(bytes, 20)?;
    if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&bits) {
        let rule = format!("is not in {MIN_CLUSTER_BITS}..={MAX_CLUSTER_BITS}");
        return Err(FormatError::number("cluster_bits", bits.into(), Place::Header(20), rule));
    }
    Ok(bits)
}

fn version(bytes: &[u8]) -> Result<Version, FormatError> {
    let magic = word(bytes, 0).map_err(|error| error.of_kind(FormatErrorKind::OtherFormat))?;
    if magic != MAGIC {
        let rule = format!("is not {MAGIC:#x}: this is not a qcow2 image");
        return Err(FormatError::hex("magic", magic.into(), Place::Header(0), rule)
            .of_kind(FormatErrorKind::OtherFormat));
    }
    match word(bytes, 4)? {
        2 => Ok(Version::V2),
        3 => Ok(Version::V3),
        other => {
            let rule = "is not 2 or 3";
            Err(FormatError::number("qcow version", other.into(), Place::Header(4), rule)
                .of_kind(FormatErrorKind::Unsupported))
        }
    }
}

impl Fields {
    pub(super) fn read(bytes: &[u8]) -> Result<Self, FormatError> {
        let version = version(bytes)?;
        let mut fields = Fields {
            version,
            backing_offset: long(bytes, 8)?,
            backing_length: word(bytes, 16)?,
            cluster_bits: cluster_bits(bytes)?,
            size: long(bytes, 24)?,
            crypt_method: word(bytes, 32)?,
            l1_size: word(bytes, 36)?,
            l1_table_offset: long(bytes, 40)?,
            refcount_table_offset: long(bytes, 48)?,
            refcount_table_clusters: word(bytes, 56)?,
            snapshot_count: word(bytes, 60)?,
            snapshots_offset: long(bytes, 64)?,
            incompatible_features: 0,
            compatible_features: 0,
            autoclear_features: 0,
            refcount_order: V2_REFCOUNT_ORDER,
            header_length: V2_LENGTH,
            compression_type: 0,
        };
        if version >= Version::V3 {
            fields.incompatible_features = long(bytes, 72)?;
            fields.compatible_features = long(bytes, 80)?;
            fields.autoclear_features = long(bytes, 88)?;
            fields.refcount_order = word(bytes, 96)?;
            fields.header_length = word(bytes, 100)?;
            if fields.header_length as usize > COMPRESSION_TYPE_AT {
                let byte = bytes.get(COMPRESSION_TYPE_AT).copied();
                fields.compression_type = byte.ok_or_else(|| cut_short(bytes))?;
            }
        }
        Ok(fields)
    }

    pub(super) fn check_length(&self, cluster_size: usize) -> Result<(), FormatError> {
        let length = self.header_length;
        let refuse = |rule: String| {
            let place = Place::Header(100);
            Err(FormatError::number("header length", length.into(), place, rule))
        };
        if self.version < Version::V3 {
            return Ok(());
        }
        if length < V3_MIN_LENGTH {
            return refuse(format!("is less than {V3_MIN_LENGTH}"));
        }
        if length as usize > cluster_size {
            return refuse(format!("exceeds the cluster size {cluster_size}"));
        }
        if !length.is_multiple_of(8) {
            return refuse("is not a multiple of 8".to_owned());
        }
        Ok(())
    }

    pub(super) fn compression(&self) -> Result<CompressionType, FormatError> {
        let flagged = self.incompatible_features & feature::COMPRESSION_TYPE != 0;
        let rule = match (self.compression_type, flagged) {
            (0, false) => return Ok(CompressionType::Deflate),
            (1, true) => return Ok(CompressionType::Zstd),
            (0, true) => "is 0 (zlib) although incompatible feature bit 3 is set",
            (1, false) => "is 1 (zstd) although incompatible feature bit 3 is clear",
            _ => "is not 0 (zlib) or 1 (zstd)",
        };
        let place = Place::Header(COMPRESSION_TYPE_AT as u64);
        Err(FormatError::number("compression type", self.compression_type.into(), place, rule))
    }

    /// The fields past those that are known.
    pub(super) fn unknown(&self, bytes: &[u8]) -> Result<Vec<u8>, FormatError> {
        let length = self.header_length as usize;
        let header = bytes.get(..length).ok_or_else(|| cut_short(bytes))?;
        Ok(header.get(V3_LENGTH as usize..).unwrap_or(&[]).to_vec())
    }

    pub(super) fn backing_name(
        &self,
        bytes: &[u8],
        cluster_size: usize,
    ) -> Result<Option<Vec<u8>>, FormatError> {
        let (offset, length) = (self.backing_offset, self.backing_length);
        let bad_length = |rule: String| {
            let field = "backing file name length";
            Err(FormatError::number(field, length.into(), Place::Header(16), rule))
        };
        if offset == 0 && length == 0 {
            return Ok(None);
        }
        if length == 0 {
            return bad_length(format!("is 0 although the name has the offset {offset:#x}"));
        }
        if offset == 0 {
            return bad_length("is not 0 although the name has no offset".to_owned());
        }
        if length as usize > MAX_FILE_NAME_BYTES {
            return bad_length(format!("exceeds {MAX_FILE_NAME_BYTES}"));
        }
        let cluster = cluster_size as u64;
        let place = Place::Header(8);
        let end = offset.checked_add(length.into()).filter(|&end| end <= cluster);
        if end.is_none() || offset < self.header_length.into() {
            let rule = format!(
                "with length {length} is not between the header fields ({} bytes) and the end of \
                 the first cluster ({cluster} bytes)",
                self.header_length
            );
            return Err(FormatError::hex("backing file name offset", offset, place, rule));
        }
        // Both are at most the cluster size.
        let start = offset as usize;
        let name = bytes.get(start..start + length as usize).ok_or_else(|| cut_short(bytes))?;
        if name.contains(&0) {
            let rule = "contains a NUL byte";
            return Err(FormatError::text("backing file name", escaped(name), place, rule));
        }
        Ok(Some(name.to_vec()))
    }
}

fn word(bytes: &[u8], at: usize) -> Result<u32, FormatError> {
    be32(bytes, at).ok_or_else(|| cut_short(bytes))
}

fn long(bytes: &[u8], at: usize) -> Result<u64, FormatError> {
    be64(bytes, at).ok_or_else(|| cut_short(bytes))
}

fn cut_short(bytes: &[u8]) -> FormatError {
    let rule = "bytes is cut short";
    FormatError::number("header of", bytes.len() as u64, Place::Header(0), rule)
}
