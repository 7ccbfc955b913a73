//! Who waits for whom: what is stuck in the file holds up those who need the same thing, and nobody
//! else.

use super::concurrency::{hammer, hold, sector, settle, soon, write};
use super::crash::Random;
use crate::qcow2::Qcow2Options;
use crate::qcow2::testing::Scratch;
use crate::qcow2::testing::rig::{Rig, Setup, new_loop};
use crate::qcow2::testing::volume::{Event, Volume};
use blockplex_graph::{DebugEvent, Queue, Request};
use blockplex_io::buffer::IoVector;
use std::sync::atomic::Ordering;

/// What an L1 entry of an image with clusters of 512 bytes maps.
const PER_TABLE: u64 = 32 << 10;

fn number(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap())
}

/// Where L2 table `index` is in the file.
fn table(volume: &Volume, index: u64) -> u64 {
    let bytes = volume.bytes();
    number(&bytes, number(&bytes, 40) + index * 8) & 0x00ff_ffff_ffff_fe00
}

/// An image of 256 L2 tables with a cluster of data each.
fn many_tables(scratch: &Scratch) -> Volume {
    let volume = Volume::from_file(&scratch.create("cluster_size=512", "8M"));
    let mut rig = Rig::writable(&volume);
    for index in 0..256 {
        rig.write(index * PER_TABLE, &[index as u8 | 1; 512]);
    }
    rig.close();
    volume
}

fn judge(scratch: &Scratch, volume: &Volume) {
    let path = scratch.path();
    volume.save(&path);
    scratch.check_clean(&path);
}

/// A cache miss stalls only those who need that table.
#[test]
fn a_stuck_load_of_a_table_stalls_only_those_who_need_it() {
    let scratch = Scratch::new();
    let volume = many_tables(&scratch);
    let mut rig = Rig::writable(&volume);
    let first = table(&volume, 0);
    let held = hold(&volume, move |event| matches!(event, Event::Read(at, _) if *at == first));
    rig.run(async |queue| {
        let stuck = queue.request(Request::read(0, IoVector::zeroed(512)));
        let with_it = queue.request(write(512, 512, 9));
        settle().await;
        for index in 1..256 {
            let memory = IoVector::zeroed(512);
            let at = index * PER_TABLE;
            let read = queue.request(Request::read(at, memory.clone()));
            soon("a read of another table", read).await.result.unwrap();
            assert_eq!(memory.to_vec(), [index as u8 | 1; 512]);
            let write = queue.request(write(at + 512, 512, 9));
            soon("a write by another table", write).await.result.unwrap();
        }
        assert_eq!(queue.in_flight(), 2, "those who need the first table");
        held.store(false, Ordering::Relaxed);
        stuck.await.result.unwrap();
        with_it.await.result.unwrap();
    });
    rig.close();
    judge(&scratch, &volume);
}

/// A new L2 table stalls only those who write to what it maps.
#[test]
fn a_stuck_new_table_stalls_only_those_who_need_it() {
    let scratch = Scratch::new();
    let volume = Volume::from_file(&scratch.create("cluster_size=512", "8M"));
    let mut rig = Rig::open(&volume, Setup { breakpoints: true, ..Setup::default() }).unwrap();
    let listener = rig.listener();
    listener.break_at(DebugEvent::L2AllocWrite, "table");
    rig.run(async |queue| {
        let stuck = queue.request(write(0, 512, 1));
        listener.wait_suspended(Some("table")).await;
        let with_it = queue.request(write(512, 512, 1));
        for index in 1..256 {
            let write = queue.request(write(index * PER_TABLE, 512, 2));
            soon("a write by another table", write).await.result.unwrap();
        }
        soon("a flush", queue.request(Request::flush())).await.result.unwrap();
        assert_eq!(queue.in_flight(), 2, "those who need the first table");
        listener.resume("table").unwrap();
        stuck.await.result.unwrap();
        with_it.await.result.unwrap();
    });
    assert_eq!(rig.read(0, 1024), [1; 1024]);
    rig.close();
    judge(&scratch, &volume);
}

