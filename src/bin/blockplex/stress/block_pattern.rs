//! Sectors that say what they are.
//!
//! A stamped sector is 64 little-endian words: a magic number, the disk, the
//! sector's own number, the writer, the writer's sequence number, and 59 words
//! drawn from a 64-bit hash of those. The drawn words are fill and checksum in
//! one: the hash is a chain of bijections, so changing one of the words it
//! covers changes all 59, and changing one of the 59 makes it differ from what
//! the others call for. What [`observe`] takes for whole is therefore whole,
//! but for a chance of 2^-64.
//!
//! The sector's number shows data that came to the wrong place, the disk's
//! shows data of another image or of an earlier run, the sequence number shows
//! data that is too old, the fill shows sectors put together from several.

use crate::random::{GOLDEN, mix};

/// Bytes of a sector.
pub const SECTOR_BYTES: usize = 512;

const WORDS: usize = SECTOR_BYTES / 8;
const HEADER_WORDS: usize = 5;
/// "BPXstres" on the disk.
const MAGIC: u64 = u64::from_le_bytes(*b"BPXstres");

/// What a sector says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// The disk it was written to, different in each run.
    pub disk: u64,
    /// The sector of the disk as the guest counts.
    pub sector: u64,
    /// The iothread that wrote it.
    pub writer: u32,
    /// That iothread's count of writes; above 0.
    pub sequence: u64,
}

/// What was found in a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observation {
    /// Zeroes only.
    Zero,
    /// A whole stamped sector.
    Stamped(Stamp),
    /// Anything else.
    Damaged {
        /// The first byte that is not what those before it call for.
        first_wrong: usize,
    },
}

impl Stamp {
    fn header(&self) -> [u64; HEADER_WORDS] {
        [MAGIC, self.disk, self.sector, u64::from(self.writer), self.sequence]
    }

    /// Writes the sector that bears this stamp.
    pub fn write_to(&self, sector: &mut [u8; SECTOR_BYTES]) {
        let header = self.header();
        let key = key_of(&header);
        for (index, place) in sector.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let word = header.get(index).copied().unwrap_or_else(|| fill_word(key, index));
            *place = word.to_le_bytes();
        }
    }
}

fn key_of(header: &[u64; HEADER_WORDS]) -> u64 {
    // For a given rest, every step is a bijection of its word.
    header.iter().fold(0, |key, word| mix(key.wrapping_add(GOLDEN) ^ word))
}

fn fill_word(key: u64, index: usize) -> u64 {
    mix(key.wrapping_add(GOLDEN.wrapping_mul(index as u64)))
}

/// Says what a sector contains.
pub fn observe(sector: &[u8; SECTOR_BYTES]) -> Observation {
    let mut words = [0; WORDS];
    for (word, bytes) in words.iter_mut().zip(sector.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    if words.iter().fold(0, |bits, word| bits | word) == 0 {
        return Observation::Zero;
    }
    let damaged = |word: usize| Observation::Damaged { first_wrong: 8 * word };
    let [magic, disk, number, writer, sequence, fill @ ..] = &words;
    if *magic != MAGIC {
        return damaged(0);
    }
    let key = key_of(&[*magic, *disk, *number, *writer, *sequence]);
    let wrong = fill
        .iter()
        .enumerate()
        .position(|(index, word)| *word != fill_word(key, HEADER_WORDS + index));
    if let Some(index) = wrong {
        return damaged(HEADER_WORDS + index);
    }
    // Only `write_to` makes such a sector, and its writers fit.
    match u32::try_from(*writer) {
        Ok(writer) => Observation::Stamped(Stamp {
            disk: *disk,
            sector: *number,
            writer,
            sequence: *sequence,
        }),
        Err(_) => damaged(3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp { disk: 7, sector: 1234, writer: 3, sequence: 99 };

    fn sector(stamp: Stamp) -> [u8; SECTOR_BYTES] {
        let mut sector = [0xee; SECTOR_BYTES];
        stamp.write_to(&mut sector);
        sector
    }

    #[test]
    fn a_sector_reads_back_as_its_stamp() {
        assert_eq!(observe(&sector(STAMP)), Observation::Stamped(STAMP));
        assert_eq!(observe(&[0; SECTOR_BYTES]), Observation::Zero);
        let zeroes = Stamp { disk: 0, sector: 0, writer: 0, sequence: 0 };
        assert_eq!(observe(&sector(zeroes)), Observation::Stamped(zeroes));
    }

    #[test]
    fn every_single_wrong_bit_is_seen() {
        let whole = sector(STAMP);
        for bit in 0..SECTOR_BYTES * 8 {
            let mut wrong = whole;
            wrong[bit / 8] ^= 1 << (bit % 8);
            let observation = observe(&wrong);
            assert!(matches!(observation, Observation::Damaged { .. }), "{bit}: {observation:?}");
        }
    }

    #[test]
    fn every_mixture_of_two_sectors_is_seen() {
        let newer = sector(Stamp { sequence: 100, ..STAMP });
        for others in [sector(STAMP), [0; SECTOR_BYTES], [0x5a; SECTOR_BYTES]] {
            for cut in 1..SECTOR_BYTES {
                let mut torn = newer;
                torn[cut..].copy_from_slice(&others[cut..]);
                if torn == newer || torn == others {
                    continue; // cut where both agree
                }
                assert!(matches!(observe(&torn), Observation::Damaged { .. }), "{cut}");
            }
        }
    }

    #[test]
    fn damage_is_located() {
        let mut wrong = sector(STAMP);
        wrong[400] ^= 1;
        assert_eq!(observe(&wrong), Observation::Damaged { first_wrong: 400 });
        assert_eq!(observe(&[0xff; SECTOR_BYTES]), Observation::Damaged { first_wrong: 0 });
    }
}
