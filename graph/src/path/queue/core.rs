//! The engine behind a queue: starts requests, counts their pieces, ends them.
#![expect(unsafe_code, reason = "submits operations on memory that its entries own; lists")]

use super::check::{blame, check, is_plain_transfer, outcome_of_nothing, record_of};
use super::table::{Door, Entry, Op, Place, Table, op_of, token_of};
use crate::account::Counters;
use crate::block_graph::BlockGraph;
use crate::error::{Error, ErrorKind, Result};
use crate::origin::Origin;
use crate::path::context::{Admission, Context};
use crate::path::hold::{Holds, SharedHolds};
use crate::path::leaf::{Next, Transfer};
use crate::path::serve;
use crate::path::view::{NodeIndex, QueueView, ROOT};
use crate::path::walk::{Reason, Step, rest_of, walk};
use crate::permission::Permissions;
use crate::request::{Completion, Outcome, Request, RequestKind};
use blockplex_drain::Slot;
use blockplex_io::buffer::IoVector;
use blockplex_io::engine::Sink;
use blockplex_io::event_loop::{JoinHandle, Local};
use smallvec::SmallVec;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::Waker;

pub(crate) struct QueueCore {
    pub(super) graph: BlockGraph,
    pub(super) origin: Arc<Origin>,
    pub(super) local: Local,
    pub(super) loop_index: usize,
    pub(super) slot: Slot,
    counters: Arc<Counters>,
    pub(super) view: RefCell<Rc<QueueView>>,
    pub(super) table: RefCell<Table>,
    pub(super) done: RefCell<Vec<Completion>>,
    /// The shared admissions among those of `done`; the others are the slot's own. Which is which
    /// does not matter: a reaped completion ends one of them.
    done_tickets: RefCell<Vec<Rc<Ticket>>>,
    pub(super) parked: RefCell<VecDeque<u32>>,
    pub(super) resume: RefCell<Option<JoinHandle<()>>>,
    pub(super) reaper: RefCell<Option<Waker>>,
    pub(super) reaper_waits: Cell<bool>,
    pub(super) closed: Cell<bool>,
    pub(super) this: Weak<QueueCore>,
}

/// The admission of a request that has left tier 1: shared by everything that runs for it.
pub(crate) struct Ticket(Rc<QueueCore>);

impl Admission for Ticket {}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.slot.exit();
    }
}

/// The result of a start.
pub(super) enum Started {
    /// Served on the spot. Still admitted, and its memory is still its own.
    Ended(Result<Outcome>),
    Running(u32),
}

impl QueueCore {
    pub(super) fn new(
        graph: &BlockGraph,
        origin: &Arc<Origin>,
        local: &Local,
        label: &str,
    ) -> Rc<QueueCore> {
        Rc::new_cyclic(|this| QueueCore {
            graph: graph.clone(),
            slot: origin.gate().open_slot(label),
            counters: origin.accounts.open(),
            origin: origin.clone(),
            loop_index: local.index(),
            local: local.clone(),
            view: RefCell::new(QueueView::new(None, Permissions::NONE, u64::MAX)),
            table: RefCell::default(),
            done: RefCell::default(),
            done_tickets: RefCell::default(),
            parked: RefCell::default(),
            resume: RefCell::default(),
            reaper: RefCell::default(),
            reaper_waits: Cell::new(false),
            closed: Cell::new(false),
            this: this.clone(),
        })
    }

    /// Starts a request of the cookie door.
    #[inline]
    pub(super) fn submit(&self, mut request: Request, cookie: u64) {
        if let Started::Ended(result) = self.start(&mut request, Door::Cookie(cookie)) {
            let vector = std::mem::take(&mut request.vector);
            self.queue_completion(cookie, result, vector, None);
        }
    }

    /// Starts a request of the future's door: its completion, or its index.
    pub(super) fn request(&self, mut request: Request) -> std::result::Result<Completion, u32> {
        match self.start(&mut request, Door::Future) {
            Started::Ended(result) => {
                self.slot.exit();
                Ok(Completion { cookie: 0, result, vector: request.vector })
            }
            Started::Running(index) => Err(index),
        }
    }

