//! Amending, against the peer's: the same images, the same refusals.

use super::check::{Peer, checked, lines};
use super::crash::Random;
use crate::qcow2::Qcow2;
use crate::qcow2::amend::{AmendOptions, amend};
use crate::qcow2::check::Fix;
use crate::qcow2::header::Version;
use crate::qcow2::testing::Scratch;
use crate::qcow2::testing::rig::{Rig, with_file};
use crate::qcow2::testing::volume::{Event, Volume};
use blockplex_graph::Result;
use std::process::Command;

fn amended(volume: &Volume, options: &AmendOptions) -> Result<()> {
    // Only what takes long tells how far it is.
    let mut last = (1, 1);
    let result = with_file(volume, async |file| {
        amend(file, options, &mut |done, parts| last = (done, parts)).await
    });
    assert!(result.is_err() || last.0 == last.1, "the progress ended at {last:?}");
    result
}

fn to_version(version: Version) -> AmendOptions {
    AmendOptions { version: Some(version), ..AmendOptions::default() }
}

fn to_bits(bits: u64) -> AmendOptions {
    AmendOptions { refcount_bits: Some(bits), ..AmendOptions::default() }
}

/// Clean for both, and the peer reads the same.
fn judge(scratch: &Scratch, volume: &Volume, contents: &[u8], what: &str) -> String {
    let path = scratch.path();
    volume.save(&path);
    let peer = Peer::check(&path);
    assert_eq!(peer.exit, 0, "{what}: {:?}", peer.lines);
    let report = checked(volume, Fix::None);
    assert!(report.is_clean(), "{what}: {:?}", lines(&report));
    assert!(scratch.contents(&path) == contents, "{what}: other contents");
    path
}

fn information(volume: &Volume) -> crate::qcow2::ImageInformation {
    with_file(volume, async |file| {
        let image = Qcow2::open(file, crate::qcow2::Qcow2Options::default(), false).await;
        image.unwrap().information().clone()
    })
}

#[test]
fn refcounts_of_every_width_become_those_of_every_other() {
    let scratch = Scratch::new();
    for (cluster, size) in [("512", "2M"), ("64k", "64M")] {
        let path = scratch.create(&format!("cluster_size={cluster}"), size);
        scratch.qemu_io(&path, "write -P 0x11 0 700k");
        let contents = scratch.contents(&path);
        let volume = Volume::from_file(&path);
        for bits in [1, 64, 2, 32, 4, 8, 1, 16] {
            amended(&volume, &to_bits(bits)).unwrap();
            judge(&scratch, &volume, &contents, &format!("{bits} bits, {cluster}"));
            assert_eq!(u64::from(information(&volume).refcount_bits), bits);
            let mut rig = Rig::writable(&volume);
            rig.write(1 << 20, &[bits as u8; 5000]);
            rig.write(1 << 20, &[0; 5000]);
            rig.close();
        }
        let before = volume.bytes();
        amended(&volume, &to_bits(16)).unwrap();
        assert!(volume.bytes() == before, "nothing to do");
    }
}

#[test]
fn a_width_that_is_too_small_is_refused_in_the_peers_words() {
    let scratch = Scratch::new();
    let path = scratch.create("", "64M");
    scratch.qemu_io(&path, "write -P 0x11 0 100k");
    scratch.qemu_img(&["snapshot", "-c", "one", &path]);
    let volume = Volume::from_file(&path);
    let before = volume.bytes();
    let error = amended(&volume, &to_bits(1)).unwrap_err().to_string();
    assert_eq!(error, refused_by_peer(&path, "refcount_bits=1"));
    assert!(volume.bytes() == before);
    amended(&volume, &to_bits(2)).unwrap();
    judge(&scratch, &volume, &scratch.contents(&path), "2 bits");
}

/// What the peer says, without its name.
fn refused_by_peer(path: &str, options: &str) -> String {
    let arguments = ["amend", "-f", "qcow2", "-o", options, path];
    let output = Command::new("qemu-img").args(arguments).output().unwrap();
    assert!(!output.status.success(), "{options} works");
    let text = String::from_utf8(output.stderr).unwrap();
    text.trim_end().strip_prefix("qemu-img: ").unwrap().to_owned()
}

