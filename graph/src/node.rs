//! Nodes and edges, as one version of the graph sees them.
//!
//! A [`Node`] is what stays the same across versions: its name, its driver, its range lock. A
//! [`NodeView`] is one version's immutable view of it: its edges and what follows from them.

use crate::driver::{Driver, Role};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;
use crate::permission::Access;
use blockplex_io::lock::RangeLock;
use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Identity of a node; never reused in one process.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub(crate) u32);

impl NodeId {
    pub(crate) fn next() -> NodeId {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        // Relaxed: only the uniqueness of the number matters.
        NodeId(NEXT.fetch_add(1, Ordering::Relaxed))
    }

    /// The number, as in-flight records carry it.
    pub fn number(self) -> u32 {
        self.0
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {}", self.0)
    }
}

/// What a discard does at a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DiscardMode {
    /// Nothing (QEMU's default).
    #[default]
    Ignore,
    /// It is passed on.
    Unmap,
}

/// What a write of zeros does at a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DetectZeroes {
    /// It is a write.
    #[default]
    Off,
    /// It becomes write-zeroes.
    On,
    /// It becomes write-zeroes that may unmap; needs [`DiscardMode::Unmap`].
    Unmap,
}

/// The options that every node has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct NodeOptions {
    /// No writes.
    pub read_only: bool,
    /// What a discard does.
    pub discard: DiscardMode,
    /// What a write of zeros does.
    pub detect_zeroes: DetectZeroes,
    /// Flushes are dropped (`cache.no-flush`): data may be lost.
    pub no_flush: bool,
}

/// What a node keeps across all versions of the graph.
pub struct Node {
    id: NodeId,
    name: String,
    driver: Box<dyn Driver>,
    /// Orders read-modify-write against overlapping writes at this node.
    pub(crate) writes: RangeLock,
}

impl Node {
    pub(crate) fn new(id: NodeId, name: String, driver: Box<dyn Driver>) -> Arc<Node> {
        Arc::new(Node { id, name, driver, writes: RangeLock::new() })
    }

    /// Its identity.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// Its node name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its driver.
    pub fn driver(&self) -> &dyn Driver {
        &*self.driver
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} '{}' ({})", self.id, self.name, self.driver.driver_name())
    }
}

/// An edge from a node to its child.
#[derive(Clone, Debug)]
pub struct Edge {
    /// Its name in options: `file`, `backing`, ….
    pub name: String,
    /// What the child is to the parent.
    pub role: Role,
    /// The child.
    pub child: NodeId,
    /// What the edge needs and shares now.
    pub access: Access,
}

/// One version's view of a node.
#[derive(Clone, Debug)]
pub struct NodeView {
    pub(crate) node: Arc<Node>,
    pub(crate) options: NodeOptions,
    pub(crate) edges: Vec<Edge>,
    /// The children's views, in the order of `edges`; filled in when a version is sealed.
    pub(crate) children: Vec<Arc<NodeView>>,
    pub(crate) limits: Limits,
    /// What all parents together need and share.
    pub(crate) access: Access,
    /// The driver wants to hear of its parents' steps.
    pub(crate) listens: bool,
    /// So does that of a child.
    pub(crate) child_listens: bool,
}

impl NodeView {
    /// The node.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Its identity.
    pub fn id(&self) -> NodeId {
        self.node.id
    }

    /// Its node name.
    pub fn name(&self) -> &str {
        &self.node.name
    }

    /// Its driver.
    pub fn driver(&self) -> &dyn Driver {
        &*self.node.driver
    }

    /// Its driver, if it is a `D`: for what one kind of driver offers beside the contract.
    pub fn driver_as<D: Driver>(&self) -> Option<&D> {
        (self.driver() as &dyn Any).downcast_ref()
    }

    /// The options that every node has.
    pub fn options(&self) -> &NodeOptions {
        &self.options
    }

    /// Its edges to its children.
    pub fn edges(&self) -> &[Edge] {
        &self.edges
    }

    /// Its limits, its children's merged in.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// What all its parents together need and share.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Its length in bytes now.
    pub fn length(&self) -> u64 {
        self.driver().length(self)
    }

    /// Whether a child wants to hear of this node's steps ([`Child::announce`]): what is announced
    /// must then not be answered in tier 1.
    ///
    /// [`Child::announce`]: crate::Child::announce
    pub fn announces(&self) -> bool {
        self.child_listens
    }

    /// Whether writes are refused here.
    pub fn is_read_only(&self) -> bool {
        self.options.read_only || self.driver().is_read_only()
    }

    /// The view of the child at `edge`, when there is one.
    pub fn child(&self, edge: usize) -> Option<&Arc<NodeView>> {
        self.children.get(edge)
    }

    /// The index of the first edge in `role`.
    pub fn edge_in_role(&self, role: Role) -> Option<usize> {
        self.edges.iter().position(|edge| edge.role == role)
    }
}

/// The longest node name (QEMU's limit).
pub const MAX_NODE_NAME: usize = 31;

/// Checks a node name: up to 31 characters, first a letter, then letters, digits, `.`, `_`, `-`.
pub fn check_node_name(name: &str) -> Result<()> {
    let mut characters = name.chars();
    let starts_well = characters.next().is_some_and(|c| c.is_ascii_alphabetic());
    let goes_on_well =
        characters.all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
    if starts_well && goes_on_well && name.len() <= MAX_NODE_NAME {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::InvalidArgument,
        format!(
            "node name '{}' is not a letter followed by up to {} letters, digits, '.', '_' or '-'",
            name.escape_default(),
            MAX_NODE_NAME - 1
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_names_follow_qemus_rule() {
        for good in ["a", "disk0", "Base_1.qcow2-x", &"n".repeat(31)] {
            assert!(check_node_name(good).is_ok(), "{good}");
        }
        for bad in ["", "0disk", "#block1", "a b", "ä", &"n".repeat(32)] {
            assert!(check_node_name(bad).is_err(), "{bad}");
        }
    }
}
