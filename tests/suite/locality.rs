//! Any loop serves any node, and nobody waits for a disk that is not theirs.

use crate::drain::{pair, read};
use blockplex_graph::{Completion, ErrorKind, NodeOptions, Queue, Request, RequestKind, Scope};
use blockplex_io::buffer::{IoBuffer, IoVector};
use blockplex_io::event_loop::yield_now;
use blockplex_tests::{Point, Probe, Stage, patience, reader, sharing_writer, writer};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

#[test]
fn a_change_to_one_disk_never_stalls_another_disks_requests() {
    let stage = Stage::new(2);
    let (driver, disk_a) = Probe::new(4096);
    let node_a = stage.add("a", driver, &[]);
    let (driver, disk_b) = Probe::new(4096);
    let node_b = stage.add("b", driver, &[]);
    let (user_a, hooks_a) = stage.origin("user a", node_a, writer());
    let (user_b, hooks_b) = stage.origin("user b", node_b, writer());
    hooks_b.reset();
    disk_a.shut(Point::BeforeCompletion);
    let stuck = stage.start(0, &user_a, read(0));
    disk_a.wait_stopped(1);
    let id = user_a.id();
    let change = stage.start_change(move |change| change.set_root(id, None));
    patience::until("the drain of a", || hooks_a.rests());
    // The change of A cannot end now. B runs a thousand requests meanwhile, on both loops.
    let workers: Vec<_> = (0..2)
        .map(|index| {
            let (graph, origin) = (stage.graph.clone(), user_b.clone());
            stage.spawn(index, move |local| async move {
                let queue = Queue::open(&graph, &origin, &local, "b");
                for _ in 0..500 {
                    queue.request(read(0)).await.result.unwrap();
                }
            })
        })
        .collect();
    for worker in workers {
        stage.wait("500 requests on b", worker).unwrap();
    }
    assert_eq!(disk_b.calls(RequestKind::Read), 1000);
    assert_eq!(hooks_b.begun(), 0);
    assert_eq!(disk_a.stopped(), 1, "a is stuck as before");
    disk_a.open(Point::BeforeCompletion);
    stage.wait("the change of a", change).unwrap().unwrap();
    assert!(stage.finish(stuck).result.is_ok());
}

#[test]
fn several_loops_do_io_on_one_node_through_queues_of_one_backend() {
    let pair = pair(3);
    let workers: Vec<_> = (0..3)
        .map(|index| {
            let (graph, origin) = (pair.stage.graph.clone(), pair.device.clone());
            pair.stage.spawn(index, move |local| async move {
                let queue = Queue::open(&graph, &origin, &local, "worker");
                for round in 0..200u64 {
                    queue.request(read(512 * (round % 8))).await.result.unwrap();
                }
            })
        })
        .collect();
    for worker in workers {
        pair.stage.wait("a worker", worker).unwrap();
    }
    assert_eq!(pair.upper.calls(RequestKind::Read), 600);
    assert_eq!(pair.device.statistics().of(RequestKind::Read).operations, 600);
}

#[test]
fn a_node_has_no_home_and_needs_no_move() {
    // What moving between contexts was for, and the rules about who moves along: here any loop
    // serves the same node, drained in between or not, and new nodes above it too.
    let pair = pair(3);
    for index in [0, 1, 2, 0] {
        pair.stage.run(index, &pair.device, read(0)).unwrap();
        drop(pair.stage.drain(Scope::Subtree(pair.node)));
    }
    let node = pair.node;
    let above = pair
        .stage
        .change(move |change| {
            let children = [(blockplex_graph::Role::Filtered, node)];
            let driver = Box::new(Probe::new(0).0);
            change.add_node(Some("above"), driver, NodeOptions::default(), &children)
        })
        .unwrap();
    let (second, _) = pair.stage.origin("second", above, reader());
    for index in 0..3 {
        pair.stage.run(index, &second, read(0)).unwrap();
        pair.stage.run((index + 1) % 3, &pair.device, read(0)).unwrap();
    }
}

