//! Runs a stress: opens the image, lets iothreads and mutator loose on it,
//! verifies what is left, and reports.
//!
//! | phase | who | what |
//! |---|---|---|
//! | prepare | one iothread | makes the range used zero |
//! | stress | iothreads, mutator | until the runtime is over or something fails |
//! | verify | iothreads | each reads all it owns; nothing changes any more |
//! | close | a thread | flush and close, which writes everything back |
//!
//! The main thread only watches (`watch`), so that a hang in any phase ends the
//! run with a report of who is waited for. Then nothing is joined or closed:
//! that would hang too. The process is about to end.

use std::error::Error;
use std::io::Write as _;
use std::mem;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use blockplex::io::event_loop::JoinHandle;
use blockplex::{Backend, Blockplex, IoThread, LoopConfig, Request, block_on};
use tempfile::TempDir;

use super::control::Control;
use super::layout::Layout;
use super::mutation::MutationPlan;
use super::mutator::Mutator;
use super::plan::{Operation, Plan};
use super::report::{MutationTally, Report};
use super::watch::{Hang, Watch};
use super::worker::Worker;
use crate::command_line::{ImageSource, OutputFormat, STRESS_SIZE_MAX, StressOptions};
use crate::images::{self, TEMPORARY_SIZE, TemporaryChain, Wish};
use crate::random;

/// How much is made zero at a time.
const ZERO_BYTES: u64 = 16 << 20;

/// Does what `options` describe and prints the result; the status is a failure
/// if anything read was not what it had to be.
///
/// # Errors
/// Whatever kept the image from being opened, used or reported on; a hang.
pub fn run(options: &StressOptions) -> Result<ExitCode, Box<dyn Error>> {
    let mut stage = Stage::open(options)?;
    let report = match stage.perform(options) {
        Ok(report) => report,
        Err(hang) => {
            stage.abandon();
            return Err(hang.into());
        }
    };
    let failure = stage.control.failure();
    if let Some(failure) = failure.as_ref().filter(|_| report.is_clean()) {
        return Err(failure.as_str().into());
    }
    // What was read wrongly is worth telling even if more went wrong.
    let text = match options.output {
        OutputFormat::Human => report.to_string(),
        OutputFormat::Json => report.json()?,
    };
    std::io::stdout().write_all(text.as_bytes())?;
    match failure {
        Some(failure) => Err(failure.into()),
        None if report.is_clean() => Ok(ExitCode::SUCCESS),
        None => Ok(ExitCode::FAILURE),
    }
}

/// Everything that a run stands on.
struct Stage {
    layer: Blockplex,
    disk: Backend,
    layout: Layout,
    control: Arc<Control>,
    watch: Watch,
    threads: Vec<IoThread>,
    /// For overlays.
    directory: TempDir,
    /// The image, if none was given.
    chain: Option<TemporaryChain>,
}

impl Stage {
    fn open(options: &StressOptions) -> Result<Self, Box<dyn Error>> {
        let layer = Blockplex::new()?;
        let directory = tempfile::Builder::new().prefix("blockplex-stress-").tempdir()?;
        let (source, chain) = match &options.image {
            Some(source) => (source.clone(), None),
            None => {
                let size = options.size.unwrap_or(TEMPORARY_SIZE);
                let chain = TemporaryChain::create(&layer, size, true)?;
                let format = Some("qcow2".to_owned());
                (ImageSource::File { path: chain.overlay(), format }, Some(chain))
            }
        };
        let disk = images::open(&layer, "disk0", &source, Wish { write: true, direct: false })?;
        let layout = match layout_of(options, &disk) {
            Ok(layout) => layout,
            Err(error) => {
                block_on(disk.close())??;
                return Err(error);
            }
        };
        let control = Arc::new(Control::new(options.iothreads));
        let watch = Watch::new(&layer, &control);
        let threads = spawn_iothreads(options)?;
        Ok(Self { layer, disk, layout, control, watch, threads, directory, chain })
    }

