//! Requests that meet: on one cluster, on one refcount, on one flush; from one loop and from
//! several.

use super::crash::Random;
use crate::qcow2::Qcow2Options;
use crate::qcow2::testing::Scratch;
use crate::qcow2::testing::rig::{Rig, Setup, new_loop};
use crate::qcow2::testing::volume::{Event, Volume};
use blockplex_graph::{Queue, Request};
use blockplex_io::buffer::{IoBuffer, IoVector};
use blockplex_io::event_loop::yield_now;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

pub(super) fn write(offset: u64, length: usize, byte: u8) -> Request {
    Request::write(offset, IoBuffer::from_slice(&vec![byte; length]))
}

/// Lets everything that can go on go on.
pub(super) async fn settle() {
    for _ in 0..200 {
        yield_now().await;
    }
}

/// Awaits what must not have to wait for anything that is held: a bounded number of turns of the
/// loop, where a hang would say nothing.
pub(super) async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    const TURNS: u32 = 100_000;
    let mut future = std::pin::pin!(future);
    for _ in 0..TURNS {
        let polled = std::future::poll_fn(|context| Poll::Ready(future.as_mut().poll(context)));
        if let Poll::Ready(output) = polled.await {
            return output;
        }
        yield_now().await;
    }
    panic!("{what} waits")
}

/// Makes operations that `stops` names wait until the result is cleared.
pub(super) fn hold(
    volume: &Volume,
    stops: impl Fn(&Event) -> bool + Send + 'static,
) -> Arc<AtomicBool> {
    let held = Arc::new(AtomicBool::new(true));
    let gate = held.clone();
    volume.set_gate(move |event| Ok(gate.load(Ordering::Relaxed) && stops(event)));
    held
}

/// An open image with cluster 0 written, and where that is in the file.
pub(super) fn one_cluster(scratch: &Scratch) -> (Volume, Rig, u64) {
    let volume = Volume::from_file(&scratch.create("", "1M"));
    let mut rig = Rig::writable(&volume);
    rig.write(0, &[1; 65536]);
    rig.flush();
    let host = rig.status(0, 65536).offset.unwrap();
    (volume, rig, host)
}

/// Q01.
#[test]
fn writes_into_one_new_cluster_all_survive() {
    let scratch = Scratch::new();
    let path = scratch.create("", "1M");
    let backing = Some(Volume::new(&[0x77; 1 << 20]));
    let volume = Volume::from_file(&path);
    let mut rig = Rig::open(&volume, Setup { backing, ..Setup::default() }).unwrap();
    rig.run(async |queue| {
        let writes: Vec<_> =
            (0..40_u64).map(|i| queue.request(write(i * 3000, 1000, i as u8 + 1))).collect();
        for write in writes {
            write.await.result.unwrap();
        }
    });
    for i in 0..40 {
        let mut expected = vec![i as u8 + 1; 1000];
        expected.extend([0x77; 2000]);
        assert_eq!(rig.read(i * 3000, 3000), expected);
    }
    rig.close();
    volume.save(&path);
    scratch.check_clean(&path);
}

/// Q02: a late write into a discarded cluster does not land in another one's data.
#[test]
fn a_cluster_with_a_write_in_flight_is_not_used_again() {
    let scratch = Scratch::new();
    let (volume, mut rig, host) = one_cluster(&scratch);
    let held = hold(
        &volume,
        move |event| matches!(event, Event::Write(at, bytes) if *at == host && bytes[0] == 9),
    );
    rig.run(async |queue| {
        let late = queue.request(write(0, 512, 9));
        settle().await;
        queue.request(Request::discard(0, 65536)).await.result.unwrap();
        for _ in 0..4 {
            queue.request(Request::flush()).await.result.unwrap();
        }
        for cluster in 1..16 {
            queue.request(write(cluster << 16, 65536, 2)).await.result.unwrap();
        }
        held.store(false, Ordering::Relaxed);
        late.await.result.unwrap();
    });
    assert!(rig.read(65536, 15 << 16).iter().all(|byte| *byte == 2));
    assert!(rig.read(0, 65536).iter().all(|byte| *byte == 0));
    volume.remove_gate();
    // Now it is free: the next cluster takes its place.
    rig.flush();
    rig.flush();
    rig.write(0, &[3; 512]);
    assert_eq!(rig.status(0, 512).offset, Some(host));
    rig.close();
}

