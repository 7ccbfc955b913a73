//! How loops begin and end (test-aio-multithread's lifecycle; C03).

use super::*;
use crate::buffer::IoVector;
use std::cell::Cell;
use std::future::pending;
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::thread;

on_each_engine! {
    five_threads_come_and_go
    parked_tasks_are_dropped_on_the_loops_thread
    a_stopped_loop_finishes_what_is_under_way
    a_loop_dropped_with_operations_in_flight_ends_them_first
    a_task_that_never_stops_working_does_not_hold_up_the_end
    a_loop_ended_by_its_own_task_ends
    wake_ups_after_the_end_are_harmless
    indices_are_small_distinct_and_reused
    a_handle_knows_its_engine
}

fn five_threads_come_and_go(config: LoopConfig) {
    for _ in 0..5 {
        let threads = io_threads(&config, 5);
        let tasks: Vec<_> =
            threads.iter().map(|t| t.handle().spawn(async { 1 }).unwrap()).collect();
        for task in tasks {
            assert_eq!(block_on(task), Ok(Ok(1)));
        }
    }
}

/// Says on which thread it was dropped.
struct Tell(mpsc::Sender<thread::ThreadId>);

impl Drop for Tell {
    fn drop(&mut self) {
        self.0.send(thread::current().id()).unwrap();
    }
}

fn parked_tasks_are_dropped_on_the_loops_thread(config: LoopConfig) {
    let thread = IoThread::spawn(config).unwrap();
    let (sender, receiver) = mpsc::channel();
    let [first, second] = [Tell(sender.clone()), Tell(sender)];
    let send = thread.handle().spawn(async move {
        let _tell = first;
        pending::<()>().await;
    });
    let local = thread.handle().spawn_with(|local| async move {
        let _tell = second;
        local.sleep(Duration::from_secs(3600)).await;
    });
    let home = block_on(thread.handle().spawn(async { thread::current().id() }).unwrap());
    thread.join();
    assert_eq!(block_on(send.unwrap()), Ok(Err(Cancelled)));
    assert_eq!(block_on(local.unwrap()), Ok(Err(Cancelled)));
    let homes: Vec<_> = receiver.iter().map(|id| Ok(Ok(id))).collect();
    assert_eq!(homes, [home, home]);
}

fn a_stopped_loop_finishes_what_is_under_way(config: LoopConfig) {
    let mut event_loop = new_loop(LoopConfig { stop_grace: Duration::from_secs(60), ..config });
    let local = event_loop.local();
    let file = Arc::new(OwnedFd::from(tempfile::tempfile().unwrap()));
    let written = Rc::new(Cell::new(0));
    let (count, inner) = (Rc::clone(&written), local.clone());
    drop(local.spawn(async move {
        for block in 0..10 {
            let data = IoVector::zeroed(4096);
            assert_eq!(inner.write_at(Arc::clone(&file), data, block * 4096, false).await, 4096);
            count.set(count.get() + 1);
        }
    }));
    event_loop.handle().stop();
    event_loop.run();
    assert_eq!(written.get(), 10);
    event_loop.run(); // returns at once
    assert_eq!(event_loop.handle().post(|_| ()), Err(Closed));
}

fn a_loop_dropped_with_operations_in_flight_ends_them_first(config: LoopConfig) {
    let event_loop = new_loop(LoopConfig { stop_grace: Duration::ZERO, ..config });
    let local = event_loop.local();
    let (reader, _writer) = io::pipe().unwrap();
    let reader = Arc::new(OwnedFd::from(reader));
    let memory = IoVector::zeroed(16);
    drop(local.spawn(local.read_at(Arc::clone(&reader), memory.clone(), 0)));
    drop(local.spawn(local.poll_fd(Arc::clone(&reader), libc::POLLIN as u32)));
    event_loop.core.turn();
    assert_eq!(local.ops_in_flight(), 2);
    drop(event_loop);
    assert_eq!((local.ops_in_flight(), local.orphans()), (0, 0));
    assert!(memory.into_buffer().is_ok());
    assert_eq!(Arc::strong_count(&reader), 1);
}

fn a_task_that_never_stops_working_does_not_hold_up_the_end(config: LoopConfig) {
    let grace = Duration::from_millis(5);
    let thread = IoThread::spawn(LoopConfig { stop_grace: grace, ..config }).unwrap();
    let busy = thread.handle().spawn_with(|local| async move {
        let file = Arc::new(OwnedFd::from(tempfile::tempfile().unwrap()));
        loop {
            local.fsync(Arc::clone(&file), true).await;
            yield_now().await;
        }
    });
    let busy: JoinHandle<()> = busy.unwrap();
    thread.join();
    assert_eq!(block_on(busy), Ok(Err(Cancelled)));
}

fn a_loop_ended_by_its_own_task_ends(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let handle = event_loop.handle();
    drop(event_loop.local().spawn(async move {
        yield_now().await;
        handle.stop();
    }));
    event_loop.run();
    assert!(event_loop.handle().is_closed());
}

fn wake_ups_after_the_end_are_harmless(config: LoopConfig) {
    let thread = IoThread::spawn(config).unwrap();
    let (sender, receiver) = mpsc::channel();
    let task = thread.handle().spawn_with(move |_| {
        std::future::poll_fn(move |context| {
            sender.send(context.waker().clone()).unwrap();
            Poll::<()>::Pending
        })
    });
    let waker = receiver.recv().unwrap();
    let half = thread.handle().bottom_half(|_| ());
    thread.join();
    waker.wake_by_ref();
    half.schedule();
    drop(half);
    drop(waker);
    assert_eq!(block_on(task.unwrap()), Ok(Err(Cancelled)));
}

fn indices_are_small_distinct_and_reused(config: LoopConfig) {
    for _ in 0..2 * MAX_LOOPS / 8 {
        let threads = io_threads(&config, 8);
        let mut indices: Vec<_> = threads.iter().map(|t| t.handle().index()).collect();
        assert!(indices.iter().all(|index| *index < MAX_LOOPS));
        indices.sort_unstable();
        indices.dedup();
        assert_eq!(indices.len(), 8);
    }
}

fn a_handle_knows_its_engine(config: LoopConfig) {
    let event_loop = new_loop(config.clone());
    let handle = event_loop.handle();
    let ring = config.engine == EngineChoice::Ring;
    assert_eq!(handle.engine_name(), if ring { "io_uring" } else { "threads" });
    assert_eq!(handle.engine_features().in_flight_limit > 0, ring);
    assert_eq!(handle.engine_reason(), None);
    assert_eq!(handle.name(), "test");
}
