//! Our tools killed at any moment (P4): the image is sound for the peer (clusters may leak; a dirty
//! image, after a repair), can be written again, and holds what was flushed.
//!
//! Here `io`, under load; the commands of `img` in [`copies`], [`tables`], [`bitmaps`] and
//! [`repairs`], by [`scene`].
//!
//! `BLOCKPLEX_ROUNDS` is how often each one is killed, and `BLOCKPLEX_SEED` the first's seed.

mod bitmaps;
mod copies;
mod repairs;
mod scene;
mod tables;

use super::encryption;
use super::image::{self, Sandbox, qemu_img, succeed, text};
use super::interop::Random;
use super::tool_mutation::seeds;
use super::tools::Kind;
use scene::{IMAGE, Scene, guest, kill, start};
use std::path::PathBuf;
use std::time::Duration;

/// The disk, in blocks, each full of one byte.
const DISK: usize = 8 << 20;
const BLOCK: usize = 4096;
/// How often each shape and command is killed in the gate.
const ROUNDS: u64 = 2;
/// What prints a line of its own when a flush before it has ended.
const MARK: &str = "8 MiB";

/// An image: what it is made with, and what is done to it before the load.
struct Shape {
    name: &'static str,
    options: &'static str,
    /// Commands of the peer's `qemu-img`.
    prepared: &'static [&'static [&'static str]],
    kind: Kind,
}

const fn shape(name: &'static str, options: &'static str) -> Shape {
    Shape { name, options, prepared: &[], kind: Kind::Plain }
}

const SHAPES: [Shape; 8] = [
    shape("plain", "cluster_size=4k"),
    shape("compressed", "cluster_size=16k,compression_type=zstd"),
    Shape { prepared: &[&["snapshot", "-c", "s"]], ..shape("snapshot", "cluster_size=16k") },
    Shape {
        prepared: &[&["bitmap", "--add", "IMAGE", "b"]],
        ..shape("bitmap", "cluster_size=16k")
    },
    Shape { kind: Kind::Encrypted, ..shape("encrypted", "") },
    shape("subclusters", "cluster_size=64k,extended_l2=on"),
    Shape { prepared: &[&["snapshot", "-c", "s"]], ..shape("lazy", "lazy_refcounts=on") },
    shape("data file", "cluster_size=16k,data_file=DATA"),
];

impl Shape {
    fn make(&self, sandbox: &Sandbox) -> PathBuf {
        let path = sandbox.at(IMAGE);
        if self.kind == Kind::Encrypted {
            return sandbox.put(IMAGE, &encryption::luks("8M"));
        }
        let options = self.options.replace("DATA", text(&sandbox.at("data.raw")));
        sandbox.create(&path, &options, "8M");
        image::qemu_io(&path, &["write -P 0x11 0 64k", "write -P 0x11 1M 1M"]);
        for words in self.prepared {
            let mut words: Vec<&str> = words.to_vec();
            match words.iter().position(|word| *word == "IMAGE") {
                Some(at) => words[at] = text(&path),
                None => words.push(text(&path)),
            }
            succeed(&qemu_img(&words), self.name);
        }
        path
    }
}

/// What each block may hold.
struct Model {
    /// Since the last flush that is known to have ended.
    flushed: Vec<Vec<u8>>,
    /// What was asked for after it.
    later: Vec<Vec<u8>>,
}

impl Model {
    fn new(guest: &[u8]) -> Model {
        let flushed: Vec<_> = guest.chunks(BLOCK).map(|block| vec![block[0]]).collect();
        Model { later: vec![Vec::new(); flushed.len()], flushed }
    }

    fn flush(&mut self) {
        for (flushed, later) in self.flushed.iter_mut().zip(&mut self.later) {
            if !later.is_empty() {
                *flushed = std::mem::take(later);
            }
        }
    }

