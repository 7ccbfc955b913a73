//! The rules: what an event does, and which requests fail.

use blockplex_graph::{DebugEvent, RequestKind};
use std::time::Duration;

/// A set of kinds of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoKinds(u8);

impl IoKinds {
    /// What fails unless a rule says otherwise: all but block-status.
    pub const DEFAULT: IoKinds = IoKinds(0b01_1111);

    /// The kinds, by their names in options.
    pub(super) const NAMES: [(&'static str, IoKinds); 6] = [
        ("read", IoKinds(1)),
        ("write", IoKinds(1 << 1)),
        ("write-zeroes", IoKinds(1 << 2)),
        ("discard", IoKinds(1 << 3)),
        ("flush", IoKinds(1 << 4)),
        ("block-status", IoKinds(1 << 5)),
    ];

    fn of(kind: RequestKind) -> IoKinds {
        match kind {
            RequestKind::Read => IoKinds(1),
            RequestKind::Write => IoKinds(1 << 1),
            RequestKind::WriteZeroes => IoKinds(1 << 2),
            RequestKind::Discard => IoKinds(1 << 3),
            RequestKind::Flush => IoKinds(1 << 4),
            RequestKind::BlockStatus => IoKinds(1 << 5),
            RequestKind::Truncate => IoKinds(0),
        }
    }

    /// Whether `kind` is one of them.
    pub fn contain(self, kind: RequestKind) -> bool {
        self.0 & IoKinds::of(kind).0 != 0
    }
}

/// Requests that fail once the injection is active.
#[derive(Clone, Debug, PartialEq)]
pub struct Injection {
    /// Which kinds.
    pub kinds: IoKinds,
    /// With which errno; 0: they do not fail.
    pub errno: i32,
    /// Only those that hold this byte.
    pub offset: Option<u64>,
    /// Only the first one.
    pub once: bool,
    /// Without giving way to others first.
    pub immediately: bool,
    /// How long they take before they fail (`x-delay-ns`).
    pub delay: Duration,
    /// Only the `nth` that matches, counted from 1 (`x-nth`).
    pub nth: Option<u64>,
    /// With this probability out of a million (`x-probability`).
    pub probability: Option<u32>,
    /// How many bytes of a transfer are passed on before it fails (`x-short`).
    pub short: u64,
    /// Nothing fails, it is only counted (`x-count-only`).
    pub count_only: bool,
}

impl Default for Injection {
    fn default() -> Injection {
        Injection {
            kinds: IoKinds::DEFAULT,
            errno: libc::EIO,
            offset: None,
            once: false,
            immediately: false,
            delay: Duration::ZERO,
            nth: None,
            probability: None,
            short: 0,
            count_only: false,
        }
    }
}

/// One rule. `state`: only in that state; 0 is any.
#[derive(Clone, Debug, PartialEq)]
pub enum Rule {
    /// At the event, the injection becomes active.
    Inject {
        /// The event.
        event: DebugEvent,
        /// The state.
        state: u32,
        /// What fails.
        injection: Injection,
    },
    /// At the event, the state changes.
    SetState {
        /// The event.
        event: DebugEvent,
        /// The state.
        state: u32,
        /// The state that follows.
        new_state: u32,
    },
}

/// What becomes of a request that an injection matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    /// 0: it is only delayed.
    pub(super) errno: i32,
    pub(super) immediately: bool,
    pub(super) delay: Duration,
    pub(super) short: u64,
}

/// An injection's rule, and what has become of it.
struct Armed {
    event: DebugEvent,
    state: u32,
    injection: Injection,
    met: u64,
    /// A rule that holds once has been used.
    spent: bool,
}

/// The rules of a node and the state that they are in.
pub(super) struct Rules {
    armed: Vec<Armed>,
    changes: Vec<(DebugEvent, u32, u32)>,
    state: u32,
    /// Indices into `armed`.
    active: Vec<usize>,
    random: u64,
}

impl Rules {
    /// In state 1, with what the event `none` makes active.
    pub(super) fn new(rules: Vec<Rule>, seed: u64) -> Rules {
        let mut armed = Vec::new();
        let mut changes = Vec::new();
        for rule in rules {
            match rule {
                Rule::Inject { event, state, injection } => {
                    armed.push(Armed { event, state, injection, met: 0, spent: false });
                }
                Rule::SetState { event, state, new_state } => {
                    changes.push((event, state, new_state));
                }
            }
        }
        let mut rules = Rules { armed, changes, state: 1, active: Vec::new(), random: seed };
        rules.event(DebugEvent::None);
        rules
    }

    pub(super) fn state(&self) -> u32 {
        self.state
    }

    pub(super) fn met(&self) -> Vec<u64> {
        self.armed.iter().map(|armed| armed.met).collect()
    }

    /// The event has come. What was active stays so unless something else becomes active.
    pub(super) fn event(&mut self, event: DebugEvent) {
        let holds = |state: u32| state == 0 || state == self.state;
        let meant = |armed: &Armed| armed.event == event && !armed.spent && holds(armed.state);
        let active: Vec<usize> = (0..)
            .zip(&self.armed)
            .filter_map(|(index, armed)| meant(armed).then_some(index))
            .collect();
        // The last change wins, as all of them look at the state before.
        let change = self.changes.iter().rev().find(|(of, state, _)| *of == event && holds(*state));
        let next = change.map_or(self.state, |(_, _, next)| *next);
        if !active.is_empty() {
            self.active = active;
        }
        self.state = next;
    }

    /// Whether a request meets an active injection, and what then. The first that fails it decides.
    pub(super) fn judge(&mut self, kind: RequestKind, offset: u64, length: u64) -> Option<Verdict> {
        for at in 0..self.active.len() {
            let armed = self.armed.get_mut(*self.active.get(at)?)?;
            let injection = &armed.injection;
            let inside = |byte: u64| byte >= offset && byte - offset < length;
            if !injection.kinds.contain(kind) || !injection.offset.is_none_or(inside) {
                continue;
            }
            armed.met += 1;
            if injection.count_only || injection.nth.is_some_and(|nth| nth != armed.met) {
                continue;
            }
            if let Some(probability) = injection.probability
                && draw(&mut self.random) % 1_000_000 >= u64::from(probability)
            {
                continue;
            }
            let verdict = Verdict {
                errno: injection.errno,
                immediately: injection.immediately,
                delay: injection.delay,
                short: injection.short,
            };
            // What does not fail anything is not used up either (QEMU's rule).
            if injection.once && injection.errno != 0 {
                armed.spent = true;
                self.active.remove(at);
            }
            return Some(verdict);
        }
        None
    }
}

/// The next number of a SplitMix64 sequence.
fn draw(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
