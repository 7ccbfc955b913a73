//! Internal snapshots made here: judged by the peer, and through crashes and failures.

use super::crash::Random;
use super::order::{flushed_between, writes};
use crate::qcow2::testing::Scratch;
use crate::qcow2::testing::rig::{Rig, Setup};
use crate::qcow2::testing::volume::{Event, Volume};
use crate::qcow2::{NewSnapshot, Qcow2Options, SnapshotSelector};
use blockplex_graph::{Error, ErrorKind, Request, Result};
use blockplex_io::buffer::{IoBuffer, IoVector};

fn named(name: &str) -> SnapshotSelector {
    SnapshotSelector::IdOrName(name.into())
}

fn create(rig: &mut Rig, name: &str) -> Result<()> {
    let new = NewSnapshot::of_disk(name);
    rig.manage(async |driver, io| driver.create_snapshot(io, new).await.map(drop))
}

fn apply(rig: &mut Rig, name: &str) -> Result<()> {
    rig.manage(async |driver, io| driver.apply_snapshot(io, &named(name)).await.map(drop))
}

fn delete(rig: &mut Rig, name: &str) -> Result<()> {
    rig.manage(async |driver, io| driver.delete_snapshot(io, &named(name)).await.map(drop))
}

fn names(rig: &mut Rig) -> Vec<String> {
    let name = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    rig.manage(async |driver, _| {
        driver.snapshots().into_iter().map(|snapshot| name(snapshot.entry.name)).collect()
    })
}

fn snapshot_contents(volume: &Volume, which: &str) -> Vec<u8> {
    let options = Qcow2Options { snapshot: Some(named(which)), ..Qcow2Options::default() };
    let setup = Setup { options, read_only: true, ..Setup::default() };
    let mut rig = Rig::open(volume, setup).unwrap();
    let size = rig.manage(async |driver, _| driver.virtual_size());
    let bytes = rig.read(0, size as usize);
    rig.close();
    bytes
}

const SIZE: usize = 1 << 20;

#[test]
fn the_peer_finds_our_snapshots_as_they_were_taken() {
    let scratch = Scratch::new();
    for options in [
        "",
        "cluster_size=512",
        "compat=0.10,cluster_size=4k",
        "refcount_bits=4,cluster_size=4k",
        "extended_l2=on,cluster_size=32k",
    ] {
        let path = scratch.create(options, "1M");
        scratch.qemu_io(&path, "write -P 0x11 0 512k");
        let volume = Volume::from_file(&path);
        let mut rig = Rig::writable(&volume);
        rig.write(300_000, &vec![0x22; 400_000]);
        let first = rig.read(0, SIZE);
        create(&mut rig, "first").unwrap();
        assert!(rig.read(0, SIZE) == first);
        rig.write(1000, &vec![0x33; 600_000]);
        rig.request(Request::discard(700_000, 300_000)).unwrap();
        let second = rig.read(0, SIZE);
        create(&mut rig, "second").unwrap();
        rig.write(0, &vec![0x44; 10_000]);
        let last = rig.read(0, SIZE);
        assert_eq!(names(&mut rig), ["first", "second"]);
        rig.close();
        volume.save(&path);
        scratch.check_clean(&path);
        assert!(scratch.contents(&path) == last, "{options}");
        let list = scratch.qemu_img(&["snapshot", "-l", &path]);
        assert!(list.contains("1       first") && list.contains("2       second"), "{list}");
        for (name, contents) in [("first", &first), ("second", &second)] {
            let copy = scratch.path();
            std::fs::copy(&path, &copy).unwrap();
            assert!(&snapshot_contents(&volume, name) == contents, "{options}: {name}");
            scratch.qemu_img(&["snapshot", "-a", name, &copy]);
            assert!(&scratch.contents(&copy) == contents, "{options}: {name}");
            scratch.qemu_img(&["snapshot", "-d", "first", &copy]);
            scratch.qemu_img(&["snapshot", "-d", "second", &copy]);
            scratch.check_clean(&copy);
        }
    }
}

