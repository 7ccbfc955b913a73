//! Changes of the graph: several at once, checked together, published in one step or not at all.
//!
//! A transaction plans on a private copy of the graph. It then needs a [`Drained`] proof that the
//! nodes it touches are at rest, asks the drivers to take what the new permissions need, and
//! publishes. Whatever fails before that leaves no trace.
//!
//! ```
//! # use blockplex_graph::*;
//! # async fn example(graph: BlockGraph, filter: NodeId, node: NodeId) -> Result<()> {
//! let mut change = graph.begin().await;
//! change.insert_filter(node, filter)?;
//! let drained = change.drain().await?;
//! change.commit(&drained).await
//! # }
//! ```
//!
//! Without the proof it does not compile:
//!
//! ```compile_fail
//! # use blockplex_graph::*;
//! # async fn example(graph: BlockGraph, filter: NodeId, node: NodeId) -> Result<()> {
//! let mut change = graph.begin().await;
//! change.insert_filter(node, filter)?;
//! change.commit().await
//! # }
//! ```

use crate::block_graph::BlockGraph;
use crate::drained::{Drained, Scope};
use crate::driver::{AccessChange, Driver, PreparedReopen, Role};
use crate::error::{Error, ErrorKind, Result};
use crate::node::{Edge, Node, NodeId, NodeOptions, NodeView, check_node_name};
use crate::origin::{Origin, OriginId};
use crate::path::NodeIo;
use crate::permission::Access;
use crate::topology::{Attachment, Draft, Record, Topology};
use blockplex_drain::{DrainHooks, Gate, Section};
use blockplex_io::event_loop::Local;
use blockplex_io::lock::CoMutexGuard;
use std::any::Any;
use std::collections::BTreeSet;
use std::sync::Arc;

/// A planned change of the graph. See the page of this module.
#[must_use = "a transaction that is not committed leaves no trace"]
pub struct Transaction<'g> {
    graph: &'g BlockGraph,
    _turn: CoMutexGuard<'g, ()>,
    base: Arc<Topology>,
    draft: Draft,
    touched: BTreeSet<NodeId>,
    touched_origins: BTreeSet<OriginId>,
    prepared: Vec<Box<dyn PreparedReopen>>,
    removed: Vec<Arc<NodeView>>,
    /// New origins are born at rest: a section that adopts one at commit finds it drained.
    newborn: Vec<Section>,
}

