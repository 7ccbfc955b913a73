//! Changes of metadata that fail or are torn down so that nobody knows what they left, and the L1
//! table while it moves.

use super::concurrency::{hold, one_cluster, settle, write};
use crate::qcow2::Qcow2Options;
use crate::qcow2::testing::Scratch;
use crate::qcow2::testing::rig::{Rig, Setup};
use crate::qcow2::testing::volume::{Event, Volume};
use blockplex_graph::{DebugEvent, Queue, Request};
use blockplex_io::event_loop::{EventLoop, LoopConfig};
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Fails the flush after a write at `offset`, and with `for_good` everything after it.
fn fail_flush_after(volume: &Volume, offset: u64, for_good: bool) {
    let (mut has_come, mut done) = (false, false);
    volume.set_gate(move |event| {
        let is_flush = *event == Event::Flush;
        if has_come && is_flush && !done || done && for_good && !matches!(event, Event::Read(..)) {
            done = true;
            return Err(libc::EIO);
        }
        has_come |= matches!(event, Event::Write(at, _) if *at == offset);
        Ok(false)
    });
}

/// HU1: the header may name the new L1 table or the old one, and what is written from then on goes
/// to the one that it names.
#[test]
fn a_change_of_the_size_that_fails_half_way_does_not_leave_two_l1_tables() {
    let scratch = Scratch::new();
    for for_good in [false, true] {
        // An L1 entry maps 32 KiB.
        let volume = Volume::from_file(&scratch.create("cluster_size=512", "1M"));
        let mut rig = Rig::writable(&volume);
        rig.write(0, &[1; 5000]);
        rig.flush();
        fail_flush_after(&volume, 24, for_good);
        assert!(rig.request(Request::truncate(9 << 20)).is_err());
        volume.remove_gate();
        let written = rig.try_write(512 << 10, &[2; 5000]);
        assert_eq!(written.is_ok(), !for_good, "an image whose header is in doubt is given up");
        match for_good {
            false => rig.close(),
            true => {
                assert!(rig.request(Request::flush()).is_err(), "nothing is said to be durable");
                assert_eq!(rig.read(0, 5000), [1; 5000]);
                assert!(rig.try_close().is_err(), "nor at the end");
            }
        }
        let path = scratch.path();
        volume.save(&path);
        scratch.check_allowing_leaks(&path);
        let contents = scratch.contents(&path);
        assert_eq!(contents[..5000], [1; 5000]);
        if !for_good {
            assert_eq!(contents[512 << 10..][..5000], [2; 5000]);
            assert_eq!(contents.len(), 1 << 20);
        }
    }
}

/// W5, Q14: a flush that shares a round with a moving L1 table has its entries in the new one.
#[test]
fn a_flush_that_waits_while_the_l1_table_moves_is_in_the_new_table() {
    let scratch = Scratch::new();
    let volume = Volume::from_file(&scratch.create("cluster_size=512", "1M"));
    let mut rig = Rig::open(&volume, Setup { breakpoints: true, ..Setup::default() }).unwrap();
    rig.write(0, &[1; 512]);
    rig.flush();
    let listener = rig.listener();
    listener.break_at(DebugEvent::L1GrowAllocTable, "alloc");
    let at_end = volume.clone();
    let bytes = rig.run(async |queue| {
        let grow = queue.request(Request::truncate(9 << 20));
        listener.wait_suspended(Some("alloc")).await;
        // It takes an L2 table of its own.
        queue.request(write(512 << 10, 512, 2)).await.result.unwrap();
        let flush = queue.request(Request::flush());
        settle().await;
        listener.break_at(DebugEvent::L1GrowActivateTable, "activate");
        listener.resume("alloc").unwrap();
        listener.wait_suspended(Some("activate")).await;
        listener.resume("activate").unwrap();
        flush.await.result.unwrap();
        // A crash, here.
        let bytes = at_end.bytes();
        grow.await.result.unwrap();
        bytes
    });
    rig.close();
    let path = scratch.path();
    Volume::new(&bytes).save(&path);
    scratch.check_allowing_leaks(&path);
    assert_eq!(scratch.contents(&path)[512 << 10..][..512], [2; 512], "it was durable");
}

/// I1, H24: whoever comes after one that could not clear the bits clears them.
#[test]
fn autoclear_bits_that_could_not_be_cleared_are_cleared_before_the_first_write() {
    let scratch = Scratch::new();
    let path = scratch.create("", "1M");
    scratch.qemu_io(&path, "write -P 1 0 64k");
    for fails_at_flush in [false, true] {
        let volume = Volume::from_file(&path);
        volume.apply(&Event::Write(88, vec![0xff, 0, 0, 0, 0, 0, 0, 0]));
        let mut rig = Rig::writable(&volume);
        volume.set_gate(move |event| match event {
            Event::Write(72, _) if !fails_at_flush => Err(libc::EIO),
            Event::Flush => Err(libc::EIO),
            _ => Ok(false),
        });
        assert!(rig.try_write(0, &[2; 512]).is_err());
        volume.remove_gate();
        volume.record();
        rig.write(0, &[3; 512]);
        let journal = volume.journal();
        assert!(matches!(&journal[0], Event::Write(72, _)), "{:?}", journal[0]);
        assert_eq!(journal[1], Event::Flush);
        assert_eq!(volume.bytes()[88..96], [0; 8]);
        rig.close();
    }
}

