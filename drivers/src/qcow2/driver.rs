//! The driver contract: tier 1, and who serves what in tier 2.

use super::Qcow2;
use super::integrity::Way;
use super::layers::{Layers, NOWHERE};
use super::locks::watched;
use super::lookup::Place;
use crate::crypto::SECTOR;
use blockplex_drain::GracePin;
use blockplex_graph::driver::{
    AccessChange, Driver, LocalFuture, Map, MapRequest, Pin, PreparedReopen, Role,
};
use blockplex_graph::{
    Access, DiscardMode, Limits, NodeIo, NodeView, Outcome, Request, RequestKind, Result,
};
use std::any::Any;

impl Qcow2 {
    fn map_read(&self, node: &NodeView, request: &MapRequest<'_>) -> Map {
        let MapRequest { offset, length, loop_index, .. } = *request;
        let size = self.disk_size();
        if offset >= size {
            return Map::Zero { length };
        }
        if node.announces() {
            return Map::Async { length: length.min(size - offset) };
        }
        // Before the look-up: what it finds stays what it is until the pin is given back.
        let pin = self.grace.pin(loop_index);
        let extent = self.look_up(offset, length.min(size - offset));
        let length = extent.length;
        if let Place::Data { host, .. } = extent.place
            && self.data_edge != NOWHERE
            && self.encryption.is_none()
        {
            let pin = Some(Pin(pin.into_number()));
            return Map::Child { edge: self.data_edge, offset: host, length, pin };
        }
        self.grace.unpin(loop_index, pin);
        match extent.place {
            Place::Zero => Map::Zero { length },
            Place::Unallocated => match node.edge_in_role(Role::Backing) {
                Some(edge) => Map::Child { edge, offset, length, pin: None },
                None => Map::Zero { length },
            },
            // To mark the image takes I/O.
            Place::Bad(fault) if self.read_only => Map::Fail(self.fail_reading(offset, fault)),
            _ => Map::Async { length },
        }
    }

    fn map_write(&self, node: &NodeView, request: &MapRequest<'_>) -> Map {
        let MapRequest { offset, length, loop_index, flags, .. } = *request;
        let way = self.way();
        let direct = !flags.fua && !flags.compressed && self.encryption.is_none();
        if !direct || node.announces() || way == Way::Closed {
            return Map::Async { length };
        }
        let pin = self.grace.pin(loop_index);
        let extent = self.look_up(offset, length);
        if let Place::Data { host, copied: true } = extent.place
            && self.is_covered(host, extent.length)
            && !self.may_hit_metadata(host, extent.length)
        {
            if way == Way::Marked {
                self.bitmaps.mark(offset, extent.length);
            }
            let pin = Some(Pin(pin.into_number()));
            return Map::Child { edge: self.data_edge, offset: host, length: extent.length, pin };
        }
        self.grace.unpin(loop_index, pin);
        Map::Async { length: extent.length }
    }

    async fn serve_request(&self, io: &NodeIo, request: Request) -> Result<Outcome> {
        let Request { kind, flags, offset, length, vector } = request;
        let layers = Layers { guest: kind != RequestKind::Truncate, ..Layers::of(io)? };
        match kind {
            RequestKind::Write => self.bitmaps.mark(offset, vector.len() as u64),
            RequestKind::Discard | RequestKind::WriteZeroes => self.bitmaps.mark(offset, length),
            _ => {}
        }
        match kind {
            RequestKind::Read => self.read(&layers, offset, &vector).await?,
            RequestKind::Write => {
                match flags.compressed {
                    true => self.write_compressed(&layers, offset, &vector).await?,
                    false => self.write(&layers, offset, &vector).await?,
                }
                if flags.fua {
                    self.flush(&layers).await?;
                }
            }
            RequestKind::Flush => self.flush(&layers).await?,
            RequestKind::Discard => self.discard(&layers, offset, length).await?,
            RequestKind::WriteZeroes => {
                let discards = io.node().options().discard == DiscardMode::Unmap;
                let may_unmap = flags.may_unmap && discards;
                self.write_zeroes(&layers, offset, length, may_unmap).await?;
            }
            RequestKind::BlockStatus => {
                return Ok(self.status(&layers, offset, length).await?.into());
            }
            RequestKind::Truncate => self.resize(&layers, offset, flags.preallocation).await?,
        }
        Ok(Outcome::Done)
    }
}

impl Driver for Qcow2 {
    fn driver_name(&self) -> &'static str {
        "qcow2"
    }

    fn length(&self, _node: &NodeView) -> u64 {
        self.disk_size()
    }

    fn limits(&self) -> Limits {
        let unit = self.geometry.subcluster_size() as u32;
        let request_alignment = match &self.encryption {
            Some(_) => SECTOR as u32,
            None => Limits::UNLIMITED.request_alignment,
        };
        Limits {
            request_alignment,
            write_zeroes_alignment: unit,
            discard_alignment: unit,
            ..Limits::UNLIMITED
        }
    }

    fn child_access(&self, role: Role, parents: Access) -> Access {
        match role {
            Role::Backing => Access::through_backing(),
            Role::File | Role::Data | Role::Filtered => {
                parents.through_format_file(!self.read_only)
            }
        }
    }

    fn access_changed(&self, _change: AccessChange) -> Result<()> {
        Ok(())
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn map(&self, node: &NodeView, request: &MapRequest<'_>) -> Map {
        match request.kind {
            RequestKind::Read => self.map_read(node, request),
            RequestKind::Write => self.map_write(node, request),
            _ => Map::Async { length: request.length },
        }
    }

    fn unpin(&self, loop_index: usize, pin: Pin) {
        self.grace.unpin(loop_index, GracePin::from_number(pin.0));
    }

    fn serve<'a>(&'a self, io: &'a NodeIo, request: Request) -> LocalFuture<'a, Result<Outcome>> {
        Box::pin(watched(self.serve_request(io, request)))
    }

    /// Takes a [`Qcow2Options`](super::Qcow2Options): caches, late refcounts and the rules
    /// for discards change.
    fn reopen<'a>(
        &'a self,
        io: &'a NodeIo,
        options: Box<dyn Any>,
    ) -> LocalFuture<'a, Result<Box<dyn PreparedReopen>>> {
        Box::pin(watched(self.prepare_reopen(io, options)))
    }

    fn close<'a>(&'a self, io: &'a NodeIo) -> LocalFuture<'a, Result<()>> {
        Box::pin(watched(async move { self.finish(&Layers::of(io)?).await }))
    }
}
