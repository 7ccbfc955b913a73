//! Changing the header of an open image.
//!
//! - **HU1** When fields of a sector were to be changed and the file said no, what the header says is
//!   made sure of: it is what it was before, durably, or nobody knows, and then the image is given up.
//!   So no table goes on being written that the header may not name any more.

use super::Qcow2;
use super::header::Header;
use blockplex_graph::{Child, Error, RequestFlags, Result};
use blockplex_io::buffer::IoBuffer;

/// The header fields from the size to the L1 offset: size, encryption, L1 entries, L1 offset.
pub(super) const DISK_FIELDS: u64 = 24;

/// What became of a switch that failed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Switch {
    /// The header is as before, durably.
    NotMade,
    /// Nobody knows: whatever either outcome refers to stays counted.
    InDoubt,
}

/// The bytes of the fields at [`DISK_FIELDS`].
pub(super) fn disk_fields(header: &Header, size: u64, entries: u32, offset: u64) -> Vec<u8> {
    let mut bytes = size.to_be_bytes().to_vec();
    bytes.extend(header.crypt_method.to_be_bytes());
    bytes.extend(entries.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes
}

impl Qcow2 {
    /// Changes fields of one sector of the header, durably (HU1). On an error it tries to bring back
    /// what was `before`. With the header.
    pub(super) async fn switch_header(
        &self,
        file: &Child,
        offset: u64,
        before: &[u8],
        after: &[u8],
    ) -> Result<(), (Error, Switch)> {
        debug_assert_eq!(offset / 512, (offset + after.len() as u64 - 1) / 512, "one sector");
        let write = async |bytes: &[u8]| {
            file.write(offset, IoBuffer::from_slice(bytes), RequestFlags::default()).await?;
            file.flush().await
        };
        let doubt = self.doubt();
        let Err(error) = write(after).await else {
            doubt.settle();
            return Ok(());
        };
        match write(before).await {
            Ok(()) => {
                doubt.settle();
                Err((error, Switch::NotMade))
            }
            Err(_) => Err((error, Switch::InDoubt)),
        }
    }

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
