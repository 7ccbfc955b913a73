//! The way in for operations on raw memory, from the public door to an engine. All that these
//! functions do is pass the caller's promise on.
#![expect(unsafe_code, reason = "the memory of a raw operation is the caller's to keep")]

use super::{Engine, OpId, RawOp, Sink};
use crate::event_loop::{Core, Local};
use std::rc::Rc;

impl Local {
    /// Submits an operation: `sink` is told `token` and the result from a later turn. Neither fails
    /// nor blocks. Starts with the turn's end, or with
    /// [`flush_submissions`](Self::flush_submissions).
    ///
    /// # Safety
    ///
    /// 1. The memory that `op` points to, and the vector of pieces, stay valid for what it does with
    ///    them until `sink` has been told.
    /// 2. The descriptor stays open until then.
    #[inline]
    pub unsafe fn submit(&self, op: RawOp, sink: Rc<dyn Sink>, token: u64) -> OpId {
        // SAFETY: the caller's promises 1 and 2 are the ones asked for.
        unsafe { self.core().submit(op, sink, token) }
    }
}

impl Core {
    /// # Safety
    ///
    /// That of [`Local::submit`].
    #[inline]
    pub(super) unsafe fn submit(&self, op: RawOp, sink: Rc<dyn Sink>, token: u64) -> OpId {
        if !self.takes_operations() {
            self.refuse(sink, token);
            return OpId::NONE;
        }
        match self.engine() {
            // SAFETY: the caller's promises are the ones that the engine asks for.
            Engine::Ring(ring) => unsafe { ring.submit(op, sink, token) },
            // SAFETY: as above.
            Engine::Threads(threads) => unsafe { threads.submit(op, sink, token) },
        }
    }
}
