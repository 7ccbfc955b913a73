//! Refcounts in a refcount block: 1 to 64 bits wide.
//!
//! Refcounts of a byte and more are big-endian. Narrower ones share a byte, the first of them in
//! its lowest bits. The width is given as the header's `refcount_order`, the base-2 logarithm of
//! the bits.

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

use super::geometry::MAX_REFCOUNT_ORDER;

/// A refcount could not be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefcountError {
    /// The block has no refcount of this index, or there is no such width.
    OutOfBlock {
        /// The index asked for.
        index: usize,
    },
    /// The value needs more bits than a refcount of this image has.
    TooLarge {
        /// The value asked for.
        value: u64,
        /// The largest that fits.
        limit: u64,
    },
}

impl std::fmt::Display for RefcountError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::OutOfBlock { index } => write!(f, "no refcount {index} in the block"),
            Self::TooLarge { value, limit } => {
                write!(f, "refcount {value} exceeds {limit}, the most this image can store")
            }
        }
    }
}

impl std::error::Error for RefcountError {}

/// The refcount of `index` in `block`, or `None` when the block does not reach so far or `order`
/// exceeds 6. Any thread may call this.
pub fn get(block: &[u8], order: u32, index: usize) -> Option<u64> {
    if order > MAX_REFCOUNT_ORDER {
        return None;
    }
    if order < 3 {
        let slot = narrow_slot(order, index);
        let byte = *block.get(slot.byte)?;
        return Some(u64::from((byte >> slot.shift) & slot.mask));
    }
    let width = 1_usize << (order - 3);
    let start = index.checked_mul(width)?;
    let bytes = block.get(start..start.checked_add(width)?)?;
    Some(bytes.iter().fold(0, |value, &byte| value << 8 | u64::from(byte)))
}

/// Stores `value` as the refcount of `index` in `block`. Any thread may call this.
///
/// # Errors
///
/// The block does not reach so far, or the value does not fit; the block is then unchanged.
pub fn set(block: &mut [u8], order: u32, index: usize, value: u64) -> Result<(), RefcountError> {
    let out_of_block = RefcountError::OutOfBlock { index };
    if order > MAX_REFCOUNT_ORDER {
        return Err(out_of_block);
    }
    let limit = u64::MAX >> (64 - (1_u32 << order));
    if value > limit {
        return Err(RefcountError::TooLarge { value, limit });
    }
    if order < 3 {
        let slot = narrow_slot(order, index);
        let byte = block.get_mut(slot.byte).ok_or(out_of_block)?;
        // At most the mask, as checked above: the cast loses nothing.
        *byte = *byte & !(slot.mask << slot.shift) | (value as u8) << slot.shift;
        return Ok(());
    }
    let width = 1_usize << (order - 3);
    let range = index.checked_mul(width).and_then(|start| Some(start..start.checked_add(width)?));
    let bytes = range.and_then(|range| block.get_mut(range)).ok_or(out_of_block)?;
    for (byte, source) in bytes.iter_mut().rev().zip(value.to_le_bytes()) {
        *byte = source;
    }
    Ok(())
}

/// Where a refcount narrower than a byte is.
struct NarrowSlot {
    byte: usize,
    shift: u32,
    mask: u8,
}

/// `order` must be less than 3.
fn narrow_slot(order: u32, index: usize) -> NarrowSlot {
    let per_byte_bits = 3 - order;
    let in_byte = index & ((1 << per_byte_bits) - 1);
    NarrowSlot {
        byte: index >> per_byte_bits,
        shift: (in_byte as u32) << order,
        mask: 0xff_u8 >> (8 - (1_u32 << order)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::header::Header;
    use crate::qcow2::testing::Scratch;
    use proptest::prelude::*;

    #[test]
    fn bits_and_bytes_are_where_the_format_wants_them() {
        let block = [0x01, 0x80, 0x23, 0, 0, 0, 0, 0x09];
        assert_eq!(get(&block, 0, 0), Some(1));
        assert_eq!(get(&block, 0, 15), Some(1));
        assert_eq!(get(&block, 1, 7), Some(2));
        assert_eq!(get(&block, 2, 4), Some(3));
        assert_eq!(get(&block, 2, 5), Some(2));
        assert_eq!(get(&block, 3, 1), Some(0x80));
        assert_eq!(get(&block, 4, 0), Some(0x0180));
        assert_eq!(get(&block, 5, 1), Some(9));
        assert_eq!(get(&block, 6, 0), Some(0x0180_2300_0000_0009));
    }

    #[test]
    fn nothing_past_the_block_is_touched() {
        let mut block = [0_u8; 8];
        for order in 0..=7 {
            let count = 64 >> order.min(6);
            for index in [count, usize::MAX] {
                assert_eq!(get(&block, order, index), None, "order {order}");
                assert!(set(&mut block, order, index, 1).is_err(), "order {order}");
            }
        }
        assert_eq!(set(&mut block, 1, 0, 4), Err(RefcountError::TooLarge { value: 4, limit: 3 }));
        assert_eq!(block, [0; 8]);
    }

    /// The peer writes a known set of refcounts: 1 for each of the clusters in use, and 2 for
    /// the data and L2 clusters that a snapshot shares.
    #[test]
    fn every_width_is_read_as_the_peer_wrote_it() {
        let scratch = Scratch::new();
        for order in 0..=6_u32 {
            let bits = 1 << order;
            let image = scratch.create(&format!("refcount_bits={bits},cluster_size=4096"), "64k");
            scratch.qemu_io(&image, "write 0 40k");
            let shared = if order > 0 {
                scratch.qemu_img(&["snapshot", "-c", "s", &image]);
                2
            } else {
                1
            };
            let bytes = scratch.read(&image);
            let header = Header::parse(&bytes[..4096], bytes.len() as u64).unwrap();
            assert_eq!(header.geometry().refcount_order(), order);
            let table = header.refcount_table_offset as usize;
            let at = u64::from_be_bytes(bytes[table..table + 8].try_into().unwrap()) as usize;
            let block = &bytes[at..at + 4096];
            // Header, refcount table, refcount block, L1.
            for index in 0..4 {
                assert_eq!(get(block, order, index), Some(1), "{bits} bits, cluster {index}");
            }
            // L2 and ten data clusters.
            for index in 4..15 {
                assert_eq!(get(block, order, index), Some(shared), "{bits} bits, {index}");
            }
            assert_eq!(get(block, order, 40), Some(0), "{bits} bits");
        }
    }

    proptest! {
        #[test]
        fn a_stored_refcount_is_read_back_and_its_neighbours_stay(
            order in 0..=6_u32,
            index: prop::sample::Index,
            value: u64,
            fill: u8,
        ) {
            let mut block = [fill; 64];
            let count = 512 >> order;
            let index = index.index(count);
            let value = value & (u64::MAX >> (64 - (1_u32 << order)));
            let before: Vec<_> = (0..count).map(|i| get(&block, order, i).unwrap()).collect();
            set(&mut block, order, index, value).unwrap();
            for (i, &old) in before.iter().enumerate() {
                let expected = if i == index { value } else { old };
                prop_assert_eq!(get(&block, order, i), Some(expected));
            }
        }
    }
}
