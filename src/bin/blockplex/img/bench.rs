//! `bench`: so many requests of one size, one step apart, so many at a time.

use std::time::Instant;

use blockplex::io::engine::EngineChoice;
use blockplex::{
    Backend, Completion, Error, IoThread, IoVector, LoopConfig, Queue, Request, block_on,
};

use super::{Command, one_file, print_command_help};
use crate::tool::getopt::{Opt, Parser, long, long_with, opt, with};
use crate::tool::message::strerror;
use crate::tool::open::{CacheMode, ImageOpenOptions};
use crate::tool::size::{self, parse_within};
use crate::tool::{Failure, Tool};

/// The command.
pub const COMMAND: Command =
    Command { name: "bench", help: HELP, run, summary: "measure requests on an image" };

const HELP: &str = "\
Usage: {tool} bench [-f FMT | --image-opts] [-t CACHE] [-i AIO | -n] [-c COUNT] [-d DEPTH]
        [-o OFFSET] [-s SIZE] [-S STEP] [-w [--pattern BYTE] [--flush-interval N [--no-drain]]]
        [-q] [-U] FILE

Send requests to an image and tell how long they took.

  -f, --format FMT           format of the image, instead of finding it out
      --image-opts           FILE is options (driver=...,file.filename=...)
  -t, --cache CACHE          cache mode [writeback]
  -i, --aio AIO              threads or io_uring [io_uring]
  -n, --native               use the kernel's asynchronous I/O, which is io_uring here
  -c, --count COUNT          number of requests [75000]
  -d, --depth DEPTH          requests in flight [64]
  -o, --offset OFFSET        where the first begins [0]
  -s, --buffer-size SIZE     bytes of each [4k]
  -S, --step-size STEP       distance from one to the next [SIZE]
  -w, --write                write; what the image holds is lost
      --pattern BYTE         write this byte [0]
      --flush-interval N     flush after every N requests
      --no-drain             do not wait for those in flight before a flush
  -U, --force-share          open the image even though others write to it
  -q, --quiet                accepted; there is nothing that it would leave out
  -h, --help                 print this help and exit
";

const OPTIONS: &[Opt] = &[
    opt("help", 'h'),
    with("count", 'c'),
    with("depth", 'd'),
    with("format", 'f'),
    long_with("flush-interval"),
    with("aio", 'i'),
    opt("native", 'n'),
    long("no-drain"),
    with("offset", 'o'),
    long_with("pattern"),
    opt("quiet", 'q'),
    with("buffer-size", 's'),
    with("step-size", 'S'),
    with("cache", 't'),
    opt("write", 'w'),
    opt("force-share", 'U'),
    long("image-opts"),
];

/// The largest number of anything.
const MOST: u64 = i32::MAX as u64;

/// The most memory for all requests in flight.
const MEMORY: u64 = 4 << 30;

/// The requests to send.
#[derive(Clone, Copy, Debug)]
struct Load {
    count: u64,
    depth: u64,
    size: u64,
    step: Option<u64>,
    offset: u64,
    write: bool,
    pattern: u8,
    flush_interval: u64,
    drain: bool,
    /// The size of the disk, beyond whose end the load starts over.
    disk: u64,
    /// Every write is durable when it ends.
    durable: bool,
}

#[derive(Default)]
struct How {
    image: ImageOpenOptions,
    aio: Option<String>,
}

