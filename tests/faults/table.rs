//! Rows T: entries of L1, L2 and refcount tables, and compressed clusters.

use super::image::{
    self, DATA, L1, L2, Patch, REFCOUNT_BLOCK, REFCOUNT_TABLE, Sandbox, be16, be64, made,
};
use super::rows::{
    CORRUPT_ENTRY, CORRUPT_TABLE, Expected, FAR, Fate, READ_ONLY, Row, UNREADABLE, WORKS, bounded,
    judge, row,
};
use blockplex::{Blockplex, ErrorKind, OpenOptions, block_on};
use std::fs;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// A row with another first L1 entry.
fn l1(id: &str, entry: u64, expected: Expected) -> Row {
    row(format!("{id} {entry:#x}"), [be64(L1, entry)], expected)
}

/// A row with another first L2 entry.
fn l2(id: &str, entry: u64, expected: Expected) -> Row {
    row(format!("{id} {entry:#x}"), [be64(L2, entry)], expected)
}

#[test]
fn an_l1_entry_that_names_no_table_fails_what_is_below_it() {
    judge([
        l1("T01", COPIED | L1, CORRUPT_TABLE),
        l1("T01 header", COPIED | 0x200, CORRUPT_TABLE),
        l1("T01 refcounts", COPIED | REFCOUNT_BLOCK, CORRUPT_TABLE),
        l1("T02", COPIED | 0x42a00, CORRUPT_TABLE),
        l1("T03", COPIED | 1 << 40, CORRUPT_TABLE),
        l1("T03 max", 0x00ff_ffff_ffff_0000, CORRUPT_TABLE),
        l1("T04", 0xff00_0000_0004_01fe, CORRUPT_TABLE),
        l1("T05", COPIED, CORRUPT_TABLE),
        row("T17", [Patch::Length(L2 + 4096)], CORRUPT_TABLE),
    ]);
}

#[test]
fn an_l2_entry_that_cannot_be_fails_its_cluster() {
    judge([
        l2("T07", COPIED, CORRUPT_ENTRY),
        l2("T07b", COPIED | REFCOUNT_BLOCK, CORRUPT_ENTRY),
        l2("T07c", COPIED | L2, CORRUPT_ENTRY),
        l2("T07d", COPIED | REFCOUNT_TABLE, CORRUPT_ENTRY),
        l2("T07e", COPIED | L1, CORRUPT_ENTRY),
        l2("T07, not copied", L1, CORRUPT_ENTRY),
        l2("T07, zero", COPIED | L1 | 1, CORRUPT_ENTRY),
        l2("T09", COPIED | DATA | 0x3f << 56, CORRUPT_ENTRY),
        l2("T09 low", COPIED | DATA | 0x1fe, CORRUPT_ENTRY),
        l2("T09 unaligned", COPIED | DATA | 0x200, CORRUPT_ENTRY),
        l2("T15b", COPIED | COMPRESSED | DATA, CORRUPT_ENTRY),
    ]);
}

/// T08: a cluster past the end of the file reads as zeros; where no file can reach, that or an
/// error.
#[test]
fn a_cluster_past_the_end_of_the_file_reads_as_zeros() {
    let sandbox = Sandbox::new();
    let past = image::patched(image::base(), &[be64(L2, 0x10_0000)]);
    let path = sandbox.put("image", &past);
    bounded("T08", move || {
        let layer = Blockplex::new().expect("a layer");
        let options = OpenOptions::image("qcow2", &path).read_only();
        let backend = block_on(layer.open("disk", options)).expect("no loop").expect("opens");
        let read = backend.blocking().read_to_vec(0, 0x10000).expect("zeros");
        assert!(read.iter().all(|byte| *byte == 0), "T08");
        block_on(backend.close()).expect("no loop").expect("closes");
    });
    // Nothing is written in place there. A copy is made, and then the old cluster turns out to have
    // no refcount that could go down.
    let marked = Expected {
        read_only: Some([Fate::Either, Fate::Fine]),
        read_write: Some([Fate::Either; 2]),
        marked: true,
    };
    judge([
        l2("T08", COPIED | 0x00ff_ffff_ffff_0000, marked),
        l2("T08", 0x00ff_ffff_ffff_0000, marked),
        l2("T08", COPIED | 0x10_0000, marked),
    ]);
}

/// Version 2 has no place for the mark; the later writes are refused all the same.
#[test]
fn version_2_has_no_zero_clusters() {
    let old = made("cluster_size=64k,compat=0.10", "64M", &["write -P 0x11 0 64k"]);
    judge([l2("T10", COPIED | DATA | 1, CORRUPT_ENTRY).on(&old)]);
}

#[test]
fn subclusters_that_contradict_each_other_fail_their_cluster() {
    let commands = ["write -P 0x11 0 64k"];
    let extended = made("cluster_size=64k,extended_l2=on", "64M", &commands);
    judge([
        row("T16", [be64(L2 + 8, 0x1_ffff_ffff)], CORRUPT_ENTRY).on(&extended),
        row("T16 last", [be64(L2 + 8, 0x8000_0000_ffff_ffff)], CORRUPT_ENTRY).on(&extended),
        row("T16b", [be64(L2, 0), be64(L2 + 8, 1)], CORRUPT_ENTRY).on(&extended),
    ]);
}

