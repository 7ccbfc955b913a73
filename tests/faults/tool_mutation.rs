//! Images with random damage, through the tools: F7 to F9 whatever the bytes say.
//!
//! `BLOCKPLEX_ROUNDS` is how many images are made of each base, and `BLOCKPLEX_SEED` the first's
//! seed.

use super::encryption;
use super::image::{self, Sandbox, made, patched, qemu_img, succeed, text};
use super::interop::Random;
use super::mutation::damage;
use super::tools::{Kind, survive};
use std::fs;

/// Images made of each base in the gate.
const ROUNDS: u64 = 4;

/// How many rounds there are, and which.
pub fn seeds(rounds: u64) -> std::ops::Range<u64> {
    let first = number("BLOCKPLEX_SEED").unwrap_or(1);
    first..first + number("BLOCKPLEX_ROUNDS").unwrap_or(rounds)
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn survive_damage_of(name: &str, kind: Kind, bytes: &[u8]) {
    survive(name, kind, bytes);
    for seed in seeds(ROUNDS) {
        let patches = damage(&mut Random::new(seed), bytes);
        let what = format!("{name}, seed {seed}: {patches:x?}");
        println!("{what}");
        survive(&what, kind, &patched(bytes, &patches));
    }
}

/// Two snapshots, two bitmaps, compressed clusters, zeros.
#[test]
fn tools_survive_damage_of_snapshots_and_bitmaps() {
    let sandbox = Sandbox::in_memory();
    let commands = ["write -P 0x11 0 64k", "write -c -P 0x12 1M 300k", "write -z 2M 64k"];
    let path = sandbox.put("image", &made("cluster_size=4k", "64M", &commands));
    let path = text(&path);
    for arguments in [
        &["snapshot", "-c", "first", path][..],
        &["bitmap", "--add", "-f", "qcow2", path, "one"],
        &["bitmap", "--add", "-g", "4k", "-f", "qcow2", path, "two"],
    ] {
        succeed(&qemu_img(arguments), &format!("{arguments:?}"));
    }
    image::qemu_io(path.as_ref(), &["write -P 0x13 32k 64k"]);
    succeed(&qemu_img(&["snapshot", "-c", "second", path]), "a snapshot");
    image::qemu_io(path.as_ref(), &["write -P 0x14 40M 64k"]);
    survive_damage_of("snapshots", Kind::Plain, &fs::read(path).expect("it is there"));
}

#[test]
fn tools_survive_damage_of_subclusters() {
    let commands = ["write -P 0x11 0 20k", "write -c -P 0x12 1M 64k", "write -z 64k 4k"];
    let bytes = made("cluster_size=64k,extended_l2=on,lazy_refcounts=on", "64M", &commands);
    survive_damage_of("subclusters", Kind::Plain, &bytes);
}

#[test]
fn tools_survive_damage_of_small_refcounts_and_zstd() {
    let commands = ["write -c -P 0x11 0 64k", "write -c -P 0x12 1M 64k", "write -P 0x13 64k 64k"];
    let bytes = made("cluster_size=512,compression_type=zstd,refcount_bits=1", "4M", &commands);
    survive_damage_of("zstd", Kind::Plain, &bytes);
}

#[test]
fn tools_survive_damage_of_encrypted_images() {
    survive_damage_of("LUKS", Kind::Encrypted, &encryption::luks("64M"));
}

#[test]
fn tools_survive_damage_of_images_with_a_data_file() {
    let sandbox = Sandbox::in_memory();
    let (path, data) = (sandbox.at("image"), sandbox.at("data.raw"));
    sandbox.create(&path, &format!("data_file={}", text(&data)), "64M");
    image::qemu_io(&path, &["write -P 0x11 0 64k", "write -z 1M 64k"]);
    let named = ["amend", "-f", "qcow2", "-o", "data_file=data.raw", text(&path)];
    succeed(&qemu_img(&named), "a name relative to the image");
    survive_damage_of("data file", Kind::Plain, &fs::read(path).expect("it is there"));
}