fn run(tool: &mut Tool, words: Vec<String>) -> Result<u8, Failure> {
    let mut load = Load {
        count: 75000,
        depth: 64,
        size: 4096,
        step: None,
        offset: 0,
        write: false,
        pattern: 0,
        flush_interval: 0,
        drain: true,
        disk: 0,
        durable: false,
    };
    let mut how = How::default();
    let mut parser = Parser::new(tool.name(), Some("bench"), OPTIONS, words);
    while let Some(option) = parser.next()? {
        if option.name == "help" {
            return print_command_help(tool, &COMMAND);
        }
        take(&mut load, &mut how, option.name, &option.value)?;
    }
    how.image.filename = one_file(parser.positional())?;
    if !load.write && load.flush_interval > 0 {
        return Err(Failure::new("--flush-interval is only available in write tests"));
    }
    if load.flush_interval > 0 && load.flush_interval < load.depth {
        return Err(Failure::new("Flush interval can't be smaller than depth"));
    }
    if how.image.image_opts && how.image.format.is_some() {
        return Err(Failure::new("--image-opts and --format are mutually exclusive"));
    }
    let engine = engine_of(&how)?;
    how.image.write = load.write;
    let image = tool.open(&how.image)?;
    load.disk = image.length()?;
    load.durable = image.writethrough;
    let result = send(load, image.backend.clone(), engine);
    image.close()?;
    result
}

fn take(load: &mut Load, how: &mut How, name: &str, value: &str) -> Result<(), Failure> {
    match name {
        "count" => load.count = number("request count", value, 1, MOST)?,
        "depth" => load.depth = number("queue depth", value, 1, MOST)?,
        "buffer-size" => load.size = parse_within("buffer size", value, 1..=MOST)?,
        "step-size" => load.step = Some(parse_within("step size", value, 0..=MOST)?),
        "offset" => load.offset = size::parse_bytes("offset", value)?,
        "flush-interval" => load.flush_interval = number("flush interval", value, 0, MOST)?,
        "pattern" => load.pattern = number("pattern byte", value, 0, 255)? as u8,
        "no-drain" => load.drain = false,
        "write" => load.write = true,
        "format" => how.image.format = Some(value.to_owned()),
        "image-opts" => how.image.image_opts = true,
        "force-share" => how.image.force_share = true,
        "cache" => {
            let cache = CacheMode::parse(value);
            how.image.cache = cache.ok_or_else(|| Failure::new("Invalid cache mode"))?;
        }
        "aio" => {
            if !["threads", "native", "io_uring"].contains(&value) {
                return Err(Failure::new(format!("Invalid aio option: {value}")));
            }
            how.aio = Some(value.to_owned());
        }
        "native" => how.aio = Some("-n".to_owned()),
        // Nothing that is printed is left out.
        _ => {}
    }
    Ok(())
}

/// A plain number, without a suffix.
fn number(what: &str, text: &str, min: u64, max: u64) -> Result<u64, Failure> {
    let is_plain = text.chars().last().is_some_and(|last| last.is_ascii_hexdigit())
        && !text.ends_with(['b', 'B', 'e', 'E']);
    if !is_plain {
        return Err(Failure::new(format!("Invalid {what} specified: '{text}'.")));
    }
    parse_within(what, text, min..=max)
}

/// The engine that `-i` and `-n` ask for.
fn engine_of(how: &How) -> Result<EngineChoice, Failure> {
    match how.aio.as_deref() {
        None => Ok(EngineChoice::Auto),
        Some("threads") => Ok(EngineChoice::Threads),
        Some("io_uring") => Ok(EngineChoice::Ring),
        Some(_) if !how.image.cache.direct => Err(Failure::new(format!(
            "Could not open '{}': aio=native was specified, but it requires cache.direct=on, \
             which was not specified.",
            how.image.filename
        ))),
        Some("native") => Err(Failure::new(
            "Invalid aio option: native (Linux AIO) is not supported; io_uring and threads are",
        )),
        Some(_) => Ok(EngineChoice::Ring),
    }
}

