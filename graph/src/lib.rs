//! Nodes, edges, permissions, publication, transactions and the request path.
//!
//! ```text
//!  control plane                                  I/O, any number of loops
//!  BlockGraph::begin ─► Transaction ─► commit     Queue::submit ─► walk (map) ─► ring
//!        │                    ▲           │              │  reads one version, cached per queue
//!        └─► begin_drain ─► Drained ──────┘              ▼
//!                                       publish ──► ArcSwap<Topology>
//! ```
//!
//! * [`driver`]: the contract of drivers, in two tiers.
//! * [`BlockGraph`], [`Transaction`], [`Drained`]: changes, and the proof that they demand.
//! * [`Queue`]: where requests enter; the request path behind it is in `path`.
//! * [`Origin`]: what starts I/O by itself, and where it is counted.
//!
//! This crate knows no driver and opens no file.
#![deny(missing_docs)]

mod account;
mod block_graph;
mod debug_event;
mod drained;
pub mod driver;
mod error;
mod limits;
mod node;
mod origin;
mod path;
mod permission;
mod request;
mod topology;
mod transaction;

pub use account::{Statistics, Tally};
pub use block_graph::BlockGraph;
pub use debug_event::{DebugEvent, DebugListener};
pub use drained::{Drained, DrainedSection, Scope};
pub use driver::{Driver, Role};
pub use error::{Error, ErrorKind, Result};
pub use limits::Limits;
pub use node::{
    DetectZeroes, DiscardMode, Edge, MAX_NODE_NAME, Node, NodeId, NodeOptions, NodeView,
    check_node_name,
};
pub use origin::{Origin, OriginId};
pub use path::{Child, IoFuture, NodeIo, Queue};
pub use permission::{Access, Permissions};
pub use request::{
    BlockStatus, Completion, Outcome, Preallocation, Request, RequestFlags, RequestKind,
};
pub use topology::Topology;
pub use transaction::Transaction;