#[test]
fn snapshots_of_the_peer_are_applied_and_removed() {
    let scratch = Scratch::new();
    for options in ["", "cluster_size=512", "compat=0.10,cluster_size=4k", "extended_l2=on"] {
        let path = scratch.create(options, "1M");
        scratch.qemu_io(&path, "write -P 0x11 0 512k");
        scratch.qemu_img(&["snapshot", "-c", "one", &path]);
        scratch.qemu_io(&path, "write -P 0x22 256k 512k");
        scratch.qemu_img(&["snapshot", "-c", "two", &path]);
        scratch.qemu_io(&path, "write -P 0x33 0 64k");
        let expected: Vec<Vec<u8>> =
            ["one", "two"].map(|name| snapshot_contents(&Volume::from_file(&path), name)).into();
        assert!(expected[0][..524_288].iter().all(|byte| *byte == 0x11));
        let volume = Volume::from_file(&path);
        let mut rig = Rig::writable(&volume);
        apply(&mut rig, "one").unwrap();
        assert!(rig.read(0, SIZE) == expected[0], "{options}");
        rig.write(100, &vec![0x55; 70_000]);
        apply(&mut rig, "two").unwrap();
        assert!(rig.read(0, SIZE) == expected[1], "{options}");
        delete(&mut rig, "one").unwrap();
        assert!(rig.read(0, SIZE) == expected[1], "{options}");
        delete(&mut rig, "2").unwrap();
        assert_eq!(names(&mut rig), [""; 0]);
        let error = delete(&mut rig, "2").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        // Everything is the disk's own again.
        rig.flush();
        rig.flush();
        volume.record();
        rig.write(4096, &[1; 512]);
        rig.flush();
        let written = volume.journal();
        let in_place =
            |event: &Event| matches!(event, Event::Write(_, bytes) if bytes.len() == 512);
        assert!(written.len() == 2 && in_place(&written[0]), "{options}: {written:?}");
        rig.close();
        volume.save(&path);
        scratch.check_clean(&path);
    }
}

#[test]
fn compressed_clusters_are_counted_for_every_snapshot() {
    let scratch = Scratch::new();
    let (raw, path) = (scratch.path(), scratch.path());
    let bytes: Vec<u8> = (0..SIZE).map(|at| (at / 700 % 251) as u8).collect();
    std::fs::write(&raw, &bytes).unwrap();
    scratch.qemu_img(&["convert", "-c", "-O", "qcow2", "-o", "cluster_size=4k", &raw, &path]);
    let volume = Volume::from_file(&path);
    let mut rig = Rig::writable(&volume);
    create(&mut rig, "packed").unwrap();
    rig.write(0, &vec![9; 300_000]);
    create(&mut rig, "half").unwrap();
    rig.write(300_000, &vec![8; 300_000]);
    rig.close();
    assert!(snapshot_contents(&volume, "packed") == bytes);
    let mut rig = Rig::writable(&volume);
    apply(&mut rig, "packed").unwrap();
    assert!(rig.read(0, SIZE) == bytes);
    delete(&mut rig, "half").unwrap();
    rig.close();
    volume.save(&path);
    scratch.check_clean(&path);
    let mut rig = Rig::writable(&volume);
    delete(&mut rig, "packed").unwrap();
    assert!(rig.read(0, SIZE) == bytes);
    rig.close();
    volume.save(&path);
    scratch.check_clean(&path);
}

#[test]
fn going_back_restores_the_size_of_the_disk() {
    let scratch = Scratch::new();
    let path = scratch.create("cluster_size=512", "1M");
    let volume = Volume::from_file(&path);
    let mut rig = Rig::writable(&volume);
    rig.write(SIZE as u64 - 700, &[7; 700]);
    create(&mut rig, "small").unwrap();
    rig.request(Request::truncate(9 << 20)).unwrap();
    rig.write(8 << 20, &[8; 700]);
    create(&mut rig, "large").unwrap();
    apply(&mut rig, "small").unwrap();
    assert_eq!(rig.read(SIZE as u64 - 700, 700), [7; 700]);
    assert!(rig.try_read(SIZE as u64, 512).is_err(), "past the end");
    assert_eq!(rig.manage(async |driver, _| driver.virtual_size()), SIZE as u64);
    rig.request(Request::truncate(2 << 20)).unwrap();
    assert_eq!(rig.read(SIZE as u64, SIZE), vec![0; SIZE]);
    apply(&mut rig, "large").unwrap();
    assert_eq!(rig.read(8 << 20, 700), [8; 700]);
    rig.close();
    volume.save(&path);
    scratch.check_clean(&path);
}

