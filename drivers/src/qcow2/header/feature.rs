//! The feature bits of version 3: which there are, what they are called, and the refusal of
//! incompatible ones that are not known.

use crate::qcow2::extension::{Record, feature_name};
use crate::qcow2::format_error::{FormatError, FormatErrorKind, Place};

/// Incompatible: refcounts may be wrong.
pub const DIRTY: u64 = 1;
/// Incompatible: a writer found the image corrupt.
pub const CORRUPT: u64 = 1 << 1;
/// Incompatible: the clusters' bytes are in another file.
pub const DATA_FILE: u64 = 1 << 2;
/// Incompatible: the compression type is not deflate.
pub const COMPRESSION_TYPE: u64 = 1 << 3;
/// Incompatible: L2 entries have subcluster bits.
pub const EXTENDED_L2: u64 = 1 << 4;
/// Every incompatible feature that is known.
pub const KNOWN_INCOMPATIBLE: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2;

/// Compatible: refcounts may be written late.
pub const LAZY_REFCOUNTS: u64 = 1;

/// Autoclear: the persistent bitmaps are up to date.
pub const BITMAPS: u64 = 1;
/// Autoclear: the external data file can be read as a raw image.
pub const RAW_DATA_FILE: u64 = 1 << 1;
/// Every autoclear feature that is known. A driver that does not maintain one of them must clear
/// it before its first write.
pub const KNOWN_AUTOCLEAR: u64 = BITMAPS | RAW_DATA_FILE;

/// The three words of feature bits, as the feature-name table numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FeatureKind {
    /// A reader must know it.
    Incompatible = 0,
    /// Need not be known.
    Compatible = 1,
    /// Cleared by a writer that does not know it.
    Autoclear = 2,
}

/// The feature-name table that is written into images: kind, bit and name.
pub const NAMES: [(FeatureKind, u8, &str); 8] = [
    (FeatureKind::Incompatible, 0, "dirty bit"),
    (FeatureKind::Incompatible, 1, "corrupt bit"),
    (FeatureKind::Incompatible, 2, "external data file"),
    (FeatureKind::Incompatible, 3, "compression type"),
    (FeatureKind::Incompatible, 4, "extended L2 entries"),
    (FeatureKind::Compatible, 0, "lazy refcounts"),
    (FeatureKind::Autoclear, 0, "bitmaps"),
    (FeatureKind::Autoclear, 1, "raw external data"),
];

/// The name of a known feature.
pub fn known_name(kind: FeatureKind, bit: u32) -> Option<&'static str> {
    let found = NAMES.iter().find(|name| name.0 == kind && u32::from(name.1) == bit);
    found.map(|name| name.2)
}

/// Refuses incompatible features that are not known, all of them by number and by the name that
/// the image itself gives.
pub(super) fn refuse_unknown<'a, I>(
    incompatible: u64,
    records: impl Fn() -> I,
) -> Result<(), FormatError>
where
    I: Iterator<Item = Result<Record<'a>, FormatError>>,
{
    let unknown = incompatible & !KNOWN_INCOMPATIBLE;
    if unknown == 0 {
        return Ok(());
    }
    let bits = (0..u64::BITS).filter(|bit| unknown >> bit & 1 != 0);
    let names: Vec<_> = bits
        .map(|bit| match feature_name(records(), FeatureKind::Incompatible, bit) {
            Some(name) => format!("{bit} {name}"),
            None => bit.to_string(),
        })
        .collect();
    let value = format!("{incompatible:#x}");
    let rule = format!("have unknown bits: {}", names.join(", "));
    Err(FormatError::text("incompatible features", value, Place::Header(72), rule)
        .of_kind(FormatErrorKind::Unsupported))
}
