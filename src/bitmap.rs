//! Dirty bitmaps of qcow2 nodes: what was written since some moment.

use crate::layer::Blockplex;
use blockplex_drivers::dirty_bitmap::DirtyBitmap;
use blockplex_drivers::qcow2::{BitmapStatus, NewBitmap, Qcow2};
use blockplex_graph::{Error, ErrorKind, NodeId, NodeView, Result};
use std::sync::Arc;

impl Blockplex {
    /// The bitmaps of a qcow2 node, in the order in which they came.
    ///
    /// # Errors
    ///
    /// `NotFound`: no such node; `NotSupported`: it is not a qcow2 node.
    pub fn bitmaps(&self, node: NodeId) -> Result<Vec<BitmapStatus>> {
        self.with_qcow2(node, |driver| Ok(driver.bitmaps()))
    }

    /// The bits of a bitmap, for reading; they go on being marked while the bitmap records.
    ///
    /// # Errors
    ///
    /// As [`Blockplex::bitmaps`] and [`Qcow2::bitmap`] say.
    pub fn bitmap(&self, node: NodeId, name: &[u8]) -> Result<Arc<DirtyBitmap>> {
        self.with_qcow2(node, |driver| driver.bitmap(name))
    }

    /// Adds a bitmap, all clean, while no request reaches the node.
    ///
    /// # Errors
    ///
    /// As [`Qcow2::add_bitmap`] and [`Blockplex::manage`] say.
    pub async fn bitmap_add(&self, node: NodeId, new: NewBitmap) -> Result<()> {
        self.manage(node, async move |driver: &Qcow2, io| driver.add_bitmap(io, new).await).await
    }

    /// Removes a bitmap.
    ///
    /// # Errors
    ///
    /// As [`Qcow2::remove_bitmap`] and [`Blockplex::manage`] say.
    pub async fn bitmap_remove(&self, node: NodeId, name: &[u8]) -> Result<()> {
        let name = name.to_vec();
        self.manage(node, async move |driver: &Qcow2, io| driver.remove_bitmap(io, &name).await)
            .await
    }

    /// Makes all of a bitmap clean.
    ///
    /// # Errors
    ///
    /// As [`Qcow2::clear_bitmap`] and [`Blockplex::manage`] say.
    pub async fn bitmap_clear(&self, node: NodeId, name: &[u8]) -> Result<()> {
        let name = name.to_vec();
        self.manage(node, async move |driver: &Qcow2, io| driver.clear_bitmap(io, &name).await)
            .await
    }

    /// Lets a bitmap record what is written from now on.
    ///
    /// # Errors
    ///
    /// As [`Qcow2::set_bitmap_recording`] and [`Blockplex::manage`] say.
    pub async fn bitmap_enable(&self, node: NodeId, name: &[u8]) -> Result<()> {
        self.set_recording(node, name, true).await
    }

    /// Lets a bitmap stay as it is.
    ///
    /// # Errors
    ///
    /// As [`Qcow2::set_bitmap_recording`] and [`Blockplex::manage`] say.
    pub async fn bitmap_disable(&self, node: NodeId, name: &[u8]) -> Result<()> {
        self.set_recording(node, name, false).await
    }

    /// Marks in a bitmap all that is dirty in another one, which may be another node's (and another
    /// image's) and have another granularity.
    ///
    /// # Errors
    ///
    /// As [`Blockplex::bitmap`], [`Qcow2::merge_bitmap`] and [`Blockplex::manage`] say.
    pub async fn bitmap_merge(
        &self,
        (node, name): (NodeId, &[u8]),
        (source_node, source): (NodeId, &[u8]),
    ) -> Result<()> {
        let (name, source) = (name.to_vec(), self.bitmap(source_node, source)?);
        let merge =
            async move |driver: &Qcow2, io: &_| driver.merge_bitmap(io, &name, &source).await;
        self.manage(node, merge).await
    }

    async fn set_recording(&self, node: NodeId, name: &[u8], recording: bool) -> Result<()> {
        let name = name.to_vec();
        self.manage(node, async move |driver: &Qcow2, io| {
            driver.set_bitmap_recording(io, &name, recording).await
        })
        .await
    }

    /// Asks the driver of a qcow2 node something that takes no I/O.
    pub(crate) fn with_qcow2<T>(
        &self,
        node: NodeId,
        ask: impl FnOnce(&Qcow2) -> Result<T>,
    ) -> Result<T> {
        let topology = self.graph().topology();
        let view = topology.node(node).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("{node:?} is not part of the graph"))
        })?;
        ask(qcow2_of(view)?).map_err(|error| error.at_node(view.name()))
    }
}

fn qcow2_of(view: &NodeView) -> Result<&Qcow2> {
    view.driver_as::<Qcow2>().ok_or_else(|| {
        let name = view.driver().driver_name();
        let text = format!("a {name} node has no such operation");
        Error::new(ErrorKind::NotSupported, text).at_node(view.name())
    })
}
