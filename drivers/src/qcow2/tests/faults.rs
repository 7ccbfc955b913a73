//! Failing files and damaged images.

use crate::qcow2::Qcow2Options;
use crate::qcow2::testing::Scratch;
use crate::qcow2::testing::rig::{Rig, Setup};
use crate::qcow2::testing::volume::{Event, Volume};
use blockplex_graph::{ErrorKind, Request};

/// The image of the catalogue: one cluster of data at 0x50000, its L2 table at 0x40000.
fn catalogue(scratch: &Scratch) -> Vec<u8> {
    let path = scratch.create("", "64M");
    scratch.qemu_io(&path, "write -P 0x11 0 64k");
    scratch.read(&path)
}

fn with_word(mut bytes: Vec<u8>, at: usize, word: u64) -> Vec<u8> {
    bytes[at..at + 8].copy_from_slice(&word.to_be_bytes());
    bytes
}

fn read_only() -> Setup {
    Setup { read_only: true, ..Setup::default() }
}

/// A damaged entry fails the requests that meet it. Read-write, the image is marked once and not
/// written any more; read-only, nothing is written.
#[test]
fn a_damaged_entry_fails_its_requests_and_marks_the_image() {
    let scratch = Scratch::new();
    let good = catalogue(&scratch);
    let rows = [
        ("T01", 0x30000, 0x8000_0000_0003_0000),
        ("T02", 0x30000, 0x8000_0000_0004_2a00),
        ("T03", 0x30000, 0x8000_0100_0000_0000),
        ("T04", 0x30000, 0xff00_0000_0004_01fe),
        ("T05", 0x30000, 0x8000_0000_0000_0000),
        ("T07", 0x40000, 0x8000_0000_0000_0000),
        ("T07b", 0x40000, 0x8000_0000_0002_0000),
        ("T07c", 0x40000, 0x8000_0000_0004_0000),
        ("T07d", 0x40000, 0x8000_0000_0001_0000),
        ("T07e", 0x40000, 0x8000_0000_0003_0000),
        ("T09", 0x40000, 0xbf00_0000_0005_01fe),
        ("T15b", 0x40000, 0xc000_0000_0005_0000),
    ];
    for (row, at, word) in rows {
        let bytes = with_word(good.clone(), at, word);
        let volume = Volume::new(&bytes);
        let mut rig = Rig::open(&volume, read_only()).unwrap();
        assert_eq!(rig.try_read(0, 512).unwrap_err().kind(), ErrorKind::Corrupt, "{row}");
        rig.close();
        assert!(volume.bytes() == bytes, "{row}: read-only writes nothing");

        for writes in [false, true] {
            let volume = Volume::new(&bytes);
            let mut rig = Rig::writable(&volume);
            let met =
                if writes { rig.try_write(0, &[1; 512]) } else { rig.try_read(0, 512).map(drop) };
            let error = met.unwrap_err();
            assert_eq!((error.kind(), error.errno()), (ErrorKind::Corrupt, libc::EIO), "{row}");
            assert_eq!(volume.bytes()[79], 2, "{row}: the corrupt bit");
            assert!(rig.try_write(1 << 20, &[1]).is_err(), "{row}: no more writes");
            rig.close();
            let mut expected = bytes.clone();
            expected[79] = 2;
            assert!(volume.bytes() == expected, "{row}: nothing else is written");
            assert!(Rig::open(&volume, Setup::default()).is_err(), "H19");
            Rig::open(&volume, read_only()).unwrap().close();
        }
    }
}

