//! The graph changes while sections last: what is attached is drained, what goes was drained.

use crate::drain::{pair, read};
use blockplex_graph::driver::Role;
use blockplex_graph::{Completion, ErrorKind, NodeOptions, Request, RequestKind, Result, Scope};
use blockplex_io::event_loop::JoinHandle;
use blockplex_tests::{Hooks, Point, Probe, Stage, patience, reader, sharing_writer, writer};
use parking_lot::Mutex;
use std::sync::Arc;

#[test]
fn an_origin_that_is_born_in_drain_everything_is_drained_until_it_ends() {
    let pair = pair(1);
    let drained = pair.stage.drain(Scope::Everything);
    let (driver, born) = Probe::new(4096);
    let new = pair.stage.add("new", driver, &[]);
    let (origin, hooks) = pair.stage.origin("new user", new, writer());
    assert_eq!((hooks.begun(), hooks.ended()), (1, 0));
    let waiting = pair.stage.start(0, &origin, read(0));
    let (device, node) = (pair.device.id(), pair.node);
    pair.stage
        .change(move |change| {
            change.remove_origin(device)?;
            change.remove_node(node)
        })
        .unwrap();
    assert_eq!(pair.upper.closed(), 1);
    pair.settle_loops();
    assert_eq!(born.all_calls(), 0);
    drop(drained);
    assert!(pair.stage.finish(waiting).result.is_ok());
    assert_eq!((hooks.begun(), hooks.ended()), (1, 1));
}

#[test]
fn an_overlay_put_on_a_drained_node_is_drained_and_both_go_on_with_one_end() {
    let pair = pair(1);
    let drained = pair.stage.drain(Scope::node(pair.node));
    let node = pair.node;
    let (driver, overlay) = Probe::new(0);
    pair.stage
        .change(move |change| {
            let children = [(Role::Filtered, node)];
            let top = change.add_node(
                Some("top"),
                Box::new(driver),
                NodeOptions::default(),
                &children,
            )?;
            change.insert_filter(node, top)
        })
        .unwrap();
    overlay.forbid();
    let waiting = pair.stage.start(0, &pair.device, read(0));
    pair.settle_loops();
    assert_eq!((pair.device_hooks.begun(), pair.device_hooks.ended()), (1, 0));
    overlay.allow();
    drop(drained);
    assert!(pair.stage.finish(waiting).result.is_ok());
    assert_eq!(overlay.calls(RequestKind::Read), 1);
    assert_eq!((pair.device_hooks.begun(), pair.device_hooks.ended()), (1, 1));
    assert_eq!(overlay.violations(), 0);
}

#[test]
fn a_new_user_of_a_drained_node_waits_like_the_old_ones() {
    let pair = pair(1);
    let drained = pair.stage.drain(Scope::node(pair.node));
    let (late, hooks) = pair.stage.origin("late", pair.node, reader());
    assert!(hooks.rests());
    let waiting = pair.stage.start(0, &late, read(0));
    pair.settle_loops();
    assert_eq!(pair.upper.all_calls(), 0);
    drop(drained);
    assert!(pair.stage.finish(waiting).result.is_ok());
}

#[test]
fn a_drain_survives_that_the_read_it_waited_for_removes_the_parent() {
    let pair = pair(1);
    pair.lower.shut(Point::BeforeSubmit);
    let read = pair.stage.start(0, &pair.device, read(0));
    pair.lower.wait_stopped(1);
    let section = pair.stage.graph.begin_drain(Scope::node(pair.backing)).unwrap();
    // When the read has ended, its task drops the last users of the parent.
    let (graph, device, node) = (pair.stage.graph.clone(), pair.device.id(), pair.node);
    let removal = pair.stage.spawn(0, move |_| async move {
        assert!(read.await.unwrap().result.is_ok());
        let mut change = graph.begin().await;
        change.remove_origin(device)?;
        change.remove_node(node)?;
        let drained = change.drain().await?;
        change.commit(&drained).await
    });
    pair.lower.open(Point::BeforeSubmit);
    let drained = pair.stage.wait("the section", section.settle());
    pair.stage.wait("the removal", removal).unwrap().unwrap();
    assert_eq!(pair.upper.closed(), 1);
    assert!(pair.stage.graph.topology().node(pair.node).is_none());
    drop(drained);
    pair.stage.run(0, &pair.other, crate::drain::read(0)).unwrap();
    let upper = pair.upper.clone();
    drop(pair.upper);
    // The last view of the parent lies in the device's queue, which ended with its task.
    patience::until("the parent's memory to be freed", || upper.is_freed());
}

