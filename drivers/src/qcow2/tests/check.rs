//! Check and repair, against the peer's: on images broken at a chosen place, and at random ones.

mod damage;

use super::crash::Random;
use crate::qcow2::check::{CheckOptions, CheckReport, Fix, check};
use crate::qcow2::testing::Scratch;
use crate::qcow2::testing::rig::{Rig, Setup, with_file};
use crate::qcow2::testing::volume::{Event, Volume};
use blockplex_graph::ErrorKind;
use std::process::Command;

/// What the peer's check says: how it exits, and the numbers.
pub(super) struct Peer {
    pub(super) exit: u8,
    numbers: serde_json::Value,
    pub(super) lines: Vec<String>,
}

impl Peer {
    pub(super) fn check(path: &str) -> Peer {
        let arguments = ["check", "-f", "qcow2", "--output=json", path];
        let output = Command::new("qemu-img").args(arguments).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        Peer {
            exit: output.status.code().unwrap() as u8,
            numbers: serde_json::from_slice(&output.stdout).unwrap_or_default(),
            lines: text.lines().map(str::to_owned).collect(),
        }
    }

    fn number(&self, name: &str) -> u64 {
        self.numbers[name].as_u64().unwrap_or(0)
    }
}

pub(super) fn checked(volume: &Volume, fix: Fix) -> CheckReport {
    with_file(volume, async |file| check(file, CheckOptions { fix }).await).unwrap()
}

pub(super) fn lines(report: &CheckReport) -> Vec<String> {
    report.messages.iter().map(ToString::to_string).collect()
}

fn same_numbers(ours: &CheckReport, peer: &Peer, what: &str) {
    let pairs = [
        ("corruptions", ours.corruptions),
        ("leaks", ours.leaks),
        ("total-clusters", ours.total_clusters),
        ("allocated-clusters", ours.allocated_clusters),
        ("fragmented-clusters", ours.fragmented_clusters),
        ("compressed-clusters", ours.compressed_clusters),
        ("image-end-offset", ours.image_end_offset),
    ];
    for (name, number) in pairs {
        assert_eq!(number, peer.number(name), "{what}: {name}, {:?}", lines(ours));
    }
    assert_eq!(ours.exit_code(), peer.exit, "{what}");
}

/// Bytes that are put over an image, at an offset.
type Change<'a> = (u64, &'a [u8]);