#[test]
fn a_refcount_that_cannot_grow_refuses_the_snapshot_and_changes_nothing() {
    let scratch = Scratch::new();
    let path = scratch.create("refcount_bits=1", "1M");
    scratch.qemu_io(&path, "write -P 0x11 0 512k");
    let volume = Volume::from_file(&path);
    let mut rig = Rig::writable(&volume);
    let before = volume.bytes();
    let error = create(&mut rig, "no").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    rig.write(0, &[3; 100]);
    rig.close();
    volume.save(&path);
    scratch.check_clean(&path);
    assert_eq!(volume.bytes().len(), before.len(), "written in place");
}

#[test]
fn vm_state_goes_with_the_snapshot() {
    let scratch = Scratch::new();
    let path = scratch.create("cluster_size=4k", "1M");
    let volume = Volume::from_file(&path);
    let mut rig = Rig::writable(&volume);
    rig.write(0, &[1; 5000]);
    let put = |rig: &mut Rig, at: u64, bytes: &[u8]| {
        let vector = IoVector::from(IoBuffer::from_slice(bytes));
        rig.manage(async |driver, io| driver.write_vm_state(io, at, &vector).await).unwrap();
    };
    let get = |rig: &mut Rig, length: usize| {
        let vector = IoVector::zeroed(length);
        rig.manage(async |driver, io| driver.read_vm_state(io, 0, &vector).await).unwrap();
        vector.to_vec()
    };
    let state: Vec<u8> = (0..9_000_000_u32).map(|at| (at / 999) as u8).collect();
    put(&mut rig, 0, &state);
    put(&mut rig, 1000, &[0xee; 100]);
    let mut expected = state.clone();
    expected[1000..1100].fill(0xee);
    let new = NewSnapshot { vm_state_size: state.len() as u64, ..NewSnapshot::of_disk("vm") };
    rig.manage(async |driver, io| driver.create_snapshot(io, new).await).unwrap();
    assert_eq!(get(&mut rig, 100), [0; 100], "the disk has none any more");
    apply(&mut rig, "vm").unwrap();
    assert!(get(&mut rig, state.len()) == expected);
    rig.close();
    volume.save(&path);
    scratch.check_clean(&path);
    let list = scratch.qemu_img(&["snapshot", "-l", &path]);
    assert!(list.contains("8.58 MiB"), "{list}");
    let options = Qcow2Options { snapshot: Some(named("vm")), ..Qcow2Options::default() };
    let setup = Setup { options, read_only: true, ..Setup::default() };
    let mut view = Rig::open(&volume, setup).unwrap();
    assert!(get(&mut view, state.len()) == expected);
    view.close();
}

/// Disk and snapshots, by name.
#[derive(Clone, PartialEq)]
struct Whole {
    disk: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
}

fn whole(volume: &Volume) -> Whole {
    let mut rig = Rig::open(volume, Setup { read_only: true, ..Setup::default() }).unwrap();
    let size = rig.manage(async |driver, _| driver.virtual_size());
    let disk = rig.read(0, size as usize);
    let names = names(&mut rig);
    rig.close();
    let snapshots = names.into_iter().map(|name| (name.clone(), snapshot_contents(volume, &name)));
    Whole { disk, snapshots: snapshots.collect() }
}

/// One step of the work that crashes and failures interrupt.
fn step(rig: &mut Rig, number: u64) -> Result<()> {
    match number {
        0 => create(rig, "a"),
        1 => create(rig, "b"),
        2 => apply(rig, "a"),
        3 => delete(rig, "a"),
        4 => apply(rig, "b"),
        _ => delete(rig, "b"),
    }
}

const STEPS: u64 = 6;

/// Writes between the steps, flushed.
fn scribble(rig: &mut Rig, random: &mut Random) -> Result<()> {
    for _ in 0..3 {
        let start = random.below(230_000);
        let length = 1 + random.below(30_000) as usize;
        rig.try_write(start, &vec![random.below(256) as u8; length])?;
    }
    rig.request(Request::flush()).map(drop)
}

/// The file after a crash: all up to the last flush, and some of the rest.
fn crashed(base: &[u8], journal: &[Event], random: &mut Random) -> Volume {
    let volume = Volume::new(base);
    let durable = journal.iter().rposition(|event| *event == Event::Flush).unwrap_or(0);
    for (at, event) in journal.iter().enumerate() {
        if at <= durable || random.below(2) == 0 {
            volume.apply(event);
        }
    }
    volume
}

