//! Internal snapshots: states of a disk inside of its own qcow2 image.

use crate::layer::Blockplex;
use blockplex_drivers::qcow2::snapshot_table::SnapshotEntry;
use blockplex_drivers::qcow2::{NewSnapshot, Qcow2, Snapshot, SnapshotSelector};
use blockplex_graph::{NodeId, Result};

impl Blockplex {
    /// The internal snapshots of a qcow2 node, in the order of the image.
    ///
    /// # Errors
    ///
    /// `NotFound`: no such node; `NotSupported`: it is not a qcow2 node.
    pub fn internal_snapshots(&self, node: NodeId) -> Result<Vec<Snapshot>> {
        self.with_qcow2(node, |driver| Ok(driver.snapshots()))
    }

    /// Takes an internal snapshot of a qcow2 node while no request reaches it; gives its entry.
    ///
    /// # Errors
    ///
    /// As [`Qcow2::create_snapshot`] and [`Blockplex::manage`] say.
    pub async fn internal_snapshot_create(
        &self,
        node: NodeId,
        new: NewSnapshot,
    ) -> Result<SnapshotEntry> {
        self.manage(node, async move |driver: &Qcow2, io| driver.create_snapshot(io, new).await)
            .await
    }

    /// Removes an internal snapshot of a qcow2 node; gives what its entry was.
    ///
    /// # Errors
    ///
    /// As [`Qcow2::delete_snapshot`] and [`Blockplex::manage`] say.
    pub async fn internal_snapshot_delete(
        &self,
        node: NodeId,
        which: SnapshotSelector,
    ) -> Result<SnapshotEntry> {
        self.manage(node, async move |driver: &Qcow2, io| driver.delete_snapshot(io, &which).await)
            .await
    }

    /// Makes the disk of a qcow2 node what it was when an internal snapshot was taken, its size
    /// included.
    ///
    /// # Errors
    ///
    /// As [`Qcow2::apply_snapshot`] and [`Blockplex::manage`] say.
    pub async fn internal_snapshot_apply(
        &self,
        node: NodeId,
        which: SnapshotSelector,
    ) -> Result<SnapshotEntry> {
        self.manage(node, async move |driver: &Qcow2, io| driver.apply_snapshot(io, &which).await)
            .await
    }
}
