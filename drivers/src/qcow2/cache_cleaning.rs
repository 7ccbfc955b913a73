//! What was not used for a while leaves the caches.
//!
//! A task of the loop that opened the image (or gave it new options) comes by every so often. It
//! holds nothing of the image while it sleeps, does no I/O, and takes the caches' own locks for the
//! time of a pass (Q12): neither a drain nor closing waits for it. What is dirty or in use stays.

use super::open::Qcow2Options;
use super::refcounts::Refcounts;
use super::slice_cache::SliceCache;
use blockplex_graph::{Error, ErrorKind, Result};
use blockplex_io::event_loop::Local;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Seconds between two passes, unless an option says otherwise.
const DEFAULT_INTERVAL: u64 = 600;

/// The seconds between two passes that the options ask for.
pub(super) fn clean_interval(options: &Qcow2Options) -> Result<u64> {
    let seconds = options.cache_clean_interval.unwrap_or(DEFAULT_INTERVAL);
    if seconds > u64::from(u32::MAX) {
        return Err(Error::new(ErrorKind::InvalidArgument, "Cache clean interval too big"));
    }
    Ok(seconds)
}

/// See the page.
pub(super) struct CacheCleaning {
    slices: Weak<SliceCache>,
    refcounts: Weak<Refcounts>,
    /// The number of the task that comes by; 0 for none.
    current: AtomicU64,
    last: AtomicU64,
}

/// A task that has not come by yet.
pub(super) struct PreparedCleaning {
    cleaning: Arc<CacheCleaning>,
    number: u64,
}

impl CacheCleaning {
    pub(super) fn new(slices: &Arc<SliceCache>, refcounts: &Arc<Refcounts>) -> Arc<CacheCleaning> {
        Arc::new(CacheCleaning {
            slices: Arc::downgrade(slices),
            refcounts: Arc::downgrade(refcounts),
            current: AtomicU64::new(0),
            last: AtomicU64::new(0),
        })
    }

    /// Starts a task that will come by every `seconds` once it has [begun](PreparedCleaning::begin).
    /// With 0 there is none.
    pub(super) fn prepare(self: &Arc<Self>, local: &Local, seconds: u64) -> PreparedCleaning {
        if seconds == 0 {
            return PreparedCleaning { cleaning: Arc::clone(self), number: 0 };
        }
        // Relaxed, here and below: numbers on their own.
        let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let cleaning = Arc::downgrade(self);
        let timers = local.clone();
        drop(local.spawn(async move {
            loop {
                timers.sleep(Duration::from_secs(seconds)).await;
                let Some(cleaning) = cleaning.upgrade() else { return };
                if cleaning.current.load(Ordering::Relaxed) != number {
                    return;
                }
                cleaning.pass();
            }
        }));
        PreparedCleaning { cleaning: Arc::clone(self), number }
    }

    /// Removes what was not used since the last pass.
    pub(super) fn pass(&self) {
        if let Some(slices) = self.slices.upgrade() {
            slices.remove_unused();
        }
        if let Some(refcounts) = self.refcounts.upgrade() {
            refcounts.remove_unused();
        }
    }
}

impl PreparedCleaning {
    /// From now on this task comes by, and no other.
    pub(super) fn begin(&self) {
        self.cleaning.current.store(self.number, Ordering::Relaxed);
    }
}
