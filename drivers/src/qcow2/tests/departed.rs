//! Requests that nobody waits for any more, or that stand in the way of a change of the whole
//! image: futures dropped in flight, snapshots, bitmaps and closes behind late writes.

use super::concurrency::{hold, one_cluster, settle, write};
use crate::qcow2::bitmap::NewBitmap;
use crate::qcow2::snapshot::NewSnapshot;
use crate::qcow2::snapshot::SnapshotSelector;
use crate::qcow2::testing::Scratch;
use crate::qcow2::testing::rig::{Rig, Setup};
use crate::qcow2::testing::volume::{Event, Volume};
use crate::qcow2::{Qcow2Options, tests::crash::Random};
use blockplex_graph::{Access, Request};
use blockplex_io::buffer::IoVector;
use std::sync::atomic::Ordering;

/// Turns of the loop that a late operation waits: enough for all else to get as far as it can.
const LATE: u32 = 100_000;

/// Has operations that `stops` names come late.
fn delay(volume: &Volume, stops: impl Fn(&Event) -> bool + Send + 'static) {
    let mut turns = 0;
    volume.set_gate(move |event| {
        let waits = stops(event) && turns < LATE;
        turns += u32::from(waits);
        Ok(waits)
    });
}

/// Starts a write of a sector of 9, and leaves.
fn leave(rig: &mut Rig, offset: u64) {
    rig.run(async |queue| {
        let late = queue.request(write(offset, 512, 9));
        settle().await;
        drop(late);
        assert_eq!(queue.in_flight(), 1, "it goes on");
    });
}

fn is_late(event: &Event) -> bool {
    matches!(event, Event::Write(_, bytes) if bytes[0] == 9)
}

/// Closes, and has the peer look: nothing is wrong, and nothing leaks.
fn finish(scratch: &Scratch, volume: &Volume, rig: Rig) -> Vec<u8> {
    rig.close();
    let path = scratch.path();
    volume.save(&path);
    scratch.check_clean(&path);
    scratch.contents(&path)
}

/// Q17: the snapshot waits for the write in place that is under way, and later writes are not in
/// it.
#[test]
fn a_snapshot_holds_the_write_that_was_in_flight_and_none_that_came_after() {
    let scratch = Scratch::new();
    let (volume, mut rig, host) = one_cluster(&scratch);
    volume.record();
    delay(&volume, is_late);
    leave(&mut rig, 0);
    let new = NewSnapshot::of_disk("s");
    rig.manage(async |driver, io| driver.create_snapshot(io, new).await).unwrap();
    let journal = volume.journal();
    let place = |event: &Event| matches!(event, Event::Write(at, _) if *at == host);
    assert!(place(journal.iter().find(|event| matches!(event, Event::Write(..))).unwrap()));
    volume.remove_gate();
    rig.write(0, &[3; 512]);
    assert_ne!(rig.status(0, 512).offset, Some(host), "the cluster is the snapshot's now");
    assert_eq!(finish(&scratch, &volume, rig)[..512], [3; 512]);
    let which = SnapshotSelector::IdOrName(b"s".to_vec());
    let options = Qcow2Options { snapshot: Some(which), ..Qcow2Options::default() };
    let setup = Setup { options, read_only: true, ..Setup::default() };
    let mut view = Rig::open(&volume, setup).unwrap();
    assert_eq!(view.read(0, 1024), [[9; 512], [1; 512]].concat());
    view.close();
}

/// Q22: what a late write changes is in the bitmap that the close stores.
#[test]
fn a_bitmap_is_stored_after_the_last_write_has_ended() {
    let scratch = Scratch::new();
    let (volume, mut rig, _) = one_cluster(&scratch);
    let new = NewBitmap::persistent("b");
    rig.manage(async |driver, io| driver.add_bitmap(io, new).await).unwrap();
    delay(&volume, is_late);
    leave(&mut rig, 5 << 16);
    assert_eq!(finish(&scratch, &volume, rig)[5 << 16..][..512], [9; 512]);
    let setup = Setup { read_only: true, ..Setup::default() };
    let mut rig = Rig::open(&volume, setup).unwrap();
    let bits = rig.manage(async |driver, _| driver.bitmap(b"b")).expect("it is consistent");
    assert_eq!(bits.next_dirty_area(0, u64::MAX, u64::MAX), Some((5 << 16, 65536)));
    rig.close();
}