#[test]
fn a_compressed_cluster_of_garbage_fails_alone() {
    let scratch = Scratch::new();
    let bytes = catalogue(&scratch);
    let rows = [
        ("T15", 1 << 62 | 127 << 54 | 0x50000),
        ("T15c", 1 << 62 | 0xff_0000_0000),
        ("T15d", 1 << 62),
    ];
    for (row, word) in rows {
        let bytes = with_word(bytes.clone(), 0x40000, word);
        let volume = Volume::new(&bytes);
        let mut rig = Rig::writable(&volume);
        assert_eq!(rig.try_read(0, 512).unwrap_err().errno(), libc::EIO, "{row}");
        rig.write(1 << 20, &[1; 512]);
        assert_eq!(rig.read(1 << 20, 2), [1, 1], "{row}");
        rig.close();
        assert_eq!(volume.bytes()[79], 0, "{row}: not marked");
    }
}

#[test]
fn entries_past_the_end_of_the_file_read_as_zeros() {
    let scratch = Scratch::new();
    let bytes = with_word(catalogue(&scratch), 0x40000, 0x8000_0000_0100_0000);
    let mut rig = Rig::open(&Volume::new(&bytes), read_only()).unwrap();
    assert!(rig.read(0, 65536).iter().all(|byte| *byte == 0), "T08");
    rig.close();
}

/// E1: such a place may be given to somebody else as the file grows.
#[test]
fn an_entry_past_the_end_of_the_file_is_not_written_in_place() {
    let scratch = Scratch::new();
    let past = 0x100_0000;
    let volume = Volume::new(&with_word(catalogue(&scratch), 0x40000, 1 << 63 | past));
    let mut rig = Rig::writable(&volume);
    volume.record();
    rig.write(512, &[3; 512]);
    let is_past = |event: &Event| matches!(event, Event::Write(at, _) if *at >= past);
    assert!(!volume.journal().iter().any(is_past), "{:?}", volume.journal());
    assert_ne!(rig.status(512, 512).offset, Some(past + 512));
    assert_eq!(rig.read(0, 1536), [[0; 512], [3; 512], [0; 512]].concat());
    rig.close();
}

#[test]
fn what_endangers_only_writes_can_be_read() {
    let scratch = Scratch::new();
    let good = catalogue(&scratch);
    let mut shared_block = good.clone();
    shared_block[0x10008..0x10010].copy_from_slice(&0x20000_u64.to_be_bytes());
    let mut uncounted = good.clone();
    uncounted[0x20006..0x20008].fill(0);
    let mut one_bit = good.clone();
    one_bit[99] = 0;
    let rows = [
        ("T13 unaligned", with_word(good.clone(), 0x10000, 0x20200)),
        ("T13 none", with_word(good.clone(), 0x10000, 0)),
        ("T13 past the end", with_word(good.clone(), 0x10000, 0xff_ffff_0000)),
        ("T13f", with_word(good.clone(), 0x10000, 0x201ff)),
        ("T13 = L1", with_word(good.clone(), 0x10000, 0x30000)),
        ("T18", shared_block),
        ("T12c", uncounted),
        ("H17-0", one_bit),
        ("H14d", with_word(good.clone(), 48, 0x100_0000)),
    ];
    for (row, bytes) in rows {
        let volume = Volume::new(&bytes);
        let error = Rig::open(&volume, Setup::default()).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{row}: {error}");
        let mut rig = Rig::open(&volume, read_only()).unwrap();
        assert_eq!(rig.read(0, 65536), [0x11; 65536], "{row}");
        rig.close();
        assert!(volume.bytes() == bytes, "{row}");
    }
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let scratch = Scratch::new();
    let good = catalogue(&scratch);
    let bytes = with_word(good, 72, 1 << 63);
    let error = Rig::open(&Volume::new(&bytes), read_only()).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotSupported, "bit 63: {error}");
}

#[test]
fn autoclear_bits_are_cleared_before_the_first_write_and_not_by_reading() {
    let scratch = Scratch::new();
    let bytes = with_word(catalogue(&scratch), 88, 0xff00_0000_0000_0000);
    let volume = Volume::new(&bytes);
    let mut rig = Rig::writable(&volume);
    rig.read(0, 512);
    assert!(volume.bytes() == bytes);
    volume.record();
    // In place: nothing else of the image would change.
    rig.write(0, &[1; 512]);
    let journal = volume.journal();
    assert!(matches!(&journal[0], Event::Write(72, _)), "H24: {:?}", journal[0]);
    assert_eq!(journal[1], Event::Flush);
    assert_eq!(volume.bytes()[88..96], [0; 8]);
    rig.close();
}

