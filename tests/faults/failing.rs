//! [`Failing`]: a filter that passes requests on until its plan says that one fails; and
//! [`Rig`]: a qcow2 image on a file with such a filter between.

use super::image::text;
use blockplex::graph::driver::{
    AccessChange, Driver, LocalFuture, Map, MapRequest, Pin, PreparedReopen, Role,
};
use blockplex::graph::{Access, DiscardMode, Limits, NodeIo, NodeOptions, NodeView};
use blockplex::{
    Backend, Blockplex, Error, ErrorKind, NodeId, OpenOptions, Outcome, Request, RequestKind,
    Result, block_on,
};
use parking_lot::Mutex;
use std::any::Any;
use std::path::Path;
use std::sync::Arc;

/// Which operation fails, and how. Operations are counted from 1; a block-status is none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plan {
    /// The number of the operation; none: none fails.
    pub nth: Option<usize>,
    /// All later ones as well.
    pub from_then_on: bool,
    /// A write that fails has written its first half, in whole sectors.
    pub torn: bool,
    /// The storage has no room past this offset: writes there fail.
    pub room: Option<u64>,
    /// Nor can the file be made longer than that; otherwise it may, as a sparse file.
    pub bounded_length: bool,
}

/// The test's side: any thread.
#[derive(Clone, Default)]
pub struct Storage(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    plan: Plan,
    count: usize,
    failed: usize,
}

impl Storage {
    /// From now on this happens; counts from 0 again.
    pub fn plan(&self, plan: Plan) {
        *self.0.lock() = State { plan, ..State::default() };
    }

    /// How many operations have failed since the last plan.
    pub fn failed(&self) -> usize {
        self.0.lock().failed
    }

    /// What becomes of the next operation.
    fn verdict(&self, request: &Request) -> Result<(), i32> {
        let state = &mut *self.0.lock();
        if request.kind == RequestKind::BlockStatus {
            return Ok(());
        }
        state.count += 1;
        let nth = match state.plan.nth {
            Some(nth) if state.plan.from_then_on => state.count >= nth,
            Some(nth) => state.count == nth,
            None => false,
        };
        let grows = match request.kind {
            RequestKind::Write | RequestKind::WriteZeroes => true,
            RequestKind::Truncate => state.plan.bounded_length,
            _ => false,
        };
        let full = state.plan.room.is_some_and(|room| request.offset + request.length > room);
        let errno = match (nth, grows && full) {
            (true, _) => libc::EIO,
            (false, true) => libc::ENOSPC,
            (false, false) => return Ok(()),
        };
        state.failed += 1;
        Err(errno)
    }
}

/// See the page.
struct Failing(Storage);

impl Failing {
    async fn pass(&self, io: &NodeIo, request: Request) -> Result<Outcome> {
        let file = io.child(0)?;
        let verdict = self.0.verdict(&request);
        let torn = self.0.0.lock().plan.torn;
        let Request { kind, flags, offset, length, vector } = request;
        if let Err(errno) = verdict {
            let half = length / 2 / 512 * 512;
            if torn && kind == RequestKind::Write && half > 0 {
                file.write(offset, vector.slice(0, half as usize), flags).await?;
            }
            return Err(Error::from_errno(errno));
        }
        match kind {
            RequestKind::Read => file.read(offset, vector).await?,
            RequestKind::Write => file.write(offset, vector, flags).await?,
            RequestKind::Flush => file.flush().await?,
            RequestKind::Discard => file.discard(offset, length).await?,
            RequestKind::WriteZeroes => file.write_zeroes(offset, length, flags).await?,
            RequestKind::Truncate => file.truncate(offset).await?,
            RequestKind::BlockStatus => {
                return Ok(file.block_status(offset, length).await?.into());
            }
        }
        Ok(Outcome::Done)
    }
}