#[test]
fn a_drain_survives_that_the_read_it_waited_for_detaches_all_children() {
    for scope_is_everything in [true, false] {
        let pair = pair(1);
        pair.lower.shut(Point::BeforeSubmit);
        let read = pair.stage.start(0, &pair.device, read(0));
        pair.lower.wait_stopped(1);
        let scope = if scope_is_everything { Scope::Everything } else { Scope::Subtree(pair.node) };
        let section = pair.stage.graph.begin_drain(scope).unwrap();
        let (graph, node, backing) = (pair.stage.graph.clone(), pair.node, pair.backing);
        let detach = pair.stage.spawn(0, move |_| async move {
            assert!(read.await.unwrap().result.is_ok());
            let mut change = graph.begin().await;
            change.detach(node, backing)?;
            let drained = change.drain().await?;
            change.commit(&drained).await
        });
        pair.lower.open(Point::BeforeSubmit);
        let drained = pair.stage.wait("the section", section.settle());
        pair.stage.wait("the detaching", detach).unwrap().unwrap();
        let topology = pair.stage.graph.topology();
        assert!(topology.node(node).unwrap().edges().is_empty());
        assert!(!pair.stage.graph.gates_of([backing]).is_empty(), "the other user stays");
        // Detached or not: the section keeps what it has until it ends.
        assert!(pair.other_hooks.rests() && pair.device_hooks.rests());
        drop(drained);
        assert!(!pair.other_hooks.rests() && !pair.device_hooks.rests());
    }
}

/// A parent with children A and B in that order, a spare C, and a user above.
struct Family {
    stage: Stage,
    parent: blockplex_graph::NodeId,
    children: [blockplex_graph::NodeId; 3],
    user: Arc<blockplex_graph::Origin>,
    hooks: Hooks,
    first: blockplex_tests::ProbeHandle,
}

fn family() -> Family {
    let stage = Stage::new(1);
    let (driver, first) = Probe::new(4096);
    let a = stage.add("a", driver, &[]);
    let b = stage.add("b", Probe::new(4096).0, &[]);
    let c = stage.add("c", Probe::new(4096).0, &[]);
    let parent = stage.add("parent", Probe::new(0).0, &[(Role::Filtered, a), (Role::Backing, b)]);
    let (user, hooks) = stage.origin("user", parent, reader());
    hooks.reset();
    Family { stage, parent, children: [a, b, c], user, hooks, first }
}

impl Family {
    fn swap_b_for_c(
        &self,
    ) -> impl FnOnce(&mut blockplex_graph::Transaction<'_>) -> Result<()> + use<> {
        let ([_, b, c], parent) = (self.children, self.parent);
        move |change| change.replace_child(parent, b, c)
    }

    fn check(&self) {
        let topology = self.stage.graph.topology();
        let view = topology.node(self.parent).expect("it stays");
        let children: Vec<_> = view.edges().iter().map(|edge| edge.child).collect();
        assert_eq!(children, [self.children[0], self.children[2]]);
        assert_eq!(topology.nodes().count(), 4);
        assert!(!topology.has_parents(self.children[1]) && topology.has_parents(self.children[2]));
    }
}

