//! A driver to look through: it counts calls, stops requests at named points, fails on demand.
//!
//! Without children it is a disk in memory; with one it passes requests on; with a `backing` child
//! beside it reads from the one in whatever role it was given first. It answers in tier 1
//! ([`Probe::quick`]) or in tier 2 (the default), where requests can be stopped.
//!
//! O4. While [`ProbeHandle::forbid`] is in force, a call is an error, which
//!     [`ProbeHandle::violations`] counts.

use blockplex_graph::driver::{
    AccessChange, Driver, LocalFuture, Map, MapRequest, Pin, PreparedReopen, Role,
};
use blockplex_graph::{
    Access, BlockStatus, Error, ErrorKind, Limits, NodeIo, NodeView, Outcome, Request, RequestKind,
    Result,
};
use parking_lot::Mutex;
use std::any::Any;
use std::collections::{BTreeMap, VecDeque};
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Poll, Waker};

// All atomics here are SeqCst: this is a test's bookkeeping.

/// Where a request can be stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Point {
    /// It has reached the driver, and nothing has been done.
    BeforeSubmit,
    /// Its data has been moved, and nobody has been told.
    BeforeCompletion,
}

type AccessRule = Box<dyn Fn(Role, Access) -> Access + Send + Sync>;

/// The driver.
pub struct Probe {
    handle: ProbeHandle,
    quick: bool,
    limits: Limits,
    read_only: bool,
    rule: AccessRule,
}

/// The test's side of a [`Probe`]. Any thread.
#[derive(Clone)]
pub struct ProbeHandle(Arc<Shared>);

struct Shared {
    memory: Mutex<Vec<u8>>,
    stops: Mutex<Stops>,
    calls: Mutex<BTreeMap<KindNumber, usize>>,
    log: Mutex<Vec<Request>>,
    forbidden: AtomicUsize,
    violations: AtomicUsize,
    running: AtomicUsize,
    failures: Mutex<VecDeque<(RequestKind, i32)>>,
    access_changes: Mutex<Vec<AccessChange>>,
    refuse_access: AtomicBool,
    closed: AtomicUsize,
    reopened: AtomicUsize,
    refuse_reopen: AtomicBool,
}

/// The kind's number: kinds have no order of their own.
type KindNumber = u8;

#[derive(Default)]
struct Stops {
    /// Points that are shut, and how many more requests each stops.
    shut: BTreeMap<Point, usize>,
    waiting: BTreeMap<u64, (Point, Waker)>,
    next: u64,
}

impl Probe {
    /// A disk of `size` bytes, all zero (or, with children, a filter: the size is not used then).
    pub fn new(size: usize) -> (Probe, ProbeHandle) {
        let shared = Shared {
            memory: Mutex::new(vec![0; size]),
            stops: Mutex::default(),
            calls: Mutex::default(),
            log: Mutex::default(),
            forbidden: AtomicUsize::new(0),
            violations: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            failures: Mutex::default(),
            access_changes: Mutex::default(),
            refuse_access: AtomicBool::new(false),
            closed: AtomicUsize::new(0),
            reopened: AtomicUsize::new(0),
            refuse_reopen: AtomicBool::new(false),
        };
        let handle = ProbeHandle(Arc::new(shared));
        let rule: AccessRule = Box::new(|role, parents| match role {
            Role::Backing => Access::through_backing(),
            _ => parents,
        });
        let limits = Limits::UNLIMITED;
        let probe = Probe { handle: handle.clone(), quick: false, limits, read_only: false, rule };
        (probe, handle)
    }

    /// Answers in tier 1 what it can; stops have no effect then.
    #[must_use]
    pub fn quick(mut self) -> Probe {
        self.quick = true;
        self
    }

    /// With these limits.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Probe {
        self.limits = limits;
        self
    }

    /// Read-only by nature.
    #[must_use]
    pub fn read_only(mut self) -> Probe {
        self.read_only = true;
        self
    }

    /// With another rule for what its edges need and share.
    #[must_use]
    pub fn rule(mut self, rule: impl Fn(Role, Access) -> Access + Send + Sync + 'static) -> Probe {
        self.rule = Box::new(rule);
        self
    }
}

impl ProbeHandle {
    /// Stops every request from now on at `point`.
    pub fn shut(&self, point: Point) {
        self.shut_for(point, usize::MAX);
    }

    /// Stops the next `count` requests at `point`.
    pub fn shut_for(&self, point: Point, count: usize) {
        self.0.stops.lock().shut.insert(point, count);
    }

    /// Opens `point` and lets those go that wait there.
    pub fn open(&self, point: Point) {
        let mut stops = self.0.stops.lock();
        stops.shut.remove(&point);
        let mut released = Vec::new();
        stops.waiting.retain(|_, (at, waker)| {
            let stays = *at != point;
            if !stays {
                released.push(waker.clone());
            }
            stays
        });
        drop(stops);
        released.iter().for_each(Waker::wake_by_ref);
    }

