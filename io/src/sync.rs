//! One facade over the primitives that the models replace: loom's under `--cfg loom`, otherwise
//! std's atomics and parking_lot's locks. Every atomic and lock of this crate comes from here, so
//! that a model checks the very code that ships.

#[cfg(not(loom))]
mod imp {
    pub(crate) use parking_lot::Mutex;
    pub(crate) use std::sync::Arc;
    pub(crate) use std::sync::atomic;
}

#[cfg(loom)]
mod imp {
    pub(crate) use loom::sync::atomic;

    /// parking_lot's shape (no poisoning) over loom's mutex.
    #[derive(Debug, Default)]
    pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Mutex(loom::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> loom::sync::MutexGuard<'_, T> {
            self.0.lock().expect("a model never poisons its lock")
        }
    }
}

pub(crate) use imp::*;
