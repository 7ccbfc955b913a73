//! Dirty bitmaps: kept right by every request, stored as the peer stores them, and never taken for
//! more than they are after a crash.

use super::crash::Random;
use crate::qcow2::testing::Scratch;
use crate::qcow2::testing::rig::{Rig, Setup};
use crate::qcow2::testing::volume::{Event, Volume};
use crate::qcow2::{BitmapStatus, NewBitmap};
use blockplex_graph::{ErrorKind, Request, Result};
use std::process::Command;

const SIZE: u64 = 1 << 20;
const CHUNK: u64 = 65536;

fn add(rig: &mut Rig, new: NewBitmap) -> Result<()> {
    rig.manage(async |driver, io| driver.add_bitmap(io, new).await)
}

fn status(rig: &mut Rig) -> Vec<BitmapStatus> {
    rig.manage(async |driver, _| driver.bitmaps())
}

/// The dirty areas of a bitmap.
fn areas(rig: &mut Rig, name: &str) -> Vec<(u64, u64)> {
    let bits = rig.manage(async |driver, _| driver.bitmap(name.as_bytes())).unwrap();
    let mut areas = Vec::new();
    while let Some(area) = bits.next_dirty_area(
        areas.last().map_or(0, |(offset, length)| offset + length),
        u64::MAX,
        u64::MAX,
    ) {
        areas.push(area);
    }
    areas
}

fn read_only(volume: &Volume) -> Rig {
    Rig::open(volume, Setup { read_only: true, ..Setup::default() }).unwrap()
}

