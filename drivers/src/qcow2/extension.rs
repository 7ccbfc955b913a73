//! Header extensions: the tagged records between the header fields and the backing-file name.
//!
//! `walk` cuts the area into records without understanding them; `Extensions::parse` turns
//! the known ones into values and keeps the others byte for byte, so that they survive a
//! rewrite of the header; `Extensions::write` does the reverse. Rules that tie an extension to
//! other header fields are the header's business.
//!
//! Duplicates: a known extension that stands twice is refused (E07), for two readers could each
//! believe another one. Unknown ones may repeat: only who knows them can tell. Their number is
//! limited (E10).

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

use super::format_error::{FormatError, Place, escaped};
use super::header::feature::FeatureKind;

/// The most extensions of one image. The format knows five; writers add a few.
pub const MAX_EXTENSIONS: usize = 256;
/// The most bytes of the name of a backing format.
pub const MAX_BACKING_FORMAT_BYTES: usize = 15;
/// The most bytes of a backing-file or data-file name.
pub const MAX_FILE_NAME_BYTES: usize = 1023;
/// The most persistent bitmaps of an image.
pub const MAX_BITMAPS: u32 = 65535;
/// The most bytes of the bitmap directory.
pub const MAX_BITMAP_DIRECTORY_BYTES: u64 = 1024 * MAX_BITMAPS as u64;
/// The fewest bytes of an entry of the bitmap directory.
const MIN_BITMAP_ENTRY_BYTES: u64 = 24;

const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
const CRYPTO_HEADER: u32 = 0x0537_be77;
const DATA_FILE_NAME: u32 = 0x4441_5441;

/// The bytes of an extension before its data: type and length.
const PREFIX_BYTES: usize = 8;
/// The bytes of an entry of the feature-name table: kind, bit, name padded with zeros.
const FEATURE_ENTRY_BYTES: usize = 48;
/// The bytes of the bitmaps extension.
const BITMAPS_BYTES: usize = 24;
/// The bytes of the crypto-header extension.
const CRYPTO_HEADER_BYTES: usize = 16;

/// The extensions of a header. The feature-name table is not kept: it is written anew.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extensions {
    /// The format driver of the backing file; not empty, without NUL.
    pub backing_format: Option<Vec<u8>>,
    /// The name of the external data file; not empty, without NUL. It means nothing without the
    /// incompatible feature bit.
    pub data_file_name: Option<Vec<u8>>,
    /// Where the LUKS header is.
    pub crypto_header: Option<CryptoHeaderExtension>,
    /// Where the persistent bitmaps are. It means nothing without the autoclear feature bit.
    pub bitmaps: Option<BitmapsExtension>,
    /// All others, in the order of the file.
    pub unknown: Vec<UnknownExtension>,
}

/// Where the LUKS header is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CryptoHeaderExtension {
    /// Its first byte in the file.
    pub offset: u64,
    /// Its bytes.
    pub length: u64,
}

/// Where the directory of persistent bitmaps is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// The entries of the directory.
    pub count: u32,
    /// Must be zero.
    pub reserved: u32,
    /// The bytes of the directory.
    pub directory_size: u64,
    /// Its first byte in the file.
    pub directory_offset: u64,
}

/// An extension that is kept without being understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownExtension {
    /// Its type.
    pub kind: u32,
    /// Its data, without padding.
    pub data: Vec<u8>,
}

/// One extension as it stands in the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Record<'a> {
    kind: u32,
    /// Where the data is in the file.
    position: usize,
    data: &'a [u8],
}

/// The extensions in `bytes`, the beginning of the file, from byte `start` to byte `end` or the
/// end marker. After an error it gives nothing more.
pub(super) fn walk(
    bytes: &[u8],
    start: usize,
    end: usize,
) -> impl Iterator<Item = Result<Record<'_>, FormatError>> {
    let mut position = start;
    let mut done = false;
    std::iter::from_fn(move || {
        // Fewer bytes than a prefix before the backing-file name are padding.
        if done || end.saturating_sub(position) < PREFIX_BYTES {
            return None;
        }
        match record_at(bytes, position, end) {
            Ok(Some(record)) => {
                // The data ends at `end` or before, so this is at most 7 more.
                position = (record.position + record.data.len()).next_multiple_of(8);
                Some(Ok(record))
            }
            Ok(None) => None,
            Err(error) => {
                done = true;
                Some(Err(error))
            }
        }
    })
}

