//! The command line: what the user typed, checked, as plain options.
//!
//! clap reads the words into `arguments` (private to this page); [`parse`] then
//! checks what concerns several of them at once and gives a [`Command`]. The
//! rest of the program sees only the checked structures, so it never asks
//! again whether a depth is zero or two options contradict each other. What
//! cannot be known before the image is open (its size, its format) is not
//! checked here.
//!
//! Truths about every [`Command`] returned:
//! - C1: `block_bytes` is a multiple of 512, in 512..=[`BLOCK_BYTES_MAX`];
//!   `depth` is in 1..=[`DEPTH_MAX`], `iothreads` in 1..=[`IOTHREADS_MAX`].
//! - C2: all buffers together (`iothreads` × `depth` × `block_bytes`) are at
//!   most [`BUFFER_BYTES_MAX`].
//! - C3: a given size is a multiple of 512 and holds at least one block.
//! - C4: there are no more images than iothreads.

mod access;
mod arguments;
mod image;
mod value;

pub use access::{Access, Order};
pub use image::ImageSource;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{CommandFactory as _, Parser as _};

use crate::random;
use crate::units;
use arguments::{Arguments, BenchArguments, StressArguments, Subcommand};

/// The most bytes one request may have: 64 MiB.
pub const BLOCK_BYTES_MAX: u64 = 64 << 20;
/// The most requests a queue may have in flight.
pub const DEPTH_MAX: u32 = 4096;
/// The most iothreads a run may have.
pub const IOTHREADS_MAX: u32 = 256;
/// The most memory that request buffers may take: 4 GiB.
pub const BUFFER_BYTES_MAX: u64 = 4 << 30;
/// The largest part of a disk that a stress run may use: 16 GiB. The model
/// keeps eight bytes a sector, so this is what bounds its memory (256 MiB).
pub const STRESS_SIZE_MAX: u64 = 16 << 30;

/// What to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Measure images.
    Bench(BenchOptions),
    /// Verify an image while the graph changes under it.
    Stress(StressOptions),
}

/// How results are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OutputFormat {
    /// A table for people.
    Human,
    /// One JSON object.
    Json,
}

/// When a measurement ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// After this much time.
    Runtime(Duration),
    /// After this many requests, of all iothreads together.
    Count(u64),
}

impl Goal {
    /// How many of `Count` requests iothread number `iothread` of `iothreads`
    /// has to do; the first ones take the remainder. `None` for a runtime.
    pub fn share(self, iothread: u32, iothreads: u32) -> Option<u64> {
        match self {
            Self::Runtime(_) => None,
            Self::Count(total) => {
                let (each, rest) = (total / u64::from(iothreads), total % u64::from(iothreads));
                Some(each + u64::from(u64::from(iothread) < rest))
            }
        }
    }
}

/// What `blockplex bench` is to do.
#[derive(Clone, Debug, PartialEq)]
pub struct BenchOptions {
    /// The images; empty: make a temporary qcow2 overlay on a qcow2 base.
    /// Iothread *i* works on image *i* modulo their number.
    pub images: Vec<ImageSource>,
    /// The number of iothreads, each with a queue of its own.
    pub iothreads: u32,
    /// Requests in flight in each queue.
    pub depth: u32,
    /// Bytes of each request.
    pub block_bytes: u64,
    /// From the start of one block to the start of the next.
    pub step_bytes: u64,
    /// Order and direction of the requests.
    pub access: Access,
    /// When to stop.
    pub goal: Goal,
    /// Open image files with `O_DIRECT`.
    pub direct: bool,
    /// The part of the disk from its start that is used; without an image, the
    /// size of the temporary disk. `None`: all of it, or the default.
    pub size: Option<u64>,
    /// Decides every offset and direction.
    pub seed: u64,
    /// The form of the result.
    pub output: OutputFormat,
    /// Where to draw the result.
    pub plot: Option<PathBuf>,
    /// How long an iothread may poll before it sleeps; zero: never. `None`:
    /// the library's default.
    pub poll_max: Option<Duration>,
}

/// What `blockplex stress` is to do.
#[derive(Clone, Debug, PartialEq)]
pub struct StressOptions {
    /// The image, whose content is lost; `None`: a temporary one.
    pub image: Option<ImageSource>,
    /// The number of iothreads, each with a queue of its own.
    pub iothreads: u32,
    /// Requests in flight in each queue.
    pub depth: u32,
    /// The largest request in bytes, and the stripe of ownership.
    pub block_bytes: u64,
    /// How long to go on.
    pub runtime: Duration,
    /// The part of the disk from its start that is used; without an image, the
    /// size of the temporary disk. `None`: all of it, or the default.
    pub size: Option<u64>,
    /// Decides every operation and mutation.
    pub seed: u64,
    /// Graph changes a second on average; 0: none.
    pub mutations_per_second: f64,
    /// The form of the result.
    pub output: OutputFormat,
}

