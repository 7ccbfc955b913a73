//! Extended L2 entries, in both directions with the peer.

use super::basics::pattern;
use super::concurrency::{hold, settle, write};
use super::crash::Random;
use crate::qcow2::header::Version;
use crate::qcow2::testing::Scratch;
use crate::qcow2::testing::rig::{Rig, Setup, new_loop, with_file};
use crate::qcow2::testing::volume::{Event, Volume};
use crate::qcow2::{CreateOptions, create};
use blockplex_graph::{ErrorKind, Preallocation, Queue, Request};
use blockplex_io::buffer::{IoBuffer, IoVector};
use std::sync::atomic::Ordering;

const SIZE: u64 = 3 << 19;

fn with_backing(volume: &Volume, backing: Option<&Volume>) -> Rig {
    Rig::open(volume, Setup { backing: backing.cloned(), ..Setup::default() }).unwrap()
}

#[test]
fn what_the_peer_wrote_to_subclusters_is_read() {
    let scratch = Scratch::new();
    for options in
        ["extended_l2=on", "extended_l2=on,cluster_size=16k", "extended_l2=on,cluster_size=2M"]
    {
        let path = scratch.create(options, "3M");
        for command in [
            "write -P 0x11 3k 1k",
            "write -P 0x22 100k 300k",
            "write -z 128k 6k",
            "write -z -u 140k 2k",
            "write -P 0x33 1M 1M",
            "discard 1M 256k",
            "write -P 0x44 2999k 9k",
        ] {
            scratch.qemu_io(&path, command);
        }
        let setup = Setup { read_only: true, ..Setup::default() };
        let mut rig = Rig::open(&Volume::from_file(&path), setup).unwrap();
        assert!(rig.read(0, 3 << 20) == scratch.contents(&path), "{options}");
        rig.close();
    }
}

/// Random requests, checked against a model; `rest` says what is below.
fn workload(rig: &mut Rig, random: &mut Random, model: &mut [u8], steps: u64, discards: bool) {
    for step in 0..steps {
        let start = random.below(SIZE - 1);
        let longest = if random.below(3) == 0 { 150_000 } else { 3000 };
        let length = 1 + random.below((SIZE - start).min(longest));
        let (from, to) = (start as usize, (start + length) as usize);
        match random.below(if discards { 8 } else { 7 }) {
            0..=3 => {
                let bytes = pattern(step, length as usize);
                rig.write(start, &bytes);
                model[from..to].copy_from_slice(&bytes);
            }
            4 | 5 => {
                rig.request(Request::write_zeroes(start, length)).unwrap();
                model[from..to].fill(0);
            }
            6 => {
                rig.request(Request::write_zeroes(start, length).may_unmap()).unwrap();
                model[from..to].fill(0);
            }
            _ => {
                rig.request(Request::discard(start, length)).unwrap();
                // What is not whole stays: either is right.
                let now = rig.read(start, length as usize);
                for (new, old) in now.iter().zip(&mut model[from..to]) {
                    assert!(*new == 0 || new == old, "a discard gives zeros or changes nothing");
                    *old = *new;
                }
            }
        }
    }
    assert!(rig.read(0, SIZE as usize) == model);
}

#[test]
fn any_workload_on_subclusters_leaves_what_the_peer_reads() {
    let scratch = Scratch::new();
    for (seed, cluster_size, backed) in
        [(1, 16384, false), (2, 65536, true), (3, 16384, true), (4, 1 << 20, true)]
    {
        let base = pattern(99, 900_000);
        let raw = scratch.path();
        std::fs::write(&raw, &base).unwrap();
        let backing = backed.then(|| Volume::new(&base));
        let mut model = if backed { base } else { Vec::new() };
        model.resize(SIZE as usize, 0);
        let options = CreateOptions {
            cluster_size,
            extended_l2: true,
            backing_name: backed.then(|| raw.clone().into()),
            backing_format: backed.then(|| b"raw".to_vec()),
            ..CreateOptions::new(SIZE)
        };
        let volume = Volume::default();
        with_file(&volume, async |file| create(file, &options).await).unwrap();
        let path = scratch.path();
        let mut random = Random(seed);
        for round in 0..4 {
            let mut rig = with_backing(&volume, backing.as_ref());
            workload(&mut rig, &mut random, &mut model, 40, true);
            rig.close();
            volume.save(&path);
            scratch.check_clean(&path);
            assert!(scratch.contents(&path) == model, "seed {seed}, round {round}");
            // And back: the peer writes, and shares the clusters with a snapshot.
            scratch.qemu_io(&path, &format!("write -P 0x55 {} 5000", 70_000 + round * 30_011));
            scratch.qemu_io(&path, &format!("write -z {} 9000", 500_000 + round * 30_011));
            scratch.qemu_img(&["snapshot", "-c", &format!("s{round}"), &path]);
            model = scratch.contents(&path);
            let bytes = scratch.read(&path);
            volume.apply(&Event::Truncate(0));
            volume.apply(&Event::Write(0, bytes));
        }
        for round in 0..4 {
            scratch.qemu_img(&["snapshot", "-d", &format!("s{round}"), &path]);
        }
        scratch.check_clean(&path);
        assert!(scratch.contents(&path) == model, "seed {seed}");
    }
}

