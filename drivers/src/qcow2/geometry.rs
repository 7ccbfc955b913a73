//! Cluster arithmetic: what a guest offset means in the L1 and L2 tables, and what a host
//! offset means in the refcount table and blocks.
//!
//! A [`Geometry`] can only be made from checked numbers, so everything computed from one can
//! shift without further checks (Q2). Offsets given to it may still be anything; where a result
//! could overflow it is an `Option`.

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

use super::format_error::{FormatError, Place};

/// The smallest `cluster_bits`: clusters of 512 bytes.
pub const MIN_CLUSTER_BITS: u32 = 9;
/// The largest `cluster_bits`: clusters of 2 MiB.
pub const MAX_CLUSTER_BITS: u32 = 21;
/// The smallest `cluster_bits` with extended L2 entries: 32 subclusters of 512 bytes.
pub const MIN_EXTENDED_L2_CLUSTER_BITS: u32 = 14;
/// The largest refcount order: 64-bit refcounts.
pub const MAX_REFCOUNT_ORDER: u32 = 6;
/// The first host offset, in bytes, that no table entry can name.
pub const HOST_OFFSET_LIMIT: u64 = 1 << 56;
/// The most bytes an L1 table may have.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// The most bytes a refcount table may have.
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// The bytes of one L1 or refcount-table entry.
pub const TABLE_ENTRY_BYTES: u64 = 8;

/// The numbers that fix how an image is cut into clusters and tables.
///
/// Cheap to copy; any thread may use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    cluster_bits: u32,
    refcount_order: u32,
    extended_l2: bool,
    external_data: bool,
}

/// A guest offset in the terms of the mapping tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestPosition {
    /// The entry of the L1 table. May be past the end of the table: guest offsets are not
    /// limited by a [`Geometry`].
    pub l1_index: u64,
    /// The entry of the L2 table, always less than [`Geometry::l2_entries`].
    pub l2_index: u32,
    /// Bytes into the cluster, always less than [`Geometry::cluster_size`].
    pub in_cluster: u32,
}

/// A host offset in the terms of the refcount tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefcountPosition {
    /// The entry of the refcount table. May be past the end of the table.
    pub table_index: u64,
    /// The refcount in the block, always less than [`Geometry::refcounts_per_block`].
    pub block_index: u32,
}

