//! How large the file of a new image would be: full, and with what a source has.
//!
//! The numbers are the peer's: all metadata that a full image needs is counted in either case, so
//! what is required is a bound and not a promise to the byte.

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

use super::format_error::{FormatError, FormatErrorKind, Place};
use super::geometry::{Geometry, TABLE_ENTRY_BYTES};

/// The bytes of an entry of the bitmap directory without the name.
const BITMAP_ENTRY_BYTES: u64 = 24;

/// What the new image is to be.
#[derive(Clone, Copy, Debug)]
pub struct MeasureOptions {
    /// Clusters, refcounts, entries.
    pub geometry: Geometry,
    /// The bytes of the disk; with a source, its length.
    pub size: u64,
    /// The bytes of the encryption header, 0 without one.
    pub encryption_header: u64,
    /// The data, too, has its place from the beginning (`preallocation` is `falloc` or `full`).
    pub data_is_preallocated: bool,
}

/// The sizes of a file, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measurement {
    /// With what the source has.
    pub required: u64,
    /// With data everywhere.
    pub fully_allocated: u64,
}

/// The bytes that a source's data takes in the clusters of an image.
#[derive(Clone, Copy, Debug)]
pub struct DataBytes {
    geometry: Geometry,
    bytes: u64,
}

impl DataBytes {
    /// None.
    pub fn new(geometry: Geometry) -> DataBytes {
        DataBytes { geometry, bytes: 0 }
    }

    /// All of a disk of `size` bytes: so much is counted when the new image has a backing file, as
    /// it is not known what that holds.
    pub fn all(geometry: Geometry, size: u64) -> DataBytes {
        DataBytes { geometry, bytes: geometry.align_up(size).unwrap_or(u64::MAX) }
    }

    /// Counts an extent of data of the source, in ascending order. Gives the offset of the first
    /// cluster behind it: the next extent to look at begins there.
    #[must_use = "an extent that begins before it would be counted twice"]
    pub fn add(&mut self, offset: u64, length: u64) -> u64 {
        let start = self.geometry.align_down(offset);
        let end = self.geometry.align_up(offset.saturating_add(length)).unwrap_or(u64::MAX);
        self.bytes = self.bytes.saturating_add(end - start);
        end
    }
}

/// The sizes of the file of a new image with the data `data`; see [`DataBytes`].
///
/// # Errors
///
/// [`FormatErrorKind::InvalidOption`]: the disk is too large for such clusters.
pub fn measure(options: &MeasureOptions, data: DataBytes) -> Result<Measurement, FormatError> {
    let geometry = &options.geometry;
    if options.size > geometry.max_guest_size() {
        let rule = "bytes is too large (try using a larger cluster size)";
        return Err(FormatError::number("image size of", options.size, Place::Elsewhere, rule)
            .of_kind(FormatErrorKind::InvalidOption));
    }
    // At most 2^61.
    let size = geometry.align_up(options.size).unwrap_or(u64::MAX);
    let header = geometry.align_up(options.encryption_header).unwrap_or(u64::MAX);
    let metadata = header.saturating_add(metadata_bytes(geometry, size));
    let data = if options.data_is_preallocated { size } else { data.bytes };
    Ok(Measurement {
        required: metadata.saturating_add(data),
        fully_allocated: metadata.saturating_add(size),
    })
}

/// The metadata of a full image of `size` bytes, which are whole clusters.
fn metadata_bytes(geometry: &Geometry, size: u64) -> u64 {
    let l2_tables = (size >> geometry.cluster_bits()).div_ceil(geometry.l2_entries());
    let l1_table = geometry.clusters_for(l2_tables * TABLE_ENTRY_BYTES);
    let clusters = 1 + l2_tables + l1_table;
    let counted = clusters + (size >> geometry.cluster_bits());
    (clusters + refcount_clusters(geometry, counted)) << geometry.cluster_bits()
}

/// The clusters of a refcount structure that counts `counted` clusters, and itself.
fn refcount_clusters(geometry: &Geometry, counted: u64) -> u64 {
    let (mut blocks, mut table) = (0, 0);
    loop {
        let next_blocks = (counted + table + blocks).div_ceil(geometry.refcounts_per_block());
        let next_table = geometry.clusters_for(next_blocks * TABLE_ENTRY_BYTES);
        if (next_blocks, next_table) == (blocks, table) {
            return blocks + table;
        }
        (blocks, table) = (next_blocks, next_table);
    }
}

