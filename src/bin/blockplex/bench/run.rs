//! Runs a measurement: opens the images, starts the iothreads, collects.

use std::error::Error;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blockplex::{
    Backend, Blockplex, Completion, IoThread, IoVector, Local, LoopConfig, Queue, Request, block_on,
};
use indicatif::ProgressDrawTarget;

use super::live::{Counter, Progress, Snapshot};
use super::report::{Description, Report, Tally};
use super::timeline::Timeline;
use super::workload::{Direction, Shape, Workload};
use super::{plot, table};
use crate::command_line::{BenchOptions, Goal, ImageSource, OutputFormat};
use crate::images::{self, TEMPORARY_SIZE, TemporaryChain, Wish};

/// How often the counters are looked at.
const LOOK: Duration = Duration::from_millis(100);

/// How many requests an iothread submits before it lets its loop do other things.
const STINT: u64 = 1024;

/// Measures what `options` describe and prints the result.
///
/// # Errors
/// Whatever kept the images from being opened, measured or reported.
pub fn run(options: &BenchOptions) -> Result<(), Box<dyn Error>> {
    let layer = Blockplex::new()?;
    let (disks, _chain) = open_images(&layer, options)?;
    let result = measure(options, &disks);
    for disk in &disks {
        block_on(disk.close())??;
    }
    let (report, tallies, timeline) = result?;
    let text = match options.output {
        OutputFormat::Human => table::render(&report),
        OutputFormat::Json => format!("{}\n", report.json()?),
    };
    if let Some(path) = &options.plot {
        std::fs::write(path, plot::render(&report, &tallies, &timeline))
            .map_err(|error| format!("Could not write '{}': {error}", path.display()))?;
    }
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(())
}

/// The disks to measure; the temporary chain must outlive them.
fn open_images(
    layer: &Blockplex,
    options: &BenchOptions,
) -> Result<(Vec<Backend>, Option<TemporaryChain>), Box<dyn Error>> {
    let wish = Wish { write: options.access.writes(), direct: options.direct };
    if options.images.is_empty() {
        let size = options.size.unwrap_or(TEMPORARY_SIZE);
        let chain = TemporaryChain::create(layer, size, true)?;
        let source = ImageSource::File { path: chain.overlay(), format: Some("qcow2".into()) };
        return Ok((vec![images::open(layer, "disk0", &source, wish)?], Some(chain)));
    }
    let named = options.images.iter().enumerate();
    let disks =
        named.map(|(index, source)| images::open(layer, &format!("disk{index}"), source, wish));
    Ok((disks.collect::<Result<_, _>>()?, None))
}

type Measured = (Report, Vec<Tally>, Timeline);

fn measure(options: &BenchOptions, disks: &[Backend]) -> Result<Measured, Box<dyn Error>> {
    let iothreads = options.iothreads as usize;
    let mut span = u64::MAX;
    for disk in disks {
        span = span.min(disk.length()?);
    }
    if let Some(size) = options.size {
        if size > span {
            return Err(format!("--size {size} is more than the disk's {span} bytes").into());
        }
        span = size;
    }
    let counters: Arc<Vec<Counter>> =
        Arc::new((0..iothreads).map(|_| Counter::default()).collect());
    let stop = Arc::new(AtomicBool::new(false));
    let mut threads = Vec::new();
    let mut tasks = Vec::new();
    let mut engine = "";
    let start = Instant::now();
    for index in 0..iothreads {
        let poll_max = options.poll_max.unwrap_or(LoopConfig::default().poll_max);
        let ring_entries = options.depth.next_power_of_two().clamp(64, 4096);
        let config = LoopConfig {
            name: format!("iothread{index}"),
            poll_max,
            ring_entries,
            ..LoopConfig::default()
        };
        let thread = IoThread::spawn(config)?;
        engine = thread.handle().engine_name();
        let worker = Worker {
            disk: disks[index % disks.len()].clone(),
            workload: workload_of(options, span, disks.len(), index)?,
            depth: options.depth,
            block_bytes: options.block_bytes,
            count: options.goal.share(index as u32, options.iothreads),
            index,
            counters: counters.clone(),
            stop: stop.clone(),
        };
        tasks.push(thread.handle().spawn_with(move |local| worker.run(local))?);
        threads.push(thread);
    }
    let timeline = watch(options, &counters, &stop, start, &tasks);
    let mut tallies = Vec::new();
    for task in tasks {
        tallies.push(block_on(task)??.map_err(|error: blockplex::Error| error)?);
    }
    let wall = start.elapsed();
    drop(threads);
    let description = Description {
        images: names(options),
        rw: options.access.to_string(),
        bs: options.block_bytes,
        depth: options.depth,
        size: span,
        direct: options.direct,
        seed: options.seed,
        engine: engine.to_owned(),
    };
    Ok((Report::new(description, wall, &tallies), tallies, timeline))
}

