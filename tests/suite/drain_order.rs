//! Drains from several threads: overlapping, in any order, against each other.

use crate::drain::{pair, read};
use blockplex_graph::driver::Role;
use blockplex_graph::{NodeId, Scope};
use blockplex_tests::{Point, Probe, Stage, patience, reader};
use std::thread;

/// Two users over two nodes that share a third.
fn diamond() -> (Stage, [NodeId; 3], Vec<blockplex_tests::Hooks>, Vec<blockplex_tests::ProbeHandle>)
{
    let stage = Stage::new(2);
    let (driver, shared) = Probe::new(4096);
    let bottom = stage.add("bottom", driver, &[]);
    let (driver, left) = Probe::new(0);
    let left_node = stage.add("left", driver, &[(Role::Filtered, bottom)]);
    let (driver, right) = Probe::new(0);
    let right_node = stage.add("right", driver, &[(Role::Filtered, bottom)]);
    let (_, left_hooks) = stage.origin("left user", left_node, reader());
    let (_, right_hooks) = stage.origin("right user", right_node, reader());
    let nodes = [left_node, right_node, bottom];
    (stage, nodes, vec![left_hooks, right_hooks], vec![left, right, shared])
}

#[test]
fn overlapping_drains_of_two_threads_in_opposite_order_do_not_deadlock() {
    let (stage, [left, right, bottom], hooks, _) = diamond();
    thread::scope(|scope| {
        for order in [[left, right, bottom], [bottom, right, left]] {
            let graph = &stage.graph;
            scope.spawn(move || {
                for _ in 0..300 {
                    let held: Vec<_> = order
                        .iter()
                        .map(|node| patience::wait("a drain", graph.drain(Scope::node(*node))))
                        .collect();
                    assert!(held.iter().all(Result::is_ok));
                }
            });
        }
    });
    for hook in hooks {
        assert_eq!(hook.begun(), hook.ended());
        assert!(hook.begun() > 0);
    }
}

#[test]
fn two_loops_drain_overlapping_subtrees_at_once() {
    let (stage, [left, right, _], _, _) = diamond();
    let drains: Vec<_> = [left, right]
        .into_iter()
        .enumerate()
        .map(|(index, node)| {
            let graph = stage.graph.clone();
            stage.spawn(index, move |_| async move {
                for _ in 0..300 {
                    drop(graph.drain(Scope::Subtree(node)).await.unwrap());
                }
            })
        })
        .collect();
    for drain in drains {
        stage.wait("drains of a loop", drain).unwrap();
    }
}

#[test]
fn sections_of_three_threads_that_end_in_any_order_keep_requests_out_until_the_last() {
    let pair = pair(1);
    thread::scope(|scope| {
        for thread in 0..3u64 {
            let pair = &pair;
            scope.spawn(move || {
                let mut held = std::collections::VecDeque::new();
                for round in 0..200u64 {
                    let drained = pair.stage.drain(match (round + thread) % 3 {
                        0 => Scope::node(pair.node),
                        1 => Scope::Subtree(pair.node),
                        _ => Scope::Everything,
                    });
                    pair.upper.forbid();
                    held.push_back(drained);
                    if held.len() > 2 {
                        // Now the oldest, now the newest.
                        let ended = if round % 2 == 0 { held.pop_front() } else { held.pop_back() };
                        pair.upper.allow();
                        drop(ended);
                    }
                }
                held.drain(..).for_each(|drained| {
                    pair.upper.allow();
                    drop(drained);
                });
            });
        }
        let pair = &pair;
        scope.spawn(move || {
            for _ in 0..50 {
                pair.stage.run(0, &pair.device, read(0)).unwrap();
            }
        });
    });
    assert_eq!(pair.upper.violations(), 0);
    assert_eq!(pair.device_hooks.begun(), pair.device_hooks.ended());
}

#[test]
fn a_kick_that_comes_during_the_section_is_served_after_it_without_another() {
    let pair = pair(1);
    let drained = pair.stage.drain(Scope::node(pair.node));
    // The guest's only kick: nobody touches the queue again.
    let kicked = pair.stage.start(0, &pair.device, read(0));
    pair.settle_loops();
    assert_eq!(pair.upper.all_calls(), 0);
    drop(drained);
    assert!(pair.stage.finish(kicked).result.is_ok());
}

#[test]
fn a_drain_waits_for_each_of_several_requests_released_in_any_order() {
    for order in [[0, 0, 0], [2, 1, 0], [1, 1, 0]] {
        let pair = pair(2);
        pair.lower.shut(Point::BeforeSubmit);
        let pending: Vec<_> = (0..3)
            .map(|number| pair.stage.start(number % 2, &pair.device, read(512 * number as u64)))
            .collect();
        pair.lower.wait_stopped(3);
        let section = pair.stage.graph.begin_drain(Scope::node(pair.node)).unwrap();
        for nth in order {
            assert!(!section.is_settled());
            pair.lower.release(nth);
        }
        drop(pair.stage.wait("the section", section.settle()));
        for request in pending {
            assert!(pair.stage.finish(request).result.is_ok());
        }
    }
}
