//! Reads and writes of ordinary images, judged by the peer.

use crate::qcow2::Qcow2Options;
use crate::qcow2::testing::Scratch;
use crate::qcow2::testing::rig::{Rig, Setup};
use crate::qcow2::testing::volume::{Event, Volume};
use blockplex_graph::Request;

/// Bytes that tell where they belong.
pub(super) fn pattern(seed: u64, length: usize) -> Vec<u8> {
    (0..length as u64).map(|i| ((i / 512).wrapping_mul(37) ^ seed ^ i) as u8 | 1).collect()
}

#[test]
fn what_the_peer_wrote_is_read() {
    let scratch = Scratch::new();
    for options in ["", "compat=0.10", "cluster_size=512", "cluster_size=2M,refcount_bits=1"] {
        let path = scratch.create(options, "6M");
        scratch.qemu_io(&path, "write -P 0x11 0 100k");
        scratch.qemu_io(&path, "write -P 0x22 3M 1M");
        let mut rig =
            Rig::open(&Volume::from_file(&path), Setup { read_only: true, ..Setup::default() })
                .unwrap();
        assert_eq!(rig.read(0, 6 << 20), scratch.contents(&path), "{options}");
        assert_eq!(rig.read((100 << 10) - 3, 6), [0x11, 0x11, 0x11, 0, 0, 0]);
        assert!(rig.try_write(0, &[1]).is_err());
        rig.close();
    }
}

#[test]
fn compressed_clusters_are_read() {
    let scratch = Scratch::new();
    let raw = scratch.path();
    let mut bytes = pattern(9, 3 << 20);
    bytes[1 << 20..2 << 20].fill(0);
    std::fs::write(&raw, &bytes).unwrap();
    for options in ["compression_type=zlib", "compression_type=zstd", "cluster_size=4k"] {
        let path = scratch.path();
        scratch.qemu_img(&["convert", "-c", "-O", "qcow2", "-o", options, &raw, &path]);
        let volume = Volume::from_file(&path);
        let mut rig = Rig::writable(&volume);
        assert!(rig.read(0, 3 << 20) == bytes, "{options}");
        assert_eq!(rig.read(65530, 12), bytes[65530..65542]);
        assert!(rig.status(0, 1 << 20).compressed);
        // Over them: copy-on-write, and their clusters are counted down.
        rig.write(70_000, &[0xee; 100]);
        rig.write(131_072, &[0xdd; 65_536]);
        bytes[70_000..70_100].fill(0xee);
        bytes[131_072..196_608].fill(0xdd);
        assert!(rig.read(0, 3 << 20) == bytes, "{options}");
        rig.close();
        volume.save(&path);
        scratch.check_clean(&path);
        assert!(scratch.contents(&path) == bytes);
        bytes = std::fs::read(&raw).unwrap();
    }
}

#[test]
fn what_is_written_is_read_by_the_peer() {
    let scratch = Scratch::new();
    let layouts = [
        "",
        "compat=0.10",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=4k,refcount_bits=1",
        "cluster_size=2M",
    ];
    for options in layouts {
        let path = scratch.create(options, "8M");
        let volume = Volume::from_file(&path);
        let mut rig = Rig::writable(&volume);
        let mut model = vec![0; 8 << 20];
        for (offset, length) in
            [(0, 512), (65536, 65536), (70000, 10), (1 << 20, 3 << 20), (8 * 1048576 - 700, 700)]
        {
            let bytes = pattern(offset as u64, length);
            rig.write(offset as u64, &bytes);
            model[offset..offset + length].copy_from_slice(&bytes);
        }
        assert!(rig.read(0, 8 << 20) == model, "{options}");
        rig.flush();
        volume.save(&path);
        // A refcount table that had to grow leaves its old place to the next flush.
        scratch.check_allowing_leaks(&path);
        assert!(scratch.contents(&path) == model, "{options}");
        rig.write(4096, &[3; 5]);
        model[4096..4101].fill(3);
        rig.close();
        volume.save(&path);
        scratch.check_clean(&path);
        assert!(scratch.contents(&path) == model, "{options}");
    }
}

