//! The blocking door: for threads that own no loop. The request runs on the layer's control loop;
//! the calling thread parks, and runs nothing else meanwhile.

use crate::backend::Backend;
use crate::layer::Blockplex;
use blockplex_graph::{
    BlockStatus, Completion, Error, ErrorKind, OriginId, Outcome, Queue, Request, Result,
};
use blockplex_io::buffer::{IoBuffer, IoVector};
use blockplex_io::event_loop::block_on;
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

thread_local! {
    /// The control loop's queues for blocking calls, one for each backend that made some.
    static QUEUES: RefCell<HashMap<OriginId, Rc<Queue>>> = RefCell::default();
}

/// Blocking calls on a backend. Offsets and lengths in bytes. On a thread that owns an event loop,
/// each call fails with [`ErrorKind::OnLoopThread`].
pub struct Blocking {
    layer: Blockplex,
    backend: Backend,
}

impl Blocking {
    pub(crate) fn new(layer: Blockplex, backend: Backend) -> Blocking {
        Blocking { layer, backend }
    }

    /// Reads into `bytes`.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let completion = self.run(Request::read(offset, IoBuffer::zeroed(bytes.len())))?;
        completion.vector.copy_to_slice(0, bytes);
        Ok(())
    }

    /// Writes `bytes`.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.run(Request::write(offset, IoBuffer::from_slice(bytes))).map(drop)
    }

    /// Writes `bytes`; they are durable on return.
    pub fn write_fua(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.run(Request::write(offset, IoBuffer::from_slice(bytes)).fua()).map(drop)
    }

    /// Makes everything written so far durable.
    pub fn flush(&self) -> Result<()> {
        self.run(Request::flush()).map(drop)
    }

    /// Discards a range.
    pub fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.run(Request::discard(offset, length)).map(drop)
    }

    /// Makes a range read as zeros.
    pub fn write_zeroes(&self, offset: u64, length: u64) -> Result<()> {
        self.run(Request::write_zeroes(offset, length)).map(drop)
    }

    /// The extent that starts at `offset`, at most `length` long.
    pub fn block_status(&self, offset: u64, length: u64) -> Result<BlockStatus> {
        match self.run(Request::block_status(offset, length))?.result? {
            Outcome::Status(status) => Ok(*status),
            Outcome::Done => Err(Error::new(ErrorKind::Io, "block-status gave no status")),
        }
    }

    /// Sets the length.
    pub fn truncate(&self, length: u64) -> Result<()> {
        self.run(Request::truncate(length)).map(drop)
    }

    /// Runs any request. The memory comes back with the completion.
    pub fn run(&self, request: Request) -> Result<Completion> {
        let backend = self.backend.clone();
        let work = self.layer.on_control(move |_| async move {
            let queue = queue_of(&backend)?;
            Ok(queue.request(request).await)
        });
        let completion = block_on(work).map_err(|error| {
            Error::new(ErrorKind::OnLoopThread, error.to_string()).during("a blocking call")
        })??;
        match completion.result {
            Ok(outcome) => Ok(Completion { result: Ok(outcome), ..completion }),
            Err(error) => Err(error),
        }
    }
}

/// The control loop's queue of a backend.
fn queue_of(backend: &Backend) -> Result<Rc<Queue>> {
    let id = backend.origin().id();
    if let Some(queue) = QUEUES.with_borrow(|queues| queues.get(&id).cloned()) {
        return Ok(queue);
    }
    let queue = Rc::new(backend.queue("blocking calls")?);
    QUEUES.with_borrow_mut(|queues| queues.insert(id, queue.clone()));
    Ok(queue)
}

/// Drops the control loop's queue of a backend that is being closed. On the control loop.
pub(crate) fn close_queue(origin: OriginId) {
    let queue = QUEUES.with_borrow_mut(|queues| queues.remove(&origin));
    drop(queue);
}

/// A vector's bytes as a plain vector, for callers of [`Blocking::run`].
impl Blocking {
    /// Reads `length` bytes into a new vector.
    pub fn read_to_vec(&self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let completion = self.run(Request::read(offset, IoVector::zeroed(length)))?;
        Ok(completion.vector.to_vec())
    }
}
