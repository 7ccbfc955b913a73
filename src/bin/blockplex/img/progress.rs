//! How far a command has come, in percent, on one line of stdout (`-p`).

use std::io::Write;

use parking_lot::Mutex;

/// A progress line. Any thread may move it on.
pub struct Progress {
    shown: bool,
    /// A percentage is shown when it is so much above the last.
    step: f64,
    state: Mutex<State>,
}

struct State {
    percent: f64,
    last: f64,
}

impl Progress {
    /// A line that is shown or not.
    pub fn new(shown: bool, step: f64) -> Progress {
        Progress { shown, step, state: Mutex::new(State { percent: 0.0, last: 0.0 }) }
    }

    /// Whether anybody looks.
    pub fn is_shown(&self) -> bool {
        self.shown
    }

    /// Moves on by `part` of `whole`.
    pub fn add(&self, part: u64, whole: u64) {
        if whole > 0 {
            let percent = self.state.lock().percent;
            self.set(percent + part as f64 / whole as f64 * 100.0);
        }
    }

    /// Moves on to `percent`.
    pub fn set(&self, percent: f64) {
        if !self.shown {
            return;
        }
        let percent = percent.min(100.0);
        let is_new = {
            let mut state = self.state.lock();
            state.percent = percent;
            let is_new = percent > state.last + self.step || percent < state.last;
            let is_new = is_new || percent >= 100.0 || percent <= 0.0;
            if is_new {
                state.last = percent;
            }
            is_new
        };
        if is_new {
            self.show(percent);
        }
    }

    /// Ends the line.
    pub fn end(&self) {
        if self.shown {
            println!();
        }
    }

    fn show(&self, percent: f64) {
        if self.shown {
            print!("    ({percent:.2}/100%)\r");
            // A reader that went away will be noticed by what is printed at the end.
            let _ = std::io::stdout().flush();
        }
    }
}
