//! `convert`, `commit` and `rebase`: what they only read stays as it is, what the guest sees of a
//! chain stays as it was, and what they had to do can be done again.

use super::super::image::{Sandbox, check};
use super::super::tools::Kind;
use super::bitmaps::bitmaps;
use super::scene::{IMAGE, Scene, assert_either, assert_same, attack, guest, make, prepare};
use std::path::Path;

const SOURCE: &str = "source.qcow2";
const SIZE: u64 = 8 << 20;

/// Commands that write a pattern of many extents.
fn extents(byte: u8, first: u64, step: u64, length: u64) -> Vec<String> {
    (first..SIZE - length)
        .step_by(step as usize)
        .map(|at| format!("write -q -P {} {at} {length}", byte + (at / step) as u8 % 16))
        .collect()
}

fn words(commands: &[String]) -> Vec<&str> {
    commands.iter().map(String::as_str).collect()
}

fn seen(sandbox: &Sandbox, name: &str) -> Vec<u8> {
    guest(name, sandbox, Kind::Plain, "", &sandbox.at(name))
}

/// An image to convert, and one with other bytes to convert it into.
fn to_convert() -> Sandbox {
    let sandbox = Sandbox::in_memory();
    let data = extents(0x10, 0, 0x5_0000, 0x3_2000);
    make(&sandbox, SOURCE, "cluster_size=16k", "8M", &words(&data));
    make(&sandbox, IMAGE, "cluster_size=4k", "8M", &["write -q -P 0x77 0 8M"]);
    sandbox
}

#[test]
fn a_conversion_that_is_killed_leaves_its_source_and_parts_of_it() {
    let ready = to_convert();
    let source = std::fs::read(ready.at(SOURCE)).expect("it was just made");
    let expected = seen(&ready, SOURCE);
    for options in [
        "-O qcow2",
        "-W -m 16 -O qcow2 -o cluster_size=512",
        "-c -O qcow2",
        "-c -W -O qcow2 -o compression_type=zstd,cluster_size=4k",
        "-O qcow2 -o preallocation=metadata,extended_l2=on",
        "-O qcow2 -o preallocation=full,lazy_refcounts=on",
    ] {
        let line = format!("img convert -f qcow2 {options} {SOURCE} new.qcow2");
        attack(&ready, Kind::Plain, &line, |scene| {
            scene.wait(SOURCE);
            assert!(scene.bytes(SOURCE) == source, "{}: the source has changed", scene.what);
            if scene.at("new.qcow2").exists() {
                judge_new(scene, &expected);
            }
            scene.succeed(&line, IMAGE);
            assert_same(&scene.what, &scene.guest("new.qcow2"), &expected);
        });
    }
}

/// A target that had to be made: no image yet, or one that holds a part of the source.
fn judge_new(scene: &Scene, expected: &[u8]) {
    let name = "new.qcow2";
    scene.wait(name);
    let is_image = check(&scene.at(name)).is_some();
    let (status, said) = scene.run("img check -f qcow2 FILE", name);
    if !is_image {
        assert_eq!(status, 1, "{}: no image for the peer: {said:?}", scene.what);
        return;
    }
    scene.is_sound(name);
    assert_either(&scene.what, &scene.guest(name), &[expected, &[]]);
    scene.takes_writes(name);
}

#[test]
fn a_conversion_into_an_image_that_is_there_leaves_it_sound() {
    let ready = to_convert();
    let source = std::fs::read(ready.at(SOURCE)).expect("it was just made");
    let [expected, old] = [seen(&ready, SOURCE), seen(&ready, IMAGE)];
    for options in ["", "-W -m 16 ", "-c "] {
        if options == "-c " {
            // What is there already cannot be compressed.
            make(&ready, IMAGE, "cluster_size=4k", "8M", &[]);
        }
        let line = format!("img convert -f qcow2 -n {options}-O qcow2 {SOURCE} {IMAGE}");
        attack(&ready, Kind::Plain, &line, |scene| {
            scene.is_sound(IMAGE);
            assert!(scene.bytes(SOURCE) == source, "{}: the source has changed", scene.what);
            assert_either(&scene.what, &scene.guest(IMAGE), &[&expected, &old, &[]]);
            scene.takes_writes(IMAGE);
            if options != "-c " {
                scene.succeed(&line, IMAGE);
                assert_same(&scene.what, &scene.guest(IMAGE), &expected);
            }
        });
    }
}

