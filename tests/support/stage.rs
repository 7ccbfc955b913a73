//! A graph with loops to do I/O on, a control thread, and origins whose hooks are counted.

use crate::patience;
use blockplex_drain::DrainHooks;
use blockplex_graph::driver::{Driver, Role};
use blockplex_graph::{
    Access, BlockGraph, Completion, Drained, Error, NodeId, NodeOptions, Origin, Permissions,
    Queue, Request, Result, Scope, Transaction,
};
use blockplex_io::event_loop::{IoThread, JoinHandle, Local, LoopConfig};
use parking_lot::Mutex;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts what an origin is told. Clones share the counts.
#[derive(Clone, Default)]
pub struct Hooks(Arc<HookCounts>);

type Call = Box<dyn FnMut() + Send>;

#[derive(Default)]
struct HookCounts {
    begun: AtomicUsize,
    ended: AtomicUsize,
    on_begin: Mutex<Option<Call>>,
    on_end: Mutex<Option<Call>>,
}

impl Hooks {
    /// How often it was told to rest.
    pub fn begun(&self) -> usize {
        self.0.begun.load(Ordering::SeqCst)
    }

    /// How often it was told to go on.
    pub fn ended(&self) -> usize {
        self.0.ended.load(Ordering::SeqCst)
    }

    /// Whether it is told to rest now.
    pub fn rests(&self) -> bool {
        self.begun() > self.ended()
    }

    /// Counts from 0 again: building a graph rests its origins too, newborn ones included.
    pub fn reset(&self) {
        assert!(!self.rests(), "a section lasts");
        self.0.begun.store(0, Ordering::SeqCst);
        self.0.ended.store(0, Ordering::SeqCst);
    }

    /// Calls `call` when told to rest, from now on.
    pub fn on_begin(&self, call: impl FnMut() + Send + 'static) {
        *self.0.on_begin.lock() = Some(Box::new(call));
    }

    /// Calls `call` when told to go on, from now on.
    pub fn on_end(&self, call: impl FnMut() + Send + 'static) {
        *self.0.on_end.lock() = Some(Box::new(call));
    }
}

impl std::fmt::Debug for Hooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hooks({} begun, {} ended)", self.begun(), self.ended())
    }
}

impl DrainHooks for Hooks {
    fn drain_begin(&self) {
        assert_eq!(self.begun(), self.ended(), "hooks strictly alternate");
        self.0.begun.fetch_add(1, Ordering::SeqCst);
        if let Some(call) = &mut *self.0.on_begin.lock() {
            call();
        }
    }

    fn drain_end(&self) {
        assert_eq!(self.begun(), self.ended() + 1, "hooks strictly alternate");
        self.0.ended.fetch_add(1, Ordering::SeqCst);
        if let Some(call) = &mut *self.0.on_end.lock() {
            call();
        }
    }
}

/// The graph, its loops and its control thread.
pub struct Stage {
    /// The graph.
    pub graph: BlockGraph,
    /// The loops that do I/O.
    pub loops: Vec<IoThread>,
    control: IoThread,
}

impl Stage {
    /// An empty graph and `loops` loops.
    pub fn new(loops: usize) -> Stage {
        let spawn = |name: String| {
            IoThread::spawn(LoopConfig { name, ..LoopConfig::default() }).expect("a loop starts")
        };
        Stage {
            graph: BlockGraph::new(),
            loops: (0..loops).map(|index| spawn(format!("loop {index}"))).collect(),
            control: spawn("control".to_owned()),
        }
    }

