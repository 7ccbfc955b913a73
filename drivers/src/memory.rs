//! `memory`: a disk in memory, for tests and scratch space.
//!
//! Pages come into being when they are first written; a page that is discarded or zeroed whole
//! goes again. Each page has a lock of its own, held for one copy: reads and writes of different
//! pages never meet.

use blockplex_graph::driver::{AccessChange, Driver, LocalFuture, Map, MapRequest, Pin, Role};
use blockplex_graph::{
    Access, BlockStatus, Error, ErrorKind, Limits, NodeIo, NodeView, Outcome, Request, RequestKind,
    Result,
};
use blockplex_io::buffer::IoVector;
use parking_lot::Mutex;

/// Bytes in a page.
const PAGE: u64 = 64 << 10;

/// The largest memory disk: its table of pages stays below 64 MiB.
const MAX_SIZE: u64 = 256 << 30;

/// A page: none while it is all zeros.
type Page = Mutex<Option<Box<[u8]>>>;

/// The `memory` driver.
pub struct Memory {
    size: u64,
    pages: Box<[Page]>,
}

impl Memory {
    /// A disk of `size` bytes, all zero. Memory is used as it is written.
    pub fn new(size: u64) -> Result<Memory> {
        if size > MAX_SIZE {
            let text = format!("size {size} is above the maximum {MAX_SIZE} of a memory disk");
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
        let pages = (0..size.div_ceil(PAGE)).map(|_| Mutex::new(None)).collect();
        Ok(Memory { size, pages })
    }

    /// Calls `visit` with each page of a range: its index, the start in it, the length, and how
    /// far into the range it is.
    fn for_each_page(offset: u64, length: u64, mut visit: impl FnMut(usize, usize, usize, usize)) {
        let mut done = 0;
        while done < length {
            let at = offset + done;
            let count = (length - done).min(PAGE - at % PAGE);
            visit((at / PAGE) as usize, (at % PAGE) as usize, count as usize, done as usize);
            done += count;
        }
    }

    fn read(&self, offset: u64, length: u64, vector: &IoVector, position: usize) {
        Self::for_each_page(offset, length, |page, start, count, done| {
            match &*self.pages[page].lock() {
                Some(bytes) => {
                    vector.copy_from_slice(position + done, &bytes[start..start + count]);
                }
                None => vector.fill(position + done, count, 0),
            }
        });
    }

    fn write(&self, offset: u64, length: u64, vector: &IoVector, position: usize) {
        Self::for_each_page(offset, length, |page, start, count, done| {
            let mut page = self.pages[page].lock();
            let bytes = page.get_or_insert_with(|| vec![0; PAGE as usize].into_boxed_slice());
            vector.copy_to_slice(position + done, &mut bytes[start..start + count]);
        });
    }

    fn erase(&self, offset: u64, length: u64) {
        Self::for_each_page(offset, length, |page, start, count, _| {
            let mut page = self.pages[page].lock();
            if count as u64 == PAGE {
                *page = None;
            } else if let Some(bytes) = &mut *page {
                bytes[start..start + count].fill(0);
            }
        });
    }

    fn status(&self, offset: u64, length: u64) -> BlockStatus {
        let is_data = |at: u64| self.pages[(at / PAGE) as usize].lock().is_some();
        let data = is_data(offset);
        let mut end = offset;
        while end < offset + length && is_data(end) == data {
            end = (end / PAGE + 1) * PAGE;
        }
        BlockStatus {
            length: (end - offset).min(length),
            data,
            zero: !data,
            allocated: true,
            offset: Some(offset),
            ..BlockStatus::default()
        }
    }
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory").field("size", &self.size).finish_non_exhaustive()
    }
}

impl Driver for Memory {
    fn driver_name(&self) -> &'static str {
        "memory"
    }

    fn length(&self, _node: &NodeView) -> u64 {
        self.size
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

    fn map(&self, _node: &NodeView, request: &MapRequest<'_>) -> Map {
        let MapRequest { offset, length, vector, position, .. } = *request;
        match request.kind {
            RequestKind::Read => self.read(offset, length, vector, position),
            RequestKind::Write => self.write(offset, length, vector, position),
            RequestKind::Discard | RequestKind::WriteZeroes => self.erase(offset, length),
            RequestKind::Flush => {}
            RequestKind::BlockStatus | RequestKind::Truncate => return Map::Async { length },
        }
        Map::Done { length }
    }

    fn unpin(&self, _loop_index: usize, _pin: Pin) {}

    fn serve<'a>(&'a self, _io: &'a NodeIo, request: Request) -> LocalFuture<'a, Result<Outcome>> {
        Box::pin(async move {
            match request.kind {
                RequestKind::BlockStatus => Ok(self.status(request.offset, request.length).into()),
                kind => {
                    let text = format!("a memory disk does not support {}", kind.name());
                    Err(Error::new(ErrorKind::NotSupported, text))
                }
            }
        })
    }

    fn close<'a>(&'a self, _io: &'a NodeIo) -> LocalFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }
}
