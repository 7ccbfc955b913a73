//! Changing what an image was created with: version, width of the refcounts, lazy refcounts, the
//! name of the data file.
//!
//! Like a check, this works on the file of an image that no node has open. All refusals come
//! before the first write. Then come steps that each end with one write of the header, so that a
//! crash leaves an image with some of the changes made, whole, with leaks at worst:
//!
//! - **J1** What a header is going to refer to is durable before the header is written.
//! - **J2** An image becomes version 3 before anything that needs it, and version 2 after
//!   everything that it has no place for is gone.
//! - **J3** A new width is a new refcount structure, in a new place, that one write of one header
//!   sector puts in the place of the old one.
//!
//! The size is not changed here (that takes the backing file), nor is encryption: both are an open
//! image's. Before a change to version 2, snapshots must have the size of the disk; so the size
//! comes before that, and after a change to version 3, as the peer has it.

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

mod downgrade;
mod refusal;

use super::check::Work;
use super::check::image::Image;
use super::check::rebuild::{HeaderChange, change_header};
use super::check::{CheckOptions, Fix, check};
use super::geometry::Geometry;
use super::header::{CompressionType, Header, Version, feature};
use blockplex_graph::{Child, Error, ErrorKind, Result};

/// What is to change; `None` leaves it as it is. The names are those of the peer's options.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AmendOptions {
    /// `compat`.
    pub version: Option<Version>,
    /// `refcount_bits`.
    pub refcount_bits: Option<u64>,
    /// `lazy_refcounts`.
    pub lazy_refcounts: Option<bool>,
    /// `data_file`: the name that the header has; empty for none, which whoever opens the image
    /// must know then.
    pub data_file: Option<Vec<u8>>,
    /// `data_file_raw`: may only be switched off.
    pub data_file_raw: Option<bool>,
    /// `backing_file`: may only be what it is, together with `backing_format`.
    pub backing_file: Option<Vec<u8>>,
    /// `backing_fmt`.
    pub backing_format: Option<Vec<u8>>,
}

/// How far an amendment to version 2 is, which alone takes long: of so many parts of the work, so
/// many are done.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

/// Changes the image in `file`, which no node has open as an image. On a loop; needs write and
/// resize permission. `progress` is told how far it is.
///
/// # Errors
///
/// `InvalidArgument`, `NotSupported`: what cannot be, in the peer's words; nothing was changed then.
/// `Corrupt`: the image must be repaired first. Any error of the file.
pub async fn amend(file: &Child, options: &AmendOptions, progress: Progress<'_>) -> Result<()> {
    let mut image = Image::open(file).await?;
    if image.header.is_dirty() && !image.header.is_marked_corrupt() {
        // As whoever opens it for writing does.
        let report = check(file, CheckOptions { fix: Fix::All }).await?;
        if !report.is_clean() {
            let text = "the image was not closed properly (dirty bit), and cannot be repaired";
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        image = Image::open(file).await?;
    }
    if let Some(reason) = image.header.read_only_reasons.first() {
        let text = format!("the image must be repaired first: {reason}");
        return Err(Error::new(ErrorKind::Corrupt, text));
    }
    refusal::refuse(&image, options).await?;
    if image.forget_unknown_features() {
        image.clear_unknown_features().await?;
    }
    if options.version > Some(image.header.version) {
        upgrade(&image).await?;
        image = Image::open(file).await?;
    }
    if let Some(bits) = options.refcount_bits {
        change_width(&image, bits).await?;
        image = Image::open(file).await?;
    }
    change_fields(&image, options).await?;
    image = Image::open(file).await?;
    if options.version.is_some_and(|version| version < image.header.version) {
        downgrade::downgrade(&image, progress).await?;
    }
    Ok(())
}

/// Writes the whole header, in one write, and makes it durable.
async fn write_header(image: &Image<'_>, header: &Header) -> Result<()> {
    image.write(0, &header.to_bytes()?).await?;
    image.file.flush().await
}

/// To version 3, which wants more of the entries of the snapshot table.
async fn upgrade(image: &Image<'_>) -> Result<()> {
    let mut header = image.header.clone();
    header.version = Version::V3;
    // Whether they have it a check says once the image is of version 3.
    let upgraded = Image { header: header.clone(), ..*image };
    if header.snapshot_count > 0 {
        let mut work = Work::of_sound(&upgraded).await?;
        let change = work.restructure(&image.geometry, true).await?;
        // Still of version 2, which has nothing against a longer table.
        change_header(image, &change).await?;
        (header.refcount_table_offset, header.refcount_table_clusters) =
            change.refcount_table.unwrap_or((0, 0));
        (header.snapshot_count, header.snapshots_offset) = change.snapshots.unwrap_or((0, 0));
    }
    write_header(image, &header).await
}

/// J3.
async fn change_width(image: &Image<'_>, bits: u64) -> Result<()> {
    if bits == u64::from(image.geometry.refcount_bits()) {
        return Ok(());
    }
    let order = bits.trailing_zeros();
    let (cluster_bits, extended) = (image.geometry.cluster_bits(), image.geometry.extended_l2());
    let geometry = Geometry::new(cluster_bits, order, extended)?;
    let mut work = Work::of_sound(image).await?;
    let most = geometry.max_refcount();
    let too_many = work.references.counters.counted(0..u64::MAX).find(|(_, count)| *count > most);
    if let Some((cluster, count)) = too_many {
        let offset = cluster << cluster_bits;
        let text = format!(
            "Cannot decrease refcount entry width to {bits} bits: Cluster at offset {offset:#x} has \
             a refcount of {count}"
        );
        return Err(Error::new(ErrorKind::InvalidArgument, text));
    }
    let change = work.restructure(&geometry, false).await?;
    change_header(image, &HeaderChange { refcount_order: Some(order), ..change }).await
}

/// What only the header says.
async fn change_fields(image: &Image<'_>, options: &AmendOptions) -> Result<()> {
    let mut header = image.header.clone();
    if options.data_file_raw == Some(false) {
        header.autoclear_features &= !feature::RAW_DATA_FILE;
    }
    if let Some(name) = &options.data_file {
        header.extensions.data_file_name = Some(name.clone()).filter(|name| !name.is_empty());
    }
    match options.lazy_refcounts {
        Some(true) => header.compatible_features |= feature::LAZY_REFCOUNTS,
        Some(false) => header.compatible_features &= !feature::LAZY_REFCOUNTS,
        None => {}
    }
    if header == image.header {
        return Ok(());
    }
    write_header(image, &header).await
}

/// Takes away what version 2 has no place for, as far as only the header says it.
fn fit_for_version_2(header: &mut Header) {
    header.version = Version::V2;
    header.compression_type = CompressionType::Deflate;
    header.incompatible_features = 0;
    header.compatible_features = 0;
    header.autoclear_features = 0;
    header.unknown_fields.clear();
    header.extensions.bitmaps = None;
}
