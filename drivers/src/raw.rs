//! `raw`: passes requests on to its file, or shows a window of it.
//!
//! A node whose user let a probe decide that it is raw is *guarded*: a write that would make the
//! first sector look like another format fails, since the next probe would follow what it says.

use crate::probe::{self, PROBE_BYTES};
use blockplex_graph::driver::{AccessChange, Driver, LocalFuture, Map, MapRequest, Pin, Role};
use blockplex_graph::{
    Access, DebugEvent, Error, ErrorKind, Limits, NodeIo, NodeView, Outcome, Request, RequestKind,
    Result,
};
use blockplex_io::buffer::IoBuffer;
use blockplex_io::lock::CoMutex;

/// The index of the only child.
const FILE: usize = 0;
/// What the peer's disks are multiples of.
const SECTOR: u64 = 512;

/// The `raw` driver.
#[derive(Debug, Default)]
pub struct Raw {
    offset: u64,
    size: Option<u64>,
    /// Without a size, the disk ends with a whole sector.
    whole_sectors: bool,
    /// Present: the first sector is guarded; one write to it at a time.
    guard: Option<CoMutex<()>>,
}

impl Raw {
    /// The window of `size` bytes at `offset`; without a size, all that follows. `file_length`
    /// is the length of the child, which must hold the window.
    pub fn new(offset: u64, size: Option<u64>, file_length: u64) -> Result<Raw> {
        let end = offset.checked_add(size.unwrap_or(0));
        if end.is_none_or(|end| end > file_length) {
            let size = size.map_or("the rest".to_owned(), |size| format!("{size} bytes"));
            let text = format!(
                "offset {offset} and size ({size}) lie outside of the file's {file_length} bytes"
            );
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
        Ok(Raw { offset, size, ..Raw::default() })
    }

    /// A whole file that a probe took for raw.
    pub fn guarded() -> Raw {
        Raw { guard: Some(CoMutex::new(())), ..Raw::default() }
    }

    /// The same with a disk that ends with a whole sector of 512 bytes, whatever its file does.
    #[must_use]
    pub fn with_whole_sectors(self) -> Raw {
        Raw { whole_sectors: true, ..self }
    }

    /// Whether writes must leave the first sector looking raw.
    pub fn is_guarded(&self) -> bool {
        self.guard.is_some()
    }

    /// Writes to the first sector, if it still looks like raw data afterwards.
    async fn write_first_sector(&self, io: &NodeIo, request: Request) -> Result<Outcome> {
        let _turn = match &self.guard {
            Some(guard) => Some(guard.lock().await),
            None => None,
        };
        let child = io.child(FILE)?;
        let memory = IoBuffer::zeroed(PROBE_BYTES);
        let sector = blockplex_io::buffer::IoVector::from(memory);
        child.read(0, sector.clone()).await?;
        let mut bytes = sector.to_vec();
        // The copy is what is written, too: the original may change after the look.
        let data = request.vector.to_vec();
        let start = request.offset as usize;
        match bytes.get_mut(start..start + data.len()) {
            Some(range) => range.copy_from_slice(&data),
            None => return Err(Error::new(ErrorKind::OutOfRange, "not within the first sector")),
        }
        if probe::looks_like_format(&bytes) {
            return Err(Error::from_errno(libc::EPERM));
        }
        child.write(request.offset, IoBuffer::from_slice(&data), request.flags).await?;
        Ok(Outcome::Done)
    }

    /// Says to the file what comes, and passes it on.
    async fn serve_announced(&self, io: &NodeIo, request: Request) -> Result<Outcome> {
        let file = io.child(FILE)?;
        let Request { kind, flags, offset, length, vector } = request;
        match kind {
            RequestKind::Flush => {
                file.announce(DebugEvent::FlushToOs).await;
                file.announce(DebugEvent::FlushToDisk).await;
                file.flush().await?;
            }
            RequestKind::Write => {
                file.announce(DebugEvent::WriteAio).await;
                file.write(self.offset + offset, vector, flags).await?;
            }
            RequestKind::Read => {
                file.announce(DebugEvent::ReadAio).await;
                let shown =
                    self.size.map_or(length, |size| size.saturating_sub(offset).min(length));
                vector.fill(shown as usize, (length - shown) as usize, 0);
                if shown > 0 {
                    file.read(self.offset + offset, vector.slice(0, shown as usize)).await?;
                }
            }
            other => {
                let text = format!("raw passes every {} on", other.name());
                return Err(Error::new(ErrorKind::NotSupported, text));
            }
        }
        Ok(Outcome::Done)
    }

    /// How much of a request lies within a window that has a size. What follows the window in the
    /// file is not ours: a format above must neither see it nor grow into it.
    fn within(&self, request: &MapRequest<'_>) -> Result<u64> {
        let Some(size) = self.size else { return Ok(request.length) };
        let within = size.saturating_sub(request.offset).min(request.length);
        let writes = matches!(request.kind, RequestKind::Write | RequestKind::WriteZeroes);
        if writes && within < request.length {
            return Err(Error::from_errno(libc::ENOSPC));
        }
        Ok(within)
    }

    /// Whether it shows a part of its file only.
    pub fn has_window(&self) -> bool {
        self.offset != 0 || self.size.is_some()
    }
}

impl Driver for Raw {
    fn driver_name(&self) -> &'static str {
        "raw"
    }

