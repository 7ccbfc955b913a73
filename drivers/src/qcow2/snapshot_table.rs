//! The snapshot table: its entries from bytes and back.
//!
//! An entry has 40 fixed bytes, extra data, the identifier, the name, and padding to a multiple of
//! 8. The extra data grew over time: the size of the VM state as 64 bits and the size of the disk,
//! then the instruction count; what comes behind is kept byte for byte.

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

use super::extension::{be32, be64};
use super::format_error::{FormatError, Place};
use super::header::MIN_SNAPSHOT_ENTRY_BYTES;

/// The most bytes of a snapshot table.
pub const MAX_SNAPSHOT_TABLE_BYTES: u64 = 64 << 20;
/// The most bytes of extra data of one snapshot.
pub const MAX_SNAPSHOT_EXTRA_BYTES: u32 = 1024;
/// The extra data that is understood.
const KNOWN_EXTRA_BYTES: usize = 24;
/// What stands for "no instruction count".
const NO_COUNT: u64 = u64::MAX;

/// One internal snapshot as the table has it. Plain data: nothing is checked but its own bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotEntry {
    /// Where its L1 table is, in bytes.
    pub l1_table_offset: u64,
    /// The entries of its L1 table.
    pub l1_size: u32,
    /// Its identifier: any bytes, by custom a number in decimal.
    pub id: Vec<u8>,
    /// Its name: any bytes.
    pub name: Vec<u8>,
    /// When it was taken, in seconds of Unix time.
    pub date_seconds: u32,
    /// And nanoseconds.
    pub date_nanoseconds: u32,
    /// How long the guest had run, in nanoseconds.
    pub vm_clock_nanoseconds: u64,
    /// Bytes of the VM state, which lies past the end of the disk; 0 without one.
    pub vm_state_size: u64,
    /// Bytes of the disk at that time, where the entry says so (version 3 must).
    pub disk_size: Option<u64>,
    /// Instructions that the guest had run, where the entry says so.
    pub instruction_count: Option<u64>,
    /// Extra data that is not understood.
    pub unknown_extra: Vec<u8>,
}

/// What can be read of an entry.
pub(super) enum Parsed {
    /// The entry and the bytes that it takes.
    Entry(SnapshotEntry, usize),
    /// So many bytes are needed at least.
    Needs(usize),
}

impl SnapshotEntry {
    /// The entry at the beginning of `bytes`, if they reach so far. `number` counts the entries
    /// from 0, for messages.
    pub(super) fn parse(bytes: &[u8], number: u32) -> Result<Parsed, FormatError> {
        let fixed = MIN_SNAPSHOT_ENTRY_BYTES as usize;
        if bytes.len() < fixed {
            return Ok(Parsed::Needs(fixed));
        }
        let word = |at| be32(bytes, at).unwrap_or(0);
        let long = |at| be64(bytes, at).unwrap_or(0);
        let (id_length, name_length) = (word(12) >> 16, word(12) & 0xffff);
        let extra_length = word(36);
        if extra_length > MAX_SNAPSHOT_EXTRA_BYTES {
            let rule = format!("of entry {number} exceeds {MAX_SNAPSHOT_EXTRA_BYTES} bytes");
            let field = "snapshot extra data size";
            return Err(FormatError::number(field, extra_length.into(), Place::Elsewhere, rule));
        }
        let id_at = fixed + extra_length as usize;
        let name_at = id_at + id_length as usize;
        let end = name_at + name_length as usize;
        let whole = end.next_multiple_of(8);
        let (Some(extra), Some(id), Some(name)) =
            (bytes.get(fixed..id_at), bytes.get(id_at..name_at), bytes.get(name_at..end))
        else {
            return Ok(Parsed::Needs(whole));
        };
        let known = |at: usize| (extra.len() >= at + 8).then(|| be64(extra, at).unwrap_or(0));
        let entry = SnapshotEntry {
            l1_table_offset: long(0),
            l1_size: word(8),
            id: id.to_vec(),
            name: name.to_vec(),
            date_seconds: word(16),
            date_nanoseconds: word(20),
            vm_clock_nanoseconds: long(24),
            vm_state_size: known(0).unwrap_or_else(|| word(32).into()),
            disk_size: known(8),
            instruction_count: known(16).filter(|count| *count != NO_COUNT),
            unknown_extra: extra.get(KNOWN_EXTRA_BYTES..).unwrap_or_default().to_vec(),
        };
        // The padding of the last entry may lie past the end of the file.
        Ok(Parsed::Entry(entry, whole.min(bytes.len())))
    }

