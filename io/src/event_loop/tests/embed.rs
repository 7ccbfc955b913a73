//! A loop driven by somebody else's poll (test-aio's GSource cases; concurrency §8).

use super::*;
use crate::sync::atomic::AtomicU32;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::OwnedFd;
use std::sync::mpsc;

on_each_engine! {
    timers_and_remote_kicks_are_all_seen_through_the_descriptor
    completions_are_seen_through_the_descriptor
    an_idle_loop_is_not_readable
}

/// One round of an embedder's loop. Waits forever if the loop says so: a missed event hangs.
fn round(event_loop: &mut EventLoop) {
    let timeout = match event_loop.prepare() {
        Wait::Now => Some(Timespec::default()),
        Wait::Until(duration) => Some(Timespec::try_from(duration).unwrap()),
        Wait::Forever => None,
    };
    let fd = event_loop.fd().unwrap();
    poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], timeout.as_ref()).unwrap();
    event_loop.dispatch();
}

fn timers_and_remote_kicks_are_all_seen_through_the_descriptor(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    event_loop.fd().unwrap();
    let (local, handle) = (event_loop.local(), event_loop.handle());
    let task = local.clone().spawn(async move {
        for _ in 0..40 {
            local.sleep(Duration::from_micros(500)).await;
        }
    });
    while !task.is_finished() {
        round(&mut event_loop);
    }
    let count = Arc::new(AtomicU32::new(0));
    let (go, gone) = mpsc::channel::<()>();
    let (seen, kicker_handle) = (Arc::clone(&count), handle);
    let kicker = std::thread::spawn(move || {
        // The next kick comes when the last was seen, and mostly finds the loop asleep.
        while gone.recv().is_ok() {
            std::thread::sleep(Duration::from_micros(200));
            let seen = Arc::clone(&seen);
            let posted = kicker_handle.post(move |_| {
                seen.fetch_add(1, Ordering::SeqCst);
            });
            posted.unwrap();
        }
    });
    for kick in 1..=40 {
        go.send(()).unwrap();
        while count.load(Ordering::SeqCst) < kick {
            round(&mut event_loop);
        }
    }
    drop(go);
    kicker.join().unwrap();
}

fn completions_are_seen_through_the_descriptor(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    event_loop.fd().unwrap();
    let local = event_loop.local();
    let (reader, writer) = io::pipe().unwrap();
    let reader = Arc::new(OwnedFd::from(reader));
    let writer = std::thread::spawn(move || {
        for _ in 0..40 {
            std::thread::sleep(Duration::from_micros(200));
            io::Write::write_all(&mut &writer, b"x").unwrap();
        }
    });
    let task = local.clone().spawn(async move {
        let mut bytes = 0;
        while bytes < 40 {
            let memory = crate::buffer::IoVector::zeroed(64);
            bytes += local.read_at(Arc::clone(&reader), memory, 0).await;
        }
        local.blocking(move || bytes).await
    });
    while !task.is_finished() {
        round(&mut event_loop);
    }
    writer.join().unwrap();
    assert_eq!(event_loop.block_on(task), Ok(40));
}

fn an_idle_loop_is_not_readable(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    event_loop.fd().unwrap();
    let handle = event_loop.handle();
    handle.post(|_| ()).unwrap();
    assert_eq!(event_loop.prepare(), Wait::Now);
    assert!(event_loop.dispatch());
    while event_loop.prepare() == Wait::Now {
        event_loop.dispatch();
    }
    std::thread::spawn(move || handle.post(|_| ()).unwrap()).join().unwrap();
    let readable = |event_loop: &mut EventLoop| {
        let fd = event_loop.fd().unwrap();
        let fds = &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        poll(fds, Some(&Timespec::default())).unwrap() == 1
    };
    assert!(readable(&mut event_loop), "the kick shows");
    assert!(event_loop.dispatch());
    while event_loop.prepare() == Wait::Now {
        event_loop.dispatch();
    }
    assert!(!readable(&mut event_loop), "and is gone when it was seen to");
}