    /// Lets one stopped request go: the `nth`, counted from the oldest.
    pub fn release(&self, nth: usize) {
        let waker = {
            let mut stops = self.0.stops.lock();
            let key = *stops.waiting.keys().nth(nth).expect("that many requests are stopped");
            stops.waiting.remove(&key).map(|(_, waker)| waker)
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// How many requests are stopped now.
    pub fn stopped(&self) -> usize {
        self.0.stops.lock().waiting.len()
    }

    /// Waits until `count` requests are stopped.
    pub fn wait_stopped(&self, count: usize) {
        crate::patience::until("requests at the probe's point", || self.stopped() >= count);
    }

    /// From now on a call is an error (O4).
    pub fn forbid(&self) {
        assert_eq!(self.running(), 0, "requests run in a drained section");
        self.0.forbidden.fetch_add(1, Ordering::SeqCst);
    }

    /// Ends one [`forbid`](ProbeHandle::forbid).
    pub fn allow(&self) {
        assert_eq!(self.running(), 0, "a request slipped into a drained section");
        self.0.forbidden.fetch_sub(1, Ordering::SeqCst);
    }

    /// How often O4 was broken.
    pub fn violations(&self) -> usize {
        self.0.violations.load(Ordering::SeqCst)
    }

    /// Requests that are inside of the driver (of tier 2).
    pub fn running(&self) -> usize {
        self.0.running.load(Ordering::SeqCst)
    }

    /// The next request of `kind` fails with `errno`.
    pub fn fail_next(&self, kind: RequestKind, errno: i32) {
        self.0.failures.lock().push_back((kind, errno));
    }

    /// How many requests of `kind` have reached it.
    pub fn calls(&self, kind: RequestKind) -> usize {
        self.0.calls.lock().get(&(kind as u8)).copied().unwrap_or(0)
    }

    /// How many requests have reached it.
    pub fn all_calls(&self) -> usize {
        self.0.calls.lock().values().sum()
    }

    /// The requests that have reached it in tier 2, in order (without their memory).
    pub fn log(&self) -> Vec<Request> {
        self.0.log.lock().clone()
    }

    /// What it was told about its parents' permissions.
    pub fn access_changes(&self) -> Vec<AccessChange> {
        self.0.access_changes.lock().clone()
    }

    /// Refuses the next [`AccessChange::Prepare`].
    pub fn refuse_access(&self) {
        self.0.refuse_access.store(true, Ordering::SeqCst);
    }

    /// Refuses the next reopen.
    pub fn refuse_reopen(&self) {
        self.0.refuse_reopen.store(true, Ordering::SeqCst);
    }

    /// How often it was closed.
    pub fn closed(&self) -> usize {
        self.0.closed.load(Ordering::SeqCst)
    }

    /// How many reopens have been committed.
    pub fn reopened(&self) -> usize {
        self.0.reopened.load(Ordering::SeqCst)
    }

    /// Whether the driver has been freed.
    pub fn is_freed(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }

    /// The disk's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        self.0.memory.lock().clone()
    }

    fn enter(&self, kind: RequestKind) {
        if self.0.forbidden.load(Ordering::SeqCst) > 0 {
            self.0.violations.fetch_add(1, Ordering::SeqCst);
        }
        *self.0.calls.lock().entry(kind as u8).or_default() += 1;
    }

    /// Stops here while the point is shut.
    async fn stop_at(&self, point: Point) {
        let mut key = None;
        poll_fn(|cx| {
            let stops = &mut *self.0.stops.lock();
            match key {
                None => match stops.shut.get_mut(&point) {
                    Some(count) if *count > 0 => {
                        *count = count.saturating_sub(usize::from(*count != usize::MAX));
                        stops.next += 1;
                        key = Some(stops.next);
                        stops.waiting.insert(stops.next, (point, cx.waker().clone()));
                        Poll::Pending
                    }
                    _ => Poll::Ready(()),
                },
                Some(key) => match stops.waiting.get_mut(&key) {
                    Some((_, waker)) => {
                        waker.clone_from(cx.waker());
                        Poll::Pending
                    }
                    None => Poll::Ready(()),
                },
            }
        })
        .await;
    }

    fn failure(&self, kind: RequestKind) -> Option<Error> {
        let mut failures = self.0.failures.lock();
        let index = failures.iter().position(|(of, _)| *of == kind)?;
        failures.remove(index).map(|(_, errno)| Error::from_errno(errno))
    }

    /// Serves a request from the disk's own memory.
    fn serve_here(&self, request: &Request) -> Result<Outcome> {
        let mut memory = self.0.memory.lock();
        let (start, length) = (request.offset as usize, request.length as usize);
        match request.kind {
            RequestKind::Read => request.vector.copy_from_slice(0, &memory[start..start + length]),
            RequestKind::Write => {
                request.vector.copy_to_slice(0, &mut memory[start..start + length]);
            }
            RequestKind::WriteZeroes => memory[start..start + length].fill(0),
            RequestKind::Discard | RequestKind::Flush => {}
            RequestKind::BlockStatus => {
                return Ok(Outcome::from(BlockStatus {
                    length: request.length,
                    data: true,
                    allocated: true,
                    ..BlockStatus::default()
                }));
            }
            RequestKind::Truncate => memory.resize(start, 0),
        }
        Ok(Outcome::Done)
    }
}

/// Passes a request on to the first child.
async fn pass_on(io: &NodeIo, request: Request) -> Result<Outcome> {
    let child = io.child(0)?;
    let Request { kind, flags, offset, length, vector } = request;
    match kind {
        RequestKind::Read => child.read(offset, vector).await?,
        RequestKind::Write => child.write(offset, vector, flags).await?,
        RequestKind::WriteZeroes => child.write_zeroes(offset, length, flags).await?,
        RequestKind::Discard => child.discard(offset, length).await?,
        RequestKind::Flush => child.flush().await?,
        RequestKind::Truncate => child.truncate(offset).await?,
        RequestKind::BlockStatus => {
            return child.block_status(offset, length).await.map(Outcome::from);
        }
    }
    Ok(Outcome::Done)
}

/// Counts a request as running.
struct Running<'a>(&'a AtomicUsize);