    fn length(&self, node: &NodeView) -> u64 {
        let file = node.child(FILE).map_or(0, |file| file.length());
        let rest = file.saturating_sub(self.offset);
        match self.size {
            Some(size) => size.min(rest),
            // Files are below 2^63 bytes.
            None if self.whole_sectors => rest.next_multiple_of(SECTOR),
            None => rest,
        }
    }

    fn allocated_bytes(&self, node: &NodeView) -> Option<u64> {
        let file = node.child(FILE).filter(|_| !self.has_window())?;
        file.driver().allocated_bytes(file)
    }

    fn limits(&self) -> Limits {
        Limits::UNLIMITED
    }

    fn child_access(&self, _role: Role, parents: Access) -> Access {
        parents
    }

    fn access_changed(&self, _change: AccessChange) -> Result<()> {
        Ok(())
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn passes_transfers(&self, node: &NodeView) -> Option<usize> {
        let passes = !self.has_window() && !self.is_guarded() && !node.announces();
        passes.then_some(FILE)
    }

    fn map(&self, node: &NodeView, request: &MapRequest<'_>) -> Map {
        if request.kind == RequestKind::Flush && node.announces() {
            return Map::Async { length: 0 };
        }
        if request.kind == RequestKind::Truncate && self.has_window() {
            let text = "a raw node with an offset or a size cannot be resized";
            return Map::Fail(Error::new(ErrorKind::NotSupported, text));
        }
        if self.guard.is_some()
            && request.kind == RequestKind::Write
            && request.offset < PROBE_BYTES as u64
        {
            return Map::Async { length: request.length.min(PROBE_BYTES as u64 - request.offset) };
        }
        if node.announces() && matches!(request.kind, RequestKind::Read | RequestKind::Write) {
            return match self.within(request) {
                Ok(_) => Map::Async { length: request.length },
                Err(error) => Map::Fail(error),
            };
        }
        let length = match self.within(request) {
            Ok(0) if request.length > 0 => return Map::Zero { length: request.length },
            Ok(length) => length,
            Err(error) => return Map::Fail(error),
        };
        Map::Child { edge: FILE, offset: request.offset + self.offset, length, pin: None }
    }

    fn unpin(&self, _loop_index: usize, _pin: Pin) {}

    /// Requests that the file wants to hear of, and writes that are guarded.
    fn serve<'a>(&'a self, io: &'a NodeIo, request: Request) -> LocalFuture<'a, Result<Outcome>> {
        let guarded = self.guard.is_some() && request.offset < PROBE_BYTES as u64;
        if guarded && request.kind == RequestKind::Write {
            return Box::pin(self.write_first_sector(io, request));
        }
        Box::pin(self.serve_announced(io, request))
    }

    fn close<'a>(&'a self, _io: &'a NodeIo) -> LocalFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }
}
