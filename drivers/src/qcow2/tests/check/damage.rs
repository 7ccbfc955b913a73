//! Damage without a plan, and images that were made to keep a check busy.

use super::{Peer, broken, checked, lines, refused, repaired};
use crate::qcow2::check::{CheckOptions, Fix, check};
use crate::qcow2::testing::Scratch;
use crate::qcow2::testing::rig::{Rig, Setup, with_file};
use crate::qcow2::testing::volume::{Event, Volume};
use crate::qcow2::tests::crash::Random;

/// The images that are damaged.
fn victims(scratch: &Scratch) -> Vec<Volume> {
    let options = [
        "cluster_size=4k",
        "cluster_size=4k,refcount_bits=2,compression_type=zstd",
        "cluster_size=512,refcount_bits=64",
        "compat=0.10,cluster_size=4k",
        "extended_l2=on,cluster_size=16k",
    ];
    let image = |options: &&str| {
        let path = scratch.create(options, "4M");
        scratch.qemu_io(&path, "write -P 0x11 0 300k");
        scratch.qemu_img(&["snapshot", "-c", "one", &path]);
        scratch.qemu_io(&path, "write -P 0x22 100k 300k");
        scratch.qemu_io(&path, "write -z 512k 64k");
        scratch.qemu_io(&path, "write -c -P 0x33 2M 16k");
        if !options.contains("0.10") {
            scratch.qemu_img(&["bitmap", "--add", &path, "first"]);
            scratch.qemu_io(&path, "write -P 0x22 1M 10k");
        }
        Volume::from_file(&path)
    };
    options.iter().map(image).collect()
}

/// Flips and overwrites at random places of the metadata: nothing panics, what the peer calls
/// corrupt is not called clean, what is called clean can be read as a whole, and a repair ends
/// clean or changes nothing.
#[test]
fn random_damage_is_found_and_repaired_or_left_alone() {
    let scratch = Scratch::new();
    let mut random = Random(77);
    let mut repairs = 0;
    for (number, base) in victims(&scratch).iter().enumerate() {
        for round in 0..ROUNDS {
            let volume = Volume::new(&base.bytes());
            for _ in 0..1 + random.below(3) {
                damage(&volume, base.length(), &mut random);
            }
            repairs += u32::from(judge(&scratch, &volume, &format!("{number}, round {round}")));
        }
    }
    assert!(repairs > 20, "only {repairs} repairs");
}

const ROUNDS: u64 = 20;

/// Whether it was, or is, sound.
fn judge(scratch: &Scratch, volume: &Volume, what: &str) -> bool {
    let path = scratch.path();
    volume.save(&path);
    let peer = Peer::check(&path);
    let before = volume.bytes();
    let repair = CheckOptions { fix: Fix::All };
    let Ok(report) = with_file(volume, async |file| check(file, repair).await) else {
        assert!(volume.bytes() == before, "{what}");
        return false;
    };
    if peer.exit == 2 {
        // Flags may be wrong only beside leaks, and right without them.
        let found = report.corruptions + report.corruptions_fixed + report.leaks_fixed;
        assert!(found > 0, "{what}: {:?}", peer.lines);
    }
    if report.exit_code() != 0 {
        assert!(volume.bytes() == before, "{what}: {:?}", lines(&report));
        return false;
    }
    repaired(scratch, volume, what);
    let mut rig = Rig::open(volume, Setup::default()).unwrap();
    for cluster in 0..64 {
        // A stream of bytes may be broken without any table being so.
        let read = rig.try_read(cluster << 16, 1 << 16);
        let is_compressed = (2 << 20..3 << 20).contains(&(cluster << 16));
        assert!(read.is_ok() || is_compressed, "{what}: {:?}", read.err());
    }
    rig.abandon();
    true
}

