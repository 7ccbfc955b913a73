//! Which discards reach the file that holds the clusters.
//!
//! | option | default | says for what |
//! |---|---|---|
//! | `pass-discard-request` | on | the guest's discards, and zeros that may unmap; both come here only if the node has `discard=unmap` |
//! | `pass-discard-snapshot` | on | what a deleted snapshot leaves |
//! | `pass-discard-other` | off | everything else, tables among it |
//! | `discard-no-unref` | off | erased clusters keep their place, so that the image does not fragment |
//!
//! All can be changed while the image is open.

use super::Qcow2;
use super::entry::Version;
use super::open::Qcow2Options;
use blockplex_graph::{Error, ErrorKind, Result};
use std::sync::atomic::{AtomicBool, Ordering};

/// Why clusters are not needed any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DiscardReason {
    /// The guest said so.
    Request,
    /// A snapshot was deleted.
    Snapshot,
    /// Anything else.
    Other,
}

/// See the page.
#[derive(Debug)]
pub(super) struct DiscardRules {
    request: AtomicBool,
    snapshot: AtomicBool,
    other: AtomicBool,
    no_unref: AtomicBool,
}

impl DiscardRules {
    pub(super) fn new(options: &Qcow2Options) -> DiscardRules {
        DiscardRules {
            request: AtomicBool::new(options.pass_discard_request.unwrap_or(true)),
            snapshot: AtomicBool::new(options.pass_discard_snapshot.unwrap_or(true)),
            other: AtomicBool::new(options.pass_discard_other.unwrap_or(false)),
            no_unref: AtomicBool::new(options.discard_no_unref.unwrap_or(false)),
        }
    }

    /// Refuses rules that an image of this version cannot follow.
    pub(super) fn check(options: &Qcow2Options, version: Version) -> Result<()> {
        if options.discard_no_unref == Some(true) && version < Version::V3 {
            let text = "discard-no-unref needs version 3: version 2 has no zero clusters";
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
        Ok(())
    }

    /// Takes over other rules.
    pub(super) fn set(&self, rules: &DiscardRules) {
        let pairs = [
            (&self.request, &rules.request),
            (&self.snapshot, &rules.snapshot),
            (&self.other, &rules.other),
            (&self.no_unref, &rules.no_unref),
        ];
        for (old, new) in pairs {
            // Relaxed, here and below: each rule stands alone.
            old.store(new.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// Whether erased clusters keep their place.
    pub(super) fn keeps_places(&self) -> bool {
        self.no_unref.load(Ordering::Relaxed)
    }
}

impl Qcow2 {
    /// Whether the file is told of clusters that are not needed any more.
    pub(super) fn passes_discard(&self, reason: DiscardReason) -> bool {
        let rule = match reason {
            DiscardReason::Request => &self.discards.request,
            DiscardReason::Snapshot => &self.discards.snapshot,
            DiscardReason::Other => &self.discards.other,
        };
        rule.load(Ordering::Relaxed)
    }
}