#[test]
fn a_backing_node_shines_through_until_it_is_written_over() {
    let scratch = Scratch::new();
    let path = scratch.create("", "1M");
    let base = pattern(4, 300_000);
    let backing = Some(Volume::new(&base));
    let volume = Volume::from_file(&path);
    let mut rig = Rig::open(&volume, Setup { backing, ..Setup::default() }).unwrap();
    let mut model = base;
    model.resize(1 << 20, 0);
    assert!(rig.read(0, 1 << 20) == model);
    let status = rig.status(0, 1 << 20);
    assert_eq!((status.length, status.allocated, status.depth), (300_000, false, 1));
    // Ragged ends in the middle of the backing node, and across its end.
    for (offset, length) in [(70_000, 5), (290_000, 20_000), (131_072, 65_536)] {
        let bytes = pattern(offset as u64 + 1, length);
        rig.write(offset as u64, &bytes);
        model[offset..offset + length].copy_from_slice(&bytes);
        assert!(rig.read(0, 1 << 20) == model);
    }
    rig.request(Request::write_zeroes(0, 65_536 + 100)).unwrap();
    model[..65_636].fill(0);
    rig.request(Request::discard(131_072, 65_536)).unwrap();
    model[131_072..196_608].fill(0);
    assert!(rig.read(0, 1 << 20) == model);
    rig.close();
    volume.save(&path);
    scratch.check_clean(&path);
}

#[test]
fn a_clean_flush_is_one_flush_of_the_file() {
    let scratch = Scratch::new();
    let volume = Volume::from_file(&scratch.create("", "1M"));
    let mut rig = Rig::writable(&volume);
    rig.write(0, &[1; 4096]);
    rig.flush();
    let (flushes, writes) = (volume.flushes(), volume.writes());
    rig.flush();
    assert_eq!((volume.flushes(), volume.writes()), (flushes + 1, writes));
    // In place: data only.
    rig.write(0, &[2; 4096]);
    rig.flush();
    assert_eq!((volume.flushes(), volume.writes()), (flushes + 2, writes + 1));
    rig.close();
}

#[test]
fn one_sector_in_a_new_cluster_costs_one_sector() {
    let scratch = Scratch::new();
    let volume = Volume::from_file(&scratch.create("", "64M"));
    let mut rig = Rig::writable(&volume);
    rig.write(0, &[1; 512]);
    let writes = volume.writes();
    volume.record();
    for cluster in 1..100_u64 {
        rig.write(cluster * 65536 + 4096, &[1; 512]);
    }
    assert_eq!(volume.writes(), writes + 99, "no metadata before a flush");
    // Once for all of them the file is made longer, and nothing but data is written.
    let is_growth = |event: &&Event| matches!(event, Event::Truncate(_));
    let journal = volume.journal();
    let growths = journal.iter().filter(is_growth).count();
    assert!(growths <= 2, "{growths}");
    assert!(
        journal
            .iter()
            .filter(|event| !is_growth(event))
            .all(|event| { matches!(event, Event::Write(_, bytes) if bytes.len() == 512) })
    );
    let longest = volume.length();
    rig.close();
    assert!(volume.length() < longest, "what is left over is cut off");
}

#[test]
fn version_2_zeroes_and_discards_without_zero_clusters() {
    let scratch = Scratch::new();
    let path = scratch.create("compat=0.10", "1M");
    let volume = Volume::from_file(&path);
    let mut rig = Rig::writable(&volume);
    rig.write(0, &[1; 300_000]);
    rig.request(Request::write_zeroes(1000, 150_000)).unwrap();
    rig.request(Request::discard(196_608, 65_536)).unwrap();
    rig.request(Request::write_zeroes(500_000, 100_000).no_fallback()).unwrap();
    let mut model = vec![1; 300_000];
    model.resize(1 << 20, 0);
    model[1000..151_000].fill(0);
    model[196_608..262_144].fill(0);
    assert!(rig.read(0, 1 << 20) == model);
    assert!(!rig.status(196_608, 65_536).data);
    rig.close();
    volume.save(&path);
    scratch.check_clean(&path);
    assert!(scratch.contents(&path) == model);
}

