//! Smaller and larger disks, mapped ahead or not, and images that are made empty.

use super::concurrency::{SECTOR, hammer, hold, sector, settle, write};
use super::crash::{Random, crashed};
use crate::qcow2::testing::Scratch;
use crate::qcow2::testing::rig::{Rig, Setup, new_loop, with_file};
use crate::qcow2::testing::volume::{Event, Volume};
use crate::qcow2::{CreateOptions, NewSnapshot, Qcow2, SnapshotSelector, create};
use blockplex_graph::{ErrorKind, NodeIo, Preallocation, Queue, Request, Result};
use blockplex_io::buffer::{IoBuffer, IoVector};
use std::sync::atomic::Ordering;

const OPTIONS: [&str; 7] = [
    "",
    "cluster_size=512",
    "cluster_size=4k,refcount_bits=64",
    "compat=0.10",
    "cluster_size=2M",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=4k,lazy_refcounts=on",
];

fn resize(rig: &mut Rig, length: u64) -> Result<()> {
    rig.request(Request::truncate(length)).map(drop)
}

fn preallocate(rig: &mut Rig, length: u64, mode: Preallocation) -> Result<()> {
    rig.request(Request::truncate(length).preallocated(mode)).map(drop)
}

fn make_empty(rig: &mut Rig) -> Result<()> {
    rig.manage(async |driver: &Qcow2, io: &NodeIo| driver.make_empty(io).await)
}

fn saved(scratch: &Scratch, volume: &Volume) -> String {
    let path = scratch.path();
    volume.save(&path);
    path
}

#[test]
fn a_disk_that_shrinks_gives_its_space_back_and_forgets_what_was_there() {
    let scratch = Scratch::new();
    for options in OPTIONS {
        let volume = Volume::from_file(&scratch.create(options, "20M"));
        let empty = volume.length();
        let mut rig = Rig::writable(&volume);
        rig.write(0, &vec![1; 6 << 20]);
        rig.write(9 << 20, &vec![2; 11 << 20]);
        rig.flush();
        resize(&mut rig, (5 << 20) + 512).unwrap();
        let error = rig.try_read(5 << 20, 1024).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange);
        let small = volume.length();
        // With small clusters a table that grew lies far behind.
        let is_small = small < empty + (12 << 20) || options.contains("512");
        assert!(is_small, "{options}: {small} bytes, {empty} at first");
        scratch.check_allowing_leaks(&saved(&scratch, &volume));
        resize(&mut rig, 20 << 20).unwrap();
        let contents = rig.read(0, 20 << 20);
        let ones = (5 << 20) + 512;
        assert!(contents[..ones].iter().all(|byte| *byte == 1), "{options}");
        assert!(contents[ones..].iter().all(|byte| *byte == 0), "{options}");
        rig.write(8 << 20, &vec![3; 3 << 20]);
        resize(&mut rig, 1 << 20).unwrap();
        rig.close();
        let path = saved(&scratch, &volume);
        scratch.check_clean(&path);
        assert!(scratch.contents(&path) == vec![1; 1 << 20], "{options}");
    }
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    let scratch = Scratch::new();
    let path = scratch.create("compat=0.10", "1M");
    let volume = Volume::from_file(&path);
    let mut rig = Rig::writable(&volume);
    let kind = |result: Result<()>| result.unwrap_err().kind();
    assert_eq!(kind(resize(&mut rig, 1000)), ErrorKind::InvalidArgument);
    let smaller = preallocate(&mut rig, 65536, Preallocation::Full);
    assert_eq!(kind(smaller), ErrorKind::InvalidArgument);
    rig.close();
    scratch.qemu_img(&["snapshot", "-c", "one", &path]);
    let mut rig = Rig::writable(&Volume::from_file(&path));
    assert_eq!(kind(resize(&mut rig, 2 << 20)), ErrorKind::NotSupported);
    assert_eq!(kind(resize(&mut rig, 65536)), ErrorKind::NotSupported);
    rig.close();
}