#[test]
fn what_cannot_be_is_refused_in_the_peers_words_before_anything_is_written() {
    let scratch = Scratch::new();
    let none = AmendOptions::default;
    let plain = scratch.create("", "4M");
    let narrow = scratch.create("refcount_bits=8", "4M");
    let extended = scratch.create("extended_l2=on", "4M");
    let data = scratch.path();
    let data = scratch.create(&format!("data_file={data}"), "4M");
    let zstd = scratch.create("compression_type=zstd", "4M");
    scratch.qemu_io(&zstd, "write -c 0 64k");
    let sized = scratch.create("", "4M");
    scratch.qemu_img(&["snapshot", "-c", "one", &sized]);
    scratch.qemu_img(&["resize", "-q", &sized, "8M"]);
    let old = Some(Version::V2);
    let rows = [
        (&plain, "refcount_bits=3", to_bits(3)),
        (&plain, "refcount_bits=128", to_bits(128)),
        (
            &plain,
            "compat=0.10,refcount_bits=8",
            AmendOptions { version: old, refcount_bits: Some(8), ..none() },
        ),
        (
            &plain,
            "compat=0.10,lazy_refcounts=on",
            AmendOptions { version: old, lazy_refcounts: Some(true), ..none() },
        ),
        (&plain, "data_file=x", AmendOptions { data_file: Some(b"x".to_vec()), ..none() }),
        (&plain, "data_file_raw=on", AmendOptions { data_file_raw: Some(true), ..none() }),
        (&plain, "backing_file=x", AmendOptions { backing_file: Some(b"x".to_vec()), ..none() }),
        (
            &plain,
            "backing_fmt=raw",
            AmendOptions { backing_format: Some(b"raw".to_vec()), ..none() },
        ),
        (&narrow, "compat=0.10", to_version(Version::V2)),
        (&extended, "compat=0.10", to_version(Version::V2)),
        (&data, "compat=0.10", to_version(Version::V2)),
        (&zstd, "compat=0.10", to_version(Version::V2)),
        (&sized, "compat=0.10", to_version(Version::V2)),
    ];
    for (path, words, options) in rows {
        let volume = Volume::from_file(path);
        let before = volume.bytes();
        let error = amended(&volume, &options).unwrap_err();
        assert_eq!(error.to_string(), refused_by_peer(path, words), "{words}");
        assert!(volume.bytes() == before, "{words}");
    }
}

#[test]
fn a_version_2_image_with_snapshots_becomes_version_3() {
    let scratch = Scratch::new();
    let path = scratch.create("compat=0.10,cluster_size=4k", "2M");
    scratch.qemu_io(&path, "write -P 0x11 0 100k");
    scratch.qemu_img(&["snapshot", "-c", "one", &path]);
    scratch.qemu_io(&path, "write -P 0x22 50k 100k");
    let contents = scratch.contents(&path);
    // As writers of long ago left it: no extra data.
    let volume = Volume::from_file(&path);
    let table = u64::from_be_bytes(volume.bytes()[64..72].try_into().unwrap());
    let mut entry = volume.bytes()[table as usize..table as usize + 40].to_vec();
    entry[36..40].fill(0);
    entry.extend(b"1one");
    entry.resize(128, 0);
    volume.apply(&Event::Write(table, entry));
    amended(&volume, &to_version(Version::V3)).unwrap();
    let path = judge(&scratch, &volume, &contents, "upgraded");
    assert_eq!(information(&volume).version, Version::V3);
    scratch.qemu_img(&["snapshot", "-a", "one", &path]);
    scratch.check_clean(&path);
    assert_eq!(scratch.contents(&path)[..102_400], [0x11; 102_400]);
    let mut rig = Rig::writable(&volume);
    rig.write(0, &[1; 10_000]);
    rig.close();
    let all = AmendOptions {
        refcount_bits: Some(64),
        lazy_refcounts: Some(true),
        ..to_version(Version::V3)
    };
    let volume = Volume::from_file(&scratch.create("compat=0.10", "4M"));
    amended(&volume, &all).unwrap();
    let information = information(&volume);
    assert!(information.lazy_refcounts && information.refcount_bits == 64);
}