    fn judge(&self, what: &str, guest: &[u8]) {
        for (number, block) in guest.chunks(BLOCK).enumerate() {
            let legal = |byte: u8| {
                self.flushed[number].contains(&byte) || self.later[number].contains(&byte)
            };
            // A request cut in the middle ends between sectors.
            let wrong = block
                .chunks(512)
                .position(|sector| !legal(sector[0]) || sector[1..] != sector[..511]);
            let [flushed, later] = [&self.flushed[number], &self.later[number]];
            assert!(
                wrong.is_none(),
                "{what}: block {number}, sector {wrong:?}: {:?} is none of {flushed:?}, {later:?}",
                wrong.map(|sector| block[sector * 512])
            );
        }
    }
}

/// One command of the load, with the blocks that it sets, or a flush.
enum Step {
    Set { command: String, first: usize, count: usize, byte: u8 },
    Flush,
}

fn load(random: &mut Random, name: &str) -> Vec<Step> {
    let blocks = DISK / BLOCK;
    let set = |random: &mut Random| {
        let count = 1 + random.below(24) as usize;
        let first = random.below((blocks - count) as u64) as usize;
        let (at, length, byte) = (first * BLOCK, count * BLOCK, random.byte());
        let (command, first, count, byte) = match random.below(8) {
            0 => (format!("write -z {at} {length}"), first, count, 0),
            1 => (format!("discard {at} {length}"), first, count, 0),
            2 if name == "compressed" => {
                let first = first / 4 * 4;
                (format!("write -c -P {byte} {} 16k", first * BLOCK), first, 4, byte)
            }
            3..=5 => (format!("aio_write -q -P {byte} {at} {length}"), first, count, byte),
            _ => (format!("write -q -P {byte} {at} {length}"), first, count, byte),
        };
        Step::Set { command, first, count, byte }
    };
    (0..400).map(|_| if random.below(6) == 0 { Step::Flush } else { set(random) }).collect()
}

fn script(load: &[Step]) -> String {
    let line = |step: &Step| match step {
        Step::Set { command, .. } => format!("{command}\n"),
        Step::Flush => "aio_flush\nflush\nlength\n".to_owned(),
    };
    load.iter().map(line).collect()
}

fn kill_under_load(shape: &Shape, seed: u64) {
    let what = format!("{}, seed {seed}", shape.name);
    let mut random = Random::new(seed);
    let sandbox = Sandbox::in_memory();
    let path = shape.make(&sandbox);
    let mut model = Model::new(&guest(&what, &sandbox, shape.kind, "", &path));
    let load = load(&mut random, shape.name);
    let input = sandbox.put("script", script(&load).as_bytes());
    let child = start(&sandbox, shape.kind, "io -f qcow2 -d unmap FILE", &path, &input);
    let printed = kill(child, Duration::from_millis(random.below(400)));
    let mut flushes = printed.lines().filter(|line| line.ends_with(MARK)).count();
    for step in &load {
        match step {
            Step::Set { command, first, count, byte } => {
                for block in *first..first + count {
                    if command.starts_with("discard") || command.starts_with("write -c") {
                        // Parts of clusters stay as they are, and so does what is there already
                        // where it should be compressed.
                        let kept = model.flushed[block].clone();
                        model.later[block].extend(kept);
                    }
                    model.later[block].push(*byte);
                }
            }
            Step::Flush if flushes > 0 => {
                flushes -= 1;
                model.flush();
            }
            // This one, and what follows, may have been heard of or not.
            Step::Flush => {}
        }
    }
    let scene = Scene::new(what, shape.kind, sandbox, seed.is_multiple_of(2));
    scene.is_sound(IMAGE);
    model.judge(&scene.what, &scene.guest(IMAGE));
    scene.takes_writes(IMAGE);
}

#[test]
fn what_was_flushed_before_a_kill_is_there_and_the_image_is_sound() {
    for shape in &SHAPES {
        seeds(ROUNDS).for_each(|seed| kill_under_load(shape, seed));
    }
}
