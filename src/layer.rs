//! The control plane: one graph, and the loop on which its slow work runs.

use crate::backend::Backend;
use crate::open::{Opened, Opener};
use crate::options::OpenOptions;
use blockplex_graph::driver::Driver;
use blockplex_graph::{
    Access, BlockGraph, Error, ErrorKind, NodeId, NodeIo, NodeOptions, Permissions, Result, Role,
    Scope,
};
use blockplex_io::event_loop::{IoThread, Local, LoopConfig, LoopHandle};
use parking_lot::Mutex;
use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// A graph of block nodes with its control plane. Cloning gives another handle; any thread may
/// hold one.
///
/// The asynchronous functions here may be awaited anywhere: on any loop, in any runtime, or under
/// [`block_on`](crate::block_on). Their work runs on a control thread of the layer's own, and goes
/// on to its end when the future is dropped. None may be awaited from inside a request.
#[derive(Clone)]
pub struct Blockplex {
    inner: Arc<Inner>,
}

struct Inner {
    graph: BlockGraph,
    control: IoThread,
    nodes: Mutex<KnownNodes>,
}

/// What the layer remembers of its nodes beside the graph.
#[derive(Default)]
struct KnownNodes {
    /// Nodes that go when nothing uses them any more: those that nobody added by name.
    implicit: BTreeSet<NodeId>,
    /// Where the node's image is, for names that are relative to it and for overlays.
    images: BTreeMap<NodeId, ImagePlace>,
}

/// The file of an image, and the format in which it is read.
#[derive(Clone, Debug)]
pub(crate) struct ImagePlace {
    pub(crate) path: PathBuf,
    pub(crate) format: &'static str,
}

impl Blockplex {
    /// An empty layer. Starts its control thread.
    pub fn new() -> Result<Blockplex> {
        let config = LoopConfig {
            name: "blockplex-control".into(),
            poll_max: Duration::ZERO,
            ring_entries: 64,
            ..LoopConfig::default()
        };
        let control = IoThread::spawn(config)
            .map_err(|error| Error::from(error).during("starting the control thread"))?;
        let nodes = Mutex::new(KnownNodes::default());
        Ok(Blockplex { inner: Arc::new(Inner { graph: BlockGraph::new(), control, nodes }) })
    }

    /// The graph, for changes that are not offered here.
    pub fn graph(&self) -> &BlockGraph {
        &self.inner.graph
    }

    /// Opens a tree of nodes and a backend on top of it. `name` is the backend's. Closing the
    /// backend closes the nodes that were opened with it.
    pub async fn open(&self, name: &str, options: OpenOptions) -> Result<Backend> {
        let (layer, name) = (self.clone(), name.to_owned());
        self.on_control(move |local| async move {
            let read_only = options.is_read_only()?;
            let opened = Opener::open(&layer, &local, options).await?;
            let result = layer.attach_backend(&name, opened.root, read_only).await;
            // Not before they are in use: another's clearing up would take them away.
            layer.remember(&opened, None);
            if result.is_err() {
                layer.collect_unused().await?;
            }
            result
        })
        .await
    }

    /// Opens a tree of nodes without a user. The root stays until [`remove_node`]; it needs a
    /// `node-name` to be of use.
    ///
    /// [`remove_node`]: Blockplex::remove_node
    pub async fn add_node(&self, options: OpenOptions) -> Result<NodeId> {
        let layer = self.clone();
        self.on_control(move |local| async move {
            let opened = Opener::open(&layer, &local, options).await?;
            layer.remember(&opened, Some(opened.root));
            Ok(opened.root)
        })
        .await
    }

    /// Removes a node that nothing uses, and those below it that were opened with it.
    pub async fn remove_node(&self, node: NodeId) -> Result<()> {
        let layer = self.clone();
        self.on_control(move |_| async move {
            let mut change = layer.inner.graph.begin().await;
            change.remove_node(node)?;
            let drained = change.drain().await?;
            let result = change.commit(&drained).await;
            layer.forget(&[node]);
            layer.collect_unused().await?;
            result
        })
        .await
    }

    /// A further backend on a node that is open.
    pub async fn open_backend(&self, name: &str, node: NodeId, read_only: bool) -> Result<Backend> {
        let (layer, name) = (self.clone(), name.to_owned());
        self.on_control(move |_| async move { layer.attach_backend(&name, node, read_only).await })
            .await
    }