/// Y1: a dirty bit that may be gone does not stand in for refcounts.
#[test]
fn a_dirty_bit_that_may_have_gone_is_set_again() {
    let scratch = Scratch::new();
    let volume = Volume::from_file(&scratch.create("lazy_refcounts=on", "8M"));
    let mut rig = Rig::writable(&volume);
    rig.write(0, &[1; 4096]);
    rig.flush();
    let is_dirty = || volume.bytes()[79] & 1 != 0;
    assert!(is_dirty());
    fail_flush_after(&volume, 72, false);
    let late = Qcow2Options { lazy_refcounts: Some(false), ..Qcow2Options::default() };
    assert!(rig.reopen(late).is_err(), "the mark could not be taken away, or could it");
    volume.remove_gate();
    assert!(!is_dirty(), "it could");
    rig.write(1 << 20, &[1; 4096]);
    rig.flush();
    assert!(is_dirty(), "refcounts are late");
    rig.close();
    assert!(!is_dirty());
    let path = scratch.path();
    volume.save(&path);
    scratch.check_clean(&path);
}

/// Starts a request on a loop of its own, which ends while the request is stuck.
fn tear_down(rig: &Rig, request: Request) {
    let (graph, origin) = (rig.graph.clone(), rig.origin.clone());
    let short_lived = std::thread::spawn(move || {
        let config = LoopConfig { stop_grace: Duration::ZERO, ..LoopConfig::default() };
        let mut event_loop = EventLoop::new(config).unwrap();
        let queue = Queue::open(&graph, &origin, &event_loop.local(), "short-lived");
        event_loop.block_on(async {
            let stuck = queue.request(request);
            settle().await;
            drop(stuck);
        });
    });
    short_lived.join().unwrap();
}

/// E2: a change of the file's length that may still come lets nobody write where it could cut.
#[test]
fn a_longer_file_that_was_torn_down_with_its_loop_grows_no_more() {
    let scratch = Scratch::new();
    let path = scratch.create("", "8M");
    scratch.qemu_io(&path, "write -P 1 0 64k");
    let volume = Volume::from_file(&path);
    let mut rig = Rig::writable(&volume);
    let held = hold(&volume, |event| matches!(event, Event::Truncate(_)));
    tear_down(&rig, write(1 << 20, 512, 2));
    held.store(false, Ordering::Relaxed);
    let error = rig.try_write(2 << 20, &[3; 512]).unwrap_err();
    assert!(error.to_string().contains("opened anew"), "{error}");
    rig.write(0, &[4; 512]);
    // The counts of the cluster that was lost lie where the file does not reach.
    assert!(rig.request(Request::flush()).is_err() && rig.try_close().is_err());
    let path = scratch.path();
    volume.save(&path);
    scratch.check_allowing_leaks(&path);
    assert_eq!(scratch.contents(&path)[..1024], [[4; 512], [1; 512]].concat());
}

/// I3: a write that fills a place which is kept, torn down with its loop, could come after others.
#[test]
fn a_write_to_a_kept_place_that_was_torn_down_lets_nobody_write_there() {
    let scratch = Scratch::new();
    let (volume, mut rig, host) = one_cluster(&scratch);
    rig.request(Request::write_zeroes(0, 65536)).unwrap();
    assert_eq!(rig.status(0, 65536).offset, Some(host), "kept");
    let held = hold(&volume, |event| matches!(event, Event::Write(_, bytes) if bytes[0] == 9));
    tear_down(&rig, write(0, 512, 9));
    held.store(false, Ordering::Relaxed);
    assert!(rig.try_write(4096, &[3; 512]).is_err());
    assert_eq!(rig.read(0, 65536), [0; 65536]);
    rig.abandon();
    // A new place is nobody else's: such a write costs a cluster, no more.
    let (volume, mut rig, _) = one_cluster(&scratch);
    let held = hold(&volume, |event| matches!(event, Event::Write(_, bytes) if bytes[0] == 9));
    tear_down(&rig, write(5 << 16, 512, 9));
    held.store(false, Ordering::Relaxed);
    rig.write((5 << 16) + 4096, &[3; 512]);
    assert_eq!(rig.read((5 << 16) + 4096, 512), [3; 512]);
    rig.close();
    let path = scratch.path();
    volume.save(&path);
    scratch.check_allowing_leaks(&path);
}

/// W6, I3: a loop ends while it writes metadata back. What it had taken is still known, and nobody
/// is told that it is durable.
#[test]
fn a_write_back_that_is_torn_down_with_its_loop_is_no_lost_update() {
    let scratch = Scratch::new();
    let (volume, mut rig, _) = one_cluster(&scratch);
    rig.write(5 << 16, &[2; 65536]);
    let held = hold(&volume, |event| *event == Event::Flush);
    tear_down(&rig, Request::flush());
    held.store(false, Ordering::Relaxed);
    // The caches forget whatever they may.
    for _ in 0..2 {
        rig.manage(async |driver, _| driver.cleaning.pass());
    }
    assert_eq!(rig.read(5 << 16, 65536), [2; 65536]);
    assert!(rig.try_write(9 << 16, &[3; 512]).is_err());
    let error = rig.request(Request::flush()).unwrap_err();
    assert!(error.to_string().contains("opened anew"), "{error}");
    assert!(rig.try_close().is_err());
    let path = scratch.path();
    volume.save(&path);
    scratch.check_allowing_leaks(&path);
    assert_eq!(scratch.contents(&path)[..65536], [1; 65536]);
}
