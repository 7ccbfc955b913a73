//! Waiting for descriptors (test-aio's event cases; W15).

use super::*;
use crate::sync::atomic::AtomicU32;
use rustix::event::{EventfdFlags, eventfd};
use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::pin::Pin;

on_each_engine! {
    a_wait_ends_once_for_each_event
    unrelated_descriptors_neither_wake_nor_hold_up
    a_dropped_wait_is_cancelled_even_with_its_event_pending
    one_descriptor_may_be_waited_for_twice
    a_regular_file_is_always_ready_and_a_bad_descriptor_an_error
}

const IN: u32 = libc::POLLIN as u32;

fn event() -> Arc<OwnedFd> {
    Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap())
}

fn set(event: &OwnedFd) {
    rustix::io::write(event, &1u64.to_ne_bytes()).unwrap();
}

fn clear(event: &OwnedFd) {
    rustix::io::read(event, &mut [0u8; 8]).unwrap();
}

fn settle(event_loop: &mut EventLoop) {
    while event_loop.run_once(Some(Duration::ZERO)) {}
}

fn a_wait_ends_once_for_each_event(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let (local, event) = (event_loop.local(), event());
    let runs = Arc::new(AtomicU32::new(0));
    let (count, waited) = (Arc::clone(&runs), Arc::clone(&event));
    let task = local.clone().spawn(async move {
        for _ in 0..10 {
            assert_eq!(local.poll_fd(Arc::clone(&waited), IN).await, libc::POLLIN as i32);
            clear(&waited);
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    settle(&mut event_loop);
    assert_eq!(runs.load(Ordering::SeqCst), 0, "nothing before it is set");
    for run in 1..=10 {
        set(&event);
        while runs.load(Ordering::SeqCst) < run {
            event_loop.run_once(None);
        }
        settle(&mut event_loop);
        assert_eq!(runs.load(Ordering::SeqCst), run);
    }
    assert_eq!(event_loop.block_on(task), Ok(()));
}

fn unrelated_descriptors_neither_wake_nor_hold_up(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let (local, silent, loud) = (event_loop.local(), event(), event());
    let wait = local.spawn(local.poll_fd(silent, IN));
    set(&loud);
    assert_eq!(event_loop.block_on(local.poll_fd(loud, IN)), libc::POLLIN as i32);
    settle(&mut event_loop);
    assert!(!wait.is_finished());
    assert_eq!(local.ops_in_flight(), 1);
}

fn a_dropped_wait_is_cancelled_even_with_its_event_pending(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let local = event_loop.local();
    for pending in [false, true] {
        let event = event();
        let mut wait = local.poll_fd(Arc::clone(&event), IN);
        event_loop.block_on(poll_fn(|context| {
            assert!(Pin::new(&mut wait).poll(context).is_pending());
            Poll::Ready(())
        }));
        local.flush_submissions();
        if pending {
            set(&event);
        }
        drop(wait);
        while local.ops_in_flight() > 0 {
            event_loop.run_once(None);
        }
        assert_eq!(Arc::strong_count(&event), 1);
    }
}

fn one_descriptor_may_be_waited_for_twice(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let (local, event) = (event_loop.local(), event());
    let waits = [0, 1].map(|_| local.spawn(local.poll_fd(Arc::clone(&event), IN)));
    settle(&mut event_loop);
    set(&event);
    event_loop.block_on(async {
        for wait in waits {
            assert_eq!(wait.await, Ok(libc::POLLIN as i32));
        }
    });
}

fn a_regular_file_is_always_ready_and_a_bad_descriptor_an_error(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let local = event_loop.local();
    let file = Arc::new(OwnedFd::from(tempfile::tempfile().unwrap()));
    assert_eq!(event_loop.block_on(local.poll_fd(file, IN)), libc::POLLIN as i32);
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let broken = local.poll_fd(Arc::new(writer.into()), libc::POLLOUT as u32);
    assert_ne!(event_loop.block_on(broken) & libc::POLLERR as i32, 0);
}
