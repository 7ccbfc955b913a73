//! Block status: where an extent's data is.

use super::Qcow2;
use super::layers::Layers;
use super::lookup::Place;
use blockplex_graph::{BlockStatus, Result};

impl Qcow2 {
    /// The extent that starts at `offset`, looking at most `length` far.
    pub(super) async fn status(
        &self,
        layers: &Layers,
        offset: u64,
        length: u64,
    ) -> Result<BlockStatus> {
        let extent = loop {
            let extent = self.look_up(offset, length);
            if extent.place != Place::Missing {
                break extent;
            }
            let hold = self.hold(layers);
            let loaded = self.slice(layers, self.position(offset).number).await;
            hold.release();
            loaded?;
        };
        let found =
            BlockStatus { length: extent.length, allocated: true, ..BlockStatus::default() };
        Ok(match extent.place {
            Place::Data { host, .. } => BlockStatus { data: true, offset: Some(host), ..found },
            Place::Compressed { .. } => BlockStatus { data: true, compressed: true, ..found },
            Place::Zero => BlockStatus { zero: true, ..found },
            Place::Bad(fault) => return Err(self.fail_at(layers, offset, fault).await),
            Place::Unallocated | Place::Missing => {
                self.backing_status(layers, offset, extent.length).await?
            }
        })
    }

    /// The status of what this image does not have.
    async fn backing_status(
        &self,
        layers: &Layers,
        offset: u64,
        length: u64,
    ) -> Result<BlockStatus> {
        let inside = layers.backing_length().saturating_sub(offset).min(length);
        match &layers.backing {
            Some(backing) if inside > 0 => {
                let below = backing.block_status(offset, inside).await?;
                let length = below.length.clamp(1, inside);
                let (backed, depth) = (below.allocated || below.backed, below.depth + 1);
                Ok(BlockStatus { length, allocated: false, backed, depth, ..below })
            }
            // What a node further down may hold here is hidden by the end of this one.
            Some(_) => {
                Ok(BlockStatus { length, zero: true, backed: true, ..BlockStatus::default() })
            }
            None => Ok(BlockStatus { length, zero: true, ..BlockStatus::default() }),
        }
    }
}