/// H06c, Q21: the last cluster is only partly the disk's.
#[test]
fn a_disk_may_end_anywhere_in_a_cluster() {
    let scratch = Scratch::new();
    let path = scratch.create("", "1M");
    let mut bytes = scratch.read(&path);
    let size = (1 << 20) - 65_536 + 1001_u64;
    bytes[24..32].copy_from_slice(&size.to_be_bytes());
    let volume = Volume::new(&bytes);
    let backing = Some(Volume::new(&[0x77; 1 << 20]));
    let mut rig = Rig::open(&volume, Setup { backing, ..Setup::default() }).unwrap();
    assert_eq!(rig.read(size - 3, 3), [0x77; 3]);
    rig.write(size - 1, &[5]);
    assert_eq!(rig.read(size - 3, 3), [0x77, 0x77, 5]);
    assert!(rig.try_read(size - 3, 4).is_err());
    rig.request(Request::write_zeroes(size - 1001, 1001)).unwrap();
    assert_eq!(rig.read(size - 1001, 1001), [0; 1001]);
    assert!(rig.status(size - 1001, 1001).zero);
    rig.write(size - 1000, &[6; 1000]);
    rig.request(Request::discard(size - 1001, 1001)).unwrap();
    assert_eq!(rig.read(size - 1001, 1001), [0; 1001]);
    rig.close();
    volume.save(&path);
    scratch.check_clean(&path);
}

#[test]
fn a_status_tells_what_a_chain_holds_from_what_nobody_holds() {
    let scratch = Scratch::new();
    let volume = Volume::from_file(&scratch.create("", "1M"));
    let backing = Some(Volume::new(&[0x77; 65_536]));
    let mut rig = Rig::open(&volume, Setup { backing, ..Setup::default() }).unwrap();
    let below = rig.status(0, 1 << 20);
    assert!(below.data && below.backed && !below.allocated && below.depth == 1);
    let beyond = rig.status(65_536, 1 << 20);
    assert!(beyond.zero && beyond.backed && !beyond.allocated);
    rig.close();
    let mut rig = Rig::writable(&volume);
    let nowhere = rig.status(0, 1 << 20);
    assert!(nowhere.zero && !nowhere.backed && !nowhere.allocated);
    rig.close();
}

#[test]
fn write_zeroes_keeps_the_cluster_unless_it_may_unmap() {
    let scratch = Scratch::new();
    let path = scratch.create("", "1M");
    let volume = Volume::from_file(&path);
    let mut rig = Rig::writable(&volume);
    rig.write(0, &[1; 131_072]);
    let hosts = [0, 65_536].map(|at| rig.status(at, 65_536).offset);
    rig.request(Request::write_zeroes(0, 131_072)).unwrap();
    rig.write(65_536 + 10, &[2; 10]);
    assert_eq!(rig.status(65_536, 65_536).offset, hosts[1], "its own cluster again");
    assert_eq!(rig.read(65_536, 30), [[0; 10], [2; 10], [0; 10]].concat());
    rig.request(Request::write_zeroes(0, 65_536).may_unmap()).unwrap();
    rig.flush();
    rig.write(262_144, &[3; 512]);
    assert_eq!(rig.status(262_144, 512).offset, hosts[0], "free for others");
    rig.close();
    volume.save(&path);
    scratch.check_clean(&path);
}

#[test]
fn caches_change_their_size_while_the_image_is_open() {
    let scratch = Scratch::new();
    let volume = Volume::from_file(&scratch.create("cluster_size=512", "1M"));
    let mut rig = Rig::writable(&volume);
    rig.write(0, &[1; 1 << 20]);
    let smaller = Qcow2Options { cache_size: Some(4096), ..Qcow2Options::default() };
    rig.reopen(smaller).unwrap();
    assert!(rig.read(0, 1 << 20).iter().all(|byte| *byte == 1));
    let slices = Qcow2Options { l2_cache_entry_size: Some(1024), ..Qcow2Options::default() };
    assert!(rig.reopen(slices).is_err());
    rig.close();
}
