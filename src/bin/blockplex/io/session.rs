//! What is open, and the requests to it.
//!
//! Requests run on a loop thread; the main thread waits for those of most commands, and for others
//! goes on. What happens meanwhile is kept as events, and printed by the main thread when it waits
//! for something anyway; that somebody has been suspended, after every command.
//!
//! S1. Nothing here waits for a request that only a later command could set free: who is suspended
//!     at a breakpoint is an error where all requests are waited for, and set free at the end.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use blockplex::drivers::blkdebug::{Blkdebug, Notice};
use blockplex::graph::{Completion, NodeView};
use blockplex::io::engine::EngineChoice;
use blockplex::io::event_loop::{IoThread, JoinHandle, LoopConfig, block_on, yield_now};
use blockplex::{Backend, Error, ErrorKind, Request, Result};

use super::file::Access;
use super::report::say;
use crate::tool::open::{Image, ImageOpenOptions};
use crate::tool::{Failure, Tool};

/// The open file.
pub struct OpenFile {
    pub image: Image,
    /// How it was to be opened.
    pub access: Access,
    /// How it was opened.
    pub options: ImageOpenOptions,
    /// Writes are durable on return.
    pub writethrough: bool,
    /// Where the writes go, when they are to be forgotten.
    pub overlay: Option<tempfile::TempDir>,
    /// Requests that no command waits for.
    background: Vec<JoinHandle<()>>,
}

impl OpenFile {
    pub fn new(
        image: Image,
        access: Access,
        options: ImageOpenOptions,
        overlay: Option<tempfile::TempDir>,
    ) -> OpenFile {
        let writethrough = image.writethrough;
        OpenFile { image, access, options, writethrough, overlay, background: Vec::new() }
    }

    /// The first node on the way down that has breakpoints.
    pub fn blkdebug(&self) -> Option<Arc<NodeView>> {
        let mut view = self.image.view().ok()?;
        while view.driver_as::<Blkdebug>().is_none() {
            let child = view.child(0)?.clone();
            view = child;
        }
        Some(view)
    }
}

/// Something to be printed.
enum Event {
    /// At once.
    Notice(String),
    /// With the next wait.
    Report(String),
}

/// What has happened; shared with the loop thread.
#[derive(Clone, Default)]
struct Events(Arc<Mutex<Happened>>);

#[derive(Default)]
struct Happened {
    events: VecDeque<Event>,
    /// The main thread, where it waits.
    waiter: Option<Waker>,
}

impl Events {
    fn lock(&self) -> MutexGuard<'_, Happened> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, event: Event) {
        let waiter = {
            let mut happened = self.lock();
            happened.events.push_back(event);
            happened.waiter.take()
        };
        if let Some(waiter) = waiter {
            waiter.wake();
        }
    }

    /// The next one; only a notice, unless `all`.
    fn pop(&self, all: bool) -> Option<String> {
        let mut happened = self.lock();
        match happened.events.front() {
            Some(Event::Report(_)) if !all => None,
            _ => happened.events.pop_front().map(|event| match event {
                Event::Notice(text) | Event::Report(text) => text,
            }),
        }
    }

    /// Prints what there is; what can wait, only if `all`.
    fn print(&self, all: bool) {
        while let Some(text) = self.pop(all) {
            say(text);
        }
    }

    /// Waits for `work`, and prints what happens meanwhile.
    fn print_during<T>(&self, work: impl Future<Output = T>) -> std::result::Result<T, Error> {
        let mut work = pin!(work);
        let printing = poll_fn(|cx| {
            let ended = work.as_mut().poll(cx);
            self.lock().waiter = Some(cx.waker().clone());
            self.print(true);
            ended
        });
        block_on(printing).map_err(|error| Error::new(ErrorKind::OnLoopThread, error.to_string()))
    }
}

/// A request's end, and how long it took.
pub struct Timed {
    pub completion: Completion,
    pub time: Duration,
}

/// One run of the tool.
pub struct Session {
    pub tool: Tool,
    /// File names are options (`--image-opts`).
    pub image_opts: bool,
    /// Memory is off its alignment (`-m`).
    pub misalign: bool,
    pub file: Option<OpenFile>,
    thread: IoThread,
    engine: EngineChoice,
    events: Events,
}

impl Session {
    pub fn new(tool: Tool, image_opts: bool, misalign: bool) -> std::io::Result<Session> {
        let config = LoopConfig { name: "requests".into(), ..LoopConfig::default() };
        let (thread, events) = (IoThread::spawn(config)?, Events::default());
        let engine = EngineChoice::Auto;
        Ok(Session { tool, image_opts, misalign, file: None, thread, engine, events })
    }

    pub fn has_file(&self) -> bool {
        self.file.is_some()
    }

    pub fn is_read_only(&self) -> bool {
        self.file.as_ref().is_some_and(|file| !file.access.writes())
    }

    /// The open file's backend.
    ///
    /// # Errors
    ///
    /// There is none; commands that need one are not called then.
    pub fn backend(&self) -> Result<Backend> {
        let none = || Error::new(ErrorKind::NoMedium, "no file is open");
        self.file.as_ref().map(|file| file.image.backend.clone()).ok_or_else(none)
    }

    /// Whether writes are to be durable.
    pub fn is_writethrough(&self) -> bool {
        self.file.as_ref().is_some_and(|file| file.writethrough)
    }

    /// Runs a request to its end.
    pub fn request(&self, request: Request) -> Result<Timed> {
        let backend = self.backend()?;
        self.wait(move || async move {
            let queue = backend.queue("qemu-io")?;
            let begun = Instant::now();
            let completion = queue.request(request).await;
            Ok(Timed { completion, time: begun.elapsed() })
        })
    }