/// C06: an allocating write is left between the write of its data and its entry.
#[test]
fn an_allocating_write_that_nobody_waits_for_leaks_nothing() {
    let scratch = Scratch::new();
    for backing in [None, Some(Volume::new(&[0x77; 1 << 20]))] {
        let (volume, rig, _) = one_cluster(&scratch);
        rig.close();
        let mut rig = Rig::open(&volume, Setup { backing, ..Setup::default() }).unwrap();
        delay(&volume, is_late);
        leave(&mut rig, 5 << 16);
        rig.write((5 << 16) + 512, &[2; 512]);
        assert_eq!(rig.read(5 << 16, 1024), [[9; 512], [2; 512]].concat());
        finish(&scratch, &volume, rig);
    }
}

/// C07: the place of a write that was left is not used again before that has ended.
#[test]
fn a_cluster_with_a_write_that_was_left_is_not_used_again() {
    let scratch = Scratch::new();
    let (volume, mut rig, host) = one_cluster(&scratch);
    let held = hold(&volume, is_late);
    leave(&mut rig, 0);
    rig.run(async |queue| {
        queue.request(Request::discard(0, 65536)).await.result.unwrap();
        for _ in 0..4 {
            queue.request(Request::flush()).await.result.unwrap();
        }
        for cluster in 1..16 {
            queue.request(write(cluster << 16, 65536, 2)).await.result.unwrap();
        }
        held.store(false, Ordering::Relaxed);
    });
    for cluster in 1..16 {
        assert_ne!(rig.status(cluster << 16, 512).offset, Some(host), "cluster {cluster}");
    }
    let contents = finish(&scratch, &volume, rig);
    assert!(contents[..65536].iter().all(|byte| *byte == 0));
    assert!(contents[65536..].iter().all(|byte| *byte == 2));
}

/// C08: flushes are left while the L1 table goes to disk, and then it moves.
#[test]
fn a_flush_that_is_left_while_the_l1_table_moves_loses_no_entry() {
    let scratch = Scratch::new();
    for seed in 1..12 {
        let volume = Volume::from_file(&scratch.create("cluster_size=512", "1M"));
        let mut rig = Rig::writable(&volume);
        let mut random = Random(seed);
        for step in 0..8_u64 {
            let written = step * (100 << 10);
            rig.run(async |queue| {
                queue.request(write(written, 5000, 7)).await.result.unwrap();
                let flush = queue.request(Request::flush());
                for _ in 0..random.below(30) {
                    blockplex_io::event_loop::yield_now().await;
                }
                drop(flush);
                let longer = Request::truncate((1 << 20) + ((step + 1) << 20));
                queue.request(longer).await.result.unwrap();
            });
        }
        let contents = finish(&scratch, &volume, rig);
        for step in 0..8 {
            assert_eq!(contents[step * (100 << 10)..][..5000], [7; 5000], "{seed}: {step}");
        }
    }
}

/// C11: the last write-back is a close's, and what it says is not lost.
#[test]
fn a_close_tells_that_metadata_could_not_be_written() {
    let scratch = Scratch::new();
    let (volume, mut rig, _) = one_cluster(&scratch);
    rig.write(5 << 16, &[2; 512]);
    volume.set_gate(|event| match event {
        Event::Write(..) => Err(libc::EIO),
        _ => Ok(false),
    });
    assert_eq!(rig.try_close().unwrap_err().errno(), libc::EIO);
    volume.remove_gate();
    let path = scratch.path();
    volume.save(&path);
    scratch.check_allowing_leaks(&path);
}