impl<'a> Running<'a> {
    fn new(count: &'a AtomicUsize) -> Running<'a> {
        count.fetch_add(1, Ordering::SeqCst);
        Running(count)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

struct Prepared(ProbeHandle);

impl PreparedReopen for Prepared {
    fn commit(self: Box<Self>) {
        self.0.0.reopened.fetch_add(1, Ordering::SeqCst);
    }
}

impl Driver for Probe {
    fn driver_name(&self) -> &'static str {
        "probe"
    }

    fn length(&self, node: &NodeView) -> u64 {
        match node.child(0) {
            Some(child) => child.length(),
            None => self.handle.0.memory.lock().len() as u64,
        }
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn child_access(&self, role: Role, parents: Access) -> Access {
        (self.rule)(role, parents)
    }

    fn access_changed(&self, change: AccessChange) -> Result<()> {
        let shared = &self.handle.0;
        if matches!(change, AccessChange::Prepare(_))
            && shared.refuse_access.swap(false, Ordering::SeqCst)
        {
            return Err(Error::new(ErrorKind::Locked, "the probe refuses the permissions"));
        }
        shared.access_changes.lock().push(change);
        Ok(())
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn map(&self, node: &NodeView, request: &MapRequest<'_>) -> Map {
        let MapRequest { kind, offset, length, .. } = *request;
        if !self.quick {
            return Map::Async { length };
        }
        self.handle.enter(kind);
        if let Some(error) = self.handle.failure(kind) {
            return Map::Fail(error);
        }
        if !node.edges().is_empty() {
            return Map::Child { edge: 0, offset, length, pin: None };
        }
        let vector = match kind {
            RequestKind::Read | RequestKind::Write => {
                request.vector.slice(request.position, length as usize)
            }
            _ => request.vector.clone(),
        };
        match kind {
            RequestKind::BlockStatus | RequestKind::Truncate => Map::Async { length },
            _ => {
                let whole = Request { kind, flags: request.flags, offset, length, vector };
                match self.handle.serve_here(&whole) {
                    Ok(_) => Map::Done { length },
                    Err(error) => Map::Fail(error),
                }
            }
        }
    }

    fn unpin(&self, _loop_index: usize, _pin: Pin) {}

    fn serve<'a>(&'a self, io: &'a NodeIo, request: Request) -> LocalFuture<'a, Result<Outcome>> {
        Box::pin(async move {
            let handle = &self.handle;
            let _running = Running::new(&handle.0.running);
            handle.enter(request.kind);
            let vector = blockplex_io::buffer::IoVector::empty();
            handle.0.log.lock().push(Request { vector, ..request });
            handle.stop_at(Point::BeforeSubmit).await;
            let kind = request.kind;
            let result = match handle.failure(kind) {
                Some(error) => Err(error),
                None if io.node().edges().is_empty() => handle.serve_here(&request),
                None => pass_on(io, request).await,
            };
            handle.stop_at(Point::BeforeCompletion).await;
            result
        })
    }

    fn reopen<'a>(
        &'a self,
        _io: &'a NodeIo,
        _options: Box<dyn Any>,
    ) -> LocalFuture<'a, Result<Box<dyn PreparedReopen>>> {
        Box::pin(async move {
            if self.handle.0.refuse_reopen.swap(false, Ordering::SeqCst) {
                return Err(Error::new(
                    ErrorKind::InvalidArgument,
                    "the probe refuses the options",
                ));
            }
            Ok(Box::new(Prepared(self.handle.clone())) as Box<dyn PreparedReopen>)
        })
    }

    fn close<'a>(&'a self, _io: &'a NodeIo) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            self.handle.0.closed.fetch_add(1, Ordering::SeqCst);
            Ok(())
        })
    }
}
