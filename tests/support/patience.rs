//! Waits with a watchdog: what takes 30 seconds hangs, and says where.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// After this a wait is a hang.
const LIMIT: Duration = Duration::from_secs(30);

/// Waits until `condition` holds. `what` names it in the panic.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LIMIT, "30 s without: {what}");
        thread::sleep(Duration::from_micros(100));
    }
}

/// Waits for `future` on a thread without a loop. `what` names it in the panic.
pub fn wait<F: Future>(what: &str, future: F) -> F::Output {
    wait_or(what, future, String::new)
}

/// As [`wait`]; `blame` adds to the panic what is known of the hang.
pub fn wait_or<F: Future>(what: &str, future: F, blame: impl FnOnce() -> String) -> F::Output {
    assert!(blockplex_io::event_loop::current().is_none(), "would block a loop");
    let start = Instant::now();
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
        if start.elapsed() >= LIMIT {
            panic!("30 s without: {what}. {}", blame());
        }
        thread::park_timeout(LIMIT.saturating_sub(start.elapsed()));
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}