fn damage(volume: &Volume, length: u64, random: &mut Random) {
    let words: [u64; 6] = [0, 1 << 63, 0x1000, 0x8000_0000_0000_5000, u64::MAX, 1 << 62 | 0x9000];
    let at = random.below(length.min(0x8000)) & !1;
    match random.below(4) {
        0 => {
            let word = words[random.below(words.len() as u64) as usize];
            volume.apply(&Event::Write(at & !7, word.to_be_bytes().to_vec()));
        }
        1 => volume.apply(&Event::Write(at, vec![0, random.below(4) as u8])),
        2 => {
            let byte = volume.bytes()[at as usize] ^ 1 << random.below(8);
            volume.apply(&Event::Write(at, vec![byte]));
        }
        _ => {
            let from = random.below(length / 4096) * 4096;
            let cluster = volume.bytes()[from as usize..from as usize + 4096].to_vec();
            volume.apply(&Event::Write(at & !4095, cluster));
        }
    }
}

/// Whatever fails in a repair, or while it looks: the image is no worse for it.
#[test]
fn a_repair_that_fails_can_be_made_again() {
    let scratch = Scratch::new();
    let path = scratch.create("cluster_size=4k", "2M");
    scratch.qemu_io(&path, "write -P 0x11 0 100k");
    scratch.qemu_img(&["snapshot", "-c", "one", &path]);
    scratch.qemu_io(&path, "write -P 0x22 50k 100k");
    let base = Volume::from_file(&path);
    let contents = scratch.contents(&path);
    let rows: [&[(u64, &[u8])]; 2] = [&[(0x2000, &[0; 40])], &[(0x200a, &[0, 9].repeat(60))]];
    for (row, changes) in rows.iter().enumerate() {
        let start = broken(&base, changes);
        for victim in 0.. {
            let volume = Volume::new(&start.bytes());
            let mut count = 0;
            volume.set_gate(move |_| {
                count += 1;
                if count == victim + 1 { Err(libc::ENOSPC) } else { Ok(false) }
            });
            let repair = CheckOptions { fix: Fix::All };
            let result = with_file(&volume, async |file| check(file, repair).await);
            volume.remove_gate();
            let what = format!("row {row}, operation {victim}");
            let done = result.as_ref().is_ok_and(|report| report.exit_code() == 0);
            if !done {
                repaired(&scratch, &volume, &what);
            }
            let mut rig = Rig::open(&volume, Setup::default()).unwrap();
            assert!(rig.read(0, contents.len()) == contents, "{what}");
            rig.close();
            if done {
                assert!(victim > 8, "{what}: it did not fail");
                break;
            }
        }
    }
}

/// S-7: what is claimed costs nothing, and what is claimed twice is looked at once. Each of these
/// would take minutes, or gigabytes, otherwise.
#[test]
fn claims_cost_neither_time_nor_memory() {
    let scratch = Scratch::new();
    let path = scratch.create("", "64M");
    scratch.qemu_io(&path, "write -P 0x11 0 64k");
    let base = Volume::from_file(&path);
    // A petabyte of nothing, with a refcount table of 8 MiB for it.
    let sparse = broken(&base, &[(48, &0x10_0000_u64.to_be_bytes()), (56, &[0, 0, 0, 0x80])]);
    sparse.apply(&Event::Write(0x10_0000, 0x20000_u64.to_be_bytes().to_vec()));
    sparse.apply(&Event::Truncate(1 << 50));
    assert!(checked(&sparse, Fix::None).corruptions > 0);
    assert!(checked(&sparse, Fix::All).is_clean());
    assert!(checked(&sparse, Fix::None).is_clean());
    // Four million L1 entries with one table.
    let at = 0x10_0000;
    let wide = broken(&base, &[(24, &(1_u64 << 51).to_be_bytes()), (40, &at_bytes(at))]);
    wide.apply(&Event::Write(36, 0x40_0000_u32.to_be_bytes().to_vec()));
    wide.apply(&Event::Write(at, 0x8000_0000_0004_0000_u64.to_be_bytes().repeat(0x40_0000)));
    assert!(checked(&wide, Fix::All).corruptions > 0);
    // A snapshot table of 65,536 entries with the same L1 table of 32 MiB.
    let mut entry = [0; 64];
    entry[..8].copy_from_slice(&at_bytes(at));
    entry[8..12].copy_from_slice(&0x40_0000_u32.to_be_bytes());
    entry[39] = 24;
    let table = 0x400_0000;
    wide.apply(&Event::Write(table, entry.repeat(65536)));
    wide.apply(&Event::Write(60, [&65536_u32.to_be_bytes()[..], &at_bytes(table)].concat()));
    assert!(checked(&wide, Fix::All).corruptions > 65535);
    // Blocks of 16 million refcounts of one bit.
    let path = scratch.create("cluster_size=2M,refcount_bits=1", "64M");
    let volume = Volume::from_file(&path);
    for index in 1..16 {
        let block = (8 + index) << 21;
        volume.apply(&Event::Write(0x20_0000 + index * 8, at_bytes(block).to_vec()));
    }
    volume.apply(&Event::Truncate(24 << 21));
    assert!(checked(&volume, Fix::All).is_clean());
}