/// Q18: nobody writes to what clusters are copied from.
#[test]
fn a_backing_node_has_no_writer() {
    let scratch = Scratch::new();
    let volume = Volume::from_file(&scratch.create("", "1M"));
    let backing = Some(Volume::new(&[0x77; 1 << 20]));
    let mut rig = Rig::open(&volume, Setup { backing, ..Setup::default() }).unwrap();
    let graph = rig.graph.clone();
    rig.run(async |_| {
        let node = graph.topology().find("backing").unwrap().id();
        let mut change = graph.begin().await;
        let writer = change.add_origin("writer", Access::WRITER, None);
        let refused = match change.set_root(writer.id(), Some(node)) {
            Err(error) => error,
            Ok(()) => {
                let drained = change.drain().await.unwrap();
                change.commit(&drained).await.unwrap_err()
            }
        };
        assert!(refused.to_string().contains("write"), "{refused}");
    });
    rig.close();
}

/// Reads go on beside a flush that the file does not end, those that were in flight when it came
/// and those that come after it.
#[test]
fn a_flush_holds_up_no_read() {
    let scratch = Scratch::new();
    let (volume, mut rig, _) = one_cluster(&scratch);
    rig.write(0, &[4; 1 << 20]);
    let reads = hold(&volume, |event| matches!(event, Event::Read(..)));
    rig.run(async |queue| {
        let start = |number: u64| {
            let memory = IoVector::zeroed(4096);
            (queue.request(Request::read(number * 16384, memory.clone())), memory)
        };
        let early: Vec<_> = (0..64).map(start).collect();
        settle().await;
        // The gate of the reads makes room for one that stops the flush.
        let flushes = hold(&volume, {
            let reads = reads.clone();
            move |event| match event {
                Event::Read(..) => reads.load(Ordering::Relaxed),
                other => *other == Event::Flush,
            }
        });
        let flush = queue.request(Request::flush());
        settle().await;
        assert_eq!(queue.in_flight(), 65, "64 reads, and the flush behind none of them");
        reads.store(false, Ordering::Relaxed);
        for (read, memory) in early.into_iter().chain((0..64).map(start)) {
            read.await.result.unwrap();
            assert_eq!(memory.to_vec(), [4; 4096]);
        }
        assert_eq!(queue.in_flight(), 1, "the flush is held");
        flushes.store(false, Ordering::Relaxed);
        flush.await.result.unwrap();
    });
    rig.close();
}

/// C05, C09: whoever leaves while he waits for a cluster, or holds it, takes no lock to do so and
/// leaves nobody stuck.
#[test]
fn requests_that_are_left_in_a_row_for_one_cluster_hold_up_nobody() {
    let scratch = Scratch::new();
    let (volume, mut rig, _) = one_cluster(&scratch);
    let held = hold(&volume, is_late);
    rig.run(async |queue| {
        let first = queue.request(write(5 << 16, 512, 9));
        settle().await;
        let others: Vec<_> =
            (1..9).map(|number| queue.request(write((5 << 16) + number * 512, 512, 2))).collect();
        let erasure = queue.request(Request::discard(5 << 16, 65536));
        settle().await;
        // All at once, with the storage stuck: to leave is to forget, and takes no turn.
        drop((first, others, erasure));
        assert_eq!(queue.in_flight(), 10, "they go on");
        let last = queue.request(write(5 << 16, 65536, 7));
        queue.request(write(6 << 16, 512, 1)).await.result.unwrap();
        held.store(false, Ordering::Relaxed);
        last.await.result.unwrap();
    });
    assert_eq!(finish(&scratch, &volume, rig)[5 << 16..][..65536], [7; 65536]);
}