    fn perform(&mut self, options: &StressOptions) -> Result<Report, Hang> {
        let start = Instant::now();
        self.prepare()?;
        let mut workers = self.workers(options);
        let mut mutations = MutationTally::default();
        if !self.control.is_stopping() {
            (workers, mutations) = self.stress(options, workers)?;
        }
        if self.control.failure().is_none() {
            workers = self.verify(workers)?;
        }
        self.close()?;
        let tallies: Vec<_> = workers.into_iter().map(Worker::into_tally).collect();
        let image = match &options.image {
            Some(source) => source.to_string(),
            None => "a temporary qcow2 overlay on a qcow2 base".to_owned(),
        };
        Ok(Report::new(image, options.seed, start.elapsed(), &tallies, &mutations))
    }

    /// Leaves everything as it is: joining or closing what hangs would hang.
    /// The files go away all the same.
    fn abandon(self) {
        let Self { layer, disk, threads, watch, directory, chain, .. } = self;
        mem::forget((layer, disk, threads, watch));
        drop((directory, chain));
    }

    fn workers(&self, options: &StressOptions) -> Vec<Worker> {
        let identity = random::seed_from_clock();
        let worker = |thread| {
            let (disk, layout) = (&self.disk, &self.layout);
            Worker::new(disk, layout, thread, options.depth, options.seed, identity)
        };
        (0..options.iothreads).map(worker).collect()
    }

    /// Makes the range used zero, as the model takes it to be.
    fn prepare(&mut self) -> Result<(), Hang> {
        let (disk, control) = (self.disk.clone(), self.control.clone());
        let bytes = self.layout.sectors() * 512;
        let zeroing = move |_| async move {
            let queue = disk.queue("preparation")?;
            let mut offset = 0;
            while offset < bytes && !control.is_stopping() {
                let length = ZERO_BYTES.min(bytes - offset);
                queue.request(Request::write_zeroes(offset, length).may_unmap()).await.result?;
                control.count_request(0);
                offset += length;
            }
            Ok::<_, blockplex::Error>(())
        };
        let task = self.threads[0].handle().spawn_with(zeroing);
        let Some(task) = self.started(task) else { return Ok(()) };
        self.watch.wait("prepare", || 0.0, || task.is_finished())?;
        if let Some(Err(error)) = self.result_of(task) {
            self.control.fail(|| format!("making the disk zero: {}", crate::message(&error)));
        }
        Ok(())
    }

    fn stress(
        &mut self,
        options: &StressOptions,
        workers: Vec<Worker>,
    ) -> Result<(Vec<Worker>, MutationTally), Hang> {
        let mutator = self.start_mutator(options);
        let (layout, seed) = (self.layout, options.seed);
        let tasks = self.on_iothreads(workers, move |thread, control| {
            let mut plan = Plan::new(&layout, seed, thread);
            std::iter::from_fn(move || (!control.is_stopping()).then(|| plan.operation()))
        });
        let (start, runtime) = (Instant::now(), options.runtime);
        let share = || start.elapsed().as_secs_f64() / runtime.as_secs_f64();
        let control = self.control.clone();
        self.watch.wait("stress", share, || {
            if start.elapsed() >= runtime {
                control.stop();
            }
            let mutator_ended = mutator.as_ref().is_none_or(|thread| thread.is_finished());
            mutator_ended && tasks.iter().all(JoinHandle::is_finished)
        })?;
        // A worker whose task is gone has failed the run.
        let workers = tasks.into_iter().filter_map(|task| self.result_of(task)).collect();
        let mutations = match mutator.map(std::thread::JoinHandle::join) {
            Some(Ok(tally)) => tally,
            None => MutationTally::default(),
            Some(Err(_)) => {
                self.control.fail(|| "the mutator panicked".to_owned());
                MutationTally::default()
            }
        };
        Ok((workers, mutations))
    }

    fn verify(&mut self, workers: Vec<Worker>) -> Result<Vec<Worker>, Hang> {
        let layout = self.layout;
        let tasks =
            self.on_iothreads(workers, move |thread, _| layout.shares(thread).map(Operation::Read));
        let all_ended = || tasks.iter().all(JoinHandle::is_finished);
        self.watch.wait("verify", || 1.0, all_ended)?;
        Ok(tasks.into_iter().filter_map(|task| self.result_of(task)).collect())
    }