/// The dirty areas of a bitmap as the peer exports them.
fn areas_of_the_peer(scratch: &Scratch, image: &str, name: &str) -> Vec<(u64, u64)> {
    let socket = scratch.path();
    let export = ["-r", "-f", "qcow2", "-B", name, "-k", &socket, "--fork", image];
    assert!(Command::new("qemu-nbd").args(export).status().unwrap().success());
    let options = format!(
        "driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
    );
    let map = scratch.qemu_img(&["map", "--output=json", "--image-opts", &options]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let mut areas: Vec<(u64, u64)> = Vec::new();
    // What is dirty is shown as a hole.
    for entry in map.as_array().unwrap().iter().filter(|entry| entry["data"] == false) {
        let (start, length) = (entry["start"].as_u64().unwrap(), entry["length"].as_u64().unwrap());
        match areas.last_mut() {
            Some((offset, before)) if *offset + *before == start => *before += length,
            _ => areas.push((start, length)),
        }
    }
    areas
}

#[test]
fn every_kind_of_request_is_marked_and_the_peer_finds_the_marks() {
    let scratch = Scratch::new();
    let path = scratch.create("", "1M");
    let volume = Volume::from_file(&path);
    let mut rig = Rig::writable(&volume);
    rig.write(0, &[1; 4096]);
    add(&mut rig, NewBitmap::persistent("all")).unwrap();
    add(&mut rig, NewBitmap { granularity: Some(512), ..NewBitmap::persistent("fine") }).unwrap();
    add(&mut rig, NewBitmap { recording: false, ..NewBitmap::persistent("off") }).unwrap();
    add(&mut rig, NewBitmap { persistent: false, ..NewBitmap::persistent("here") }).unwrap();
    // In place, the short way; allocating; zeros; a discard. A read is no write.
    rig.write(100, &[2; 512]);
    rig.write(3 * CHUNK, &[3; 10]);
    rig.request(Request::write_zeroes(5 * CHUNK + 4096, 4096)).unwrap();
    rig.request(Request::discard(8 * CHUNK, 2 * CHUNK)).unwrap();
    rig.read(0, SIZE as usize);
    let coarse = vec![(0, CHUNK), (3 * CHUNK, CHUNK), (5 * CHUNK, CHUNK), (8 * CHUNK, 2 * CHUNK)];
    let fine = vec![(0, 1024), (3 * CHUNK, 512), (5 * CHUNK + 4096, 4096), (8 * CHUNK, 2 * CHUNK)];
    assert_eq!(areas(&mut rig, "all"), coarse);
    assert_eq!(areas(&mut rig, "fine"), fine);
    assert_eq!(areas(&mut rig, "here"), coarse);
    assert_eq!(areas(&mut rig, "off"), []);
    rig.close();
    volume.save(&path);
    scratch.check_clean(&path);
    assert_eq!(areas_of_the_peer(&scratch, &path, "all"), coarse);
    assert_eq!(areas_of_the_peer(&scratch, &path, "fine"), fine);
    let information = scratch.qemu_img(&["info", "--output=json", &path]);
    let information: serde_json::Value = serde_json::from_str(&information).unwrap();
    let expected = serde_json::json!([
        {"flags": ["auto"], "name": "all", "granularity": 65536},
        {"flags": ["auto"], "name": "fine", "granularity": 512},
        {"flags": [], "name": "off", "granularity": 65536},
    ]);
    assert_eq!(information["format-specific"]["data"]["bitmaps"], expected);
    let mut rig = read_only(&volume);
    assert_eq!(areas(&mut rig, "fine"), fine);
    let stored = rig.manage(async |driver, _| driver.information().bitmaps.clone());
    assert_eq!(stored.len(), 3);
    assert!(stored[0].auto && !stored[0].in_use && !stored[2].auto);
    rig.close();
}

#[test]
fn bitmaps_of_the_peer_are_read_kept_and_removed() {
    let scratch = Scratch::new();
    for options in ["", "cluster_size=512", "cluster_size=2M"] {
        let path = scratch.create(options, "8M");
        scratch.qemu_img(&["bitmap", "--add", "-g", "512", &path, "fine"]);
        scratch.qemu_img(&["bitmap", "--add", &path, "off"]);
        scratch.qemu_io(&path, "write 1M 100k");
        scratch.qemu_img(&["bitmap", "--disable", &path, "off"]);
        scratch.qemu_io(&path, "write 7M 1M");
        let volume = Volume::from_file(&path);
        let mut rig = Rig::writable(&volume);
        assert_eq!(areas(&mut rig, "fine"), [(1 << 20, 102_400), (7 << 20, 1 << 20)], "{options}");
        rig.write(0, &[5; 1000]);
        let recording: Vec<bool> = status(&mut rig).iter().map(|bitmap| bitmap.recording).collect();
        assert_eq!(recording, [true, false]);
        rig.close();
        volume.save(&path);
        scratch.check_clean(&path);
        let fine = vec![(0, 1024), (1 << 20, 102_400), (7 << 20, 1 << 20)];
        assert_eq!(areas_of_the_peer(&scratch, &path, "fine"), fine, "{options}");
        // A merge across granularities, a clear, and the end of both.
        let mut rig = Rig::writable(&volume);
        rig.manage(async |driver, io| {
            let fine = driver.bitmap(b"fine").unwrap();
            driver.merge_bitmap(io, b"off", &fine).await.unwrap();
            driver.clear_bitmap(io, b"fine").await.unwrap();
        });
        assert_eq!(areas(&mut rig, "fine"), []);
        let merged = areas(&mut rig, "off");
        assert!(merged.iter().any(|(offset, _)| *offset == 0) && merged.len() > 1);
        rig.close();
        volume.save(&path);
        scratch.check_clean(&path);
        assert_eq!(areas_of_the_peer(&scratch, &path, "off"), merged, "{options}");
        let mut rig = Rig::writable(&volume);
        rig.manage(async |driver, io| {
            driver.remove_bitmap(io, b"off").await.unwrap();
            driver.remove_bitmap(io, b"fine").await.unwrap();
            let error = driver.remove_bitmap(io, b"fine").await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotFound);
        });
        rig.close();
        volume.save(&path);
        scratch.check_clean(&path);
        assert!(!scratch.qemu_img(&["info", &path]).contains("bitmaps"), "{options}");
    }
}

#[test]
fn a_full_bitmap_and_a_growing_disk_are_stored() {
    let scratch = Scratch::new();
    let path = scratch.create("cluster_size=512", "4M");
    let volume = Volume::from_file(&path);
    let mut rig = Rig::writable(&volume);
    add(&mut rig, NewBitmap { granularity: Some(512), ..NewBitmap::persistent("b") }).unwrap();
    rig.request(Request::write_zeroes(0, 4 << 20)).unwrap();
    rig.request(Request::truncate(9 << 20)).unwrap();
    rig.write((9 << 20) - 512, &[1; 512]);
    let expected = vec![(0, 4 << 20), ((9 << 20) - 512, 512)];
    assert_eq!(areas(&mut rig, "b"), expected);
    rig.close();
    volume.save(&path);
    scratch.check_clean(&path);
    assert_eq!(areas_of_the_peer(&scratch, &path, "b"), expected);
    let mut rig = read_only(&volume);
    assert_eq!(areas(&mut rig, "b"), expected);
    rig.close();
}

