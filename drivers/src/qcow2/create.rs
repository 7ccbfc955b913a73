//! New images.

use super::image_layout::{CreateOptions, ImageLayout};
use super::writeback::write_all;
use blockplex_graph::{Child, ErrorKind, RequestFlags, Result};
use blockplex_io::buffer::IoBuffer;

/// Makes `file` a fresh qcow2 image; what it held is lost. It becomes as long as the image's
/// metadata, unless its length is fixed. On a loop; needs write and resize permission. Durable on
/// return; a crash in between leaves a file that is no image.
///
/// # Errors
///
/// Options that are out of range or contradict each other (nothing was written then); any error
/// of the file.
pub async fn create(file: &Child, options: &CreateOptions) -> Result<()> {
    let layout = ImageLayout::new(options)?;
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
    file.flush().await?;
    file.write(*offset, IoBuffer::from_slice(header), RequestFlags::default()).await?;
    file.flush().await
}
