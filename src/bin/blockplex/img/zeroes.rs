//! Runs of zeros and of data in a buffer.

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Words are gathered without a branch each, which compiles to wide instructions.
    let (chunks, rest) = bytes.as_chunks::<256>();
    chunks.iter().all(|chunk| {
        let (words, _) = chunk.as_chunks::<8>();
        words.iter().fold(0, |all, word| all | u64::from_ne_bytes(*word)) == 0
    }) && rest.iter().all(|byte| *byte == 0)
}

/// How a buffer is looked through: in granules, and zeros between data count from a length on.
#[derive(Clone, Copy, Debug)]
pub struct Sparse {
    /// Runs begin and end at multiples of it, counted from the disk's start. A power of two.
    pub granule: u64,
    /// Zeros between data that are shorter are data.
    pub shortest: u64,
}

/// A run at the start of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Its length in bytes.
    pub length: usize,
    /// It is not all zeros.
    pub data: bool,
}

impl Sparse {
    /// The run at the start of `bytes`, which are not empty and lie at `offset` of the disk.
    pub fn first_run(self, offset: u64, bytes: &[u8]) -> Run {
        let first = self.plain_run(offset, bytes);
        if !first.data {
            return first;
        }
        // Data goes on over zeros that are too few, when more data follows.
        let (mut length, mut end) = (first.length, first.length);
        while let Some(rest) = bytes.get(end..).filter(|rest| !rest.is_empty()) {
            let next = self.plain_run(offset + end as u64, rest);
            end += next.length;
            if next.data {
                length = end;
            } else if next.length as u64 >= self.shortest {
                break;
            }
        }
        Run { length, data: true }
    }

    /// The granules of one kind at the start of `bytes`.
    fn plain_run(self, offset: u64, bytes: &[u8]) -> Run {
        let mut length = 0;
        let mut kind = None;
        while let Some(rest) = bytes.get(length..).filter(|rest| !rest.is_empty()) {
            let to_boundary = self.granule - (offset + length as u64) % self.granule;
            let granule = rest.get(..to_boundary as usize).unwrap_or(rest);
            let data = !is_zero(granule);
            if *kind.get_or_insert(data) != data {
                break;
            }
            length += granule.len();
        }
        Run { length, data: kind.unwrap_or(false) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The runs of a disk of `granules`: `true` is data.
    fn runs(sparse: Sparse, offset: u64, bytes: &[u8]) -> Vec<(usize, bool)> {
        let mut position = 0;
        let mut runs = Vec::new();
        while position < bytes.len() {
            let run = sparse.first_run(offset + position as u64, &bytes[position..]);
            runs.push((run.length, run.data));
            position += run.length;
        }
        runs
    }

    #[test]
    fn one_byte_makes_its_granule_data() {
        let mut bytes = vec![0; 16384];
        bytes[5000] = 1;
        let sparse = Sparse { granule: 4096, shortest: 4096 };
        assert_eq!(runs(sparse, 0, &bytes), [(4096, false), (4096, true), (8192, false)]);
        assert_eq!(
            runs(sparse, 512, &bytes),
            [(3584, false), (4096, true), (8704, false)],
            "granules lie on the disk, not in the buffer"
        );
    }

    #[test]
    fn short_zeros_between_data_are_data_and_at_the_end_are_not() {
        let sparse = Sparse { granule: 512, shortest: 2048 };
        let mut bytes = vec![0; 6144];
        bytes[1024] = 1;
        bytes[2048] = 1;
        assert_eq!(runs(sparse, 0, &bytes), [(1024, false), (1536, true), (3584, false)]);
        bytes[5632 - 512] = 1;
        assert_eq!(
            runs(sparse, 0, &bytes),
            [(1024, false), (1536, true), (2560, false), (512, true), (512, false)]
        );
    }

    #[test]
    fn every_byte_is_looked_at() {
        for length in [1, 7, 8, 255, 256, 257, 1000] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes));
            for at in 0..length {
                bytes[at] = 0x80;
                assert!(!is_zero(&bytes), "{at} of {length}");
                bytes[at] = 0;
            }
        }
    }
}
