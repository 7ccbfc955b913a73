//! Backends: without a medium, closed, dropped, asked from the wrong thread, drained in time.

use blockplex::{Blockplex, OpenOptions, block_on};
use blockplex_graph::driver::Role;
use blockplex_graph::{ErrorKind, NodeOptions, Queue, Request, RequestKind, Scope};
use blockplex_io::buffer::IoVector;
use blockplex_tests::{Bench, Door, Point, Probe, Stage, patience, structure, writer};
use std::time::Duration;

/// Adds a probe under a name to a layer's graph.
fn add_probe(
    layer: &Blockplex,
    bench: &Bench,
    name: &'static str,
    probe: Probe,
) -> blockplex::NodeId {
    let graph = layer.graph().clone();
    let task = bench.thread.handle().spawn_with(move |_| async move {
        let mut change = graph.begin().await;
        let node = change.add_node(Some(name), Box::new(probe), NodeOptions::default(), &[])?;
        let drained = change.drain().await?;
        change.commit(&drained).await?;
        Ok::<_, blockplex::Error>(node)
    });
    let added = patience::wait("a node", task.expect("the loop runs")).expect("not cancelled");
    added.expect("the node is added")
}

#[test]
fn a_flush_without_a_medium_ends_with_enomedium_and_is_waited_for() {
    for everything in [false, true] {
        let stage = Stage::new(1);
        let origin =
            stage.change(|change| Ok(change.add_origin("empty drive", writer(), None))).unwrap();
        let (graph, empty) = (stage.graph.clone(), origin.clone());
        let scope = if everything { Scope::Everything } else { Scope::Origin(origin.id()) };
        let errno = stage.on(0, move |_local| async move {
            let queue = Queue::open(&graph, &empty, &_local, "queue");
            queue.submit(Request::flush(), 5);
            // It has ended, but nobody has been told: a section has to wait for that.
            assert_eq!(queue.in_flight(), 1);
            let section = graph.begin_drain(scope).unwrap();
            assert!(!section.is_settled());
            let mut completions = Vec::new();
            queue.ready().await;
            queue.reap(&mut completions, 8);
            drop(section.settle().await);
            let completion = completions.pop().unwrap();
            (completion.cookie, completion.result.unwrap_err().errno())
        });
        assert_eq!(errno, (5, libc::ENOMEDIUM));
    }
}

#[test]
fn every_kind_of_request_to_a_closed_backend_ends_with_enomedium() {
    let bench = Bench::new();
    for door in Door::ALL {
        let disk = bench.open("driver=memory,size=1M").unwrap();
        bench.close(&disk).unwrap();
        bench.close(&disk).unwrap(); // once more is nothing
        for request in [
            Request::read(0, IoVector::zeroed(512)),
            Request::write(0, IoVector::zeroed(512)),
            Request::flush(),
            Request::discard(0, 512),
            Request::write_zeroes(0, 512),
            Request::block_status(0, 512),
            Request::truncate(0),
        ] {
            let error = bench.ask(door, &disk, request).unwrap_err();
            assert_eq!((error.kind(), error.errno()), (ErrorKind::NoMedium, libc::ENOMEDIUM));
        }
        assert_eq!(disk.length().unwrap_err().kind(), ErrorKind::NoMedium);
    }
    assert_eq!(bench.layer.graph().topology().nodes().count(), 0);
}

#[test]
fn closing_waits_for_the_running_request_and_ends_the_waiting_ones() {
    let bench = Bench::new();
    let (driver, probe) = Probe::new(4096);
    let node = add_probe(&bench.layer, &bench, "probe", driver);
    let disk = patience::wait("a backend", bench.layer.open_backend("disk", node, false)).unwrap();
    probe.shut_for(Point::BeforeSubmit, 1);
    let start = |disk: blockplex::Backend| {
        let task = bench.thread.handle().spawn_with(move |_| async move {
            let queue = disk.queue("test").unwrap();
            queue.request(Request::read(0, IoVector::zeroed(512))).await
        });
        task.unwrap()
    };
    let running = start(disk.clone());
    probe.wait_stopped(1);
    let section = bench.layer.graph().begin_drain(disk.scope()).unwrap();
    let waiting = start(disk.clone());
    let task = bench.thread.handle().spawn_with(|_| async {}).unwrap();
    patience::wait("the loop", task).unwrap();
    let closing = disk.clone();
    let close = bench.thread.handle().spawn_with(move |_| async move { closing.close().await });
    let close = close.unwrap();
    probe.open(Point::BeforeSubmit);
    assert!(patience::wait("the running read", running).unwrap().result.is_ok());
    patience::wait("the close", close).unwrap().unwrap();
    drop(section);
    let waited = patience::wait("the waiting read", waiting).unwrap();
    assert_eq!(waited.result.unwrap_err().kind(), ErrorKind::NoMedium);
    assert_eq!(probe.calls(RequestKind::Read), 1);
}

