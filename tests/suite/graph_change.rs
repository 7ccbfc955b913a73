//! Transactions: all of a change or nothing of it, whatever fails, and with requests in flight.

use crate::drain::{Pair, pair, read};
use blockplex_graph::driver::{AccessChange, Role};
use blockplex_graph::{
    DiscardMode, Error, ErrorKind, NodeId, NodeOptions, Queue, Request, RequestKind, Result, Scope,
    Transaction,
};
use blockplex_io::buffer::IoBuffer;
use blockplex_io::event_loop::yield_now;
use blockplex_tests::{Point, Probe, Stage, patience, reader, structure, writer};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Runs a change that has to fail and leave no trace; the disk works before and after.
fn fails(
    pair: &Pair,
    plan: impl FnOnce(&mut Transaction<'_>) -> Result<()> + Send + 'static,
) -> Error {
    let before = structure(&pair.stage.graph);
    let error = pair.stage.change(plan).expect_err("the change has to fail");
    assert_eq!(structure(&pair.stage.graph), before, "after {error}");
    assert_eq!((pair.upper.closed(), pair.lower.closed()), (0, 0));
    pair.stage.run(0, &pair.device, read(0)).expect("the disk works");
    assert!(!pair.device_hooks.rests() && !pair.other_hooks.rests());
    error
}

fn filter(change: &mut Transaction<'_>, name: &str, below: NodeId) -> Result<NodeId> {
    let children = [(Role::Filtered, below)];
    change.add_node(Some(name), Box::new(Probe::new(0).0), NodeOptions::default(), &children)
}

#[test]
fn whichever_action_of_five_fails_the_graph_is_what_it_was() {
    let pair = pair(1);
    let (node, backing, device) = (pair.node, pair.backing, pair.device.id());
    for bad in 0..5 {
        let error = fails(&pair, move |change| {
            for action in 0..5 {
                if action == bad {
                    // Refused in the plan: in use.
                    change.remove_node(backing)?;
                }
                match action {
                    0 => drop(filter(change, "first", node)?),
                    1 => {
                        let second = filter(change, "second", node)?;
                        change.insert_filter(node, second)?;
                    }
                    2 => {
                        let discard = DiscardMode::Unmap;
                        change
                            .set_options(node, NodeOptions { discard, ..NodeOptions::default() })?;
                    }
                    3 => drop(change.attach(node, Role::File, backing)?),
                    _ => change.set_root(device, None)?,
                }
            }
            Ok(())
        });
        assert_eq!(error.kind(), ErrorKind::Busy);
    }
}

#[test]
fn what_the_check_of_the_plan_refuses_leaves_no_trace() {
    let pair = pair(1);
    let (node, backing) = (pair.node, pair.backing);
    let error = fails(&pair, move |change| change.attach(backing, Role::File, node).map(drop));
    assert!(error.to_string().contains("loop"), "{error}");
    let error = fails(&pair, move |change| {
        let second = change.add_origin("second", writer(), None);
        change.set_root(second.id(), Some(node))
    });
    assert_eq!(error.kind(), ErrorKind::PermissionConflict);
    let error = fails(&pair, |change| {
        let options = NodeOptions::default();
        change.add_node(Some("node"), Box::new(Probe::new(0).0), options, &[]).map(drop)
    });
    assert_eq!(error.kind(), ErrorKind::Exists);
    let error = fails(&pair, |change| {
        let options = NodeOptions::default();
        change.add_node(Some("#mine"), Box::new(Probe::new(0).0), options, &[]).map(drop)
    });
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    let error = fails(&pair, move |change| {
        let options = NodeOptions { read_only: true, ..NodeOptions::default() };
        change.set_options(node, options)
    });
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
}

#[test]
fn a_driver_that_refuses_its_permissions_makes_those_asked_before_it_forget() {
    let stage = Stage::new(1);
    let probes: Vec<_> = (0..4).map(|_| Probe::new(4096)).collect();
    let (drivers, handles): (Vec<_>, Vec<_>) = probes.into_iter().unzip();
    let names = ["n0", "n1", "n2", "n3"];
    let nodes: Vec<NodeId> =
        drivers.into_iter().zip(names).map(|(driver, name)| stage.add(name, driver, &[])).collect();
    for bad in 0..4 {
        let before = structure(&stage.graph);
        let seen: Vec<usize> = handles.iter().map(|handle| handle.access_changes().len()).collect();
        handles[bad].refuse_access();
        let roots = nodes.clone();
        let error = stage
            .change(move |change| {
                for root in roots {
                    let origin = change.add_origin("user", writer(), None);
                    change.set_root(origin.id(), Some(root))?;
                }
                Ok(())
            })
            .unwrap_err();
        assert_eq!((error.kind(), error.node()), (ErrorKind::Locked, Some(names[bad])));
        assert_eq!(structure(&stage.graph), before);
        for (index, handle) in handles.iter().enumerate() {
            let changes = handle.access_changes().split_off(seen[index]);
            let aborted = matches!(
                changes.as_slice(),
                [AccessChange::Prepare(_), AccessChange::Abort(_)] | []
            );
            assert!(aborted, "{changes:?}");
            assert!(index != bad || changes.is_empty());
        }
    }
}

#[test]
fn a_refused_reopen_leaves_the_options_of_all_nodes() {
    let pair = pair(1);
    let before = structure(&pair.stage.graph);
    let (graph, node, backing) = (pair.stage.graph.clone(), pair.node, pair.backing);
    for refused in [true, false] {
        if refused {
            pair.lower.refuse_reopen();
        }
        let graph = graph.clone();
        let result: Result<()> = pair.stage.on(0, move |_| async move {
            let mut change = graph.begin().await;
            let options = NodeOptions { discard: DiscardMode::Unmap, ..NodeOptions::default() };
            change.set_options(node, options)?;
            change.reopen(node, Box::new(())).await?;
            change.reopen(backing, Box::new(())).await?;
            let drained = change.drain().await?;
            change.commit(&drained).await
        });
        assert_eq!(result.is_err(), refused);
        assert_eq!(structure(&pair.stage.graph) == before, refused);
        let reopened = if refused { (0, 0) } else { (1, 1) };
        assert_eq!((pair.upper.reopened(), pair.lower.reopened()), reopened);
    }
}

#[test]
fn a_reopen_waits_for_the_request_that_runs_on_the_old_options() {
    let pair = pair(1);
    pair.upper.shut(Point::BeforeSubmit);
    let pending = pair.stage.start(0, &pair.device, read(0));
    pair.upper.wait_stopped(1);
    let (graph, node) = (pair.stage.graph.clone(), pair.node);
    let reopen = pair.stage.spawn(0, move |_| async move {
        let mut change = graph.begin().await;
        change.reopen(node, Box::new(())).await?;
        let drained = change.drain().await?;
        change.commit(&drained).await
    });
    patience::until("the reopen's drain", || pair.device_hooks.rests());
    assert_eq!(pair.upper.reopened(), 0);
    pair.upper.open(Point::BeforeSubmit);
    pair.stage.wait("the reopen", reopen).unwrap().unwrap();
    assert!(pair.stage.finish(pending).result.is_ok());
    assert_eq!(pair.upper.reopened(), 1);
}

#[test]
fn a_section_that_does_not_cover_the_change_is_no_proof() {
    let pair = pair(1);
    let before = structure(&pair.stage.graph);
    let stranger = Stage::new(0);
    let alien = stranger.add("alien", Probe::new(0).0, &[]);
    let proofs = [
        // Only the users of the backing node that are not users of the node rest.
        pair.stage.drain(Scope::Origin(pair.other.id())),
        stranger.drain(Scope::node(alien)),
        stranger.drain(Scope::Everything),
    ];
    for proof in proofs {
        let (graph, node, backing) = (pair.stage.graph.clone(), pair.node, pair.backing);
        let error = pair.stage.on(0, move |_| async move {
            let mut change = graph.begin().await;
            change.detach(node, backing).unwrap();
            change.commit(&proof).await.unwrap_err()
        });
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.to_string().contains("does not cover"), "{error}");
        assert_eq!(structure(&pair.stage.graph), before);
    }
    // A wider section than needed is one.
    let everything = pair.stage.drain(Scope::Everything);
    let (graph, node, backing) = (pair.stage.graph.clone(), pair.node, pair.backing);
    pair.stage.on(0, move |_| async move {
        let mut change = graph.begin().await;
        change.detach(node, backing).unwrap();
        change.commit(&everything).await.unwrap();
    });
    assert_ne!(structure(&pair.stage.graph), before);
}

