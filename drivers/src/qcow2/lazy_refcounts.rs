//! Refcounts that are written late.
//!
//! A write-back then leaves refcount blocks and the refcount table out, as long as not too many
//! blocks wait in memory. The image is marked dirty for that, and whoever opens it for writing
//! after a crash counts its clusters anew.
//!
//! - **Y1** The dirty bit is durable before a table entry is written whose increment is not (it
//!   stands in for W1 and W4).
//! - **Y2** It goes only after a write-back that left nothing out: when the image is closed, and
//!   when refcounts are to be written in time again.
//! - **Y3** What a cut or a rebuild of the refcount structures takes back is written in time
//!   (`shrink`, `make_empty`): a table must not name blocks that the file does not have.
//! - **Y4** The count of a new L2 table is written before the L1 entry changes that is to name it, as
//!   the peer has it: after a crash only data lacks its count.
//! - **Y5** The bit also stands over work whose middle a check would not call whole (COPIED flags
//!   that do not agree with counts, in `snapshot`); what cannot be made whole stays marked.

use super::Qcow2;
use super::header::{Header, Version, feature};
use super::integrity::write_features;
use super::open::Qcow2Options;
use blockplex_graph::{Child, Error, ErrorKind, Result};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};

/// Changed refcount blocks that may wait in memory.
const MANY_BLOCKS: usize = 32;

/// See the page.
pub(super) struct LazyRefcounts {
    wanted: AtomicBool,
    /// Whether the dirty bit is set: a [`Mark`].
    mark: AtomicU8,
    /// Refcounts were left out since the last round that left nothing out.
    owes: AtomicBool,
    /// How much work is under way, or was left, that needs the bit (Y5).
    holders: AtomicUsize,
}

/// What is known of the dirty bit in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Mark {
    /// It is clear.
    Clear = 0,
    /// It is set, durably.
    Set = 1,
    /// To set it or to clear it failed: it may be either.
    InDoubt = 2,
}

impl LazyRefcounts {
    pub(super) fn new(wanted: bool) -> LazyRefcounts {
        LazyRefcounts {
            wanted: AtomicBool::new(wanted),
            mark: AtomicU8::new(Mark::Clear as u8),
            owes: AtomicBool::new(false),
            holders: AtomicUsize::new(0),
        }
    }

    // Relaxed, everywhere here: `mark` is used with the turn of a round, and `wanted` is a flag
    // of its own.
    pub(super) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    pub(super) fn set_wanted(&self, wanted: bool) {
        self.wanted.store(wanted, Ordering::Relaxed);
    }

    fn is_held(&self) -> bool {
        self.holders.load(Ordering::Relaxed) > 0
    }

    fn mark(&self) -> Mark {
        match self.mark.load(Ordering::Relaxed) {
            0 => Mark::Clear,
            1 => Mark::Set,
            _ => Mark::InDoubt,
        }
    }
}

/// Whether refcounts are to be written late.
pub(super) fn wants_lazy(options: &Qcow2Options, header: &Header) -> Result<bool> {
    let in_image = header.compatible_features & feature::LAZY_REFCOUNTS != 0;
    let wanted = options.lazy_refcounts.unwrap_or(in_image);
    if wanted && header.version < Version::V3 {
        let text = "lazy-refcounts needs an image of version 3 (compat=1.1)";
        return Err(Error::new(ErrorKind::InvalidArgument, text));
    }
    Ok(wanted)
}

impl Qcow2 {
    /// Whether this round leaves the refcounts out; the image is marked dirty for that (Y1). With
    /// the turn of a round.
    pub(super) async fn defers_refcounts(&self, file: &Child) -> Result<bool> {
        let changed = self.refcounts.dirty_blocks();
        if !self.lazy.is_wanted() || changed == 0 || changed > MANY_BLOCKS {
            return Ok(false);
        }
        if self.lazy.mark() != Mark::Set {
            self.set_dirty_bit(file, true).await?;
        }
        Ok(true)
    }

    /// Y1: a round that leaves refcounts out has the dirty bit to stand in for them. With the turn.
    pub(super) fn assert_may_defer(&self, defers: bool) {
        debug_assert!(!defers || self.lazy.mark() == Mark::Set, "Y1: the image is not marked");
        if defers {
            self.lazy.owes.store(true, Ordering::Relaxed);
        }
    }

    /// A round that left nothing out has succeeded. With the turn.
    pub(super) fn nothing_deferred(&self) {
        self.lazy.owes.store(false, Ordering::Relaxed);
    }

    /// After a round that left nothing out: whether the mark is to go.
    pub(super) fn may_mark_clean(&self) -> bool {
        self.lazy.mark() != Mark::Clear && !self.lazy.is_wanted() && !self.lazy.is_held()
    }

    /// Marks the image, durably, until [`Qcow2::release_mark`] (Y5). Version 2 knows no mark.
    pub(super) async fn hold_mark(&self, file: &Child) -> Result<()> {
        if self.version < Version::V3 {
            return Ok(());
        }
        self.lazy.holders.fetch_add(1, Ordering::Relaxed);
        let held = self
            .between_rounds(async || match self.lazy.mark() {
                Mark::Set => Ok(()),
                _ => self.set_dirty_bit(file, true).await,
            })
            .await;
        if held.is_err() {
            self.release_mark();
        }
        held
    }

    /// The image is whole again: the next round may take the mark away (Y5).
    pub(super) fn release_mark(&self) {
        if self.version >= Version::V3 {
            self.lazy.holders.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Marks the image clean if it is marked dirty (Y2). With the turn, after a round that left
    /// nothing out.
    pub(super) async fn mark_clean(&self, file: &Child) -> Result<()> {
        if self.lazy.mark() == Mark::Clear || self.lazy.is_held() || self.is_broken() {
            return Ok(());
        }
        debug_assert!(!self.lazy.owes.load(Ordering::Relaxed), "Y2: refcounts were left out");
        self.set_dirty_bit(file, false).await
    }

    async fn set_dirty_bit(&self, file: &Child, dirty: bool) -> Result<()> {
        let mut header = self.header.lock().await;
        let before = header.incompatible_features;
        self.lazy.mark.store(Mark::InDoubt as u8, Ordering::Relaxed);
        header.incompatible_features =
            if dirty { before | feature::DIRTY } else { before & !feature::DIRTY };
        let written = match write_features(file, &header).await {
            Ok(()) => file.flush().await,
            failed => failed,
        };
        match &written {
            Ok(()) => {
                let mark = if dirty { Mark::Set } else { Mark::Clear };
                self.lazy.mark.store(mark as u8, Ordering::Relaxed);
            }
            Err(_) => header.incompatible_features = before,
        }
        written
    }
}
