//! An open image: a graph of a qcow2 node over a volume, and a queue on the test's own loop.

use super::volume::Volume;
use crate::blkdebug::{Blkdebug, BlkdebugOptions};
use crate::qcow2::{Qcow2, Qcow2Options};
use blockplex_graph::{
    Access, BlockGraph, BlockStatus, Child, DiscardMode, NodeId, NodeIo, NodeOptions, NodeView,
    Origin, Outcome, Permissions, Queue, Request, Result, Role, Scope,
};
use blockplex_io::buffer::{IoBuffer, IoVector};
use blockplex_io::event_loop::{EventLoop, LoopConfig};
use std::sync::Arc;

/// See the page. The volume stays usable after it.
pub(crate) struct Rig {
    event_loop: EventLoop,
    queue: Option<Queue>,
    pub(crate) graph: BlockGraph,
    pub(crate) origin: Arc<Origin>,
    node: NodeId,
    file: NodeId,
}

/// How to open an image.
#[derive(Clone, Default)]
pub(crate) struct Setup {
    pub(crate) options: Qcow2Options,
    pub(crate) read_only: bool,
    pub(crate) backing: Option<Volume>,
    pub(crate) data: Option<Volume>,
    /// The file lies below a `blkdebug` node, for breakpoints.
    pub(crate) breakpoints: bool,
}

pub(crate) fn new_loop() -> EventLoop {
    EventLoop::new(LoopConfig::default()).unwrap()
}

/// Runs `work` with a volume as a child, as the control plane has one.
pub(crate) fn with_file<T>(volume: &Volume, work: impl AsyncFnOnce(&Child) -> T) -> T {
    with_files([volume], async |[file]| work(&file).await)
}

/// As [`with_file`], with several.
pub(crate) fn with_files<T, const N: usize>(
    volumes: [&Volume; N],
    work: impl AsyncFnOnce([Child; N]) -> T,
) -> T {
    let mut event_loop = new_loop();
    let local = event_loop.local();
    event_loop.block_on(async {
        let graph = BlockGraph::new();
        let mut change = graph.begin().await;
        let plain = NodeOptions { discard: DiscardMode::Unmap, ..NodeOptions::default() };
        let ids = volumes.map(|volume| change.add_node(None, volume.driver(), plain, &[]).unwrap());
        let drained = change.drain().await.unwrap();
        change.commit(&drained).await.unwrap();
        let topology = graph.topology();
        let child = |id| Child::for_control(&local, topology.node(id).unwrap(), Permissions::ALL);
        work(ids.map(child)).await
    })
}

/// A `blkdebug` node.
pub(crate) struct Listener(Arc<NodeView>);

impl std::ops::Deref for Listener {
    type Target = Blkdebug;

    fn deref(&self) -> &Blkdebug {
        self.0.driver_as().unwrap()
    }
}

impl Rig {
    pub(crate) fn writable(volume: &Volume) -> Rig {
        Rig::open(volume, Setup::default()).unwrap()
    }

    pub(crate) fn open(volume: &Volume, setup: Setup) -> Result<Rig> {
        let mut event_loop = new_loop();
        let local = event_loop.local();
        let opened: Result<_> = event_loop.block_on(async {
            let graph = BlockGraph::new();
            let mut change = graph.begin().await;
            let plain = NodeOptions { discard: DiscardMode::Unmap, ..NodeOptions::default() };
            let lowest = change.add_node(Some("file"), volume.driver(), plain, &[])?;
            let mut file = lowest;
            if setup.breakpoints {
                let listener = Box::new(Blkdebug::new(BlkdebugOptions::default(), 1)?);
                file = change.add_node(Some("listener"), listener, plain, &[(Role::File, file)])?;
            }
            let mut children = vec![(Role::File, file)];
            if let Some(data) = &setup.data {
                let data = change.add_node(Some("data"), data.driver(), plain, &[])?;
                children.push((Role::Data, data));
            }
            if let Some(backing) = &setup.backing {
                let backing = change.add_node(Some("backing"), backing.driver(), plain, &[])?;
                children.push((Role::Backing, backing));
            }
            let drained = change.drain().await?;
            change.commit(&drained).await?;
            drop(drained);
            let topology = graph.topology();
            let view = topology.node(lowest).unwrap();
            let child = Child::for_control(&local, view, Permissions::ALL);
            let driver = Qcow2::open(&child, setup.options, setup.read_only).await?;
            let mut change = graph.begin().await;
            let options = NodeOptions { read_only: setup.read_only, ..plain };
            let node = change.add_node(Some("image"), Box::new(driver), options, &children)?;
            let access = if setup.read_only { Access::READER } else { Access::WRITER };
            let access = match setup.read_only {
                true => access,
                false => Access { needed: access.needed | Permissions::RESIZE, ..access },
            };
            let origin = change.add_origin("disk", access, None);
            change.set_root(origin.id(), Some(node))?;
            let drained = change.drain().await?;
            change.commit(&drained).await?;
            drop(drained);
            let queue = Queue::open(&graph, &origin, &local, "queue");
            Ok((graph, origin, (node, file), queue))
        });
        let (graph, origin, (node, file), queue) = opened?;
        Ok(Rig { event_loop, queue: Some(queue), graph, origin, node, file })
    }