#[test]
fn compressed_clusters_with_subclusters_are_written_over() {
    let scratch = Scratch::new();
    let raw = scratch.path();
    let mut model = pattern(9, SIZE as usize);
    std::fs::write(&raw, &model).unwrap();
    let path = scratch.path();
    let options = "extended_l2=on,cluster_size=32k";
    scratch.qemu_img(&["convert", "-c", "-O", "qcow2", "-o", options, &raw, &path]);
    let volume = Volume::from_file(&path);
    let mut rig = Rig::writable(&volume);
    assert!(rig.status(0, SIZE).compressed);
    workload(&mut rig, &mut Random(5), &mut model, 60, true);
    rig.request(Request::write_zeroes(1 << 20, 131_072).may_unmap()).unwrap();
    model[1 << 20..(1 << 20) + 131_072].fill(0);
    // And compressed by us, where nothing has a place any more.
    let bytes = IoBuffer::from_slice(&[7; 65_536]);
    rig.request(Request::write(1 << 20, bytes).compressed()).unwrap();
    model[1 << 20..(1 << 20) + 65_536].fill(7);
    assert!(rig.read(0, SIZE as usize) == model);
    rig.close();
    volume.save(&path);
    scratch.check_clean(&path);
    assert!(scratch.contents(&path) == model);
}

#[test]
fn copy_on_write_ends_at_the_borders_of_subclusters() {
    let scratch = Scratch::new();
    let path = scratch.create("extended_l2=on", "1M");
    let backing = Volume::new(&[0x77; 1 << 20]);
    let volume = Volume::from_file(&path);
    let mut rig = with_backing(&volume, Some(&backing));
    volume.record();
    rig.write(65536 + 2048 + 100, &[1; 100]);
    rig.write(65536 + 4096, &[2; 2048]);
    rig.write(65536 + 2048, &[3; 100]);
    let lengths: Vec<_> = volume
        .journal()
        .iter()
        .filter_map(|event| match event {
            Event::Write(_, bytes) if !bytes.contains(&0) => Some(bytes.len()),
            _ => None,
        })
        .collect();
    assert_eq!(lengths, [2048, 2048, 100], "a subcluster, one without a copy, one in place");
    let status = rig.status(65536, 65536);
    assert_eq!((status.length, status.allocated), (2048, false));
    let status = rig.status(65536 + 2048, 65536);
    assert_eq!((status.length, status.data), (4096, true));
    rig.close();
}

#[test]
fn damaged_subclusters_fail_their_requests_and_mark_the_image() {
    let scratch = Scratch::new();
    let path = scratch.create("extended_l2=on", "64M");
    scratch.qemu_io(&path, "write -P 0x11 0 64k");
    scratch.qemu_io(&path, "write -P 0x22 128k 64k");
    let good = scratch.read(&path);
    let rows = [
        ("T16", None, 0x0000_0001_ffff_ffff_u64),
        ("T16b", Some(0_u64), 1),
        ("zero bit", Some(0x8000_0000_0005_0001), u64::MAX >> 32),
        ("compressed", Some(1 << 62 | 0x50000), 1),
    ];
    for (row, first, second) in rows {
        let mut bytes = good.clone();
        if let Some(first) = first {
            bytes[0x40000..0x40008].copy_from_slice(&first.to_be_bytes());
        }
        bytes[0x40008..0x40010].copy_from_slice(&second.to_be_bytes());
        let volume = Volume::new(&bytes);
        let setup = Setup { read_only: true, ..Setup::default() };
        let mut rig = Rig::open(&volume, setup).unwrap();
        assert_eq!(rig.try_read(0, 512).unwrap_err().kind(), ErrorKind::Corrupt, "{row}");
        assert_eq!(rig.read(131_072, 512), [0x22; 512], "{row}");
        rig.close();
        assert!(volume.bytes() == bytes, "{row}: read-only writes nothing");
        for request in [Request::discard(0, 65536), Request::write_zeroes(0, 4096)] {
            let volume = Volume::new(&bytes);
            let mut rig = Rig::writable(&volume);
            assert!(rig.request(request).is_err(), "{row}");
            assert_eq!(volume.bytes()[79], 16 | 2, "{row}: the corrupt bit");
            rig.close();
        }
    }
}