/// Sends the requests from a thread with a loop of its own, and tells what came of it.
fn send(load: Load, disk: Backend, engine: EngineChoice) -> Result<u8, Failure> {
    if load.disk == 0 {
        return Err(Failure::new("The image is empty"));
    }
    if load.depth.min(load.count) * load.size > MEMORY {
        let text = "Queue depth and buffer size need more than 4 GiB of memory together";
        return Err(Failure::new(text));
    }
    let kind = if load.write { "write" } else { "read" };
    println!(
        "Sending {} {kind} requests, {} bytes each, {} in parallel (starting at offset {}, step \
         size {})",
        load.count,
        load.size,
        load.depth,
        load.offset,
        load.step.unwrap_or(load.size)
    );
    if load.flush_interval > 0 {
        println!("Sending flush every {} requests", load.flush_interval);
    }
    let config = LoopConfig { name: "bench".into(), engine, ..LoopConfig::default() };
    let thread = IoThread::spawn(config).map_err(Error::from)?;
    let start = Instant::now();
    let task = thread.handle().spawn_with(move |_| async move {
        let queue = disk.queue("bench")?;
        Sender::new(load, &queue).run().await
    });
    let task = task.map_err(|error| Failure::new(error.to_string()))?;
    let ended = block_on(task).map_err(|error| Failure::new(error.to_string()))?;
    let sent = ended.map_err(|error| Failure::new(error.to_string()))?;
    if let Err(error) = sent {
        return Err(Failure::new(format!("Failed request: {}", strerror(error.errno()))));
    }
    println!("Run completed in {:.3} seconds.", start.elapsed().as_secs_f64());
    Ok(0)
}

/// Cookies of flushes; those of transfers are their slots.
const FLUSH: u64 = u64::MAX;

struct Sender<'a> {
    load: Load,
    queue: &'a Queue,
    /// Memory for requests that are not in flight.
    spare: Vec<IoVector>,
    left: u64,
    offset: u64,
    in_flight: u64,
    flushing: u64,
    /// How many requests were left at the last flush.
    flushed_at: u64,
}

impl<'a> Sender<'a> {
    fn new(load: Load, queue: &'a Queue) -> Sender<'a> {
        Sender {
            load,
            queue,
            spare: Vec::new(),
            left: load.count,
            offset: load.offset,
            in_flight: 0,
            flushing: 0,
            flushed_at: load.count,
        }
    }

    async fn run(mut self) -> Result<(), Error> {
        let mut completions: Vec<Completion> = Vec::new();
        self.submit();
        while self.in_flight + self.flushing > 0 {
            self.queue.ready().await;
            self.queue.reap(&mut completions, usize::MAX);
            for completion in completions.drain(..) {
                completion.result?;
                if completion.cookie == FLUSH {
                    self.flushing -= 1;
                } else {
                    self.in_flight -= 1;
                    self.left -= 1;
                    self.spare.push(completion.vector);
                    if !self.load.drain && self.is_flush_due() {
                        self.flush();
                    }
                }
            }
            if self.load.drain && self.is_flush_due() && self.in_flight == 0 && self.left > 0 {
                self.flush();
            }
            if self.flushing == 0 || !self.load.drain {
                self.submit();
            }
        }
        Ok(())
    }

    /// Whether a flush comes before the next request.
    fn is_flush_due(&self) -> bool {
        let interval = self.load.flush_interval;
        interval > 0 && self.left != self.flushed_at && self.left.is_multiple_of(interval)
    }

    fn flush(&mut self) {
        self.queue.submit(Request::flush(), FLUSH);
        self.flushing += 1;
        self.flushed_at = self.left;
    }

    /// Sends what may be sent now.
    fn submit(&mut self) {
        let interval = self.load.flush_interval;
        while self.in_flight < self.load.depth && self.in_flight < self.left {
            // With drains, no request goes over the next flush.
            let after = self.left - self.in_flight;
            if self.load.drain
                && interval > 0
                && self.in_flight > 0
                && after.is_multiple_of(interval)
            {
                break;
            }
            let vector = self.spare.pop().unwrap_or_else(|| {
                let vector = IoVector::zeroed(self.load.size as usize);
                vector.fill(0, vector.len(), self.load.pattern);
                vector
            });
            let request = match (self.load.write, self.load.durable) {
                (false, _) => Request::read(self.offset, vector),
                (true, false) => Request::write(self.offset, vector),
                (true, true) => Request::write(self.offset, vector).fua(),
            };
            self.offset += self.load.step.unwrap_or(self.load.size);
            self.offset %= self.load.disk;
            self.in_flight += 1;
            self.queue.submit(request, 0);
        }
    }
}