/// Q03: a read of a discarded cluster never shows what came into its place.
#[test]
fn a_cluster_with_a_read_in_flight_is_not_used_again() {
    let scratch = Scratch::new();
    let (volume, mut rig, host) = one_cluster(&scratch);
    let held = hold(&volume, move |event| matches!(event, Event::Read(at, _) if *at == host));
    rig.run(async |queue| {
        let memory = IoVector::zeroed(512);
        let late = queue.request(Request::read(0, memory.clone()));
        settle().await;
        queue.request(Request::discard(0, 65536)).await.result.unwrap();
        for _ in 0..4 {
            queue.request(Request::flush()).await.result.unwrap();
        }
        for cluster in 1..16 {
            queue.request(write(cluster << 16, 65536, 2)).await.result.unwrap();
        }
        held.store(false, Ordering::Relaxed);
        late.await.result.unwrap();
        assert!(memory.to_vec().iter().all(|byte| matches!(byte, 0 | 1)), "another's data");
    });
    rig.close();
}

/// L2, Q25: nobody holds it up, and still a freed cluster is not used again before the entry that
/// named it is durably gone.
#[test]
fn a_freed_cluster_is_not_used_again_before_a_flush() {
    let scratch = Scratch::new();
    let (volume, mut rig, host) = one_cluster(&scratch);
    rig.request(Request::discard(0, 65536)).unwrap();
    let place = |rig: &mut Rig, cluster: u64| rig.status(cluster << 16, 512).offset.unwrap();
    for cluster in 1..8 {
        rig.write(cluster << 16, &[2; 65536]);
        assert_ne!(place(&mut rig, cluster), host, "cluster {cluster}");
    }
    rig.flush();
    rig.write(8 << 16, &[3; 65536]);
    assert_eq!(place(&mut rig, 8), host, "it is free now");
    rig.close();
    let path = scratch.path();
    volume.save(&path);
    scratch.check_clean(&path);
}

/// Q08: a cluster is not used again before the file has heard that it was not needed.
#[test]
fn a_late_discard_of_the_file_does_not_hit_new_data() {
    let scratch = Scratch::new();
    let (volume, mut rig, host) = one_cluster(&scratch);
    let held = hold(&volume, move |event| matches!(event, Event::Zero(at, _) if *at == host));
    rig.run(async |queue| {
        queue.request(Request::discard(0, 65536)).await.result.unwrap();
        let flush = queue.request(Request::flush());
        settle().await;
        assert_eq!(queue.in_flight(), 1, "the discard of the file is under way");
        for cluster in 1..16 {
            queue.request(write(cluster << 16, 65536, 2)).await.result.unwrap();
        }
        held.store(false, Ordering::Relaxed);
        flush.await.result.unwrap();
    });
    assert!(rig.read(65536, 15 << 16).iter().all(|byte| *byte == 2));
    rig.close();
}

/// Q08, X4: so it is in place: a hole in a cluster that keeps its place comes before what is written
/// there later.
#[test]
fn a_late_hole_does_not_hit_what_is_written_to_the_same_place() {
    let scratch = Scratch::new();
    let (volume, rig, host) = one_cluster(&scratch);
    rig.close();
    let options = Qcow2Options { discard_no_unref: Some(true), ..Qcow2Options::default() };
    let mut rig = Rig::open(&volume, Setup { options, ..Setup::default() }).unwrap();
    let held = hold(&volume, move |event| matches!(event, Event::Zero(at, _) if *at == host));
    rig.run(async |queue| {
        let discard = queue.request(Request::discard(0, 65536));
        settle().await;
        assert_eq!(queue.in_flight(), 1, "the hole is being made");
        let write = queue.request(write(0, 65536, 5));
        settle().await;
        held.store(false, Ordering::Relaxed);
        discard.await.result.unwrap();
        write.await.result.unwrap();
    });
    // In flight at once: either may have been the last.
    let now = rig.read(0, 65536);
    assert!(now == [5; 65536] || now == [0; 65536]);
    rig.write(0, &[6; 4096]);
    assert_eq!(rig.status(0, 4096).offset, Some(host), "it kept its place");
    assert_eq!(rig.read(0, 4096), [6; 4096]);
    rig.close();
    let path = scratch.path();
    volume.save(&path);
    scratch.check_clean(&path);
}

/// Rules for discards change while the image is open.
#[test]
fn rules_for_discards_can_be_changed() {
    let scratch = Scratch::new();
    let (volume, mut rig, host) = one_cluster(&scratch);
    let holes = |rig: &mut Rig, byte: u8| {
        rig.write(0, &[byte; 65536]);
        volume.record();
        rig.request(Request::discard(0, 65536)).unwrap();
        rig.flush();
        volume.journal().iter().filter(|event| matches!(event, Event::Zero(..))).count()
    };
    assert_eq!(holes(&mut rig, 2), 1);
    let silent = Qcow2Options { pass_discard_request: Some(false), ..Qcow2Options::default() };
    rig.reopen(silent.clone()).unwrap();
    assert_eq!(holes(&mut rig, 3), 0);
    rig.reopen(Qcow2Options { discard_no_unref: Some(true), ..silent }).unwrap();
    assert_eq!(holes(&mut rig, 4), 0);
    let kept = rig.status(0, 65536);
    assert!(kept.zero && kept.offset.is_some(), "{kept:?}");
    rig.reopen(Qcow2Options::default()).unwrap();
    assert_eq!(holes(&mut rig, 5), 1);
    assert!(host > 0 && rig.status(0, 65536).offset.is_none());
    rig.close();
}