#[test]
fn a_cluster_that_may_not_be_written_in_place_is_copied() {
    judge([l2("T11b", DATA, WORKS)]);
}

/// Nothing looks at the refcount of a cluster that is written in place: it would cost each write
/// a look-up, for images that a check finds. The other owner sees the write; nothing else is
/// touched, and what `check` reported before it reports after.
#[test]
fn a_wrong_refcount_of_a_data_cluster_harms_only_that_cluster() {
    judge([row("T11", [be16(REFCOUNT_BLOCK + 10, 2)], WORKS)]);
    let shared = [be64(L2 + 8, COPIED | DATA)];
    judge([row("T12d", shared, WORKS)]);
}

/// T12b: the allocator is about to hand out an L2 table.
#[test]
fn metadata_without_a_refcount_is_not_handed_out() {
    let far = Expected {
        read_only: Some([Fate::Fine, Fate::Fine]),
        read_write: Some([Fate::Fine, Fate::Fails]),
        marked: true,
    };
    judge([
        row("T12b", [be16(REFCOUNT_BLOCK + 8, 0)], far),
        row("T12c all", [be64(REFCOUNT_BLOCK, 0)], READ_ONLY).says(&["refcount 0"]),
        row("T12c header", [be16(REFCOUNT_BLOCK, 0)], READ_ONLY).says(&["header"]),
        row("T12c table", [be16(REFCOUNT_BLOCK + 2, 0)], READ_ONLY).says(&["refcount table"]),
        row("T12c block", [be16(REFCOUNT_BLOCK + 4, 0)], READ_ONLY).says(&["refcount block"]),
        row("T12c L1", [be16(REFCOUNT_BLOCK + 6, 0)], READ_ONLY).says(&["L1 table"]),
    ]);
}

#[test]
fn a_refcount_block_must_be_a_cluster_of_its_own_in_the_file() {
    let table = |id: &str, entry: u64| row(id, [be64(REFCOUNT_TABLE, entry)], READ_ONLY);
    judge([
        table("T13 unaligned", 0x20200).says(&["refcount block 0", "0x20200"]),
        table("T13 none", 0).says(&["refcount"]),
        table("T13 past the end", 1 << 40).says(&["refcount block 0", "outside of the file"]),
        table("T13 max", 0xffff_ffff_ffff_0000).says(&["refcount block 0"]),
        table("T13 L1", L1).says(&["refcount block 0"]),
        table("T13f", REFCOUNT_BLOCK | 0x1ff).says(&["refcount block 0"]),
        table("T13 header", 0x200).says(&["refcount block 0"]),
    ]);
    // An L2 table: seen from the L1 table, whose entry comes second.
    let shared = Expected { read_only: Some([Fate::Fails, Fate::Fails]), ..READ_ONLY };
    judge([row("T13 L2", [be64(REFCOUNT_TABLE, L2)], shared)]);
}

#[test]
fn a_refcount_block_that_is_listed_again_and_again_is_refused() {
    let entries = REFCOUNT_BLOCK.to_be_bytes().repeat(8192);
    let counts = 1_u16.to_be_bytes().repeat(32768);
    let patches = [Patch::Bytes(REFCOUNT_TABLE, entries), Patch::Bytes(REFCOUNT_BLOCK, counts)];
    judge([row("T18", patches, READ_ONLY).says(&["used by other metadata"])]);
}

/// T20: the peer sees the leaks only when the file has grown over them.
#[test]
fn leaked_clusters_up_to_the_end_of_a_refcount_block_are_harmless() {
    let small = made("cluster_size=4k", "64M", &["write -P 0x11 0 64k"]);
    let counts = 1_u16.to_be_bytes().repeat(2048);
    judge([row("T20", [Patch::Bytes(0x2000, counts)], WORKS).on(&small).leaks()]);
}

/// T19: the first entry has the table; the second has none.
#[test]
fn a_table_belongs_to_one_l1_entry() {
    let sandbox = Sandbox::new();
    let base = made("cluster_size=64k", "1G", &["write -P 0x11 0 64k"]);
    let before = image::patched(&base, &[be64(L1 + 8, COPIED | L2)]);
    let path = sandbox.put("image", &before);
    for read_only in [true, false] {
        let options = OpenOptions::image("qcow2", &path).set("read-only", read_only);
        bounded("T19", move || {
            let layer = Blockplex::new().expect("a layer");
            let backend = block_on(layer.open("disk", options)).expect("no loop").expect("opens");
            let disk = backend.blocking();
            assert_eq!(disk.read_to_vec(0, 512).expect("T19: the first"), [0x11; 512]);
            let error = disk.read_to_vec(512 << 20, 512).expect_err("T19: the second");
            assert_eq!((error.kind(), error.errno()), (ErrorKind::Corrupt, libc::EIO));
            let write = disk.write(0, &[1; 512]);
            assert!(write.is_err(), "T19: no writes to a corrupt image, nor to a read-only one");
            // The last flush of a corrupt image may fail.
            drop(block_on(backend.close()).expect("no loop"));
        });
        let after = fs::read(&path).expect("it is there");
        assert_eq!(after[79], if read_only { 0 } else { 2 }, "T19: mark");
    }
}

