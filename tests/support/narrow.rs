//! A driver with other limits than its own: what it gets must keep to them.

use blockplex_graph::driver::{
    AccessChange, Driver, LocalFuture, Map, MapRequest, Pin, PreparedReopen, Role,
};
use blockplex_graph::{Access, Limits, NodeIo, NodeView, Outcome, Request, RequestKind, Result};
use std::any::Any;

/// Wraps a driver. Panics at a transfer that is not aligned as the limits ask.
pub struct Narrow<D> {
    inner: D,
    limits: Limits,
}

impl<D: Driver> Narrow<D> {
    /// `inner` with `limits`.
    pub fn new(inner: D, limits: Limits) -> Narrow<D> {
        Narrow { inner, limits }
    }
}

impl<D: Driver> Driver for Narrow<D> {
    fn driver_name(&self) -> &'static str {
        "narrow"
    }

    fn length(&self, node: &NodeView) -> u64 {
        self.inner.length(node)
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn child_access(&self, role: Role, parents: Access) -> Access {
        self.inner.child_access(role, parents)
    }

    fn access_changed(&self, change: AccessChange) -> Result<()> {
        self.inner.access_changed(change)
    }

    fn is_read_only(&self) -> bool {
        self.inner.is_read_only()
    }

    fn map(&self, node: &NodeView, request: &MapRequest<'_>) -> Map {
        if matches!(request.kind, RequestKind::Read | RequestKind::Write) {
            let aligned = self.limits.is_aligned(request.offset, request.length);
            assert!(aligned, "a misaligned transfer reached the driver: {request:?}");
        }
        self.inner.map(node, request)
    }

    fn unpin(&self, loop_index: usize, pin: Pin) {
        self.inner.unpin(loop_index, pin);
    }

    fn serve<'a>(&'a self, io: &'a NodeIo, request: Request) -> LocalFuture<'a, Result<Outcome>> {
        self.inner.serve(io, request)
    }

    fn reopen<'a>(
        &'a self,
        io: &'a NodeIo,
        options: Box<dyn Any>,
    ) -> LocalFuture<'a, Result<Box<dyn PreparedReopen>>> {
        self.inner.reopen(io, options)
    }

    fn close<'a>(&'a self, io: &'a NodeIo) -> LocalFuture<'a, Result<()>> {
        self.inner.close(io)
    }
}