    /// By reference: a request was written to memory a moment ago, field by field, and a copy of it
    /// would have to wait for that.
    #[inline]
    fn start(&self, request: &mut Request, door: Door) -> Started {
        if !self.parked.borrow().is_empty() || !self.slot.try_enter() {
            return Started::Running(self.park(std::mem::replace(request, Request::flush()), door));
        }
        let started = self.run(request, door);
        if let Started::Ended(result) = &started {
            self.counters.count(request.kind, request.length, result.is_ok());
        }
        started
    }

    /// Runs an admitted request.
    #[inline]
    fn run(&self, request: &mut Request, door: Door) -> Started {
        let view = self.current_view();
        if !is_plain_transfer(&view, request) {
            if let Err(error) = check(&view, request) {
                return Started::Ended(Err(blame(error, request)));
            }
            if let Some(outcome) = outcome_of_nothing(&view, request) {
                return Started::Ended(Ok(outcome));
            }
        }
        let mut holds = Holds::default();
        let step = walk(&view, ROOT, false, &mut rest_of(request, 0, self.loop_index), &mut holds);
        match step {
            Step::Done { length } if length == request.length => {
                holds.release(&view, self.loop_index);
                Started::Ended(Ok(Outcome::Done))
            }
            Step::Zero { length } if length == request.length => {
                holds.release(&view, self.loop_index);
                if request.kind == RequestKind::Read {
                    request.vector.fill(0, request.vector.len(), 0);
                }
                Started::Ended(Ok(Outcome::Done))
            }
            step => {
                let index = self.allocate(std::mem::replace(request, Request::flush()), door);
                self.launch(index, view, step, holds);
                Started::Running(index)
            }
        }
    }

    /// Starts the pieces of a request, the first of which is `step`.
    pub(super) fn launch(&self, index: u32, view: Rc<QueueView>, step: Step, holds: Holds) {
        let length = {
            let mut table = self.table.borrow_mut();
            let entry = table.entry(index);
            entry.view = Some(view.clone());
            // One for this function, so that no piece ends the request before all have started.
            entry.left = 1;
            entry.result = Ok(Outcome::Done);
            self.slot.record(index, record_of(&entry.request, &self.local, &view));
            entry.request.length
        };
        let (mut step, mut holds) = (step, holds);
        let mut position = 0u64;
        loop {
            let piece = self.start_piece(index, &view, step, holds, position);
            position = position.saturating_add(piece);
            if position >= length {
                break;
            }
            (step, holds) = self.walk_on(index, &view, position);
        }
        self.end_piece(index, Ok(Outcome::Done));
    }

    fn walk_on(&self, index: u32, view: &QueueView, position: u64) -> (Step, Holds) {
        let mut table = self.table.borrow_mut();
        let mut request = rest_of(&table.entry(index).request, position, self.loop_index);
        let mut holds = Holds::default();
        let step = walk(view, ROOT, false, &mut request, &mut holds);
        (step, holds)
    }

