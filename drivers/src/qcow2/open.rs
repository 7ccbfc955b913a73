//! Opening an image: everything that the driver relies on is checked here, once.
//!
//! Tables are read only after the header was checked against the file's length, so nothing is
//! allocated on the word of an image alone. What endangers only writes refuses a read-write open
//! and lets a read-only one pass, so that data can be rescued.

use super::Qcow2;
use super::bitmap::{self, BitmapInformation, Bitmaps};
use super::bitmap_directory::BitmapEntry;
use super::cache_cleaning::{CacheCleaning, clean_interval};
use super::cache_sizes::{cache_sizes, slice_bits};
use super::check::{CheckOptions, Fix, check};
use super::data_file::ExternalData;
use super::discard::DiscardRules;
use super::encryption::{Encryption, EncryptionInformation, EncryptionOptions};
use super::entry::{L1Entry, Version, decode_refcount_table_entry};
use super::geometry::{Geometry, TABLE_ENTRY_BYTES};
use super::header::{CompressionType, Header, PROBE_BYTES, feature};
use super::integrity::Integrity;
use super::l1_table::L1Table;
use super::layers::{DATA, FILE, NOWHERE};
use super::lazy_refcounts::{LazyRefcounts, wants_lazy};
use super::limbo::Limbo;
use super::locks::Ranked;
use super::notice;
use super::overlap::{OverlapChecks, Structure, inactive_tables};
use super::refcounts::Refcounts;
use super::slice_cache::SliceCache;
use super::snapshot::{self, Snapshot, SnapshotSelector, Snapshots};
use super::status::Preallocated;
use super::writeback::Rounds;
use blockplex_drain::Grace;
use blockplex_graph::{Child, DebugEvent, Error, ErrorKind, Result};
use blockplex_io::buffer::IoVector;
use blockplex_io::lock::{CoMutex, RangeLock};
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// Options of an open image, under the names that QEMU has for them. All sizes in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Qcow2Options {
    /// `cache-size`: bounds both caches together.
    pub cache_size: Option<u64>,
    /// `l2-cache-size`: bounds the L2 tables in memory; default: what the disk needs, at most
    /// 32 MiB.
    pub l2_cache_size: Option<u64>,
    /// `l2-cache-entry-size`: the part of an L2 table that is read and kept as one; a power of
    /// two from 512 to the cluster size, default 4096 or a smaller cluster. Cannot be changed while
    /// the image is open.
    pub l2_cache_entry_size: Option<u64>,
    /// `refcount-cache-size`: bounds the refcount blocks in memory; default and least: 4
    /// clusters.
    pub refcount_cache_size: Option<u64>,
    /// `pass-discard-request`: the guest's discards reach the file; default: on. (They reach the
    /// image only with the node's `discard=unmap`.)
    pub pass_discard_request: Option<bool>,
    /// `pass-discard-snapshot`: what a deleted snapshot leaves is discarded in the file; default: on.
    pub pass_discard_snapshot: Option<bool>,
    /// `pass-discard-other`: so is everything else that is freed; default: off.
    pub pass_discard_other: Option<bool>,
    /// `discard-no-unref`: discarded clusters keep their place in the image; default: off. Needs
    /// version 3.
    pub discard_no_unref: Option<bool>,
    /// `cache-clean-interval`: what was not used for so many seconds leaves the caches; 0: nothing
    /// does. Default 600.
    pub cache_clean_interval: Option<u64>,
    /// `lazy-refcounts`: refcounts are written late, under the dirty bit. Default: what the image
    /// says. Version 3 only.
    pub lazy_refcounts: Option<bool>,
    /// `data-file` is null: the image is opened, read-only, without its external data file. What
    /// its metadata says can be read, its data cannot.
    pub without_data_file: bool,
    /// `encrypt.*`.
    pub encryption: EncryptionOptions,
    /// Shows this internal snapshot instead of the disk, read-only. Cannot be changed while the
    /// image is open.
    pub snapshot: Option<SnapshotSelector>,
    /// `overlap-check`: which metadata is watched for writes that would hit it; default: `cached`.
    pub overlap_check: Option<OverlapChecks>,
}

/// The backing file that an image names. Nobody has opened it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingReference {
    /// The name as it stands in the image: a path, relative to the image, or something else.
    pub name: Vec<u8>,
    /// Its format, if the image says so. Text from the image: escape it before showing it.
    pub format: Option<String>,
}

