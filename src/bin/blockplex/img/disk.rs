//! A disk as the tools count it: in whole sectors, the last one filled up with zeros.

use blockplex::{Backend, BlockStatus, Error, ErrorKind, IoBuffer, Outcome, Queue, Request};

use super::lanes;

/// Disks are counted in sectors of so many bytes.
pub const SECTOR: u64 = 512;

/// A disk. See the page.
#[derive(Clone, Debug)]
pub struct Disk {
    backend: Backend,
    /// What can be read of it.
    readable: u64,
}

impl Disk {
    /// The disk of a backend, of the length that it has now.
    ///
    /// # Errors
    /// It has no root.
    pub fn new(backend: Backend) -> Result<Disk, Error> {
        let readable = backend.length()?;
        Ok(Disk { backend, readable })
    }

    /// Its user.
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// Its length, in whole sectors.
    pub fn length(&self) -> u64 {
        self.readable.next_multiple_of(SECTOR)
    }

    /// Opens it on the current loop.
    ///
    /// # Errors
    /// As [`Backend::queue`].
    pub fn open(&self) -> Result<OpenDisk, Error> {
        Ok(OpenDisk { queue: self.backend.queue("lane")?, readable: self.readable })
    }
}

/// A disk on one loop.
#[derive(Debug)]
pub struct OpenDisk {
    queue: Queue,
    readable: u64,
}

impl OpenDisk {
    /// Its queue, for requests within what can be read.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// What there is of a range before the end: its length.
    pub fn inside(&self, offset: u64, length: u64) -> u64 {
        length.min(self.readable.saturating_sub(offset))
    }

    /// The extent at `offset`, which lies within the disk, at most `length` long and never empty;
    /// in whole sectors.
    ///
    /// # Errors
    /// The request's own.
    pub async fn status(&self, offset: u64, length: u64) -> Result<BlockStatus, Error> {
        let asked = self.inside(offset, length);
        let found = self.queue.request(Request::block_status(offset, asked)).await.result?;
        match found {
            Outcome::Status(status) if status.length > 0 => {
                let whole = status.length.next_multiple_of(SECTOR);
                Ok(BlockStatus { length: whole.min(length), ..*status })
            }
            _ => Err(Error::new(ErrorKind::Io, "block-status gave no extent")),
        }
    }

    /// Reads `length` bytes into the buffer, from position `at` on. What lies beyond the end is
    /// zeros. The buffer comes back in any case.
    pub async fn read(
        &self,
        offset: u64,
        buffer: IoBuffer,
        at: usize,
        length: usize,
    ) -> (IoBuffer, Result<(), Error>) {
        let inside = self.inside(offset, length as u64) as usize;
        let (mut buffer, result) = lanes::read(&self.queue, offset, buffer, at, inside).await;
        if let Some(padding) = buffer.get_mut(at + inside..at + length) {
            padding.fill(0);
        }
        (buffer, result)
    }

    /// Writes `length` bytes of the buffer, from position `at` on; what lies beyond the end is
    /// left out. The buffer comes back in any case.
    pub async fn write(
        &self,
        offset: u64,
        buffer: IoBuffer,
        at: usize,
        length: usize,
        compressed: bool,
    ) -> (IoBuffer, Result<(), Error>) {
        let inside = self.inside(offset, length as u64) as usize;
        let whole = buffer.into_vector();
        let mut request = Request::write(offset, whole.slice(at, inside));
        request.flags.compressed = compressed;
        let completion = self.queue.request(request).await;
        let result = completion.result.map(drop);
        drop(completion.vector);
        (lanes::whole_again(whole), result)
    }

    /// Makes a range read as zeros; its space may be given back.
    ///
    /// # Errors
    /// The request's own.
    pub async fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), Error> {
        let inside = self.inside(offset, length);
        let request = Request::write_zeroes(offset, inside).may_unmap();
        lanes::perform(&self.queue, request).await
    }
}
