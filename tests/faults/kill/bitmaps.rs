//! `bitmap`: a bitmap that is not marked as in use says what it said before, or what it was to say.

use super::super::image::{Sandbox, qemu_io};
use super::super::tools::Kind;
use super::scene::{IMAGE, assert_same, attack, guest, make, prepare};
use std::fs;

/// A persistent bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    pub name: String,
    pub in_use: bool,
    /// Whether writes are noted in it.
    pub auto: bool,
    /// A byte for each bit.
    pub bits: Vec<u8>,
}

fn word(bytes: &[u8], at: u64) -> u64 {
    let at = at as usize;
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// The persistent bitmaps of an image; in use, all of them, where the image says that whoever
/// wrote to it last knew of none.
pub fn bitmaps(image: &[u8]) -> Vec<Bitmap> {
    let (size, cluster) = (word(image, 24), 1 << (word(image, 16) as u32));
    let stale = word(image, 88) & 1 == 0;
    let mut at = word(image, 96) as u32 as u64;
    let directory = loop {
        match (word(image, at) >> 32, word(image, at) as u32) {
            (0, _) => return Vec::new(),
            (0x2385_2875, _) => break at + 8,
            (_, length) => at += 8 + u64::from(length).next_multiple_of(8),
        }
    };
    let count = word(image, directory) >> 32;
    let mut at = word(image, directory + 16);
    (0..count)
        .map(|_| {
            let (table, entries) = (word(image, at), word(image, at + 8) >> 32);
            let (flags, shape) = (word(image, at + 8) as u32, word(image, at + 16));
            let [granularity, name, extra] =
                [shape >> 48 & 0xff, shape >> 32 & 0xffff, shape & 0xffff_ffff];
            let from = (at + 24 + extra) as usize;
            let text = String::from_utf8_lossy(&image[from..from + name as usize]).into_owned();
            at = (at + 24 + extra + name).next_multiple_of(8);
            let mut bits = Vec::new();
            for entry in 0..entries {
                let entry = word(image, table + 8 * entry);
                let offset = (entry & 0x00ff_ffff_ffff_fe00) as usize;
                let bytes = match offset {
                    0 => vec![if entry & 1 != 0 { 0xff } else { 0 }; cluster],
                    _ => image[offset..offset + cluster].to_vec(),
                };
                bits.extend(bytes.iter().flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1)));
            }
            bits.truncate(size.div_ceil(1 << granularity) as usize);
            let in_use = stale || flags & 1 != 0;
            Bitmap { name: text, in_use, auto: flags & 2 != 0, bits }
        })
        .collect()
}

/// An image with two bitmaps that say different things, and one that is disabled.
fn with_bitmaps() -> Sandbox {
    let ready = Sandbox::in_memory();
    make(&ready, IMAGE, "cluster_size=512", "4M", &["write -q -P 1 0 700k"]);
    prepare(&ready, "bitmap --add -g 512 IMAGE first");
    qemu_io(&ready.at(IMAGE), &["write -q -P 2 100k 300k", "write -q -P 3 2M 64k"]);
    prepare(&ready, "bitmap --add -g 512 IMAGE second");
    prepare(&ready, "bitmap --add -g 4k IMAGE third");
    qemu_io(&ready.at(IMAGE), &["write -q -P 4 1M 400k", "write -q -P 5 3M 200k"]);
    prepare(&ready, "bitmap --disable IMAGE third");
    ready
}

#[test]
fn a_bitmap_of_a_killed_tool_is_the_old_one_the_new_one_or_marked() {
    let ready = with_bitmaps();
    let expected = guest("before", &ready, Kind::Plain, "", &ready.at(IMAGE));
    let before = bitmaps(&fs::read(ready.at(IMAGE)).expect("it was just made"));
    assert_eq!(before.len(), 3);
    for line in [
        "img bitmap --add -g 512 FILE fourth",
        "img bitmap --remove FILE second",
        "img bitmap --clear FILE first",
        "img bitmap --enable FILE third",
        "img bitmap --disable FILE first",
        "img bitmap --merge first FILE second",
        "img bitmap --add -g 512 --disable --merge first --merge second FILE both",
    ] {
        // What the peer makes of it.
        let done = Sandbox::in_memory();
        done.put(IMAGE, &fs::read(ready.at(IMAGE)).expect("it is there"));
        prepare(&done, line.strip_prefix("img ").expect("it is").replace("FILE", "IMAGE").as_str());
        let after = bitmaps(&fs::read(done.at(IMAGE)).expect("it is there"));
        attack(&ready, Kind::Plain, line, |scene| {
            scene.is_sound(IMAGE);
            let now = bitmaps(&scene.bytes(IMAGE));
            for bitmap in &now {
                let is_known = |all: &[Bitmap]| all.contains(bitmap);
                let fine = bitmap.in_use || is_known(&before) || is_known(&after);
                assert!(fine, "{}: {} says something else", scene.what, bitmap.name);
            }
            for bitmap in before.iter().filter(|one| after.iter().any(|two| two.name == one.name)) {
                let is_there = now.iter().any(|one| one.name == bitmap.name);
                assert!(is_there, "{}: {} is gone", scene.what, bitmap.name);
            }
            assert_same(&scene.what, &scene.guest(IMAGE), &expected);
            scene.takes_writes(IMAGE);
        });
    }
}
