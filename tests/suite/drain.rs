//! Drained sections: who rests, who goes on, what has ended when the wait returns.

use blockplex_graph::driver::Role;
use blockplex_graph::{ErrorKind, NodeId, Origin, Queue, Request, RequestKind, Scope};
use blockplex_io::buffer::IoBuffer;
use blockplex_io::event_loop::yield_now;
use blockplex_tests::{Hooks, Point, Probe, ProbeHandle, Stage, patience, reader, writer};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// A node over a backing node, with a user each.
pub(crate) struct Pair {
    pub(crate) stage: Stage,
    pub(crate) node: NodeId,
    pub(crate) backing: NodeId,
    pub(crate) upper: ProbeHandle,
    pub(crate) lower: ProbeHandle,
    pub(crate) device: Arc<Origin>,
    pub(crate) device_hooks: Hooks,
    pub(crate) other: Arc<Origin>,
    pub(crate) other_hooks: Hooks,
}

pub(crate) fn pair(loops: usize) -> Pair {
    let stage = Stage::new(loops);
    let (lower_driver, lower) = Probe::new(64 << 10);
    let (upper_driver, upper) = Probe::new(0);
    let backing = stage.add("backing", lower_driver, &[]);
    let node = stage.add("node", upper_driver, &[(Role::Backing, backing)]);
    let (device, device_hooks) = stage.origin("device", node, writer());
    let (other, other_hooks) = stage.origin("other", backing, reader());
    device_hooks.reset();
    other_hooks.reset();
    Pair { stage, node, backing, upper, lower, device, device_hooks, other, other_hooks }
}

pub(crate) fn read(offset: u64) -> Request {
    Request::read(offset, IoBuffer::zeroed(512))
}

impl Pair {
    /// Lets both loops and what they have queued take some turns.
    pub(crate) fn settle_loops(&self) {
        for index in 0..self.stage.loops.len() {
            self.stage.on(index, |_| async {
                for _ in 0..20 {
                    yield_now().await;
                }
            });
        }
    }
}

#[test]
fn drain_everything_tells_each_origin_once_and_ends_the_pending_read() {
    let pair = pair(1);
    drop(pair.stage.drain(Scope::Everything));
    assert_eq!((pair.device_hooks.begun(), pair.device_hooks.ended()), (1, 1));
    assert_eq!((pair.other_hooks.begun(), pair.other_hooks.ended()), (1, 1));

    pair.lower.shut(Point::BeforeCompletion);
    let pending = pair.stage.start(0, &pair.device, read(0));
    pair.lower.wait_stopped(1);
    let section = pair.stage.graph.begin_drain(Scope::Everything).unwrap();
    assert!(!section.is_settled());
    pair.lower.open(Point::BeforeCompletion);
    let drained = pair.stage.wait("the section", section.settle());
    assert_eq!((pair.upper.running(), pair.lower.running()), (0, 0));
    assert!(pair.stage.finish(pending).result.is_ok());
    assert!(pair.device_hooks.rests() && pair.other_hooks.rests());
    drop(drained);
    assert_eq!((pair.device_hooks.begun(), pair.device_hooks.ended()), (2, 2));
    assert_eq!((pair.other_hooks.begun(), pair.other_hooks.ended()), (2, 2));
}

#[test]
fn draining_a_node_rests_those_above_it_and_not_the_users_of_its_backing_node() {
    let pair = pair(1);
    let drained = pair.stage.drain(Scope::node(pair.node));
    pair.upper.forbid();
    assert!(pair.device_hooks.rests());
    assert_eq!(pair.other_hooks.begun(), 0);
    pair.stage.run(0, &pair.other, read(0)).unwrap();
    let waiting = pair.stage.start(0, &pair.device, read(0));
    pair.settle_loops();
    assert_eq!(pair.upper.all_calls(), 0);
    pair.upper.allow();
    drop(drained);
    assert!(pair.stage.finish(waiting).result.is_ok());
    assert_eq!(pair.upper.violations(), 0);
}

#[test]
fn draining_a_subtree_rests_the_users_of_everything_below() {
    let pair = pair(1);
    let drained = pair.stage.drain(Scope::Subtree(pair.node));
    assert!(pair.device_hooks.rests() && pair.other_hooks.rests());
    drop(drained);
    assert!(!pair.device_hooks.rests() && !pair.other_hooks.rests());
}