#[test]
fn a_snapshot_survives_that_the_disk_shrinks() {
    let scratch = Scratch::new();
    for options in ["", "cluster_size=512"] {
        let path = scratch.create(options, "4M");
        scratch.qemu_io(&path, "write -P 1 0 4M");
        scratch.qemu_img(&["snapshot", "-c", "one", &path]);
        let volume = Volume::from_file(&path);
        let mut rig = Rig::writable(&volume);
        rig.write(3 << 20, &[2; 65536]);
        resize(&mut rig, 1 << 20).unwrap();
        rig.close();
        let path = saved(&scratch, &volume);
        scratch.check_clean(&path);
        assert!(scratch.contents(&path) == vec![1; 1 << 20]);
        scratch.qemu_img(&["snapshot", "-a", "one", &path]);
        assert!(scratch.contents(&path) == vec![1; 4 << 20]);
        scratch.check_clean(&path);
    }
}

/// Q20: a write that waits for its turn when the disk shrinks.
#[test]
fn a_write_that_was_admitted_before_leaves_nothing_past_the_new_end() {
    let scratch = Scratch::new();
    let volume = Volume::from_file(&scratch.create("", "4M"));
    let mut rig = Rig::writable(&volume);
    rig.write(0, &[1; 65536]);
    rig.run(async |queue| {
        let shrink = queue.request(Request::truncate(1 << 20));
        let write = |at| queue.request(Request::write(at, IoBuffer::from_slice(&[7; 65536])));
        let writes: Vec<_> = (0..40_u64).map(|i| write(i * 100_000)).collect();
        let zero = queue.request(Request::write_zeroes(2 << 20, 65536));
        let part = queue.request(Request::write_zeroes((3 << 20) + 512, 1024));
        shrink.await.result.unwrap();
        for write in writes {
            let _ = write.await.result;
        }
        let _ = zero.await.result;
        let error = part.await.result.expect_err("a part of a cluster that is gone (H1)");
        assert_eq!(error.kind(), ErrorKind::OutOfRange);
    });
    rig.close();
    let path = saved(&scratch, &volume);
    scratch.check_clean(&path);
    let entry = u64::from_be_bytes(volume.bytes()[24..32].try_into().unwrap());
    assert_eq!(entry, 1 << 20);
    scratch.qemu_img(&["resize", "-q", "-f", "qcow2", &path, "4M"]);
    assert!(scratch.contents(&path)[1 << 20..].iter().all(|byte| *byte == 0));
}

/// P6, H2: whatever fails, the disk is the old one or the new one, and whole.
#[test]
fn a_failed_change_of_the_size_leaves_a_whole_image() {
    let scratch = Scratch::new();
    for options in ["cluster_size=512", ""] {
        let first = Volume::from_file(&scratch.create(options, "1M"));
        let mut rig = Rig::writable(&first);
        rig.write(0, &vec![1; 1 << 20]);
        rig.close();
        for victim in 0..60 {
            let volume = Volume::new(&first.bytes());
            let mut rig = Rig::writable(&volume);
            let mut count = 0;
            volume.set_gate(move |event| {
                let is_change = !matches!(event, Event::Read(..));
                count += u32::from(is_change);
                if is_change && count == victim + 1 { Err(libc::EIO) } else { Ok(false) }
            });
            let shrunk = resize(&mut rig, 300 << 10);
            let grown = preallocate(&mut rig, 2 << 20, Preallocation::Metadata);
            let all_well = shrunk.is_ok() && grown.is_ok() && rig.request(Request::flush()).is_ok();
            volume.remove_gate();
            let path = saved(&scratch, &volume);
            scratch.check_allowing_leaks(&path);
            assert_eq!(rig.read(0, 1000), [1; 1000]);
            resize(&mut rig, 300 << 10).unwrap();
            resize(&mut rig, 2 << 20).unwrap();
            rig.close();
            let path = saved(&scratch, &volume);
            scratch.check_allowing_leaks(&path);
            let contents = scratch.contents(&path);
            assert!(contents[..300 << 10].iter().all(|byte| *byte == 1), "{victim}");
            assert!(contents[300 << 10..].iter().all(|byte| *byte == 0), "{victim}");
            if all_well {
                break;
            }
        }
    }
}