/// An overlay with zero clusters of all kinds, one of them on top of what a snapshot holds, and the
/// snapshot with some of its own.
fn overlay(scratch: &Scratch, cluster: &str) -> (String, Vec<u8>, Vec<u8>) {
    let below = scratch.create("", "2M");
    scratch.qemu_io(&below, "write -P 0x77 0 2M");
    let path = scratch.path();
    let options = format!("cluster_size={cluster}");
    let arguments = ["create", "-q", "-f", "qcow2", "-o", &options, "-b", &below];
    scratch.qemu_img(&[&arguments[..], &["-F", "qcow2", &path]].concat());
    scratch.qemu_io(&path, "write -P 0x11 0 512k");
    scratch.qemu_io(&path, "write -z 1M 128k");
    scratch.qemu_io(&path, "write -z 64k 64k");
    scratch.qemu_img(&["snapshot", "-c", "one", &path]);
    let held = scratch.contents(&path);
    scratch.qemu_io(&path, "write -z 256k 128k");
    scratch.qemu_io(&path, "write -P 0x22 448k 128k");
    scratch.qemu_io(&path, "write -z 512k 64k");
    let contents = scratch.contents(&path);
    (path, contents, held)
}

fn judge_overlay(scratch: &Scratch, volume: &Volume, contents: &[u8], held: &[u8], what: &str) {
    let path = judge(scratch, volume, contents, what);
    scratch.qemu_img(&["snapshot", "-a", "one", &path]);
    assert!(scratch.contents(&path) == held, "{what}: the snapshot changed");
    scratch.check_clean(&path);
}

#[test]
fn a_downgrade_keeps_the_zeros_and_the_snapshots() {
    let scratch = Scratch::new();
    for cluster in ["4k", "64k"] {
        let (path, contents, held) = overlay(&scratch, cluster);
        scratch.qemu_img(&["bitmap", "--add", &path, "lost"]);
        let volume = Volume::from_file(&path);
        amended(&volume, &to_version(Version::V2)).unwrap();
        assert_eq!(information(&volume).version, Version::V2);
        judge_overlay(&scratch, &volume, &contents, &held, cluster);
        amended(&volume, &to_version(Version::V3)).unwrap();
        judge_overlay(&scratch, &volume, &contents, &held, cluster);
    }
    // With nothing below, a zero cluster is none.
    let path = scratch.create("lazy_refcounts=on", "4M");
    scratch.qemu_io(&path, "write -P 0x11 0 512k");
    scratch.qemu_io(&path, "write -z 128k 128k");
    let contents = scratch.contents(&path);
    let volume = Volume::from_file(&path);
    amended(&volume, &to_version(Version::V2)).unwrap();
    judge(&scratch, &volume, &contents, "no backing");
    assert_eq!(checked(&volume, Fix::None).allocated_clusters, 6);
}

/// J1 to J3: whatever of the last writes is lost, the image is whole, or leaks.
#[test]
fn an_amendment_may_be_cut_off_at_any_moment() {
    let scratch = Scratch::new();
    let (path, contents, held) = overlay(&scratch, "64k");
    let mut random = Random(5);
    let steps = [to_version(Version::V2), to_version(Version::V3), to_bits(64), to_bits(16)];
    let volume = Volume::from_file(&path);
    for (number, options) in steps.iter().enumerate() {
        let start = volume.bytes();
        volume.record();
        amended(&volume, options).unwrap();
        let journal = volume.journal();
        for cut in 0..=journal.len() {
            let durable = journal[..cut].iter().rposition(|event| *event == Event::Flush);
            let crashed = Volume::new(&start);
            for (at, event) in journal[..cut].iter().enumerate() {
                if durable.is_some_and(|durable| at <= durable) || random.below(2) == 0 {
                    crashed.apply(event);
                }
            }
            let what = format!("step {number}, cut at {cut}");
            let report = checked(&crashed, Fix::Leaks);
            assert_eq!(report.check_errors, 0, "{what}");
            // A flag may be late: it is, where a count has fallen to 1 just now.
            let miscounted =
                |line: &String| line.starts_with("ERROR ") && !line.contains("OFLAG_COPIED");
            assert!(!lines(&report).iter().any(miscounted), "{what}: {:?}", lines(&report));
            checked(&crashed, Fix::All);
            judge_overlay(&scratch, &crashed, &contents, &held, &what);
        }
    }
}