fn workload_of(
    options: &BenchOptions,
    span: u64,
    disks: usize,
    index: usize,
) -> Result<Workload, Box<dyn Error>> {
    // Those of the iothreads that work on the same disk as this one.
    let sharing = (options.iothreads as usize - index % disks).div_ceil(disks);
    let shape = Shape {
        access: options.access,
        block_bytes: options.block_bytes,
        step_bytes: options.step_bytes,
        span_bytes: span,
        iothreads: sharing as u32,
    };
    Ok(Workload::new(&shape, options.seed, (index / disks) as u32)?)
}

fn names(options: &BenchOptions) -> Vec<String> {
    if options.images.is_empty() {
        return vec!["a temporary qcow2 overlay on a qcow2 base".into()];
    }
    options.images.iter().map(ToString::to_string).collect()
}

type Task = blockplex::io::event_loop::JoinHandle<Result<Tally, blockplex::Error>>;

/// Watches the iothreads until the goal is reached or they have ended by themselves.
fn watch(
    options: &BenchOptions,
    counters: &[Counter],
    stop: &AtomicBool,
    start: Instant,
    tasks: &[Task],
) -> Timeline {
    let progress = Progress::new(ProgressDrawTarget::stderr(), options.goal);
    let mut timeline = Timeline::new(counters.len());
    let mut last: Option<Snapshot> = None;
    let mut next_look = LOOK;
    loop {
        let elapsed = start.elapsed();
        let left = match options.goal {
            Goal::Runtime(runtime) => runtime.saturating_sub(elapsed),
            Goal::Count(_) => LOOK,
        };
        let ended = tasks.iter().all(Task::is_finished);
        if left.is_zero() || ended {
            // Relaxed: a hint to stop; the results come by joining the tasks.
            stop.store(true, Ordering::Relaxed);
        }
        if elapsed >= next_look || left.is_zero() || ended {
            next_look = elapsed + LOOK;
            let counted: Vec<u64> = counters.iter().map(Counter::requests).collect();
            timeline.sample(elapsed, &counted);
            let requests = counted.iter().sum();
            let snapshot = Snapshot::new(elapsed, requests, options.block_bytes, last.as_ref());
            progress.show(&snapshot);
            last = Some(snapshot);
        }
        if left.is_zero() || ended {
            return timeline;
        }
        // The end of a run by count is looked for more often: it counts as its time.
        let by_count = matches!(options.goal, Goal::Count(_));
        std::thread::sleep(left.min(if by_count { LOOK / 50 } else { LOOK }));
    }
}

/// One iothread's part.
struct Worker {
    disk: Backend,
    workload: Workload,
    depth: u32,
    block_bytes: u64,
    count: Option<u64>,
    index: usize,
    counters: Arc<Vec<Counter>>,
    stop: Arc<AtomicBool>,
}

impl Worker {
    /// Keeps `depth` requests in flight until it is told to stop or has done its count.
    async fn run(mut self, local: Local) -> Result<Tally, blockplex::Error> {
        let queue = self.disk.queue(&format!("iothread {}", self.index))?;
        let mut tally = Tally::default();
        let mut started = vec![0u64; self.depth as usize];
        let mut writes = vec![false; self.depth as usize];
        let mut left = self.count.unwrap_or(u64::MAX);
        let mut now = local.refresh_now();
        let mut in_flight = 0;
        for slot in 0..self.depth as usize {
            if left > 0 {
                let vector = IoVector::zeroed(self.block_bytes as usize);
                vector.fill(0, vector.len(), 0xa5);
                left -= 1;
                in_flight += 1;
                writes[slot] = self.submit(&queue, slot, vector);
                started[slot] = now;
            }
        }
        let mut completions: Vec<Completion> = Vec::with_capacity(self.depth as usize);
        let mut stint = 0;
        while in_flight > 0 {
            queue.ready().await;
            let reaped = queue.reap(&mut completions, self.depth as usize);
            now = local.refresh_now();
            if self.stop.load(Ordering::Relaxed) {
                left = 0;
            }
            for completion in completions.drain(..) {
                let slot = completion.cookie as usize;
                completion.result?;
                tally.latencies.record(Duration::from_nanos(now - started[slot]));
                if writes[slot] {
                    tally.writes += 1;
                } else {
                    tally.reads += 1;
                }
                self.counters[self.index].add_one();
                if left == 0 {
                    in_flight -= 1;
                    continue;
                }
                left -= 1;
                writes[slot] = self.submit(&queue, slot, completion.vector);
                started[slot] = now;
            }
            stint += reaped as u64;
            if stint >= STINT {
                stint = 0;
                blockplex::io::event_loop::yield_now().await;
            }
        }
        Ok(tally)
    }

    /// Submits the next request; whether it writes.
    fn submit(&mut self, queue: &Queue, slot: usize, vector: IoVector) -> bool {
        let request = self.workload.request();
        match request.direction {
            Direction::Read => queue.submit(Request::read(request.offset, vector), slot as u64),
            Direction::Write => queue.submit(Request::write(request.offset, vector), slot as u64),
        }
        request.direction == Direction::Write
    }
}