#[test]
fn a_disk_that_is_mapped_ahead_is_the_peers_and_ours() {
    let scratch = Scratch::new();
    let modes = [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];
    for (version, cluster_size) in [("1.1", 65536), ("1.1", 512), ("0.10", 4096)] {
        for mode in modes {
            let mut options = CreateOptions::new(3 << 20);
            options.cluster_size = cluster_size;
            if version == "0.10" {
                options.version = crate::qcow2::entry::Version::V2;
            }
            options.preallocation = mode;
            let volume = Volume::default();
            with_file(&volume, async |file| create(file, &options).await).unwrap();
            let path = saved(&scratch, &volume);
            scratch.check_clean(&path);
            let theirs = scratch.path();
            let how = format!(
                "preallocation={},cluster_size={cluster_size},compat={version}",
                mode.name()
            );
            scratch.qemu_img(&["create", "-q", "-f", "qcow2", "-o", &how, &theirs, "3M"]);
            let (ours, peers) = (volume.length(), scratch.read(&theirs).len() as u64);
            assert!(ours <= peers + peers / 50 + (2 << 16), "{how}: {ours}, the peer {peers}");
            // Nothing is allocated any more.
            let mut rig = Rig::writable(&volume);
            rig.write(0, &vec![5; 3 << 20]);
            assert_eq!(volume.length(), ours, "{how}");
            preallocate(&mut rig, (4 << 20) + 512, mode).unwrap();
            let status = rig.status(3 << 20, 1 << 20);
            assert!(status.data && status.allocated, "{how}: {status:?}");
            assert!(rig.read(3 << 20, 1 << 20).iter().all(|byte| *byte == 0));
            rig.close();
            let path = saved(&scratch, &volume);
            scratch.check_clean(&path);
            assert!(scratch.contents(&path)[..3 << 20].iter().all(|byte| *byte == 5));
        }
    }
    // The refcount table grows and moves, and its old places are free when the image is closed.
    let mut options = CreateOptions::new(10 << 20);
    (options.cluster_size, options.refcount_bits) = (512, 64);
    options.preallocation = Preallocation::Metadata;
    let volume = Volume::default();
    with_file(&volume, async |file| create(file, &options).await).unwrap();
    scratch.check_clean(&saved(&scratch, &volume));
    // With subclusters, what is mapped ahead goes on showing the backing file.
    let mut options = CreateOptions::new(1 << 20);
    (options.extended_l2, options.preallocation) = (true, Preallocation::Metadata);
    let below = scratch.path();
    std::fs::write(&below, [9; 1 << 20]).unwrap();
    (options.backing_name, options.backing_format) = (Some(below.into()), Some(b"raw".into()));
    let volume = Volume::default();
    with_file(&volume, async |file| create(file, &options).await).unwrap();
    scratch.check_clean(&saved(&scratch, &volume));
    let length = volume.length();
    let backing = Some(Volume::new(&[9; 1 << 20]));
    let mut rig = Rig::open(&volume, Setup { backing, ..Setup::default() }).unwrap();
    assert!(rig.read(0, 1 << 20).iter().all(|byte| *byte == 9));
    rig.write(5000, &[1; 100_000]);
    assert_eq!((rig.read(4998, 4), rig.read(104_998, 4)), (vec![9, 9, 1, 1], vec![1, 1, 9, 9]));
    rig.close();
    assert_eq!(volume.length(), length);
    let path = saved(&scratch, &volume);
    scratch.check_clean(&path);
    assert!(scratch.contents(&path)[104_998..105_002] == [1, 1, 9, 9]);
    let mut options = CreateOptions::new(1 << 20);
    options.preallocation = Preallocation::Metadata;
    (options.backing_name, options.backing_format) = (Some(b"b".into()), Some(b"raw".into()));
    let refused = with_file(&Volume::default(), async |file| create(file, &options).await);
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::InvalidArgument);
}

#[test]
fn a_disk_mapped_ahead_over_a_longer_backing_node_shows_zeros() {
    let scratch = Scratch::new();
    let volume = Volume::from_file(&scratch.create("", "100k"));
    let backing = Some(Volume::new(&[9; 1 << 20]));
    let mut rig = Rig::open(&volume, Setup { backing, ..Setup::default() }).unwrap();
    preallocate(&mut rig, 1 << 20, Preallocation::Metadata).unwrap();
    let contents = rig.read(0, 1 << 20);
    assert!(contents[..102_400].iter().all(|byte| *byte == 9));
    assert!(contents[102_400..].iter().all(|byte| *byte == 0));
    rig.close();
    scratch.check_clean(&saved(&scratch, &volume));
}

