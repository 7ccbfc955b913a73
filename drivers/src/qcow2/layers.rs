//! What a request of the driver works with: the children and the loop.

use blockplex_graph::{Child, NodeIo, Result, Role};

/// The index of the edge to the file.
pub(super) const FILE: usize = 0;
/// The index of the edge to the external data file, where there is one.
pub(super) const DATA: usize = 1;
/// No edge: the image was opened without its data file.
pub(super) const NOWHERE: usize = usize::MAX;

/// The children of a qcow2 node, under the admission of one request. Stays on its loop.
pub(super) struct Layers {
    /// What holds the metadata, and the data unless there is an external data file.
    pub(super) file: Child,
    /// The external data file. Use [`Qcow2::data`](super::Qcow2::data).
    pub(super) data: Option<Child>,
    /// What is read where the image has nothing of its own; without one, that reads as zeros.
    pub(super) backing: Option<Child>,
    /// The request is a guest's: what it changes lies inside the disk, still when its turn comes.
    pub(super) guest: bool,
    /// The loop, for pins.
    pub(super) loop_index: usize,
}

impl Layers {
    /// The children as the request sees them.
    pub(super) fn of(io: &NodeIo) -> Result<Layers> {
        Ok(Layers {
            file: io.child(FILE)?,
            data: io.child_in_role(Role::Data),
            backing: io.child_in_role(Role::Backing),
            guest: false,
            loop_index: io.loop_index(),
        })
    }

    /// The children of an image that is being created.
    pub(super) fn of_new_image(file: &Child, data: Option<&Child>) -> Layers {
        let loop_index = file.local().index();
        Layers { file: file.clone(), data: data.cloned(), backing: None, guest: false, loop_index }
    }

    /// Bytes of the backing child; 0 without one.
    pub(super) fn backing_length(&self) -> u64 {
        self.backing.as_ref().map_or(0, |backing| backing.length())
    }
}
