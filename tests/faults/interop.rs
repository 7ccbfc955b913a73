//! Random operations on images of every shape, made by the peer and changed by us; the guest's
//! bytes are compared with a model, and with what the peer reads.

use super::image::{Check, Sandbox, check, guest_bytes, qemu_img, qemu_io, succeed, text};
use super::rows::bounded;
use blockplex::{Backend, Blockplex, OpenGate, OpenOptions, Request, block_on};
use std::fs;
use std::path::{Path, PathBuf};

const DISK: u64 = 8 << 20;
/// Operations of a sequence.
const STEPS: usize = 60;
/// Sequences of each case.
const ROUNDS: usize = 2;

/// What the image is before we get it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    Empty,
    Filled,
    RawBacking,
    ShortBacking,
    Qcow2Backing,
    Compressed(&'static str),
    Snapshots,
}

/// A shape and a seed.
#[derive(Clone, Copy, Debug)]
struct Case {
    cluster: &'static str,
    compat: &'static str,
    refcount_bits: u32,
    start: Start,
}

const fn case(
    cluster: &'static str,
    compat: &'static str,
    refcount_bits: u32,
    start: Start,
) -> Case {
    Case { cluster, compat, refcount_bits, start }
}

const CASES: [Case; 33] = [
    case("512", "1.1", 16, Start::Empty),
    case("512", "0.10", 16, Start::ShortBacking),
    case("512", "1.1", 64, Start::Compressed("zlib")),
    case("512", "1.1", 1, Start::Qcow2Backing),
    case("512", "1.1", 16, Start::Snapshots),
    case("4k", "1.1", 16, Start::Filled),
    case("4k", "0.10", 16, Start::RawBacking),
    case("4k", "0.10", 16, Start::Compressed("zlib")),
    case("4k", "0.10", 16, Start::Snapshots),
    case("4k", "1.1", 64, Start::ShortBacking),
    case("4k", "1.1", 1, Start::Compressed("zstd")),
    case("4k", "1.1", 64, Start::Snapshots),
    case("64k", "1.1", 16, Start::Empty),
    case("64k", "0.10", 16, Start::Empty),
    case("64k", "1.1", 1, Start::Filled),
    case("64k", "1.1", 16, Start::Qcow2Backing),
    case("64k", "1.1", 64, Start::RawBacking),
    case("64k", "1.1", 16, Start::ShortBacking),
    case("64k", "1.1", 16, Start::Compressed("zlib")),
    case("64k", "1.1", 16, Start::Compressed("zstd")),
    case("64k", "1.1", 16, Start::Snapshots),
    case("2M", "1.1", 16, Start::Empty),
    case("2M", "0.10", 16, Start::ShortBacking),
    case("2M", "1.1", 1, Start::Compressed("zstd")),
    case("2M", "1.1", 64, Start::Qcow2Backing),
    case("2M", "1.1", 16, Start::Snapshots),
    case("16k,extended_l2=on", "1.1", 16, Start::Empty),
    case("16k,extended_l2=on", "1.1", 16, Start::Snapshots),
    case("16k,extended_l2=on", "1.1", 1, Start::Qcow2Backing),
    case("64k,extended_l2=on", "1.1", 16, Start::ShortBacking),
    case("64k,extended_l2=on", "1.1", 64, Start::RawBacking),
    case("64k,extended_l2=on", "1.1", 16, Start::Compressed("zstd")),
    case("2M,extended_l2=on", "1.1", 16, Start::Filled),
];

/// A small generator of numbers.
pub struct Random(u64);

