//! What drivers hold while they serve a request: their node, their children, their loop.

use super::context::{Context, announce};
use super::serve;
use super::view::{NodeIndex, QueueView, ROOT};
use crate::debug_event::DebugEvent;
use crate::driver::Role;
use crate::error::{Error, ErrorKind, Result};
use crate::node::NodeView;
use crate::permission::Permissions;
use crate::request::{BlockStatus, Outcome, Preallocation, Request, RequestFlags, RequestKind};
use blockplex_io::buffer::IoVector;
use blockplex_io::event_loop::Local;
use std::sync::Arc;

/// The place of a driver in a request: its node in the version of the graph that the request
/// holds, on the loop that the request runs on. Not `Send`.
pub struct NodeIo {
    context: Context,
    index: NodeIndex,
}

impl NodeIo {
    /// For the control plane: I/O of a node that no request runs at (it is being opened, reopened
    /// or closed), outside of any admission.
    pub fn for_control(local: &Local, view: &Arc<NodeView>) -> NodeIo {
        let view = QueueView::new(Some(view), Permissions::ALL, 0);
        NodeIo { context: Context { view, local: local.clone(), ticket: None }, index: ROOT }
    }

    pub(super) fn new(context: Context, index: NodeIndex) -> NodeIo {
        NodeIo { context, index }
    }

    /// The loop that the request runs on.
    pub fn local(&self) -> &Local {
        &self.context.local
    }

    /// That loop's index.
    pub fn loop_index(&self) -> usize {
        self.context.local.index()
    }

    /// The driver's node.
    pub fn node(&self) -> &NodeView {
        &self.context.view.node(self.index).view
    }

    /// The child at `edge`; an error when the node has no such child.
    pub fn child(&self, edge: usize) -> Result<Child> {
        let local = self.context.view.node(self.index);
        match (local.children.get(edge), local.view.edges().get(edge)) {
            (Some(local), Some(edge)) => Ok(Child {
                context: self.context.clone(),
                index: local.child,
                granted: edge.access.needed,
            }),
            _ => Err(Error::new(ErrorKind::NotFound, format!("the node has no child {edge}"))
                .at_node(local.view.name())),
        }
    }

    /// The first child in `role`.
    pub fn child_in_role(&self, role: Role) -> Option<Child> {
        let edge = self.node().edge_in_role(role)?;
        self.child(edge).ok()
    }
}

/// A child of a node, reached under the admission of the request. Offsets and lengths in bytes.
/// The futures may be dropped: I/O that has begun runs to its end, and keeps its memory and the
/// request's admission until then.
#[derive(Clone)]
pub struct Child {
    context: Context,
    index: NodeIndex,
    granted: Permissions,
}

impl Child {
    /// For the control plane: a node as the child of one that does not exist yet.
    pub fn for_control(local: &Local, view: &Arc<NodeView>, granted: Permissions) -> Child {
        let view = QueueView::new(Some(view), granted, 0);
        let context = Context { view, local: local.clone(), ticket: None };
        Child { context, index: ROOT, granted }
    }

    /// The child's node.
    pub fn view(&self) -> &Arc<NodeView> {
        &self.context.view.node(self.index).view
    }

    /// Its length.
    pub fn length(&self) -> u64 {
        self.view().length()
    }

    /// The loop that the request runs on.
    pub fn local(&self) -> &Local {
        &self.context.local
    }

    /// Reads the vector's length; what lies beyond the child's end reads as zeros.
    pub async fn read(&self, offset: u64, vector: impl Into<IoVector>) -> Result<()> {
        self.demand(Permissions::CONSISTENT_READ)?;
        self.perform(Request::read(offset, vector)).await.map(drop)
    }

    /// Writes the vector.
    pub async fn write(
        &self,
        offset: u64,
        vector: impl Into<IoVector>,
        flags: RequestFlags,
    ) -> Result<()> {
        self.demand(Permissions::WRITE)?;
        self.perform(Request { flags, ..Request::write(offset, vector) }).await.map(drop)
    }

    /// Makes a range read as zeros.
    pub async fn write_zeroes(&self, offset: u64, length: u64, flags: RequestFlags) -> Result<()> {
        self.demand(Permissions::WRITE)?;
        self.perform(Request { flags, ..Request::write_zeroes(offset, length) }).await.map(drop)
    }

    /// Gives a range back to the storage; a hint.
    pub async fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.demand(Permissions::WRITE)?;
        self.perform(Request::discard(offset, length)).await.map(drop)
    }

    /// Makes what has completed durable.
    pub async fn flush(&self) -> Result<()> {
        self.perform(Request::flush()).await.map(drop)
    }

    /// The extent that starts at `offset`. At or beyond the end: an extent of length 0.
    pub async fn block_status(&self, offset: u64, length: u64) -> Result<BlockStatus> {
        let rest = self.length().saturating_sub(offset);
        if rest == 0 || length == 0 {
            return Ok(BlockStatus { zero: true, ..BlockStatus::default() });
        }
        match self.perform(Request::block_status(offset, length.min(rest))).await? {
            Outcome::Status(status) => Ok(*status),
            Outcome::Done => Ok(BlockStatus {
                length: length.min(rest),
                data: true,
                allocated: true,
                ..BlockStatus::default()
            }),
        }
    }

    /// Sets its length.
    pub async fn truncate(&self, length: u64) -> Result<()> {
        self.demand(Permissions::RESIZE)?;
        self.perform(Request::truncate(length)).await.map(drop)
    }

    /// Sets its length; what that adds is taken as `mode` says.
    pub async fn truncate_with(&self, length: u64, mode: Preallocation) -> Result<()> {
        self.demand(Permissions::RESIZE)?;
        self.perform(Request::truncate(length).preallocated(mode)).await.map(drop)
    }

    /// Says what the parent is about to do, to a child that listens; the parent may be kept waiting
    /// here. One branch where none does.
    pub async fn announce(&self, event: DebugEvent) {
        announce(&self.context, self.index, event).await;
    }

    fn demand(&self, needed: Permissions) -> Result<()> {
        if self.granted.contains(needed) {
            return Ok(());
        }
        let text = format!("the parent has no '{needed}' permission on it");
        Err(Error::new(ErrorKind::PermissionDenied, text).at_node(self.view().name()))
    }

    async fn perform(&self, request: Request) -> Result<Outcome> {
        let kind = request.kind;
        let (offset, length) = (request.offset, request.length);
        let transfers = matches!(kind, RequestKind::Read | RequestKind::Write);
        if transfers && length == 0 {
            return Ok(Outcome::Done);
        }
        let result = serve::perform(&self.context, self.index, request).await;
        result.map_err(|error| error.during(kind.name()).at_range(offset, length))
    }
}