/// So it is with refcount blocks: freeing what one counts does not wait for the load of another.
#[test]
fn a_stuck_load_of_a_refcount_block_stalls_only_those_who_need_it() {
    let scratch = Scratch::new();
    // A block counts 64 clusters.
    let volume = Volume::from_file(&scratch.create("cluster_size=512,refcount_bits=64", "1M"));
    let mut rig = Rig::writable(&volume);
    rig.write(0, &vec![1; 1 << 20]);
    rig.flush();
    let place = |rig: &mut Rig, at| rig.status(at, 512).offset.unwrap();
    let (one, other) = (place(&mut rig, 300 << 10), place(&mut rig, 600 << 10));
    rig.close();
    let mut rig = Rig::writable(&volume);
    let block = {
        let bytes = volume.bytes();
        number(&bytes, number(&bytes, 48) + (one >> 15) * 8)
    };
    assert_ne!(one >> 15, other >> 15, "counted in different blocks");
    let held = hold(&volume, move |event| matches!(event, Event::Read(at, _) if *at == block));
    rig.run(async |queue| {
        queue.request(Request::discard(300 << 10, 512)).await.result.unwrap();
        let stuck = queue.request(Request::flush());
        settle().await;
        queue.request(Request::discard(600 << 10, 512)).await.result.unwrap();
        soon("a flush", queue.request(Request::flush())).await.result.unwrap();
        assert_eq!(queue.in_flight(), 1, "the flush that frees the first cluster");
        held.store(false, Ordering::Relaxed);
        stuck.await.result.unwrap();
    });
    rig.close();
    judge(&scratch, &volume);
}