/// Only the cluster is lost: nothing says that the metadata is wrong.
#[test]
fn a_compressed_cluster_that_cannot_be_decompressed_fails_alone() {
    judge([
        l2("T15", COMPRESSED | 127 << 54 | DATA, UNREADABLE),
        l2("T15c", COMPRESSED | 0x10_0000_0000, UNREADABLE),
        l2("T15c far", COMPRESSED | 0x3f_ffff_ffff_fe00, UNREADABLE),
        l2("T15e", COMPRESSED | 0xff << 54 | 0x3f_ffff_ffff_ffff, UNREADABLE),
        l2("T15d", COMPRESSED, UNREADABLE),
        l2("T15d header", COMPRESSED | 0xff << 54 | 0x70, UNREADABLE),
    ]);
}

/// A deflate stream of zeros without end: what is more than a cluster is not looked at.
#[test]
fn a_deflate_bomb_fills_one_cluster() {
    // One block with fixed codes: a literal 0, then 258 bytes from distance 1, again and again.
    let mut bits: Vec<bool> = vec![true, true, false];
    bits.extend([false, false, true, true, false, false, false, false]);
    for _ in 0..32_768 {
        bits.extend([true, true, false, false, false, true, false, true]);
        bits.extend([false; 5]);
    }
    bits.extend([false; 7]);
    let pack = |bits: &[bool]| bits.iter().rev().fold(0, |byte, bit| byte << 1 | u8::from(*bit));
    let bomb: Vec<u8> = bits.chunks(8).map(pack).collect();
    let anything = Expected {
        read_only: Some([Fate::Either, Fate::Fine]),
        read_write: Some([Fate::Either, Fate::Fine]),
        marked: false,
    };
    let patches =
        [Patch::Bytes(DATA, bomb[..8192].to_vec()), be64(L2, COMPRESSED | 15 << 54 | DATA)];
    judge([row("T15f", patches, anything)]);
}

#[test]
fn a_zstd_frame_cannot_ask_for_memory_or_hide_its_end() {
    let frames: [(&str, &[u8]); 5] = [
        // Window descriptor 0xa8: 2 GiB; one raw block of 65,535 bytes that is not there.
        ("window", &[0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 0xf9, 0xff, 0x07]),
        // A content size of 2^60 bytes.
        ("size", &[0x28, 0xb5, 0x2f, 0xfd, 0xe0, 0, 0, 0, 0, 0, 0, 0, 0x10, 3, 0, 0x20, 0]),
        // A skippable frame, which says that it is 4 GiB long.
        ("skippable", &[0x50, 0x2a, 0x4d, 0x18, 0xff, 0xff, 0xff, 0xff]),
        // An empty frame, with something behind it.
        ("empty", &[0x28, 0xb5, 0x2f, 0xfd, 0x20, 0, 1, 0, 0, 0xaa, 0xaa]),
        ("garbage", &[0xaa; 64]),
    ];
    let base = made("cluster_size=64k,compression_type=zstd", "64M", &["write -P 0x11 0 64k"]);
    for (id, frame) in frames {
        let mut bytes = frame.to_vec();
        bytes.resize(0x10000, 0);
        let patches = [Patch::Bytes(DATA, bytes), be64(L2, COMPRESSED | 15 << 54 | DATA)];
        judge([row(format!("T15h {id}"), patches, UNREADABLE).on(&base)]);
    }
}

/// Requests that change no data meet damage as well.
#[test]
fn every_kind_of_request_meets_damage() {
    let sandbox = Sandbox::new();
    let damaged = image::patched(image::base(), &[be64(L2, COPIED)]);
    for number in 0..4 {
        let path = sandbox.put("image", &damaged);
        bounded("T07", {
            let path = path.clone();
            move || {
                let layer = Blockplex::new().expect("a layer");
                let options = OpenOptions::image("qcow2", &path).set("discard", "unmap");
                let backend =
                    block_on(layer.open("disk", options)).expect("no loop").expect("opens");
                let disk = backend.blocking();
                let result = match number {
                    0 => disk.discard(0, 0x10000),
                    1 => disk.write_zeroes(0, 0x10000),
                    2 => disk.write_zeroes(512, 512),
                    _ => disk.block_status(0, 0x10000).map(drop),
                };
                assert!(result.is_err(), "request {number} succeeds");
                disk.write(FAR, &[1; 512]).expect_err("the image is marked");
                drop(block_on(backend.close()).expect("no loop"));
            }
        });
        assert_eq!(fs::read(&path).expect("it is there")[79], 2, "request {number}: mark");
    }
}