impl<'g> Transaction<'g> {
    pub(crate) fn new(graph: &'g BlockGraph, turn: CoMutexGuard<'g, ()>) -> Transaction<'g> {
        let base = graph.topology();
        Transaction {
            graph,
            _turn: turn,
            draft: base.draft(),
            base,
            touched: BTreeSet::new(),
            touched_origins: BTreeSet::new(),
            prepared: Vec::new(),
            removed: Vec::new(),
            newborn: Vec::new(),
        }
    }

    /// Adds a node without parents. `children` are its edges, in the driver's order. Without a
    /// name it gets one that no caller can give (`#block7`).
    pub fn add_node(
        &mut self,
        name: Option<&str>,
        driver: Box<dyn Driver>,
        options: NodeOptions,
        children: &[(Role, NodeId)],
    ) -> Result<NodeId> {
        let id = NodeId::next();
        let name = match name {
            Some(name) => check_node_name(name).map(|()| name.to_owned())?,
            None => format!("#block{}", id.number()),
        };
        if self.draft.nodes.values().any(|record| record.node.name() == name) {
            let text = format!("there is a node named '{name}' already");
            return Err(Error::new(ErrorKind::Exists, text));
        }
        let edges = children.iter().map(|(role, child)| new_edge(*role, *child)).collect();
        let node = Node::new(id, name, driver);
        self.draft.nodes.insert(id, Record { node, options, edges });
        Ok(id)
    }

    /// Removes a node that nothing uses. Its driver's last I/O runs at commit, on the loop that
    /// commits.
    pub fn remove_node(&mut self, id: NodeId) -> Result<()> {
        let record = self.record(id)?;
        let name = record.node.name().to_owned();
        let user = self.draft.nodes.values().find(|r| r.edges.iter().any(|e| e.child == id));
        let origin = self.draft.origins.values().find(|a| a.root == Some(id));
        if let Some(user) = user.map(|record| record.node.name()) {
            let text = format!("node '{user}' uses it");
            return Err(Error::new(ErrorKind::Busy, text).at_node(&name));
        }
        if let Some(origin) = origin.map(|attachment| attachment.origin.name()) {
            let text = format!("backend '{origin}' uses it");
            return Err(Error::new(ErrorKind::Busy, text).at_node(&name));
        }
        self.draft.nodes.remove(&id);
        self.touched.insert(id);
        self.removed.extend(self.base.node(id).cloned());
        Ok(())
    }

    /// Attaches a further child to a node; gives the index of the edge.
    pub fn attach(&mut self, parent: NodeId, role: Role, child: NodeId) -> Result<usize> {
        self.record(child)?;
        let record = self.record_mut(parent)?;
        record.edges.push(new_edge(role, child));
        Ok(record.edges.len() - 1)
    }

    /// Takes the last child away from a node.
    pub fn detach(&mut self, parent: NodeId, child: NodeId) -> Result<()> {
        let record = self.record_mut(parent)?;
        let index = record.edges.iter().rposition(|edge| edge.child == child).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("{child:?} is not a child"))
                .at_node(record.node.name())
        })?;
        record.edges.remove(index);
        Ok(())
    }

    /// Puts `new` where `old` is a child of `parent`.
    pub fn replace_child(&mut self, parent: NodeId, old: NodeId, new: NodeId) -> Result<()> {
        self.record(new)?;
        let record = self.record_mut(parent)?;
        let edge = record.edges.iter_mut().find(|edge| edge.child == old).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("{old:?} is not a child"))
                .at_node(record.node.name())
        })?;
        edge.child = new;
        Ok(())
    }

    /// Puts `new` in the place of `old` for every parent and origin of `old`, except where that
    /// would make a loop: what `new` itself reaches keeps `old`.
    pub fn replace_node(&mut self, old: NodeId, new: NodeId) -> Result<()> {
        self.record(old)?;
        self.record(new)?;
        let below = self.below(new);
        let mut changed = Vec::new();
        for (id, record) in &mut self.draft.nodes {
            if below.contains(id) {
                continue;
            }
            for edge in record.edges.iter_mut().filter(|edge| edge.child == old) {
                edge.child = new;
                changed.push(*id);
            }
        }
        self.touched.extend(changed);
        for (id, attachment) in &mut self.draft.origins {
            if attachment.root == Some(old) {
                attachment.root = Some(new);
                self.touched_origins.insert(*id);
            }
        }
        self.touched.extend([old, new]);
        Ok(())
    }

    /// Puts `filter`, a node that has `below` as its child, between `below` and its parents.
    pub fn insert_filter(&mut self, below: NodeId, filter: NodeId) -> Result<()> {
        let record = self.record(filter)?;
        if !record.edges.iter().any(|edge| edge.child == below) {
            let text = format!("the filter is not above {below:?}");
            return Err(Error::new(ErrorKind::InvalidArgument, text).at_node(record.node.name()));
        }
        self.replace_node(below, filter)
    }

    /// Takes a filter out: its parents get its (only) child. The filter stays as a node that
    /// nothing uses and that uses nothing.
    pub fn drop_filter(&mut self, filter: NodeId) -> Result<()> {
        let record = self.record(filter)?;
        let [edge] = record.edges.as_slice() else {
            let text = format!("a filter has one child, not {}", record.edges.len());
            return Err(Error::new(ErrorKind::InvalidArgument, text).at_node(record.node.name()));
        };
        let child = edge.child;
        self.record_mut(filter)?.edges.clear();
        self.replace_node(filter, child)
    }

    /// Adds an origin without a root. `hooks` are told when it is to rest; for the first time at
    /// once, since it is born at rest and goes on when the transaction ends.
    pub fn add_origin(
        &mut self,
        name: &str,
        access: Access,
        hooks: Option<Box<dyn DrainHooks>>,
    ) -> Arc<Origin> {
        let gate = Gate::new(format!("backend '{name}'"), hooks);
        self.newborn.push(Section::freeze([gate.clone()]).announce());
        let origin = Origin::new(name.to_owned(), access, gate);
        let attachment = Attachment { origin: origin.clone(), root: None };
        self.draft.origins.insert(origin.id(), attachment);
        origin
    }

    /// Sets or clears the root of an origin.
    pub fn set_root(&mut self, origin: OriginId, root: Option<NodeId>) -> Result<()> {
        if let Some(root) = root {
            self.record(root)?;
            self.touched.insert(root);
        }
        let attachment = self.draft.origins.get_mut(&origin).ok_or_else(|| no_origin(origin))?;
        attachment.root = root;
        self.touched_origins.insert(origin);
        Ok(())
    }

    /// Removes an origin: requests that still wait at its gate end with `NoMedium`.
    pub fn remove_origin(&mut self, origin: OriginId) -> Result<()> {
        self.draft.origins.remove(&origin).ok_or_else(|| no_origin(origin))?;
        self.touched_origins.insert(origin);
        Ok(())
    }

    /// Changes the options that every node has.
    pub fn set_options(&mut self, node: NodeId, options: NodeOptions) -> Result<()> {
        self.record_mut(node)?.options = options;
        Ok(())
    }

    /// Prepares new options of a node's driver; they take effect at commit. Runs on a loop.
    pub async fn reopen(&mut self, node: NodeId, options: Box<dyn Any>) -> Result<()> {
        let Some(view) = self.base.node(node).cloned() else {
            return Err(Error::new(ErrorKind::NotFound, format!("{node:?} was not there before")));
        };
        let local = loop_for("reopening a node")?;
        let io = NodeIo::for_control(&local, &view);
        let prepared = view.driver().reopen(&io, options).await?;
        self.prepared.push(prepared);
        self.touched.insert(node);
        Ok(())
    }

    /// The nodes whose surroundings the plan changes and which exist already.
    pub fn touched(&self) -> BTreeSet<NodeId> {
        self.touched.iter().filter(|id| self.base.node(**id).is_some()).copied().collect()
    }

    /// Drains what the plan touches, and nothing else.
    pub async fn drain(&self) -> Result<Drained> {
        let origins = self.touched_origins.iter().filter(|id| self.base.has_origin(**id));
        let origins = origins.copied().collect();
        let section = self.graph.begin_drain_with(Scope::Nodes(self.touched()), origins)?;
        Ok(section.settle().await)
    }

    /// Checks the plan and publishes it. On an error nothing has changed, with one exception: a
    /// removed node whose last I/O fails is removed all the same, and the error says so.
    ///
    /// Do not drop the future once it was polled: removed nodes would miss their last I/O.
    pub async fn commit(self, proof: &Drained) -> Result<()> {
        let local = if self.removed.is_empty() { None } else { Some(loop_for("removing a node")?) };
        let Transaction { graph, base, draft, touched, touched_origins, prepared, removed, .. } =
            &mut { self };
        let next = std::mem::take(draft).seal(base)?;
        let mut before = base.closure(touched.iter().copied());
        before.extend(touched_origins.iter().filter(|id| base.has_origin(**id)));
        if !Arc::ptr_eq(&proof.graph().shared, &graph.shared) || !proof.covers(&before) {
            let text = "the drained section does not cover every node that the change touches";
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
        let changes = AccessChanges::prepare(base, &next)?;
        let mut affected = next.closure(touched.iter().copied());
        affected.extend(before);
        affected.extend(touched_origins.iter());
        graph.publish(next, &affected);
        if !prepared.is_empty() {
            prepared.drain(..).for_each(|change| change.commit());
            // Limits may have changed with the options: the same graph once more, with the new
            // ones. It was sound a moment ago, so this cannot fail.
            let current = graph.topology();
            let again = current.draft().seal(&current)?;
            graph.publish(again, &affected);
        }
        changes.commit();
        match local {
            Some(local) => close_all(&local, removed).await,
            None => Ok(()),
        }
    }

    fn record(&self, id: NodeId) -> Result<&Record> {
        self.draft.nodes.get(&id).ok_or_else(|| no_node(id))
    }

    fn record_mut(&mut self, id: NodeId) -> Result<&mut Record> {
        self.touched.insert(id);
        self.draft.nodes.get_mut(&id).ok_or_else(|| no_node(id))
    }

    /// What `start` reaches in the plan, itself included.
    fn below(&self, start: NodeId) -> BTreeSet<NodeId> {
        let mut found = BTreeSet::new();
        let mut pending = vec![start];
        while let Some(id) = pending.pop() {
            if found.insert(id) {
                let edges = self.draft.nodes.get(&id).map(|record| &record.edges);
                pending.extend(edges.into_iter().flatten().map(|edge| edge.child));
            }
        }
        found
    }
}