    /// The node below the image, when it was opened with breakpoints.
    pub(crate) fn listener(&self) -> Listener {
        Listener(self.graph.topology().node(self.file).unwrap().clone())
    }

    /// Runs `work` with the queue, on the rig's loop.
    pub(crate) fn run<T>(&mut self, work: impl AsyncFnOnce(&Queue) -> T) -> T {
        let queue = self.queue.as_ref().unwrap();
        self.event_loop.block_on(work(queue))
    }

    pub(crate) fn request(&mut self, request: Request) -> Result<Outcome> {
        self.run(async |queue| queue.request(request).await.result)
    }

    pub(crate) fn try_read(&mut self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let vector = IoVector::from(IoBuffer::from_slice(&vec![0xa5; length]));
        self.request(Request::read(offset, vector.clone()))?;
        Ok(vector.to_vec())
    }

    pub(crate) fn read(&mut self, offset: u64, length: usize) -> Vec<u8> {
        self.try_read(offset, length).unwrap()
    }

    pub(crate) fn try_write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.request(Request::write(offset, IoBuffer::from_slice(bytes))).map(drop)
    }

    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.try_write(offset, bytes).unwrap();
    }

    pub(crate) fn flush(&mut self) {
        self.request(Request::flush()).unwrap();
    }

    pub(crate) fn status(&mut self, offset: u64, length: u64) -> BlockStatus {
        match self.request(Request::block_status(offset, length)).unwrap() {
            Outcome::Status(status) => *status,
            Outcome::Done => panic!("no status"),
        }
    }

    /// Runs management work on the driver, while no request reaches it.
    pub(crate) fn manage<T>(&mut self, work: impl AsyncFnOnce(&Qcow2, &NodeIo) -> T) -> T {
        let local = self.event_loop.local();
        self.event_loop.block_on(async {
            let drained = self.graph.drain(Scope::node(self.node)).await.unwrap();
            let topology = self.graph.topology();
            let view = topology.node(self.node).unwrap();
            let io = NodeIo::for_control(&local, view);
            let work = work(view.driver_as::<Qcow2>().unwrap(), &io);
            let result = crate::qcow2::locks::watched(work).await;
            drop(drained);
            result
        })
    }

    pub(crate) fn reopen(&mut self, options: Qcow2Options) -> Result<()> {
        self.event_loop.block_on(async {
            let mut change = self.graph.begin().await;
            change.reopen(self.node, Box::new(options)).await?;
            let drained = change.drain().await?;
            change.commit(&drained).await
        })
    }

    /// Takes the image out of the graph, with its last I/O, which must succeed.
    pub(crate) fn close(self) {
        self.try_close().unwrap();
    }

    /// As [`Rig::close`], whatever the last I/O says.
    pub(crate) fn abandon(self) {
        let _ = self.try_close();
    }

    /// As [`Rig::close`]; gives what the last I/O says.
    pub(crate) fn try_close(mut self) -> Result<()> {
        self.queue = None;
        self.event_loop.block_on(async {
            let mut change = self.graph.begin().await;
            change.set_root(self.origin.id(), None)?;
            change.remove_node(self.node)?;
            let drained = change.drain().await?;
            change.commit(&drained).await
        })
    }
}