    /// Starts one piece of a request at `position`; gives its length.
    fn start_piece(
        &self,
        index: u32,
        view: &Rc<QueueView>,
        step: Step,
        mut holds: Holds,
        position: u64,
    ) -> u64 {
        match step {
            Step::File { node, fd, offset, length } => {
                self.slot.set_node(index, view.node(node).view.id().number());
                let max = view.node(node).max_transfer;
                let mut place = Place { node, fd, offset, position: position as usize, length };
                if length <= max {
                    self.start_transfer(index, place, holds, None);
                    return length;
                }
                let shared = SharedHolds::new(view.clone(), self.loop_index, holds);
                let mut left = length;
                while left > 0 {
                    place.length = left.min(max);
                    let held = Some(shared.clone());
                    self.start_transfer(index, place, Holds::default(), held);
                    left -= place.length;
                    place.offset += place.length;
                    place.position += place.length as usize;
                }
                length
            }
            Step::Zero { length } => {
                holds.release(view, self.loop_index);
                let mut table = self.table.borrow_mut();
                let request = &table.entry(index).request;
                if request.kind == RequestKind::Read {
                    request.vector.fill(position as usize, length as usize, 0);
                }
                length
            }
            Step::Done { length } => {
                holds.release(view, self.loop_index);
                length
            }
            Step::Serve { node, reason, flags, offset, length } => {
                self.slot.set_node(index, view.node(node).view.id().number());
                let context = Context {
                    view: view.clone(),
                    local: self.local.clone(),
                    ticket: self.ticket(index).map(|ticket| ticket as Rc<dyn Admission>),
                };
                let part = Request { flags, ..self.part(index, offset, position, length) };
                let holds = SharedHolds::new(view.clone(), self.loop_index, holds);
                self.start_serving(index, context, node, reason, part, holds);
                length
            }
            Step::Fail { node, error } => {
                holds.release(view, self.loop_index);
                let mut table = self.table.borrow_mut();
                let entry = table.entry(index);
                if entry.result.is_ok() {
                    entry.result = Err(error.at_node(view.node(node).view.name()));
                }
                u64::MAX // the rest is not tried
            }
        }
    }

    fn start_transfer(
        &self,
        index: u32,
        place: Place,
        holds: Holds,
        shared: Option<Rc<SharedHolds>>,
    ) {
        let mut table = self.table.borrow_mut();
        let entry = table.entry(index);
        let writes = entry.request.kind == RequestKind::Write;
        let durable = writes && entry.request.flags.fua;
        let Place { node, fd, offset, position, length } = place;
        let mut transfer = Transfer::new(writes, durable, fd, offset, position, length as usize);
        let mut part = None;
        if !transfer.fits(&entry.request.vector) {
            let (rest, vector) = transfer.rest(&entry.request.vector);
            transfer = rest;
            part = Some(vector);
        }
        entry.left += 1;
        entry.ops.push(Op { node, transfer, part, holds, shared });
        let token = token_of(index, entry.ops.len() - 1);
        self.submit_op(entry, token);
    }

    /// (Re)submits the operation of `token`.
    fn submit_op(&self, entry: &Entry, token: u64) {
        let Some(core) = self.this.upgrade() else { return };
        let op = &entry.ops[op_of(token)];
        let vector = op.part.as_ref().unwrap_or(&entry.request.vector);
        // SAFETY: the vector belongs to the entry or to the operation; both keep it until the
        // request's last piece has ended, which takes this operation's completion. The engine
        // keeps us (the sink) until then.
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
        context: Context,
        node: NodeIndex,
        reason: Reason,
        part: Request,
        holds: Rc<SharedHolds>,
    ) {
        let Some(core) = self.this.upgrade() else { return };
        let piece = Piece { core, index, ended: false };
        // The task is detached: the request runs to its end whoever waits for it (R3).
        drop(self.local.spawn(async move {
            let result = serve::at_node(&context, node, reason, part, holds).await;
            drop(context);
            piece.end(result);
        }));
    }