/// C12: a panic in one request, while it writes new data. The others go on, and its cluster can be
/// written to again.
#[test]
fn a_panic_in_one_request_holds_up_no_other() {
    let scratch = Scratch::new();
    let (volume, mut rig, _) = one_cluster(&scratch);
    volume.set_gate(|event| if is_late(event) { panic!("injected") } else { Ok(false) });
    rig.run(async |queue| {
        let broken = queue.request(write(5 << 16, 512, 9));
        let behind = queue.request(write((5 << 16) + 512, 512, 2));
        let other = queue.request(write(6 << 16, 512, 3));
        assert!(broken.await.result.is_err());
        behind.await.result.unwrap();
        other.await.result.unwrap();
        queue.request(Request::flush()).await.result.unwrap();
    });
    volume.remove_gate();
    rig.write(5 << 16, &[4; 512]);
    rig.close();
    let path = scratch.path();
    volume.save(&path);
    // Its new cluster is lost to the image, as that of any request that was torn down.
    scratch.check_allowing_leaks(&path);
    let contents = scratch.contents(&path);
    assert_eq!(contents[5 << 16..][..1024], [[4; 512], [2; 512]].concat());
    assert_eq!(contents[6 << 16..][..512], [3; 512]);
}

/// C12: a panic while metadata is written back. What was on its way is not said to be durable, and
/// nothing is written over it.
#[test]
fn a_panic_in_a_write_back_gives_the_image_up() {
    let scratch = Scratch::new();
    let (volume, mut rig, _) = one_cluster(&scratch);
    rig.write(5 << 16, &[2; 512]);
    let mut panics = true;
    volume.set_gate(move |event| {
        if *event == Event::Flush && std::mem::take(&mut panics) {
            panic!("injected");
        }
        Ok(false)
    });
    assert!(rig.request(Request::flush()).is_err());
    assert!(rig.request(Request::flush()).is_err(), "nor is it later");
    assert!(rig.try_write(0, &[3; 512]).is_err());
    assert_eq!(rig.read(5 << 16, 512), [2; 512]);
    assert!(rig.try_close().is_err());
    let path = scratch.path();
    volume.save(&path);
    scratch.check_allowing_leaks(&path);
    assert_eq!(scratch.contents(&path)[..65536], [1; 65536]);
}

/// C13: the guest changes its memory while it is written compressed, or encrypted below. What is
/// stored was the same for whoever looked at it: a stream that can be read, of one moment.
#[test]
fn memory_that_changes_while_it_is_compressed_makes_a_whole_stream() {
    let scratch = Scratch::new();
    let (volume, mut rig, _) = one_cluster(&scratch);
    let memory = IoVector::zeroed(65536);
    memory.fill(0, 65536, 5);
    let guest = memory.clone();
    // Between the compression and the end of the write, again and again.
    let mut byte = 5;
    volume.set_gate(move |_| {
        byte += 1;
        guest.fill(0, 65536, byte);
        Ok(false)
    });
    rig.request(Request::write(5 << 16, memory).compressed()).unwrap();
    volume.remove_gate();
    let stored = rig.read(5 << 16, 65536);
    assert!(stored.iter().all(|byte| *byte == stored[0]), "torn");
    assert_eq!(finish(&scratch, &volume, rig)[5 << 16..][..65536], stored);
}

/// Q23: the mark goes with the last writer, not with a reader that closes while it works.
#[test]
fn a_reader_that_closes_leaves_the_dirty_bit_of_the_writer() {
    let scratch = Scratch::new();
    let volume = Volume::from_file(&scratch.create("lazy_refcounts=on", "1M"));
    let mut writer = Rig::writable(&volume);
    writer.write(0, &[1; 512]);
    writer.flush();
    let is_dirty = || volume.bytes()[79] & 1 != 0;
    let before = volume.bytes();
    let read_only = Setup { read_only: true, ..Setup::default() };
    // A thread has one loop.
    std::thread::scope(|scope| {
        let read = || {
            let mut reader = Rig::open(&volume, read_only.clone()).unwrap();
            assert_eq!(reader.read(0, 512), [1; 512]);
            reader.close();
        };
        scope.spawn(read).join().unwrap();
    });
    assert!(is_dirty() && volume.bytes() == before, "a reader writes nothing");
    writer.write(5 << 16, &[2; 512]);
    assert_eq!(finish(&scratch, &volume, writer)[5 << 16..][..512], [2; 512]);
    assert!(!is_dirty());
}