    /// The node with that name.
    pub fn find_node(&self, name: &str) -> Result<NodeId> {
        let topology = self.inner.graph.topology();
        topology.find(name).map(|view| view.id()).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("there is no node named '{name}'"))
        })
    }

    /// Puts a filter above a node, between it and all that use it. `options` describe the filter
    /// (`driver=raw`, say) without its child.
    pub async fn insert_filter(&self, below: NodeId, options: OpenOptions) -> Result<NodeId> {
        let layer = self.clone();
        self.on_control(move |_| async move {
            let (name, driver, generic) = crate::open::filter(&layer, below, options)?;
            let mut change = layer.inner.graph.begin().await;
            let children = [(Role::Filtered, below)];
            let filter = change.add_node(name.as_deref(), driver, generic, &children)?;
            change.insert_filter(below, filter)?;
            let drained = change.drain().await?;
            change.commit(&drained).await?;
            Ok(filter)
        })
        .await
    }

    /// Takes a filter out again and removes it.
    pub async fn drop_filter(&self, filter: NodeId) -> Result<()> {
        let layer = self.clone();
        self.on_control(move |_| async move {
            let mut change = layer.inner.graph.begin().await;
            change.drop_filter(filter)?;
            change.remove_node(filter)?;
            let drained = change.drain().await?;
            change.commit(&drained).await?;
            drop(drained);
            layer.collect_unused().await
        })
        .await
    }

    /// Changes the options of open nodes, all at once or not at all: for each node the options
    /// that every node has (`None`: as they are) and those of its driver (`None`: as they are).
    pub async fn reopen(&self, changes: Vec<NodeReopen>) -> Result<()> {
        let layer = self.clone();
        self.on_control(move |_| async move {
            let mut change = layer.inner.graph.begin().await;
            for NodeReopen { node, options, driver } in changes {
                if let Some(options) = options {
                    change.set_options(node, options)?;
                }
                if let Some(driver) = driver {
                    change.reopen(node, driver).await?;
                }
            }
            let drained = change.drain().await?;
            change.commit(&drained).await
        })
        .await
    }

    /// Begins a drained section of `scope` and waits until it has settled, at most `deadline`.
    /// The error names who held it.
    pub async fn drain_within(
        &self,
        scope: Scope,
        deadline: Duration,
    ) -> Result<blockplex_graph::Drained> {
        let section = self.inner.graph.begin_drain(scope)?;
        self.on_control(
            move |local| async move { section.settle_before(local.sleep(deadline)).await },
        )
        .await
    }

    /// Runs management work on the driver of `node`, which must be a `D`, on the control loop, while
    /// no request reaches the node: snapshots, bitmaps, amendments, whatever one kind of driver
    /// offers beside the contract. The work has the node's children through its [`NodeIo`].
    ///
    /// # Errors
    ///
    /// `NotFound`: no such node; `NotSupported`: its driver is another; what the work says.
    pub async fn manage<D: Driver, T: Send + 'static>(
        &self,
        node: NodeId,
        work: impl AsyncFnOnce(&D, &NodeIo) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let layer = self.clone();
        self.on_control(move |local| async move {
            let drained = layer.inner.graph.drain(Scope::node(node)).await?;
            let topology = layer.inner.graph.topology();
            let view = topology.node(node).ok_or_else(|| {
                Error::new(ErrorKind::NotFound, format!("{node:?} is not part of the graph"))
            })?;
            let io = NodeIo::for_control(&local, view);
            let driver = view.driver_as::<D>().ok_or_else(|| {
                let name = view.driver().driver_name();
                let text = format!("a {name} node has no such operation");
                Error::new(ErrorKind::NotSupported, text).at_node(view.name())
            })?;
            let result = work(driver, &io).await;
            drop(drained);
            result
        })
        .await
    }

    pub(crate) fn control(&self) -> &LoopHandle {
        self.inner.control.handle()
    }

    /// Runs control work on the control loop.
    pub(crate) async fn on_control<T, M, F>(&self, make: M) -> Result<T>
    where
        M: FnOnce(Local) -> F + Send + 'static,
        F: Future<Output = Result<T>> + 'static,
        T: Send + 'static,
    {
        let gone = || Error::new(ErrorKind::Gone, "the control thread has ended");
        let task = self.inner.control.handle().spawn_with(make).map_err(|_| gone())?;
        task.await.map_err(|_| gone())?
    }

    async fn attach_backend(&self, name: &str, node: NodeId, read_only: bool) -> Result<Backend> {
        let access = if read_only { Access::READER } else { writer() };
        let mut change = self.inner.graph.begin().await;
        let origin = change.add_origin(name, access, None);
        change.set_root(origin.id(), Some(node))?;
        let drained = change.drain().await?;
        change.commit(&drained).await?;
        Ok(Backend::new(self.clone(), origin))
    }

    /// Takes note of opened nodes; all but `kept` go when nothing uses them any more.
    pub(crate) fn remember(&self, opened: &Opened, kept: Option<NodeId>) {
        let mut nodes = self.inner.nodes.lock();
        nodes.implicit.extend(opened.nodes.iter().filter(|id| Some(**id) != kept));
        nodes.images.extend(opened.images.iter().cloned());
    }

    pub(crate) fn image_of(&self, node: NodeId) -> Option<ImagePlace> {
        self.inner.nodes.lock().images.get(&node).cloned()
    }

    fn forget(&self, gone: &[NodeId]) {
        let mut nodes = self.inner.nodes.lock();
        for id in gone {
            nodes.implicit.remove(id);
            nodes.images.remove(id);
        }
    }

    /// Removes the implicit nodes that nothing uses, from the top down. Runs on the control loop.
    pub(crate) async fn collect_unused(&self) -> Result<()> {
        let mut first_error = Ok(());
        loop {
            let mut change = self.inner.graph.begin().await;
            let topology = self.inner.graph.topology();
            let unused: Vec<NodeId> = {
                let nodes = self.inner.nodes.lock();
                let is_unused =
                    |id: &&NodeId| topology.node(**id).is_some() && !topology.has_parents(**id);
                nodes.implicit.iter().filter(is_unused).copied().collect()
            };
            if unused.is_empty() {
                return first_error;
            }
            for id in &unused {
                change.remove_node(*id)?;
            }
            let drained = change.drain().await?;
            let result = change.commit(&drained).await;
            self.forget(&unused);
            first_error = first_error.and(result);
        }
    }
}

impl std::fmt::Debug for Blockplex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Blockplex").field("graph", &self.inner.graph).finish_non_exhaustive()
    }
}

/// New options of one node, for [`Blockplex::reopen`].
pub struct NodeReopen {
    /// The node.
    pub node: NodeId,
    /// The options that every node has.
    pub options: Option<NodeOptions>,
    /// The driver's own: [`FileReopen`](crate::drivers::file::FileReopen) for `file`.
    pub driver: Option<Box<dyn Any + Send>>,
}

/// What a writing backend needs and shares: nobody else writes or resizes.
fn writer() -> Access {
    Access { needed: Access::WRITER.needed | Permissions::RESIZE, shared: Access::WRITER.shared }
}