/// Q19: bits of neighbours do not get lost when loops change subclusters of one cluster.
#[test]
fn neighbours_in_one_cluster_do_not_lose_each_others_bits() {
    let scratch = Scratch::new();
    let path = scratch.create("extended_l2=on", "1M");
    let backing = Volume::new(&[0x77; 1 << 20]);
    let volume = Volume::from_file(&path);
    let rig = with_backing(&volume, Some(&backing));
    let (threads, rounds) = (3_u64, 120_u64);
    let own = |thread: u64| (0..32_u64).filter(move |index| index % threads == thread);
    let last = |subcluster: u64| (subcluster * 7 + rounds) % 3;
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (graph, origin) = (rig.graph.clone(), rig.origin.clone());
            scope.spawn(move || {
                let mut event_loop = new_loop();
                let queue = Queue::open(&graph, &origin, &event_loop.local(), "neighbour");
                event_loop.block_on(async {
                    for round in 1..=rounds {
                        for index in own(thread) {
                            let at = index * 2048;
                            let request = match (index * 7 + round) % 3 {
                                0 => Request::write(at, IoBuffer::from_slice(&[round as u8; 2048])),
                                1 => Request::write_zeroes(at, 2048),
                                _ => Request::write_zeroes(at, 2048).may_unmap(),
                            };
                            queue.request(request).await.result.unwrap();
                        }
                        for index in own(thread) {
                            let memory = IoVector::zeroed(2048);
                            let read = Request::read(index * 2048, memory.clone());
                            queue.request(read).await.result.unwrap();
                            let byte = if (index * 7 + round) % 3 == 0 { round as u8 } else { 0 };
                            assert!(memory.to_vec() == [byte; 2048], "subcluster {index}");
                        }
                    }
                });
            });
        }
    });
    rig.close();
    volume.save(&path);
    scratch.check_clean(&path);
    let contents = scratch.contents(&path);
    for index in 0..32 {
        let byte = if last(index) == 0 { rounds as u8 } else { 0 };
        assert_eq!(contents[index as usize * 2048], byte, "subcluster {index}");
    }
}

#[test]
fn extended_options_that_cannot_be_are_refused() {
    let extended = CreateOptions { extended_l2: true, ..CreateOptions::new(1 << 20) };
    for options in [
        CreateOptions { version: Version::V2, ..extended.clone() },
        CreateOptions { cluster_size: 8192, ..extended },
    ] {
        let volume = Volume::new(&[7; 10]);
        let error = with_file(&volume, async |file| create(file, &options).await).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.to_string().contains("extended_l2"), "{error}");
        assert_eq!(volume.bytes(), [7; 10]);
    }
}

/// Preallocated subclusters show the backing file until they are written.
#[test]
fn preallocation_with_subclusters_hides_nothing() {
    let scratch = Scratch::new();
    let base = pattern(3, 400_000);
    let raw = scratch.path();
    std::fs::write(&raw, &base).unwrap();
    let options = CreateOptions {
        extended_l2: true,
        preallocation: Preallocation::Metadata,
        backing_name: Some(raw.into()),
        backing_format: Some(b"raw".to_vec()),
        ..CreateOptions::new(SIZE)
    };
    let volume = Volume::default();
    with_file(&volume, async |file| create(file, &options).await).unwrap();
    let path = scratch.path();
    volume.save(&path);
    scratch.check_clean(&path);
    let mut model = base.clone();
    model.resize(SIZE as usize, 0);
    assert!(scratch.contents(&path) == model);
    let mut rig = with_backing(&volume, Some(&Volume::new(&base)));
    workload(&mut rig, &mut Random(8), &mut model, 40, true);
    rig.request(Request::truncate(SIZE / 2)).unwrap();
    rig.request(Request::truncate(SIZE)).unwrap();
    model[SIZE as usize / 2..].fill(0);
    assert!(rig.read(0, SIZE as usize) == model);
    rig.close();
    volume.save(&path);
    scratch.check_clean(&path);
    assert!(scratch.contents(&path) == model);
}

/// U2: while a write fills new subclusters of a cluster, those beside them are written in place, a
/// part of the same sector's neighbour included.
#[test]
fn a_write_into_new_subclusters_leaves_those_beside_them_to_others() {
    let scratch = Scratch::new();
    // Subclusters of 2 KiB.
    let volume = Volume::from_file(&scratch.create("extended_l2=on,cluster_size=64k", "1M"));
    let mut rig = Rig::writable(&volume);
    rig.write(0, &[1; 2048]);
    rig.write(4096, &[1; 2048]);
    rig.flush();
    let held = hold(&volume, |event| matches!(event, Event::Write(_, bytes) if bytes.contains(&9)));
    rig.run(async |queue| {
        // From the middle of the first over the second, which is new, to the middle of the third; as
        // one piece, since it is to be durable.
        let stuck = queue.request(write(1024, 4096, 9).fua());
        settle().await;
        queue.request(write(0, 1024, 5)).await.result.unwrap();
        queue.request(write(5120, 1024, 6)).await.result.unwrap();
        held.store(false, Ordering::Relaxed);
        stuck.await.result.unwrap();
    });
    let expected = [[5; 1024].as_slice(), &[9; 4096], &[6; 1024], &[0; 2048]].concat();
    assert_eq!(rig.read(0, 8192), expected);
    rig.close();
    let path = scratch.path();
    volume.save(&path);
    scratch.check_clean(&path);
}