#[test]
fn an_image_that_is_made_empty_holds_nothing_and_is_small() {
    let scratch = Scratch::new();
    for options in OPTIONS {
        for snapshot in [false, true] {
            let path = scratch.create(options, "12M");
            let empty = Volume::from_file(&path).length();
            scratch.qemu_io(&path, "write -P 1 0 10M");
            if snapshot {
                scratch.qemu_img(&["snapshot", "-c", "one", &path]);
            }
            let volume = Volume::from_file(&path);
            let mut rig = Rig::writable(&volume);
            rig.write(3 << 20, &[2; 100_000]);
            make_empty(&mut rig).unwrap();
            assert!(rig.read(0, 12 << 20).iter().all(|byte| *byte == 0), "{options}");
            if !snapshot && !options.contains("512") {
                let small = volume.length();
                assert!(small <= empty + (8 << 20), "{options}: {small}, {empty} at first");
            }
            rig.write(5 << 20, &[3; 100_000]);
            rig.close();
            let path = saved(&scratch, &volume);
            scratch.check_clean(&path);
            assert!(scratch.contents(&path)[5 << 20..][..100_000] == [3; 100_000]);
            if snapshot {
                scratch.qemu_img(&["snapshot", "-a", "one", &path]);
                assert!(scratch.contents(&path)[..10 << 20].iter().all(|byte| *byte == 1));
                scratch.check_clean(&path);
            }
        }
    }
}

#[test]
fn an_image_that_could_not_be_made_empty_is_whole() {
    let scratch = Scratch::new();
    for options in ["cluster_size=512", "cluster_size=4k"] {
        let first = Volume::from_file(&scratch.create(options, "1M"));
        let mut rig = Rig::writable(&first);
        rig.write(0, &vec![1; 1 << 20]);
        rig.close();
        for victim in 0..40 {
            let volume = Volume::new(&first.bytes());
            let mut rig = Rig::writable(&volume);
            let mut count = 0;
            volume.set_gate(move |event| {
                let is_change = !matches!(event, Event::Read(..));
                count += u32::from(is_change);
                if is_change && count == victim + 1 { Err(libc::EIO) } else { Ok(false) }
            });
            let emptied = make_empty(&mut rig);
            volume.remove_gate();
            scratch.check_allowing_leaks(&saved(&scratch, &volume));
            rig.flush();
            rig.write(10_000, &[4; 50_000]);
            rig.close();
            let path = saved(&scratch, &volume);
            scratch.check_allowing_leaks(&path);
            assert!(scratch.contents(&path)[10_000..60_000] == [4; 50_000]);
            if emptied.is_ok() {
                break;
            }
        }
    }
}

/// H2, H3, H4, ME1, Y3: a crash at any moment of a shrink, of growing again, and of making it empty.
#[test]
fn a_crash_while_space_is_given_back_leaves_a_whole_image() {
    let scratch = Scratch::new();
    let path = scratch.path();
    let lazy = "cluster_size=512,lazy_refcounts=on";
    for (options, seed) in [("cluster_size=512", 5), ("cluster_size=4k", 6), ("", 7), (lazy, 8)] {
        let volume = Volume::from_file(&scratch.create(options, "1M"));
        let mut rig = Rig::writable(&volume);
        rig.write(0, &vec![1; 1 << 20]);
        rig.flush();
        let base = volume.bytes();
        volume.record();
        resize(&mut rig, 300 << 10).unwrap();
        preallocate(&mut rig, 1 << 20, Preallocation::Metadata).unwrap();
        rig.write(500 << 10, &[2; 50_000]);
        rig.flush();
        let grown = volume.journal().len();
        make_empty(&mut rig).unwrap();
        rig.write(0, &[3; 50_000]);
        rig.flush();
        rig.close();
        let journal = volume.journal();
        let mut random = Random(seed);
        for _ in 0..45 {
            let cut = random.below(journal.len() as u64 + 1) as usize;
            let crashed = crashed(&base, &journal[..cut], &mut random);
            crashed.save(&path);
            if options == lazy && crashed.bytes()[79] & 1 != 0 {
                scratch.qemu_img(&["check", "-q", "-r", "all", &path]);
            }
            scratch.check_allowing_leaks(&path);
            let contents = scratch.contents(&path);
            let legal: &[u8] = if cut <= grown { &[1] } else { &[0, 1, 3] };
            let first = &contents[..300 << 10];
            assert!(first.iter().all(|byte| legal.contains(byte)), "{options}, cut at {cut}");
            if contents.len() == 300 << 10 {
                // Whoever makes it larger, no cluster is left there.
                scratch.qemu_img(&["resize", "-q", "-f", "qcow2", &path, "1M"]);
                let larger = scratch.contents(&path);
                let rest = &larger[320 << 10..];
                assert!(rest.iter().all(|byte| *byte == 0), "{options}, cut at {cut}");
            }
            let mut rig = Rig::writable(&crashed);
            rig.write(100_000, &[9; 100_000]);
            rig.close();
            crashed.save(&path);
            scratch.check_allowing_leaks(&path);
        }
    }
}

