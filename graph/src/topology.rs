//! One immutable version of the graph, and the draft from which the next one is made.
//!
//! G1. Edges form no cycle.
//! G2. `parents` mirrors `edges`, and `origins` knows every root.
//! G3. For every node, the accesses of its parents get on with each other (P1).
//! G4. A view's children are the views of the same version: who holds a view sees one version.

use crate::error::{Error, ErrorKind, Result};
use crate::node::{Edge, Node, NodeId, NodeOptions, NodeView};
use crate::origin::{Origin, OriginId};
use crate::permission::Access;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// An origin and where it is attached.
#[derive(Clone, Debug)]
pub(crate) struct Attachment {
    pub(crate) origin: Arc<Origin>,
    pub(crate) root: Option<NodeId>,
}

/// A version of the graph that can still be changed; nobody else sees it.
#[derive(Clone, Default)]
pub(crate) struct Draft {
    pub(crate) nodes: BTreeMap<NodeId, Record>,
    pub(crate) origins: BTreeMap<OriginId, Attachment>,
}

/// A node in a draft.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) node: Arc<Node>,
    pub(crate) options: NodeOptions,
    pub(crate) edges: Vec<Edge>,
}

/// One published version of the graph. Immutable; any thread may read it.
#[derive(Default)]
pub struct Topology {
    views: BTreeMap<NodeId, Arc<NodeView>>,
    names: HashMap<String, NodeId>,
    parents: HashMap<NodeId, Vec<NodeId>>,
    attachments: BTreeMap<OriginId, Attachment>,
    version: u64,
}

impl Topology {
    /// How many versions came before.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// All nodes of this version.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<NodeView>> {
        self.views.values()
    }

    /// The node with that identity.
    pub fn node(&self, id: NodeId) -> Option<&Arc<NodeView>> {
        self.views.get(&id)
    }

    /// The node with that name.
    pub fn find(&self, name: &str) -> Option<&Arc<NodeView>> {
        self.names.get(name).and_then(|id| self.views.get(id))
    }

    /// The root node of an origin.
    pub fn root(&self, origin: OriginId) -> Option<&Arc<NodeView>> {
        self.attachments.get(&origin)?.root.and_then(|id| self.views.get(&id))
    }

    /// All origins.
    pub fn origins(&self) -> impl Iterator<Item = &Arc<Origin>> {
        self.attachments.values().map(|attachment| &attachment.origin)
    }

    pub(crate) fn has_origin(&self, origin: OriginId) -> bool {
        self.attachments.contains_key(&origin)
    }

    /// Whether anything uses the node.
    pub fn has_parents(&self, id: NodeId) -> bool {
        self.parents.get(&id).is_some_and(|parents| !parents.is_empty())
            || self.attachments.values().any(|attachment| attachment.root == Some(id))
    }

    /// The nodes from `start` down, `start` included.
    pub fn subtree(&self, start: NodeId) -> BTreeSet<NodeId> {
        let mut found = BTreeSet::new();
        let mut pending = vec![start];
        while let Some(id) = pending.pop() {
            if let Some(view) = self.views.get(&id)
                && found.insert(id)
            {
                pending.extend(view.edges.iter().map(|edge| edge.child));
            }
        }
        found
    }

    /// The origins from which any of `nodes` is reached: those that must rest for it to rest.
    pub fn closure(&self, nodes: impl IntoIterator<Item = NodeId>) -> BTreeSet<OriginId> {
        let mut seen = BTreeSet::new();
        let mut pending: Vec<NodeId> = nodes.into_iter().collect();
        while let Some(id) = pending.pop() {
            if seen.insert(id) {
                pending.extend(self.parents.get(&id).into_iter().flatten().copied());
            }
        }
        self.attachments
            .iter()
            .filter(|(_, attachment)| attachment.root.is_some_and(|root| seen.contains(&root)))
            .map(|(id, _)| *id)
            .collect()
    }

    pub(crate) fn origin(&self, id: OriginId) -> Option<&Arc<Origin>> {
        self.attachments.get(&id).map(|attachment| &attachment.origin)
    }

    /// A copy to change.
    pub(crate) fn draft(&self) -> Draft {
        let record = |view: &Arc<NodeView>| Record {
            node: view.node.clone(),
            options: view.options,
            edges: view.edges.clone(),
        };
        Draft {
            nodes: self.views.iter().map(|(id, view)| (*id, record(view))).collect(),
            origins: self.attachments.clone(),
        }
    }
}

impl Draft {
    /// Checks G1–G3 and makes the draft a version. Views that are the same as in `previous`, all
    /// the way down, are shared with it.
    pub(crate) fn seal(mut self, previous: &Topology) -> Result<Topology> {
        let order = self.parents_first()?;
        let accesses = self.settle_accesses(&order)?;
        let mut views: BTreeMap<NodeId, Arc<NodeView>> = BTreeMap::new();
        for id in order.iter().rev() {
            let Some(record) = self.nodes.remove(id) else { continue };
            let view = build_view(record, accesses.get(id).copied(), &views)?;
            let shared = previous.views.get(id).filter(|old| is_same(old, &view));
            views.insert(*id, shared.cloned().unwrap_or_else(|| Arc::new(view)));
        }
        let mut topology = Topology {
            names: views.iter().map(|(id, view)| (view.name().to_owned(), *id)).collect(),
            parents: HashMap::new(),
            attachments: self.origins,
            version: previous.version + 1,
            views,
        };
        for (id, view) in &topology.views {
            for edge in &view.edges {
                topology.parents.entry(edge.child).or_default().push(*id);
            }
        }
        Ok(topology)
    }