/// T12b, Q09: the refcount of the L2 table is 0, and so the allocator finds it.
#[test]
fn an_uncounted_table_is_not_handed_out_as_data() {
    let scratch = Scratch::new();
    let mut bytes = catalogue(&scratch);
    bytes[0x20008..0x2000a].fill(0);
    let volume = Volume::new(&bytes);
    let mut rig = Rig::writable(&volume);
    let error = rig.try_write(1 << 20, &[1; 512]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert_eq!(rig.read(0, 65536), [0x11; 65536]);
    rig.close();
    let mut expected = bytes;
    expected[79] = 2;
    assert!(volume.bytes() == expected);
}

/// P6: whatever fails, the next request finds the image as if the failed one had not been tried,
/// and what is on disk is never corrupt.
#[test]
fn every_failed_write_of_the_file_leaves_a_whole_image() {
    let scratch = Scratch::new();
    for options in ["", "cluster_size=512,refcount_bits=64", "extended_l2=on,cluster_size=16k"] {
        let start = Volume::from_file(&scratch.create(options, "1M")).bytes();
        let path = scratch.path();
        for victim in 0..40 {
            let volume = Volume::new(&start);
            let mut rig = Rig::writable(&volume);
            rig.write(0, &[1; 40_000]);
            rig.flush();
            let mut count = 0;
            volume.set_gate(move |_| {
                count += 1;
                if count == victim + 1 { Err(libc::ENOSPC) } else { Ok(false) }
            });
            let written = rig.try_write(300_000, &[2; 70_000]);
            let zeroed = rig.request(Request::write_zeroes(1000, 30_000).may_unmap());
            let flushed = rig.request(Request::flush());
            volume.remove_gate();
            volume.save(&path);
            scratch.check_allowing_leaks(&path);
            assert_eq!(rig.read(0, 1000), [1; 1000]);
            if written.is_err() {
                let now = rig.read(300_000, 70_000);
                assert!(now.iter().all(|byte| matches!(byte, 0 | 2)));
                rig.write(300_000, &[2; 70_000]);
            }
            if zeroed.is_err() {
                rig.request(Request::write_zeroes(1000, 30_000)).unwrap();
            }
            rig.flush();
            rig.close();
            volume.save(&path);
            scratch.check_allowing_leaks(&path);
            let contents = scratch.contents(&path);
            assert!(contents[1000..31_000].iter().all(|byte| *byte == 0), "{victim}");
            assert!(contents[300_000..370_000].iter().all(|byte| *byte == 2), "{victim}");
            if written.is_ok() && zeroed.is_ok() && flushed.is_ok() {
                break;
            }
        }
    }
}

/// Q05: caches of two slices and four blocks, and every slice of the disk changed.
#[test]
fn a_tiny_cache_loses_nothing() {
    let scratch = Scratch::new();
    let path = scratch.create("cluster_size=512", "4M");
    let volume = Volume::from_file(&path);
    let options = Qcow2Options { l2_cache_size: Some(1024), ..Qcow2Options::default() };
    let mut rig = Rig::open(&volume, Setup { options, ..Setup::default() }).unwrap();
    for step in 0..1000_u64 {
        let at = (step * 7919) % 8192 * 512;
        rig.write(at, &[(step % 250) as u8 + 1; 512]);
    }
    for step in 0..1000_u64 {
        let at = (step * 7919) % 8192 * 512;
        assert_eq!(rig.read(at, 512), [(step % 250) as u8 + 1; 512]);
    }
    rig.close();
    volume.save(&path);
    scratch.check_clean(&path);
}
