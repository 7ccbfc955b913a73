//! The directory of persistent bitmaps and the entries of a bitmap table: from bytes and back.
//!
//! A directory entry has 24 fixed bytes, extra data, the name, and padding to a multiple of 8. A
//! bitmap table has one entry for each cluster of bits.

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

use super::extension::{be32, be64};
use super::format_error::{FormatError, Place, escaped};
use super::geometry::{Geometry, HOST_OFFSET_LIMIT};
use crate::dirty_bitmap::{MAX_GRANULARITY_BITS, MIN_GRANULARITY_BITS};
use std::collections::HashSet;

/// The most bytes of a bitmap's name.
pub const MAX_BITMAP_NAME_BYTES: usize = 1023;
/// The most bytes that the bits of one bitmap take.
pub const MAX_BITMAP_BYTES: u64 = 0x2000_0000;
/// The fixed part of a directory entry.
const ENTRY_BYTES: usize = 24;
/// The type of a dirty bitmap, the only one there is.
const DIRTY_TRACKING: u8 = 1;

/// A writer has the bitmap in memory: what the file has of it is out of date.
const IN_USE: u32 = 1;
/// It records writes whenever the image is open for writing.
const AUTO: u32 = 2;
/// Extra data may be ignored.
const EXTRA_COMPATIBLE: u32 = 4;

/// All bits of a table entry's cluster are ones.
const ALL_ONES: u64 = 1;
/// The bits of a table entry that hold no offset and no flag.
const TABLE_RESERVED: u64 = 0xff00_0000_0000_01fe;

/// One bitmap as the directory has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapEntry {
    /// Where its table is, in bytes.
    pub table_offset: u64,
    /// The entries of its table.
    pub table_entries: u32,
    /// A writer did not get to store it: it cannot be relied on.
    pub in_use: bool,
    /// It records writes.
    pub auto: bool,
    /// The base-2 logarithm of the bytes that a bit stands for.
    pub granularity_bits: u32,
    /// Its name: any bytes.
    pub name: Vec<u8>,
}

/// What a table entry says of the bits of its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapCluster {
    /// All are zeros.
    Zeros,
    /// All are ones.
    Ones,
    /// They are in the cluster at this offset.
    Stored(u64),
}

/// What the numbers of a directory are measured against.
#[derive(Clone, Copy, Debug)]
pub struct DirectoryLimits {
    /// The image's geometry.
    pub geometry: Geometry,
    /// Bytes of the virtual disk.
    pub disk_size: u64,
    /// Bytes of the file.
    pub file_length: u64,
}

/// The entries of the directory in `bytes`, `count` of them.
///
/// # Errors
///
/// An entry breaks a rule of the format, or a limit; two have one name; bytes are missing or left
/// over.
pub fn parse_directory(
    bytes: &[u8],
    count: u32,
    limits: &DirectoryLimits,
) -> Result<Vec<BitmapEntry>, FormatError> {
    let mut entries = Vec::new();
    let mut names = HashSet::new();
    let mut at = 0;
    for number in 0..count {
        let (entry, length) = BitmapEntry::parse(bytes.get(at..).unwrap_or_default(), number)?;
        entry.check(limits)?;
        if !names.insert(entry.name.clone()) {
            return Err(entry.fault("is the name of a second bitmap"));
        }
        entries.push(entry);
        at += length;
    }
    if at != bytes.len() {
        let rule = format!("bytes are left over after {count} bitmaps");
        let left = (bytes.len() - at) as u64;
        return Err(FormatError::number("bitmap directory", left, Place::Elsewhere, rule));
    }
    Ok(entries)
}

/// The bytes of a directory.
pub(super) fn write_directory<'a>(entries: impl Iterator<Item = &'a BitmapEntry>) -> Vec<u8> {
    let mut bytes = Vec::new();
    entries.for_each(|entry| entry.write(&mut bytes));
    bytes
}

/// The bytes that the entry of a bitmap of this name takes.
pub(super) fn entry_length(name: &[u8]) -> u64 {
    (ENTRY_BYTES + name.len()).next_multiple_of(8) as u64
}

impl BitmapEntry {
    fn parse(bytes: &[u8], number: u32) -> Result<(BitmapEntry, usize), FormatError> {
        let short = || {
            let rule = "does not fit the directory";
            FormatError::number("bitmap directory entry", number.into(), Place::Elsewhere, rule)
        };
        let fixed = bytes.get(..ENTRY_BYTES).ok_or_else(short)?;
        let word = |at| be32(fixed, at).unwrap_or(0);
        let (kinds, extra) = (word(16), word(20) as usize);
        let name_length = (kinds & 0xffff) as usize;
        let name_at = ENTRY_BYTES.checked_add(extra).ok_or_else(short)?;
        let end = name_at.checked_add(name_length).ok_or_else(short)?;
        let whole = end.checked_next_multiple_of(8).ok_or_else(short)?;
        let name = bytes.get(name_at..end).ok_or_else(short)?;
        if bytes.len() < whole {
            return Err(short());
        }
        let flags = word(12);
        let entry = BitmapEntry {
            table_offset: be64(fixed, 0).unwrap_or(0),
            table_entries: word(8),
            in_use: flags & IN_USE != 0,
            auto: flags & AUTO != 0,
            granularity_bits: kinds >> 16 & 0xff,
            name: name.to_vec(),
        };
        if name_length == 0 || name_length > MAX_BITMAP_NAME_BYTES {
            let rule = format!("(entry {number}) has not 1 to {MAX_BITMAP_NAME_BYTES} bytes");
            let length = name_length as u64;
            return Err(FormatError::number("bitmap name of", length, Place::Elsewhere, rule));
        }
        if flags & !(IN_USE | AUTO | EXTRA_COMPATIBLE) != 0 {
            return Err(entry.fault(format!("has reserved flags set: {flags:#x}")));
        }
        if kinds >> 24 != u32::from(DIRTY_TRACKING) {
            return Err(entry.fault(format!("has the unknown type {}", kinds >> 24)));
        }
        if extra != 0 {
            return Err(entry.fault("has extra data, which is not supported"));
        }
        Ok((entry, whole))
    }

