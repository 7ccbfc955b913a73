//! Images with random damage, for what no row of the catalogue names: whatever the bytes say,
//! every request ends, nothing panics, and what is open read-only is not written to.

use super::image::{self, Patch, Sandbox, be32, be64, made, patched, qemu_img, succeed, text};
use super::interop::Random;
use super::rows::bounded;
use super::tool_mutation::seeds;
use blockplex::{Backend, Blockplex, Error, ErrorKind, OpenOptions, Result, block_on};
use std::fs;
use std::path::Path;

/// Images made of each base.
const ROUNDS: u64 = 150;

/// Values that sit at the limits of what fields may hold.
const WORDS: [u64; 20] = [
    0,
    1,
    0x1ff,
    0x200,
    0x1000,
    0x10000,
    0x20000,
    0x30000,
    0x40000,
    0x50000,
    1 << 31,
    u32::MAX as u64,
    1 << 40,
    (1 << 56) - 0x10000,
    1 << 56,
    1 << 62,
    1 << 63,
    1 << 63 | 0x50000,
    i64::MAX as u64,
    u64::MAX,
];

/// The header's fields of 32 and of 64 bits.
const SHORT_FIELDS: [u64; 10] = [4, 16, 20, 32, 36, 56, 60, 96, 100, 104];
const LONG_FIELDS: [u64; 8] = [8, 24, 40, 48, 64, 72, 80, 88];

/// Where an image keeps its tables, by its own undamaged word.
fn tables(bytes: &[u8]) -> Vec<u64> {
    let word = |at: u64| {
        let at = at as usize;
        bytes
            .get(at..at.saturating_add(8))
            .map_or(0, |word| u64::from_be_bytes(word.try_into().expect("eight bytes")))
    };
    let (refcounts, l1) = (word(48), word(40));
    let offset = |entry: u64| entry & 0x00ff_ffff_ffff_fe00;
    let mut places = vec![0, 112, refcounts, l1, offset(word(refcounts)), word(64)];
    places.extend((0..4).map(|index| offset(word(l1 + 8 * index))));
    // The first snapshot's L1 table and its first L2 table.
    places.extend([word(word(64)), offset(word(word(word(64))))]);
    // What the extensions name: the bitmaps' directory and first table, the LUKS header.
    for at in (112..512).step_by(8) {
        match (word(at) >> 32, word(at) as u32) {
            (0x2385_2875, 24) => places.extend([word(at + 24), word(word(at + 24))]),
            (0x0537_be77, 16) => places.push(word(at + 8)),
            _ => {}
        }
    }
    places.retain(|place| (*place as usize) < bytes.len());
    places
}

/// One to four changes.
pub fn damage(random: &mut Random, bytes: &[u8]) -> Vec<Patch> {
    let places = tables(bytes);
    let word = |random: &mut Random| {
        let value = WORDS[random.below(WORDS.len() as u64) as usize];
        if random.below(4) == 0 { value.wrapping_add(random.below(1 << 20)) } else { value }
    };
    let of = |random: &mut Random, list: &[u64]| list[random.below(list.len() as u64) as usize];
    let last = bytes.len() as u64 - 8;
    let count = 1 + random.below(4);
    (0..count)
        .map(|_| match random.below(8) {
            0 => be32(of(random, &SHORT_FIELDS), word(random) as u32),
            1 => be32(of(random, &SHORT_FIELDS), random.below(32) as u32),
            2 => be64(of(random, &LONG_FIELDS), word(random)),
            3 | 4 => {
                let at = of(random, &places) + 8 * random.below(24);
                be64(at.min(last), word(random))
            }
            5 | 6 => {
                let at = (of(random, &places) + random.below(192)).min(last);
                Patch::Bytes(at, vec![bytes[at as usize] ^ 1 << random.below(8)])
            }
            _ if random.below(4) == 0 => Patch::Length(random.below(bytes.len() as u64)),
            _ => {
                let at = (of(random, &places) + random.below(4096)).min(last);
                Patch::Bytes(at, vec![random.byte()])
            }
        })
        .collect()
}

