//! What the unit tests of the locks share: a `block_on` that parks its thread, and [`Probe`], which
//! polls one future by hand and counts its wakes.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs `future` to its end on this thread.
pub(super) fn block_on<F: Future>(future: F) -> F::Output {
    let mut future = std::pin::pin!(future);
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut cx = Context::from_waker(&waker);
    loop {
        match future.as_mut().poll(&mut cx) {
            Poll::Ready(output) => return output,
            Poll::Pending => std::thread::park(),
        }
    }
}

/// Runs `body(0..count)` on as many threads and waits for all.
pub(super) fn on_threads(count: usize, body: impl Fn(usize) + Sync) {
    std::thread::scope(|scope| {
        for index in 0..count {
            let body = &body;
            scope.spawn(move || body(index));
        }
    });
}

#[derive(Default)]
struct CountingWaker(AtomicUsize);

impl Wake for CountingWaker {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Owns a value for as long as a waker exists; waking does nothing.
struct OwningWaker<T>(T);

impl<T: Send + Sync> Wake for OwningWaker<T> {
    fn wake(self: Arc<Self>) {}
}

/// One future, polled step by step.
pub(super) struct Probe<'a, T> {
    future: Pin<Box<dyn Future<Output = T> + Send + 'a>>,
    wakes: Arc<CountingWaker>,
}

impl<'a, T> Probe<'a, T> {
    pub(super) fn new(future: impl Future<Output = T> + Send + 'a) -> Self {
        Probe { future: Box::pin(future), wakes: Arc::default() }
    }

    pub(super) fn poll(&mut self) -> Option<T> {
        let waker = Waker::from(Arc::clone(&self.wakes));
        self.poll_with(&waker)
    }

    /// Polls once with a waker that owns `owned`, and leaves the future the only owner of it.
    pub(super) fn poll_with_waker_owning(&mut self, owned: impl Send + 'static) -> Option<T> {
        let waker = Waker::from(Arc::new(OwningWaker(std::sync::Mutex::new(owned))));
        self.poll_with(&waker)
    }

    /// How often the future's waker was woken so far.
    pub(super) fn wakes(&self) -> usize {
        self.wakes.0.load(Ordering::SeqCst)
    }

    fn poll_with(&mut self, waker: &Waker) -> Option<T> {
        match self.future.as_mut().poll(&mut Context::from_waker(waker)) {
            Poll::Ready(output) => Some(output),
            Poll::Pending => None,
        }
    }
}
