//! Blockplex: an embeddable multiqueue block layer.
//!
//! A virtual machine monitor or storage server opens images as a graph of nodes (filters over
//! formats over protocols) and does I/O on it from any number of threads. Every thread owns an
//! event loop and an io_uring; a request runs on the loop that submits it, whatever node it
//! crosses. The graph is changed (snapshots, filters, reopen) while I/O goes on.
//!
//! * [`Blockplex`]: the graph and its control plane. [`Blockplex::open`] gives a
//! * [`Backend`] (`Send + Sync`): one user of a disk. [`Backend::queue`] makes, on each loop, a
//! * [`Queue`]: where requests go in. Three doors lead to one engine:
//!   [`Queue::submit`] and [`Queue::reap`] with a cookie; [`Queue::request`] with a future;
//!   [`Backend::blocking`] for threads that own no loop.
//!
//! ```
//! use blockplex::{Blockplex, IoBuffer, OpenOptions, block_on};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let layer = Blockplex::new()?;
//! let options = OpenOptions::parse("driver=raw,file.driver=memory,file.size=1M")?;
//! let backend = block_on(layer.open("disk0", options))??;
//!
//! let disk = backend.blocking();
//! disk.write(4096, b"hello")?;
//! let mut bytes = [0; 5];
//! disk.read(4096, &mut bytes)?;
//! assert_eq!(&bytes, b"hello");
//! block_on(backend.close())??;
//! # Ok(())
//! # }
//! ```
//!
//! From an I/O thread with its own loop:
//!
//! ```
//! # use blockplex::{Blockplex, IoBuffer, OpenOptions, block_on};
//! use blockplex::{Completion, IoThread, LoopConfig, Request};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let layer = Blockplex::new()?;
//! # let options = OpenOptions::parse("driver=null-co,size=1G")?;
//! # let backend = block_on(layer.open("disk0", options))??;
//! let thread = IoThread::spawn(LoopConfig::default())?;
//! let device = backend.clone();
//! let task = thread.handle().spawn_with(move |_local| async move {
//!     let queue = device.queue("virtqueue 0").expect("we are on a loop");
//!     queue.submit(Request::read(0, IoBuffer::zeroed(4096)), 7);
//!     queue.ready().await;
//!     let mut completions: Vec<Completion> = Vec::new();
//!     queue.reap(&mut completions, 32);
//!     completions[0].cookie
//! })?;
//! assert_eq!(block_on(task)??, 7);
//! # block_on(backend.close())??;
//! # Ok(())
//! # }
//! ```
//!
//! A program with an event loop of its own drives ours from it, on the same thread: one descriptor
//! to watch, the next timeout, and a call when there is work.
//!
//! ```
//! # use blockplex::{Blockplex, IoBuffer, OpenOptions, block_on};
//! use blockplex::io::event_loop::Wait;
//! use blockplex::{Completion, EventLoop, LoopConfig, Request};
//! use std::os::fd::AsRawFd;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let layer = Blockplex::new()?;
//! # let options = OpenOptions::parse("driver=null-co,size=1G,latency-ns=1000000")?;
//! # let backend = block_on(layer.open("disk0", options))??;
//! let mut event_loop = EventLoop::new(LoopConfig::default())?;
//! let fd = event_loop.fd()?.as_raw_fd();
//! let queue = backend.queue("virtqueue 0")?;
//! queue.submit(Request::read(0, IoBuffer::zeroed(512)), 1);
//!
//! let mut completions: Vec<Completion> = Vec::new();
//! while queue.reap(&mut completions, 32) == 0 {
//!     let timeout = match event_loop.prepare() {
//!         Wait::Now => 0,
//!         Wait::Until(duration) => duration.as_millis() as i32 + 1,
//!         Wait::Forever => -1,
//!     };
//!     let mut watched = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
//!     // SAFETY: one valid pollfd.
//!     unsafe { libc::poll(&mut watched, 1, timeout) };
//!     event_loop.dispatch();
//! }
//! assert_eq!(completions[0].cookie, 1);
//! # drop(queue);
//! # drop(event_loop);
//! # block_on(backend.close())??;
//! # Ok(())
//! # }
//! ```
#![deny(missing_docs)]

mod backend;
mod bitmap;
mod blocking;
mod create;
pub mod file_name;
mod file_work;
mod internal_snapshot;
mod layer;
mod open;
mod options;
mod snapshot;

pub use backend::Backend;
pub use blocking::Blocking;
pub use layer::{Blockplex, NodeReopen};
pub use options::OpenOptions;
pub use snapshot::SnapshotOptions;

pub use blockplex_drain::{DrainHooks, Holder};
pub use blockplex_drivers as drivers;
pub use blockplex_drivers::open_gate::OpenGate;
pub use blockplex_drivers::options::{OptionError, OptionTree};
pub use blockplex_graph as graph;
pub use blockplex_graph::{
    BlockStatus, Completion, Drained, DrainedSection, Error, ErrorKind, Limits, NodeId, Outcome,
    Queue, Request, RequestFlags, RequestKind, Result, Scope, Statistics, Tally,
};
pub use blockplex_io as io;
pub use blockplex_io::buffer::{BufferPool, IoBuffer, IoVector, StableMemory};
pub use blockplex_io::event_loop::{
    EventLoop, IoThread, Local, LoopConfig, LoopHandle, block_on, current,
};
