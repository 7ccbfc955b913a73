//! A drained section: a set of gates held shut together.
//!
//! ```text
//!   Section::freeze ──► Frozen ──announce──► Section ──wait──► settled ──drop──► open again
//!   (counts go up;       │ drop               │ drop: at any time
//!    may be called       ▼                    ▼
//!    under a lock)      open again           open again
//! ```
//!
//! Two steps, because the graph reads the closure of a node and freezes its gates under one mutex,
//! so that the list is a snapshot, and nothing slow or foreign may run there: the barrier and the
//! hooks come after, in `announce`.
//!
//! T1. Each listed gate carries exactly one count of `frozen` for this section from the moment it is
//!     listed until the section ends, and, once announced, one of the hooks' level.
//! T2. The list only grows while the section lives ([`SectionRef::adopt`]); `settled` is a prefix of
//!     it and only grows.
//! T3. A gate counts as settled only after a `heavy` that followed its freeze (G2): the one in
//!     `announce` for all gates listed by then. A gate adopted later was settled by its adopter, and
//!     if nobody has seen it so, adoption makes the barrier itself.
//! T4. Sections are independent. They wait for requests, never for each other, and they hold no lock
//!     while they wait; so their order does not matter and drains of overlapping sets commute.
//! T5. An endless stream of submitters cannot starve a section: from the freeze on nothing more is
//!     admitted, so it waits for a fixed set of requests.

use crate::barrier;
use crate::blame::Holder;
use crate::gate::{Gate, wake_all};
use crate::ledger::monotonic_ns;
use crate::settle::Settle;
use crate::sync::Mutex;
use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

/// What a section, its `Frozen` stage and its references share.
#[derive(Default)]
struct Members {
    gates: Vec<Arc<Gate>>,
    /// T2: this many gates, from the first, have been seen settled.
    settled: usize,
    announced: bool,
    ended: bool,
}

/// Gates that are shut, and nothing more yet: no hook has run, nothing has been waited for.
/// Dropping it opens them again. May be sent to another thread.
#[must_use = "dropped at once, it has drained nothing"]
pub struct Frozen {
    section: Section,
}

/// A drained section: its gates admit nothing, and once it has settled nothing that they admitted
/// is left. Dropping it, settled or not, opens the gates again and ends their hooks. `Send + Sync`.
///
/// A section that waits for a request which (transitively) waits for the section never settles: do
/// not begin one from inside a request that one of its gates has admitted.
#[must_use = "dropped at once, it has drained nothing"]
pub struct Section {
    shared: SectionRef,
}

/// Lets a graph change extend a live section (frozen or announced), wherever the section itself is.
/// It keeps nothing shut.
#[derive(Clone)]
pub struct SectionRef {
    members: Arc<Mutex<Members>>,
}

impl Section {
    /// Shuts the gates, each once even if named twice. Takes nothing but each gate's own short lock
    /// and runs nothing foreign, so it may be called under a lock that makes several sections'
    /// freezes and graph changes one order.
    pub fn freeze(gates: impl IntoIterator<Item = Arc<Gate>>) -> Frozen {
        let mut seen = HashSet::new();
        let mut gates: Vec<_> = gates.into_iter().collect();
        gates.retain(|gate| seen.insert(Arc::as_ptr(gate)));
        gates.iter().for_each(|gate| gate.freeze());
        let members = Members { gates, ..Members::default() };
        let shared = SectionRef { members: Arc::new(Mutex::new(members)) };
        Frozen { section: Section { shared } }
    }

    /// Waits until the section has settled. Runs adopted gates' hooks if they are due. Any thread;
    /// several waits at once are fine. Cancel-safe: dropping the future gives up the wait, not the
    /// section.
    pub fn wait(&self) -> Settle<'_> {
        Settle::new(self)
    }

    /// Whether everything that the gates had admitted has ended and their hooks are ready. Once
    /// true it stays true until a gate is adopted that had not settled (which is an error of the
    /// adopter).
    pub fn is_settled(&self) -> bool {
        while let Some((index, gate)) = self.next_unsettled() {
            if !gate.is_settled() {
                return false;
            }
            self.mark_settled(index);
        }
        true
    }

    /// See [`SectionRef::adopt`].
    pub fn adopt(&self, gate: Arc<Gate>) -> bool {
        self.shared.adopt(gate)
    }

    /// A reference for a list of the live sections.
    pub fn reference(&self) -> SectionRef {
        self.shared.clone()
    }

    /// The gates held shut, in the order of the freeze, then of adoption.
    pub fn gates(&self) -> Vec<Arc<Gate>> {
        self.shared.gates()
    }

    /// Whether this section holds `gate` shut.
    pub fn covers(&self, gate: &Gate) -> bool {
        self.shared.covers(gate)
    }

    /// Whom the section waits for, now: every slot of its gates that counts a request. Reads only
    /// what the owners left behind, so a stuck loop is named too. Any thread; a mere report (it may
    /// be out of date, see [`Holder`]).
    pub fn holders(&self) -> Vec<Holder> {
        self.holders_at(monotonic_ns())
    }

    /// [`Section::holders`] with ages up to `now_ns`, for callers whose requests run on another
    /// clock than [`monotonic_ns`].
    pub fn holders_at(&self, now_ns: u64) -> Vec<Holder> {
        let gates = self.gates();
        gates.iter().flat_map(|gate| Holder::of_gate(gate, now_ns)).collect()
    }

    /// The first gate not yet seen settled. The member list is unlocked again on return: what is
    /// done with the gate may run hooks.
    pub(crate) fn next_unsettled(&self) -> Option<(usize, Arc<Gate>)> {
        let members = self.shared.members.lock();
        let index = members.settled;
        Some((index, members.gates.get(index)?.clone()))
    }

    pub(crate) fn mark_settled(&self, index: usize) {
        let mut members = self.shared.members.lock();
        // Another wait on this section may have been faster.
        members.settled = members.settled.max(index + 1);
    }
}