/// Q16: a flush covers what had completed before it, whatever flush is under way.
#[test]
fn a_flush_behind_a_running_flush_reaches_the_file_after_it() {
    let scratch = Scratch::new();
    let (volume, mut rig, _) = one_cluster(&scratch);
    volume.record();
    let held = hold(&volume, |event| *event == Event::Flush);
    rig.run(async |queue| {
        let first = queue.request(Request::flush());
        settle().await;
        queue.request(write(0, 512, 5)).await.result.unwrap();
        queue.request(write(1 << 16, 512, 6)).await.result.unwrap();
        let second = queue.request(Request::flush());
        let third = queue.request(Request::flush());
        settle().await;
        held.store(false, Ordering::Relaxed);
        first.await.result.unwrap();
        second.await.result.unwrap();
        third.await.result.unwrap();
    });
    let journal = volume.journal();
    let data = journal.iter().rposition(|e| matches!(e, Event::Write(_, b) if b[0] == 6)).unwrap();
    let flushes = journal[data..].iter().filter(|event| **event == Event::Flush).count();
    // The first flush, and for the other two one round: refcounts and data, then the L2 slice.
    assert_eq!(flushes, 3);
    rig.close();
}

/// Writes to different clusters do not wait for each other, not even while one of them allocates.
#[test]
fn a_stuck_allocating_write_holds_up_its_own_cluster_only() {
    let scratch = Scratch::new();
    let (volume, mut rig, _) = one_cluster(&scratch);
    let held = hold(&volume, |event| matches!(event, Event::Write(_, bytes) if bytes[0] == 9));
    rig.run(async |queue| {
        let stuck = queue.request(write(5 << 16, 512, 9));
        settle().await;
        for cluster in [0, 1, 4, 6, 15] {
            queue.request(write(cluster << 16, 700, 2)).await.result.unwrap();
        }
        queue.request(Request::flush()).await.result.unwrap();
        queue.request(Request::discard(1 << 16, 65536)).await.result.unwrap();
        held.store(false, Ordering::Relaxed);
        stuck.await.result.unwrap();
    });
    assert_eq!(rig.read(5 << 16, 512), [9; 512]);
    rig.close();
}

pub(super) const SECTOR: u64 = 512;
/// Sectors of the part of the disk that all threads write to, each its own sectors.
const SHARED: u64 = 2048;
/// Sectors of each thread's own part.
const OWN: u64 = 1024;

pub(super) fn sector(number: u64, version: u64) -> Vec<u8> {
    match version {
        0 => vec![0; SECTOR as usize],
        _ => [number, version].map(u64::to_le_bytes).concat().repeat(32),
    }
}

/// One thread's work: it alone writes the sectors in `mine`, so it knows what they hold.
pub(super) async fn hammer(
    queue: &Queue,
    thread: u64,
    threads: u64,
    random: &mut Random,
) -> Vec<(u64, u64)> {
    let own_start = SHARED + thread * OWN;
    let mut model = std::collections::BTreeMap::new();
    let read = async |number: u64| {
        let memory = IoVector::zeroed(SECTOR as usize);
        queue.request(Request::read(number * SECTOR, memory.clone())).await.result.unwrap();
        memory.to_vec()
    };
    for version in 1..=250 {
        match random.below(12) {
            0..=5 => {
                let shared = random.below(SHARED / threads) * threads + thread;
                let number = match random.below(2) {
                    0 => shared,
                    _ => own_start + random.below(OWN),
                };
                let bytes = IoBuffer::from_slice(&sector(number, version));
                queue.request(Request::write(number * SECTOR, bytes)).await.result.unwrap();
                model.insert(number, version);
            }
            6 | 7 => {
                let start = own_start + random.below(OWN / 128) * 128;
                let request = match random.below(3) {
                    0 => Request::discard(start * SECTOR, 128 * SECTOR),
                    1 => Request::write_zeroes(start * SECTOR, 128 * SECTOR),
                    _ => Request::write_zeroes(start * SECTOR, 128 * SECTOR).may_unmap(),
                };
                queue.request(request).await.result.unwrap();
                model.extend((start..start + 128).map(|number| (number, 0)));
            }
            8 => assert!(queue.request(Request::flush()).await.result.is_ok()),
            _ => {
                let Some((number, version)) = model.iter().nth(random.below(40) as usize) else {
                    continue;
                };
                assert!(read(*number).await == sector(*number, *version), "sector {number}");
            }
        }
    }
    for (number, version) in &model {
        assert!(read(*number).await == sector(*number, *version), "sector {number}");
    }
    model.into_iter().collect()
}

