//! Queues: where requests enter the graph, one per user and loop.
//!
//! | state of an entry | what holds | who moves it on |
//! |---|---|---|
//! | free | nothing; its index is in `free` | [`QueueCore::allocate`] |
//! | parked | its request waits at the gate, not admitted | the resume task, in order |
//! | running | admitted; `left` pieces have not ended | completions and serve tasks |
//! | ended | a future has not yet taken the result | [`IoFuture`] |
//!
//! A request that tier 1 serves on the spot never has an entry.
#![expect(unsafe_code, reason = "submits operations on memory that its entries own")]

use super::hold::Holds;
use super::leaf::{Next, Transfer};
use super::serve::{self, Context as ServeContext};
use super::view::{NodeIndex, QueueView, ROOT};
use super::walk::{Reason, Step, walk};
use crate::block_graph::BlockGraph;
use crate::driver::MapRequest;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;
use crate::node::NodeView;
use crate::origin::Origin;
use crate::permission::Permissions;
use crate::request::{Completion, Outcome, Request, RequestKind};
use blockplex_drain::{RequestRecord, Slot};
use blockplex_io::buffer::IoVector;
use blockplex_io::engine::Sink;
use blockplex_io::event_loop::{JoinHandle, Local};
use smallvec::SmallVec;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

/// A queue of one origin on one loop. It stays on that loop's thread; its completions are reaped
/// there and nowhere else.
///
/// Requests are submitted through one of two doors: [`submit`](Queue::submit) and
/// [`reap`](Queue::reap), or [`request`](Queue::request) and its future. A submitted request
/// counts as in flight until it is reaped, so a drained section waits for that; a future's
/// request, until its I/O has ended. Dropping the queue lets requests in flight run to their end;
/// those that wait for a drained section are cancelled.
pub struct Queue {
    core: Rc<QueueCore>,
}

pub(crate) struct QueueCore {
    graph: BlockGraph,
    origin: Arc<Origin>,
    pub(crate) local: Local,
    pub(crate) loop_index: usize,
    slot: Slot,
    view: RefCell<Rc<QueueView>>,
    table: RefCell<Table>,
    done: RefCell<VecDeque<Reaped>>,
    parked: RefCell<VecDeque<u32>>,
    resume: RefCell<Option<JoinHandle<()>>>,
    reaper: RefCell<Option<Waker>>,
    closed: Cell<bool>,
    this: Weak<QueueCore>,
}

/// A completion that waits to be reaped; its admission ends then.
struct Reaped {
    completion: Completion,
    ticket: Option<Rc<Ticket>>,
}

/// The admission of a request that has left tier 1: shared by everything that runs for it.
pub(crate) struct Ticket(Rc<QueueCore>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.slot.exit();
    }
}

/// Who gets the result.
#[derive(Clone, Copy, PartialEq)]
enum Door {
    Cookie(u64),
    Future,
    Nobody,
}

#[derive(Default)]
struct Table {
    /// Boxed: operations in the kernel refer to an entry's vector, so entries do not move.
    entries: Vec<Box<Entry>>,
    free: Vec<u32>,
}

struct Entry {
    request: Request,
    door: Door,
    view: Option<Rc<QueueView>>,
    ticket: Option<Rc<Ticket>>,
    holds: Holds,
    ops: SmallVec<[Op; 1]>,
    left: u32,
    result: Result<Outcome>,
    ended: Option<Completion>,
    waker: Option<Waker>,
}

struct Op {
    transfer: Transfer,
    /// The part of the request's vector that it is about, when that cannot be told from the whole.
    part: Option<IoVector>,
}

impl Queue {
    /// Opens a queue of `origin` on the current loop. `label` names it in reports.
    pub fn open(graph: &BlockGraph, origin: &Arc<Origin>, local: &Local, label: &str) -> Queue {
        let core = Rc::new_cyclic(|this| QueueCore {
            graph: graph.clone(),
            slot: origin.gate().open_slot(label),
            origin: origin.clone(),
            loop_index: local.index(),
            local: local.clone(),
            view: RefCell::new(QueueView::new(None, Permissions::NONE, u64::MAX)),
            table: RefCell::default(),
            done: RefCell::default(),
            parked: RefCell::default(),
            resume: RefCell::default(),
            reaper: RefCell::default(),
            closed: Cell::new(false),
            this: this.clone(),
        });
        Queue { core }
    }

