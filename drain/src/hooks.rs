//! What an origin wants to be told when its gate shuts and opens, and the state that keeps the
//! calls in step.
//!
//! Sections begin and end on any thread at any time; the hooks of one gate have to see a clean
//! `begin, end, begin, end`, one call at a time, without a lock around the call. So the calls
//! follow a level: `announced` says how many announced sections list the gate, `begun` what the
//! hooks were last told, and whoever changes the level moves the hooks after it unless somebody is
//! at it already, who then goes on until they agree.
//!
//! | announced | begun | running | next step |
//! |---|---|---|---|
//! | 0 | no | no | none |
//! | > 0 | no | no | `drain_begin`, begun := yes |
//! | > 0 | yes | no | none; the gate's hooks are *ready* |
//! | 0 | yes | no | `drain_end`, begun := no |
//! | any | any | yes | none: the runner looks again when its call returns |
//!
//! D1. Calls never overlap and strictly alternate, beginning with `drain_begin`.
//! D2. A section settles only when the hooks of its gates are ready: what `drain_begin` stops is
//!     stopped, whichever thread made the call.
//! D3. A section that begins and ends while a call runs may pass without a call of its own. It
//!     cannot have settled, by D2.

/// Told when admission to a gate stops and goes on.
///
/// Both methods are called from whatever thread begins or ends a section, with no lock held; they
/// must not block, wait or panic. They may use the gate, its slots' wakers and other sections.
pub trait DrainHooks: Send + Sync {
    /// The first section has shut the gate: let go of what waits inside of the origin (a
    /// throttled request, a reconnect delay), so that what was admitted can end. New requests are
    /// refused already.
    fn drain_begin(&self);

    /// The last section has ended and requests are admitted again: resume, and look once at every
    /// event source, since a kick may have come in between.
    fn drain_end(&self);
}

/// See the page's table. Guarded by the gate's slow mutex.
#[derive(Debug, Default)]
pub(crate) struct HookState {
    announced: u32,
    begun: bool,
    running: bool,
}

/// The call to make next.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum HookCall {
    Begin,
    End,
}

impl HookState {
    pub(crate) fn announce(&mut self) {
        self.announced += 1;
    }

    pub(crate) fn retract(&mut self) {
        debug_assert!(self.announced > 0, "a section ends once");
        self.announced = self.announced.saturating_sub(1);
    }

    /// Claims the next call. The claimant makes it without the lock and then calls `finish`.
    pub(crate) fn claim(&mut self) -> Option<HookCall> {
        let wanted = self.announced > 0;
        if self.running || wanted == self.begun {
            return None;
        }
        self.running = true;
        self.begun = wanted;
        Some(if wanted { HookCall::Begin } else { HookCall::End })
    }

    pub(crate) fn finish(&mut self) {
        debug_assert!(self.running, "only a claimed call finishes");
        self.running = false;
    }

    /// D2.
    pub(crate) fn is_ready(&self) -> bool {
        self.begun && !self.running
    }
}

#[cfg(all(test, not(loom), not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn nested_sections_begin_and_end_once() {
        let mut state = HookState::default();
        assert_eq!(state.claim(), None);
        state.announce();
        assert_eq!(state.claim(), Some(HookCall::Begin));
        assert!(!state.is_ready(), "the call still runs");
        state.finish();
        assert!(state.is_ready());
        state.announce();
        assert_eq!(state.claim(), None);
        state.retract();
        assert_eq!(state.claim(), None);
        state.retract();
        assert_eq!(state.claim(), Some(HookCall::End));
        state.finish();
        assert_eq!(state.claim(), None);
    }

    #[test]
    fn a_change_during_a_call_is_left_to_its_runner() {
        let mut state = HookState::default();
        state.announce();
        assert_eq!(state.claim(), Some(HookCall::Begin));
        state.retract();
        assert_eq!(state.claim(), None, "the running call must return first");
        state.finish();
        assert_eq!(state.claim(), Some(HookCall::End));
        // A section comes and goes while drain_end runs: no call for it (D3).
        state.announce();
        assert!(!state.is_ready());
        state.retract();
        state.finish();
        assert_eq!(state.claim(), None);
    }
}
