//! `check -r`: another one ends clean, and the guest sees what it saw.

use super::super::image::{Check, Patch, Sandbox, be16, be64, check, patched};
use super::super::tools::Kind;
use super::scene::{IMAGE, assert_same, attack, guest, make};
use std::fs;

/// An image of small clusters, and where its first refcount block, its L1 table and its first L2
/// table are.
fn image() -> (Vec<u8>, [u64; 4]) {
    let sandbox = Sandbox::in_memory();
    let commands = ["write -q -P 1 0 1500k", "write -q -c -P 2 3M 64k", "write -q -P 3 3500k 100k"];
    make(&sandbox, IMAGE, "cluster_size=1k", "4M", &commands);
    let bytes = fs::read(sandbox.at(IMAGE)).expect("it was just made");
    let word = |at: u64| {
        let at = at as usize;
        u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
    };
    let offset = |entry: u64| entry & 0x00ff_ffff_ffff_fe00;
    let (table, l1) = (word(48), word(40));
    let places = [table, offset(word(table)), l1, offset(word(l1))];
    (bytes, places)
}

#[test]
fn a_repair_that_was_killed_is_finished_by_the_next_one() {
    let (bytes, [table, block, l1, l2]) = image();
    let clusters = bytes.len() as u64 / 1024;
    let unused = |index: u64| be16(block + 2 * index, 1 + index as u16 % 2);
    // The file ends with clusters that are counted, and that nobody uses.
    let mut leaks: Vec<Patch> = vec![Patch::Length((clusters + 300) as usize as u64 * 1024)];
    leaks.extend((100..300).step_by(3).map(|index| be16(block + 2 * index, 2)));
    let (mut wrong, mut flags) = (Vec::new(), Vec::new());
    wrong.extend((60..400).step_by(5).map(unused));
    wrong.extend((62..400).step_by(7).map(|index| be16(block + 2 * index, 0)));
    let copied = |at: u64| {
        let at = at as usize;
        u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes")) & !(1 << 63)
    };
    flags.extend((0..100).step_by(2).map(|index| be64(l2 + 8 * index, copied(l2 + 8 * index))));
    flags.extend((0..8).map(|index| be64(l1 + 8 * index, copied(l1 + 8 * index))));
    let lost = vec![be64(table, 0)];
    let both = [wrong.as_slice(), &flags].concat();
    for (damage, patches, fix) in [
        ("leaks", &leaks, "leaks"),
        ("wrong", &wrong, "all"),
        ("flags", &flags, "all"),
        ("both", &both, "all"),
        ("lost", &lost, "all"),
    ] {
        let ready = Sandbox::in_memory();
        ready.put(IMAGE, &patched(&bytes, patches));
        let expected = guest(damage, &ready, Kind::Plain, "", &ready.at(IMAGE));
        let line = format!("img check -f qcow2 -r {fix} FILE");
        attack(&ready, Kind::Plain, &line, |scene| {
            let what = format!("{damage}: {}", scene.what);
            scene.wait(IMAGE);
            scene.succeed(&line, IMAGE);
            assert_eq!(check(&scene.at(IMAGE)), Some(Check::CLEAN), "{what}");
            assert_same(&what, &scene.guest(IMAGE), &expected);
            scene.takes_writes(IMAGE);
        });
    }
}