#[test]
fn a_task_on_a_loop_drains_while_the_loop_goes_on() {
    for everything in [true, false] {
        let pair = pair(1);
        pair.lower.shut(Point::BeforeCompletion);
        let pending = pair.stage.start(0, &pair.device, read(0));
        pair.lower.wait_stopped(1);
        let scope = if everything { Scope::Everything } else { Scope::node(pair.node) };
        let (graph, lower) = (pair.stage.graph.clone(), pair.lower.clone());
        // The same loop that has to complete the read: the drain only yields.
        let drained = pair.stage.on(0, move |local| async move {
            drop(local.spawn(async move { lower.open(Point::BeforeCompletion) }));
            graph.drain(scope).await
        });
        assert_eq!((pair.upper.running(), pair.lower.running()), (0, 0));
        assert_eq!(pair.other_hooks.rests(), everything);
        drop(drained);
        assert!(pair.stage.finish(pending).result.is_ok());
        assert_eq!(pair.device_hooks.begun(), pair.device_hooks.ended());
    }
}

#[test]
fn nested_sections_tell_the_origin_once_and_open_with_the_last() {
    for (outer_all, inner_all) in [(true, true), (true, false), (false, true), (false, false)] {
        for inner_ends_first in [true, false] {
            let pair = pair(1);
            let scope = |all| if all { Scope::Everything } else { Scope::node(pair.node) };
            let outer = pair.stage.drain(scope(outer_all));
            let inner = pair.stage.drain(scope(inner_all));
            pair.upper.forbid();
            assert_eq!((pair.device_hooks.begun(), pair.device_hooks.ended()), (1, 0));
            assert_eq!(pair.other_hooks.rests(), outer_all || inner_all);
            let waiting = pair.stage.start(0, &pair.device, read(0));
            let (first, last) = if inner_ends_first { (inner, outer) } else { (outer, inner) };
            drop(first);
            pair.settle_loops();
            assert_eq!((pair.device_hooks.ended(), pair.upper.all_calls()), (0, 0));
            pair.upper.allow();
            drop(last);
            assert!(pair.stage.finish(waiting).result.is_ok());
            assert_eq!((pair.device_hooks.begun(), pair.device_hooks.ended()), (1, 1));
            assert_eq!(pair.other_hooks.begun(), pair.other_hooks.ended());
        }
    }
}

#[test]
fn a_read_that_another_loop_completes_is_waited_for_from_anywhere() {
    for drainer in [None, Some(0), Some(1)] {
        let pair = pair(2);
        pair.lower.shut(Point::BeforeCompletion);
        let pending = pair.stage.start(0, &pair.device, read(0));
        pair.lower.wait_stopped(1);
        let section = pair.stage.graph.begin_drain(Scope::Everything).unwrap();
        let lower = pair.lower.clone();
        pair.stage.loops[1].handle().post(move |_| lower.open(Point::BeforeCompletion)).unwrap();
        let drained = match drainer {
            None => pair.stage.wait("the section", section.settle()),
            Some(index) => pair.stage.on(index, |_| section.settle()),
        };
        assert_eq!((pair.upper.running(), pair.lower.running()), (0, 0));
        assert!(pair.stage.finish(pending).result.is_ok());
        drop(drained);
    }
}

#[test]
fn a_background_source_rests_in_the_section_and_goes_on_after_it() {
    for fails in [false, true] {
        let pair = pair(2);
        let (graph, job) = (pair.stage.graph.clone(), pair.other.clone());
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (stopped, counted, lower) = (stop.clone(), rounds.clone(), pair.lower.clone());
        let job = pair.stage.spawn(1, move |local| async move {
            let queue = Queue::open(&graph, &job, &local, "job");
            let mut errors = 0;
            while !stopped.load(Ordering::SeqCst) {
                if fails {
                    lower.fail_next(RequestKind::Read, libc::EIO);
                }
                errors += usize::from(queue.request(read(0)).await.result.is_err());
                counted.fetch_add(1, Ordering::SeqCst);
                yield_now().await;
            }
            errors
        });
        for scope in [Scope::node(pair.backing), Scope::Subtree(pair.node), Scope::Everything] {
            let seen = rounds.load(Ordering::SeqCst);
            patience::until("a round of the job", || rounds.load(Ordering::SeqCst) > seen);
            let drained = pair.stage.drain(scope);
            pair.lower.forbid();
            assert!(pair.other_hooks.rests());
            pair.settle_loops();
            pair.lower.allow();
            drop(drained);
        }
        stop.store(true, Ordering::SeqCst);
        let errors = pair.stage.wait("the job", job).unwrap();
        assert_eq!(errors > 0, fails);
        assert_eq!(pair.lower.violations(), 0);
    }
}