#[test]
fn a_plan_that_is_dropped_lets_the_next_one_begin_and_changes_nothing() {
    let pair = pair(1);
    let before = structure(&pair.stage.graph);
    let (graph, node, device) = (pair.stage.graph.clone(), pair.node, pair.device.id());
    pair.stage.on(0, move |_| async move {
        let mut dropped = graph.begin().await;
        dropped.set_root(device, None).unwrap();
        dropped.remove_node(node).unwrap();
        drop(dropped);
        let mut drained_and_dropped = graph.begin().await;
        drained_and_dropped.set_root(device, None).unwrap();
        let drained = drained_and_dropped.drain().await.unwrap();
        drop(drained_and_dropped);
        drop(drained);
    });
    assert_eq!(structure(&pair.stage.graph), before);
    assert!(!pair.device_hooks.rests());
    pair.stage.run(0, &pair.device, read(0)).unwrap();
}

#[test]
fn a_node_is_removed_and_closed_once() {
    let stage = Stage::new(0);
    let (driver, probe) = Probe::new(4096);
    let node = stage.add("node", driver, &[]);
    let removals: Vec<_> =
        (0..2).map(|_| stage.start_change(move |change| change.remove_node(node))).collect();
    let results: Vec<Result<()>> =
        removals.into_iter().map(|removal| stage.wait("a removal", removal).unwrap()).collect();
    assert!(results[0].is_ok());
    assert_eq!(results[1].as_ref().unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(probe.closed(), 1);
    patience::until("the driver to be freed", || probe.is_freed());
}

#[test]
fn a_node_in_use_is_not_removed_and_the_error_names_the_user() {
    let pair = pair(1);
    let (node, backing) = (pair.node, pair.backing);
    let error = fails(&pair, move |change| change.remove_node(backing));
    assert!(error.to_string().contains("node 'node' uses it"), "{error}");
    let error = fails(&pair, move |change| change.remove_node(node));
    assert!(error.to_string().contains("backend 'device' uses it"), "{error}");
}

#[test]
fn a_request_ends_on_the_graph_that_admitted_it() {
    let stage = Stage::new(1);
    let (driver, old) = Probe::new(4096);
    let old_node = stage.add("old", driver, &[]);
    let (driver, new) = Probe::new(4096);
    let new_node = stage.add("new", driver, &[]);
    let (user, _) = stage.origin("user", old_node, writer());
    old.shut_for(Point::BeforeSubmit, 1);
    let write = stage.start(0, &user, Request::write(0, IoBuffer::from_slice(&[7; 512])));
    old.wait_stopped(1);
    let id = user.id();
    let change = stage.start_change(move |change| change.set_root(id, Some(new_node)));
    let late = stage.start(0, &user, Request::write(0, IoBuffer::from_slice(&[9; 512])));
    stage.on(0, |_| async { yield_now().await });
    old.open(Point::BeforeSubmit);
    stage.wait("the change", change).unwrap().unwrap();
    assert!(stage.finish(write).result.is_ok() && stage.finish(late).result.is_ok());
    assert_eq!(old.bytes()[..512], [7; 512]);
    let late_went_to_the_old = old.calls(RequestKind::Write) == 2;
    assert_eq!(new.bytes()[0] == 9, !late_went_to_the_old, "to one of them, whole");
}

#[test]
fn two_changes_at_once_happen_one_after_the_other() {
    let pair = pair(2);
    let node = pair.node;
    let changes: Vec<_> = (0..2)
        .map(|index| {
            let graph = pair.stage.graph.clone();
            pair.stage.spawn(index, move |_| async move {
                for round in 0..50 {
                    let mut change = graph.begin().await;
                    let name = format!("filter-{index}-{round}");
                    let added = filter(&mut change, &name, node)?;
                    change.insert_filter(node, added)?;
                    let drained = change.drain().await?;
                    change.commit(&drained).await?;
                    drop(drained);
                    let mut change = graph.begin().await;
                    change.drop_filter(added)?;
                    change.remove_node(added)?;
                    let drained = change.drain().await?;
                    change.commit(&drained).await?;
                }
                Ok::<(), Error>(())
            })
        })
        .collect();
    for change in changes {
        pair.stage.wait("changes", change).unwrap().unwrap();
    }
    assert_eq!(pair.stage.root_name(&pair.device).as_deref(), Some("node"));
    assert_eq!(pair.stage.graph.topology().nodes().count(), 2);
}

#[test]
fn a_loop_that_ends_with_a_request_stuck_in_a_driver_gives_its_admission_back() {
    let mut stage = Stage::new(1);
    let (driver, probe) = Probe::new(4096);
    let node = stage.add("node", driver, &[]);
    let (user, _) = stage.origin("user", node, reader());
    probe.shut(Point::BeforeSubmit);
    let stuck = stage.start(0, &user, read(0));
    probe.wait_stopped(1);
    let section = stage.graph.begin_drain(Scope::node(node)).unwrap();
    assert!(!section.is_settled());
    stage.loops.pop().unwrap().join();
    drop(stage.wait("the section", section.settle()));
    assert!(stage.wait("the stuck request", stuck).is_err(), "its task was cancelled");
    assert_eq!(probe.running(), 0);
    stage.change(move |change| change.remove_origin(user.id())).unwrap();
}

#[test]
fn queues_that_come_and_go_while_the_graph_changes_see_one_version_each() {
    let pair = pair(2);
    let stop = Arc::new(AtomicBool::new(false));
    let visitors: Vec<_> = (0..2)
        .map(|index| {
            let (graph, origin) = (pair.stage.graph.clone(), pair.device.clone());
            let stopped = stop.clone();
            pair.stage.spawn(index, move |local| async move {
                let mut visits = 0;
                while !stopped.load(Ordering::Relaxed) {
                    let queue = Queue::open(&graph, &origin, &local, "visitor");
                    queue.request(read(0)).await.result.unwrap();
                    visits += 1;
                }
                visits
            })
        })
        .collect();
    let node = pair.node;
    for _ in 0..100 {
        let added = pair.stage.change(move |change| {
            let added = filter(change, "passing", node)?;
            change.insert_filter(node, added)?;
            Ok(added)
        });
        let added = added.unwrap();
        pair.stage
            .change(move |change| {
                change.drop_filter(added)?;
                change.remove_node(added)
            })
            .unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    let visits: u64 =
        visitors.into_iter().map(|visitor| pair.stage.wait("a visitor", visitor).unwrap()).sum();
    assert_eq!(pair.device.statistics().of(RequestKind::Read).operations, visits);
    assert_eq!(pair.upper.calls(RequestKind::Read) as u64, visits);
}