/// Reads a command line, its first word being the program.
///
/// # Errors
/// A `clap::Error` whose `exit` prints it to the right stream and ends the
/// process with 2, or with 0 for `--help` and `--version`.
pub fn parse(
    words: impl IntoIterator<Item = impl Into<OsString> + Clone>,
) -> Result<Command, clap::Error> {
    let (name, checked) = match Arguments::try_parse_from(words)?.subcommand {
        Subcommand::Bench(arguments) => ("bench", bench(arguments).map(Command::Bench)),
        Subcommand::Stress(arguments) => ("stress", stress(arguments).map(Command::Stress)),
    };
    checked.map_err(|reason| usage_error(name, reason))
}

/// A usage error as clap would have made it, with the subcommand's usage line.
fn usage_error(subcommand: &str, reason: String) -> clap::Error {
    let mut command = Arguments::command();
    // Fills in the full name of the subcommand for its usage line.
    command.build();
    match command.find_subcommand_mut(subcommand) {
        Some(command) => command.error(ErrorKind::ValueValidation, reason),
        None => command.error(ErrorKind::ValueValidation, reason),
    }
}

fn bench(arguments: BenchArguments) -> Result<BenchOptions, String> {
    let images = image::sources(arguments.images, arguments.format, arguments.image_opts);
    let load = arguments.load;
    check_buffers(load.iothreads, load.depth, load.block_bytes)?;
    check_size(load.size, load.block_bytes)?;
    if images.len() > load.iothreads as usize {
        return Err(format!(
            "{} images need at least as many iothreads; --iothreads is {}",
            images.len(),
            load.iothreads
        ));
    }
    let goal = match arguments.count {
        Some(count) => Goal::Count(count),
        None => Goal::Runtime(arguments.runtime),
    };
    Ok(BenchOptions {
        images,
        iothreads: load.iothreads,
        depth: load.depth,
        block_bytes: load.block_bytes,
        step_bytes: arguments.step_bytes.unwrap_or(load.block_bytes),
        access: arguments.access,
        goal,
        direct: arguments.direct,
        size: load.size,
        seed: arguments.seed,
        output: load.output,
        plot: arguments.plot,
        poll_max: arguments.poll_max_ns.map(Duration::from_nanos),
    })
}

fn stress(arguments: StressArguments) -> Result<StressOptions, String> {
    let load = arguments.load;
    check_buffers(load.iothreads, load.depth, load.block_bytes)?;
    check_size(load.size, load.block_bytes)?;
    if let Some(size) = load.size.filter(|&size| size > STRESS_SIZE_MAX) {
        return Err(format!(
            "--size {} is more than a stress run can follow, {}",
            units::size(size),
            units::size(STRESS_SIZE_MAX)
        ));
    }
    let images = Vec::from_iter(arguments.image);
    let options = Vec::from_iter(arguments.image_opts);
    Ok(StressOptions {
        image: image::sources(images, arguments.format, options).pop(),
        iothreads: load.iothreads,
        depth: load.depth,
        block_bytes: load.block_bytes,
        runtime: arguments.runtime,
        size: load.size,
        seed: arguments.seed.unwrap_or_else(random::seed_from_clock),
        mutations_per_second: arguments.mutations_per_second,
        output: load.output,
    })
}

/// C2: what the options ask for fits in memory.
fn check_buffers(iothreads: u32, depth: u32, block_bytes: u64) -> Result<(), String> {
    // At most 2^8 × 2^12 × 2^26, far from overflow.
    let bytes = u64::from(iothreads) * u64::from(depth) * block_bytes;
    if bytes <= BUFFER_BYTES_MAX {
        return Ok(());
    }
    Err(format!(
        "--iothreads × --depth × --bs needs {} of buffers; the most is {}",
        units::size(bytes),
        units::size(BUFFER_BYTES_MAX)
    ))
}

/// C3: a given size can hold a request.
fn check_size(size: Option<u64>, block_bytes: u64) -> Result<(), String> {
    match size {
        Some(size) if size < block_bytes => Err(format!(
            "--size {} is less than one block of {}",
            units::size(size),
            units::size(block_bytes)
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