    /// Flushes and closes.
    fn close(&mut self) -> Result<(), Hang> {
        let (disk, control) = (self.disk.clone(), self.control.clone());
        let failed = control.failure().is_some();
        let closing = std::thread::Builder::new().name("closing".into()).spawn(move || {
            let flushed = if failed { Ok(()) } else { disk.blocking().flush() };
            if let Err(error) = flushed {
                control.fail(|| format!("the last flush: {}", crate::message(&error)));
            }
            match block_on(disk.close()) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => control.fail(|| format!("closing: {}", crate::message(&error))),
                Err(error) => control.fail(|| format!("closing: {error}")),
            }
        });
        match closing {
            Ok(thread) => self.watch.wait("close", || 1.0, || thread.is_finished()),
            Err(error) => {
                self.control.fail(|| format!("starting a thread: {error}"));
                Ok(())
            }
        }
    }

    /// Starts the mutator, if there is something for it to do.
    fn start_mutator(
        &self,
        options: &StressOptions,
    ) -> Option<std::thread::JoinHandle<MutationTally>> {
        let directory = self.directory.path().to_owned();
        let mutator = match Mutator::new(&self.layer, &self.disk, directory, options.seed) {
            Ok(mutator) => mutator,
            Err(error) => {
                self.control.fail(|| crate::message(&error));
                return None;
            }
        };
        let plan = MutationPlan::new(options.seed, options.mutations_per_second, mutator.limits())?;
        let control = self.control.clone();
        let thread = std::thread::Builder::new().name("mutator".into());
        thread
            .spawn(move || mutator.run(plan, &control))
            .inspect_err(|error| self.control.fail(|| format!("starting the mutator: {error}")))
            .ok()
    }

    /// Has each iothread's worker go through operations; gives the workers back.
    fn on_iothreads<I>(
        &self,
        workers: Vec<Worker>,
        operations: impl Fn(u32, Arc<Control>) -> I,
    ) -> Vec<JoinHandle<Worker>>
    where
        I: Iterator<Item = Operation> + Send + 'static,
    {
        let start = |(thread, (iothread, mut worker)): (usize, (&IoThread, Worker))| {
            let control = self.control.clone();
            let operations = operations(thread as u32, control.clone());
            self.started(iothread.handle().spawn_with(move |_| async move {
                worker.perform(operations, &control).await;
                worker
            }))
        };
        self.threads.iter().zip(workers).enumerate().filter_map(start).collect()
    }

    fn started<T>(&self, task: Result<JoinHandle<T>, impl Error>) -> Option<JoinHandle<T>> {
        task.inspect_err(|error| self.control.fail(|| format!("an iothread has ended: {error}")))
            .ok()
    }

    /// The result of a task that has finished.
    fn result_of<T>(&self, task: JoinHandle<T>) -> Option<T> {
        match block_on(task) {
            Ok(Ok(result)) => Some(result),
            Ok(Err(_)) | Err(_) => {
                self.control.fail(|| "an iothread's task was cancelled".to_owned());
                None
            }
        }
    }
}

fn layout_of(options: &StressOptions, disk: &Backend) -> Result<Layout, Box<dyn Error>> {
    let length = disk.length()?;
    let size = options.size.unwrap_or(length.min(STRESS_SIZE_MAX));
    if size > length {
        return Err(format!("--size {size} is more than the disk's {length} bytes").into());
    }
    Ok(Layout::new(size / 512, options.iothreads, options.block_bytes / 512)?)
}

fn spawn_iothreads(options: &StressOptions) -> std::io::Result<Vec<IoThread>> {
    let spawn = |index| {
        IoThread::spawn(LoopConfig {
            name: format!("iothread{index}"),
            ring_entries: options.depth.next_power_of_two().clamp(64, 4096),

            ..LoopConfig::default()
        })
    };
    (0..options.iothreads).map(spawn).collect()
}
