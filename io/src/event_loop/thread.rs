//! Threads around loops: one that runs a loop of its own, and one that must not.

use super::local;
use super::{EventLoop, LoopConfig, LoopHandle};
use crate::sync::Arc;
use crate::sync::atomic::{AtomicBool, Ordering};
use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::mpsc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

/// A thread that runs a loop. Dropping it stops the loop and waits for the thread.
#[derive(Debug)]
pub struct IoThread {
    handle: LoopHandle,
    thread: Option<thread::JoinHandle<()>>,
}

impl IoThread {
    /// Starts a thread, named like the loop, and its loop.
    pub fn spawn(config: LoopConfig) -> io::Result<IoThread> {
        let (sender, receiver) = mpsc::sync_channel(1);
        // What a thread cannot be called, `EventLoop::new` refuses.
        let name = config.name.replace('\0', "");
        let thread = thread::Builder::new().name(name).spawn(move || {
            let mut event_loop = match EventLoop::new(config) {
                Ok(event_loop) => event_loop,
                Err(error) => {
                    // `spawn` waits for this.
                    drop(sender.send(Err(error)));
                    return;
                }
            };
            let told = sender.send(Ok(event_loop.handle()));
            drop(sender);
            if told.is_ok() {
                event_loop.run();
            }
        })?;
        match receiver.recv() {
            Ok(Ok(handle)) => Ok(IoThread { handle, thread: Some(thread) }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::other("the loop's thread ended before it began")),
        }
    }

    /// The loop.
    pub fn handle(&self) -> &LoopHandle {
        &self.handle
    }

    /// Stops the loop and waits for its thread. See [`EventLoop::run`] for what still happens.
    pub fn join(self) {
        drop(self);
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.handle.stop();
        let Some(thread) = self.thread.take() else { return };
        // On its own thread it cannot wait: the loop ends after the turn that dropped this.
        if thread.thread().id() != thread::current().id() && thread.join().is_err() {
            tracing::error!(name = self.handle.name(), "the loop's thread panicked");
        }
    }
}

/// The calling thread owns a loop, so it must not block: whatever it would wait for may need that
/// very loop. Await instead, or use another thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OnLoopThread;

impl std::fmt::Display for OnLoopThread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a thread that owns an event loop must not block on a future")
    }
}

impl std::error::Error for OnLoopThread {}

struct Parker {
    thread: Thread,
    woken: AtomicBool,
}

impl Wake for Parker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Release: what was done before the wake-up is seen by the poll (partner: `block_on`).
        self.woken.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

/// Polls `future` on the calling thread and parks in between: the blocking door, for threads that
/// own no loop. Runs nothing but that future.
pub fn block_on<F: Future>(future: F) -> Result<F::Output, OnLoopThread> {
    if local::with_current(|_| ()).is_some() {
        return Err(OnLoopThread);
    }
    let parker = Arc::new(Parker { thread: thread::current(), woken: AtomicBool::new(false) });
    let waker = Waker::from(Arc::clone(&parker));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return Ok(output);
        }
        // Acquire: partner `wake_by_ref`. Park also returns for no reason, and for others' unparks.
        while !parker.woken.swap(false, Ordering::Acquire) {
            thread::park();
        }
    }
}