/// Nothing but leaks (N5); version 2 has no mark, and flags that are clear stay so.
fn check(scratch: &Scratch, path: &str) {
    match scratch.read(path)[7] == 2 {
        true => scratch.check_harmless(path),
        false => scratch.check_sound(path),
    }
}

fn crash_test(options: &str, seed: u64) {
    let scratch = Scratch::new();
    let mut random = Random(seed);
    let volume = Volume::from_file(&scratch.create(options, "256k"));
    let path = scratch.path();
    for number in 0..STEPS {
        let mut rig = Rig::writable(&volume);
        scribble(&mut rig, &mut random).unwrap();
        rig.close();
        let (base, before) = (volume.bytes(), whole(&volume));
        volume.record();
        let mut rig = Rig::writable(&volume);
        step(&mut rig, number).unwrap();
        rig.close();
        let journal = volume.journal();
        let after = whole(&volume);
        // Late refcounts change less than half of it.
        let step = if options.contains("lazy") { 3 } else { 1 };
        for cut in (0..=journal.len()).step_by(step) {
            let volume = crashed(&base, &journal[..cut], &mut random);
            let what = format!("{options}, seed {seed}, step {number}, cut at {cut}");
            let found = whole(&volume);
            assert!(found == before || found == after, "{what}");
            volume.save(&path);
            if volume.bytes()[79] & 1 != 0 {
                // Counted anew, by the peer as by us below.
                scratch.qemu_img(&["check", "-q", "-r", "all", &path]);
            }
            check(&scratch, &path);
            // Writing changes no snapshot.
            let mut rig = Rig::writable(&volume);
            scribble(&mut rig, &mut random).unwrap();
            rig.close();
            assert!(whole(&volume).snapshots == found.snapshots, "{what}");
            volume.save(&path);
            check(&scratch, &path);
        }
    }
}

#[test]
fn a_crash_leaves_the_old_state_or_the_new_one() {
    crash_test("cluster_size=4k", 5);
    crash_test("cluster_size=512,compat=0.10", 6);
    crash_test("extended_l2=on,cluster_size=16k", 7);
    crash_test("cluster_size=4k,lazy_refcounts=on", 8);
}

/// N1: the peer leaves flags in the tables of a snapshot that it went away from. They are durably
/// gone before anything else is counted there.
#[test]
fn a_crash_while_a_snapshot_of_the_peer_is_applied_leaves_no_wrong_flag() {
    let scratch = Scratch::new();
    let path = scratch.create("cluster_size=4k", "256k");
    scratch.qemu_io(&path, "write -P 0x11 0 128k");
    scratch.qemu_img(&["snapshot", "-c", "one", &path]);
    scratch.qemu_io(&path, "write -P 0x22 64k 128k");
    scratch.qemu_img(&["snapshot", "-c", "two", &path]);
    scratch.qemu_img(&["snapshot", "-a", "one", &path]);
    let volume = Volume::from_file(&path);
    let base = volume.bytes();
    let mut rig = Rig::writable(&volume);
    let snapshots = rig.manage(async |driver, _| driver.snapshots());
    let number = |at: u64| {
        let at = at as usize;
        u64::from_be_bytes(base[at..at + 8].try_into().unwrap())
    };
    let table = number(snapshots[1].entry.l1_table_offset) & 0x00ff_ffff_ffff_fe00;
    assert_ne!(number(table + 16 * 8) >> 63, 0, "the snapshot's alone, with the flag");
    volume.record();
    apply(&mut rig, "two").unwrap();
    rig.close();
    let journal = volume.journal();
    let flags = writes(&journal, table + 16 * 8, 8)[0];
    let counts = number(number(48));
    let counted = writes(&journal, counts, 4096);
    let first = *counted.iter().find(|at| **at > flags).unwrap();
    assert_eq!(counted[0], first, "nothing is counted before");
    flushed_between(&journal, flags, first, "flags and counts");
    let mut random = Random(9);
    for cut in 0..=journal.len() {
        for _ in 0..2 {
            crashed(&base, &journal[..cut], &mut random).save(&path);
            scratch.check_harmless(&path);
        }
    }
}

