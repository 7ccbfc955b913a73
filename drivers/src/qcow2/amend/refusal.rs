//! What cannot be amended, said before anything is, in the peer's words and order.

use super::AmendOptions;
use crate::qcow2::check::Work;
use crate::qcow2::check::image::Image;
use crate::qcow2::header::{CompressionType, Version, feature};
use crate::qcow2::snapshot;
use blockplex_graph::{Error, ErrorKind, Result};

/// See the page.
pub(super) async fn refuse(image: &Image<'_>, options: &AmendOptions) -> Result<()> {
    refuse_values(image, options)?;
    let version = options.version.unwrap_or(image.header.version);
    let now = u64::from(image.geometry.refcount_bits());
    let bits = options.refcount_bits.unwrap_or(now);
    if version < Version::V3 && bits != 16 && bits != now {
        return invalid(
            "Refcount widths other than 16 bits require compatibility level 1.1 or above (use \
             compat=1.1 or greater)",
        );
    }
    refuse_backing(image, options)?;
    if options.lazy_refcounts == Some(true) && version < Version::V3 {
        return invalid(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 \
             or greater)",
        );
    }
    if version < image.header.version {
        return refuse_downgrade(image, bits).await;
    }
    Ok(())
}

fn invalid<T>(text: &'static str) -> Result<T> {
    Err(Error::new(ErrorKind::InvalidArgument, text))
}

fn unsupported<T>(text: impl Into<std::borrow::Cow<'static, str>>) -> Result<T> {
    Err(Error::new(ErrorKind::NotSupported, text))
}

fn refuse_values(image: &Image<'_>, options: &AmendOptions) -> Result<()> {
    let AmendOptions { refcount_bits, data_file, data_file_raw, .. } = options;
    if refcount_bits.is_some_and(|bits| !bits.is_power_of_two() || bits > 64) {
        return invalid("Refcount width must be a power of two and may not exceed 64 bits");
    }
    if data_file.is_some() && !image.header.has_data_file() {
        return invalid("data-file can only be set for images that use an external data file");
    }
    let is_raw = image.header.autoclear_features & feature::RAW_DATA_FILE != 0;
    if *data_file_raw == Some(true) && !is_raw {
        return invalid("data-file-raw cannot be set on existing images");
    }
    Ok(())
}

fn refuse_backing(image: &Image<'_>, options: &AmendOptions) -> Result<()> {
    let AmendOptions { backing_file, backing_format, .. } = options;
    if backing_file.is_none() && backing_format.is_none() {
        return Ok(());
    }
    let header = &image.header;
    if *backing_file == header.backing_name && *backing_format == header.extensions.backing_format {
        return Ok(());
    }
    invalid("Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.")
}

async fn refuse_downgrade(image: &Image<'_>, bits: u64) -> Result<()> {
    let header = &image.header;
    if header.incompatible_features & feature::DATA_FILE != 0 {
        return unsupported("Cannot downgrade an image with a data file");
    }
    if bits != 16 {
        return unsupported("compat=0.10 requires refcount_bits=16");
    }
    let table = snapshot::table::read(image.file, header, image.length).await?;
    let fits = |disk_size: Option<u64>, state: u64| {
        disk_size.is_none_or(|size| size == header.size) && state <= u32::MAX.into()
    };
    if !table.entries.iter().all(|entry| fits(entry.disk_size, entry.vm_state_size)) {
        return unsupported("Internal snapshots prevent downgrade of image");
    }
    let is_zstd = header.compression_type == CompressionType::Zstd;
    let unfit = header.incompatible_features & !(feature::DIRTY | feature::COMPRESSION_TYPE);
    if unfit != 0 {
        let text = format!("Cannot downgrade an image with incompatible features {unfit:#x} set");
        return unsupported(text);
    }
    if is_zstd && Work::of_sound(image).await?.references.has_compressed {
        return unsupported(
            "Cannot downgrade an image with zstd compression type and existing compressed clusters",
        );
    }
    Ok(())
}