/// The bytes that persistent bitmaps of a disk of `size` bytes take: each with its granularity and
/// the length of its name, in bytes. Those that are inconsistent are not copied, and not counted.
pub fn bitmap_bytes(
    geometry: &Geometry,
    size: u64,
    bitmaps: impl IntoIterator<Item = (u64, usize)>,
) -> u64 {
    let mut directory = 0;
    let mut clusters = 0;
    for (granularity, name) in bitmaps {
        let bits = size.div_ceil(granularity.max(1));
        let contents = geometry.clusters_for(bits.div_ceil(8));
        clusters += contents + geometry.clusters_for(contents * TABLE_ENTRY_BYTES);
        directory += (BITMAP_ENTRY_BYTES + name as u64).next_multiple_of(8);
    }
    (clusters + geometry.clusters_for(directory)) << geometry.cluster_bits()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::testing::Scratch;

    /// The peer's numbers: required, fully allocated, bitmaps.
    fn peer(scratch: &Scratch, arguments: &[&str]) -> (u64, u64, u64) {
        let fixed = ["measure", "--output=json", "-O", "qcow2"];
        let text = scratch.qemu_img(&[&fixed[..], arguments].concat());
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        let number = |name: &str| value[name].as_u64().unwrap_or(0);
        (number("required"), number("fully-allocated"), number("bitmaps"))
    }

    #[test]
    fn a_size_alone_measures_as_the_peer_has_it() {
        let scratch = Scratch::new();
        for bits in [9, 12, 16, 21] {
            for order in [0, 4, 6] {
                for extended in [false, true] {
                    if extended && bits < 14 {
                        continue;
                    }
                    let geometry = Geometry::new(bits, order, extended).unwrap();
                    for size in [0, 512, 1 << 20, (1 << 30) + 512, 7 << 33] {
                        same_as_peer(&scratch, geometry, size);
                    }
                }
            }
        }
        let small = Geometry::new(9, 4, false).unwrap();
        let options = MeasureOptions {
            geometry: small,
            size: 1 << 40,
            encryption_header: 0,
            data_is_preallocated: false,
        };
        assert!(measure(&options, DataBytes::new(small)).is_err());
    }

    fn same_as_peer(scratch: &Scratch, geometry: Geometry, size: u64) {
        let words = format!(
            "cluster_size={},refcount_bits={},extended_l2={}",
            geometry.cluster_size(),
            geometry.refcount_bits(),
            if geometry.extended_l2() { "on" } else { "off" }
        );
        let options =
            MeasureOptions { geometry, size, encryption_header: 0, data_is_preallocated: false };
        let text = size.to_string();
        let ours = measure(&options, DataBytes::new(geometry)).unwrap();
        let theirs = peer(scratch, &["-o", &words, "--size", &text]);
        assert_eq!((ours.required, ours.fully_allocated, 0), theirs, "{words} {size}");
    }

    #[test]
    fn preallocation_and_encryption_measure_as_the_peer_has_them() {
        let scratch = Scratch::new();
        let geometry = Geometry::new(16, 4, false).unwrap();
        let options = MeasureOptions {
            geometry,
            size: 3 << 30,
            encryption_header: 0,
            data_is_preallocated: true,
        };
        let ours = measure(&options, DataBytes::new(geometry)).unwrap();
        for mode in ["falloc", "full"] {
            let words = format!("preallocation={mode}");
            let theirs = peer(&scratch, &["-o", &words, "--size", "3G"]);
            assert_eq!((ours.required, ours.fully_allocated, 0), theirs);
        }
        let luks = ["--object", "secret,id=s,data=pass", "-o"];
        let words = "encrypt.format=luks,encrypt.key-secret=s";
        let theirs = peer(&scratch, &[&luks[..], &[words, "--size", "3G"]].concat());
        // Its header: eight slots of 4,000 stripes of the 64 bytes of the two keys of AES-256.
        let header = 2_068_480;
        let options =
            MeasureOptions { encryption_header: header, data_is_preallocated: false, ..options };
        let ours = measure(&options, DataBytes::new(geometry)).unwrap();
        assert_eq!((ours.required, ours.fully_allocated, 0), theirs);
    }

    #[test]
    fn an_image_measures_as_the_peer_has_it() {
        let scratch = Scratch::new();
        let path = scratch.create("cluster_size=4k", "10M");
        let extents = [(0_u64, 4096_u64), (12_288, 40_960), (5 << 20, 1 << 20)];
        for (offset, length) in extents {
            scratch.qemu_io(&path, &format!("write -P 1 {offset} {length}"));
        }
        scratch.qemu_img(&["bitmap", "--add", "-g", "65536", &path, "first"]);
        scratch.qemu_img(&["bitmap", "--add", "-g", "512", &path, "the-second"]);
        for bits in [9, 12, 16] {
            let geometry = Geometry::new(bits, 4, false).unwrap();
            let mut data = DataBytes::new(geometry);
            let mut next = 0;
            for (offset, length) in extents {
                let start = offset.max(next);
                if offset + length > start {
                    next = data.add(start, offset + length - start);
                }
            }
            let options = MeasureOptions {
                geometry,
                size: 10 << 20,
                encryption_header: 0,
                data_is_preallocated: false,
            };
            let ours = measure(&options, data).unwrap();
            let bitmaps = bitmap_bytes(&geometry, 10 << 20, [(65536, 5), (512, 10)]);
            let words = format!("cluster_size={}", geometry.cluster_size());
            let theirs = peer(&scratch, &["-f", "qcow2", "-o", &words, &path]);
            assert_eq!((ours.required, ours.fully_allocated, bitmaps), theirs, "{words}");
            let words = format!("{words},backing_file=x,backing_fmt=raw");
            let ours = measure(&options, DataBytes::all(geometry, 10 << 20)).unwrap();
            let theirs = peer(&scratch, &["-f", "qcow2", "-o", &words, &path]);
            assert_eq!((ours.required, ours.fully_allocated, bitmaps), theirs, "{words}");
        }
    }
}