/// The drivers' part of a change: taken before publication, settled after it.
struct AccessChanges(Vec<(Arc<Node>, Access, Access)>);

impl AccessChanges {
    /// Asks every driver whose parents need something else than before. On an error those asked
    /// before are told that it did not happen, last first.
    fn prepare(base: &Topology, next: &Topology) -> Result<AccessChanges> {
        let mut done = AccessChanges(Vec::new());
        for view in next.nodes() {
            let old = base.node(view.id()).map_or(Access::IDLE, |old| old.access());
            if old == view.access() && base.node(view.id()).is_some() {
                continue;
            }
            let asked = view.driver().access_changed(AccessChange::Prepare(view.access()));
            if let Err(error) = asked {
                for (node, old, _) in done.0.iter().rev() {
                    settle(node, AccessChange::Abort(*old));
                }
                return Err(error.at_node(view.name()));
            }
            done.0.push((view.node().clone(), old, view.access()));
        }
        Ok(done)
    }

    fn commit(self) {
        for (node, _, new) in &self.0 {
            settle(node, AccessChange::Commit(*new));
        }
    }
}

/// A step that a driver may not refuse.
fn settle(node: &Node, change: AccessChange) {
    if let Err(error) = node.driver().access_changed(change) {
        tracing::error!(node = node.name(), %error, "a driver refused to settle its access");
    }
}

async fn close_all(local: &Local, removed: &[Arc<NodeView>]) -> Result<()> {
    let mut first_error = None;
    for view in removed {
        let io = NodeIo::for_control(local, view);
        if let Err(error) = view.driver().close(&io).await {
            // The caller is told of the first one.
            tracing::warn!(node = view.name(), %error, "the last I/O of a removed node failed");
            first_error.get_or_insert(error.during("close").at_node(view.name()));
        }
    }
    first_error.map_or(Ok(()), Err)
}

fn new_edge(role: Role, child: NodeId) -> Edge {
    Edge { name: role.name().to_owned(), role, child, access: Access::IDLE }
}

fn no_node(id: NodeId) -> Error {
    Error::new(ErrorKind::NotFound, format!("{id:?} is not part of the graph"))
}

fn no_origin(id: OriginId) -> Error {
    Error::new(ErrorKind::NotFound, format!("{id:?} is not part of the graph"))
}

fn loop_for(what: &'static str) -> Result<Local> {
    blockplex_io::event_loop::current().ok_or_else(|| {
        let text = format!("{what} does I/O and must run on an event loop");
        Error::new(ErrorKind::InvalidArgument, text)
    })
}