/// `None` at the end marker.
fn record_at(bytes: &[u8], start: usize, end: usize) -> Result<Option<Record<'_>>, FormatError> {
    let place = Place::Extension(start as u64);
    let cut_short = || {
        FormatError::number(
            "header extension",
            bytes.len() as u64,
            place,
            "bytes of the header were read, which is too few for this extension",
        )
    };
    let (Some(kind), Some(length)) = (be32(bytes, start), be32(bytes, start + 4)) else {
        return Err(cut_short());
    };
    if kind == END {
        return Ok(None);
    }
    // The caller checked that the prefix lies before `end`.
    let position = start + PREFIX_BYTES;
    let room = end - position;
    if length as usize > room {
        return Err(FormatError::number(
            "header extension length",
            length.into(),
            place,
            format!("exceeds the {room} bytes before the end of the header area (type {kind:#x})"),
        ));
    }
    let data = bytes.get(position..position + length as usize).ok_or_else(cut_short)?;
    Ok(Some(Record { kind, position, data }))
}

/// The name that the image gives to feature `bit` of `wanted`, escaped and cut; `None` when its
/// feature-name table has none. The table may be damaged: whatever can be found is used.
pub(super) fn feature_name<'a>(
    records: impl Iterator<Item = Result<Record<'a>, FormatError>>,
    wanted: FeatureKind,
    bit: u32,
) -> Option<String> {
    let mut records = records.take(MAX_EXTENSIONS);
    let table = records.find_map(|record| record.ok().filter(|r| r.kind == FEATURE_NAMES))?;
    table.data.chunks(FEATURE_ENTRY_BYTES).find_map(|entry| match entry {
        [kind, number, name @ ..] if *kind == wanted as u8 && u32::from(*number) == bit => {
            let name = name.split(|&byte| byte == 0).next()?;
            (!name.is_empty()).then(|| escaped(name))
        }
        _ => None,
    })
}

impl Extensions {
    /// Parses all extensions that `records` gives.
    pub(super) fn parse<'a>(
        records: impl Iterator<Item = Result<Record<'a>, FormatError>>,
    ) -> Result<Self, FormatError> {
        let mut extensions = Extensions::default();
        let mut feature_names = None;
        for (number, record) in records.enumerate() {
            let record = record?;
            if number == MAX_EXTENSIONS {
                return Err(FormatError::number(
                    "header extension",
                    number as u64 + 1,
                    record.place(),
                    format!("is one more than the {MAX_EXTENSIONS} that are accepted"),
                ));
            }
            match record.kind {
                BACKING_FORMAT => {
                    let name = record.name("backing format", 0, MAX_BACKING_FORMAT_BYTES)?;
                    once(&mut extensions.backing_format, name, "backing format", &record)?;
                }
                DATA_FILE_NAME => {
                    let name = record.name("data file name", 1, MAX_FILE_NAME_BYTES)?;
                    once(&mut extensions.data_file_name, name, "data file name", &record)?;
                }
                CRYPTO_HEADER => {
                    let value = record.crypto_header()?;
                    once(&mut extensions.crypto_header, value, "crypto header", &record)?;
                }
                BITMAPS => once(&mut extensions.bitmaps, record.bitmaps()?, "bitmaps", &record)?,
                FEATURE_NAMES => once(&mut feature_names, (), "feature name table", &record)?,
                kind => {
                    extensions.unknown.push(UnknownExtension { kind, data: record.data.to_vec() })
                }
            }
        }
        // An empty name says as much as none.
        extensions.backing_format = extensions.backing_format.filter(|name| !name.is_empty());
        Ok(extensions)
    }

    /// Appends the extensions, the feature-name table `feature_names` among them unless it is
    /// empty, and the end marker. The order is that of the peer.
    pub(super) fn write(&self, feature_names: &[(FeatureKind, u8, &str)], out: &mut Vec<u8>) {
        if let Some(name) = &self.backing_format {
            write_record(BACKING_FORMAT, name, out);
        }
        if let Some(name) = &self.data_file_name {
            write_record(DATA_FILE_NAME, name, out);
        }
        if let Some(crypto) = &self.crypto_header {
            let words = [crypto.offset, crypto.length].map(u64::to_be_bytes);
            write_record(CRYPTO_HEADER, words.as_flattened(), out);
        }
        if !feature_names.is_empty() {
            write_record(FEATURE_NAMES, &feature_table(feature_names), out);
        }
        if let Some(bitmaps) = &self.bitmaps {
            let mut data = [bitmaps.count, bitmaps.reserved].map(u32::to_be_bytes).concat();
            data.extend(bitmaps.directory_size.to_be_bytes());
            data.extend(bitmaps.directory_offset.to_be_bytes());
            write_record(BITMAPS, &data, out);
        }
        for unknown in &self.unknown {
            write_record(unknown.kind, &unknown.data, out);
        }
        write_record(END, &[], out);
    }
}