/// What an image says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageInformation {
    /// Bytes of the virtual disk when it was opened.
    pub virtual_size: u64,
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// The format version.
    pub version: Version,
    /// How compressed clusters are compressed.
    pub compression_type: CompressionType,
    /// Bits of a refcount.
    pub refcount_bits: u32,
    /// Refcounts may be written late.
    pub lazy_refcounts: bool,
    /// The refcounts may be wrong (dirty bit).
    pub dirty: bool,
    /// The image is marked as corrupt.
    pub corrupt: bool,
    /// Internal snapshots.
    pub snapshots: u32,
    /// The backing file it names.
    pub backing: Option<BackingReference>,
    /// The disk's data is in an external data file.
    pub has_data_file: bool,
    /// The external data file that it names: a path, relative to the image. Without a name, whoever
    /// opens the image must know it.
    pub data_file: Option<Vec<u8>>,
    /// `data_file_raw`: the external data file is a whole raw image at all times.
    pub data_file_raw: bool,
    /// L2 entries have subclusters.
    pub extended_l2: bool,
    /// How the guest's data is encrypted.
    pub encryption: Option<EncryptionInformation>,
    /// The persistent bitmaps, unless they are stale.
    pub bitmaps: Vec<BitmapInformation>,
}

impl Qcow2 {
    /// Opens the image in `file`: reads and checks header, L1 table and refcount table. On a loop;
    /// the file's permissions must allow reading, for a read-write open also writing and resizing.
    /// Writes nothing, but that a read-write open repairs an image with the dirty bit first, whose
    /// last writer did not get to close it.
    ///
    /// The node of the driver gets `file`'s node as its first child. The next one, in
    /// [`Role::Data`](blockplex_graph::Role::Data), is the external data file, if
    /// [`has_data_file`](ImageInformation::has_data_file) says so; without it, all metadata
    /// can be read, and no data. Then comes, if it is wanted, the [`backing`](Qcow2::backing) node.
    ///
    /// # Errors
    ///
    /// `InvalidArgument`: not a qcow2 image, options that cannot be, or an encrypted image without
    /// a key; `PermissionDenied`: the wrong key. `NotSupported`: a cipher that is not known,
    /// unknown incompatible features. `Corrupt`: a
    /// field breaks a rule; for a read-write open also what endangers only writes, among it a set
    /// corrupt bit, and damage that a repair leaves alone.
    pub async fn open(file: &Child, options: Qcow2Options, read_only: bool) -> Result<Qcow2> {
        let mut header = read_header(file, file.length()).await?;
        if !read_only && header.is_dirty() && !header.is_marked_corrupt() {
            repair(file).await?;
            header = read_header(file, file.length()).await?;
        }
        let file_length = file.length();
        if !read_only {
            refuse_writing(&header)?;
        }
        check_modes(&options, &header, read_only)?;
        for warning in &header.warnings {
            tracing::warn!(node = file.view().name(), %warning, "opening a qcow2 image");
        }
        DiscardRules::check(&options, header.version)?;
        let opened = Encryption::open(file, &header, &options.encryption).await?;
        let (encryption, encryption_information) = opened.unzip();
        let geometry = header.geometry();
        let interval = clean_interval(&options)?;
        let lazy = LazyRefcounts::new(wants_lazy(&options, &header)?);
        let slice_bits = slice_bits(&options, &geometry)?;
        let sizes = cache_sizes(&options, &geometry, header.size, slice_bits)?;
        let snapshot_table = snapshot::table::read(file, &header, file_length).await?;
        let table_bytes = snapshot_table.bytes;
        let directory = bitmap::read_directory(file, &header, file_length).await?;
        let table = read_refcount_table(file, &header, file_length).await;
        let table = if read_only { table.unwrap_or_default() } else { table? };
        let place = header.refcount_table_offset;
        let refcounts = Refcounts::new(geometry, table, place, file_length, sizes.refcounts);
        refcounts.set_checks(options.overlap_check.unwrap_or_default());
        let bad_blocks = add_metadata(&refcounts, &header, file_length);
        let admit = || snapshot::table::admit(snapshot_table, &header, &refcounts, file_length);
        let (snapshots, l1, bad_tables) = match &options.snapshot {
            None => {
                let bytes = u64::from(header.l1_size) * TABLE_ENTRY_BYTES;
                let l1 = read_table(file, header.l1_table_offset, bytes).await?;
                let bad_tables = find_bad_tables(&refcounts, &geometry, &l1, file_length);
                (admit(), l1, bad_tables)
            }
            Some(which) => {
                let snapshots = admit();
                let l1 = show_snapshot(file, &mut header, &snapshots, which).await?;
                let bad_tables = find_bad_tables(&refcounts, &geometry, &l1, file_length);
                (snapshots, l1, bad_tables)
            }
        };
        if !read_only {
            bad_blocks?;
            check_counted(&refcounts, &header, file).await?;
        }
        let source =
            bitmap::Source { file, header: &header, refcounts: &refcounts, file_length, read_only };
        let bitmaps = match options.snapshot {
            None => source.load(&directory).await?,
            // They are the disk's.
            Some(_) => Vec::new(),
        };
        if refcounts.checks().contains(Structure::InactiveL2) && !read_only {
            let tables = inactive_tables(file, &snapshots, &geometry).await?;
            refcounts.replace_overlay(Structure::InactiveL2, &tables);
        }
        let (slices, refcounts) = (Arc::new(SliceCache::new(sizes.slices)), Arc::new(refcounts));
        let cleaning = CacheCleaning::new(&slices, &refcounts);
        cleaning.prepare(file.local(), interval).begin();
        Ok(Qcow2 {
            geometry,
            version: header.version,
            read_only,
            information: ImageInformation {
                encryption: encryption_information,
                ..information(&header, &directory)
            },
            encryption,
            size: AtomicU64::new(header.size),
            slice_bits,
            bad_tables,
            l1: L1Table::new(header.l1_table_offset, &l1),
            l1_turns: Ranked::new(RangeLock::new()),
            slices,
            refcounts,
            cleaning,
            lazy: Arc::new(lazy),
            data_edge: match (header.has_data_file(), options.without_data_file) {
                (false, _) => FILE,
                (true, false) => DATA,
                (true, true) => NOWHERE,
            },
            external: header.has_data_file().then(|| ExternalData::new(header.has_raw_data_file())),
            grace: Grace::new(),
            limbo: Limbo::default(),
            discards: Arc::new(DiscardRules::new(&options)),
            preallocated: Preallocated::default(),
            ranges: Ranked::new(RangeLock::new()),
            rounds: Rounds::new(),
            resizing: Ranked::new(CoMutex::new(())),
            snapshots: Mutex::new(Snapshots {
                list: snapshots,
                table_clusters: geometry.clusters_for(table_bytes),
            }),
            shown: options.snapshot,
            bitmaps: Bitmaps::new(bitmaps),
            header: Ranked::new(CoMutex::new(header)),
            integrity: Integrity::default(),
            decompressors: Arc::default(),
            compressors: Arc::default(),
        })
    }