    /// Starts work on a loop.
    pub fn spawn<T, F>(
        &self,
        index: usize,
        make: impl FnOnce(Local) -> F + Send + 'static,
    ) -> JoinHandle<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        self.loops[index].handle().spawn_with(make).expect("the loop runs")
    }

    /// Runs work on a loop and waits for it.
    pub fn on<T, F>(&self, index: usize, make: impl FnOnce(Local) -> F + Send + 'static) -> T
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        self.wait("work on a loop", self.spawn(index, make)).expect("it was not cancelled")
    }

    /// Starts a change of the graph on the control thread: plan, drain, commit.
    pub fn start_change<T: Send + 'static>(
        &self,
        plan: impl FnOnce(&mut Transaction<'_>) -> Result<T> + Send + 'static,
    ) -> JoinHandle<Result<T>> {
        let graph = self.graph.clone();
        let work = self.control.handle().spawn_with(move |_| async move {
            let mut change = graph.begin().await;
            let planned = plan(&mut change)?;
            let drained = change.drain().await?;
            change.commit(&drained).await?;
            Ok(planned)
        });
        work.expect("the control loop runs")
    }

    /// Changes the graph: plan, drain, commit.
    pub fn change<T: Send + 'static>(
        &self,
        plan: impl FnOnce(&mut Transaction<'_>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.wait("a change of the graph", self.start_change(plan)).expect("it was not cancelled")
    }

    /// Adds a node.
    pub fn add(
        &self,
        name: &'static str,
        driver: impl Driver,
        children: &[(Role, NodeId)],
    ) -> NodeId {
        self.add_with(name, driver, NodeOptions::default(), children)
    }

    /// Adds a node with options.
    pub fn add_with(
        &self,
        name: &'static str,
        driver: impl Driver,
        options: NodeOptions,
        children: &[(Role, NodeId)],
    ) -> NodeId {
        let children = children.to_vec();
        self.change(move |change| change.add_node(Some(name), Box::new(driver), options, &children))
            .expect("the node is added")
    }

    /// Adds an origin on a node, with hooks that count.
    pub fn origin(&self, name: &'static str, root: NodeId, access: Access) -> (Arc<Origin>, Hooks) {
        self.try_origin(name, root, access).expect("the origin is added")
    }

    /// As [`origin`](Stage::origin), when it may be refused.
    pub fn try_origin(
        &self,
        name: &'static str,
        root: NodeId,
        access: Access,
    ) -> Result<(Arc<Origin>, Hooks)> {
        let hooks = Hooks::default();
        let told = hooks.clone();
        let origin = self.change(move |change| {
            let origin = change.add_origin(name, access, Some(Box::new(told)));
            change.set_root(origin.id(), Some(root))?;
            Ok(origin)
        })?;
        Ok((origin, hooks))
    }

    /// Drains.
    pub fn drain(&self, scope: Scope) -> Drained {
        self.wait("a drained section", self.graph.drain(scope)).expect("the scope exists")
    }

    /// Waits for a future; after 30 s the panic names the requests that run.
    pub fn wait<F: Future>(&self, what: &str, future: F) -> F::Output {
        patience::wait_or(what, future, || {
            let section = self.graph.begin_drain(Scope::Everything).expect("everything exists");
            let holders = section.holders();
            holders.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
        })
    }

    /// Starts one request of `origin` on a loop, on a queue of its own.
    pub fn start(
        &self,
        index: usize,
        origin: &Arc<Origin>,
        request: Request,
    ) -> JoinHandle<Completion> {
        let (graph, origin) = (self.graph.clone(), origin.clone());
        self.spawn(index, move |local| async move {
            let queue = Queue::open(&graph, &origin, &local, "queue 'test'");
            queue.request(request).await
        })
    }

    /// Runs one request to its end.
    pub fn run(
        &self,
        index: usize,
        origin: &Arc<Origin>,
        request: Request,
    ) -> Result<Completion, Error> {
        let completion = self.finish(self.start(index, origin, request));
        match completion.result {
            Err(error) => Err(error),
            Ok(outcome) => Ok(Completion { result: Ok(outcome), ..completion }),
        }
    }

    /// Waits for what [`start`](Stage::start) gave.
    pub fn finish(&self, started: JoinHandle<Completion>) -> Completion {
        self.wait("a request", started).expect("it was not cancelled")
    }

    /// The name of what an origin's root is now.
    pub fn root_name(&self, origin: &Arc<Origin>) -> Option<String> {
        self.graph.topology().root(origin.id()).map(|view| view.name().to_owned())
    }
}

/// A backend that writes and resizes and lets nobody else.
pub fn writer() -> Access {
    Access { needed: Access::WRITER.needed | Permissions::RESIZE, shared: Access::WRITER.shared }
}

/// A backend that reads and lets everyone do everything.
pub fn reader() -> Access {
    Access::READER
}

/// A backend that writes and lets everyone do everything.
pub fn sharing_writer() -> Access {
    Access { needed: writer().needed, shared: Permissions::ALL }
}

/// `length` bytes that depend on `seed` and on their position.
pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.push((state >> 32) as u8 | 1); // never zero: zeros mean something else
    }
    bytes
}