    /// Submits a request; its completion, whatever it is, carries `cookie`. Never waits.
    pub fn submit(&self, request: Request, cookie: u64) {
        self.core.start(request, Door::Cookie(cookie));
    }

    /// Takes up to `max` completions, appending them to `into`; gives their number. Never waits.
    pub fn reap(&self, into: &mut Vec<Completion>, max: usize) -> usize {
        let mut count = 0;
        while count < max {
            let Some(reaped) = self.core.done.borrow_mut().pop_front() else { break };
            into.push(reaped.completion);
            match reaped.ticket {
                Some(ticket) => drop(ticket),
                None => self.core.slot.exit(),
            }
            count += 1;
        }
        count
    }

    /// Waits until there is something to [`reap`](Queue::reap). One task at a time.
    pub fn ready(&self) -> impl Future<Output = ()> + '_ {
        poll_fn(|cx| {
            if !self.core.done.borrow().is_empty() {
                return Poll::Ready(());
            }
            *self.core.reaper.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
    }

    /// Submits a request and gives its completion as a future. Dropping the future lets the
    /// request run to its end unobserved.
    pub fn request(&self, request: Request) -> IoFuture {
        match self.core.start(request, Door::Future) {
            Started::Ended(completion) => {
                IoFuture { core: self.core.clone(), state: IoState::Ended(Some(completion)) }
            }
            Started::Running(index) => {
                IoFuture { core: self.core.clone(), state: IoState::Running(index) }
            }
        }
    }

    /// Requests that have been admitted and have not ended (or, submitted ones, not been reaped).
    pub fn in_flight(&self) -> u64 {
        self.core.slot.in_flight()
    }

    /// Requests that wait for a drained section to end.
    pub fn parked(&self) -> usize {
        self.core.parked.borrow().len()
    }

    /// The root node as the queue sees it now.
    pub fn root(&self) -> Option<Arc<NodeView>> {
        let view = self.core.current_view();
        (!view.is_empty()).then(|| view.node(ROOT).view.clone())
    }

    /// The origin that it belongs to.
    pub fn origin(&self) -> &Arc<Origin> {
        &self.core.origin
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.core.closed.set(true);
        if let Some(resume) = self.core.resume.borrow_mut().take() {
            resume.cancel();
        }
        let parked = std::mem::take(&mut *self.core.parked.borrow_mut());
        for index in parked {
            let text = "the queue was dropped while the request waited for a drained section";
            self.core.end_parked(index, Error::new(ErrorKind::Cancelled, text));
        }
        self.core.discard_completions();
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue")
            .field("origin", &self.core.origin.name())
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

/// The result of a start.
enum Started {
    Ended(Completion),
    Running(u32),
}

impl QueueCore {
    /// Starts a request. For the cookie door, an immediate end is queued for reaping, and the
    /// result is of no use.
    fn start(&self, request: Request, door: Door) -> Started {
        if !self.parked.borrow().is_empty() || !self.slot.try_enter() {
            return Started::Running(self.park(request, door));
        }
        self.run(request, door)
    }

    /// Runs an admitted request.
    fn run(&self, request: Request, door: Door) -> Started {
        let view = self.current_view();
        if let Err(error) = check(&view, &request) {
            return self.end_now(door, Err(blame(error, &request)), request.vector);
        }
        if request.length == 0 && matches!(request.kind, RequestKind::Read | RequestKind::Write) {
            return self.end_now(door, Ok(Outcome::Done), request.vector);
        }
        let mut holds = Holds::default();
        let step = walk(&view, ROOT, false, &mut self.map_request(&request, 0), &mut holds);
        let whole = request.length;
        match step {
            Step::Done { length } if length == whole && holds.is_empty() => {
                self.end_now(door, Ok(Outcome::Done), request.vector)
            }
            Step::Zero { length } if length == whole && holds.is_empty() => {
                if request.kind == RequestKind::Read {
                    request.vector.fill(0, request.vector.len(), 0);
                }
                self.end_now(door, Ok(Outcome::Done), request.vector)
            }
            step => {
                let index = self.allocate(request, door);
                self.launch(index, view, step, holds)
            }
        }
    }

    fn map_request<'a>(&self, request: &'a Request, position: usize) -> MapRequest<'a> {
        MapRequest {
            kind: request.kind,
            flags: request.flags,
            offset: request.offset + position as u64,
            length: request.length - position as u64,
            vector: &request.vector,
            position,
            loop_index: self.loop_index,
        }
    }

    /// Starts the pieces of a request, the first of which is `step`.
    fn launch(&self, index: u32, view: Rc<QueueView>, step: Step, holds: Holds) -> Started {
        let length = {
            let mut table = self.table.borrow_mut();
            let entry = table.entry(index);
            entry.view = Some(view.clone());
            entry.holds = holds;
            // One for this function, so that no piece ends the request before all have started.
            entry.left = 1;
            entry.result = Ok(Outcome::Done);
            self.slot.record(index, record_of(&entry.request, &self.local, &view));
            entry.request.length
        };
        let mut position = 0;
        let mut step = Some(step);
        loop {
            let next = step.take().unwrap_or_else(|| self.walk_on(index, &view, position));
            position = position.saturating_add(self.start_piece(index, &view, next, position));
            if position >= length {
                break;
            }
        }
        self.end_piece(index, Ok(Outcome::Done));
        Started::Running(index)
    }

    fn walk_on(&self, index: u32, view: &QueueView, position: u64) -> Step {
        let mut table = self.table.borrow_mut();
        let Entry { request, holds, .. } = table.entry(index);
        walk(view, ROOT, false, &mut self.map_request(request, position as usize), holds)
    }

    /// Starts one piece of a request at `position`; gives its length.
    fn start_piece(&self, index: u32, view: &Rc<QueueView>, step: Step, position: u64) -> u64 {
        match step {
            Step::File { node, fd, offset, length } => {
                self.slot.set_node(index, view.node(node).view.id().number());
                self.start_transfer(index, fd, offset, position as usize, length as usize);
                length
            }
            Step::Zero { length } => {
                let mut table = self.table.borrow_mut();
                let request = &table.entry(index).request;
                if request.kind == RequestKind::Read {
                    request.vector.fill(position as usize, length as usize, 0);
                }
                length
            }
            Step::Done { length } => length,
            Step::Serve { node, reason, offset, length } => {
                self.slot.set_node(index, view.node(node).view.id().number());
                let context = ServeContext {
                    view: view.clone(),
                    local: self.local.clone(),
                    ticket: self.ticket(index),
                };
                let part = self.part(index, offset, position, length);
                self.start_serving(index, context, node, reason, part);
                length
            }
            Step::Fail { node, error } => {
                let mut table = self.table.borrow_mut();
                let entry = table.entry(index);
                if entry.result.is_ok() {
                    entry.result = Err(error.at_node(view.node(node).view.name()));
                }
                u64::MAX // the rest is not tried
            }
        }
    }

    fn start_transfer(&self, index: u32, fd: i32, offset: u64, position: usize, length: usize) {
        let mut table = self.table.borrow_mut();
        let entry = table.entry(index);
        let writes = entry.request.kind == RequestKind::Write;
        let durable = writes && entry.request.flags.fua;
        let mut transfer = Transfer::new(writes, durable, fd, offset, position, length);
        let mut part = None;
        if !transfer.fits(&entry.request.vector) {
            let (rest, vector) = transfer.rest(&entry.request.vector);
            transfer = rest;
            part = Some(vector);
        }
        entry.left += 1;
        entry.ops.push(Op { transfer, part });
        let token = token_of(index, entry.ops.len() - 1);
        self.submit_op(entry, token);
    }

    /// (Re)submits the operation of `token`.
    fn submit_op(&self, entry: &Entry, token: u64) {
        let Some(core) = self.this.upgrade() else { return };
        let op = &entry.ops[op_of(token)];
        let vector = op.part.as_ref().unwrap_or(&entry.request.vector);
        // SAFETY: the vector belongs to the entry (boxed) or to the operation; both stay as they
        // are until the request's last piece has ended, which takes this operation's completion.
        // The engine keeps us (the sink) until then.
        unsafe { op.transfer.submit(&self.local, vector, core, token) };
    }

    /// A part of a request that a task serves; it counts as a piece from now on.
    fn part(&self, index: u32, offset: u64, position: u64, length: u64) -> Request {
        let mut table = self.table.borrow_mut();
        let entry = table.entry(index);
        entry.left += 1;
        serve::part_of(&entry.request, offset, position, length)
    }

    /// The admission of a request, from now on shared.
    fn ticket(&self, index: u32) -> Option<Rc<Ticket>> {
        let core = self.this.upgrade()?;
        let mut table = self.table.borrow_mut();
        Some(table.entry(index).ticket.get_or_insert_with(|| Rc::new(Ticket(core))).clone())
    }

    fn start_serving(
        &self,
        index: u32,
        context: ServeContext,
        node: NodeIndex,
        reason: Reason,
        part: Request,
    ) {
        let Some(core) = self.this.upgrade() else { return };
        let piece = Piece { core, index, ended: false };
        // The task is detached: the request runs to its end whoever waits for it (R3).
        drop(self.local.spawn(async move {
            let result = serve::at_node(&context, node, reason, part).await;
            drop(context);
            piece.end(result);
        }));
    }

    /// One piece has ended; the last one ends the request.
    fn end_piece(&self, index: u32, result: Result<Outcome>) {
        let mut table = self.table.borrow_mut();
        let entry = table.entry(index);
        match result {
            Err(error) if entry.result.is_ok() => entry.result = Err(error),
            Ok(Outcome::Status(status)) if entry.result.is_ok() => {
                entry.result = Ok(Outcome::Status(status));
            }
            _ => {}
        }
        entry.left -= 1;
        if entry.left > 0 {
            return;
        }
        self.slot.clear_record(index);
        if let Some(view) = entry.view.take() {
            entry.holds.release(&view, self.loop_index);
        }
        entry.ops.clear();
        let result = std::mem::replace(&mut entry.result, Ok(Outcome::Done));
        let result = result.map_err(|error| blame(error, &entry.request));
        let vector = std::mem::take(&mut entry.request.vector);
        let ticket = entry.ticket.take();
        let door = entry.door;
        let waker = match door {
            Door::Cookie(cookie) => {
                table.free.push(index);
                drop(table);
                self.queue_completion(Completion { cookie, result, vector }, ticket);
                return;
            }
            Door::Future => {
                entry.ended = Some(Completion { cookie: 0, result, vector });
                entry.waker.take()
            }
            Door::Nobody => {
                table.free.push(index);
                None
            }
        };
        drop(table);
        self.leave(ticket);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Ends an admission.
    fn leave(&self, ticket: Option<Rc<Ticket>>) {
        match ticket {
            Some(ticket) => drop(ticket),
            None => self.slot.exit(),
        }
    }

    /// Ends an admitted request that never had an entry.
    fn end_now(&self, door: Door, result: Result<Outcome>, vector: IoVector) -> Started {
        match door {
            Door::Cookie(cookie) => {
                self.queue_completion(Completion { cookie, result, vector }, None);
                Started::Running(u32::MAX)
            }
            Door::Future | Door::Nobody => {
                self.slot.exit();
                Started::Ended(Completion { cookie: 0, result, vector })
            }
        }
    }

    fn queue_completion(&self, completion: Completion, ticket: Option<Rc<Ticket>>) {
        if self.closed.get() {
            return self.leave(ticket);
        }
        self.done.borrow_mut().push_back(Reaped { completion, ticket });
        let waker = self.reaper.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn discard_completions(&self) {
        loop {
            let Some(reaped) = self.done.borrow_mut().pop_front() else { break };
            self.leave(reaped.ticket);
        }
    }

    fn current_view(&self) -> Rc<QueueView> {
        let view = self.view.borrow();
        if view.generation == self.origin.gate().generation() {
            return view.clone();
        }
        drop(view);
        self.refresh_view()
    }

    #[cold]
    fn refresh_view(&self) -> Rc<QueueView> {
        // The generation first: a version published in between is found by the next check.
        let generation = self.origin.gate().generation();
        let topology = self.graph.topology();
        let granted = self.origin.access().needed;
        let view = QueueView::new(topology.root(self.origin.id()), granted, generation);
        *self.view.borrow_mut() = view.clone();
        view
    }

    fn allocate(&self, request: Request, door: Door) -> u32 {
        let mut table = self.table.borrow_mut();
        if let Some(index) = table.free.pop() {
            let entry = table.entry(index);
            entry.request = request;
            entry.door = door;
            return index;
        }
        let index = table.entries.len() as u32;
        table.entries.push(Box::new(Entry {
            request,
            door,
            view: None,
            ticket: None,
            holds: Holds::default(),
            ops: SmallVec::new(),
            left: 0,
            result: Ok(Outcome::Done),
            ended: None,
            waker: None,
        }));
        index
    }
}

/// Waiting at the gate.
impl QueueCore {
    fn park(&self, request: Request, door: Door) -> u32 {
        let index = self.allocate(request, door);
        self.parked.borrow_mut().push_back(index);
        let mut resume = self.resume.borrow_mut();
        if resume.is_none()
            && let Some(core) = self.this.upgrade()
        {
            *resume = Some(self.local.spawn(core.resume_parked()));
        }
        index
    }

    /// Admits what waits, in order, whenever the gate opens.
    async fn resume_parked(self: Rc<Self>) {
        loop {
            poll_fn(|cx| self.slot.poll_thawed(cx)).await;
            loop {
                if self.parked.borrow().is_empty() {
                    self.resume.borrow_mut().take();
                    return;
                }
                // Admission runs anew from the top: another section may have begun (D02).
                if !self.slot.try_enter() {
                    break;
                }
                let Some(index) = self.parked.borrow_mut().pop_front() else { break };
                self.run_parked(index);
            }
        }
    }

    fn run_parked(&self, index: u32) {
        let view = self.current_view();
        let first = {
            let mut table = self.table.borrow_mut();
            let entry = table.entry(index);
            match check(&view, &entry.request) {
                Ok(()) if entry.request.vector.is_empty() && is_transfer(&entry.request) => {
                    (Step::Done { length: 0 }, Holds::default())
                }
                Ok(()) => {
                    let mut holds = Holds::default();
                    let mut request = self.map_request(&entry.request, 0);
                    let step = walk(&view, ROOT, false, &mut request, &mut holds);
                    (step, holds)
                }
                Err(error) => {
                    entry.result = Err(error);
                    entry.left = 1;
                    drop(table);
                    return self.end_piece(index, Ok(Outcome::Done));
                }
            }
        };
        self.launch(index, view, first.0, first.1);
    }

    /// Ends a request that was never admitted.
    fn end_parked(&self, index: u32, error: Error) {
        let mut table = self.table.borrow_mut();
        let entry = table.entry(index);
        let error = blame(error, &entry.request);
        let vector = std::mem::take(&mut entry.request.vector);
        match entry.door {
            Door::Future => {
                entry.ended = Some(Completion { cookie: 0, result: Err(error), vector });
                let waker = entry.waker.take();
                drop(table);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            Door::Cookie(_) | Door::Nobody => table.free.push(index),
        }
    }
}

impl Sink for QueueCore {
    fn complete(&self, token: u64, result: i32) {
        let index = token as u32;
        let ended = {
            let mut table = self.table.borrow_mut();
            let entry = table.entry(index);
            let op = &mut entry.ops[op_of(token)];
            let vector = op.part.as_ref().unwrap_or(&entry.request.vector);
            match op.transfer.advance(vector, result) {
                Next::Finished => Ok(Outcome::Done),
                Next::Failed(error) => Err(error),
                Next::Again => {
                    if !op.transfer.fits(vector) {
                        let (rest, part) = op.transfer.rest(vector);
                        op.transfer = rest;
                        op.part = Some(part);
                    }
                    return self.submit_op(entry, token);
                }
            }
        };
        self.end_piece(index, ended);
    }
}

impl Table {
    fn entry(&mut self, index: u32) -> &mut Entry {
        &mut self.entries[index as usize]
    }
}

/// A piece that a task serves; ends the piece even if the task is dropped (R3).
struct Piece {
    core: Rc<QueueCore>,
    index: u32,
    ended: bool,
}

impl Piece {
    fn end(mut self, result: Result<Outcome>) {
        self.ended = true;
        self.core.end_piece(self.index, result);
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        if !self.ended {
            let text = "the task that served the request ended before it";
            self.core.end_piece(self.index, Err(Error::new(ErrorKind::Cancelled, text)));
        }
    }
}

/// The future of a request. Its output carries the result and the memory.
#[must_use = "futures do nothing unless polled; the request runs in any case"]
pub struct IoFuture {
    core: Rc<QueueCore>,
    state: IoState,
}

enum IoState {
    Ended(Option<Completion>),
    Running(u32),
}

impl Future for IoFuture {
    type Output = Completion;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Completion> {
        let index = match &mut self.state {
            IoState::Ended(completion) => {
                return match completion.take() {
                    Some(completion) => Poll::Ready(completion),
                    None => panic!("an IoFuture was polled after it had ended"),
                };
            }
            IoState::Running(index) => *index,
        };
        let completion = {
            let mut table = self.core.table.borrow_mut();
            let entry = table.entry(index);
            match entry.ended.take() {
                Some(completion) => {
                    table.free.push(index);
                    completion
                }
                None => {
                    entry.waker = Some(cx.waker().clone());
                    return Poll::Pending;
                }
            }
        };
        self.state = IoState::Ended(None);
        Poll::Ready(completion)
    }
}

impl Drop for IoFuture {
    fn drop(&mut self) {
        if let IoState::Running(index) = self.state {
            let mut table = self.core.table.borrow_mut();
            let entry = table.entry(index);
            if entry.ended.take().is_some() {
                table.free.push(index);
            } else {
                entry.door = Door::Nobody;
                entry.waker = None;
            }
        }
    }
}

/// Whether the request may run at all.
fn check(view: &QueueView, request: &Request) -> Result<()> {
    if view.is_empty() {
        return Err(Error::new(ErrorKind::NoMedium, "the backend has no root node"));
    }
    let root = &view.node(ROOT).view;
    if request.kind.writes() && !view.granted.contains(Permissions::WRITE) {
        return Err(Error::new(ErrorKind::ReadOnly, "the backend is read-only"));
    }
    match request.kind {
        RequestKind::Flush => return Ok(()),
        RequestKind::Truncate => {
            if !view.granted.contains(Permissions::RESIZE) {
                let text = "the backend has no permission to resize";
                return Err(Error::new(ErrorKind::ReadOnly, text));
            }
            if request.offset > Limits::MAX_LENGTH {
                let text = format!("a length of {} bytes is too large", request.offset);
                return Err(Error::new(ErrorKind::InvalidArgument, text));
            }
            return Ok(());
        }
        RequestKind::Read | RequestKind::Write => {
            if request.vector.len() as u64 != request.length || request.length > Limits::MAX_REQUEST
            {
                return Err(Error::new(
                    ErrorKind::InvalidArgument,
                    format!(
                        "{} bytes of memory for a transfer of {} (at most {})",
                        request.vector.len(),
                        request.length,
                        Limits::MAX_REQUEST
                    ),
                ));
            }
        }
        _ => {}
    }
    let length = root.length();
    match request.offset.checked_add(request.length) {
        Some(end) if end <= length => Ok(()),
        _ => {
            let text = format!("the range ends beyond the node's {length} bytes");
            Err(Error::new(ErrorKind::OutOfRange, text).at_node(root.name()))
        }
    }
}

fn is_transfer(request: &Request) -> bool {
    matches!(request.kind, RequestKind::Read | RequestKind::Write)
}

/// Says what was being done.
fn blame(error: Error, request: &Request) -> Error {
    error.during(request.kind.name()).at_range(request.offset, request.length)
}

fn record_of(request: &Request, local: &Local, view: &QueueView) -> RequestRecord {
    RequestRecord {
        kind: record_kind(request.kind),
        offset: request.offset,
        length: request.length,
        started_ns: local.now_ns(),
        node: view.node(ROOT).view.id().number(),
    }
}

fn record_kind(kind: RequestKind) -> u8 {
    use blockplex_drain::kind;
    match kind {
        RequestKind::Read => kind::READ,
        RequestKind::Write => kind::WRITE,
        RequestKind::Flush => kind::FLUSH,
        RequestKind::Discard => kind::DISCARD,
        RequestKind::WriteZeroes => kind::WRITE_ZEROES,
        RequestKind::BlockStatus => kind::BLOCK_STATUS,
        RequestKind::Truncate => kind::TRUNCATE,
    }
}

/// A token names an operation of an entry.
fn token_of(index: u32, op: usize) -> u64 {
    u64::from(index) | (op as u64) << 32
}

fn op_of(token: u64) -> usize {
    (token >> 32) as usize
}