#[test]
fn a_completion_swaps_a_child_while_the_subtree_is_being_drained() {
    let family = family();
    family.first.shut(Point::BeforeSubmit);
    let read = family.stage.start(0, &family.user, read(0));
    family.first.wait_stopped(1);
    let section = family.stage.graph.begin_drain(Scope::Subtree(family.parent)).unwrap();
    let (graph, swap) = (family.stage.graph.clone(), family.swap_b_for_c());
    let change = family.stage.spawn(0, move |_| async move {
        assert!(read.await.unwrap().result.is_ok());
        let mut change = graph.begin().await;
        swap(&mut change)?;
        let drained = change.drain().await?;
        change.commit(&drained).await
    });
    family.first.open(Point::BeforeSubmit);
    let drained = family.stage.wait("the section", section.settle());
    family.stage.wait("the swap", change).unwrap().unwrap();
    assert_eq!((family.hooks.begun(), family.hooks.ended()), (1, 0));
    drop(drained);
    family.check();
    assert_eq!((family.hooks.begun(), family.hooks.ended()), (1, 1));
}

/// What a hook starts, for the test to wait for.
type Started = Arc<Mutex<Vec<JoinHandle<Result<()>>>>>;

#[test]
fn drain_begin_itself_starts_a_change_of_what_is_being_drained() {
    let family = Arc::new(family());
    let started = Started::default();
    let (inside, log) = (Arc::downgrade(&family), started.clone());
    family.hooks.on_begin(move || {
        if let Some(family) = inside.upgrade()
            && log.lock().is_empty()
        {
            let change = family.stage.start_change(family.swap_b_for_c());
            log.lock().push(change);
        }
    });
    let drained = family.stage.drain(Scope::Subtree(family.parent));
    let change = started.lock().pop().unwrap();
    family.stage.wait("the swap", change).unwrap().unwrap();
    assert!(family.hooks.rests());
    drop(drained);
    family.check();
    assert_eq!(family.hooks.begun(), family.hooks.ended());
}

#[test]
fn drain_end_starts_a_change_that_takes_the_node_from_two_parents() {
    let stage = Arc::new(Stage::new(1));
    let (driver, bottom) = Probe::new(4096);
    let base = stage.add("base", driver, &[]);
    let spare = stage.add("spare", Probe::new(4096).0, &[]);
    let left = stage.add("left", Probe::new(0).0, &[(Role::Filtered, base)]);
    let right = stage.add("right", Probe::new(0).0, &[(Role::Filtered, base)]);
    let (left_user, hooks) = stage.origin("left user", left, reader());
    let (right_user, _) = stage.origin("right user", right, reader());
    let started = Started::default();
    let (weak, log) = (Arc::downgrade(&stage), started.clone());
    hooks.on_end(move || {
        if let Some(stage) = weak.upgrade()
            && log.lock().is_empty()
        {
            let change = stage.start_change(move |change| {
                change.replace_child(left, base, spare)?;
                change.replace_child(right, base, spare)?;
                change.remove_node(base)
            });
            log.lock().push(change);
        }
    });
    drop(stage.drain(Scope::node(base)));
    let change = started.lock().pop().unwrap();
    stage.wait("the change", change).unwrap().unwrap();
    assert_eq!(bottom.closed(), 1);
    stage.run(0, &left_user, read(0)).unwrap();
    stage.run(0, &right_user, read(0)).unwrap();
    assert_eq!(bottom.all_calls(), 0);
    assert_eq!(hooks.begun(), hooks.ended());
}

#[test]
fn dropping_the_middle_of_a_chain_waits_for_the_request_in_it_and_keeps_the_rest() {
    let stage = Stage::new(1);
    let (driver, base_probe) = Probe::new(4096);
    let base = stage.add("base", driver, &[]);
    let (driver, middle_probe) = Probe::new(0);
    let middle = stage.add("middle", driver, &[(Role::Backing, base)]);
    let top = stage.add("top", Probe::new(0).0, &[(Role::Backing, middle)]);
    let (user, _) = stage.origin("user", top, reader());
    base_probe.shut_for(Point::BeforeSubmit, 1);
    let pending = stage.start(0, &user, read(0));
    base_probe.wait_stopped(1);
    let change = stage.start_change(move |change| {
        change.replace_child(top, middle, base)?;
        change.remove_node(middle)
    });
    stage.on(0, |_| async { blockplex_io::event_loop::yield_now().await });
    assert_eq!(middle_probe.closed(), 0);
    base_probe.open(Point::BeforeSubmit);
    stage.wait("the change", change).unwrap().unwrap();
    assert!(stage.finish(pending).result.is_ok());
    assert_eq!(middle_probe.closed(), 1);
    stage.run(0, &user, read(0)).unwrap();
    assert_eq!(
        (middle_probe.calls(RequestKind::Read), base_probe.calls(RequestKind::Read)),
        (1, 2)
    );
}