#[test]
fn what_a_writer_did_not_store_can_only_be_removed() {
    let scratch = Scratch::new();
    let path = scratch.create("", "1M");
    scratch.qemu_img(&["bitmap", "--add", &path, "b"]);
    let volume = Volume::from_file(&path);
    let mut rig = Rig::writable(&volume);
    assert_eq!(volume.bytes(), std::fs::read(&path).unwrap(), "opening writes nothing");
    rig.write(0, &[1; 512]);
    rig.flush();
    // A crash.
    let crashed = Volume::new(&volume.bytes());
    rig.close();
    crashed.save(&path);
    assert!(scratch.qemu_img(&["info", &path]).contains("in-use"));
    let mut rig = Rig::writable(&crashed);
    assert!(status(&mut rig)[0].inconsistent);
    let name = b"b".as_slice();
    rig.manage(async |driver, io| {
        for error in [
            driver.bitmap(name).map(drop).unwrap_err(),
            driver.clear_bitmap(io, name).await.unwrap_err(),
            driver.set_bitmap_recording(io, name, true).await.unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        }
    });
    let grown = rig.request(Request::truncate(2 << 20)).unwrap_err();
    assert_eq!(grown.kind(), ErrorKind::NotSupported);
    rig.write(0, &[2; 512]);
    rig.close();
    crashed.save(&path);
    assert!(scratch.qemu_img(&["info", &path]).contains("in-use"), "still");
    let mut rig = Rig::writable(&crashed);
    rig.manage(async |driver, io| driver.remove_bitmap(io, name).await).unwrap();
    rig.close();
    crashed.save(&path);
    scratch.check_clean(&path);
    assert!(!scratch.qemu_img(&["info", &path]).contains("bitmaps"));
}

#[test]
fn bitmaps_that_cannot_be_are_refused() {
    let scratch = Scratch::new();
    let volume = Volume::from_file(&scratch.create("", "1P"));
    let mut rig = Rig::writable(&volume);
    let kind = |rig: &mut Rig, new: NewBitmap| add(rig, new).unwrap_err().kind();
    let new = |name: &str| NewBitmap::persistent(name);
    let coarse = |name: &str| NewBitmap { granularity: Some(1 << 22), ..new(name) };
    assert_eq!(kind(&mut rig, new("too large")), ErrorKind::LimitExceeded);
    assert_eq!(kind(&mut rig, coarse("")), ErrorKind::InvalidArgument);
    assert_eq!(kind(&mut rig, coarse(&"x".repeat(1024))), ErrorKind::InvalidArgument);
    for granularity in [500, 256, 1 << 32] {
        let new = NewBitmap { granularity: Some(granularity), ..new("g") };
        assert_eq!(kind(&mut rig, new), ErrorKind::InvalidArgument);
    }
    add(&mut rig, coarse("one")).unwrap();
    assert_eq!(kind(&mut rig, coarse("one")), ErrorKind::Exists);
    rig.close();
    let volume = Volume::from_file(&scratch.create("compat=0.10", "1M"));
    let mut rig = Rig::writable(&volume);
    assert_eq!(kind(&mut rig, new("old")), ErrorKind::NotSupported);
    add(&mut rig, NewBitmap { persistent: false, ..new("memory") }).unwrap();
    rig.close();
    let mut rig = read_only(&volume);
    assert_eq!(kind(&mut rig, new("x")), ErrorKind::ReadOnly);
    rig.close();
}