#[test]
fn bitmaps_that_were_being_copied_are_whole_or_marked() {
    let ready = to_convert();
    for words in ["bitmap --add -g 512 FILE b", "bitmap --add -g 4k FILE a"] {
        prepare(&ready, &words.replace("FILE", ready.at(SOURCE).to_str().expect("a plain name")));
    }
    let data = extents(0x40, 0x2000, 0x9_0000, 0x1_0000);
    super::super::image::qemu_io(&ready.at(SOURCE), &words(&data));
    let expected = bitmaps(&std::fs::read(ready.at(SOURCE)).expect("it was just made"));
    assert!(expected.iter().all(|bitmap| !bitmap.in_use && bitmap.bits.contains(&1)));
    let line = format!("img convert -f qcow2 --bitmaps -O qcow2 {SOURCE} new.qcow2");
    attack(&ready, Kind::Plain, &line, |scene| {
        scene.wait(SOURCE);
        let now = bitmaps(&scene.bytes(SOURCE));
        assert!(now == expected, "{}: the source's bitmaps have changed", scene.what);
        if !scene.at("new.qcow2").exists() || check(&scene.at("new.qcow2")).is_none() {
            return;
        }
        scene.is_sound("new.qcow2");
        for bitmap in bitmaps(&scene.bytes("new.qcow2")) {
            let whole =
                expected.iter().any(|one| one.name == bitmap.name && one.bits == bitmap.bits);
            assert!(bitmap.in_use || whole, "{}: {}", scene.what, bitmap.name);
        }
        scene.takes_writes("new.qcow2");
    });
}

/// Three images on top of each other; the overlays are longer than what is below them.
fn chain() -> Sandbox {
    let sandbox = Sandbox::in_memory();
    let [low, middle, high] = [
        extents(0x10, 0, 0x7_0000, 0x3_2000),
        extents(0x30, 0x1_0000, 0xb_0000, 0x1_3000),
        extents(0x50, 0x800, 0x5_0000, 0x1_2000),
    ];
    make(&sandbox, "base.qcow2", "cluster_size=4k", "8M", &words(&low));
    let over = |name: &str| format!("cluster_size=4k,backing_fmt=qcow2,backing_file={name}");
    make(&sandbox, "mid.qcow2", &over("base.qcow2"), "9M", &words(&middle));
    let mut commands = words(&high);
    commands.extend(["write -z 1M 130k", "write -P 9 9500k 64k", "discard 3M 64k"]);
    make(&sandbox, IMAGE, &over("mid.qcow2"), "10M", &commands);
    sandbox
}

#[test]
fn a_commit_that_is_killed_leaves_what_the_guest_sees() {
    let ready = chain();
    let expected = seen(&ready, IMAGE);
    for options in ["", "-d ", "-b base.qcow2 "] {
        let line = format!("img commit -f qcow2 {options}FILE");
        attack(&ready, Kind::Plain, &line, |scene| {
            for name in [IMAGE, "mid.qcow2", "base.qcow2"] {
                scene.is_sound(name);
            }
            assert_same(&scene.what, &scene.guest(IMAGE), &expected);
            scene.succeed(&line, IMAGE);
            assert_same(&scene.what, &scene.guest(IMAGE), &expected);
            let target = if options.starts_with("-b") { "base.qcow2" } else { "mid.qcow2" };
            assert_same(&scene.what, &scene.guest(target), &expected);
            scene.takes_writes(IMAGE);
        });
    }
}

#[test]
fn a_rebase_that_is_killed_leaves_what_the_guest_sees() {
    let ready = chain();
    let other = extents(0x70, 0, 0x6_0000, 0x3_0000);
    make(&ready, "other.qcow2", "cluster_size=64k", "8M", &words(&other));
    let expected = seen(&ready, IMAGE);
    let below: Vec<_> = ["mid.qcow2", "base.qcow2", "other.qcow2"]
        .map(|name| (name, std::fs::read(ready.at(name)).expect("it was just made")))
        .into();
    for line in [
        "img rebase -f qcow2 -F qcow2 -b other.qcow2 FILE",
        "img rebase -f qcow2 -F qcow2 -b base.qcow2 FILE",
        "img rebase -f qcow2 -b  FILE",
        "img rebase -c -f qcow2 -F qcow2 -b other.qcow2 FILE",
    ] {
        attack(&ready, Kind::Plain, line, |scene| {
            scene.is_sound(IMAGE);
            assert_same(&scene.what, &scene.guest(IMAGE), &expected);
            for (name, bytes) in &below {
                assert!(scene.bytes(name) == *bytes, "{}: {name} has changed", scene.what);
            }
            scene.succeed(line, IMAGE);
            assert_same(&scene.what, &scene.guest(IMAGE), &expected);
            scene.takes_writes(IMAGE);
        });
    }
}

/// The base is a raw file, and ends before the overlay.
#[test]
fn a_commit_into_a_raw_file_that_is_killed_leaves_what_the_guest_sees() {
    let ready = Sandbox::in_memory();
    ready.put("base.raw", &[0x22; 0x50_0200]);
    let data = words_of_overlay();
    let options = "cluster_size=64k,backing_fmt=raw,backing_file=base.raw";
    make(&ready, IMAGE, options, "8M", &words(&data));
    let expected = seen(&ready, IMAGE);
    let line = "img commit -f qcow2 FILE";
    attack(&ready, Kind::Plain, line, |scene| {
        scene.is_sound(IMAGE);
        assert_same(&scene.what, &scene.guest(IMAGE), &expected);
        scene.succeed(line, IMAGE);
        let raw = std::fs::read(Path::new(&scene.at("base.raw"))).expect("it is there");
        assert_same(&scene.what, &raw, &expected);
        scene.takes_writes(IMAGE);
    });
}

fn words_of_overlay() -> Vec<String> {
    extents(0x60, 0x1_0000, 0x9_0000, 0x4_0000)
}