fn at_bytes(offset: u64) -> [u8; 8] {
    offset.to_be_bytes()
}

/// M01 to M12. The directory and what it names are found in an image of the peer.
#[test]
fn bitmaps_that_cannot_be_followed_end_a_repair() {
    let scratch = Scratch::new();
    let path = scratch.create("", "64M");
    scratch.qemu_img(&["bitmap", "--add", &path, "first"]);
    scratch.qemu_img(&["bitmap", "--add", &path, "other"]);
    scratch.qemu_io(&path, "write -P 0x11 0 64k");
    let base = Volume::from_file(&path);
    assert!(checked(&base, Fix::All).is_clean());
    let bytes = base.bytes();
    let extension = bytes.windows(4).position(|w| w == [0x23, 0x85, 0x28, 0x75]).unwrap();
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let directory = word(extension + 24);
    let table = word(directory as usize);
    let rows: [(&str, u64, &[u8]); 14] = [
        ("M01 name size", directory + 18, &[0xff, 0xff]),
        ("M02 no name", directory + 18, &[0, 0]),
        ("M03 granularity", directory + 17, &[8]),
        ("M03 granularity", directory + 17, &[255]),
        ("M04 table size", directory + 8, &[0; 4]),
        ("M04 table size", directory + 8, &[0xff; 4]),
        ("M05 table unaligned", directory, &0x80200_u64.to_be_bytes()),
        ("M05 table nowhere", directory, &[0; 8]),
        ("M05c table past the end", directory, &0x1_0000_0000_u64.to_be_bytes()),
        ("M06 type", directory + 16, &[2]),
        ("M07 flag", directory + 12, &[0x80]),
        ("M09 reserved bits", table, &0xff00_0000_0000_01fe_u64.to_be_bytes()),
        ("M09c data on the L1 table", table, &0x30000_u64.to_be_bytes()),
        ("M11 two of one name", directory + 24, b"other"),
    ];
    for (what, offset, bytes) in rows {
        refused(&broken(&base, &[(offset, bytes)]), what);
    }
    let in_use = broken(&base, &[(directory + 15, &[1])]);
    assert!(checked(&in_use, Fix::None).is_clean(), "M10");
}

/// T16, T16b.
#[test]
fn impossible_subclusters_end_a_repair() {
    let scratch = Scratch::new();
    let path = scratch.create("extended_l2=on", "64M");
    scratch.qemu_io(&path, "write -P 0x11 0 64k");
    let base = Volume::from_file(&path);
    let table = 0x40000;
    let rows: [(&str, u64, u64); 4] = [
        ("T16 data and zero", table + 8, 0x0000_0001_ffff_ffff),
        ("T16b data without a cluster", table, 0),
        ("zero flag", table, 0x8000_0000_0005_0001),
        ("compressed with subclusters", table, 1 << 62 | 0x50000),
    ];
    for (what, offset, word) in rows {
        let volume = broken(&base, &[(offset, &word.to_be_bytes())]);
        refused(&volume, what);
        let path = scratch.path();
        volume.save(&path);
        // The peer looks past a zero flag that these entries do not have.
        assert!(what == "zero flag" || Peer::check(&path).exit == 2, "{what}");
    }
}
