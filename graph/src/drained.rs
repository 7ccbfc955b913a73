//! Drained sections over the graph, and the proof that a change demands.

use crate::block_graph::BlockGraph;
use crate::error::{Error, ErrorKind, Result};
use crate::node::NodeId;
use crate::origin::OriginId;
use crate::topology::Topology;
use blockplex_drain::{Holder, Section};
use std::collections::BTreeSet;
use std::fmt;
use std::future::Future;
use std::pin::pin;
use std::task::Poll;

/// What a drained section is about.
#[derive(Clone, Debug)]
pub enum Scope {
    /// These nodes: no request reaches any of them. Their children may have other users, who go
    /// on.
    Nodes(BTreeSet<NodeId>),
    /// A node and everything below it.
    Subtree(NodeId),
    /// One origin, whatever it reaches.
    Origin(OriginId),
    /// Everything, origins that are added later included.
    Everything,
}

impl Scope {
    /// One node.
    pub fn node(id: NodeId) -> Scope {
        Scope::Nodes(BTreeSet::from([id]))
    }

    /// The origins that must rest. An error names a node that does not exist.
    pub(crate) fn origins(&self, topology: &Topology) -> Result<BTreeSet<OriginId>> {
        let known = |id: &NodeId| {
            topology.node(*id).map(|_| *id).ok_or_else(|| {
                Error::new(ErrorKind::NotFound, format!("{id:?} is not part of the graph"))
            })
        };
        match self {
            Scope::Nodes(ids) => {
                let ids = ids.iter().map(known).collect::<Result<Vec<_>>>()?;
                Ok(topology.closure(ids))
            }
            Scope::Subtree(id) => Ok(topology.closure(topology.subtree(known(id)?))),
            Scope::Origin(id) if topology.has_origin(*id) => Ok(BTreeSet::from([*id])),
            Scope::Origin(id) => {
                let text = format!("{id:?} is not part of the graph");
                Err(Error::new(ErrorKind::NotFound, text))
            }
            Scope::Everything => Ok(topology.origins().map(|origin| origin.id()).collect()),
        }
    }
}

/// A drained section that has begun. New requests wait; those admitted before may still run.
/// Ends when dropped.
#[must_use = "the section ends when this is dropped"]
pub struct DrainedSection {
    graph: BlockGraph,
    id: u64,
    scope: Scope,
    section: Section,
}

impl DrainedSection {
    pub(crate) fn new(
        graph: BlockGraph,
        id: u64,
        scope: Scope,
        section: Section,
    ) -> DrainedSection {
        DrainedSection { graph, id, scope, section }
    }

    /// Who still keeps the section from settling: request, node and age. Any thread; the answer
    /// is a snapshot.
    pub fn holders(&self) -> Vec<Holder> {
        self.section.holders()
    }

    /// Whether nothing runs any more.
    pub fn is_settled(&self) -> bool {
        self.section.is_settled()
    }

    /// Waits until the last admitted request has ended. Dropping the future ends the section.
    pub async fn settle(self) -> Drained {
        self.section.wait().await;
        Drained(self)
    }

    /// As [`settle`](DrainedSection::settle), until `deadline` completes first (a timer, say):
    /// then the section has ended, requests go on, and the error tells who held it.
    pub async fn settle_before(self, deadline: impl Future<Output = ()>) -> Result<Drained> {
        let mut deadline = pin!(deadline);
        let settled = {
            let mut settle = pin!(self.section.wait());
            std::future::poll_fn(|cx| {
                if settle.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(true);
                }
                deadline.as_mut().poll(cx).map(|()| false)
            })
            .await
        };
        if settled {
            return Ok(Drained(self));
        }
        let text = format!("the drained section did not settle; held by {}", self.blame());
        Err(Error::new(ErrorKind::TimedOut, text))
    }

    /// The holders in words, with the names of their nodes.
    fn blame(&self) -> String {
        let holders = self.holders();
        let topology = self.graph.topology();
        let numbers: BTreeSet<u32> = holders
            .iter()
            .flat_map(|holder| &holder.requests)
            .map(|request| request.node)
            .collect();
        let named = topology.nodes().filter(|view| numbers.contains(&view.id().number()));
        let names: Vec<String> =
            named.map(|view| format!("node {} is '{}'", view.id().number(), view.name())).collect();
        let holders: Vec<String> = holders.iter().map(Holder::to_string).collect();
        format!("{} ({})", holders.join("; "), names.join(", "))
    }
}

impl Drop for DrainedSection {
    fn drop(&mut self) {
        // The section itself ends (thaws, and calls the hooks) right after, as it is dropped.
        self.graph.forget_section(self.id);
    }
}

impl fmt::Debug for DrainedSection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DrainedSection")
            .field("scope", &self.scope)
            .field("settled", &self.is_settled())
            .finish_non_exhaustive()
    }
}

/// Proof that no request reaches the nodes of a scope, and none will until it is dropped.
/// Only a settled section makes one; [`Transaction::commit`](crate::Transaction::commit) demands
/// one.
#[must_use = "the section ends when this is dropped"]
#[derive(Debug)]
pub struct Drained(DrainedSection);

impl Drained {
    /// The graph that it is about.
    pub(crate) fn graph(&self) -> &BlockGraph {
        &self.0.graph
    }

    /// Whether every one of `origins` rests.
    pub(crate) fn covers(&self, origins: &BTreeSet<OriginId>) -> bool {
        debug_assert!(self.0.is_settled(), "a drained section stays settled");
        self.graph().section_covers(self.0.id, origins)
    }
}
