//! A header as bytes: always a whole cluster, so that nothing of an older header is left.

use super::fields::{MAGIC, V2_LENGTH, V3_LENGTH};
use super::{CompressionType, Header, Version, feature};
use crate::qcow2::extension::MAX_FILE_NAME_BYTES;
use crate::qcow2::format_error::{FormatError, FormatErrorKind, Place, escaped};

/// The largest clusters whose images get no feature-name table, as with the peer: the format does
/// not ask for one, and a backing-file name may need the room.
const MAX_CLUSTER_WITHOUT_NAMES: u64 = 4096;

impl Header {
    /// The first cluster of the file. Unknown autoclear bits are cleared, unknown compatible
    /// bits, fields and extensions are kept. Any thread may call this.
    ///
    /// # Errors
    ///
    /// [`FormatErrorKind::NoSpace`] when fields, extensions and backing-file name exceed a
    /// cluster; [`FormatErrorKind::InvalidOption`] for what version 2 has no field for, or a
    /// backing-file name that no reader accepts.
    pub fn to_bytes(&self) -> Result<Vec<u8>, FormatError> {
        self.check_writable()?;
        let cluster_size = self.geometry.cluster_size();
        let mut bytes = self.lay_out();
        if bytes.len() as u64 > cluster_size {
            let rule = format!("bytes exceeds the cluster of {cluster_size} bytes that it has");
            let length = bytes.len() as u64;
            return Err(FormatError::number("header of", length, Place::Header(0), rule)
                .of_kind(FormatErrorKind::NoSpace));
        }
        bytes.resize(cluster_size as usize, 0);
        Ok(bytes)
    }

    fn check_writable(&self) -> Result<(), FormatError> {
        let invalid = |field, value: String, rule: &str| {
            Err(FormatError::text(field, value, Place::Elsewhere, rule)
                .of_kind(FormatErrorKind::InvalidOption))
        };
        if let Some(name) = &self.backing_name
            && (name.is_empty() || name.len() > MAX_FILE_NAME_BYTES || name.contains(&0))
        {
            let rule = "is not 1 to 1023 bytes without NUL";
            return invalid("backing file name", escaped(name), rule);
        }
        if self.version >= Version::V3 {
            return Ok(());
        }
        let features = self.incompatible_features | self.compatible_features;
        if features | self.autoclear_features & feature::KNOWN_AUTOCLEAR != 0 {
            return invalid("features", format!("{features:#x}"), "need version 3 (compat=1.1)");
        }
        if self.geometry.refcount_bits() != 16 {
            let bits = self.geometry.refcount_bits().to_string();
            return invalid("refcount_bits", bits, "other than 16 needs version 3 (compat=1.1)");
        }
        if self.compression_type != CompressionType::Deflate {
            return invalid("compression_type", "zstd".into(), "needs version 3 (compat=1.1)");
        }
        Ok(())
    }

    /// Everything up to the end of the backing-file name.
    fn lay_out(&self) -> Vec<u8> {
        let roomy = self.geometry.cluster_size() > MAX_CLUSTER_WITHOUT_NAMES;
        let feature_names: &[_] = match self.version {
            Version::V3 if roomy => &feature::NAMES,
            _ => &[],
        };
        let mut tail = Vec::new();
        self.extensions.write(feature_names, &mut tail);
        let length = match self.version {
            Version::V2 => V2_LENGTH as usize,
            Version::V3 => V3_LENGTH as usize + self.unknown_fields.len(),
        };
        let name = self.backing_name.as_deref().unwrap_or_default();
        let name_offset = if name.is_empty() { 0 } else { length + tail.len() };
        let mut bytes = Vec::with_capacity(length + tail.len() + name.len());
        self.write_v2_fields(name_offset as u64, name.len() as u32, &mut bytes);
        if self.version >= Version::V3 {
            // A length that does not fit makes a header that exceeds its cluster.
            self.write_v3_fields(length as u32, &mut bytes);
        }
        bytes.extend(tail);
        bytes.extend(name);
        bytes
    }

    fn write_v2_fields(&self, name_offset: u64, name_length: u32, out: &mut Vec<u8>) {
        let version: u32 = match self.version {
            Version::V2 => 2,
            Version::V3 => 3,
        };
        out.extend(MAGIC.to_be_bytes());
        out.extend(version.to_be_bytes());
        out.extend(name_offset.to_be_bytes());
        out.extend(name_length.to_be_bytes());
        out.extend(self.geometry.cluster_bits().to_be_bytes());
        out.extend(self.size.to_be_bytes());
        out.extend(self.crypt_method.to_be_bytes());
        out.extend(self.l1_size.to_be_bytes());
        out.extend(self.l1_table_offset.to_be_bytes());
        out.extend(self.refcount_table_offset.to_be_bytes());
        out.extend(self.refcount_table_clusters.to_be_bytes());
        out.extend(self.snapshot_count.to_be_bytes());
        out.extend(self.snapshots_offset.to_be_bytes());
    }

    fn write_v3_fields(&self, header_length: u32, out: &mut Vec<u8>) {
        let mut incompatible = self.incompatible_features & !feature::COMPRESSION_TYPE;
        let compression_type = match self.compression_type {
            CompressionType::Deflate => 0,
            CompressionType::Zstd => {
                incompatible |= feature::COMPRESSION_TYPE;
                1
            }
        };
        out.extend(incompatible.to_be_bytes());
        out.extend(self.compatible_features.to_be_bytes());
        out.extend((self.autoclear_features & feature::KNOWN_AUTOCLEAR).to_be_bytes());
        out.extend(self.geometry.refcount_order().to_be_bytes());
        out.extend(header_length.to_be_bytes());
        out.extend([compression_type, 0, 0, 0, 0, 0, 0, 0]);
        out.extend(&self.unknown_fields);
    }
}
