//! A disk as the tools count it: in whole sectors, the last one filled up with zeros.

use blockplex::{Backend, BlockStatus, Error, ErrorKind, IoBuffer, Outcome, Queue, Request};

use super::lanes;

/// Disks are counted in sectors of so many bytes.
pub const SECTOR: u64 = 512;

/// A disk. See the page. Below an overlay that was opened without its backing file, the disk may
/// have further layers, which show where the overlay holds nothing.
#[derive(Clone, Debug)]
pub struct Disk {
    /// From the top down; at least one.
    layers: Vec<(Backend, u64)>,
}

impl Disk {
    /// The disk of a backend, of the length that it has now.
    ///
    /// # Errors
    /// It has no root.
    pub fn new(backend: Backend) -> Result<Disk, Error> {
        let readable = backend.length()?;
        Ok(Disk { layers: vec![(backend, readable)] })
    }

    /// The same with a further layer below, which must outlive what is below it in turn.
    ///
    /// # Errors
    /// It has no root.
    pub fn over(mut self, backend: Backend) -> Result<Disk, Error> {
        let readable = backend.length()?;
        self.layers.push((backend, readable));
        Ok(self)
    }

    /// Its length, in whole sectors.
    pub fn length(&self) -> u64 {
        self.layers.first().map_or(0, |(_, readable)| readable.next_multiple_of(SECTOR))
    }

    /// Opens it on the current loop.
    ///
    /// # Errors
    /// As [`Backend::queue`].
    pub fn open(&self) -> Result<OpenDisk, Error> {
        let open = |(backend, readable): &(Backend, u64)| {
            Ok(Layer { queue: backend.queue("lane")?, readable: *readable })
        };
        let mut layers = self.layers.iter().map(open);
        let gone = || Error::new(ErrorKind::NoMedium, "a disk has at least one layer");
        let top = layers.next().ok_or_else(gone)??;
        Ok(OpenDisk { top, lower: layers.collect::<Result<_, Error>>()? })
    }
}

/// A disk on one loop.
#[derive(Debug)]
pub struct OpenDisk {
    top: Layer,
    lower: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    queue: Queue,
    /// What can be read of it.
    readable: u64,
}

impl Layer {
    /// What there is of a range before the end: its length.
    fn inside(&self, offset: u64, length: u64) -> u64 {
        length.min(self.readable.saturating_sub(offset))
    }

    async fn status(&self, offset: u64, length: u64) -> Result<BlockStatus, Error> {
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

    async fn read(
        &self,
        offset: u64,
        buffer: IoBuffer,
        at: usize,
        length: usize,
    ) -> (IoBuffer, Result<(), Error>) {
        let inside = self.inside(offset, length as u64) as usize;
        let (mut buffer, result) = match inside {
            0 => (buffer, Ok(())),
            _ => lanes::read(&self.queue, offset, buffer, at, inside).await,
        };
        if let Some(padding) = buffer.get_mut(at + inside..at + length) {
            padding.fill(0);
        }
        (buffer, result)
    }
}

impl OpenDisk {
    /// What there is of a range before the end: its length.
    pub fn inside(&self, offset: u64, length: u64) -> u64 {
        self.top.inside(offset, length)
    }

    /// The extent at `offset`, which lies within the disk, at most `length` long and never empty;
    /// in whole sectors. Allocated is what any layer holds.
    ///
    /// # Errors
    /// The request's own.
    pub async fn status(&self, offset: u64, length: u64) -> Result<BlockStatus, Error> {
        self.layer_at(offset, length).await.map(|(status, _)| status)
    }

    /// The extent at `offset`, and the layer that holds it, or the lowest.
    async fn layer_at(&self, offset: u64, length: u64) -> Result<(BlockStatus, &Layer), Error> {
        let mut status = self.top.status(offset, length).await?;
        let mut layer = &self.top;
        for lower in &self.lower {
            if status.allocated {
                break;
            }
            layer = lower;
            if offset >= lower.readable {
                // What layers further down hold is hidden by the end of this one.
                let length = status.length;
                status = BlockStatus { length, zero: true, allocated: true, ..status };
                break;
            }
            let inside = lower.inside(offset, status.length);
            status = lower.status(offset, inside.next_multiple_of(SECTOR)).await?;
        }
        Ok((status, layer))
    }

    /// Reads `length` bytes into the buffer, from position `at` on. What lies beyond the end is
    /// zeros. The buffer comes back in any case.
    pub async fn read(
        &self,
        offset: u64,
        mut buffer: IoBuffer,
        at: usize,
        length: usize,
    ) -> (IoBuffer, Result<(), Error>) {
        if self.lower.is_empty() {
            return self.top.read(offset, buffer, at, length).await;
        }
        let mut done = 0;
        while done < length {
            let position = offset + done as u64;
            let found = self.layer_at(position, (length - done) as u64).await;
            let (status, layer) = match found {
                Ok(found) => found,
                Err(error) => return (buffer, Err(error)),
            };
            let part = status.length as usize;
            let (filled, result) = layer.read(position, buffer, at + done, part).await;
            if result.is_err() {
                return (filled, result);
            }
            buffer = filled;
            done += part;
        }
        (buffer, Ok(()))
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
        let inside = self.top.inside(offset, length as u64) as usize;
        if inside == 0 {
            return (buffer, Ok(()));
        }
        let whole = buffer.into_vector();
        let mut request = Request::write(offset, whole.slice(at, inside));
        request.flags.compressed = compressed;
        let completion = self.top.queue.request(request).await;
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
        if inside == 0 {
            return Ok(());
        }
        let request = Request::write_zeroes(offset, inside).may_unmap();
        lanes::perform(&self.top.queue, request).await
    }
}