    /// The backing file that the image names.
    pub fn backing(&self) -> Option<BackingReference> {
        self.information.backing.clone()
    }

    /// Bytes of the virtual disk now. Any thread.
    pub fn virtual_size(&self) -> u64 {
        self.disk_size()
    }

    /// What the image said of itself when it was opened.
    pub fn information(&self) -> &ImageInformation {
        &self.information
    }
}

async fn read_bytes(file: &Child, offset: u64, length: u64) -> Result<Vec<u8>> {
    let memory = IoVector::zeroed(length as usize);
    file.read(offset, memory.clone()).await?;
    Ok(memory.to_vec())
}

async fn read_header(file: &Child, file_length: u64) -> Result<Header> {
    let probe = read_bytes(file, 0, file_length.min(PROBE_BYTES as u64)).await?;
    let cluster_size = 1_u64 << Header::cluster_bits_of(&probe)?;
    let bytes = read_bytes(file, 0, file_length.min(cluster_size)).await?;
    let header = Header::parse(&bytes, file_length)?;
    Ok(header)
}

/// What the options show instead of the whole disk goes with how the image is opened.
fn check_modes(options: &Qcow2Options, header: &Header, read_only: bool) -> Result<()> {
    let refuse = |text| Err(Error::new(ErrorKind::InvalidArgument, text));
    if options.without_data_file && header.has_data_file() && !read_only {
        return refuse("an image is opened without its data file only read-only");
    }
    if options.snapshot.is_some() && !read_only {
        return refuse("an internal snapshot can only be opened read-only");
    }
    Ok(())
}