/// Reads that hit the cache take no lock that another request can hold across I/O: whatever is
/// stuck, they go on.
#[test]
fn a_read_that_hits_the_cache_waits_for_nothing_that_another_request_holds() {
    let scratch = Scratch::new();
    type Stops = fn(&Event) -> bool;
    type Case = (&'static str, fn() -> Request, Stops);
    let is_flush: Stops = |event| *event == Event::Flush;
    let is_nine: Stops = |event| matches!(event, Event::Write(_, bytes) if bytes[0] == 9);
    let is_header: Stops = |event| matches!(event, Event::Write(24 | 72, _));
    let is_write: Stops = |event| matches!(event, Event::Write(..));
    let is_read: Stops = |event| matches!(event, Event::Read(_, length) if *length >= 4096);
    let is_zero: Stops = |event| matches!(event, Event::Zero(..));
    for options in ["cluster_size=64k", "cluster_size=16k,extended_l2=on"] {
        let cases: [Case; 9] = [
            ("a flush", Request::flush, is_flush),
            ("tables on their way to the file", Request::flush, is_write),
            ("a new cluster", || write(1 << 20, 512, 9), is_nine),
            ("a write in place", || write(8192, 512, 9), is_nine),
            ("a compressed cluster", || write(1 << 20, 65536, 9).compressed(), is_write),
            ("the load of a table", || write(900 << 20, 512, 9), is_read),
            ("a hole", || Request::discard(128 << 10, 65536), is_zero),
            ("a larger disk", || Request::truncate(4 << 30), is_header),
            ("a smaller disk", || Request::truncate(512 << 20), is_header),
        ];
        for (what, request, stops) in cases {
            let volume = Volume::from_file(&scratch.create(options, "1G"));
            let mut rig = Rig::writable(&volume);
            rig.write(0, &vec![1; 512 << 10]);
            rig.write(900 << 20, &[2; 512]);
            rig.close();
            let rules = Qcow2Options { discard_no_unref: Some(true), ..Qcow2Options::default() };
            let mut rig = Rig::open(&volume, Setup { options: rules, ..Setup::default() }).unwrap();
            // The table is in the cache, and something is dirty in it.
            rig.write(256 << 10, &[3; 512]);
            rig.request(Request::write_zeroes(384 << 10, 65536)).unwrap();
            let held = hold(&volume, stops);
            rig.run(async |queue| {
                let stuck = queue.request(request());
                settle().await;
                assert_eq!(queue.in_flight(), 1, "{options}: {what} is stuck");
                for at in [0, 4096, 60 << 10, 200 << 10] {
                    let memory = IoVector::zeroed(2048);
                    let read = queue.request(Request::read(at, memory.clone()));
                    soon(what, read).await.result.unwrap();
                    assert_eq!(memory.to_vec(), [1; 2048], "{options}: {what}");
                }
                assert_eq!(queue.in_flight(), 1, "{options}: {what} is stuck");
                held.store(false, Ordering::Relaxed);
                stuck.await.result.unwrap();
            });
            rig.close();
            judge(&scratch, &volume);
        }
    }
}

/// C1: more writers at once than the cache has tables for; none of them fails.
#[test]
fn more_writers_than_cached_tables_all_get_through() {
    let scratch = Scratch::new();
    let volume = many_tables(&scratch);
    let options = Qcow2Options {
        l2_cache_size: Some(1024),
        refcount_cache_size: Some(2048),
        ..Qcow2Options::default()
    };
    let mut rig = Rig::open(&volume, Setup { options, ..Setup::default() }).unwrap();
    let held = hold(&volume, |event| matches!(event, Event::Write(_, bytes) if bytes[0] == 9));
    rig.run(async |queue| {
        let writes: Vec<_> =
            (0..256).map(|index| queue.request(write(index * PER_TABLE + 1024, 512, 9))).collect();
        for _ in 0..50 {
            settle().await;
        }
        assert_eq!(queue.in_flight(), 256, "all of them write at once");
        held.store(false, Ordering::Relaxed);
        for write in writes {
            write.await.result.unwrap();
        }
    });
    let slices = |rig: &mut Rig| rig.manage(async |driver, _| driver.slices.len());
    rig.flush();
    assert_eq!(slices(&mut rig), 2, "the budget");
    for index in 0..256 {
        assert_eq!(rig.read(index * PER_TABLE + 1024, 512), [9; 512]);
    }
    rig.close();
    judge(&scratch, &volume);
}

/// Q12: the caches are cleaned whenever anybody is at the file, that is at every point at which a
/// request lets others go on.
#[test]
fn cleaning_at_every_operation_of_the_file_loses_nothing() {
    let scratch = Scratch::new();
    for (seed, options) in [(1, "cluster_size=512"), (2, "extended_l2=on,cluster_size=16k")] {
        let path = scratch.create(options, "4M");
        let volume = Volume::from_file(&path);
        let options = Qcow2Options { l2_cache_size: Some(4096), ..Qcow2Options::default() };
        let mut rig = Rig::open(&volume, Setup { options, ..Setup::default() }).unwrap();
        let cleaning = rig.manage(async |driver, _| driver.cleaning.clone());
        volume.set_gate(move |_| {
            // Twice: the first pass only takes the marks of use away.
            cleaning.pass();
            cleaning.pass();
            Ok(false)
        });
        let models = std::thread::scope(|scope| {
            let threads = (0..2).map(|thread| {
                let (graph, origin) = (rig.graph.clone(), rig.origin.clone());
                scope.spawn(move || {
                    let mut event_loop = new_loop();
                    let queue = Queue::open(&graph, &origin, &event_loop.local(), "hammer");
                    let mut random = Random(seed * 1000 + thread + 1);
                    event_loop.block_on(hammer(&queue, thread, 2, &mut random))
                })
            });
            let threads: Vec<_> = threads.collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        rig.close();
        judge(&scratch, &volume);
        volume.save(&path);
        let contents = scratch.contents(&path);
        for (number, version) in models.into_iter().flatten() {
            let at = (number * super::concurrency::SECTOR) as usize;
            assert!(contents[at..at + 512] == sector(number, version), "{number}");
        }
    }
}