    /// One piece has ended; the last one ends the request.
    pub(super) fn end_piece(&self, index: u32, result: Result<Outcome>) {
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
        entry.view = None;
        entry.ops.clear();
        let result = std::mem::replace(&mut entry.result, Ok(Outcome::Done));
        self.counters.count(entry.request.kind, entry.request.length, result.is_ok());
        let result = result.map_err(|error| blame(error, &entry.request));
        let vector = std::mem::take(&mut entry.request.vector);
        let ticket = entry.ticket.take();
        let door = entry.door;
        let waker = match door {
            Door::Cookie(cookie) => {
                table.free.push(index);
                drop(table);
                self.queue_completion(cookie, result, vector, ticket);
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
    pub(super) fn leave(&self, ticket: Option<Rc<Ticket>>) {
        match ticket {
            Some(ticket) => drop(ticket),
            None => self.slot.exit(),
        }
    }

    /// Puts a completion together in its place in the list, which is why there is no `push`: that
    /// may have to drop the completion if the list cannot grow, so it would be put together on the
    /// stack and copied, by loads that wait for the smaller stores before them.
    #[inline]
    fn queue_completion(
        &self,
        cookie: u64,
        result: Result<Outcome>,
        vector: IoVector,
        ticket: Option<Rc<Ticket>>,
    ) {
        if self.closed.get() {
            return self.leave(ticket);
        }
        {
            let mut done = self.done.borrow_mut();
            if done.len() == done.capacity() {
                grow(&mut done);
            }
            if let Some(place) = done.spare_capacity_mut().first_mut() {
                place.write(Completion { cookie, result, vector });
                let length = done.len() + 1;
                // SAFETY: the capacity is more than the length was, and the element that is added
                // was written just now.
                unsafe { done.set_len(length) };
            }
        }
        if let Some(ticket) = ticket {
            self.done_tickets.borrow_mut().push(ticket);
        }
        if self.reaper_waits.get() {
            self.wake_reaper();
        }
    }

    #[cold]
    fn wake_reaper(&self) {
        self.reaper_waits.set(false);
        let waker = self.reaper.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Moves up to `max` completions; gives their number.
    pub(super) fn take_completions(&self, into: &mut Vec<Completion>, max: usize) -> usize {
        let mut done = self.done.borrow_mut();
        let count = done.len().min(max);
        if into.is_empty() && count == done.len() {
            std::mem::swap(into, &mut done);
            // The two lists take turns: as much room in either, so that none grows late, when more
            // requests than ever end at once.
            done.reserve(into.capacity());
        } else {
            into.extend(done.drain(..count));
        }
        count
    }

    /// Ends `count` admissions of reaped requests.
    pub(super) fn leave_many(&self, count: usize) {
        let mut own = count;
        while own > 0 {
            let ticket = self.done_tickets.borrow_mut().pop();
            match ticket {
                Some(ticket) => drop(ticket),
                None => break,
            }
            own -= 1;
        }
        if own > 0 {
            self.slot.exit_many(own as u64);
        }
    }

    pub(super) fn discard_completions(&self) {
        let mut discarded = Vec::new();
        let count = self.take_completions(&mut discarded, usize::MAX);
        self.leave_many(count);
    }

    pub(super) fn current_view(&self) -> Rc<QueueView> {
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

    pub(super) fn allocate(&self, request: Request, door: Door) -> u32 {
        let mut table = self.table.borrow_mut();
        if let Some(index) = table.free.pop() {
            let entry = table.entry(index);
            entry.request = request;
            entry.door = door;
            return index;
        }
        let index = table.entries.len() as u32;
        table.entries.push(Entry {
            request,
            door,
            view: None,
            ticket: None,
            ops: SmallVec::new(),
            left: 0,
            result: Ok(Outcome::Done),
            ended: None,
            waker: None,
        });
        index
    }
}

#[cold]
fn grow(done: &mut Vec<Completion>) {
    done.reserve(1);
}

impl Drop for QueueCore {
    fn drop(&mut self) {
        self.origin.accounts.close(&self.counters);
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
                Next::Again => {
                    if !op.transfer.fits(vector) {
                        let (rest, part) = op.transfer.rest(vector);
                        op.transfer = rest;
                        op.part = Some(part);
                    }
                    return self.submit_op(entry, token);
                }
                ended => {
                    let mut result = match ended {
                        Next::Failed(error) => Err(error),
                        _ => Ok(Outcome::Done),
                    };
                    if let Some(view) = &entry.view {
                        op.holds.release(view, self.loop_index);
                        let name = view.node(op.node).view.name();
                        result = result.map_err(|error| error.at_node(name));
                    }
                    op.shared = None;
                    result
                }
            }
        };
        self.end_piece(index, ended);
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