impl Geometry {
    /// The geometry of an image with these header fields.
    ///
    /// # Errors
    ///
    /// A field is out of the range of the format; the error's place is the header field.
    pub fn new(
        cluster_bits: u32,
        refcount_order: u32,
        extended_l2: bool,
    ) -> Result<Self, FormatError> {
        if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
            return Err(FormatError::number(
                "cluster_bits",
                cluster_bits.into(),
                Place::Header(20),
                format!("is not in {MIN_CLUSTER_BITS}..={MAX_CLUSTER_BITS}"),
            ));
        }
        if refcount_order > MAX_REFCOUNT_ORDER {
            return Err(FormatError::number(
                "refcount_order",
                refcount_order.into(),
                Place::Header(96),
                format!("exceeds {MAX_REFCOUNT_ORDER} (64-bit refcounts)"),
            ));
        }
        if extended_l2 && cluster_bits < MIN_EXTENDED_L2_CLUSTER_BITS {
            return Err(FormatError::number(
                "cluster_bits",
                cluster_bits.into(),
                Place::Header(20),
                format!(
                    "is less than {MIN_EXTENDED_L2_CLUSTER_BITS}, which extended L2 entries need"
                ),
            ));
        }
        Ok(Geometry { cluster_bits, refcount_order, extended_l2, external_data: false })
    }

    /// The same with the guest's clusters in a file of their own, where offset 0 is a place like
    /// any other.
    #[must_use]
    pub fn with_external_data(self, external_data: bool) -> Self {
        Geometry { external_data, ..self }
    }

    /// Whether L2 entries name places in an external data file.
    pub fn external_data(&self) -> bool {
        self.external_data
    }

    /// The base-2 logarithm of the cluster size, 9 to 21.
    pub fn cluster_bits(&self) -> u32 {
        self.cluster_bits
    }

    /// The bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The base-2 logarithm of the bits of a refcount, 0 to 6.
    pub fn refcount_order(&self) -> u32 {
        self.refcount_order
    }

    /// Whether L2 entries have a second word of subcluster bits.
    pub fn extended_l2(&self) -> bool {
        self.extended_l2
    }

    /// The bytes of the smallest part of a cluster that has a mapping of its own: a subcluster with
    /// extended L2, else the cluster.
    pub fn subcluster_size(&self) -> u64 {
        if self.extended_l2 { self.cluster_size() / 32 } else { self.cluster_size() }
    }

    /// The bytes of one L2 entry: 8, or 16 with extended L2.
    pub fn l2_entry_bytes(&self) -> u64 {
        1 << self.l2_entry_order()
    }

    /// The entries of an L2 table, which is always one cluster.
    pub fn l2_entries(&self) -> u64 {
        1 << self.l2_bits()
    }

    /// The base-2 logarithm of [`Geometry::l2_entries`].
    pub fn l2_bits(&self) -> u32 {
        self.cluster_bits - self.l2_entry_order()
    }

    /// The guest bytes that one L1 entry maps.
    pub fn bytes_per_l1_entry(&self) -> u64 {
        // At most 2^(21+18).
        1 << (self.cluster_bits + self.l2_bits())
    }

    /// The L1 entries that a disk of `size` bytes needs (0 for size 0). Not limited to what an
    /// L1 table may have; see [`Geometry::max_l1_entries`].
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.bytes_per_l1_entry())
    }

    /// The most entries an L1 table may have.
    pub fn max_l1_entries(&self) -> u64 {
        MAX_L1_BYTES / TABLE_ENTRY_BYTES
    }

    /// The largest disk, in bytes, that a full-sized L1 table maps.
    pub fn max_guest_size(&self) -> u64 {
        // At most 2^(22+39).
        self.max_l1_entries() * self.bytes_per_l1_entry()
    }

    /// Where the mapping of guest byte `offset` is found.
    pub fn split(&self, offset: u64) -> GuestPosition {
        let l2_index = (offset >> self.cluster_bits) & (self.l2_entries() - 1);
        GuestPosition {
            l1_index: offset >> (self.cluster_bits + self.l2_bits()),
            l2_index: l2_index as u32,
            in_cluster: self.in_cluster(offset) as u32,
        }
    }

    /// The guest offset whose cluster the L1 entry `l1_index` and the L2 entry `l2_index` map;
    /// `None` when it is past 2^64 or the L2 table has no such entry.
    pub fn guest_offset(&self, l1_index: u64, l2_index: u32) -> Option<u64> {
        if u64::from(l2_index) >= self.l2_entries() {
            return None;
        }
        l1_index
            .checked_mul(self.bytes_per_l1_entry())?
            .checked_add(u64::from(l2_index) << self.cluster_bits)
    }

    /// The bits of one refcount: 1, 2, 4 … 64.
    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// The largest refcount that fits.
    pub fn max_refcount(&self) -> u64 {
        u64::MAX >> (64 - self.refcount_bits())
    }

    /// The refcounts of one refcount block, which is always one cluster.
    pub fn refcounts_per_block(&self) -> u64 {
        1 << self.refcounts_per_block_bits()
    }

    /// Where the refcount of the cluster that holds host byte `offset` is found.
    pub fn refcount_position(&self, offset: u64) -> RefcountPosition {
        let cluster = offset >> self.cluster_bits;
        RefcountPosition {
            table_index: cluster >> self.refcounts_per_block_bits(),
            block_index: (cluster & (self.refcounts_per_block() - 1)) as u32,
        }
    }

    /// The host offset of the first cluster that refcount-table entry `table_index` counts;
    /// `None` when it is past what an entry can name.
    pub fn first_counted_offset(&self, table_index: u64) -> Option<u64> {
        table_index
            .checked_mul(self.refcounts_per_block())?
            .checked_mul(self.cluster_size())
            .filter(|&offset| offset < HOST_OFFSET_LIMIT)
    }

    /// The most clusters a refcount table may have.
    pub fn max_refcount_table_clusters(&self) -> u64 {
        MAX_REFCOUNT_TABLE_BYTES >> self.cluster_bits
    }

    /// The entries of a refcount table of `clusters` clusters, at most
    /// [`Geometry::max_refcount_table_clusters`] being taken into account.
    pub fn refcount_table_entries(&self, clusters: u32) -> u64 {
        let clusters = u64::from(clusters).min(self.max_refcount_table_clusters());
        (clusters << self.cluster_bits) / TABLE_ENTRY_BYTES
    }

    /// The clusters that `bytes` bytes need.
    pub fn clusters_for(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// `offset` less its distance from the start of its cluster.
    pub fn align_down(&self, offset: u64) -> u64 {
        offset & !(self.cluster_size() - 1)
    }

    /// The first cluster boundary at or after `offset`; `None` past 2^64.
    pub fn align_up(&self, offset: u64) -> Option<u64> {
        offset.checked_next_multiple_of(self.cluster_size())
    }

    /// Whether `offset` is a cluster boundary.
    pub fn is_aligned(&self, offset: u64) -> bool {
        self.in_cluster(offset) == 0
    }

    /// The bytes from the start of its cluster to `offset`.
    pub fn in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// The bit of a compressed L2 entry at which the sector count begins, 49 to 61; the bits
    /// below are the host offset, the bits from here to 61 the count.
    pub fn compressed_count_shift(&self) -> u32 {
        62 - (self.cluster_bits - 8)
    }

    /// The base-2 logarithm of [`Geometry::l2_entry_bytes`].
    pub fn l2_entry_order(&self) -> u32 {
        if self.extended_l2 { 4 } else { 3 }
    }

    fn refcounts_per_block_bits(&self) -> u32 {
        // Bits of a cluster over bits of a refcount: 2^(9+3-6) at the least.
        self.cluster_bits + 3 - self.refcount_order
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_geometry() -> impl Strategy<Value = Geometry> {
        (MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS, 0..=MAX_REFCOUNT_ORDER)
            .prop_map(|(bits, order)| Geometry::new(bits, order, false).unwrap())
    }

    #[test]
    fn default_image_has_the_numbers_of_the_specification() {
        let geometry = Geometry::new(16, 4, false).unwrap();
        assert_eq!(geometry.l2_entries(), 8192);
        assert_eq!(geometry.bytes_per_l1_entry(), 512 << 20);
        assert_eq!(geometry.refcounts_per_block(), 32768);
        assert_eq!(geometry.max_guest_size(), 2 << 50);
        assert_eq!(geometry.compressed_count_shift(), 54);
        assert_eq!(geometry.max_refcount(), 0xffff);
        assert_eq!(geometry.max_refcount_table_clusters(), 128);
        let position = geometry.split((512 << 20) * 3 + 65536 * 5 + 7);
        let expected = GuestPosition { l1_index: 3, l2_index: 5, in_cluster: 7 };
        assert_eq!(position, expected);
    }

    #[test]
    fn extended_entries_halve_the_table() {
        let geometry = Geometry::new(16, 4, true).unwrap();
        assert_eq!(geometry.l2_entries(), 4096);
        assert_eq!(geometry.l2_entry_bytes(), 16);
        assert!(Geometry::new(13, 4, true).is_err());
    }

    #[test]
    fn out_of_range_fields_are_refused_before_any_shift() {
        for bits in [0, 8, 22, 31, 63, 64, u32::MAX] {
            assert!(Geometry::new(bits, 4, false).is_err(), "H03 {bits}");
        }
        for order in [7, 31, 32, 255, u32::MAX] {
            assert!(Geometry::new(16, order, false).is_err(), "H16 {order}");
        }
    }

    proptest! {
        #[test]
        fn split_and_guest_offset_are_inverse(geometry in any_geometry(), offset: u64) {
            let position = geometry.split(offset);
            let cluster = geometry.guest_offset(position.l1_index, position.l2_index).unwrap();
            prop_assert_eq!(cluster + u64::from(position.in_cluster), offset);
        }

        #[test]
        fn refcount_position_and_first_counted_offset_agree(
            geometry in any_geometry(),
            offset in 0..HOST_OFFSET_LIMIT,
        ) {
            let position = geometry.refcount_position(offset);
            let first = geometry.first_counted_offset(position.table_index).unwrap();
            let cluster = first + (u64::from(position.block_index) << geometry.cluster_bits());
            prop_assert_eq!(cluster, geometry.align_down(offset));
        }
    }
}
