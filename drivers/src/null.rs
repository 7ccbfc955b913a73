//! `null-co`: storage that answers at once and keeps nothing.

use blockplex_graph::driver::{AccessChange, Driver, LocalFuture, Map, MapRequest, Pin, Role};
use blockplex_graph::{
    Access, BlockStatus, Error, ErrorKind, Limits, NodeIo, NodeView, Outcome, Request, RequestKind,
    Result,
};
use std::time::Duration;

/// The default length in bytes (QEMU's).
pub const DEFAULT_SIZE: u64 = 1 << 30;

/// The `null-co` driver. Reads leave the memory as it is, unless `read-zeroes` is on.
#[derive(Clone, Debug)]
pub struct Null {
    size: u64,
    latency: Duration,
    read_zeroes: bool,
}

impl Default for Null {
    fn default() -> Null {
        Null { size: DEFAULT_SIZE, latency: Duration::ZERO, read_zeroes: false }
    }
}

impl Null {
    /// `size` in bytes; `latency` is what each request takes (`latency-ns`).
    pub fn new(size: u64, latency: Duration, read_zeroes: bool) -> Result<Null> {
        if size > Limits::MAX_LENGTH {
            let text = format!("size {size} is above the maximum {}", Limits::MAX_LENGTH);
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
        Ok(Null { size, latency, read_zeroes })
    }

    fn answer(&self, request: &Request) -> Result<Outcome> {
        match request.kind {
            RequestKind::Read => {
                if self.read_zeroes {
                    request.vector.fill(0, request.vector.len(), 0);
                }
                Ok(Outcome::Done)
            }
            RequestKind::BlockStatus => Ok(Outcome::from(BlockStatus {
                length: request.length,
                data: !self.read_zeroes,
                zero: self.read_zeroes,
                allocated: true,
                offset: Some(request.offset),
                ..BlockStatus::default()
            })),
            RequestKind::Truncate => {
                Err(Error::new(ErrorKind::NotSupported, "null-co has a fixed length"))
            }
            _ => Ok(Outcome::Done),
        }
    }
}

impl Driver for Null {
    fn driver_name(&self) -> &'static str {
        "null-co"
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
        let length = request.length;
        match request.kind {
            _ if !self.latency.is_zero() => Map::Async { length },
            RequestKind::BlockStatus | RequestKind::Truncate => Map::Async { length },
            RequestKind::Read if self.read_zeroes => Map::Zero { length },
            _ => Map::Done { length },
        }
    }

    fn unpin(&self, _loop_index: usize, _pin: Pin) {}

    fn serve<'a>(&'a self, io: &'a NodeIo, request: Request) -> LocalFuture<'a, Result<Outcome>> {
        Box::pin(async move {
            if !self.latency.is_zero() {
                io.local().sleep(self.latency).await;
            }
            self.answer(&request)
        })
    }

    fn close<'a>(&'a self, _io: &'a NodeIo) -> LocalFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }
}