/// The image with changes.
fn broken(base: &Volume, changes: &[Change<'_>]) -> Volume {
    let volume = Volume::new(&base.bytes());
    for (offset, bytes) in changes {
        volume.apply(&Event::Write(*offset, bytes.to_vec()));
    }
    volume
}

fn base(scratch: &Scratch) -> Volume {
    let path = scratch.create("cluster_size=64k", "64M");
    scratch.qemu_io(&path, "write -P 0x11 0 64k");
    Volume::from_file(&path)
}

/// A repair ends clean, and so does the next, which changes nothing; and the peer agrees.
fn repaired(scratch: &Scratch, volume: &Volume, what: &str) -> CheckReport {
    let report = checked(volume, Fix::All);
    assert!(report.failure.is_none(), "{what}: {:?}", report.failure);
    assert_eq!(report.exit_code(), 0, "{what}: {:?}", lines(&report));
    let bytes = volume.bytes();
    let again = checked(volume, Fix::All);
    assert!(again.is_clean() && again.corruptions_fixed + again.leaks_fixed == 0, "{what}");
    assert!(volume.bytes() == bytes, "{what}: the second repair changed something");
    let path = scratch.path();
    volume.save(&path);
    let peer = Peer::check(&path);
    assert_eq!(peer.exit, 0, "{what}: {:?}", peer.lines);
    report
}

#[test]
fn sound_images_of_all_kinds_have_the_peers_numbers() {
    let scratch = Scratch::new();
    let kinds = [
        "",
        "cluster_size=512",
        "cluster_size=2M",
        "compat=0.10,cluster_size=4k",
        "refcount_bits=1,cluster_size=4k",
        "refcount_bits=64,cluster_size=512",
        "extended_l2=on,cluster_size=16k",
        "compression_type=zstd",
        "preallocation=metadata,cluster_size=1k",
    ];
    for options in kinds {
        let path = scratch.create(options, "6M");
        scratch.qemu_io(&path, "write -P 0x11 0 300k");
        scratch.qemu_io(&path, "write -P 0x22 3M 200k");
        scratch.qemu_io(&path, "write -P 0x33 1M 64k");
        scratch.qemu_io(&path, "write -z 128k 64k");
        if !options.contains("refcount_bits=1,") {
            if !options.contains("preallocation") {
                scratch.qemu_io(&path, "write -c -P 0x44 4M 2M");
            }
            scratch.qemu_img(&["snapshot", "-c", "one", &path]);
            scratch.qemu_io(&path, "write -P 0x55 3M 100k");
            scratch.qemu_img(&["snapshot", "-c", "two", &path]);
        }
        if !options.contains("0.10") {
            scratch.qemu_img(&["bitmap", "--add", &path, "first"]);
            scratch.qemu_io(&path, "write -P 0x55 3M 100k");
        }
        let volume = Volume::from_file(&path);
        let before = volume.bytes();
        let report = checked(&volume, Fix::None);
        same_numbers(&report, &Peer::check(&path), options);
        assert!(report.is_clean(), "{options}: {:?}", lines(&report));
        assert!(checked(&volume, Fix::All).is_clean());
        assert!(volume.bytes() == before, "{options}: a sound image was changed");
    }
}

#[test]
fn images_with_a_data_file_and_encrypted_ones_are_counted_right() {
    let scratch = Scratch::new();
    let data = scratch.path();
    let path = scratch.create(&format!("data_file={data}"), "4M");
    scratch.qemu_io(&path, "write -P 0x11 64k 300k");
    let report = checked(&Volume::from_file(&path), Fix::None);
    same_numbers(&report, &Peer::check(&path), "data file");
    let path = scratch.path();
    let secret = ["--object", "secret,id=s,data=pass"];
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let arguments = ["create", "-q", "-f", "qcow2", secret[0], secret[1], "-o", options];
    scratch.qemu_img(&[&arguments[..], &[&path, "4M"]].concat());
    let report = checked(&Volume::from_file(&path), Fix::None);
    assert!(report.is_clean(), "{:?}", lines(&report));
}

#[test]
fn damage_that_the_peer_sees_is_found_with_its_words_and_repaired() {
    let scratch = Scratch::new();
    let base = base(&scratch);
    let rows: [(&str, u64, &[u8]); 8] = [
        ("T11 refcount 2 of a data cluster", 0x2000a, &[0, 2]),
        ("T11b COPIED clear", 0x40000, &0x50000_u64.to_be_bytes()),
        ("COPIED clear in L1", 0x30000, &0x40000_u64.to_be_bytes()),
        ("T12b refcount 0 of an L2 table", 0x20008, &[0, 0]),
        ("T12c refcount 0 of everything but the block", 0x20000, &[0; 4]),
        ("T12d two entries, one cluster", 0x40008, &0x8000_0000_0005_0000_u64.to_be_bytes()),
        ("T13 no refcount block", 0x10000, &[0; 8]),
        ("L2 entry gone", 0x40000, &[0; 8]),
    ];
    for (what, offset, bytes) in rows {
        let volume = broken(&base, &[(offset, bytes)]);
        let path = scratch.path();
        volume.save(&path);
        let report = checked(&volume, Fix::None);
        let peer = Peer::check(&path);
        same_numbers(&report, &peer, what);
        assert_eq!(lines(&report), peer.lines, "{what}");
        let report = repaired(&scratch, &volume, what);
        assert!(report.corruptions_fixed + report.leaks_fixed > 0, "{what}");
        let mut rig = Rig::writable(&volume);
        let expected = if what == "L2 entry gone" { 0 } else { 0x11 };
        assert!(rig.read(0, 65536) == vec![expected; 65536], "{what}");
        rig.close();
    }
}

#[test]
fn a_refcount_structure_that_cannot_be_is_made_anew() {
    let scratch = Scratch::new();
    let base = base(&scratch);
    let rows: [(&str, &[Change<'_>]); 8] = [
        ("H12 no refcount table", &[(56, &[0; 4])]),
        ("H14d table past the end", &[(48, &0x10_0000_0000_u64.to_be_bytes())]),
        ("H13c table of 8 MiB past the end", &[(56, &0x80_u32.to_be_bytes())]),
        ("H16-0 refcounts of 1 bit", &[(96, &[0; 4])]),
        ("T13 block not aligned", &[(0x10000, &0x20200_u64.to_be_bytes())]),
        ("T13 block past the end", &[(0x10000, &0x1_0000_0000_u64.to_be_bytes())]),
        ("T13 block is the L2 table", &[(0x10000, &0x40000_u64.to_be_bytes())]),
        ("T13f reserved bits", &[(0x10000, &0x200ff_u64.to_be_bytes())]),
    ];
    for (what, changes) in rows {
        let volume = broken(&base, changes);
        assert_eq!(checked(&volume, Fix::None).exit_code(), 2, "{what}");
        let leaks = checked(&volume, Fix::Leaks);
        assert!(leaks.failure.is_some(), "{what}");
        repaired(&scratch, &volume, what);
        assert!(Rig::writable(&volume).read(0, 65536) == vec![0x11; 65536], "{what}");
    }
    // A block that is nowhere, and counts nothing that is used, is in no leak's way.
    let nowhere = 0x1_0000_0000_u64.to_be_bytes();
    let volume = broken(&base, &[(0x10008, &nowhere), (0x2000a, &[0, 2])]);
    let report = checked(&volume, Fix::Leaks);
    assert_eq!((report.leaks_fixed, report.corruptions, report.exit_code()), (1, 1, 2));
    repaired(&scratch, &volume, "a block that is nowhere");
    // T18: one block for all.
    let volume = broken(&base, &[]);
    for index in 0..8192 {
        volume.apply(&Event::Write(0x10000 + index * 8, 0x20000_u64.to_be_bytes().to_vec()));
    }
    repaired(&scratch, &volume, "T18");
    // T20: counts past the end of the file.
    let volume = broken(&base, &[(0x20000, &[0, 1].repeat(32768))]);
    assert_eq!(checked(&volume, Fix::None).leaks, 32768 - 6);
    assert_eq!(repaired(&scratch, &volume, "T20").leaks_fixed, 32768 - 6);
}

#[test]
fn what_is_ambiguous_is_reported_and_left_alone() {
    let scratch = Scratch::new();
    let base = base(&scratch);
    let rows: [(&str, u64, u64); 15] = [
        ("H11c L1 table is the refcount table", 40, 0x10000),
        ("H14e refcount table is the L1 table", 48, 0x30000),
        ("T01 L1 entry names the L1 table", 0x30000, 0x8000_0000_0003_0000),
        ("T02 L1 entry unaligned", 0x30000, 0x8000_0000_0004_2a00),
        ("T03 L1 entry past the end", 0x30000, 0x8000_0100_0000_0000),
        ("T04 L1 entry reserved bits", 0x30000, 0xff00_0000_0004_01fe),
        ("T05 L1 entry with nothing but COPIED", 0x30000, 1 << 63),
        ("T07 L2 entry with nothing but COPIED", 0x40000, 1 << 63),
        ("T07b data on the refcount block", 0x40000, 0x8000_0000_0002_0000),
        ("T07c data on the L2 table", 0x40000, 0x8000_0000_0004_0000),
        ("T08 data past the end", 0x40000, 0x80ff_ffff_ffff_0000),
        ("T09 L2 entry reserved bits", 0x40000, 0x8000_0000_0005_0010),
        ("L2 entry unaligned", 0x40000, 0x8000_0000_0005_0200),
        ("T15b compressed and COPIED", 0x40000, 0xc000_0000_0005_0000),
        ("T15d compressed in the header", 0x40000, 1 << 62),
    ];
    for (what, offset, word) in rows {
        let volume = broken(&base, &[(offset, &word.to_be_bytes())]);
        refused(&volume, what);
    }
    let cut = broken(&base, &[]);
    cut.apply(&Event::Truncate(0x40000 + 4096));
    refused(&cut, "T17 the file ends in the L2 table");
    let shared = scratch.create("", "1G");
    scratch.qemu_io(&shared, "write 0 64k");
    let shared =
        broken(&Volume::from_file(&shared), &[(0x30008, &0x8000_0000_0004_0000_u64.to_be_bytes())]);
    refused(&shared, "T19 two L1 entries, one L2 table");
}

/// The damage is found, and no repair changes anything.
fn refused(volume: &Volume, what: &str) {
    let before = volume.bytes();
    for fix in [Fix::None, Fix::Leaks, Fix::All] {
        let report = checked(volume, fix);
        assert!(report.corruptions > 0, "{what}: {:?}", lines(&report));
        assert!(matches!(report.exit_code(), 1 | 2), "{what}");
        assert!(volume.bytes() == before, "{what}: {fix:?} changed the file");
    }
}

#[test]
fn a_zero_cluster_with_an_impossible_place_loses_the_place() {
    let scratch = Scratch::new();
    let base = base(&scratch);
    let volume = broken(&base, &[(0x40000, &0x8000_0000_0005_0201_u64.to_be_bytes())]);
    let report = repaired(&scratch, &volume, "preallocated, unaligned");
    assert_eq!(report.leaks_fixed, 1);
    assert!(Rig::writable(&volume).read(0, 65536) == vec![0; 65536]);
}

/// K1: what cannot be repaired is left as it is, its unknown features, too.
#[test]
fn a_repair_that_repairs_nothing_changes_nothing() {
    let scratch = Scratch::new();
    let base = base(&scratch);
    let unknown = (88, &(1_u64 << 63).to_be_bytes()[..]);
    // No such L2 table can be: what it meant is not known.
    let l1 = u64::from_be_bytes(base.bytes()[40..48].try_into().unwrap());
    let volume = broken(&base, &[unknown, (l1, &(1_u64 << 63 | 0x200).to_be_bytes())]);
    let before = volume.bytes();
    let report = checked(&volume, Fix::All);
    assert!(
        lines(&report).iter().any(|line| line.starts_with("Nothing is repaired")),
        "{report:?}"
    );
    assert!(volume.bytes() == before);
}

#[test]
fn the_marks_go_when_the_image_is_whole() {
    let scratch = Scratch::new();
    let base = base(&scratch);
    for marks in [1_u64, 2, 3] {
        for fix in [Fix::Leaks, Fix::All] {
            let volume = broken(&base, &[(72, &marks.to_be_bytes())]);
            assert!(checked(&volume, fix).is_clean());
            assert!(volume.bytes() == base.bytes(), "H19 {marks}");
        }
    }
    // Leaks are gone, but the corruption is not: it stays marked.
    let volume = broken(&base, &[(72, &2_u64.to_be_bytes()), (0x2000a, &[0, 2])]);
    assert_eq!(checked(&volume, Fix::Leaks).leaks_fixed, 1);
    let volume = broken(&base, &[(72, &2_u64.to_be_bytes()), (0x2000a, &[0, 0])]);
    assert!(checked(&volume, Fix::Leaks).corruptions > 0);
    assert_eq!(volume.bytes()[79], 2);
}

/// Where refcounts are right, or only leaks, it is known what the flags are to be.
#[test]
fn repairing_leaks_puts_flags_right_unless_refcounts_are_too_low() {
    let scratch = Scratch::new();
    let base = base(&scratch);
    let flags = (0x40000, &0x50000_u64.to_be_bytes()[..]);
    let volume = broken(&base, &[(72, &2_u64.to_be_bytes()), flags]);
    let report = checked(&volume, Fix::Leaks);
    assert_eq!((report.corruptions, report.corruptions_fixed), (0, 1), "{:?}", lines(&report));
    assert!(volume.bytes() == base.bytes());
    let volume = broken(&base, &[flags, (0x2000a, &[0, 0])]);
    let before = volume.bytes();
    assert!(checked(&volume, Fix::Leaks).corruptions > 0);
    assert!(volume.bytes() == before);
}

/// K2, K3, K5: a repair that ends at any moment leaves an image that a second one repairs, with the
/// same contents; and as long as anything is wrong with it, it is marked.
#[test]
fn a_repair_may_be_cut_off_at_any_moment() {
    let scratch = Scratch::new();
    let path = scratch.create("cluster_size=4k", "2M");
    scratch.qemu_io(&path, "write -P 0x11 0 100k");
    scratch.qemu_img(&["snapshot", "-c", "one", &path]);
    scratch.qemu_io(&path, "write -P 0x22 50k 100k");
    let base = Volume::from_file(&path);
    let contents = scratch.contents(&path);
    let l2 = base.bytes();
    let l1 = u64::from_be_bytes(l2[40..48].try_into().unwrap()) as usize;
    let l2 = u64::from_be_bytes(l2[l1..l1 + 8].try_into().unwrap()) & !(1 << 63);
    let rows: [&[Change<'_>]; 4] = [
        &[(0x2000, &[0; 40])],
        &[(0x1000, &[0; 8])],
        &[(0x200a, &[0, 1].repeat(40)), (l1 as u64, &[0])],
        &[(0x200a, &[0, 9].repeat(60)), (l2 + 25 * 8, &[0])],
    ];
    for (row, changes) in rows.iter().enumerate() {
        let start = broken(&broken(&base, changes), &[(79, &[2])]);
        let volume = Volume::new(&start.bytes());
        volume.record();
        assert_eq!(checked(&volume, Fix::All).exit_code(), 0, "row {row}");
        let journal = volume.journal();
        let mut random = Random(row as u64 + 1);
        for cut in 0..=journal.len() {
            let durable = journal[..cut].iter().rposition(|event| *event == Event::Flush);
            let crashed = Volume::new(&start.bytes());
            for (at, event) in journal[..cut].iter().enumerate() {
                if durable.is_some_and(|durable| at <= durable) || random.below(2) == 0 {
                    crashed.apply(event);
                }
            }
            if crashed.bytes()[79] == 0 {
                let found = checked(&Volume::new(&crashed.bytes()), Fix::None);
                assert!(found.is_clean(), "row {row}, cut at {cut}: {:?}", lines(&found));
            }
            repaired(&scratch, &crashed, &format!("row {row}, cut at {cut}"));
            assert!(Rig::writable(&crashed).read(0, contents.len()) == contents, "row {row}");
        }
    }
}

/// An image whose writer was late with the refcounts, and never came to write them.
#[test]
fn a_dirty_image_is_repaired_when_it_is_opened_for_writing() {
    let scratch = Scratch::new();
    let path = scratch.create("lazy_refcounts=on", "64M");
    let abort = ["-f", "qcow2", "-c", "write -P 0x11 0 200k", "-c", "flush", "-c", "abort", &path];
    Command::new("qemu-io").args(abort).output().unwrap();
    let crashed = Volume::from_file(&path);
    assert_eq!(crashed.bytes()[79], 1, "the peer left it dirty");
    let mut reader = Rig::open(&crashed, Setup { read_only: true, ..Setup::default() }).unwrap();
    assert!(reader.read(0, 200 << 10) == vec![0x11; 200 << 10]);
    reader.close();
    assert!(crashed.bytes() == Volume::from_file(&path).bytes(), "reading changed it");
    let mut rig = Rig::writable(&crashed);
    rig.write(1 << 20, &[0x22; 70_000]);
    assert!(rig.read(0, 200 << 10) == vec![0x11; 200 << 10]);
    rig.close();
    crashed.save(&path);
    scratch.check_clean(&path);
    // What cannot be repaired is not written to, nor is what is marked corrupt.
    let base = base(&scratch);
    let unaligned = (0x40000, &0x8000_0000_0005_0200_u64.to_be_bytes()[..]);
    for changes in [vec![(79, &[1][..]), unaligned], vec![(79, &[3][..])]] {
        let volume = broken(&base, &changes);
        let before = volume.bytes();
        let error = Rig::open(&volume, Setup::default()).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(volume.bytes() == before);
    }
}

fn with_snapshots(scratch: &Scratch, count: u32) -> (Volume, u64) {
    let path = scratch.create("cluster_size=64k", "64M");
    scratch.qemu_io(&path, "write -P 0x11 0 64k");
    for number in 0..count {
        scratch.qemu_img(&["snapshot", "-c", &format!("s{number}"), &path]);
    }
    let volume = Volume::from_file(&path);
    let table = u64::from_be_bytes(volume.bytes()[64..72].try_into().unwrap());
    (volume, table)
}

#[test]
fn the_snapshot_table_is_repaired_where_it_can_be() {
    let scratch = Scratch::new();
    let (base, table) = with_snapshots(&scratch, 2);
    // S03: extra data that reaches over the other entry, and no more.
    let volume = broken(&base, &[(table + 36, &[0, 0, 8, 0])]);
    volume.apply(&Event::Truncate(table + 65536));
    repaired(&scratch, &volume, "S03 too much extra data");
    let bytes = volume.bytes();
    let place = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
    assert_eq!(bytes[place + 36..place + 40], 1024_u32.to_be_bytes());
    // Version 3 wants 16 bytes.
    let entry = bytes_of_entry(&base, table);
    let mut short = entry[..36].to_vec();
    short.extend([0; 4]);
    short.extend(&entry[64..67]);
    short.resize(48, 0);
    let volume = broken(&base, &[(table, &short), (60, &[0, 0, 0, 1])]);
    let report = repaired(&scratch, &volume, "incomplete");
    assert!(
        lines(&report).iter().any(|line| line == "Repairing snapshot table entry 0 is incomplete")
    );
    let volume = broken(&base, &[(table + 4096 + 36, &[0xff; 4])]);
    assert!(checked(&volume, Fix::None).is_clean(), "nothing beyond the entries counts");
}

fn bytes_of_entry(volume: &Volume, table: u64) -> Vec<u8> {
    volume.bytes()[table as usize..table as usize + 72].to_vec()
}

#[test]
fn snapshots_that_cannot_be_followed_end_a_repair() {
    let scratch = Scratch::new();
    let (base, table) = with_snapshots(&scratch, 2);
    let rows: [(&str, u64, &[u8]); 8] = [
        ("S01 L1 unaligned", table, &0x30200_u64.to_be_bytes()),
        ("S01 L1 past the end", table, &0x10_0000_0000_u64.to_be_bytes()),
        ("S02 L1 size", table + 8, &[0xff; 4]),
        ("S03 extra data past the end", table + 36, &[0xff; 4]),
        ("S04 names past the end", table + 72 + 12, &[0xff; 4]),
        ("S05 L1 is the disk's", table, &0x30000_u64.to_be_bytes()),
        ("H15 count", 60, &[0xff; 4]),
        ("H15b table nowhere", 64, &0xffff_ffff_ffff_0000_u64.to_be_bytes()),
    ];
    for (what, offset, bytes) in rows {
        refused(&broken(&base, &[(offset, bytes)]), what);
    }
}

#[test]
fn too_many_snapshots_lose_those_past_the_limit() {
    let scratch = Scratch::new();
    let path = scratch.create("cluster_size=64k", "64M");
    scratch.qemu_io(&path, "write -P 0x11 0 64k");
    let volume = Volume::from_file(&path);
    // S07, with entries that have all that version 3 wants.
    let mut entry = [0; 64];
    entry[39] = 24;
    let table = entry.repeat(131_072);
    let at = volume.length().next_multiple_of(65536);
    volume.apply(&Event::Write(at, table));
    volume.apply(&Event::Write(60, 131_072_u32.to_be_bytes().to_vec()));
    volume.apply(&Event::Write(64, at.to_be_bytes().to_vec()));
    assert_eq!(checked(&volume, Fix::None).exit_code(), 2);
    let report = checked(&volume, Fix::All);
    assert!(report.failure.is_none() && report.exit_code() == 0, "{:?}", report.failure);
    assert!(checked(&volume, Fix::All).is_clean());
    assert_eq!(volume.bytes()[60..64], 65536_u32.to_be_bytes());
}
