//! Overlap checks: on images whose tables lie, and without false alarm on images that do not.

use super::crash::Random;
use crate::qcow2::testing::Scratch;
use crate::qcow2::testing::rig::{Rig, Setup};
use crate::qcow2::testing::volume::Volume;
use crate::qcow2::{NewSnapshot, OverlapChecks, Qcow2Options, SnapshotSelector, Structure};
use blockplex_graph::{ErrorKind, Request, Result};

fn open(volume: &Volume, checks: OverlapChecks) -> Rig {
    let options = Qcow2Options { overlap_check: Some(checks), ..Qcow2Options::default() };
    Rig::open(volume, Setup { options, ..Setup::default() }).unwrap()
}

/// The word at a byte of the image.
fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn is_marked(volume: &Volume) -> bool {
    volume.bytes()[79] & 2 != 0
}

fn flush(rig: &mut Rig) -> Result<()> {
    rig.request(Request::flush()).map(drop)
}

/// Guest cluster 0 has a host cluster that nobody counts; an L2 table comes to be there.
fn uncounted_data(checks: OverlapChecks) -> (Volume, Result<()>) {
    let scratch = Scratch::new();
    let path = scratch.create("cluster_size=4k", "8M");
    scratch.qemu_io(&path, "write -P 0x11 0 4k");
    let mut bytes = scratch.read(&path);
    let l2 = (word(&bytes, word(&bytes, 40) as usize) & !(1 << 63)) as usize;
    let data = (word(&bytes, l2) & !(1 << 63)) as usize;
    let block = word(&bytes, word(&bytes, 48) as usize) as usize;
    bytes[block + data / 4096 * 2..][..2].fill(0);
    let volume = Volume::new(&bytes);
    let mut rig = open(&volume, checks);
    assert_eq!(rig.read(0, 512), [0x11; 512]);
    rig.write(4 << 20, &[2; 512]);
    let written = rig.try_write(0, &[3; 512]);
    rig.abandon();
    (volume, written)
}

#[test]
fn a_write_of_data_over_a_table_is_refused_and_marks_the_image() {
    for checks in [OverlapChecks::CACHED, OverlapChecks::ALL] {
        let (volume, written) = uncounted_data(checks);
        let error = written.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        let text = error.to_string();
        assert!(
            text.contains("Preventing invalid write on metadata (overlaps with active L2 table)"),
            "{text}"
        );
        assert!(is_marked(&volume));
    }
    let unwatched = [
        OverlapChecks::NONE,
        OverlapChecks::CONSTANT,
        OverlapChecks::ALL.with(Structure::ActiveL2, false),
    ];
    for checks in unwatched {
        let (volume, written) = uncounted_data(checks);
        written.unwrap();
        assert!(!is_marked(&volume), "{checks:?}");
    }
}

#[test]
fn a_snapshot_that_claims_the_disks_l1_table_stops_the_first_change_of_it() {
    let scratch = Scratch::new();
    for (checks, stops) in [(OverlapChecks::CACHED, true), (OverlapChecks::CONSTANT, false)] {
        let path = scratch.create("cluster_size=4k", "8M");
        scratch.qemu_io(&path, "write 0 4k");
        scratch.qemu_img(&["snapshot", "-c", "s", &path]);
        let mut bytes = scratch.read(&path);
        let table = word(&bytes, 64) as usize;
        bytes.copy_within(40..48, table);
        let volume = Volume::new(&bytes);
        let mut rig = open(&volume, checks);
        rig.write(4 << 20, &[2; 512]);
        let flushed = flush(&mut rig);
        if stops {
            let text = flushed.unwrap_err().to_string();
            assert!(text.contains("inactive L1 table"), "{text}");
        } else {
            flushed.unwrap();
        }
        rig.abandon();
        assert_eq!(is_marked(&volume), stops);
    }
}

#[test]
fn a_table_of_a_snapshot_is_not_written_when_all_is_watched() {
    let scratch = Scratch::new();
    for (checks, stops) in [(OverlapChecks::ALL, true), (OverlapChecks::CACHED, false)] {
        let path = scratch.create("cluster_size=4k", "8M");
        scratch.qemu_io(&path, "write 0 4k");
        scratch.qemu_img(&["snapshot", "-c", "s", &path]);
        // The disk claims the shared table for itself.
        let mut bytes = scratch.read(&path);
        let l1 = word(&bytes, 40) as usize;
        bytes[l1] |= 0x80;
        let volume = Volume::new(&bytes);
        let mut rig = open(&volume, checks);
        rig.write(8192, &[2; 512]);
        let flushed = flush(&mut rig);
        if stops {
            let text = flushed.unwrap_err().to_string();
            assert!(text.contains("inactive L2 table"), "{text}");
        } else {
            flushed.unwrap();
        }
        rig.abandon();
        assert_eq!(is_marked(&volume), stops);
    }
}

#[test]
fn a_sound_image_raises_no_alarm() {
    let scratch = Scratch::new();
    for options in ["cluster_size=512", "cluster_size=4k,compat=0.10", "extended_l2=on"] {
        let path = scratch.create(options, "1M");
        let volume = Volume::from_file(&path);
        let mut random = Random(11);
        for _ in 0..3 {
            let mut rig = open(&volume, OverlapChecks::ALL);
            for round in 0..40 {
                let offset = random.below(1_000_000);
                let length = 1 + random.below(40_000);
                match random.below(8) {
                    0 => drop(rig.request(Request::discard(offset, length))),
                    1 => rig.flush(),
                    2 => drop(rig.request(Request::truncate((1 << 20) + random.below(9) * 65536))),
                    3 if round % 2 == 0 => rig.manage(async |driver, io| {
                        let which = SnapshotSelector::Name(b"s".to_vec());
                        match driver.snapshots().len() {
                            0 | 1 => {
                                drop(driver.create_snapshot(io, NewSnapshot::of_disk("s")).await)
                            }
                            2 => drop(driver.apply_snapshot(io, &which).await.unwrap()),
                            _ => drop(driver.delete_snapshot(io, &which).await.unwrap()),
                        }
                        if driver.snapshots().len() == 2 && round > 20 {
                            driver.delete_snapshot(io, &which).await.unwrap();
                        }
                    }),
                    _ => drop(rig.try_write(offset, &vec![round as u8; length as usize])),
                }
                assert!(!is_marked(&volume), "{options}, round {round}");
            }
            rig.close();
            volume.save(&path);
            scratch.check_clean(&path);
        }
    }
}