impl Frozen {
    /// Makes the freeze effective, with one barrier for all gates, and runs the hooks'
    /// `drain_begin` in the order of the gates. Not to be called under a lock that a hook could
    /// want. Does not wait.
    pub fn announce(self) -> Section {
        let section = self.section;
        let gates = {
            let mut members = section.shared.members.lock();
            members.announced = true;
            members.gates.iter().for_each(|gate| gate.announce());
            members.gates.clone()
        };
        barrier::heavy();
        gates.iter().for_each(|gate| gate.run_hooks());
        section
    }

    /// A reference for a list of the live sections: a graph change that commits before `announce`
    /// extends this section too.
    pub fn reference(&self) -> SectionRef {
        self.section.reference()
    }

    /// The gates held shut.
    pub fn gates(&self) -> Vec<Arc<Gate>> {
        self.section.gates()
    }
}

impl SectionRef {
    /// Inheritance: a graph change has made `gate`'s origin reach a node that this section drains,
    /// so the section holds it shut too, from now until it ends. The caller holds the gate shut and
    /// settled by a section of its own, or the origin is newborn and frozen; so nothing has to be
    /// waited for. Calls no hook, and may be called under the lock described at
    /// [`Section::freeze`]. False: the section has ended, or lists the gate already.
    pub fn adopt(&self, gate: Arc<Gate>) -> bool {
        let mut members = self.members.lock();
        if members.ended || members.lists(&gate) {
            return false;
        }
        let seen_idle = gate.freeze_inherited();
        if members.announced {
            gate.announce();
            if !seen_idle {
                // T3. Rare, and still no more than a system call.
                barrier::heavy();
            }
        }
        members.gates.push(gate);
        true
    }

    /// Whether the section still holds its gates shut.
    pub fn is_active(&self) -> bool {
        !self.members.lock().ended
    }

    /// Whether the section holds `gate` shut.
    pub fn covers(&self, gate: &Gate) -> bool {
        self.members.lock().lists(gate)
    }

    fn gates(&self) -> Vec<Arc<Gate>> {
        self.members.lock().gates.clone()
    }

    /// T1's other end: opens all gates, wakes who waited for that, then ends the hooks, the last
    /// gate's first. Idempotent.
    fn end(&self) {
        let (gates, announced) = {
            let mut members = self.members.lock();
            members.ended = true;
            members.settled = 0;
            (std::mem::take(&mut members.gates), members.announced)
        };
        // All gates first: a woken request of one origin may lead to another's.
        let blocked: Vec<_> = gates.iter().flat_map(|gate| gate.thaw(announced)).collect();
        wake_all(blocked);
        gates.iter().rev().for_each(|gate| gate.run_hooks());
    }
}

impl Members {
    fn lists(&self, gate: &Gate) -> bool {
        self.gates.iter().any(|listed| std::ptr::eq(Arc::as_ptr(listed), gate))
    }
}

impl Drop for Section {
    fn drop(&mut self) {
        self.shared.end();
    }
}

impl fmt::Debug for SectionRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let members = self.members.lock();
        let names: Vec<_> = members.gates.iter().map(|gate| gate.name()).collect();
        f.debug_struct("SectionRef")
            .field("gates", &names)
            .field("settled", &members.settled)
            .field("announced", &members.announced)
            .field("ended", &members.ended)
            .finish()
    }
}

impl fmt::Debug for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Section").field(&self.shared).finish()
    }
}

impl fmt::Debug for Frozen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Frozen").field(&self.section.shared).finish()
    }
}

#[cfg(all(test, not(loom), not(shuttle)))]
mod tests;
