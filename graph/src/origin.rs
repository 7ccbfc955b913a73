//! Origins: whatever starts I/O by itself (a backend, a job, a driver's background task).
//!
//! Requests are counted here and nowhere else: nested I/O runs under the admission of the request
//! that caused it. A node is at rest when every origin that reaches it is.

use crate::account::{Accounts, Statistics};
use crate::permission::Access;
use blockplex_drain::Gate;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Identity of an origin; never reused in one process.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OriginId(u32);

impl fmt::Debug for OriginId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "origin {}", self.0)
    }
}

/// One origin. Made by [`Transaction::add_origin`](crate::Transaction::add_origin).
pub struct Origin {
    id: OriginId,
    name: String,
    access: Access,
    gate: Arc<Gate>,
    pub(crate) accounts: Accounts,
}

impl Origin {
    pub(crate) fn new(name: String, access: Access, gate: Arc<Gate>) -> Arc<Origin> {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        // Relaxed: only the uniqueness of the number matters.
        let id = OriginId(NEXT.fetch_add(1, Ordering::Relaxed));
        Arc::new(Origin { id, name, access, gate, accounts: Accounts::default() })
    }

    /// Its identity.
    pub fn id(&self) -> OriginId {
        self.id
    }

    /// Its name in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it needs of its root node, and lets others do.
    pub fn access(&self) -> Access {
        self.access
    }

    /// What it has served. Any thread.
    pub fn statistics(&self) -> Statistics {
        self.accounts.statistics()
    }

    /// The gate that its requests pass.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }
}

impl fmt::Debug for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} '{}'", self.id, self.name)
    }
}