#[test]
fn a_section_keeps_reads_and_flushes_out_as_well_as_writes() {
    let pair = pair(1);
    let drained = pair.stage.drain(Scope::node(pair.node));
    let requests = [
        read(0),
        Request::write(0, IoBuffer::zeroed(512)),
        Request::flush(),
        Request::discard(0, 512),
        Request::write_zeroes(0, 512),
        Request::block_status(0, 512),
        Request::truncate(64 << 10),
    ];
    let waiting: Vec<_> =
        requests.into_iter().map(|request| pair.stage.start(0, &pair.device, request)).collect();
    pair.settle_loops();
    assert_eq!(pair.upper.all_calls(), 0);
    drop(drained);
    waiting.into_iter().for_each(|request| drop(pair.stage.finish(request)));
    assert_eq!(pair.upper.all_calls(), 6, "a discard is ignored by default; all others arrive");
}

#[test]
fn a_parent_stays_in_flight_after_its_child_has_ended() {
    let pair = pair(1);
    pair.upper.shut(Point::BeforeCompletion);
    let pending = pair.stage.start(0, &pair.device, read(0));
    pair.upper.wait_stopped(1);
    assert_eq!((pair.lower.running(), pair.lower.calls(RequestKind::Read)), (0, 1));
    let section = pair.stage.graph.begin_drain(Scope::node(pair.backing)).unwrap();
    pair.settle_loops();
    assert!(!section.is_settled());
    pair.upper.open(Point::BeforeCompletion);
    drop(pair.stage.wait("the section", section.settle()));
    assert!(pair.stage.finish(pending).result.is_ok());
}

#[test]
fn a_request_that_waits_at_the_gate_does_not_keep_a_section_from_settling() {
    let pair = pair(1);
    let first = pair.stage.drain(Scope::node(pair.node));
    let waiting = pair.stage.start(0, &pair.device, read(0));
    pair.settle_loops();
    let second = pair.stage.drain(Scope::Everything);
    drop((first, second));
    assert!(pair.stage.finish(waiting).result.is_ok());
}

#[test]
fn a_waiting_request_does_not_slip_into_a_section_that_begins_as_the_first_ends() {
    let pair = pair(1);
    for _ in 0..200 {
        let first = pair.stage.drain(Scope::node(pair.node));
        let waiting = pair.stage.start(0, &pair.device, read(0));
        pair.stage.on(0, |_| async {});
        drop(first);
        let second = pair.stage.drain(Scope::node(pair.node));
        pair.upper.forbid();
        pair.stage.on(0, |_| async { yield_now().await });
        pair.upper.allow();
        drop(second);
        assert!(pair.stage.finish(waiting).result.is_ok());
    }
    assert_eq!(pair.upper.violations(), 0);
}

#[test]
fn endless_submitters_do_not_starve_a_section() {
    let pair = pair(2);
    let stop = Arc::new(AtomicBool::new(false));
    let submitters: Vec<_> = (0..8)
        .map(|number| {
            let (graph, origin) = (pair.stage.graph.clone(), pair.device.clone());
            let stopped = stop.clone();
            pair.stage.spawn(number % 2, move |local| async move {
                let queue = Queue::open(&graph, &origin, &local, "endless");
                while !stopped.load(Ordering::SeqCst) {
                    queue.request(read(0)).await.result.unwrap();
                    yield_now().await;
                }
            })
        })
        .collect();
    for _ in 0..200 {
        let drained = pair.stage.drain(Scope::node(pair.node));
        pair.upper.forbid();
        pair.upper.allow();
        drop(drained);
    }
    stop.store(true, Ordering::SeqCst);
    for submitter in submitters {
        pair.stage.wait("a submitter", submitter).unwrap();
    }
    assert_eq!(pair.upper.violations(), 0);
    assert_eq!(pair.device_hooks.begun(), 200);
}

#[test]
fn dropping_the_wait_ends_the_section() {
    let pair = pair(1);
    pair.upper.shut_for(Point::BeforeSubmit, 1);
    let stuck = pair.stage.start(0, &pair.device, read(0));
    pair.upper.wait_stopped(1);
    let graph = pair.stage.graph.clone();
    let node = pair.node;
    let mut wait =
        pair.stage.spawn(0, move |_| async move { graph.drain(Scope::node(node)).await });
    patience::until("the section", || pair.device_hooks.rests());
    wait.cancel();
    assert!(pair.stage.wait("the cancelled wait", wait).is_err());
    patience::until("the section's end", || !pair.device_hooks.rests());
    pair.stage.run(0, &pair.device, read(512)).unwrap();
    pair.upper.open(Point::BeforeSubmit);
    assert!(pair.stage.finish(stuck).result.is_ok());
}

#[test]
fn a_scope_that_does_not_exist_is_refused() {
    let pair = pair(1);
    let gone = pair.stage.change(|change| {
        let (driver, _) = Probe::new(0);
        change.add_node(None, Box::new(driver), blockplex_graph::NodeOptions::default(), &[])
    });
    let gone = gone.unwrap();
    pair.stage.change(move |change| change.remove_node(gone)).unwrap();
    let error = pair.stage.graph.begin_drain(Scope::node(gone)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}