/// H3: blocks at the end that count neither themselves nor anything else, since what was a row of
/// clusters longer than a block counts is gone.
#[test]
fn a_crash_while_refcount_blocks_go_leaves_a_whole_image() {
    let scratch = Scratch::new();
    let path = scratch.path();
    // A block counts 64 clusters; the L1 table has 200.
    let volume = Volume::from_file(&scratch.create("cluster_size=512,refcount_bits=64", "400M"));
    let mut rig = Rig::writable(&volume);
    rig.write(0, &[1; 5000]);
    rig.manage(async |driver: &Qcow2, io: &NodeIo| {
        driver.create_snapshot(io, NewSnapshot::of_disk("row")).await?;
        driver.delete_snapshot(io, &SnapshotSelector::IdOrName(b"row".to_vec())).await
    })
    .unwrap();
    rig.flush();
    rig.flush();
    let base = volume.bytes();
    let number = |at: usize| u64::from_be_bytes(base[at..at + 8].try_into().unwrap());
    let table = number(48) as usize;
    let last = (0..64).rfind(|index| number(table + index * 8) != 0).unwrap();
    let counted_by = number(table + last * 8) / 512 / 64;
    assert_ne!(counted_by, last as u64, "the last block is counted by another one");
    volume.record();
    resize(&mut rig, 399 << 20).unwrap();
    let journal = volume.journal();
    let now = volume.bytes();
    assert_eq!(now[table + last * 8..][..8], [0; 8], "it is gone");
    assert!(now.len() < base.len(), "and so is the end of the file");
    rig.close();
    let mut random = Random(3);
    for cut in 0..=journal.len() {
        let crashed = crashed(&base, &journal[..cut], &mut random);
        crashed.save(&path);
        scratch.check_allowing_leaks(&path);
        let mut rig = Rig::writable(&crashed);
        assert_eq!(rig.read(0, 5000), [1; 5000], "cut at {cut}");
        rig.close();
    }
}

/// One thread's work: what lies past 2 MiB comes and goes.
async fn come_and_go(queue: &Queue, random: &mut Random) {
    const KEPT: u64 = 2 << 20;
    for round in 0..25 {
        let mode = [Preallocation::Off, Preallocation::Metadata][round % 2];
        let size = KEPT + 65536 * (1 + random.below(30));
        let grow = Request::truncate(size).preallocated(mode);
        queue.request(grow).await.result.unwrap();
        let memory = IoVector::zeroed((size - KEPT) as usize);
        queue.request(Request::read(KEPT, memory.clone())).await.result.unwrap();
        assert!(memory.is_zero(0, memory.len()), "round {round}: new space reads as zeros");
        for _ in 0..4 {
            let at = KEPT + random.below((size - KEPT) / 65536) * 65536;
            let write = Request::write(at, IoBuffer::from_slice(&[7; 65536]));
            let write = if random.below(2) == 0 { write.compressed() } else { write };
            // What is allocated cannot be compressed over.
            let _ = queue.request(write).await.result;
        }
        queue.request(Request::truncate(KEPT)).await.result.unwrap();
    }
}

