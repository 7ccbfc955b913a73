//! Permissions: which users of a node go together, checked for a change as a whole.

use crate::drain::read;
use blockplex_graph::driver::Role;
use blockplex_graph::{Access, ErrorKind, NodeOptions, Permissions, Request};
use blockplex_io::buffer::IoBuffer;
use blockplex_tests::{Probe, Stage, reader, sharing_writer, structure, writer};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// An edge that writes and lets nobody else write, whatever the parents want.
fn exclusive(_: Role, parents: Access) -> Access {
    Access { needed: parents.needed | Permissions::WRITE, shared: !Permissions::WRITE }
}

/// An edge that needs nothing.
const NOTHING: Access = Access { needed: Permissions::NONE, shared: Permissions::ALL };

#[test]
fn a_filter_that_would_bring_a_second_writer_is_not_inserted() {
    let stage = Stage::new(0);
    let node = stage.add("node", Probe::new(4096).0, &[]);
    let filter = stage.add("filter", Probe::new(0).0, &[]);
    let (_owner, _) = stage.origin("owner", node, writer());
    let (_second, _) = stage.origin("second", filter, sharing_writer());
    let before = structure(&stage.graph);
    let error = stage
        .change(move |change| {
            change.attach(filter, Role::Filtered, node)?;
            change.insert_filter(node, filter)
        })
        .unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::PermissionConflict, libc::EPERM));
    assert_eq!(structure(&stage.graph), before);
}

#[test]
fn a_filter_over_an_overlay_takes_the_nodes_users_but_not_the_overlays_edge() {
    let stage = Stage::new(0);
    let node = stage.add("node", Probe::new(4096).0, &[]);
    let target = stage.add("target", Probe::new(0).0, &[(Role::Backing, node)]);
    let filter =
        stage.add("filter", Probe::new(0).0, &[(Role::File, target), (Role::Filtered, node)]);
    let (user, _) = stage.origin("user", node, reader());
    stage.change(move |change| change.insert_filter(node, filter)).unwrap();
    let topology = stage.graph.topology();
    assert_eq!(stage.root_name(&user).as_deref(), Some("filter"));
    assert_eq!(topology.node(target).unwrap().edges()[0].child, node);
    let below: Vec<_> =
        topology.node(filter).unwrap().edges().iter().map(|edge| edge.child).collect();
    assert_eq!(below, [target, node]);
}

#[test]
fn the_exclusive_writer_of_a_shared_base_may_change_between_two_filters() {
    let stage = Stage::new(0);
    let base = stage.add("base", Probe::new(4096).0, &[]);
    let first = stage.add("first", Probe::new(0).0, &[(Role::Filtered, base)]);
    let second = stage.add("second", Probe::new(0).0, &[(Role::Filtered, base)]);
    let select_first = Arc::new(AtomicBool::new(true));
    let selected = select_first.clone();
    let top = Probe::new(0).0.rule(move |role, _| {
        let is_first = role == Role::File;
        if is_first == selected.load(Ordering::SeqCst) {
            Access { needed: Permissions::WRITE, shared: !Permissions::WRITE }
        } else {
            NOTHING
        }
    });
    let top = stage.add("top", top, &[(Role::File, first), (Role::Backing, second)]);
    for now_first in [false, true, false] {
        select_first.store(now_first, Ordering::SeqCst);
        // Any change of the node works its edges out anew.
        stage.change(move |change| change.set_options(top, NodeOptions::default())).unwrap();
        let topology = stage.graph.topology();
        let needs = |node| topology.node(node).unwrap().edges()[0].access.needed;
        assert_eq!(needs(first).contains(Permissions::WRITE), now_first);
        assert_eq!(needs(second).contains(Permissions::WRITE), !now_first);
    }
}

#[test]
fn an_exclusive_filter_is_replaced_by_another_over_the_same_base() {
    let stage = Stage::new(0);
    let base = stage.add("base", Probe::new(4096).0, &[]);
    let old = stage.add("old", Probe::new(0).0, &[(Role::Filtered, base)]);
    let (user, _) = stage.origin("user", old, writer());
    let new = stage.add("new", Probe::new(0).0, &[(Role::Filtered, base)]);
    stage.change(move |change| change.replace_node(old, new)).unwrap();
    assert_eq!(stage.root_name(&user).as_deref(), Some("new"));
    let topology = stage.graph.topology();
    assert!(topology.node(old).unwrap().edges()[0].access.needed.is_empty());
}

#[test]
fn a_filter_that_wants_its_child_for_itself_goes_under_an_exclusive_writer() {
    let stage = Stage::new(1);
    let node = stage.add("node", Probe::new(4096).0, &[]);
    let (user, _) = stage.origin("user", node, writer());
    let (greedy, _) = Probe::new(0);
    stage
        .change(move |change| {
            let children = [(Role::Filtered, node)];
            let greedy = Box::new(greedy.rule(exclusive));
            let filter =
                change.add_node(Some("greedy"), greedy, NodeOptions::default(), &children)?;
            change.insert_filter(node, filter)
        })
        .unwrap();
    assert_eq!(stage.root_name(&user).as_deref(), Some("greedy"));
    stage.run(0, &user, read(0)).unwrap();
}

#[test]
fn a_conflict_names_the_node_both_users_and_the_permission() {
    let stage = Stage::new(0);
    let node = stage.add("base", Probe::new(4096).0, &[]);
    stage.add("overlay", Probe::new(0).0, &[(Role::Backing, node)]);
    let error = stage.try_origin("disk0", node, writer()).unwrap_err();
    let text = error.to_string();
    for word in ["node 'base'", "backend 'disk0'", "child 'backing' of node 'overlay'", "'write"] {
        assert!(text.contains(word), "'{word}' is missing in: {text}");
    }
}

#[test]
fn a_read_only_node_takes_readers_and_no_writer() {
    let stage = Stage::new(1);
    let options = NodeOptions { read_only: true, ..NodeOptions::default() };
    let by_option = stage.add_with("option", Probe::new(4096).0, options, &[]);
    let by_nature = stage.add("nature", Probe::new(4096).0.read_only(), &[]);
    for node in [by_option, by_nature] {
        let error = stage.try_origin("writer", node, writer()).unwrap_err();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::ReadOnly, libc::EACCES));
        let (user, _) = stage.origin("reader", node, reader());
        stage.run(0, &user, read(0)).unwrap();
        stage.run(0, &user, Request::flush()).unwrap();
    }
}

#[test]
fn a_driver_cannot_do_to_a_child_what_its_edge_does_not_allow() {
    let stage = Stage::new(1);
    let (driver, below) = Probe::new(4096);
    let node = stage.add("node", driver, &[]);
    let (driver, _) = Probe::new(0);
    let filter = stage.add("filter", driver.rule(|_, _| reader()), &[(Role::Filtered, node)]);
    let (user, _) = stage.origin("user", filter, writer());
    stage.run(0, &user, read(0)).unwrap();
    for request in [
        Request::write(0, IoBuffer::zeroed(512)),
        Request::write_zeroes(0, 512).no_fallback(),
        Request::truncate(0),
    ] {
        let error = stage.run(0, &user, request).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
        assert!(error.to_string().contains("permission"), "{error}");
    }
    assert_eq!(below.all_calls(), 1);
}
