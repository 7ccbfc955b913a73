//! The three doors to a backend: submission and reaping, futures, blocking calls.

use crate::patience;
use blockplex::{Backend, Blockplex, IoThread, LoopConfig, OpenOptions};
use blockplex_graph::{BlockStatus, Error, ErrorKind, Outcome, Request, Result};
use blockplex_io::buffer::IoVector;

/// A way in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// `Queue::submit` and `Queue::reap`.
    Submit,
    /// `Queue::request`.
    Future,
    /// `Backend::blocking`.
    Blocking,
}

impl Door {
    /// All of them.
    pub const ALL: [Door; 3] = [Door::Submit, Door::Future, Door::Blocking];
}

/// A layer with a loop to do I/O on.
pub struct Bench {
    /// The layer.
    pub layer: Blockplex,
    /// The loop.
    pub thread: IoThread,
}

impl Default for Bench {
    fn default() -> Bench {
        Bench::new()
    }
}

impl Bench {
    /// An empty layer and a loop.
    pub fn new() -> Bench {
        let thread = IoThread::spawn(LoopConfig::default()).expect("a loop starts");
        Bench { layer: Blockplex::new().expect("a layer starts"), thread }
    }

    /// Opens a disk.
    pub fn open(&self, options: &str) -> Result<Backend> {
        let options = OpenOptions::parse(options).expect("the options are well-formed");
        patience::wait("opening", self.layer.open("disk", options))
    }

    /// Runs a request through a door.
    pub fn ask(
        &self,
        door: Door,
        backend: &Backend,
        request: Request,
    ) -> Result<(Outcome, IoVector)> {
        let completion = if door == Door::Blocking {
            backend.blocking().run(request)?
        } else {
            let backend = backend.clone();
            let task = self.thread.handle().spawn_with(move |_| async move {
                let queue = backend.queue("test").expect("we are on a loop");
                if door == Door::Future {
                    return queue.request(request).await;
                }
                queue.submit(request, 99);
                queue.ready().await;
                let mut completions = Vec::new();
                assert_eq!(queue.reap(&mut completions, 8), 1);
                let completion = completions.pop().expect("it has been reaped");
                assert_eq!(completion.cookie, 99);
                completion
            });
            patience::wait("a request", task.expect("the loop runs")).expect("not cancelled")
        };
        Ok((completion.result?, completion.vector))
    }

    /// A block-status request through a door.
    pub fn status(
        &self,
        door: Door,
        backend: &Backend,
        offset: u64,
        length: u64,
    ) -> Result<BlockStatus> {
        match self.ask(door, backend, Request::block_status(offset, length))?.0 {
            Outcome::Status(status) => Ok(*status),
            Outcome::Done => Err(Error::new(ErrorKind::Io, "no status")),
        }
    }

    /// Closes a disk.
    pub fn close(&self, backend: &Backend) -> Result<()> {
        patience::wait("closing", backend.close())
    }
}
