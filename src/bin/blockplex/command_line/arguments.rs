//! The arguments as clap reads them. The doc comments on the fields are the
//! help text.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser};

use super::access::Access;
use super::{OutputFormat, value};

/// What clap does not know of.
const IMAGE_TOOLS: &str = "\
Image tools:
  img     Disk images made, examined, changed, as with qemu-img; see `blockplex img --help`
  io      Requests by hand, as with qemu-io; see `blockplex io --help`";

/// A block layer with one queue for each iothread: measure it, try to break it
#[derive(Debug, Parser)]
#[command(name = "blockplex", version, arg_required_else_help = true, after_help = IMAGE_TOOLS)]
pub(super) struct Arguments {
    #[command(subcommand)]
    pub(super) subcommand: Subcommand,
}

#[derive(Debug, clap::Subcommand)]
pub(super) enum Subcommand {
    Bench(BenchArguments),
    Stress(StressArguments),
}

/// Measure requests a second and their latencies
///
/// Without an image, a small qcow2 overlay on a qcow2 base is made in a
/// temporary directory and removed at the end. An image is opened read-only
/// unless --rw writes; writing replaces its content without asking.
#[derive(Args, Debug)]
pub(super) struct BenchArguments {
    /// Images to measure; iothread i uses image i modulo their number
    #[arg(value_name = "IMAGE")]
    pub(super) images: Vec<PathBuf>,

    /// Image as options, such as driver=qcow2,file.filename=PATH; may be repeated
    #[arg(long, value_name = "OPTS", conflicts_with = "images")]
    pub(super) image_opts: Vec<String>,

    /// Format of the images, instead of finding it out from their first bytes
    #[arg(short, long, value_name = "FMT", requires = "images", conflicts_with = "image_opts")]
    pub(super) format: Option<String>,

    /// [rand]read, [rand]write or [rand]rw[:PCT], PCT being the share of reads
    #[arg(long = "rw", value_name = "KIND", default_value = "randread")]
    pub(super) access: Access,

    /// Seconds to measure for; suffixes s, m, h
    #[arg(long, value_name = "S", default_value = "5", value_parser = value::runtime)]
    pub(super) runtime: Duration,

    /// Stop after N requests in all, instead of after a time
    #[arg(long, value_name = "N", conflicts_with = "runtime", value_parser = value::request_count)]
    pub(super) count: Option<u64>,

    /// Blocks lie SIZE apart, instead of one behind the other
    #[arg(long = "step", value_name = "SIZE", value_parser = value::block_bytes)]
    pub(super) step_bytes: Option<u64>,

    /// Bypass the host's page cache (O_DIRECT)
    #[arg(long)]
    pub(super) direct: bool,

    /// Number that decides every offset
    #[arg(long, value_name = "N", default_value = "1", value_parser = value::seed)]
    pub(super) seed: u64,

    /// Draw latencies and the course of IOPS into an SVG file
    #[arg(long, value_name = "FILE.svg")]
    pub(super) plot: Option<PathBuf>,

    /// Let idle iothreads poll this long before they sleep; 0: never
    #[arg(long, value_name = "NS")]
    pub(super) poll_max_ns: Option<u64>,

    #[command(flatten)]
    pub(super) load: LoadArguments,
}

/// Write, read back and verify from many iothreads while the graph changes
///
/// Every sector written says which sector it is, who wrote it and when; every
/// read is checked against a model. Meanwhile filters come and go, snapshots
/// are taken, the image is reopened and drained. Without an image, a temporary
/// one is used. THE CONTENT OF A GIVEN IMAGE IS LOST: it is zeroed and written
/// at random, and what is written after the first snapshot goes to overlays in
/// a temporary directory, which are removed at the end.
#[derive(Args, Debug)]
pub(super) struct StressArguments {
    /// Image to use; its content is lost
    #[arg(value_name = "IMAGE")]
    pub(super) image: Option<PathBuf>,

    /// Image as options, such as driver=qcow2,file.filename=PATH
    #[arg(long, value_name = "OPTS", conflicts_with = "image")]
    pub(super) image_opts: Option<String>,

    /// Format of the image, instead of finding it out from its first bytes
    #[arg(short, long, value_name = "FMT", requires = "image", conflicts_with = "image_opts")]
    pub(super) format: Option<String>,

    /// Seconds to go on for; suffixes s, m, h
    #[arg(long, value_name = "S", default_value = "10", value_parser = value::runtime)]
    pub(super) runtime: Duration,

    /// Number that decides every operation [default: from the clock]
    #[arg(long, value_name = "N", value_parser = value::seed)]
    pub(super) seed: Option<u64>,

    /// Graph changes a second on average; 0: none
    #[arg(long, value_name = "RATE", default_value = "20", value_parser = value::rate)]
    pub(super) mutations_per_second: f64,

    #[command(flatten)]
    pub(super) load: LoadArguments,
}

/// What both commands have.
#[derive(Args, Debug)]
pub(super) struct LoadArguments {
    /// Number of iothreads, each with a queue of its own
    #[arg(long, value_name = "N", default_value = "2", value_parser = value::iothreads)]
    pub(super) iothreads: u32,

    /// Requests in flight in each queue
    #[arg(long, value_name = "N", default_value = "32", value_parser = value::depth)]
    pub(super) depth: u32,

    /// Bytes of a request (stress: at most); suffixes k, M, G, T are 1024s
    #[arg(long = "bs", value_name = "SIZE", default_value = "4k", value_parser = value::block_bytes)]
    pub(super) block_bytes: u64,

    /// Part of the disk to use, from its start; without an image: disk size
    #[arg(long, value_name = "SIZE", value_parser = value::disk_bytes)]
    pub(super) size: Option<u64>,

    /// Form of the result
    #[arg(long, value_enum, value_name = "FORM", default_value_t = OutputFormat::Human)]
    pub(super) output: OutputFormat,
}