#[test]
fn replacing_a_child_mid_drain_keeps_the_parent_drained_exactly_as_long_as_needed() {
    for (old_drained, new_drained) in [(false, false), (false, true), (true, false), (true, true)] {
        let stage = Stage::new(1);
        let (driver, old_probe) = Probe::new(4096);
        let old = stage.add("old", driver, &[]);
        let (driver, new_probe) = Probe::new(4096);
        let new = stage.add("new", driver, &[]);
        let parent = stage.add("parent", Probe::new(0).0, &[(Role::Filtered, old)]);
        let (user, hooks) = stage.origin("user", parent, sharing_writer());
        old_probe.shut_for(Point::BeforeSubmit, 1);
        let pending = stage.start(0, &user, read(0));
        old_probe.wait_stopped(1);
        // The sections have begun and not settled when the change comes.
        let old_section = old_drained.then(|| stage.graph.begin_drain(Scope::node(old)).unwrap());
        let new_section = new_drained.then(|| stage.graph.begin_drain(Scope::node(new)).unwrap());
        let change = stage.start_change(move |change| change.replace_child(parent, old, new));
        old_probe.open(Point::BeforeSubmit);
        stage.wait("the replacement", change).unwrap().unwrap();
        assert!(stage.finish(pending).result.is_ok(), "what was admitted ends on the old child");
        assert_eq!(hooks.rests(), old_drained || new_drained);
        if new_drained {
            new_probe.forbid();
        }
        let late = stage.start(0, &user, read(512));
        stage.on(0, |_| async { blockplex_io::event_loop::yield_now().await });
        assert_eq!(new_probe.calls(RequestKind::Read) > 0, !(old_drained || new_drained));
        drop(old_section);
        stage.on(0, |_| async { blockplex_io::event_loop::yield_now().await });
        assert_eq!(hooks.rests(), new_drained);
        if new_drained {
            new_probe.allow();
        }
        drop(new_section);
        assert!(stage.finish(late).result.is_ok());
        assert_eq!(
            (old_probe.calls(RequestKind::Read), new_probe.calls(RequestKind::Read)),
            (1, 1)
        );
        assert_eq!(new_probe.violations(), 0);
        assert!(!hooks.rests());
    }
}

#[test]
fn a_request_that_waits_when_its_backend_goes_ends_once_with_no_medium() {
    let pair = pair(1);
    let drained = pair.stage.drain(Scope::node(pair.node));
    let waiting = pair.stage.start(0, &pair.device, read(0));
    pair.settle_loops();
    let device = pair.device.id();
    pair.stage.change(move |change| change.remove_origin(device)).unwrap();
    drop(drained);
    let Completion { result, vector, .. } = pair.stage.finish(waiting);
    assert_eq!(result.unwrap_err().kind(), ErrorKind::NoMedium);
    assert_eq!(vector.len(), 512, "the memory comes back");
    assert_eq!(pair.upper.all_calls(), 0);
}

#[test]
fn removing_a_backend_waits_for_its_flush() {
    let pair = pair(1);
    pair.upper.shut(Point::BeforeSubmit);
    let flush = pair.stage.start(0, &pair.device, Request::flush());
    pair.upper.wait_stopped(1);
    let (device, node) = (pair.device.id(), pair.node);
    let removal = pair.stage.start_change(move |change| {
        change.remove_origin(device)?;
        change.remove_node(node)
    });
    pair.settle_loops();
    assert_eq!(pair.upper.closed(), 0);
    pair.upper.open(Point::BeforeSubmit);
    pair.stage.wait("the removal", removal).unwrap().unwrap();
    assert!(pair.stage.finish(flush).result.is_ok());
    assert_eq!(pair.upper.closed(), 1);
}