    /// Runs work on the loop thread, waits for it, and prints what happened meanwhile.
    fn wait<T, F>(&self, work: impl FnOnce() -> F + Send + 'static) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + 'static,
    {
        let gone = || Error::new(ErrorKind::Gone, "the loop has ended");
        let handle = self.thread.handle().spawn_with(move |_| work()).map_err(|_| gone())?;
        self.events.print_during(handle)?.map_err(|_| gone())?
    }

    /// Waits for work of the control plane, and prints what happens meanwhile.
    pub fn manage<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.events.print_during(work)?
    }

    /// Has requests run the way `choice` says. When no file is open.
    ///
    /// # Errors
    ///
    /// The machine cannot.
    pub fn use_engine(&mut self, choice: EngineChoice) -> std::result::Result<(), Failure> {
        if choice == self.engine {
            return Ok(());
        }
        let config =
            LoopConfig { engine: choice, name: "requests".into(), ..LoopConfig::default() };
        self.thread = IoThread::spawn(config).map_err(|error| Failure::new(error.to_string()))?;
        self.engine = choice;
        Ok(())
    }

    /// Waits for a time, in which background requests go on.
    pub fn sleep(&self, time: Duration) {
        std::thread::sleep(time);
        self.print_events(true);
    }

    /// Starts a request that is not waited for; `report` makes of its end what is printed then.
    pub fn start(
        &mut self,
        request: Request,
        report: impl FnOnce(Timed) -> Option<String> + Send + 'static,
    ) -> Result<()> {
        let backend = self.backend()?;
        let events = self.events.clone();
        let (starting, started) = std::sync::mpsc::sync_channel(1);
        let work = async move || {
            let text = match backend.queue("qemu-io") {
                Ok(queue) => {
                    let begun = Instant::now();
                    let running = queue.request(request);
                    // It has got as far as it gets without waiting when the next command runs.
                    yield_now().await;
                    let _ = starting.send(());
                    let completion = running.await;
                    report(Timed { completion, time: begun.elapsed() })
                }
                Err(error) => Some(error.to_string()),
            };
            if let Some(text) = text {
                events.push(Event::Report(text));
            }
        };
        let handle = self.thread.handle().spawn_with(move |_| work());
        let handle = handle.map_err(|_| Error::new(ErrorKind::Gone, "the loop has ended"))?;
        // An error means that it has ended already.
        let _ = started.recv();
        if let Some(file) = &mut self.file {
            file.background.retain(|handle| !handle.is_finished());
            file.background.push(handle);
        }
        Ok(())
    }

    /// Reports what has ended already, as if it had run.
    pub fn report_later(&self, text: String) {
        self.events.push(Event::Report(text));
    }

    /// Waits until all background requests have ended. False: somebody is suspended (S1).
    pub fn settle(&mut self) -> bool {
        let settled = match &mut self.file {
            None => true,
            Some(file) => {
                let view = file.blkdebug();
                let blkdebug = view.as_ref().and_then(|view| view.driver_as::<Blkdebug>());
                wait_for_all(&self.events, &mut file.background, blkdebug, None)
            }
        };
        self.print_events(true);
        settled
    }

    /// Waits until somebody is suspended at `tag`. False: no request is left that could be.
    pub fn wait_suspended(&mut self, tag: &str) -> bool {
        let suspended = match &mut self.file {
            None => false,
            Some(file) => {
                let view = file.blkdebug();
                let blkdebug = view.as_ref().and_then(|view| view.driver_as::<Blkdebug>());
                blkdebug.is_some()
                    && !wait_for_all(&self.events, &mut file.background, blkdebug, Some(tag))
            }
        };
        self.print_events(true);
        suspended
    }

    /// Sets everybody free who is suspended, and waits until all background requests have ended.
    pub fn release(&mut self) {
        loop {
            if let Some(view) = self.file.as_ref().and_then(OpenFile::blkdebug)
                && let Some(blkdebug) = view.driver_as::<Blkdebug>()
            {
                blkdebug.release_all();
            }
            if self.settle() {
                return;
            }
        }
    }

    /// Has the breakpoints of a file tell what happens at them.
    pub fn watch(&self, file: &OpenFile) {
        let Some(view) = file.blkdebug() else { return };
        let Some(blkdebug) = view.driver_as::<Blkdebug>() else { return };
        let events = self.events.clone();
        blkdebug.watch(move |notice| {
            let text = match notice {
                Notice::Suspended(tag) => format!("blkdebug: Suspended request '{tag}'"),
                Notice::Resumed(tag) => format!("blkdebug: Resuming request '{tag}'"),
            };
            events.push(Event::Notice(text));
        });
    }

    /// Prints what has happened; what can wait, only if `all`.
    pub fn print_events(&self, all: bool) {
        self.events.print(all);
    }

    /// The end: everything is closed. Whether that went well.
    pub fn finish(&mut self) -> bool {
        self.release();
        self.close()
    }
}

/// Waits until all have ended (true), or somebody is suspended, at `tag` if it is given (false).
fn wait_for_all(
    events: &Events,
    background: &mut Vec<JoinHandle<()>>,
    blkdebug: Option<&Blkdebug>,
    tag: Option<&str>,
) -> bool {
    let waited = events.print_during(async {
        let mut suspended = pin!(async {
            match blkdebug {
                Some(blkdebug) => blkdebug.wait_suspended(tag).await,
                None => std::future::pending().await,
            }
        });
        poll_fn(|cx| {
            if suspended.as_mut().poll(cx).is_ready() {
                return Poll::Ready(false);
            }
            // A request that was cancelled has ended, too.
            background.retain_mut(|handle| pin!(handle).poll(cx).is_pending());
            if background.is_empty() { Poll::Ready(true) } else { Poll::Pending }
        })
        .await
    });
    waited.unwrap_or(true)
}
