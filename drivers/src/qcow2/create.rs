//! New images.
//!
//! A raw data file is mapped as a whole from the beginning: the image is opened for that, by the
//! driver itself, before anybody else has it.

use super::encryption::{EncryptionOptions, new_key_header};
use super::image_layout::{CreateOptions, ImageLayout};
use super::layers::Layers;
use super::writeback::write_all;
use super::{Qcow2, Qcow2Options};
use blockplex_graph::{Child, Error, ErrorKind, Preallocation, RequestFlags, Result};
use blockplex_io::buffer::IoBuffer;

/// Makes `file` a fresh qcow2 image; what it held is lost. It becomes as long as the image's
/// metadata, unless its length is fixed. On a loop; needs write and resize permission. Durable on
/// return; a crash in between leaves a file that is no image.
///
/// # Errors
///
/// Options that are out of range or contradict each other, among them a data file, for which there
/// is [`create_with_data_file`] (nothing was written then); any error of the file.
pub async fn create(file: &Child, options: &CreateOptions) -> Result<()> {
    let layout = ImageLayout::new(options)?;
    if options.data_file.is_some() {
        let text = "an image with an external data file is created together with that file";
        return Err(Error::new(ErrorKind::InvalidArgument, text));
    }
    write_layout(file, &layout, options).await?;
    if options.preallocation == Preallocation::Off {
        return Ok(());
    }
    let image = Qcow2::open(file, own_options(), false).await?;
    let layers = Layers::of_new_image(file, None);
    image.prepare_for_writing(file).await?;
    image.preallocate(&layers, 0, options.size, options.preallocation).await?;
    image.finish(&layers).await?;
    file.flush().await
}

/// As [`create`], with the external data file that the options name in `data`. It gets the length
/// of the disk; what it holds otherwise stays, and is read if it is raw.
///
/// # Errors
///
/// As for [`create`]; options that name no data file.
pub async fn create_with_data_file(
    file: &Child,
    data: &Child,
    options: &CreateOptions,
) -> Result<()> {
    let layout = ImageLayout::new(options)?;
    if options.data_file.is_none() {
        let text = "the options name no external data file";
        return Err(Error::new(ErrorKind::InvalidArgument, text));
    }
    write_layout(file, &layout, options).await?;
    let image = Qcow2::open(file, own_options(), false).await?;
    let layers = Layers::of_new_image(file, Some(data));
    image.resize_data_file(&layers, options.size, options.preallocation).await?;
    if options.data_file_raw || options.preallocation != Preallocation::Off {
        image.prepare_for_writing(file).await?;
        image.map_data_file(&layers, 0, options.size).await?;
    }
    image.finish(&layers).await?;
    data.flush().await
}

/// How an image that is being created is opened: nothing is written to its disk.
fn own_options() -> Qcow2Options {
    let encryption = EncryptionOptions { metadata_only: true, ..EncryptionOptions::default() };
    Qcow2Options { encryption, ..Qcow2Options::default() }
}

async fn write_layout(file: &Child, layout: &ImageLayout, options: &CreateOptions) -> Result<()> {
    // Takes long, and may fail: before the file is touched.
    let keys = new_key_header(file, options.encryption.as_ref()).await?;
    match file.truncate(0).await {
        Ok(()) => file.truncate(layout.file_length).await?,
        Err(error) if error.kind() == ErrorKind::NotSupported => {
            let cluster_size = layout.header.geometry().cluster_size();
            // The old contents are no image from here on.
            file.write_zeroes(0, cluster_size, RequestFlags::default()).await?;
            let length = layout.zeros.end - layout.zeros.start;
            if length > 0 {
                file.write_zeroes(layout.zeros.start, length, RequestFlags::default()).await?;
            }
        }
        Err(error) => return Err(error),
    }
    let Some(((offset, header), tables)) = layout.writes.split_first() else { return Ok(()) };
    write_all(file, tables.iter().map(|(offset, bytes)| (*offset, bytes))).await?;
    let start = layout.header.extensions.crypto_header.map_or(0, |crypto| crypto.offset);
    write_all(file, keys.iter().map(|(offset, bytes)| (start + offset, bytes))).await?;
    file.flush().await?;
    file.write(*offset, IoBuffer::from_slice(header), RequestFlags::default()).await?;
    file.flush().await
}
