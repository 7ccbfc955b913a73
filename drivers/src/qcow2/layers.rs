//! What a request of the driver works with: the children and the loop.

use blockplex_graph::{Child, NodeIo, Result, Role};

/// The index of the edge to the file.
pub(super) const FILE: usize = 0;

/// The children of a qcow2 node, under the admission of one request. Stays on its loop.
pub(super) struct Layers {
    /// What holds data and metadata.
    pub(super) file: Child,
    /// What is read where the image has nothing of its own; without one, that reads as zeros.
    pub(super) backing: Option<Child>,
    /// The loop, for pins.
    pub(super) loop_index: usize,
}

impl Layers {
    /// The children as the request sees them.
    pub(super) fn of(io: &NodeIo) -> Result<Layers> {
        Ok(Layers {
            file: io.child(FILE)?,
            backing: io.child_in_role(Role::Backing),
            loop_index: io.loop_index(),
        })
    }

    /// Bytes of the backing child; 0 without one.
    pub(super) fn backing_length(&self) -> u64 {
        self.backing.as_ref().map_or(0, |backing| backing.length())
    }
}