    /// Appends the entry. `disk_size` stands in where the entry has none. Lengths were checked
    /// when the entry was read or made.
    pub(super) fn write(&self, disk_size: u64, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend(self.l1_table_offset.to_be_bytes());
        out.extend(self.l1_size.to_be_bytes());
        out.extend((self.id.len() as u16).to_be_bytes());
        out.extend((self.name.len() as u16).to_be_bytes());
        out.extend(self.date_seconds.to_be_bytes());
        out.extend(self.date_nanoseconds.to_be_bytes());
        out.extend(self.vm_clock_nanoseconds.to_be_bytes());
        // Readers that know the wide field prefer it; for the others there is no larger value.
        out.extend(u32::try_from(self.vm_state_size).unwrap_or(0).to_be_bytes());
        out.extend(((KNOWN_EXTRA_BYTES + self.unknown_extra.len()) as u32).to_be_bytes());
        out.extend(self.vm_state_size.to_be_bytes());
        out.extend(self.disk_size.unwrap_or(disk_size).to_be_bytes());
        out.extend(self.instruction_count.unwrap_or(NO_COUNT).to_be_bytes());
        out.extend(&self.unknown_extra);
        out.extend(&self.id);
        out.extend(&self.name);
        out.resize(start + (out.len() - start).next_multiple_of(8), 0);
    }
}

/// The identifier of a snapshot that comes to `others`: one more than the largest number among
/// theirs.
pub(super) fn next_id<'a>(others: impl Iterator<Item = &'a SnapshotEntry>) -> Vec<u8> {
    let number = |entry: &SnapshotEntry| {
        let digits: Vec<u8> = entry.id.iter().copied().take_while(u8::is_ascii_digit).collect();
        // Not a number, or one that nobody can count on from: as good as none.
        String::from_utf8(digits).ok()?.parse::<u64>().ok().filter(|id| *id < u64::MAX)
    };
    let largest = others.filter_map(number).max().unwrap_or(0);
    (largest + 1).to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> SnapshotEntry {
        SnapshotEntry {
            l1_table_offset: 0x60000,
            l1_size: 3,
            id: b"7".to_vec(),
            name: b"before".to_vec(),
            date_seconds: 1_700_000_000,
            date_nanoseconds: 5,
            vm_clock_nanoseconds: 9,
            vm_state_size: 1 << 33,
            disk_size: Some(1 << 20),
            instruction_count: None,
            unknown_extra: vec![1, 2, 3],
        }
    }

    #[test]
    fn an_entry_is_read_back_as_it_was_written() {
        let mut bytes = Vec::new();
        entry().write(0, &mut bytes);
        let Ok(Parsed::Entry(read, length)) = SnapshotEntry::parse(&bytes, 0) else { panic!() };
        assert_eq!((read, length), (entry(), bytes.len()));
        assert_eq!(bytes.len() % 8, 0);
        for end in 0..40 + 27 + 7 {
            let parsed = SnapshotEntry::parse(&bytes[..end], 0);
            assert!(matches!(parsed, Ok(Parsed::Needs(needed)) if needed > end), "{end}");
        }
    }

    #[test]
    fn an_old_entry_has_no_disk_size_and_gets_the_present_one() {
        let mut bytes = vec![0; 48];
        bytes[13] = 1;
        bytes[35] = 77;
        bytes[40] = b'1';
        let Ok(Parsed::Entry(old, 48)) = SnapshotEntry::parse(&bytes, 0) else { panic!() };
        assert_eq!((old.vm_state_size, old.disk_size), (77, None));
        let mut again = Vec::new();
        old.write(4096, &mut again);
        let Ok(Parsed::Entry(new, _)) = SnapshotEntry::parse(&again, 0) else { panic!() };
        assert_eq!((new.vm_state_size, new.disk_size), (77, Some(4096)));
    }

    #[test]
    fn extra_data_beyond_the_limit_is_refused() {
        for size in [1025_u32, 0x10000, u32::MAX] {
            let mut bytes = vec![0; 40];
            bytes[36..40].copy_from_slice(&size.to_be_bytes());
            assert!(SnapshotEntry::parse(&bytes, 3).is_err(), "{size}");
        }
    }

    #[test]
    fn the_next_identifier_is_one_more_than_the_largest() {
        let with = |id: &str| SnapshotEntry { id: id.into(), ..entry() };
        assert_eq!(next_id([].iter()), b"1");
        assert_eq!(next_id([with("3"), with("11"), with("x"), with("")].iter()), b"12");
        assert_eq!(next_id([with("18446744073709551615")].iter()), b"1");
    }
}
