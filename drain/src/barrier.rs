//! The asymmetric barrier: [`light`] on the request path, [`heavy`] on the control path.
//!
//! It orders a store before a later load on both sides of a store-buffer race:
//!
//! ```text
//!   request:  store A; light(); load B          control:  store B; heavy(); load A
//! ```
//!
//! B1. Of two such sides at least one sees the other's store.
//! B2. What a thread had observed or written before `light` (or `heavy`) is seen by every thread
//!     after a `heavy` that comes later in their common order.
//!
//! *Why it holds.* Where membarrier(2) `PRIVATE_EXPEDITED` could be registered, `light` only keeps
//! the compiler from moving accesses and `heavy` makes every running thread of the process execute
//! a full barrier before it returns (a thread that does not run passes one when it is switched in).
//! That instant falls in each request thread either before its `light`, so its load comes later and
//! sees B, or after it, so its store is visible to the controller. Elsewhere both are
//! `fence(SeqCst)`, and B1 and B2 are the language's rules for such fences. Under the models both
//! are fences as well: what a model proves is the protocol, the paragraph above carries it over.
//!
//! *Why the two modes cannot mix.* Every `heavy` settles the registration first, so once it
//! succeeded every `heavy` there ever was is a membarrier. A `light` that does not yet know uses
//! the full fence, which pairs with either.

#[cfg(not(any(loom, shuttle, miri)))]
mod imp {
    use rustix::thread::{MembarrierCommand, membarrier};
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, Ordering, compiler_fence, fence};

    /// What `light` looks at. Only a hint: false is always safe (see the page).
    static ASYMMETRIC: AtomicBool = AtomicBool::new(false);
    static REGISTERED: OnceLock<bool> = OnceLock::new();

    pub(super) fn register() -> bool {
        *REGISTERED.get_or_init(|| {
            let done = membarrier(MembarrierCommand::RegisterPrivateExpedited).is_ok();
            // Relaxed: who sees `true` needs nothing else to be visible; the registration is the
            // kernel's and is complete.
            ASYMMETRIC.store(done, Ordering::Relaxed);
            done
        })
    }

    #[inline(always)]
    pub(super) fn light() {
        // Relaxed: a stale `false` costs a fence, never correctness.
        if ASYMMETRIC.load(Ordering::Relaxed) {
            compiler_fence(Ordering::SeqCst);
        } else {
            fence(Ordering::SeqCst);
        }
    }

    pub(super) fn heavy() {
        if !register() {
            fence(Ordering::SeqCst);
            return;
        }
        compiler_fence(Ordering::SeqCst);
        // Going on without the barrier could let a request slip into a drained section.
        membarrier(MembarrierCommand::PrivateExpedited)
            .expect("membarrier(2) was registered and has to stay allowed to this process");
        compiler_fence(Ordering::SeqCst);
    }
}

#[cfg(any(loom, shuttle, miri))]
mod imp {
    use crate::sync::atomic::{Ordering, fence};

    pub(super) fn register() -> bool {
        false
    }

    pub(super) fn light() {
        #[cfg(loom)]
        if super::control::light_is_off() {
            return;
        }
        fence(Ordering::SeqCst);
    }

    pub(super) fn heavy() {
        fence(Ordering::SeqCst);
    }
}

/// The negative control of the loom models: the same code without the request side's barrier.
#[cfg(loom)]
pub mod control {
    use std::cell::Cell;

    // loom runs all threads of a model on the thread that called it, so that this reaches the whole
    // model and no other test.
    std::thread_local!(static LIGHT_OFF: Cell<bool> = const { Cell::new(false) });

    pub(super) fn light_is_off() -> bool {
        LIGHT_OFF.with(Cell::get)
    }

    /// Makes `light` do nothing for the models that the calling thread runs from now on.
    pub fn switch_light_off() {
        LIGHT_OFF.with(|off| off.set(true));
    }
}

/// Settles which of the two forms this process uses; idempotent. Called by whatever will use
/// [`light`], so that no request has to.
pub(crate) fn prepare() {
    imp::register();
}

/// Whether [`light`] costs no instruction here (membarrier(2) is available). Any thread.
pub fn is_asymmetric() -> bool {
    imp::register()
}

/// The request side: orders the caller's earlier stores before its later loads, against [`heavy`].
/// Any thread; never blocks.
#[inline(always)]
pub fn light() {
    imp::light();
}

/// The control side: orders against every [`light`] of the process. Any thread; a system call of
/// 0.1 to some 10 µs, or a fence.
///
/// # Panics
/// If membarrier(2) worked once and is refused later (a system call filter installed in between).
pub fn heavy() {
    imp::heavy();
}

#[cfg(all(test, not(loom), not(shuttle)))]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

    #[test]
    fn one_of_two_racing_sides_sees_the_other() {
        for _ in 0..300 {
            let cells = [AtomicU32::new(0), AtomicU32::new(0)];
            let start = std::sync::Barrier::new(2);
            let (control, request) = std::thread::scope(|scope| {
                let request = scope.spawn(|| {
                    start.wait();
                    cells[0].store(1, Relaxed);
                    light();
                    cells[1].load(Relaxed)
                });
                start.wait();
                cells[1].store(1, Relaxed);
                heavy();
                let seen = cells[0].load(Relaxed);
                (seen, request.join().expect("the request side does not panic"))
            });
            assert!(control == 1 || request == 1, "both sides missed the other (B1)");
        }
    }

    #[test]
    fn the_form_once_settled_stays() {
        let first = is_asymmetric();
        heavy();
        light();
        assert_eq!(first, is_asymmetric());
    }
}
