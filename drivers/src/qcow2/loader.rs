//! Bringing slices into memory, and giving L1 entries L2 tables that may be changed.
//!
//! All of it runs with a [`Hold`]: a table that is being read is not used for anything else.

use super::Qcow2;
use super::discard::DiscardReason;
use super::entry::{Cluster, L1Entry, L2Entry};
use super::layers::Layers;
use super::limbo::Freed;
use super::lookup::Fault;
use super::overlap::Structure;
use super::slice::{Slice, SliceNumber};
use blockplex_drain::{Grace, GracePin};
use blockplex_graph::{DebugEvent, Error, ErrorKind, RequestFlags, Result};
use blockplex_io::buffer::IoVector;
use std::sync::Arc;

/// A pin of tier 2. It has no destructor on purpose: a request that is torn down with its loop may
/// leave I/O behind that nobody waits for, and then the pin must never be given back. What was
/// freed since is not used again until the image is opened anew; nothing else is lost.
#[must_use = "a pin that is not released keeps clusters from being used again"]
pub(super) struct Hold<'a> {
    grace: &'a Grace,
    loop_index: usize,
    pin: GracePin,
}

impl Hold<'_> {
    /// Gives the pin back, when all I/O of the request has ended.
    pub(super) fn release(self) {
        self.grace.unpin(self.loop_index, self.pin);
    }
}

impl Qcow2 {
    /// Pins whatever is looked up from now on.
    pub(super) fn hold(&self, layers: &Layers) -> Hold<'_> {
        let loop_index = layers.loop_index;
        Hold { grace: &self.grace, loop_index, pin: self.grace.pin(loop_index) }
    }

    /// A slice whose L2 table exists, from memory or from the file.
    pub(super) async fn slice(&self, layers: &Layers, number: SliceNumber) -> Result<Arc<Slice>> {
        if let Some(slice) = self.slices.get(number) {
            return Ok(slice);
        }
        let _turn = self.slices.loading_turn(number).await;
        if let Some(slice) = self.slices.get(number) {
            return Ok(slice);
        }
        let offset = match self.slice_offset(number) {
            Ok(offset) => offset,
            Err(fault) => return Err(self.fail_at(layers, self.guest_of(number), fault).await),
        };
        let memory = IoVector::zeroed(self.slice_bytes() as usize);
        layers.file.announce(DebugEvent::L2Load).await;
        layers.file.read(offset, memory.clone()).await?;
        let bytes = memory.to_vec();
        let slice = self.refcounts.with_metadata(|is_metadata| {
            let make = match self.geometry.extended_l2() {
                true => Slice::extended,
                false => Slice::new,
            };
            make(number, &bytes, |index, raw| {
                match L2Entry::decode(raw, &self.geometry, self.version) {
                    Ok(Cluster::Normal { host, .. } | Cluster::Zero { host: Some(host), .. }) => {
                        match self.external {
                            None => is_metadata(host),
                            // X1.
                            Some(_) => host != self.cluster_of(number, index),
                        }
                    }
                    _ => false,
                }
            })
        });
        Ok(self.slices.insert(slice))
    }

    /// Where a slice is in the file.
    pub(super) fn slice_offset(&self, number: SliceNumber) -> Result<u64, Fault> {
        let index = self.l1_index(number);
        let raw = self.l1.get(index);
        match L1Entry::decode(raw, &self.geometry).map_err(Fault::Entry)? {
            L1Entry::Table { host, .. } if !self.bad_tables.contains(&index) => {
                let in_table = number & ((1 << (self.geometry.l2_bits() - self.slice_bits)) - 1);
                Ok(host + in_table * self.slice_bytes())
            }
            _ => Err(Fault::Table(raw)),
        }
    }

    /// The bytes of a slice in the file.
    fn slice_bytes(&self) -> u64 {
        self.geometry.l2_entry_bytes() << self.slice_bits
    }

    /// The first guest byte that a slice maps.
    pub(super) fn guest_of(&self, number: SliceNumber) -> u64 {
        number << (self.slice_bits + self.geometry.cluster_bits())
    }

    /// The guest cluster of an entry, as its first byte.
    pub(super) fn cluster_of(&self, number: SliceNumber, index: usize) -> u64 {
        self.guest_of(number) + ((index as u64) << self.geometry.cluster_bits())
    }

    /// A slice whose entries may be changed: its L2 table exists and is this image's alone.
    pub(super) async fn own_slice(
        &self,
        layers: &Layers,
        number: SliceNumber,
    ) -> Result<Arc<Slice>> {
        let index = self.l1_index(number);
        if !self.owns_table(index) {
            let _turn = self.l1_turns.turn(index).await;
            if !self.owns_table(index) {
                self.make_table(layers, index).await?;
            }
        }
        self.slice(layers, number).await
    }

    fn owns_table(&self, index: u64) -> bool {
        let entry = L1Entry::decode(self.l1.get(index), &self.geometry);
        matches!(entry, Ok(L1Entry::Table { copied: true, .. }))
    }

    /// Gives L1 entry `index` a new table: an empty one, or a copy of the one that it shares with
    /// a snapshot. The table is whole in the file before the entry names it, and never ends past
    /// the end of the file.
    async fn make_table(&self, layers: &Layers, index: u64) -> Result<()> {
        let raw = self.l1.get(index);
        let guest = index << (self.geometry.cluster_bits() + self.geometry.l2_bits());
        let old = match L1Entry::decode(raw, &self.geometry) {
            Ok(L1Entry::Unallocated) => None,
            Ok(L1Entry::Table { host, .. }) if !self.bad_tables.contains(&index) => Some(host),
            Ok(_) => return Err(self.fail_at(layers, guest, Fault::Table(raw)).await),
            Err(error) => return Err(self.fail_at(layers, guest, Fault::Entry(error)).await),
        };
        let contents = IoVector::zeroed(self.geometry.cluster_size() as usize);
        if let Some(old) = old {
            layers.file.announce(DebugEvent::L2AllocCowRead).await;
            layers.file.read(old, contents.clone()).await?;
        }
        let allocated = self.refcounts.allocate(&layers.file, 1).await;
        let run = self.judge(&layers.file, allocated).await?;
        let entry = L1Entry::Table { host: run.offset, copied: true }.encode(&self.geometry);
        layers.file.announce(DebugEvent::L2AllocWrite).await;
        let written = layers.file.write(run.offset, contents, RequestFlags::default()).await;
        let written = match written {
            Ok(()) if self.lazy.is_wanted() => self.write_refcounts(layers).await,
            written => written,
        };
        let raw = match (written, entry) {
            (Ok(()), Ok(raw)) => raw,
            (Err(error), _) => return Err(self.abandon(layers, run, error).await),
            (_, Err(error)) => {
                let error = Error::new(ErrorKind::NoSpace, error.to_string());
                return Err(self.abandon(layers, run, error).await);
            }
        };
        self.assert_counted(run);
        self.refcounts.add_metadata_cluster(Structure::ActiveL2, run.offset);
        self.l1.set(index, raw);
        if let Some(offset) = old {
            let discard = self.passes_discard(DiscardReason::Other);
            self.free(Freed { offset, clusters: 1, discard });
        }
        Ok(())
    }

    /// Hands clusters over to limbo, after the last entry that named them was changed.
    pub(super) fn free(&self, freed: Freed) {
        let bits = self.geometry.cluster_bits();
        self.limbo.push(freed, bits, &self.grace, self.rounds.begun());
    }
}