#[test]
fn a_backend_that_loses_its_root_and_gets_it_back_goes_on_where_it_was() {
    let pair = pair(2);
    let (device, node) = (pair.device.id(), pair.node);
    let (graph, origin) = (pair.stage.graph.clone(), pair.device.clone());
    let go = [Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false))];
    let (gone, back) = (go[0].clone(), go[1].clone());
    let seen = pair.stage.spawn(1, move |local| async move {
        let queue = Queue::open(&graph, &origin, &local, "one queue all the while");
        let before = queue.request(read(0)).await.result.is_ok() && queue.root().is_some();
        gone.store(true, Ordering::SeqCst);
        while !back.load(Ordering::SeqCst) {
            yield_now().await;
        }
        let without = queue.request(read(0)).await.result.map_err(|error| error.kind());
        gone.store(false, Ordering::SeqCst);
        while back.load(Ordering::SeqCst) {
            yield_now().await;
        }
        (before, without, queue.request(read(0)).await.result.is_ok())
    });
    patience::until("the first read", || go[0].load(Ordering::SeqCst));
    pair.stage.change(move |change| change.set_root(device, None)).unwrap();
    go[1].store(true, Ordering::SeqCst);
    patience::until("the second read", || !go[0].load(Ordering::SeqCst));
    pair.stage.change(move |change| change.set_root(device, Some(node))).unwrap();
    go[1].store(false, Ordering::SeqCst);
    let (before, without, after) = pair.stage.wait("the reads", seen).unwrap();
    assert!(before && after);
    assert_eq!(without.unwrap_err(), ErrorKind::NoMedium);
}

#[test]
fn a_future_dropped_in_flight_keeps_its_memory_and_admission_until_the_end() {
    let pair = pair(1);
    pair.lower.shut(Point::BeforeSubmit);
    let (graph, origin) = (pair.stage.graph.clone(), pair.other.clone());
    let memory = IoVector::zeroed(512);
    let watched = memory.clone();
    let reader = pair.lower.clone();
    pair.stage.on(0, move |local| async move {
        let queue = Queue::open(&graph, &origin, &local, "queue");
        let future = queue.request(Request::read(0, memory));
        while reader.stopped() == 0 {
            yield_now().await;
        }
        drop(future);
        assert_eq!(queue.in_flight(), 1);
        // And the queue goes as well.
    });
    let section = pair.stage.graph.begin_drain(Scope::node(pair.backing)).unwrap();
    pair.settle_loops();
    assert!(!section.is_settled());
    watched.fill(0, 512, 0xee);
    pair.lower.open(Point::BeforeSubmit);
    drop(pair.stage.wait("the section", section.settle()));
    assert_eq!(watched.to_vec(), vec![0; 512], "the read ran to its end, into its own memory");
    assert_eq!(pair.other.statistics().of(RequestKind::Read).operations, 1);
}

#[test]
fn a_queue_dropped_with_waiting_requests_cancels_each_of_them_once() {
    let pair = pair(1);
    let drained = pair.stage.drain(Scope::node(pair.node));
    let (graph, origin) = (pair.stage.graph.clone(), pair.device.clone());
    let kinds = pair.stage.on(0, move |local| async move {
        let queue = Queue::open(&graph, &origin, &local, "queue");
        let futures: Vec<_> = (0..5).map(|_| queue.request(read(0))).collect();
        let forgotten = queue.request(read(0));
        queue.submit(read(0), 7);
        drop(forgotten);
        yield_now().await;
        assert_eq!((queue.parked(), queue.in_flight()), (7, 0));
        drop(queue);
        let mut kinds = Vec::new();
        for future in futures {
            let Completion { result, vector, .. } = future.await;
            assert_eq!(vector.len(), 512);
            kinds.push(result.unwrap_err().kind());
        }
        kinds
    });
    assert_eq!(kinds, [ErrorKind::Cancelled; 5]);
    drop(drained);
    pair.settle_loops();
    assert_eq!(pair.upper.all_calls(), 0);
}