    /// The nodes such that every parent comes before its children; an error names a cycle.
    fn parents_first(&self) -> Result<Vec<NodeId>> {
        let mut waiting: HashMap<NodeId, usize> = self.nodes.keys().map(|id| (*id, 0)).collect();
        for record in self.nodes.values() {
            for edge in &record.edges {
                let count = waiting.get_mut(&edge.child).ok_or_else(|| {
                    let text = format!("child '{}' is {:?}, which is gone", edge.name, edge.child);
                    Error::new(ErrorKind::NotFound, text).at_node(record.node.name())
                })?;
                *count += 1;
            }
        }
        let mut ready: Vec<NodeId> =
            waiting.iter().filter(|(_, count)| **count == 0).map(|(id, _)| *id).collect();
        let mut order = Vec::with_capacity(self.nodes.len());
        while let Some(id) = ready.pop() {
            order.push(id);
            for edge in self.nodes.get(&id).into_iter().flat_map(|record| &record.edges) {
                if let Some(count) = waiting.get_mut(&edge.child) {
                    *count -= 1;
                    if *count == 0 {
                        ready.push(edge.child);
                    }
                }
            }
        }
        if order.len() == self.nodes.len() {
            return Ok(order);
        }
        let stuck = waiting.iter().find(|(_, count)| **count > 0).map(|(id, _)| *id);
        let name = stuck.and_then(|id| self.nodes.get(&id)).map_or("?", |r| r.node.name());
        Err(Error::new(ErrorKind::InvalidArgument, "the change would make a loop of nodes")
            .at_node(name))
    }

    /// Works out what every edge needs and shares, parents first, and checks G3.
    fn settle_accesses(&mut self, order: &[NodeId]) -> Result<HashMap<NodeId, Access>> {
        let mut users: HashMap<NodeId, Vec<(String, Access)>> = HashMap::new();
        for attachment in self.origins.values() {
            if let Some(root) = attachment.root {
                let who = format!("backend '{}'", attachment.origin.name());
                users.entry(root).or_default().push((who, attachment.origin.access()));
            }
        }
        let mut accesses = HashMap::new();
        for id in order {
            let mine = users.remove(id).unwrap_or_default();
            let Some(record) = self.nodes.get_mut(id) else { continue };
            check_users(record, &mine)?;
            let total = mine.iter().fold(Access::IDLE, |sum, (_, access)| sum.and(*access));
            accesses.insert(*id, total);
            let driver = record.node.driver();
            for edge in &mut record.edges {
                edge.access = driver.child_access(edge.role, total);
                let who = format!("child '{}' of node '{}'", edge.name, record.node.name());
                users.entry(edge.child).or_default().push((who, edge.access));
            }
        }
        Ok(accesses)
    }
}

/// Whether all users of one node get on (G3), and a read-only node has no writers.
fn check_users(record: &Record, users: &[(String, Access)]) -> Result<()> {
    use crate::permission::Permissions;
    for (index, (who, access)) in users.iter().enumerate() {
        let writes = access.needed & (Permissions::WRITE | Permissions::RESIZE);
        if !writes.is_empty() && (record.options.read_only || record.node.driver().is_read_only()) {
            let text = format!("the node is read-only, but {who} needs '{writes}'");
            return Err(Error::new(ErrorKind::ReadOnly, text).at_node(record.node.name()));
        }
        for (other, others) in &users[index + 1..] {
            let conflict = access.conflict(*others);
            if !conflict.is_empty() {
                let text = format!(
                    "{who} (needs '{}', shares '{}') and {other} (needs '{}', shares '{}') \
                     conflict over '{conflict}'",
                    access.needed, access.shared, others.needed, others.shared
                );
                return Err(
                    Error::new(ErrorKind::PermissionConflict, text).at_node(record.node.name())
                );
            }
        }
    }
    Ok(())
}

fn build_view(
    record: Record,
    access: Option<Access>,
    views: &BTreeMap<NodeId, Arc<NodeView>>,
) -> Result<NodeView> {
    let children: Vec<Arc<NodeView>> =
        record.edges.iter().filter_map(|edge| views.get(&edge.child).cloned()).collect();
    debug_assert_eq!(children.len(), record.edges.len(), "G2: children come before parents");
    let limits = children
        .iter()
        .fold(record.node.driver().limits(), |limits, child| limits.merge_child(&child.limits));
    if !limits.request_alignment.is_power_of_two() || !limits.memory_alignment.is_power_of_two() {
        let text = format!(
            "alignments must be powers of two, not {} (requests) and {} (memory)",
            limits.request_alignment, limits.memory_alignment
        );
        return Err(Error::new(ErrorKind::InvalidArgument, text).at_node(record.node.name()));
    }
    let access = access.unwrap_or(Access::IDLE);
    let Record { node, options, edges } = record;
    let listens = node.driver().debug_listener().is_some();
    let child_listens = children.iter().any(|child| child.listens);
    Ok(NodeView { node, options, edges, children, limits, access, listens, child_listens })
}

/// Whether two views are the same, all the way down (children are compared by identity, since
/// equal children are shared).
fn is_same(old: &NodeView, new: &NodeView) -> bool {
    let same_edge = |(a, b): (&Edge, &Edge)| {
        a.child == b.child && a.access == b.access && a.name == b.name && a.role == b.role
    };
    old.options == new.options
        && old.access == new.access
        && old.limits == new.limits
        && old.edges.len() == new.edges.len()
        && old.edges.iter().zip(&new.edges).all(same_edge)
        && old.children.iter().zip(&new.children).all(|(a, b)| Arc::ptr_eq(a, b))
}