#[test]
fn a_backend_dropped_without_a_close_is_closed_in_the_background() {
    let bench = Bench::new();
    drop(bench.open("driver=raw,file.driver=memory,file.size=1M").unwrap());
    patience::until("the nodes to go", || bench.layer.graph().topology().nodes().count() == 0);
}

#[test]
fn a_layer_dropped_with_disks_open_and_requests_stuck_ends() {
    let bench = Bench::new();
    let (driver, probe) = Probe::new(4096);
    let node = add_probe(&bench.layer, &bench, "probe", driver);
    let disk = patience::wait("a backend", bench.layer.open_backend("disk", node, false)).unwrap();
    probe.shut(Point::BeforeSubmit);
    let user = disk.clone();
    let stuck = bench.thread.handle().spawn_with(move |_| async move {
        let queue = user.queue("test").unwrap();
        queue.request(Request::flush()).await
    });
    probe.wait_stopped(1);
    let Bench { layer, thread } = bench;
    drop((disk, layer));
    thread.join();
    assert!(patience::wait("the stuck request", stuck.unwrap()).is_err());
    assert_eq!(probe.running(), 0);
}

#[test]
fn a_blocking_call_on_a_loops_thread_is_refused_and_not_run() {
    let bench = Bench::new();
    let disk = bench.open("driver=memory,size=1M").unwrap();
    let user = disk.clone();
    let task = bench.thread.handle().spawn_with(move |_| async move {
        let error = user.blocking().write(0, b"never").unwrap_err();
        let nested = block_on(async {}).is_err();
        (error.kind(), error.errno(), nested)
    });
    let answer = patience::wait("the refusal", task.unwrap()).unwrap();
    assert_eq!(answer, (ErrorKind::OnLoopThread, libc::EDEADLK, true));
    bench.close(&disk).unwrap();
}

#[test]
fn a_queue_needs_a_loop() {
    let bench = Bench::new();
    let disk = bench.open("driver=memory,size=1M").unwrap();
    assert_eq!(disk.queue("test").unwrap_err().kind(), ErrorKind::InvalidArgument);
    bench.close(&disk).unwrap();
}

#[test]
fn a_drain_that_misses_its_deadline_names_backend_queue_and_request_and_lets_io_go_on() {
    let bench = Bench::new();
    let (driver, probe) = Probe::new(1 << 20);
    let node = add_probe(&bench.layer, &bench, "probe", driver);
    let disk = patience::wait("a backend", bench.layer.open_backend("disk7", node, false)).unwrap();
    probe.shut_for(Point::BeforeSubmit, 1);
    let user = disk.clone();
    let stuck = bench.thread.handle().spawn_with(move |_| async move {
        let queue = user.queue("virtqueue 3").unwrap();
        queue.request(Request::read(8192, IoVector::zeroed(4096))).await
    });
    probe.wait_stopped(1);
    let drain = bench.layer.drain_within(Scope::node(node), Duration::from_millis(5));
    let error = patience::wait("the deadline", drain).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::TimedOut, libc::ETIMEDOUT));
    let text = error.to_string();
    for word in ["backend 'disk7'", "virtqueue 3", "read 4096 bytes at 8192"] {
        assert!(text.contains(word), "'{word}' is missing in: {text}");
    }
    // The section has ended with the error: others go on.
    disk.blocking().read(0, &mut [0; 512]).unwrap();
    probe.open(Point::BeforeSubmit);
    assert!(patience::wait("the stuck read", stuck.unwrap()).unwrap().result.is_ok());
    let drain = bench.layer.drain_within(Scope::node(node), Duration::from_secs(20));
    drop(patience::wait("a drain in time", drain).unwrap());
    bench.close(&disk).unwrap();
}

