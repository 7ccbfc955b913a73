//! How large the caches are: options, defaults, and what contradicts what.

use super::geometry::Geometry;
use super::open::Qcow2Options;
use blockplex_graph::{Error, ErrorKind, Result};

/// The slices of an image's L2 tables are kept up to this many bytes, unless an option says
/// otherwise: enough for 256 GiB of disk with clusters of 64 KiB.
const DEFAULT_L2_CACHE: u64 = 32 << 20;
/// The size of a slice in bytes, unless an option says otherwise or clusters are smaller.
const DEFAULT_SLICE: u64 = 4096;
/// Refcount blocks kept, unless an option says otherwise; and the fewest.
const DEFAULT_BLOCKS: u64 = 4;
/// The smallest slice, in bytes.
const MIN_SLICE: u64 = 512;
/// The most entries of a cache.
const MAX_ENTRIES: u64 = i32::MAX as u64;

/// The sizes of the caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CacheSizes {
    /// Slices.
    pub(super) slices: usize,
    /// Bytes of refcount blocks.
    pub(super) refcounts: u64,
}

fn refuse<T>(text: impl Into<String>) -> Result<T> {
    Err(Error::new(ErrorKind::InvalidArgument, text.into()))
}

/// The base-2 logarithm of the entries of a slice.
pub(super) fn slice_bits(options: &Qcow2Options, geometry: &Geometry) -> Result<u32> {
    let cluster_size = geometry.cluster_size();
    let bytes = options.l2_cache_entry_size.unwrap_or(DEFAULT_SLICE.min(cluster_size));
    if !bytes.is_power_of_two() || !(MIN_SLICE..=cluster_size).contains(&bytes) {
        return refuse(format!(
            "L2 cache entry size must be a power of two between {MIN_SLICE} and the cluster size \
             ({cluster_size})"
        ));
    }
    Ok(bytes.trailing_zeros() - geometry.l2_entry_bytes().trailing_zeros())
}

/// The caches that the options ask for, for a disk of `size` bytes with slices of
/// 2^`slice_bits` entries.
pub(super) fn cache_sizes(
    options: &Qcow2Options,
    geometry: &Geometry,
    size: u64,
    slice_bits: u32,
) -> Result<CacheSizes> {
    let Qcow2Options { cache_size, l2_cache_size, refcount_cache_size, .. } = *options;
    let entry_bytes = geometry.l2_entry_bytes();
    let slice_bytes = entry_bytes << slice_bits;
    // All L2 tables of the disk, in whole tables.
    let all = geometry.clusters_for(size).saturating_mul(entry_bytes);
    let all = geometry.align_up(all).unwrap_or(u64::MAX);
    let least = DEFAULT_BLOCKS << geometry.cluster_bits();
    let (l2, refcounts) = match (cache_size, l2_cache_size, refcount_cache_size) {
        (Some(_), Some(_), Some(_)) => {
            return refuse(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
            );
        }
        (Some(total), Some(l2), None) if l2 > total => {
            return refuse("l2-cache-size may not exceed cache-size");
        }
        (Some(total), None, Some(blocks)) if blocks > total => {
            return refuse("refcount-cache-size may not exceed cache-size");
        }
        (Some(total), Some(l2), None) => (l2.min(all), total - l2),
        (Some(total), None, Some(blocks)) => (total - blocks, blocks),
        // The L2 tables first, as far as there are any.
        (Some(total), None, None) if total >= all.saturating_add(least) => (all, total - all),
        (Some(total), None, None) => (total - total.min(least), total.min(least)),
        (None, l2, blocks) => (l2.unwrap_or(DEFAULT_L2_CACHE).min(all), blocks.unwrap_or(least)),
    };
    if l2 / slice_bytes > MAX_ENTRIES {
        return refuse("L2 cache size too big");
    }
    if refcounts >> geometry.cluster_bits() > MAX_ENTRIES {
        return refuse("Refcount cache size too big");
    }
    // More than the disk has are never filled.
    let slices = (l2.min(all) / slice_bytes).max(2) as usize;
    Ok(CacheSizes { slices, refcounts: refcounts.max(least) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(options: Qcow2Options, disk: u64) -> Result<(u64, u64)> {
        let geometry = Geometry::new(16, 4, false).unwrap();
        let bits = slice_bits(&options, &geometry)?;
        let sizes = cache_sizes(&options, &geometry, disk, bits)?;
        Ok(((sizes.slices as u64) << (bits + 3), sizes.refcounts))
    }

    #[test]
    fn caches_are_no_larger_than_the_disk_needs_nor_than_asked() {
        let none = Qcow2Options::default();
        assert_eq!(sizes(none.clone(), 1 << 40).unwrap(), (32 << 20, 4 << 16));
        assert_eq!(sizes(none.clone(), 1 << 30).unwrap(), (128 << 10, 4 << 16));
        let total = Qcow2Options { cache_size: Some(1 << 20), ..none.clone() };
        assert_eq!(sizes(total.clone(), 1 << 40).unwrap(), (768 << 10, 256 << 10));
        assert_eq!(sizes(total.clone(), 1 << 30).unwrap(), (128 << 10, 896 << 10));
        let part = Qcow2Options { l2_cache_size: Some(512 << 10), ..total.clone() };
        assert_eq!(sizes(part, 1 << 40).unwrap(), (512 << 10, 512 << 10));
        let part = Qcow2Options { refcount_cache_size: Some(512 << 10), ..total };
        assert_eq!(sizes(part, 1 << 40).unwrap(), (512 << 10, 512 << 10));
        let huge = Qcow2Options { l2_cache_size: Some(u64::MAX), ..none.clone() };
        assert_eq!(sizes(huge, 1 << 30).unwrap().0, 128 << 10);
        for bad in [0, 256, 513, 1 << 17] {
            let entry = Qcow2Options { l2_cache_entry_size: Some(bad), ..none.clone() };
            assert!(sizes(entry, 1 << 30).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_that_contradict_each_other_are_refused_as_the_peer_does() {
        let options = |total, l2, blocks| Qcow2Options {
            cache_size: total,
            l2_cache_size: l2,
            refcount_cache_size: blocks,
            ..Qcow2Options::default()
        };
        let rows = [
            (options(Some(9 << 20), Some(1), Some(1)), "may not be set at the same time"),
            (options(Some(1 << 20), Some(2 << 20), None), "l2-cache-size may not exceed"),
            (options(Some(1 << 20), None, Some(2 << 20)), "refcount-cache-size may not exceed"),
            (options(None, None, Some(u64::MAX)), "Refcount cache size too big"),
        ];
        for (options, text) in rows {
            let error = sizes(options, 1 << 40).unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
        }
    }
}
