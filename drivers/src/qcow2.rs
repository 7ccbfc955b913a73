//! The qcow2 format: codecs, and the driver.
//!
//! ```text
//!             map() ── look_up ──► slice_cache (lock-free) ──► place, pinned by `grace`
//!   serve() ─┬ read ── loader ─────────┤
//!            ├ write ── range lock ── allocate ── write data ── commit ──┐
//!            ├ erase ───────────────────────────────────── commit ──────┤
//!            └ flush ── writeback ◄── dirty slices, L1, refcounts ◄──────┘
//!                          └────────► limbo ──► free clusters
//! ```
//!
//! The driver's rule is *map → pin → I/O → commit*: a host cluster that a request was told of is
//! not used for anything else before the request has ended, and an allocating write becomes
//! visible by one store after its data is written. No lock over the whole image is held on the
//! data path: requests to different clusters do not wait for each other.
//!
//! | part | what it does |
//! |---|---|
//! | `open`, `create` | opening with every table checked first; new images |
//! | `driver` | the driver contract: tier 1, and who serves what |
//! | `lookup`, `slice_cache`, `slice`, `l1_table`, `loader` | the mapping in memory |
//! | `read`, `write`, `compressed_write`, `erase`, `status`, `resize`, `shrink`, `preallocate` | the requests |
//! | `make_empty` | dropping everything that an image has |
//! | `subclusters` | extended L2 entries: look-up and writes by subclusters |
//! | `data_file` | where the guest's clusters are: the file, or an external data file |
//! | `encryption` | keys, and the guest's clusters as ciphertext |
//! | `discard` | which discards reach the file |
//! | `refcounts`, `limbo` | free clusters, those on their way to being free, and how far the file reaches |
//! | `cache_sizes`, `cache_cleaning`, `reopen` | how large the caches are, what leaves them, new options |
//! | `lazy_refcounts` | refcounts that are written late |
//! | `writeback` | the order in which metadata reaches the disk |
//! | `bitmap` | dirty bitmaps, stored in the image or not |
//! | `snapshot` | internal snapshots, and the VM state that they have |
//! | `overlap` | writes that would hit metadata |
//! | `locks` | the locks and their order |
//! | `truths` | what must hold, what holds it, and what fails when it breaks |
//! | `integrity` | the first write, and damaged images |
//! | [`amend`] | changing what an image was created with |
//! | [`check`] | finding and repairing damage, on the file of an image that is not open |
//! | `header_update` | changing the header of an open image |
//!
//! The codecs are *structures on disk turned into values and back, by pure functions*: nothing in
//! them reads a file, takes a lock, keeps state or knows of the graph.
//!
//! | module | what it knows |
//! |---|---|
//! | [`header`] | the header: validation, extensions, serialisation |
//! | [`extension`] | one header extension after the other, from bytes and to bytes |
//! | [`geometry`] | cluster arithmetic: what a guest or host offset means in tables |
//! | [`entry`] | one L1, L2 or refcount-table entry |
//! | [`bitmap_directory`] | the directory of persistent bitmaps, and their tables |
//! | [`snapshot_table`] | the entries of the snapshot table |
//! | [`subcluster`] | the second word of an extended L2 entry |
//! | [`refcount_block`] | one refcount of 1 to 64 bits in a block |
//! | [`codec`] | compressed clusters |
//! | [`image_layout`] | the bytes of a fresh image |
//! | [`measure`] | how large an image's file would be |
//! | [`format_error`] | what all of them say when bytes are not as the format wants |
//!
//! Truths of all modules, cited by number:
//!
//! - **Q1** No input makes them panic, loop without end, or allocate more than one cluster or
//!   the length of the input, whichever is larger (`image_layout`: the metadata of the image).
//! - **Q2** Arithmetic on values from an image is checked; a shift happens only by a number
//!   that was checked against the width.
//! - **Q3** An error names the field, its value, where it stands, and the rule it breaks; text
//!   that came from the image is escaped and cut before it is shown.
//!
//! The locks, and the order in which they are taken, stand in `locks` (LK1, LK2).