#[test]
fn an_open_that_fails_half_way_leaves_no_node_behind() {
    let bench = Bench::new();
    let before = structure(bench.layer.graph());
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("small");
    std::fs::write(&path, [0; 512]).unwrap();
    let missing = directory.path().join("missing");
    for options in [
        "driver=raw,offset=2M,file.driver=memory,file.size=1M".to_owned(),
        "driver=raw,file.driver=memory,file.size=1M,unknown=1".to_owned(),
        "driver=raw,node-name=0,file.driver=memory,file.size=1M".to_owned(),
        "driver=raw,node-name=x,file.driver=memory,file.size=1M,file.node-name=x".to_owned(),
        "driver=raw,file.driver=nonsense".to_owned(),
        format!("driver=raw,offset=1M,file.driver=file,file.filename={}", path.display()),
        format!("driver=raw,file.driver=file,file.filename={}", missing.display()),
        format!("driver=raw,file.driver=file,file.filename={}", directory.path().display()),
    ] {
        assert!(bench.open(&options).is_err(), "{options}");
        assert_eq!(structure(bench.layer.graph()), before, "{options}");
    }
    // The file is not locked by what failed.
    let disk = bench.open(&format!("driver=file,filename={}", path.display())).unwrap();
    bench.close(&disk).unwrap();
}

#[test]
fn two_backends_share_a_named_node_and_it_stays_until_it_is_removed() {
    let bench = Bench::new();
    let options = OpenOptions::parse("driver=memory,size=1M,node-name=shared").unwrap();
    let node = patience::wait("a node", bench.layer.add_node(options)).unwrap();
    let writer = patience::wait("a", bench.layer.open_backend("a", node, false)).unwrap();
    let second = patience::wait("b", bench.layer.open_backend("b", node, false)).unwrap_err();
    assert_eq!(second.kind(), ErrorKind::PermissionConflict);
    let reader = patience::wait("c", bench.layer.open_backend("c", node, true)).unwrap();
    writer.blocking().write(0, b"seen").unwrap();
    assert_eq!(reader.blocking().read_to_vec(0, 4).unwrap(), b"seen");
    let error = patience::wait("the removal", bench.layer.remove_node(node)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    bench.close(&writer).unwrap();
    bench.close(&reader).unwrap();
    assert_eq!(bench.layer.find_node("shared").unwrap(), node);
    patience::wait("the removal", bench.layer.remove_node(node)).unwrap();
    assert_eq!(bench.layer.find_node("shared").unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_filter_is_inserted_above_a_disk_and_dropped_again_with_its_data_in_place() {
    let bench = Bench::new();
    let disk = bench.open("driver=memory,size=1M,node-name=ram").unwrap();
    disk.blocking().write(0, b"before").unwrap();
    let ram = bench.layer.find_node("ram").unwrap();
    for _ in 0..3 {
        let options = OpenOptions::parse("driver=raw,node-name=filter").unwrap();
        let filter = patience::wait("insertion", bench.layer.insert_filter(ram, options)).unwrap();
        assert_eq!(disk.root(), Some(filter));
        disk.blocking().write(6, b" and after").unwrap();
        patience::wait("dropping", bench.layer.drop_filter(filter)).unwrap();
        assert_eq!(disk.root(), Some(ram));
    }
    assert_eq!(disk.blocking().read_to_vec(0, 16).unwrap(), b"before and after");
    bench.close(&disk).unwrap();
}

#[test]
fn a_child_by_name_is_the_open_node_and_outlives_its_parent() {
    let bench = Bench::new();
    let options = OpenOptions::parse("driver=memory,size=1M,node-name=base").unwrap();
    let base = patience::wait("a node", bench.layer.add_node(options)).unwrap();
    let disk = bench.open("driver=raw,file=base").unwrap();
    let topology = bench.layer.graph().topology();
    let root = topology.node(disk.root().unwrap()).unwrap();
    assert_eq!(root.edge_in_role(Role::File).map(|edge| root.edges()[edge].child), Some(base));
    bench.close(&disk).unwrap();
    assert_eq!(bench.layer.graph().topology().nodes().count(), 1);
    patience::wait("the removal", bench.layer.remove_node(base)).unwrap();
}
