//! The main thread's eyes on a run: a progress line on stderr if that is a
//! terminal, and the alarm when requests or a mutation stop getting anywhere.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use blockplex::{Blockplex, Scope};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::control::Control;
use crate::units;

/// How often the run is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// How long nothing may get anywhere.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long a graph that does not work may take to say who holds it.
const REPORT_PATIENCE: Duration = Duration::from_secs(2);

/// Nothing gets anywhere any more. The threads cannot be joined.
#[derive(Debug)]
pub struct Hang {
    text: String,
}

impl fmt::Display for Hang {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.text)
    }
}

impl std::error::Error for Hang {}

/// What the main thread knows of a run.
pub struct Watch {
    layer: Blockplex,
    control: Arc<Control>,
    bar: ProgressBar,
    patience: Duration,
    last_look: Instant,
    last_requests: u64,
    requests: Stall,
    mutations: Stall,
}

/// A count that is to change.
struct Stall {
    count: u64,
    since: Instant,
}

impl Stall {
    fn new() -> Self {
        Self { count: 0, since: Instant::now() }
    }

    /// For how long it has not changed.
    fn look(&mut self, count: u64) -> Duration {
        if count != self.count {
            *self = Self { count, since: Instant::now() };
        }
        self.since.elapsed()
    }
}

impl Watch {
    /// Steps of the bar; finer than any terminal is wide.
    const STEPS: u64 = 1000;

    /// A watch over a run that has not begun. indicatif hides the line if stderr
    /// is not a terminal.
    pub fn new(layer: &Blockplex, control: &Arc<Control>) -> Self {
        let target = ProgressDrawTarget::stderr();
        let bar = ProgressBar::with_draw_target(Some(Self::STEPS), target);
        let style = ProgressStyle::with_template("{bar:30.cyan/blue} {percent:>3} %  {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        bar.set_style(style);
        Self {
            layer: layer.clone(),
            control: control.clone(),
            bar,
            patience: PATIENCE,
            last_look: Instant::now(),
            last_requests: 0,
            requests: Stall::new(),
            mutations: Stall::new(),
        }
    }

    /// Waits until `is_over`; `share` says how much of the phase `what` has
    /// passed, 0.0 to 1.0.
    ///
    /// # Errors
    /// Requests do not complete, or a mutation does not end.
    pub fn wait(
        &mut self,
        what: &str,
        share: impl Fn() -> f64,
        mut is_over: impl FnMut() -> bool,
    ) -> Result<(), Hang> {
        (self.requests, self.mutations) = (Stall::new(), Stall::new());
        let start = Instant::now();
        while !is_over() {
            self.show(what, share());
            let steps = self.control.steps();
            let stuck = self.mutations.look(steps);
            if steps % 2 == 1 && stuck > self.patience {
                return Err(self.hang(what, "a change of the graph has not ended", stuck));
            }
            let stuck = self.requests.look(self.control.requests());
            if stuck > self.patience {
                return Err(self.hang(what, "no request has completed", stuck));
            }
            // Short phases end soon.
            std::thread::sleep(if start.elapsed() < LOOK { LOOK / 20 } else { LOOK });
        }
        Ok(())
    }

    fn show(&mut self, what: &str, share: f64) {
        let (now, requests) = (Instant::now(), self.control.requests());
        let elapsed = now.duration_since(self.last_look);
        if elapsed < LOOK {
            return;
        }
        let rate = requests.saturating_sub(self.last_requests) as f64 / elapsed.as_secs_f64();
        (self.last_look, self.last_requests) = (now, requests);
        self.bar.set_position((share.clamp(0.0, 1.0) * Self::STEPS as f64) as u64);
        let mutations = self.control.steps() / 2;
        let rate = units::count(rate);
        self.bar.set_message(format!("{what}  {rate} requests/s  {mutations} mutations"));
    }

    /// Says what is stuck, and who is waited for.
    fn hang(&self, what: &str, trouble: &str, stuck: Duration) -> Hang {
        let mut text = format!("{what}: {trouble} for {}", units::seconds(stuck));
        if let Some(failure) = self.control.failure() {
            text.push_str(&format!("\nbefore that: {failure}"));
        }
        match self.holders() {
            Some(holders) if holders.is_empty() => {
                text.push_str("\nno request is in flight: if any wait, they wait to be admitted");
            }
            Some(holders) => {
                for holder in holders {
                    text.push_str(&format!("\nin flight: {holder}"));
                }
            }
            None => text.push_str("\nthe graph does not even say who holds it"),
        }
        Hang { text }
    }

    /// Who holds the graph; asked on a thread of its own, for what does not work
    /// may not answer.
    fn holders(&self) -> Option<Vec<String>> {
        let graph = self.layer.graph().clone();
        let (sender, receiver) = mpsc::channel();
        let asked = std::thread::Builder::new().name("holders".into()).spawn(move || {
            if let Ok(section) = graph.begin_drain(Scope::Everything) {
                // Nobody may be waiting for the answer any more.
                drop(sender.send(section.holders().iter().map(ToString::to_string).collect()));
            }
        });
        asked.ok().and_then(|_| receiver.recv_timeout(REPORT_PATIENCE).ok())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(control: &Arc<Control>) -> Watch {
        let layer = Blockplex::new().unwrap();
        let mut watch = Watch::new(&layer, control);
        watch.patience = Duration::ZERO;
        watch
    }

    #[test]
    fn requests_that_stop_completing_raise_the_alarm() {
        let control = Arc::new(Control::new(1));
        let hang = watch(&control).wait("stress", || 0.5, || false).unwrap_err();
        assert!(hang.to_string().contains("no request has completed"), "{hang}");
        assert!(hang.to_string().contains("no request is in flight"), "{hang}");
    }

    #[test]
    fn a_mutation_that_does_not_end_raises_the_alarm() {
        let control = Arc::new(Control::new(1));
        control.count_step();
        control.fail(|| "a drain took too long".to_owned());
        let hang = watch(&control).wait("stress", || 0.5, || false).unwrap_err();
        assert!(hang.to_string().contains("a change of the graph has not ended"), "{hang}");
        assert!(hang.to_string().contains("a drain took too long"), "{hang}");
    }

    #[test]
    fn what_is_over_is_not_a_hang() {
        let control = Arc::new(Control::new(1));
        assert!(watch(&control).wait("stress", || 0.5, || true).is_ok());
    }
}