/// Fills `slot`, which must be empty.
fn once<T>(
    slot: &mut Option<T>,
    value: T,
    field: &'static str,
    record: &Record<'_>,
) -> Result<(), FormatError> {
    if slot.replace(value).is_some() {
        let rule = "stands in the header a second time";
        return Err(FormatError::text(field, "extension", record.place(), rule));
    }
    Ok(())
}

fn feature_table(names: &[(FeatureKind, u8, &str)]) -> Vec<u8> {
    let mut table = Vec::with_capacity(names.len() * FEATURE_ENTRY_BYTES);
    for &(kind, bit, name) in names {
        let end = table.len() + FEATURE_ENTRY_BYTES;
        table.extend([kind as u8, bit]);
        table.extend(name.bytes());
        table.resize(end, 0);
    }
    table
}

fn write_record(kind: u32, data: &[u8], out: &mut Vec<u8>) {
    out.extend(kind.to_be_bytes());
    // Lengths come from a header that fits a cluster or are refused for not fitting one.
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    out.resize(out.len().next_multiple_of(8), 0);
}

impl Record<'_> {
    fn place(&self) -> Place {
        Place::Extension((self.position - PREFIX_BYTES) as u64)
    }

    fn name(
        &self,
        field: &'static str,
        at_least: usize,
        at_most: usize,
    ) -> Result<Vec<u8>, FormatError> {
        if !(at_least..=at_most).contains(&self.data.len()) {
            let rule = format!("has {} bytes, not {at_least} to {at_most}", self.data.len());
            return Err(FormatError::text(field, escaped(self.data), self.place(), rule));
        }
        if self.data.contains(&0) {
            let rule = "contains a NUL byte";
            return Err(FormatError::text(field, escaped(self.data), self.place(), rule));
        }
        Ok(self.data.to_vec())
    }

    fn of_length(&self, field: &'static str, length: usize) -> Result<(), FormatError> {
        if self.data.len() == length {
            return Ok(());
        }
        let rule = format!("is not {length}");
        Err(FormatError::number(field, self.data.len() as u64, self.place(), rule))
    }

    fn crypto_header(&self) -> Result<CryptoHeaderExtension, FormatError> {
        self.of_length("crypto header extension length", CRYPTO_HEADER_BYTES)?;
        Ok(CryptoHeaderExtension {
            offset: be64(self.data, 0).unwrap_or(0),
            length: be64(self.data, 8).unwrap_or(0),
        })
    }

    fn bitmaps(&self) -> Result<BitmapsExtension, FormatError> {
        self.of_length("bitmaps extension length", BITMAPS_BYTES)?;
        Ok(BitmapsExtension {
            count: be32(self.data, 0).unwrap_or(0),
            reserved: be32(self.data, 4).unwrap_or(0),
            directory_size: be64(self.data, 8).unwrap_or(0),
            directory_offset: be64(self.data, 16).unwrap_or(0),
        })
    }
}

impl BitmapsExtension {
    /// Checks the numbers against each other; not against the file.
    pub(super) fn check(&self) -> Result<(), FormatError> {
        // The header does not remember where an extension stood.
        let refuse = |field, value, rule: String| {
            Err(FormatError::number(field, value, Place::Elsewhere, rule))
        };
        if self.count == 0 || self.count > MAX_BITMAPS {
            let rule = format!("in the bitmaps extension is not in 1..={MAX_BITMAPS}");
            return refuse("bitmap count", self.count.into(), rule);
        }
        if self.reserved != 0 {
            let rule = "in the bitmaps extension is not 0".to_owned();
            return refuse("reserved field", self.reserved.into(), rule);
        }
        let least = u64::from(self.count) * MIN_BITMAP_ENTRY_BYTES;
        if !(least..=MAX_BITMAP_DIRECTORY_BYTES).contains(&self.directory_size) {
            let rule = format!("is not in {least}..={MAX_BITMAP_DIRECTORY_BYTES}");
            return refuse("bitmap directory size", self.directory_size, rule);
        }
        Ok(())
    }
}

/// The big-endian number at byte `at`, if `bytes` reaches so far.
pub(super) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(word.try_into().ok()?))
}

/// The big-endian number at byte `at`, if `bytes` reaches so far.
pub(super) fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    let word = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_be_bytes(word.try_into().ok()?))
}