#[test]
fn every_submitted_request_completes_exactly_once_across_drains_and_failures() {
    const REQUESTS: u64 = 2000;
    let stage = Stage::new(1);
    let (driver, probe) = Probe::new(4096);
    let node = stage.add("node", driver, &[]);
    let (user, _) = stage.origin("user", node, sharing_writer());
    let (graph, origin, failing) = (stage.graph.clone(), user.clone(), probe.clone());
    let work = stage.spawn(0, move |local| async move {
        let queue = Queue::open(&graph, &origin, &local, "queue");
        let (mut seen, mut failed) = (vec![0u8; REQUESTS as usize], 0);
        let (mut next, mut completions) = (0, Vec::new());
        while seen.contains(&0) {
            while next < REQUESTS && queue.in_flight() + (queue.parked() as u64) < 16 {
                if next % 50 == 0 {
                    failing.fail_next(RequestKind::Write, libc::ENOSPC);
                }
                let bytes = IoBuffer::from_slice(&[1; 512]);
                queue.submit(Request::write(512 * (next % 8), bytes), next);
                next += 1;
            }
            queue.ready().await;
            queue.reap(&mut completions, 32);
            for completion in completions.drain(..) {
                seen[completion.cookie as usize] += 1;
                failed += usize::from(completion.result.is_err());
                assert_eq!(completion.vector.len(), 512);
            }
        }
        (seen.iter().all(|count| *count == 1), failed, queue.in_flight(), queue.parked())
    });
    while !work.is_finished() {
        drop(stage.drain(Scope::node(node)));
    }
    let (once, failed, in_flight, parked) = stage.wait("the requests", work).unwrap();
    assert!(once);
    assert_eq!((failed, in_flight, parked), (40, 0, 0));
    let tally = user.statistics().of(RequestKind::Write);
    assert_eq!((tally.operations, tally.failed, tally.bytes), (1960, 40, 1960 * 512));
}

#[test]
fn a_submitted_request_is_in_flight_until_it_is_reaped() {
    let pair = pair(1);
    let reap = Arc::new(AtomicBool::new(false));
    let (graph, origin, may_reap) = (pair.stage.graph.clone(), pair.other.clone(), reap.clone());
    let frontend = pair.stage.spawn(0, move |local| async move {
        let queue = Queue::open(&graph, &origin, &local, "queue");
        queue.submit(read(0), 1);
        while !may_reap.load(Ordering::SeqCst) {
            yield_now().await;
        }
        let mut completions = Vec::new();
        queue.reap(&mut completions, 8)
    });
    patience::until("the read", || pair.lower.calls(RequestKind::Read) == 1);
    pair.settle_loops();
    let section = pair.stage.graph.begin_drain(Scope::node(pair.backing)).unwrap();
    assert!(!section.is_settled());
    let holders = section.holders();
    assert_eq!(holders[0].in_flight, 1);
    reap.store(true, Ordering::SeqCst);
    drop(pair.stage.wait("the section", section.settle()));
    assert_eq!(pair.stage.wait("the frontend", frontend).unwrap(), 1);
}

#[test]
fn a_completion_that_submits_the_next_request_takes_no_stack() {
    // A null disk completes inside of the submission; a hundred thousand in a row, each submitted
    // when the one before has ended, stay within the stack of the loop's thread.
    let stage = Stage::new(1);
    let (driver, probe) = Probe::new(4096);
    let node = stage.add("node", driver.quick(), &[]);
    let (user, _) = stage.origin("user", node, reader());
    let (graph, origin) = (stage.graph.clone(), user);
    stage.on(0, move |local| async move {
        let queue = Queue::open(&graph, &origin, &local, "queue");
        let mut completions = Vec::new();
        queue.submit(read(0), 0);
        for _ in 0..100_000 {
            queue.ready().await;
            queue.reap(&mut completions, 1);
            let Completion { cookie, vector, .. } = completions.pop().unwrap();
            queue.submit(Request::read(0, vector), cookie + 1);
        }
    });
    assert_eq!(probe.calls(RequestKind::Read), 100_001);
}
