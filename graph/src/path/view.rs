//! The graph as one queue sees it: the nodes that its origin reaches, flattened, so that a request
//! goes from node to node by index.

use crate::driver::Role;
use crate::node::{DetectZeroes, DiscardMode, NodeId, NodeView};
use crate::permission::Permissions;
use smallvec::SmallVec;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

/// Index of a node within a [`QueueView`].
pub(crate) type NodeIndex = u16;

/// The root's index.
pub(crate) const ROOT: NodeIndex = 0;

/// One version of the graph below one root. Empty when the origin has no root.
#[derive(Default)]
pub(crate) struct QueueView {
    /// The generation of the origin's gate that this view belongs to.
    pub(crate) generation: u64,
    /// What the origin may do.
    pub(crate) granted: Permissions,
    nodes: Vec<LocalNode>,
}

/// A node, with what the walk needs at hand.
pub(crate) struct LocalNode {
    pub(crate) view: Arc<NodeView>,
    pub(crate) children: SmallVec<[LocalEdge; 2]>,
    /// Where a read or write that comes here is first asked about: past the nodes that pass it on
    /// as it is. Their lengths are that node's, too.
    pub(crate) transfers_at: NodeIndex,
    /// Reads and writes need nothing here before the driver is asked.
    pub(crate) is_plain: bool,
    /// Offsets and lengths must have none of these bits.
    pub(crate) request_mask: u64,
    /// Addresses must have none of these bits.
    pub(crate) memory_mask: usize,
    /// Largest transfer in bytes; `u64::MAX` without a limit.
    pub(crate) max_transfer: u64,
    pub(crate) max_segments: usize,
    pub(crate) ignores_discard: bool,
    pub(crate) ignores_flush: bool,
    pub(crate) detects_zeroes: bool,
}

/// An edge, with what the walk needs at hand.
#[derive(Clone, Copy)]
pub(crate) struct LocalEdge {
    pub(crate) child: NodeIndex,
    /// The child's.
    pub(crate) transfers_at: NodeIndex,
    pub(crate) is_backing: bool,
}

impl QueueView {
    /// Flattens what `root` reaches.
    pub(crate) fn new(
        root: Option<&Arc<NodeView>>,
        granted: Permissions,
        generation: u64,
    ) -> Rc<QueueView> {
        let mut view = QueueView { generation, granted, nodes: Vec::new() };
        if let Some(root) = root {
            view.flatten(root, &mut HashMap::new());
        }
        Rc::new(view)
    }

    fn flatten(
        &mut self,
        view: &Arc<NodeView>,
        known: &mut HashMap<NodeId, NodeIndex>,
    ) -> NodeIndex {
        if let Some(index) = known.get(&view.id()) {
            return *index;
        }
        let index = NodeIndex::try_from(self.nodes.len())
            .unwrap_or_else(|_| unreachable!("a graph has far fewer than 65,536 nodes"));
        known.insert(view.id(), index);
        self.nodes.push(LocalNode::new(view, index));
        let mut children = SmallVec::new();
        for (child, edge) in view.children.iter().zip(view.edges()) {
            let child = self.flatten(child, known);
            let transfers_at = self.node(child).transfers_at;
            let is_backing = edge.role == Role::Backing;
            children.push(LocalEdge { child, transfers_at, is_backing });
        }
        let transfers_at = self.transfers_from(index, &children, view);
        let local = &mut self.nodes[usize::from(index)];
        (local.children, local.transfers_at) = (children, transfers_at);
        index
    }

    /// Where reads and writes go that come to a node with these children.
    fn transfers_from(
        &self,
        index: NodeIndex,
        children: &[LocalEdge],
        view: &NodeView,
    ) -> NodeIndex {
        match view.driver().passes_transfers(view).and_then(|edge| children.get(edge)) {
            // A backing node may be shorter than its overlay: that is looked at on the way.
            Some(edge) if self.node(index).is_plain && !edge.is_backing => edge.transfers_at,
            _ => index,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    #[inline]
    pub(crate) fn node(&self, index: NodeIndex) -> &LocalNode {
        &self.nodes[usize::from(index)]
    }
}

impl LocalNode {
    fn new(view: &Arc<NodeView>, index: NodeIndex) -> LocalNode {
        let limits = view.limits();
        let options = view.options();
        let request_mask = u64::from(limits.request_alignment) - 1;
        let detects_zeroes = options.detect_zeroes != DetectZeroes::Off;
        LocalNode {
            children: SmallVec::new(),
            transfers_at: index,
            is_plain: request_mask == 0 && !detects_zeroes,
            request_mask,
            memory_mask: limits.memory_alignment as usize - 1,
            max_transfer: match limits.max_transfer {
                0 => u64::MAX,
                max => u64::from(max),
            },
            max_segments: match limits.max_segments {
                0 => usize::MAX,
                max => max as usize,
            },
            ignores_discard: options.discard == DiscardMode::Ignore,
            ignores_flush: options.no_flush,
            detects_zeroes,
            view: view.clone(),
        }
    }

    /// The child at `edge`; a driver that names an edge it does not have is a bug of ours.
    #[inline]
    pub(crate) fn edge(&self, edge: usize) -> LocalEdge {
        self.children[edge]
    }
}