impl Driver for Failing {
    fn driver_name(&self) -> &'static str {
        "failing"
    }

    fn length(&self, node: &NodeView) -> u64 {
        node.child(0).map_or(0, |file| file.length())
    }

    fn limits(&self) -> Limits {
        Limits::UNLIMITED
    }

    fn child_access(&self, _role: Role, parents: Access) -> Access {
        parents
    }

    fn access_changed(&self, _change: AccessChange) -> Result<()> {
        Ok(())
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn map(&self, _node: &NodeView, request: &MapRequest<'_>) -> Map {
        Map::Async { length: request.length }
    }

    fn unpin(&self, _loop_index: usize, _pin: Pin) {}

    fn serve<'a>(&'a self, io: &'a NodeIo, request: Request) -> LocalFuture<'a, Result<Outcome>> {
        Box::pin(self.pass(io, request))
    }

    fn reopen<'a>(
        &'a self,
        _io: &'a NodeIo,
        _options: Box<dyn Any>,
    ) -> LocalFuture<'a, Result<Box<dyn PreparedReopen>>> {
        Box::pin(async { Err(Error::new(ErrorKind::NotSupported, "no options")) })
    }

    fn close<'a>(&'a self, _io: &'a NodeIo) -> LocalFuture<'a, Result<()>> {
        Box::pin(async { Ok(()) })
    }
}

/// An open image on storage that can fail.
pub struct Rig {
    layer: Blockplex,
    backend: Backend,
    nodes: [NodeId; 2],
    pub storage: Storage,
}

impl Rig {
    /// Opens the image in `path` for writing; discards take effect. Nothing fails yet.
    pub fn open(path: &Path) -> Rig {
        Rig::try_open(path, Plan::default()).expect("it opens")
    }

    /// The same with a plan from the beginning. When it fails, nothing stays open.
    pub fn try_open(path: &Path, plan: Plan) -> Result<Rig> {
        let layer = Blockplex::new().expect("a layer");
        let file = format!("driver=file,node-name=file,discard=unmap,filename={}", text(path));
        let file = OpenOptions::parse(&file).expect("options");
        let file = block_on(layer.add_node(file)).expect("no loop").expect("the file opens");
        let storage = Storage::default();
        storage.plan(plan);
        let driver = Box::new(Failing(storage.clone()));
        let filter = block_on(add_filter(&layer, file, driver)).expect("no loop").expect("a node");
        // Few slices, and small ones: the cache is full all the time.
        let image = OpenOptions::parse(
            "driver=qcow2,discard=unmap,l2-cache-entry-size=512,l2-cache-size=1K,file=failing",
        );
        let opened = block_on(layer.open("disk", image.expect("options"))).expect("no loop");
        let nodes = [filter, file];
        match opened {
            Ok(backend) => Ok(Rig { layer, backend, nodes, storage }),
            Err(error) => {
                remove(&layer, nodes);
                Err(error)
            }
        }
    }

    /// The disk.
    pub fn disk(&self) -> blockplex::Blocking {
        self.backend.blocking()
    }

    /// Closes all; the result is the image's.
    pub fn close(self) -> Result<()> {
        let closed = block_on(self.backend.close()).expect("no loop");
        remove(&self.layer, self.nodes);
        closed
    }
}

/// Removes the nodes; nothing else is there.
fn remove(layer: &Blockplex, nodes: [NodeId; 2]) {
    for node in nodes {
        let removed = block_on(layer.remove_node(node)).expect("no loop");
        removed.expect("nobody uses it");
    }
    assert_eq!(layer.graph().topology().nodes().count(), 0, "nodes stay behind");
}

async fn add_filter(layer: &Blockplex, file: NodeId, driver: Box<Failing>) -> Result<NodeId> {
    let mut change = layer.graph().begin().await;
    let options = NodeOptions { discard: DiscardMode::Unmap, ..NodeOptions::default() };
    let node = change.add_node(Some("failing"), driver, options, &[(Role::Filtered, file)])?;
    let drained = change.drain().await?;
    change.commit(&drained).await?;
    Ok(node)
}