/// After a crash a bitmap is out of date and says so, or has all that changed.
fn crash_test(options: &str, seed: u64) {
    let scratch = Scratch::new();
    let mut random = Random(seed);
    let path = scratch.create(options, "1M");
    scratch.qemu_io(&path, "write -P 0x11 0 1M");
    scratch.qemu_img(&["bitmap", "--add", "-g", "4096", &path, "b"]);
    let volume = Volume::from_file(&path);
    let base = volume.bytes();
    volume.record();
    let mut rig = Rig::writable(&volume);
    for _ in 0..10 {
        let start = random.below(1_000_000);
        rig.write(start, &vec![7; 1 + random.below(40_000) as usize]);
    }
    rig.flush();
    add(&mut rig, NewBitmap::persistent("second")).unwrap();
    rig.close();
    let journal = volume.journal();
    for cut in 0..=journal.len() {
        let crashed = Volume::new(&base);
        let flushed = journal[..cut].iter().rposition(|event| *event == Event::Flush).unwrap_or(0);
        for (at, event) in journal[..cut].iter().enumerate() {
            if at <= flushed || random.below(2) == 0 {
                crashed.apply(event);
            }
        }
        crashed.save(&path);
        scratch.check_allowing_leaks(&path);
        let what = format!("{options}, seed {seed}, cut at {cut}");
        let mut rig = Rig::writable(&crashed);
        let contents = rig.read(0, SIZE as usize);
        let found = status(&mut rig);
        assert_eq!(found[0].name, b"b", "{what}");
        if !found[0].inconsistent {
            let bits = rig.manage(async |driver, _| driver.bitmap(b"b")).unwrap();
            for at in (0..SIZE).step_by(512) {
                let sector = &contents[at as usize..at as usize + 512];
                let is_old = sector.iter().all(|byte| *byte == 0x11);
                assert!(is_old || bits.is_dirty(at), "{what}: {at} has changed unseen");
            }
        }
        // And what it says of itself is kept right by the next writer.
        rig.write(0, &[9; 512]);
        rig.close();
        crashed.save(&path);
        scratch.check_allowing_leaks(&path);
    }
}

#[test]
fn after_a_crash_no_bitmap_misses_a_write() {
    crash_test("cluster_size=4k", 3);
    crash_test("cluster_size=512", 4);
    crash_test("", 5);
}

#[test]
fn a_failure_while_bitmaps_are_stored_leaves_them_marked_and_the_image_whole() {
    let scratch = Scratch::new();
    let path = scratch.create("cluster_size=4k", "1M");
    scratch.qemu_img(&["bitmap", "--add", "-g", "4096", &path, "b"]);
    let base = std::fs::read(&path).unwrap();
    for nth in 0.. {
        let volume = Volume::new(&base);
        let mut rig = Rig::writable(&volume);
        rig.write(5000, &[1; 100_000]);
        rig.flush();
        let mut seen = 0;
        volume.set_gate(move |event| {
            seen += u64::from(!matches!(event, Event::Read(..)));
            if seen == nth + 1 && !matches!(event, Event::Read(..)) {
                return Err(libc::ENOSPC);
            }
            Ok(false)
        });
        let closed = rig.try_close();
        volume.remove_gate();
        volume.save(&path);
        scratch.check_allowing_leaks(&path);
        let mut rig = read_only(&volume);
        assert_eq!(rig.read(5000, 100_000), vec![1; 100_000]);
        let found = status(&mut rig);
        if !found[0].inconsistent {
            assert_eq!(areas(&mut rig, "b"), [(4096, 102_400)], "operation {nth}: {closed:?}");
        }
        rig.close();
        if closed.is_ok() && nth > 3 {
            break;
        }
        assert!(nth < 100, "no end");
    }
}

/// What nobody here understands is kept, byte for byte, when the header is written anew.
#[test]
fn unknown_extensions_are_kept_when_the_header_is_written_anew() {
    let scratch = Scratch::new();
    let path = scratch.create("", "1M");
    let mut bytes = std::fs::read(&path).unwrap();
    let mut unknown = vec![0x12, 0x34, 0x56, 0x78, 0, 0, 0, 13];
    unknown.extend(*b"any \0 bytes\xff\xfe\0\0\0");
    unknown.truncate(8 + 16);
    unknown[8 + 13..].fill(0);
    // A compatible feature that is not known, before the extensions that were there.
    bytes[80] = 0x40;
    let rest = bytes[112..1000].to_vec();
    bytes[112..112 + unknown.len()].copy_from_slice(&unknown);
    bytes[112 + unknown.len()..1000 + unknown.len()].copy_from_slice(&rest);
    let volume = Volume::new(&bytes);
    let mut rig = Rig::writable(&volume);
    add(&mut rig, NewBitmap::persistent("b")).unwrap();
    rig.write(0, &[1; 512]);
    rig.close();
    let now = volume.bytes();
    assert_eq!(now[80], 0x40);
    let header = &now[..65536];
    let is_there = |bytes: &[u8]| header.windows(bytes.len()).filter(|at| *at == bytes).count();
    assert_eq!(is_there(&unknown), 1, "as it was");
    assert_eq!(is_there(&0x2385_2875_u32.to_be_bytes()), 1, "and the header was written");
    volume.save(&path);
    scratch.check_clean(&path);
    assert!(scratch.qemu_img(&["info", &path]).contains("name: b"));
}