    /// M03 to M05.
    fn check(&self, limits: &DirectoryLimits) -> Result<(), FormatError> {
        let DirectoryLimits { geometry, disk_size, file_length } = *limits;
        if !(MIN_GRANULARITY_BITS..=MAX_GRANULARITY_BITS).contains(&self.granularity_bits) {
            let bits = self.granularity_bits;
            let range = format!("{MIN_GRANULARITY_BITS} to {MAX_GRANULARITY_BITS}");
            return Err(self.fault(format!("has granularity bits {bits}, not {range}")));
        }
        let entries = u64::from(self.table_entries);
        let bytes = entries << geometry.cluster_bits();
        if entries == 0 || bytes > MAX_BITMAP_BYTES {
            let most = MAX_BITMAP_BYTES >> geometry.cluster_bits();
            return Err(self.fault(format!("has a table of {entries} entries, not 1 to {most}")));
        }
        let offset = self.table_offset;
        if offset == 0 || !geometry.is_aligned(offset) {
            return Err(self.fault(format!("has its table at {offset:#x}, which is no cluster")));
        }
        if offset.checked_add(entries * 8).is_none_or(|end| end > file_length) {
            let rule = format!("has its table at {offset:#x}, past the end of the file");
            return Err(self.fault(rule));
        }
        let needed = disk_size.div_ceil(1 << self.granularity_bits);
        if !self.in_use && needed > bytes * 8 {
            let rule = format!("has {} bits, too few for the disk's {needed}", bytes * 8);
            return Err(self.fault(rule));
        }
        Ok(())
    }

    pub(super) fn fault(&self, rule: impl Into<String>) -> FormatError {
        FormatError::text("bitmap", escaped(&self.name), Place::Elsewhere, rule)
    }

    fn write(&self, out: &mut Vec<u8>) {
        let flags = if self.in_use { IN_USE } else { 0 } | if self.auto { AUTO } else { 0 };
        let start = out.len();
        out.extend(self.table_offset.to_be_bytes());
        out.extend(self.table_entries.to_be_bytes());
        out.extend(flags.to_be_bytes());
        // In range: checked when the entry was read or made.
        out.extend([DIRTY_TRACKING, self.granularity_bits as u8]);
        out.extend((self.name.len() as u16).to_be_bytes());
        out.extend(0_u32.to_be_bytes());
        out.extend(&self.name);
        out.resize(start + (out.len() - start).next_multiple_of(8), 0);
    }
}

impl BitmapCluster {
    /// What a table entry says; `None` when it breaks a rule of the format.
    pub fn decode(raw: u64, geometry: &Geometry) -> Option<BitmapCluster> {
        let offset = raw & !(TABLE_RESERVED | ALL_ONES);
        match (offset, raw & ALL_ONES) {
            _ if raw & TABLE_RESERVED != 0 => None,
            (0, 0) => Some(BitmapCluster::Zeros),
            (0, _) => Some(BitmapCluster::Ones),
            (offset, 0) if geometry.is_aligned(offset) && offset < HOST_OFFSET_LIMIT => {
                Some(BitmapCluster::Stored(offset))
            }
            _ => None,
        }
    }

    /// The table entry that says this.
    pub fn encode(self) -> u64 {
        match self {
            BitmapCluster::Zeros => 0,
            BitmapCluster::Ones => ALL_ONES,
            BitmapCluster::Stored(offset) => offset,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> DirectoryLimits {
        let geometry = Geometry::new(16, 4, false).unwrap();
        DirectoryLimits { geometry, disk_size: 64 << 20, file_length: 1 << 20 }
    }

    fn entry(name: &str) -> BitmapEntry {
        BitmapEntry {
            table_offset: 0x80000,
            table_entries: 1,
            in_use: false,
            auto: true,
            granularity_bits: 16,
            name: name.into(),
        }
    }

    #[test]
    fn a_directory_is_read_back_as_it_was_written() {
        let entries = [entry("a"), BitmapEntry { in_use: true, ..entry("a name of 17 bytes") }];
        let bytes = write_directory(entries.iter());
        assert_eq!(
            bytes.len() as u64,
            entries.iter().map(|entry| entry_length(&entry.name)).sum::<u64>()
        );
        assert_eq!(parse_directory(&bytes, 2, &limits()).unwrap(), entries);
        for (count, length) in [(1, bytes.len()), (3, bytes.len()), (2, bytes.len() - 8), (2, 30)] {
            assert!(parse_directory(&bytes[..length], count, &limits()).is_err(), "{length}");
        }
    }

    #[test]
    fn a_table_entry_is_an_offset_or_a_flag() {
        let geometry = limits().geometry;
        for cluster in [BitmapCluster::Zeros, BitmapCluster::Ones, BitmapCluster::Stored(1 << 20)] {
            assert_eq!(BitmapCluster::decode(cluster.encode(), &geometry), Some(cluster));
        }
        for raw in [0xff00_0000_0000_01fe, 2, 1 << 8, 1 << 56, 0x10001, 0x200] {
            assert_eq!(BitmapCluster::decode(raw, &geometry), None, "{raw:#x}");
        }
    }

    #[test]
    fn two_bitmaps_of_one_name_are_refused() {
        let bytes = write_directory([entry("a"), entry("a")].iter());
        assert!(parse_directory(&bytes, 2, &limits()).is_err());
    }
}