/// Q13, Q14, Q20: the size changes while other loops write.
#[test]
fn a_disk_that_shrinks_and_grows_beside_writers_loses_nothing() {
    let scratch = Scratch::new();
    for (seed, options) in
        [(1, ""), (2, "cluster_size=512"), (3, "cluster_size=16k,extended_l2=on")]
    {
        let path = scratch.create(options, "2M");
        let volume = Volume::from_file(&path);
        let rig = Rig::writable(&volume);
        let models = std::thread::scope(|scope| {
            let threads = (0..3).map(|thread| {
                let (graph, origin) = (rig.graph.clone(), rig.origin.clone());
                scope.spawn(move || {
                    let mut event_loop = new_loop();
                    let queue = Queue::open(&graph, &origin, &event_loop.local(), "hammer");
                    let mut random = Random(seed * 1000 + thread + 1);
                    event_loop.block_on(async {
                        if thread == 2 {
                            come_and_go(&queue, &mut random).await;
                            return Vec::new();
                        }
                        hammer(&queue, thread, 2, &mut random).await
                    })
                })
            });
            let threads: Vec<_> = threads.collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        rig.close();
        volume.save(&path);
        scratch.check_clean(&path);
        let contents = scratch.contents(&path);
        for (number, version) in models.into_iter().flatten() {
            let at = (number * SECTOR) as usize;
            assert!(contents[at..at + 512] == sector(number, version), "{options}: {number}");
        }
    }
}

/// Q21: two writers in the last cluster, which the disk has only a part of, in both orders; the rest
/// of it is zeros when the disk grows.
#[test]
fn writers_at_an_unaligned_end_leave_each_others_bytes_and_zeros_behind_it() {
    let scratch = Scratch::new();
    for options in ["cluster_size=512", "", "extended_l2=on,cluster_size=16k"] {
        for first in [true, false] {
            let volume = Volume::from_file(&scratch.create(options, "66536"));
            let backing = Some(Volume::new(&[0x77; 66_536]));
            let mut rig = Rig::open(&volume, Setup { backing, ..Setup::default() }).unwrap();
            let held = hold(&volume, move |event| match event {
                Event::Write(_, bytes) => bytes.contains(&(if first { 8 } else { 9 })),
                _ => false,
            });
            rig.run(async |queue| {
                let one = queue.request(write(65_536, 700, 8));
                let other = queue.request(write(66_236, 300, 9));
                settle().await;
                held.store(false, Ordering::Relaxed);
                one.await.result.unwrap();
                other.await.result.unwrap();
            });
            let end = [[8; 500].as_slice(), &[8; 200], &[9; 300]].concat();
            assert_eq!(rig.read(65_536, 1000), end, "{options}");
            resize(&mut rig, 128 << 10).unwrap();
            assert_eq!(rig.read(65_536, 1000), end, "{options}");
            assert!(rig.read(66_536, 64_536).iter().all(|byte| *byte == 0), "{options}");
            rig.close();
            scratch.check_clean(&saved(&scratch, &volume));
        }
    }
}

/// What was freed is used again, and zeroed first.
#[test]
fn clusters_that_are_mapped_ahead_show_nothing_of_what_they_held() {
    let scratch = Scratch::new();
    for options in ["", "cluster_size=512"] {
        let volume = Volume::from_file(&scratch.create(options, "2M"));
        let mut rig = Rig::writable(&volume);
        rig.write(0, &vec![7; 2 << 20]);
        rig.request(Request::discard(0, 1 << 20)).unwrap();
        rig.flush();
        rig.flush();
        let before = volume.length();
        preallocate(&mut rig, 3 << 20, Preallocation::Metadata).unwrap();
        assert!(rig.read(2 << 20, 1 << 20).iter().all(|byte| *byte == 0), "{options}");
        assert!(volume.length() <= before + (64 << 10), "{options}: space is used again");
        rig.close();
        let path = saved(&scratch, &volume);
        scratch.check_clean(&path);
        assert!(scratch.contents(&path)[2 << 20..].iter().all(|byte| *byte == 0));
    }
}
