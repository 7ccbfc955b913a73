//! One facade over the primitives that the models replace: loom's under `--cfg loom`, shuttle's
//! under `--cfg shuttle`, otherwise std's atomics and parking_lot's locks. Every lock of this crate
//! and every atomic that carries its protocol come from here, so that a model checks the very code
//! that ships. (`barrier` keeps two statics of its own, which exist only outside of the models.)
//!
//! `Arc` is std's everywhere: `self: &Arc<Self>` needs it, and no proof here rests on the order of
//! reference counts.

#[cfg(not(any(loom, shuttle)))]
mod imp {
    pub(crate) use parking_lot::Mutex;
    pub(crate) use std::sync::atomic;
}

#[cfg(loom)]
mod imp {
    pub(crate) use loom::sync::atomic;
    use loom::sync::{Mutex as Inner, MutexGuard};
    super::unpoisoned_mutex!();
}

#[cfg(shuttle)]
mod imp {
    pub(crate) use shuttle::sync::atomic;
    use shuttle::sync::{Mutex as Inner, MutexGuard};
    super::unpoisoned_mutex!();
}

/// parking_lot's shape over a model's mutex. A poisoned lock is entered all the same: a model that
/// fails should report its first panic, not the second.
#[cfg(any(loom, shuttle))]
macro_rules! unpoisoned_mutex {
    () => {
        #[derive(Debug, Default)]
        pub(crate) struct Mutex<T>(Inner<T>);

        impl<T> Mutex<T> {
            pub(crate) fn new(value: T) -> Self {
                Mutex(Inner::new(value))
            }

            pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
                self.0.lock().unwrap_or_else(|poison| poison.into_inner())
            }

            pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
                self.0.try_lock().ok()
            }
        }
    };
}
#[cfg(any(loom, shuttle))]
pub(crate) use unpoisoned_mutex;

pub(crate) use imp::*;