/// Not a request's error alone, but the end of the thread that served it.
fn outlives<T>(result: Result<T>) -> Option<T> {
    let judge = |error: &Error| {
        let text = error.to_string();
        assert_ne!(error.kind(), ErrorKind::Gone, "{text}");
        assert!(!text.chars().any(char::is_control), "{text:?}");
    };
    result.inspect_err(judge).ok()
}

/// Offsets all over a disk.
fn offsets(backend: &Backend) -> Vec<u64> {
    let length = backend.length().expect("a root");
    let last = length.saturating_sub(0x20000);
    let mut offsets: Vec<u64> = [0, 0x8000, 0x10000, 1 << 20, 40 << 20, last].into();
    offsets.retain(|offset| *offset <= last);
    offsets
}

fn use_it(backend: &Backend, writes: bool) {
    let disk = backend.blocking();
    let length = backend.length().expect("a root");
    for offset in offsets(backend) {
        let size = (length - offset).min(0x20000);
        let before = outlives(disk.read_to_vec(offset, size as usize));
        if let Some(status) = outlives(disk.block_status(offset, size.max(1))) {
            assert!(status.length <= size.max(1), "{status:?}");
        }
        if !writes {
            continue;
        }
        let part = size.min(4096) as usize;
        let wrote = outlives(disk.write(offset, &vec![0x77; part])).is_some();
        if let (true, Some(read)) = (wrote, outlives(disk.read_to_vec(offset, part))) {
            assert!(read.iter().all(|byte| *byte == 0x77), "a write at {offset:#x} is lost");
        }
        if before.is_some() {
            outlives(disk.discard(offset, size));
            outlives(disk.write_zeroes(offset, size));
            outlives(disk.write(offset, &vec![0x78; size as usize]));
        }
        outlives(disk.flush());
    }
    outlives(block_on(backend.close()).expect("no loop"));
}

fn survive(path: &Path) {
    let before = fs::read(path).expect("it is there");
    for read_only in [true, false] {
        let layer = Blockplex::new().expect("a layer");
        let options = OpenOptions::image("qcow2", path)
            .set("backing", blockplex::drivers::options::Value::Null)
            .set("discard", "unmap")
            .set("read-only", read_only);
        if let Some(backend) = outlives(block_on(layer.open("disk", options)).expect("no loop")) {
            use_it(&backend, !read_only);
        }
        assert_eq!(layer.graph().topology().nodes().count(), 0, "nodes stay behind");
        if read_only {
            assert!(fs::read(path).expect("it is there") == before, "written to");
        }
    }
}

fn survive_damage_of(name: &str, bytes: &[u8]) {
    let sandbox = Sandbox::in_memory();
    for seed in seeds(ROUNDS) {
        let mut random = Random::new(seed);
        let patches = damage(&mut random, bytes);
        let path = sandbox.put("image", &patched(bytes, &patches));
        let what = format!("{name}, seed {seed}: {patches:x?}");
        println!("{what}");
        bounded(&what, move || survive(&path));
    }
}

#[test]
fn random_damage_of_the_base_image_is_survived() {
    survive_damage_of("base image", image::base());
}

#[test]
fn random_damage_of_small_clusters_and_snapshots_is_survived() {
    let sandbox = Sandbox::in_memory();
    let commands = ["write -P 0x11 0 64k", "write -P 0x12 1M 300k", "write -z 2M 64k"];
    let path = sandbox.put("image", &made("cluster_size=512,refcount_bits=64", "4M", &commands));
    succeed(&qemu_img(&["snapshot", "-c", "first", text(&path)]), "a snapshot");
    image::qemu_io(&path, &["write -P 0x13 32k 64k"]);
    survive_damage_of("512", &fs::read(&path).expect("it is there"));
}

#[test]
fn random_damage_of_version_2_is_survived() {
    let commands = ["write -P 0x11 0 64k", "write -P 0x12 1M 300k"];
    survive_damage_of("version 2", &made("cluster_size=4k,compat=0.10", "64M", &commands));
}

#[test]
fn random_damage_of_compressed_images_is_survived() {
    let commands = ["write -c -P 0x11 0 64k", "write -c -P 0x12 1M 64k", "write -P 0x13 64k 64k"];
    for kind in ["zlib", "zstd"] {
        let options = format!("cluster_size=64k,compression_type={kind},refcount_bits=1");
        survive_damage_of(kind, &made(&options, "64M", &commands));
    }
}
