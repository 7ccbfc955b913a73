//! How far a command has come, in percent: on one line of stdout (`-p`), or, for those who send
//! SIGUSR1, now and then on stderr.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

/// A progress line. Any thread may move it on.
pub struct Progress {
    shown: bool,
    /// A percentage is shown when it is so much away from the last.
    step: f32,
    state: Mutex<State>,
    /// Somebody has asked by SIGUSR1.
    asked: Arc<AtomicBool>,
}

#[derive(Default)]
struct State {
    percent: f32,
    last: f32,
}

impl Progress {
    /// A line that is shown, or told on request only.
    pub fn new(shown: bool, step: f32) -> Progress {
        let asked = Arc::new(AtomicBool::new(false));
        // Without a handler, whoever asks would end the program.
        if let Err(error) = signal_hook::flag::register(signal_hook::consts::SIGUSR1, asked.clone())
        {
            tracing::warn!(%error, "progress cannot be asked for by SIGUSR1");
        }
        Progress { shown, step, state: Mutex::default(), asked }
    }

    /// Whether anybody looks.
    pub fn is_shown(&self) -> bool {
        self.shown
    }

    /// Moves on by so many percent.
    pub fn add(&self, percent: f32) {
        let mut state = self.state.lock();
        let percent = state.percent + percent;
        self.move_to(&mut state, percent);
    }

    /// Moves on to so many percent.
    pub fn set(&self, percent: f32) {
        self.move_to(&mut self.state.lock(), percent);
    }

    /// Prints under the lock: lines of several threads keep their order.
    fn move_to(&self, state: &mut State, percent: f32) {
        let percent = percent.min(100.0);
        state.percent = percent;
        // Written so that rounding falls as in QEMU.
        let is_far = percent > state.last + self.step || percent < state.last - self.step;
        if !is_far && percent != 100.0 && percent != 0.0 {
            return;
        }
        state.last = percent;
        if self.shown {
            print!("    ({percent:.2}/100%)\r");
            // A reader that went away will be noticed by what is printed at the end.
            let _ = std::io::stdout().flush();
        } else if self.asked.swap(false, Ordering::Relaxed) {
            // Relaxed: the flag alone says that a line is wanted.
            eprintln!("    ({percent:.2}/100%)");
        }
    }

    /// Ends the line.
    pub fn end(&self) {
        if self.shown {
            println!();
        }
    }
}

/// Tells a progress line of parts in their order on the disk, whatever lane has done with them
/// first.
pub struct InOrder {
    progress: Arc<Progress>,
    state: Mutex<Parts>,
}

struct Parts {
    next: u64,
    /// Parts that are done before their turn: where they begin, their length and percentage.
    ahead: BTreeMap<u64, (u64, f32)>,
}

impl InOrder {
    /// Parts from `start` on.
    pub fn new(progress: Arc<Progress>, start: u64) -> InOrder {
        let state = Mutex::new(Parts { next: start, ahead: BTreeMap::new() });
        InOrder { progress, state }
    }

    /// The part of `length` bytes at `offset`, which counts `percent`, is done with.
    pub fn done(&self, offset: u64, length: u64, percent: f32) {
        let mut parts = self.state.lock();
        parts.ahead.insert(offset, (length, percent));
        let mut next = parts.next;
        while let Some((length, percent)) = parts.ahead.remove(&next) {
            next += length;
            if percent > 0.0 {
                self.progress.add(percent);
            }
        }
        parts.next = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_count_in_their_order_on_the_disk() {
        let progress = Arc::new(Progress::new(false, 1.0));
        let percent = || progress.state.lock().percent;
        let parts = InOrder::new(progress.clone(), 10);
        parts.done(30, 5, 40.0);
        parts.done(20, 10, 20.0);
        assert_eq!(percent(), 0.0, "the first part is not done yet");
        parts.done(10, 10, 10.0);
        assert_eq!(percent(), 70.0);
    }
}