pub mod amend;
mod bitmap;
pub mod bitmap_directory;
mod cache_cleaning;
mod cache_sizes;
pub mod check;
pub mod codec;
mod compressed_write;
mod create;
mod data_file;
mod discard;
mod driver;
mod encryption;
pub mod entry;
mod erase;
pub mod extension;
pub mod format_error;
pub mod geometry;
pub mod header;
mod header_update;
pub mod image_layout;
mod integrity;

mod l1_table;
mod layers;
mod lazy_refcounts;
mod limbo;
mod loader;
mod locks;
mod lookup;
mod make_empty;
pub mod measure;
pub mod notice;
mod open;
mod overlap;
mod preallocate;
mod read;
pub mod refcount_block;
mod refcounts;
mod reopen;
mod resize;
mod shrink;
mod slice;
mod slice_cache;
mod snapshot;
pub mod snapshot_table;
mod status;
pub mod subcluster;
mod subclusters;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod truths;
mod write;
mod writeback;

pub use bitmap::{BitmapInformation, BitmapStatus, NewBitmap};
pub use create::{create, create_with_data_file};
pub use encryption::{
    CreateEncryption, EncryptionFormat, EncryptionInformation, EncryptionOptions,
};
pub use image_layout::CreateOptions;
pub use open::{BackingReference, ImageInformation, Qcow2Options};
pub use overlap::{OverlapChecks, Structure};
pub use snapshot::{MAX_SNAPSHOT_NAME_BYTES, NewSnapshot, Snapshot, SnapshotSelector};

use crate::join;
use bitmap::Bitmaps;
use blockplex_drain::Grace;
use blockplex_io::lock::{CoMutex, RangeLock};
use cache_cleaning::CacheCleaning;
use codec::{Compressor, Decompressor};
use data_file::ExternalData;
use discard::DiscardRules;
use encryption::Encryption;
use entry::Version;
use geometry::Geometry;
use header::Header;
use integrity::Integrity;
use l1_table::L1Table;
use lazy_refcounts::LazyRefcounts;
use limbo::Limbo;
use locks::Ranked;
use parking_lot::Mutex;
use refcounts::Refcounts;
use slice_cache::SliceCache;
use snapshot::Snapshots;
use status::Preallocated;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use writeback::Rounds;

/// An open qcow2 image: the driver of a node. See the page of this module.
///
/// Its children are, in this order, the file and, where there are any, the external data file and the
/// backing node. An image
/// whose header names a backing file and that has no backing child reads as zeros where it has
/// nothing of its own.
pub struct Qcow2 {
    geometry: Geometry,
    version: Version,
    read_only: bool,
    information: ImageInformation,
    /// Bytes of the virtual disk.
    size: AtomicU64,
    /// The base-2 logarithm of the entries of a slice.
    slice_bits: u32,
    /// L1 entries that name no L2 table, as opening found.
    bad_tables: BTreeSet<u64>,
    l1: L1Table,
    /// Turns to give an L1 entry a table of its own.
    l1_turns: Ranked<RangeLock, { locks::L1_ENTRY }>,
    slices: Arc<SliceCache>,
    refcounts: Arc<Refcounts>,
    cleaning: Arc<CacheCleaning>,
    lazy: Arc<LazyRefcounts>,
    /// The edge to what holds the guest's clusters.
    data_edge: usize,
    external: Option<ExternalData>,
    encryption: Option<Encryption>,
    /// Who was told of host clusters.
    grace: Grace,
    limbo: Limbo,
    discards: Arc<DiscardRules>,
    preallocated: Preallocated,
    /// Guest clusters whose mapping is being changed.
    ranges: Ranked<RangeLock, { locks::RANGE }>,
    rounds: Rounds,
    /// The turn to change the size, or to do other management work.
    resizing: Ranked<CoMutex<()>, { locks::RESIZE }>,
    header: Ranked<CoMutex<Header>, { locks::HEADER }>,
    snapshots: Mutex<Snapshots>,
    bitmaps: Bitmaps,
    /// The snapshot that is shown instead of the disk.
    shown: Option<SnapshotSelector>,
    integrity: Integrity,
    /// Decompressors at rest.
    decompressors: Arc<Mutex<Vec<Decompressor>>>,
    /// Compressors at rest.
    compressors: Arc<Mutex<Vec<Compressor>>>,
}

impl std::fmt::Debug for Qcow2 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qcow2").field("information", &self.information).finish_non_exhaustive()
    }
}
