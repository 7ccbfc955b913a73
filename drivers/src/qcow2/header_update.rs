//! Changing the header of an open image.

use super::Qcow2;
use super::header::Header;
use blockplex_graph::{Child, RequestFlags, Result};
use blockplex_io::buffer::IoBuffer;

impl Qcow2 {
    /// Changes the header: the whole header cluster is written anew, in one write, and made
    /// durable. What it refers to must be durable before. Unknown fields and extensions are kept.
    ///
    /// # Errors
    ///
    /// What `change` says; `NoSpace` when names and extensions have no room in the cluster (E02).
    /// Then nothing has changed. An error of the file leaves the old header in memory.
    pub(super) async fn update_header(
        &self,
        file: &Child,
        change: impl FnOnce(&mut Header) -> Result<()>,
    ) -> Result<()> {
        let mut header = self.header.lock().await;
        let mut next = header.clone();
        change(&mut next)?;
        let bytes = next.to_bytes()?;
        file.write(0, IoBuffer::from_slice(&bytes), RequestFlags::default()).await?;
        file.flush().await?;
        *header = next;
        Ok(())
    }

    /// Sets the backing file that the header names (bytes of a path or anything else) and its
    /// format; `None` removes the name. The children of the node stay as they are.
    ///
    /// # Errors
    ///
    /// As for any write; `NoSpace` when the name has no room.
    pub async fn set_backing(
        &self,
        file: &Child,
        name: Option<&[u8]>,
        format: Option<&[u8]>,
    ) -> Result<()> {
        self.prepare_for_writing(file).await?;
        self.update_header(file, |header| {
            header.backing_name = name.map(<[u8]>::to_vec);
            header.extensions.backing_format = format.map(<[u8]>::to_vec);
            Ok(())
        })
        .await
    }
}
