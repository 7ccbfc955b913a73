//! From guest offsets to places: what tier 1 does for every request, without a lock.

use super::Qcow2;
use super::entry::{Cluster, EntryError, L1Entry, L2Entry};
use super::slice::{Slice, SliceNumber};
use blockplex_graph::{Error, ErrorKind};

/// Where the guest bytes of an extent are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The slice that knows it is not in memory.
    Missing,
    /// Not in this image.
    Unallocated,
    /// Nowhere: zeros.
    Zero,
    /// In the file, in a row.
    Data {
        /// Of the extent's first byte.
        host: u64,
        /// May be overwritten in place.
        copied: bool,
    },
    /// In the file, compressed. The extent ends with the cluster.
    Compressed {
        /// The first byte of the stream.
        host: u64,
        /// The most bytes that it has.
        length: u64,
    },
    /// Nobody can tell: the entry is damaged.
    Bad(Fault),
}

/// A damaged entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// It breaks a rule of the format.
    Entry(EntryError),
    /// This L2 entry names a cluster that holds metadata; or, in an external data file, one that
    /// belongs to another guest cluster.
    Misplaced(u64),
    /// This L1 entry names no L2 table: it lies outside of the file, on other metadata, or
    /// belongs to another L1 entry.
    Table(u64),
}

impl Fault {
    /// Whether the image is to be marked corrupt; otherwise just this cluster cannot be read.
    pub(super) fn is_corruption(&self) -> bool {
        match self {
            Fault::Entry(error) => error.is_corruption(),
            Fault::Misplaced(_) | Fault::Table(_) => true,
        }
    }

    /// The error of the request that met it, at this guest offset.
    pub(super) fn at(self, guest: u64) -> Error {
        let text = match self {
            Fault::Entry(error) => format!("guest offset {guest:#x}: {error}"),
            Fault::Misplaced(raw) => format!(
                "guest offset {guest:#x}: L2 entry {raw:#018x} points onto metadata or another \
                 cluster's place"
            ),
            Fault::Table(raw) => {
                format!("guest offset {guest:#x}: L1 entry {raw:#018x} names no L2 table")
            }
        };
        Error::new(ErrorKind::Corrupt, text)
    }
}

/// What is known of the bytes from an offset on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) place: Place,
    /// How far it holds, in bytes: at least 1.
    pub(super) length: u64,
}

impl Extent {
    /// Whether it goes on where `before`, the extent that ends where this one begins, ended.
    pub(super) fn follows(&self, before: &Extent) -> bool {
        match (before.place, self.place) {
            (Place::Compressed { .. } | Place::Bad(_), _) => false,
            (Place::Data { host, copied }, Place::Data { host: next, copied: next_copied }) => {
                copied == next_copied && host + before.length == next
            }
            (before, next) => before == next,
        }
    }
}

/// A place in a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SlicePosition {
    pub(super) number: SliceNumber,
    /// The entry.
    pub(super) index: usize,
    /// Bytes into the cluster.
    pub(super) in_cluster: u64,
    /// Bytes from here to the end of what the slice maps.
    pub(super) rest: u64,
}

impl Qcow2 {
    /// Where the entry of a guest offset is.
    #[inline]
    pub(super) fn position(&self, offset: u64) -> SlicePosition {
        let bits = self.geometry.cluster_bits();
        let cluster = offset >> bits;
        let entries = 1_u64 << self.slice_bits;
        SlicePosition {
            number: cluster >> self.slice_bits,
            index: (cluster & (entries - 1)) as usize,
            in_cluster: self.geometry.in_cluster(offset),
            rest: (entries << bits) - (offset & ((entries << bits) - 1)),
        }
    }

    /// The L1 entry that a slice belongs to.
    pub(super) fn l1_index(&self, number: SliceNumber) -> u64 {
        number >> (self.geometry.l2_bits() - self.slice_bits)
    }

    /// Where the next `length` bytes from `offset` on are, or some of them. Any thread; takes no
    /// lock.
    #[inline]
    pub(super) fn look_up(&self, offset: u64, length: u64) -> Extent {
        let position = self.position(offset);
        let length = length.min(position.rest);
        let found = self.slices.with(position.number, |slice| {
            self.extent_in(slice, position.index, position.in_cluster, length)
        });
        found.unwrap_or_else(|| self.without_slice(position.number, length))
    }

    /// What can be said of `length` bytes of a slice that is not in memory.
    fn without_slice(&self, number: SliceNumber, length: u64) -> Extent {
        let l1_index = self.l1_index(number);
        let place = match L1Entry::decode(self.l1.get(l1_index), &self.geometry) {
            Ok(L1Entry::Unallocated) => Place::Unallocated,
            Ok(L1Entry::Table { .. }) => Place::Missing,
            Err(error) => Place::Bad(Fault::Entry(error)),
        };
        Extent { place, length }
    }

    /// What `slice` says of `length` bytes from byte `in_cluster` of entry `index` on, or of some
    /// of them.
    #[inline]
    pub(super) fn extent_in(
        &self,
        slice: &Slice,
        index: usize,
        in_cluster: u64,
        length: u64,
    ) -> Extent {
        // Most requests lie in one cluster that is data.
        if length <= self.geometry.cluster_size() - in_cluster
            && let Some((host, copied)) = L2Entry::plain(slice.entry(index), &self.geometry)
            && !slice.has_suspects()
        {
            return Extent { place: Place::Data { host: host + in_cluster, copied }, length };
        }
        self.any_extent_in(slice, index, in_cluster, length)
    }

    fn any_extent_in(&self, slice: &Slice, index: usize, in_cluster: u64, length: u64) -> Extent {
        if self.geometry.extended_l2() {
            return self.subcluster_extent(slice, index, in_cluster, length);
        }
        let cluster_size = self.geometry.cluster_size();
        let first = self.decode(slice, index, slice.entry(index));
        let mut end = cluster_size - in_cluster;
        let mut next = index + 1;
        if !matches!(first, Place::Compressed { .. } | Place::Bad(_)) {
            while end < length && self.goes_on(slice, first, next - index, next) {
                end += cluster_size;
                next += 1;
            }
        }
        let place = match first {
            Place::Data { host, copied } => Place::Data { host: host + in_cluster, copied },
            other => other,
        };
        Extent { place, length: end.min(length) }
    }

    /// Whether entry `next` continues an extent that began `steps` clusters before at `first`.
    fn goes_on(&self, slice: &Slice, first: Place, steps: usize, next: usize) -> bool {
        let place = self.decode(slice, next, slice.entry(next));
        match (first, place) {
            (Place::Data { host, copied }, Place::Data { host: next, copied: next_copied }) => {
                let distance = (steps as u64) << self.geometry.cluster_bits();
                copied == next_copied && host + distance == next
            }
            (first, next) => first == next,
        }
    }

    /// Where the cluster of one raw entry of `slice`, which is not extended, is.
    pub(super) fn decode(&self, slice: &Slice, index: usize, raw: u64) -> Place {
        if slice.is_suspect(index) {
            return Place::Bad(Fault::Misplaced(raw));
        }
        match L2Entry::decode(raw, &self.geometry, self.version) {
            Ok(Cluster::Unallocated) => Place::Unallocated,
            Ok(Cluster::Zero { .. }) => Place::Zero,
            Ok(Cluster::Normal { host, copied }) => Place::Data { host, copied },
            Ok(Cluster::Compressed { host, length }) => Place::Compressed { host, length },
            Err(error) => Place::Bad(Fault::Entry(error)),
        }
    }
}