/// Fails the operation of this number, or all from it on.
fn fail_from(volume: &Volume, number: u64, errno: i32, once: bool) {
    let mut seen = 0;
    volume.set_gate(move |event| {
        if matches!(event, Event::Read(..)) {
            return Ok(false);
        }
        seen += 1;
        let fails = if once { seen == number + 1 } else { seen > number };
        if fails { Err(errno) } else { Ok(false) }
    });
}

fn failure_test(options: &str, errno: i32, once: bool) {
    let scratch = Scratch::new();
    let path = scratch.path();
    let original = Volume::from_file(&scratch.create(options, "256k"));
    for number in 0..STEPS {
        let mut rig = Rig::writable(&original);
        scribble(&mut rig, &mut Random(number + 1)).unwrap();
        rig.close();
        let before = whole(&original);
        for nth in 0.. {
            let volume = Volume::new(&original.bytes());
            let mut rig = Rig::writable(&volume);
            fail_from(&volume, nth, errno, once);
            let result = step(&mut rig, number);
            volume.remove_gate();
            let what = format!("{options}, step {number}, operation {nth}: {result:?}");
            let scribbled = scribble(&mut rig, &mut Random(99));
            match scribbled {
                Ok(()) => rig.close(),
                // The header is in doubt.
                Err(_) => rig.abandon(),
            }
            let found = whole(&volume);
            let kept = |state: &Whole, name: &str| {
                state.snapshots.iter().find(|(other, _)| other == name).cloned()
            };
            for (name, contents) in &before.snapshots {
                let now = kept(&found, name);
                assert!(now.is_none_or(|(_, now)| now == *contents), "{what}: {name} changed");
            }
            volume.save(&path);
            scratch.check_harmless(&path);
            if result.is_ok() && nth > 3 {
                break;
            }
            assert!(nth < 200, "{what}: no end");
        }
        let mut rig = Rig::writable(&original);
        step(&mut rig, number).unwrap();
        rig.close();
    }
}

#[test]
fn a_failure_at_any_operation_harms_nothing() {
    failure_test("cluster_size=4k", libc::ENOSPC, true);
    failure_test("cluster_size=4k", libc::EIO, false);
}

/// N4: the write that would have made it the image's fails, and so does the flush behind it.
#[test]
fn a_snapshot_that_fails_leaves_no_references() {
    let scratch = Scratch::new();
    for fails_at_flush in [false, true] {
        let volume = Volume::from_file(&scratch.create("cluster_size=4k", "256k"));
        let mut rig = Rig::writable(&volume);
        rig.write(0, &[1; 100_000]);
        let (mut comes, mut done) = (false, false);
        volume.set_gate(move |event| {
            let is_switch = matches!(event, Event::Write(60, _));
            let fails = !done && if fails_at_flush { comes } else { is_switch };
            done |= fails;
            comes |= is_switch;
            if fails { Err(libc::EIO) } else { Ok(false) }
        });
        assert_eq!(create(&mut rig, "no").unwrap_err().errno(), libc::EIO);
        volume.remove_gate();
        assert_eq!(names(&mut rig), [""; 0]);
        rig.flush();
        volume.record();
        rig.write(0, &[2; 512]);
        assert_eq!(volume.journal().len(), 1, "in place: the disk's own again");
        rig.close();
        let path = scratch.path();
        volume.save(&path);
        scratch.check_clean(&path);
    }
}

#[test]
fn bad_names_and_unknown_snapshots_are_refused() {
    let scratch = Scratch::new();
    let volume = Volume::from_file(&scratch.create("", "1M"));
    let mut rig = Rig::writable(&volume);
    for name in ["x".repeat(256), "a\0b".to_owned()] {
        let error = create(&mut rig, &name).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
    let kind = |result: Result<()>| result.as_ref().map_err(Error::kind).unwrap_err();
    assert_eq!(kind(apply(&mut rig, "none\n")), ErrorKind::NotFound);
    assert!(!apply(&mut rig, "none\n").unwrap_err().to_string().contains('\n'), "escaped");
    rig.close();
    let options = Qcow2Options { snapshot: Some(named("none")), ..Qcow2Options::default() };
    let read_only = Setup { options: options.clone(), read_only: true, ..Setup::default() };
    assert_eq!(Rig::open(&volume, read_only).err().unwrap().kind(), ErrorKind::NotFound);
    let writable = Setup { options, ..Setup::default() };
    assert_eq!(Rig::open(&volume, writable).err().unwrap().kind(), ErrorKind::InvalidArgument);
}