impl Random {
    /// For each seed other numbers.
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        // xorshift64*; any nonzero seed will do.
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number less than `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit
    }

    /// A byte other than 0.
    pub fn byte(&mut self) -> u8 {
        1 + self.below(255) as u8
    }
}

/// An image under test and what the guest should see of it.
struct Subject {
    what: String,
    path: PathBuf,
    directory: PathBuf,
    model: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
}

impl Case {
    fn options(&self) -> String {
        let Case { cluster, compat, refcount_bits, .. } = self;
        let mut options = format!("cluster_size={cluster},compat={compat}");
        if *compat == "1.1" {
            options.push_str(&format!(",refcount_bits={refcount_bits}"));
        }
        options
    }

    fn prepare(&self, sandbox: &Sandbox, random: &mut Random) -> Subject {
        let path = sandbox.at("image.qcow2");
        let size = DISK.to_string();
        let mut options = self.options();
        let mut below = vec![0; DISK as usize];
        let mut model = below.clone();
        let mut snapshots = Vec::new();
        match self.start {
            Start::Empty => sandbox.create(&path, &options, &size),
            Start::Filled | Start::Snapshots => {
                sandbox.create(&path, &options, &size);
                let rounds = if self.start == Start::Filled { 1 } else { 3 };
                for round in 0..rounds {
                    let commands = scribble(random, &mut model);
                    qemu_io(&path, &commands.iter().map(String::as_str).collect::<Vec<_>>());
                    if self.start == Start::Snapshots && round < 2 {
                        let name = format!("snapshot{round}");
                        let arguments = ["snapshot", "-c", &name, text(&path)];
                        succeed(&qemu_img(&arguments), "a snapshot");
                        snapshots.push((name, model.clone()));
                    }
                }
            }
            Start::RawBacking | Start::ShortBacking | Start::Qcow2Backing => {
                let length = if self.start == Start::ShortBacking { 0x2f_3200 } else { DISK };
                scribble(random, &mut below[..length as usize]);
                sandbox.put("base.raw", &below[..length as usize]);
                let raw = self.start != Start::Qcow2Backing;
                if !raw {
                    let (from, to) = (sandbox.at("base.raw"), sandbox.at("base.qcow2"));
                    let arguments = ["convert", "-f", "raw", "-O", "qcow2", text(&from), text(&to)];
                    succeed(&qemu_img(&arguments), "a backing image");
                }
                let format = if raw { "raw" } else { "qcow2" };
                options.push_str(&format!(",backing_file=base.{format},backing_fmt={format}"));
                sandbox.create(&path, &options, &size);
                model.clone_from(&below);
            }
            Start::Compressed(kind) => {
                if kind != "zlib" {
                    options.push_str(&format!(",compression_type={kind}"));
                }
                scribble(random, &mut model);
                let raw = sandbox.put("start.raw", &model);
                let arguments =
                    ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, text(&raw)];
                succeed(&qemu_img(&[&arguments[..], &[text(&path)]].concat()), "compression");
            }
        }
        let (what, directory) = (format!("{self:?}"), sandbox.path().to_owned());
        Subject { what, path, directory, model, snapshots }
    }
}

/// Some extents of data in `bytes`; the commands that make the peer write the same.
fn scribble(random: &mut Random, bytes: &mut [u8]) -> Vec<String> {
    (0..24)
        .map(|_| {
            let (offset, length) = extent(random, bytes.len() as u64 / 512, 400);
            let byte = random.byte();
            bytes[offset as usize..(offset + length) as usize].fill(byte);
            format!("write -q -P {byte} {offset} {length}")
        })
        .collect()
}

/// A range of whole sectors, in bytes.
fn extent(random: &mut Random, sectors: u64, longest: u64) -> (u64, u64) {
    let start = random.below(sectors);
    let length = 1 + random.below(longest.min(sectors - start));
    (start * 512, length * 512)
}

impl Subject {
    fn open(&self, layer: &Blockplex) -> Backend {
        let gate = OpenGate::deny_all().allow_directory(&self.directory).expect("a directory");
        // Few slices, and small ones: the caches are full all the time.
        let options = OpenOptions::image("qcow2", &self.path)
            .gate(gate)
            .set("discard", "unmap")
            .set("l2-cache-entry-size", "512")
            .set("l2-cache-size", "2K");
        let opened = block_on(layer.open("disk", options)).expect("no loop");
        opened.unwrap_or_else(|error| panic!("{}: {error}", self.what))
    }

    /// One random operation, on the disk and in the model.
    fn step(&mut self, random: &mut Random, backend: &Backend) {
        let disk = backend.blocking();
        let (offset, length) = if random.below(4) == 0 {
            // Whole clusters, of most sizes.
            let unit = 64 << 10;
            (random.below(DISK / unit) * unit, unit * (1 + random.below(2)))
        } else {
            extent(random, DISK / 512, 300)
        };
        let length = length.min(DISK - offset);
        // Not always whole sectors.
        let odd = random.below(8) == 0 && length > 512;
        let (offset, length) = if odd { (offset + 3, length - 7) } else { (offset, length) };
        let range = offset as usize..(offset + length) as usize;
        let result = match random.below(10) {
            0..=4 => {
                let byte = random.byte();
                self.model[range.clone()].fill(byte);
                disk.write(offset, &vec![byte; range.len()])
            }
            5 => {
                self.model[range].fill(0);
                disk.write_zeroes(offset, length)
            }
            6 => {
                self.model[range].fill(0);
                disk.run(Request::write_zeroes(offset, length).may_unmap()).map(drop)
            }
            7 | 8 => {
                let result = disk.discard(offset, length);
                self.settle(range, backend);
                result
            }
            _ => disk.flush(),
        };
        result.unwrap_or_else(|error| panic!("{}: {offset}+{length}: {error}", self.what));
    }

    /// What a discard left: the old bytes or zeros. From then on it is that.
    fn settle(&mut self, range: std::ops::Range<usize>, backend: &Backend) {
        let read = backend.blocking().read_to_vec(range.start as u64, range.len());
        let read = read.unwrap_or_else(|error| panic!("{}: {error}", self.what));
        for (now, at) in read.iter().zip(range) {
            let fine = [self.model[at], 0].contains(now);
            assert!(fine, "{}: a discard left {now} at {at:#x}", self.what);
            self.model[at] = *now;
        }
    }

    fn compare(&self, backend: &Backend) {
        let read = backend.blocking().read_to_vec(0, DISK as usize);
        let read = read.unwrap_or_else(|error| panic!("{}: {error}", self.what));
        self.same(&read, &self.model, "we");
    }

    fn same(&self, read: &[u8], expected: &[u8], who: &str) {
        let wrong = read.iter().zip(expected).position(|(read, expected)| read != expected);
        if let Some(at) = wrong {
            let (read, expected) = (read[at], expected[at]);
            panic!("{}: {who} read {read} at {at:#x}, not {expected}", self.what);
        }
        assert_eq!(read.len(), expected.len(), "{}: {who}: length", self.what);
    }

    fn judge(&self) {
        self.same(&guest_bytes(&self.path, None), &self.model, "the peer");
        assert_eq!(check(&self.path), Some(Check::CLEAN), "{}", self.what);
        for (name, bytes) in &self.snapshots {
            self.same(&guest_bytes(&self.path, Some(name)), bytes, name);
        }
    }

    fn run(&mut self, random: &mut Random) {
        let layer = Blockplex::new().expect("a layer");
        let mut backend = self.open(&layer);
        self.compare(&backend);
        for _ in 0..STEPS {
            if random.below(20) == 0 {
                close(&backend, &self.what);
                backend = self.open(&layer);
            }
            self.step(random, &backend);
        }
        self.compare(&backend);
        close(&backend, &self.what);
        self.judge();
    }
}

fn close(backend: &Backend, what: &str) {
    let closed = block_on(backend.close()).expect("no loop");
    closed.unwrap_or_else(|error| panic!("{what}: close: {error}"));
}

fn run_all(part: impl Fn(Start) -> bool) {
    let mut ran = 0;
    for (seed, case) in (1..).zip(CASES.repeat(ROUNDS)) {
        if !part(case.start) {
            continue;
        }
        ran += 1;
        bounded(&format!("{case:?}, seed {seed}"), move || {
            let sandbox = Sandbox::in_memory();
            let mut random = Random::new(seed);
            let mut subject = case.prepare(&sandbox, &mut random);
            let below = base_of(&sandbox);
            subject.run(&mut random);
            assert!(base_of(&sandbox) == below, "{case:?}: the backing file has changed");
        });
    }
    assert!(ran > 0, "there are such cases");
}

fn base_of(sandbox: &Sandbox) -> Option<Vec<u8>> {
    let read = |path: &Path| fs::read(path).ok();
    read(&sandbox.at("base.qcow2")).or_else(|| read(&sandbox.at("base.raw")))
}

#[test]
fn images_of_the_peer_stay_right_under_random_operations() {
    run_all(|start| matches!(start, Start::Empty | Start::Filled));
}

#[test]
fn overlays_stay_right_under_random_operations() {
    run_all(|start| matches!(start, Start::RawBacking | Start::ShortBacking | Start::Qcow2Backing));
}

#[test]
fn compressed_images_stay_right_under_random_operations() {
    run_all(|start| matches!(start, Start::Compressed(_)));
}

#[test]
fn internal_snapshots_stay_as_they_were_under_random_operations() {
    run_all(|start| start == Start::Snapshots);
}