/// Makes `header`, which is never written, that of the disk as a snapshot has it; gives the
/// snapshot's L1 table.
async fn show_snapshot(
    file: &Child,
    header: &mut Header,
    snapshots: &[Snapshot],
    which: &SnapshotSelector,
) -> Result<Vec<u64>> {
    let snapshot = which.choose(snapshots)?;
    if let Some(problem) = &snapshot.problem {
        return Err(problem.clone());
    }
    let entry = &snapshot.entry;
    header.size = entry.disk_size.unwrap_or(header.size);
    (header.l1_table_offset, header.l1_size) = (entry.l1_table_offset, entry.l1_size);
    snapshot::read_l1(file, entry).await
}

/// Makes the refcounts of an image anew whose last writer did not get to close it.
async fn repair(file: &Child) -> Result<()> {
    tracing::warn!(node = file.view().name(), "repairing a qcow2 image that was not closed");
    let report = check(file, CheckOptions { fix: Fix::All }).await?;
    for message in &report.messages {
        tracing::info!(target: notice::REPAIR, "{message}");
    }
    if report.is_clean() {
        return Ok(());
    }
    let reason = report.failure.as_ref().map(ToString::to_string);
    let reason = reason.or_else(|| report.messages.first().map(ToString::to_string));
    let text = format!(
        "the image was not closed properly (dirty bit), and cannot be repaired: {}",
        reason.unwrap_or_default()
    );
    Err(Error::new(ErrorKind::Corrupt, text))
}

fn refuse_writing(header: &Header) -> Result<()> {
    if let Some(reason) = header.read_only_reasons.first() {
        let text = format!("the image can only be opened read-only: {reason}");
        return Err(Error::new(ErrorKind::Corrupt, text));
    }
    Ok(())
}

/// A table that lies in the file, as the header's rules have made sure.
async fn read_table(file: &Child, offset: u64, bytes: u64) -> Result<Vec<u64>> {
    let bytes = read_bytes(file, offset, bytes).await?;
    Ok(bytes.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word)).collect())
}

async fn read_refcount_table(file: &Child, header: &Header, file_length: u64) -> Result<Vec<u64>> {
    let geometry = header.geometry();
    let clusters = u64::from(header.refcount_table_clusters);
    let bytes = clusters << geometry.cluster_bits();
    let offset = header.refcount_table_offset;
    if offset.checked_add(bytes).is_none_or(|end| end > file_end(&geometry, file_length)) {
        let text = format!("the refcount table at {offset:#x} reaches past the end of the file");
        return Err(Error::new(ErrorKind::Corrupt, text));
    }
    file.announce(DebugEvent::ReftableLoad).await;
    read_table(file, offset, bytes).await
}

/// The end of the last cluster that the file has a part of.
fn file_end(geometry: &Geometry, file_length: u64) -> u64 {
    geometry.align_up(file_length).unwrap_or(u64::MAX)
}

/// Tells the refcounts where metadata is. Fails when a refcount block cannot be where the table
/// says (T13, T13f, T18).
fn add_metadata(refcounts: &Refcounts, header: &Header, file_length: u64) -> Result<()> {
    let geometry = header.geometry();
    let table_bytes = u64::from(header.refcount_table_clusters) << geometry.cluster_bits();
    refcounts.add_metadata(Structure::MainHeader, 0, 1);
    // A table that could not be read (only a read-only open comes here without one) claims nothing:
    // its size may be as wrong as its place, and would put everything else out of reach (H13c).
    if !refcounts.table().is_empty() {
        refcounts.add_metadata(Structure::RefcountTable, header.refcount_table_offset, table_bytes);
    }
    let l1_bytes = u64::from(header.l1_size) * TABLE_ENTRY_BYTES;
    refcounts.add_metadata(Structure::ActiveL1, header.l1_table_offset, l1_bytes);
    if let Some(crypto) = header.extensions.crypto_header {
        refcounts.add_metadata(Structure::Other, crypto.offset, crypto.length);
    }
    if let Some(bitmaps) = header.consistent_bitmaps() {
        let (offset, bytes) = (bitmaps.directory_offset, bitmaps.directory_size);
        refcounts.add_metadata(Structure::BitmapDirectory, offset, bytes);
    }
    let mut fault = Ok(());
    for (index, raw) in refcounts.table().into_iter().enumerate() {
        let entry = decode_refcount_table_entry(raw, &geometry);
        let problem = match entry {
            Ok(None) => continue,
            Ok(Some(offset))
                if offset + geometry.cluster_size() > file_end(&geometry, file_length) =>
            {
                "lies outside of the file".to_owned()
            }
            Ok(Some(offset))
                if !refcounts.add_metadata_cluster(Structure::RefcountBlock, offset) =>
            {
                "is used by other metadata as well".to_owned()
            }
            Ok(Some(_)) => continue,
            Err(error) => error.to_string(),
        };
        if fault.is_ok() {
            let text = format!("refcount block {index} ({raw:#x}): {problem}");
            fault = Err(Error::new(ErrorKind::Corrupt, text));
        }
    }
    fault
}

