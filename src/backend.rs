//! Backends: one user of a disk.

use crate::blocking::Blocking;
use crate::layer::Blockplex;
use blockplex_graph::{
    Drained, Error, ErrorKind, Limits, NodeId, NodeView, Origin, Queue, Result, Scope, Statistics,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// One user of a disk: a virtual machine's device, an export, a tool. `Send + Sync`; cloning gives
/// another handle to the same backend.
///
/// I/O goes through [`queue`](Backend::queue)s, one for each thread and virtqueue, or through
/// [`blocking`](Backend::blocking). Close it with [`close`](Backend::close): when the last handle
/// is dropped without, the layer closes it in the background and errors are only logged.
#[derive(Clone)]
pub struct Backend {
    inner: Arc<Inner>,
}

struct Inner {
    layer: Blockplex,
    origin: Arc<Origin>,
    closed: AtomicBool,
}

impl Backend {
    pub(crate) fn new(layer: Blockplex, origin: Arc<Origin>) -> Backend {
        Backend { inner: Arc::new(Inner { layer, origin, closed: AtomicBool::new(false) }) }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.inner.origin.name()
    }

    /// Makes a queue on the current thread's loop; an error on a thread without one. `label` names
    /// it in reports. The queue stays on that thread.
    pub fn queue(&self, label: &str) -> Result<Queue> {
        let local = blockplex_io::event_loop::current().ok_or_else(|| {
            let text = "a queue belongs to an event loop, and this thread has none";
            Error::new(ErrorKind::InvalidArgument, text)
        })?;
        Ok(Queue::open(self.inner.layer.graph(), &self.inner.origin, &local, label))
    }

    /// The blocking door, for threads that own no loop.
    pub fn blocking(&self) -> Blocking {
        Blocking::new(self.inner.layer.clone(), self.clone())
    }

    /// The root node; none when it has none.
    pub fn root(&self) -> Option<NodeId> {
        self.view().ok().map(|view| view.id())
    }

    /// Its length in bytes now.
    pub fn length(&self) -> Result<u64> {
        Ok(self.view()?.length())
    }

    /// The limits that requests should keep to, to be served without detours.
    pub fn limits(&self) -> Result<Limits> {
        Ok(*self.view()?.limits())
    }

    /// What it has served, all its queues together.
    pub fn statistics(&self) -> Statistics {
        self.inner.origin.statistics()
    }

    /// Keeps its new requests waiting, and waits until those that run have ended (and, submitted
    /// ones, been reaped). They go on when the result is dropped. From any thread, but not where
    /// the requests it waits for are to be reaped.
    pub async fn drain(&self) -> Result<Drained> {
        self.inner.layer.graph().drain(self.scope()).await
    }

    /// The scope of its requests, for [`BlockGraph::begin_drain`](crate::graph::BlockGraph).
    pub fn scope(&self) -> Scope {
        Scope::Origin(self.inner.origin.id())
    }

    /// Closes it: waits for its requests, detaches it, and closes the nodes that were opened with
    /// it and that nothing else uses. Requests that come later end with `NoMedium`. An error of
    /// the nodes' last I/O is reported; everything is closed all the same.
    pub async fn close(&self) -> Result<()> {
        if self.inner.closed.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        let (layer, origin) = (self.inner.layer.clone(), self.inner.origin.clone());
        self.inner.layer.on_control(move |_| async move { shut(&layer, &origin).await }).await
    }

    pub(crate) fn origin(&self) -> &Arc<Origin> {
        &self.inner.origin
    }

    fn view(&self) -> Result<Arc<NodeView>> {
        let topology = self.inner.layer.graph().topology();
        topology.root(self.inner.origin.id()).cloned().ok_or_else(|| {
            let text = format!("backend '{}' has no root node", self.name());
            Error::new(ErrorKind::NoMedium, text)
        })
    }
}

impl std::fmt::Debug for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backend").field("name", &self.name()).finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if *self.closed.get_mut() {
            return;
        }
        tracing::warn!(backend = self.origin.name(), "dropped without being closed");
        let (layer, origin) = (self.layer.clone(), self.origin.clone());
        // Fails only when the control thread has ended, and the nodes with it.
        drop(self.layer.control().spawn_with(move |_| async move {
            if let Err(error) = shut(&layer, &origin).await {
                tracing::error!(backend = origin.name(), %error, "closing failed");
            }
        }));
    }
}

async fn shut(layer: &Blockplex, origin: &Arc<Origin>) -> Result<()> {
    crate::blocking::close_queue(origin.id());
    {
        let mut change = layer.graph().begin().await;
        change.remove_origin(origin.id())?;
        let drained = change.drain().await?;
        change.commit(&drained).await?;
    }
    layer.collect_unused().await
}