/// Q10, and with small refcount blocks Q15: the refcount table grows under them.
#[test]
fn several_loops_on_one_image_lose_nothing() {
    let scratch = Scratch::new();
    let threads = 3;
    for (seed, options) in
        [(1, ""), (2, "cluster_size=512,refcount_bits=64"), (3, "cluster_size=4k")]
    {
        let path = scratch.create(options, "4M");
        let volume = Volume::from_file(&path);
        let rig = Rig::writable(&volume);
        let models = std::thread::scope(|scope| {
            let threads = (0..threads).map(|thread| {
                let (graph, origin) = (rig.graph.clone(), rig.origin.clone());
                scope.spawn(move || {
                    let mut event_loop = new_loop();
                    let queue = Queue::open(&graph, &origin, &event_loop.local(), "hammer");
                    let mut random = Random(seed * 1000 + thread + 1);
                    event_loop.block_on(hammer(&queue, thread, threads, &mut random))
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

/// Q11: several loops, and a backing node that all of them copy from.
#[test]
fn several_loops_over_a_backing_node_lose_nothing() {
    let scratch = Scratch::new();
    let threads = 3;
    for (seed, options) in [(7, ""), (8, "extended_l2=on,cluster_size=16k")] {
        let path = scratch.create(options, "4M");
        let volume = Volume::from_file(&path);
        let backing = Some(Volume::new(&vec![0x77; 4 << 20]));
        let rig = Rig::open(&volume, Setup { backing, ..Setup::default() }).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let (graph, origin) = (rig.graph.clone(), rig.origin.clone());
                scope.spawn(move || {
                    let mut event_loop = new_loop();
                    let queue = Queue::open(&graph, &origin, &event_loop.local(), "hammer");
                    let mut random = Random(seed * 1000 + thread + 1);
                    event_loop.block_on(hammer(&queue, thread, threads, &mut random));
                });
            }
        });
        rig.close();
        volume.save(&path);
        scratch.check_clean(&path);
    }
}

/// Q26: an image that is written and discarded for long does not grow beyond what it holds.
#[test]
fn writing_and_discarding_for_long_does_not_make_the_file_grow() {
    let scratch = Scratch::new();
    let path = scratch.create("cluster_size=4k", "16M");
    let volume = Volume::from_file(&path);
    let mut rig = Rig::writable(&volume);
    let mut random = Random(26);
    let mut live = std::collections::BTreeSet::new();
    let mut most = 0;
    for step in 0..3000_u64 {
        let cluster = random.below(4096);
        if live.len() < 1000 && random.below(2) == 0 {
            rig.write(cluster * 4096, &[step as u8; 4096]);
            live.insert(cluster);
        } else if let Some(cluster) = live.range(cluster..).next().copied() {
            rig.request(Request::discard(cluster * 4096, 4096)).unwrap();
            live.remove(&cluster);
        }
        most = most.max(live.len() as u64);
        if step % 16 == 0 {
            rig.flush();
        }
    }
    rig.close();
    let tables = 40 * 4096;
    assert!(volume.length() <= most * 4096 * 11 / 10 + tables, "{} {most}", volume.length());
    volume.save(&path);
    scratch.check_clean(&path);
}

/// L3: while a request does not end, freed clusters wait; that costs others nothing but space.
#[test]
fn a_request_that_lasts_does_not_make_others_flush() {
    let scratch = Scratch::new();
    let volume = Volume::from_file(&scratch.create("cluster_size=512", "2M"));
    let mut rig = Rig::writable(&volume);
    rig.write(0, &[1; 512]);
    rig.flush();
    let host = rig.status(0, 512).offset.unwrap();
    let held = hold(&volume, move |event| matches!(event, Event::Read(at, _) if *at == host));
    let before = volume.flushes();
    rig.run(async |queue| {
        let memory = IoVector::zeroed(512);
        let late = queue.request(Request::read(0, memory.clone()));
        settle().await;
        // Every other one of the clusters, here and in the file, so that none of the freed ones are
        // neighbours.
        for round in 0..2 {
            for cluster in 1..2000_u64 {
                let at = cluster * 1024 % (2 << 20);
                queue.request(write(at, 1024, round + 2)).await.result.unwrap();
                queue.request(Request::discard(at, 512)).await.result.unwrap();
            }
        }
        held.store(false, Ordering::Relaxed);
        late.await.result.unwrap();
        assert_eq!(memory.to_vec(), [1; 512]);
    });
    assert!(volume.flushes() - before < 200, "{}", volume.flushes() - before);
    rig.close();
    let path = scratch.path();
    volume.save(&path);
    scratch.check_clean(&path);
}