/// The L1 entries whose table lies outside of the file (T03, T17) or on top of other metadata
/// (T01), another entry's table included (T19).
fn find_bad_tables(
    refcounts: &Refcounts,
    geometry: &Geometry,
    l1: &[u64],
    file_length: u64,
) -> BTreeSet<u64> {
    let mut bad = BTreeSet::new();
    for (index, raw) in (0..).zip(l1) {
        // Entries that break the rules of the format are refused when they are met.
        let Ok(L1Entry::Table { host, .. }) = L1Entry::decode(*raw, geometry) else { continue };
        let outside = host + geometry.cluster_size() > file_length;
        if outside || !refcounts.add_metadata_cluster(Structure::ActiveL2, host) {
            bad.insert(index);
        }
    }
    bad
}

/// Header, L1 table and refcount table must be counted, or they would be handed out as data
/// (T12c, H17-0); so must the refcount blocks, as far as that is known without reading more.
async fn check_counted(refcounts: &Refcounts, header: &Header, file: &Child) -> Result<()> {
    let geometry = header.geometry();
    let l1_bytes = u64::from(header.l1_size) * TABLE_ENTRY_BYTES;
    let table_bytes = u64::from(header.refcount_table_clusters) << geometry.cluster_bits();
    let crypto = header.extensions.crypto_header;
    let crypto = crypto.map_or((0, 0), |crypto| (crypto.offset, crypto.length));
    let places = [
        ("header", 0, 1),
        ("L1 table", header.l1_table_offset, l1_bytes),
        ("refcount table", header.refcount_table_offset, table_bytes),
        ("encryption header", crypto.0, crypto.1),
    ];
    let uncounted = |what: &str, offset: u64| {
        let text = format!("the {what} at {offset:#x} has refcount 0: repair the image first");
        Err(Error::new(ErrorKind::Corrupt, text))
    };
    for (what, start, bytes) in places {
        for cluster in 0..geometry.clusters_for(bytes) {
            let offset = start + (cluster << geometry.cluster_bits());
            if refcounts.refcount(file, offset).await? == 0 {
                return uncounted(what, offset);
            }
        }
    }
    for offset in refcounts.table().into_iter().filter(|offset| *offset != 0) {
        if refcounts.known_refcount(offset) == Some(0) {
            return uncounted("refcount block", offset);
        }
    }
    Ok(())
}

fn information(header: &Header, bitmaps: &[BitmapEntry]) -> ImageInformation {
    let geometry = header.geometry();
    let format = header.extensions.backing_format.as_ref();
    let backing = header.backing_name.as_ref().map(|name| BackingReference {
        name: name.clone(),
        format: format.map(|format| String::from_utf8_lossy(format).into_owned()),
    });
    ImageInformation {
        virtual_size: header.size,
        cluster_size: geometry.cluster_size(),
        version: header.version,
        compression_type: header.compression_type,
        refcount_bits: geometry.refcount_bits(),
        lazy_refcounts: header.compatible_features & feature::LAZY_REFCOUNTS != 0,
        dirty: header.is_dirty(),
        corrupt: header.is_marked_corrupt(),
        snapshots: header.snapshot_count,
        backing,
        has_data_file: header.has_data_file(),
        data_file: header.extensions.data_file_name.clone().filter(|_| header.has_data_file()),
        data_file_raw: header.has_raw_data_file(),
        extended_l2: geometry.extended_l2(),
        // Read by itself.
        encryption: None,
        bitmaps: bitmaps.iter().map(BitmapInformation::from).collect(),
    }
}
