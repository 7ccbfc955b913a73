//! The graph as a shared thing: publication, the registry of drained sections, the entry points.
//!
//! Readers load one version from an `ArcSwap` and never wait. The master lock (L5) is held for
//! microseconds, by the control plane only: to freeze the origins of a section, to register it,
//! and to publish. The transaction lock (L1) is a coroutine lock, held across drains; no I/O and
//! no plain drain ever takes it.

use crate::drained::{Drained, DrainedSection, Scope};
use crate::error::Result;
use crate::node::NodeId;
use crate::origin::OriginId;
use crate::topology::Topology;
use crate::transaction::Transaction;
use arc_swap::ArcSwap;
use blockplex_drain::{Gate, Section, SectionRef};
use blockplex_io::lock::CoMutex;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// A graph of nodes. Cloning gives another handle to the same graph; any thread may hold one.
#[derive(Clone)]
pub struct BlockGraph {
    pub(crate) shared: Arc<Shared>,
}

pub(crate) struct Shared {
    /// The only place where a version is published.
    pub(crate) published: ArcSwap<Topology>,
    /// L1: serialises those who plan changes.
    pub(crate) transactions: CoMutex<()>,
    /// L5: see the page.
    pub(crate) master: Mutex<Master>,
}

/// What the master lock guards.
#[derive(Default)]
pub(crate) struct Master {
    sections: BTreeMap<u64, ActiveSection>,
    next_section: u64,
}

/// A drained section that has not ended.
struct ActiveSection {
    scope: Scope,
    origins: BTreeSet<OriginId>,
    section: SectionRef,
}

impl Default for BlockGraph {
    fn default() -> BlockGraph {
        BlockGraph::new()
    }
}

impl BlockGraph {
    /// An empty graph.
    pub fn new() -> BlockGraph {
        let shared = Shared {
            published: ArcSwap::from_pointee(Topology::default()),
            transactions: CoMutex::new(()),
            master: Mutex::new(Master::default()),
        };
        BlockGraph { shared: Arc::new(shared) }
    }

    /// The version that is current now. Any thread; never waits.
    pub fn topology(&self) -> Arc<Topology> {
        self.shared.published.load_full()
    }

    /// Begins a change of the graph. Waits for other changes to end, in order. Any thread; not
    /// from inside a request. Dropping the transaction leaves no trace.
    pub async fn begin(&self) -> Transaction<'_> {
        let turn = self.shared.transactions.lock().await;
        Transaction::new(self, turn)
    }

    /// Begins a drained section: from now on, requests that would reach a node of `scope` wait.
    /// Does not wait itself. Any thread. The section ends when the result is dropped.
    pub fn begin_drain(&self, scope: Scope) -> Result<DrainedSection> {
        self.begin_drain_with(scope, BTreeSet::new())
    }

    /// Begins a drained section and waits until the last request of `scope` has ended. Any
    /// thread, any loop; not from inside a request of that scope. Dropping the future ends the
    /// section.
    pub async fn drain(&self, scope: Scope) -> Result<Drained> {
        Ok(self.begin_drain(scope)?.settle().await)
    }

    /// As `begin_drain`, with origins that are to rest in any case.
    pub(crate) fn begin_drain_with(
        &self,
        scope: Scope,
        extra: BTreeSet<OriginId>,
    ) -> Result<DrainedSection> {
        let mut master = self.shared.master.lock();
        let topology = self.shared.published.load();
        let mut origins = scope.origins(&topology)?;
        origins.extend(extra);
        let gates = origins.iter().filter_map(|id| topology.origin(*id));
        let frozen = Section::freeze(gates.map(|origin| origin.gate().clone()));
        let id = master.next_section;
        master.next_section += 1;
        drop(topology);
        let active = ActiveSection { scope: scope.clone(), origins, section: frozen.reference() };
        master.sections.insert(id, active);
        drop(master);
        // Hooks and the barrier come after the lock: they may take their time.
        let section = frozen.announce();
        Ok(DrainedSection::new(self.clone(), id, scope, section))
    }

    /// Forgets a section that is about to end: no later version adds origins to it.
    pub(crate) fn forget_section(&self, id: u64) {
        self.shared.master.lock().sections.remove(&id);
    }

    /// Whether section `id` keeps every one of `origins` from running.
    pub(crate) fn section_covers(&self, id: u64, origins: &BTreeSet<OriginId>) -> bool {
        let master = self.shared.master.lock();
        master.sections.get(&id).is_some_and(|active| active.origins.is_superset(origins))
    }

    /// Publishes `next`: every section takes over the origins that now reach its scope, then the
    /// version is swapped in, then the affected origins' queues are told.
    pub(crate) fn publish(&self, next: Topology, affected: &BTreeSet<OriginId>) {
        let mut master = self.shared.master.lock();
        for active in master.sections.values_mut() {
            // A scope whose nodes are all gone keeps the origins that it has.
            let reached = active.scope.origins(&next).unwrap_or_default();
            for id in reached {
                if let Some(origin) = next.origin(id)
                    && active.origins.insert(id)
                {
                    active.section.adopt(origin.gate().clone());
                }
            }
        }
        let next = Arc::new(next);
        let previous = self.shared.published.swap(next.clone());
        for id in affected {
            for topology in [&previous, &next] {
                if let Some(origin) = topology.origin(*id) {
                    origin.gate().bump_generation();
                }
            }
        }
    }

    /// The gates that `nodes` concern now, for reports.
    pub fn gates_of(&self, nodes: impl IntoIterator<Item = NodeId>) -> Vec<Arc<Gate>> {
        let topology = self.topology();
        let origins = topology.closure(nodes);
        origins.iter().filter_map(|id| topology.origin(*id)).map(|o| o.gate().clone()).collect()
    }
}

impl std::fmt::Debug for BlockGraph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let topology = self.topology();
        f.debug_struct("BlockGraph")
            .field("version", &topology.version())
            .field(
                "nodes",
                &topology.nodes().map(|view| view.name().to_owned()).collect::<Vec<_>>(),
            )
            .finish_non_exhaustive()
    }
}
