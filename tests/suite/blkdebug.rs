//! `blkdebug`: what fails, waits and is cut, as seen from above it; and where qcow2 announces.

use blockplex::drivers::blkdebug::{Blkdebug, Notice};
use blockplex::drivers::qcow2::{CreateOptions, Qcow2};
use blockplex::{Backend, Blockplex, Error, OpenOptions, block_on};
use blockplex_graph::{BlockStatus, DebugEvent, NodeView, Request, Result};
use blockplex_tests::patience;
use parking_lot::Mutex;
use std::path::Path;
use std::sync::Arc;

const SIZE: u64 = 4 << 20;

fn open(layer: &Blockplex, options: &str) -> Result<Backend> {
    let options = OpenOptions::parse(options).expect("well-formed");
    block_on(layer.open("disk", options)).expect("off a loop")
}

fn close(backend: &Backend) -> Result<()> {
    block_on(backend.close()).expect("off a loop")
}

/// A raw disk in memory under a `blkdebug` node with these options.
fn memory(layer: &Blockplex, options: &str) -> Backend {
    let tree = format!(
        "driver=raw,discard=unmap,file.driver=blkdebug,file.image.driver=memory,\
         file.image.size={SIZE}{options}"
    );
    open(layer, &tree).expect("opens")
}

/// The `blkdebug` node below a backend's root.
fn listener(layer: &Blockplex, backend: &Backend) -> Arc<NodeView> {
    let topology = layer.graph().topology();
    let root = topology.node(backend.root().expect("has a root")).expect("is there");
    root.child(0).expect("has a file").clone()
}

fn blkdebug(view: &Arc<NodeView>) -> &Blkdebug {
    view.driver_as().expect("is blkdebug")
}

fn errno<T>(result: Result<T>) -> i32 {
    result.map_or_else(|error: Error| error.errno(), |_| 0)
}

#[test]
fn an_injected_error_meets_the_requests_of_its_kind_and_sector() {
    let layer = Blockplex::new().unwrap();
    for (kind, expected) in [
        ("read", [5, 0, 0, 0, 0, 0]),
        ("write", [0, 5, 0, 0, 0, 0]),
        ("write-zeroes", [0, 0, 5, 0, 0, 0]),
        ("discard", [0, 0, 0, 5, 0, 0]),
        ("flush", [0, 0, 0, 0, 5, 0]),
        ("block-status", [0, 0, 0, 0, 0, 5]),
    ] {
        let rule = format!(",file.inject-error.0.event=none,file.inject-error.0.iotype={kind}");
        let disk = memory(&layer, &rule);
        let door = disk.blocking();
        let seen = [
            errno(door.read(0, &mut [0; 512])),
            errno(door.write(0, &[1; 512])),
            errno(door.write_zeroes(0, 512)),
            errno(door.discard(0, 512)),
            errno(door.flush()),
            errno(door.block_status(0, 512)),
        ];
        assert_eq!(seen, expected, "{kind}");
        close(&disk).unwrap();
    }
    let rule = ",file.inject-error.0.event=none,file.inject-error.0.sector=3,\
                file.inject-error.0.errno=28,file.inject-error.0.once=on";
    let disk = memory(&layer, rule);
    let door = disk.blocking();
    assert_eq!(errno(door.write(0, &[1; 1536])), 0);
    assert_eq!(errno(door.write(1535, &[1; 2])), 28);
    assert_eq!(errno(door.write(1535, &[1; 2])), 0);
    close(&disk).unwrap();
}

#[test]
fn a_state_machine_fails_the_second_write_only() {
    let layer = Blockplex::new().unwrap();
    let rules = ",file.inject-error.0.event=pwritev,file.inject-error.0.state=2,\
                 file.inject-error.0.once=on,file.set-state.0.event=pwritev_done,\
                 file.set-state.0.new_state=2";
    let disk = memory(&layer, rules);
    let door = disk.blocking();
    let seen: Vec<i32> = (0..3).map(|_| errno(door.write(0, &[1; 512]))).collect();
    assert_eq!(seen, [0, 5, 0]);
    close(&disk).unwrap();
}

#[test]
fn a_configuration_file_does_what_the_options_do() {
    let folder = tempfile::tempdir().unwrap();
    let conf = folder.path().join("conf");
    std::fs::write(&conf, "[inject-error]\nevent = \"none\"\nerrno = \"28\"\n").unwrap();
    let layer = Blockplex::new().unwrap();
    let disk = memory(&layer, &format!(",file.config={}", conf.display()));
    assert_eq!(errno(disk.blocking().read(0, &mut [0; 512])), 28);
    close(&disk).unwrap();
    let missing = format!(
        "driver=blkdebug,image.driver=null-co,config={}",
        folder.path().join("none").display()
    );
    let error = open(&layer, &missing).unwrap_err();
    assert!(error.to_string().contains("Could not read blkdebug config file"), "{error}");
}

#[test]
fn a_short_write_leaves_its_beginning_and_then_fails() {
    let layer = Blockplex::new().unwrap();
    let rules = ",file.inject-error.0.event=none,file.inject-error.0.iotype=write,\
                 file.inject-error.0.x-short=512,file.inject-error.0.x-delay-ns=1000";
    let disk = memory(&layer, rules);
    let door = disk.blocking();
    assert_eq!(errno(door.write(0, &[7; 2048])), 5);
    let mut seen = vec![9; 2048];
    door.read(0, &mut seen).unwrap();
    assert!(seen[..512].iter().all(|byte| *byte == 7) && seen[512..].iter().all(|b| *b == 0));
    close(&disk).unwrap();
}

#[test]
fn requests_are_widened_cut_and_rounded_as_the_limits_say() {
    let layer = Blockplex::new().unwrap();
    let limits = ",file.align=4k,file.max-transfer=8k,file.opt-write-zero=64k,\
                  file.max-write-zero=128k,file.opt-discard=64k,file.max-discard=64k,\
                  file.inject-error.0.event=none,file.inject-error.0.x-count-only=on,\
                  file.inject-error.0.iotype=write,file.inject-error.1.event=none,\
                  file.inject-error.1.x-count-only=on,file.inject-error.1.iotype=write-zeroes,\
                  file.inject-error.2.event=none,file.inject-error.2.x-count-only=on,\
                  file.inject-error.2.iotype=discard";
    let disk = memory(&layer, limits);
    let view = listener(&layer, &disk);
    let door = disk.blocking();
    let data: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8 + 1).collect();
    door.write(1000, &data).unwrap();
    // Two ragged ends, and 72 blocks in pieces of two.
    assert_eq!(blkdebug(&view).injections_met(), [2 + 36, 0, 0]);
    let mut seen = vec![0; data.len()];
    door.read(1000, &mut seen).unwrap();
    assert_eq!(seen, data);
    door.write_zeroes(0, 200 << 10).unwrap();
    // 128 KiB and 64 KiB; the 8 KiB that are left are written.
    assert_eq!(blkdebug(&view).injections_met(), [39, 2, 0]);
    door.discard(4096, 256 << 10).unwrap();
    // Up to the first border, three whole ones, and what is left.
    assert_eq!(blkdebug(&view).injections_met(), [39, 2, 5]);
    let BlockStatus { zero, length, .. } = door.block_status(0, SIZE).unwrap();
    assert!(zero && length >= 128 << 10);
    close(&disk).unwrap();
    let refused = open(&layer, "driver=blkdebug,align=3,image.driver=null-co").unwrap_err();
    assert!(refused.to_string().contains("align 3"), "{refused}");
}

#[test]
fn a_request_waits_at_a_breakpoint_until_it_is_resumed() {
    let layer = Blockplex::new().unwrap();
    let disk = memory(&layer, ",file.align=512");
    let view = listener(&layer, &disk);
    let notices = Arc::new(Mutex::new(Vec::new()));
    let heard = notices.clone();
    blkdebug(&view).watch(move |notice| {
        heard.lock().push(match notice {
            Notice::Suspended(tag) => format!("suspended {tag}"),
            Notice::Resumed(tag) => format!("resumed {tag}"),
        });
    });
    assert!(blkdebug(&view).resume("A").is_err() && blkdebug(&view).remove_break("A").is_err());
    blkdebug(&view).break_at(DebugEvent::PwritevRmwAfterHead, "A");
    let writer = disk.clone();
    let writing = std::thread::spawn(move || writer.blocking().write(100, &[1; 100]));
    block_on(blkdebug(&view).wait_suspended(Some("A"))).expect("off a loop");
    // Others overtake it.
    disk.blocking().write(4096, &[2; 512]).unwrap();
    assert!(blkdebug(&view).is_suspended("A") && !writing.is_finished());
    blkdebug(&view).resume("A").unwrap();
    writing.join().unwrap().unwrap();
    assert_eq!(*notices.lock(), ["suspended A", "resumed A"]);
    // Used up.
    disk.blocking().write(100, &[1; 100]).unwrap();
    // Taken away, while somebody waits and before anybody comes.
    blkdebug(&view).break_at(DebugEvent::Pwritev, "B");
    let writer = disk.clone();
    let writing = std::thread::spawn(move || writer.blocking().write(0, &[1; 512]));
    patience::until("a write at B", || blkdebug(&view).is_suspended("B"));
    blkdebug(&view).break_at(DebugEvent::Pwritev, "B");
    blkdebug(&view).remove_break("B").unwrap();
    writing.join().unwrap().unwrap();
    disk.blocking().write(0, &[1; 512]).unwrap();
    close(&disk).unwrap();
}

#[test]
fn permissions_are_taken_and_kept_from_others() {
    let layer = Blockplex::new().unwrap();
    block_on(layer.add_node(OpenOptions::parse("driver=memory,size=1M,node-name=ram").unwrap()))
        .unwrap()
        .unwrap();
    let other = open(&layer, "driver=raw,read-only=on,file=ram").unwrap();
    let selfish = "driver=blkdebug,read-only=on,image=ram,unshare-child-perms.0=consistent-read";
    assert_eq!(errno(open(&layer, selfish).map(drop)), libc::EPERM);
    let greedy = "driver=blkdebug,read-only=on,image=ram,take-child-perms.0=write";
    let greedy = open(&layer, greedy).unwrap();
    let writer = open(&layer, "driver=raw,file=ram");
    assert_eq!(errno(writer.map(drop)), libc::EPERM, "a second writer");
    close(&greedy).unwrap();
    close(&other).unwrap();
}

fn create(layer: &Blockplex, path: &Path) {
    let created = block_on(layer.create_qcow2(path, CreateOptions::new(SIZE)));
    created.expect("off a loop").expect("creates");
}

/// An image of one cluster of ones, under `blkdebug` with these options.
fn qcow2(layer: &Blockplex, path: &Path, options: &str) -> Backend {
    create(layer, path);
    let plain = format!("driver=qcow2,file.driver=file,file.filename={}", path.display());
    let plain = open(layer, &plain).expect("opens");
    plain.blocking().write(0, &[1; 65536]).expect("writes");
    close(&plain).expect("closes");
    let tree =
        format!("driver=qcow2,file.driver=blkdebug,file.x-image={}{options}", path.display());
    open(layer, &tree).expect("opens")
}

#[test]
fn rules_hit_the_steps_of_qcow2_that_they_name() {
    type Work = fn(&Backend) -> Result<()>;
    let allocate: Work = |disk| disk.blocking().write(1 << 20, &[2; 65536]);
    let partial: Work = |disk| disk.blocking().write(100, &[2; 100]);
    let read: Work = |disk| disk.blocking().read(0, &mut [0; 512]);
    let flush: Work = |disk| disk.blocking().flush();
    let allocate_and_flush: Work = |disk| {
        disk.blocking().write(1 << 20, &[2; 65536])?;
        disk.blocking().flush()
    };
    let grow: Work = |disk| disk.blocking().truncate(SIZE << 20);
    let cases: [(&str, &str, Work); 11] = [
        ("l2_load", "read", read),
        ("read_aio", "read", read),
        ("write_aio", "write", partial),
        ("cluster_alloc", "write", allocate),
        ("refblock_update", "write", allocate_and_flush),
        ("l2_update", "write", allocate_and_flush),
        ("flush_to_os", "flush", flush),
        ("flush_to_disk", "flush", flush),
        ("l1_grow_alloc_table", "write", grow),
        ("l1_grow_write_table", "write", grow),
        ("l1_grow_activate_table", "write", grow),
    ];
    let folder = tempfile::tempdir().unwrap();
    let layer = Blockplex::new().unwrap();
    for (event, kind, work) in cases {
        let path = folder.path().join(event);
        let rule = format!(
            ",file.inject-error.0.event={event},file.inject-error.0.iotype={kind},\
             file.inject-error.0.errno=28,file.inject-error.0.once=on"
        );
        let disk = qcow2(&layer, &path, &rule);
        let view = listener(&layer, &disk);
        assert_eq!(errno(work(&disk)), 28, "{event}");
        assert_eq!(blkdebug(&view).injections_met(), [1], "{event}");
        // The failure harmed nothing, and passes.
        work(&disk).unwrap_or_else(|error| panic!("{event}: {error}"));
        drop(view);
        close(&disk).unwrap_or_else(|error| panic!("{event}: {error}"));
        let plain =
            block_on(layer.open("disk", OpenOptions::image("qcow2", &path))).unwrap().unwrap();
        let mut bytes = [0; 50];
        plain.blocking().read(0, &mut bytes).unwrap();
        assert_eq!(bytes, [1; 50], "{event}");
        close(&plain).unwrap();
    }
}

#[test]
fn management_work_on_qcow2_is_announced_too() {
    let folder = tempfile::tempdir().unwrap();
    let layer = Blockplex::new().unwrap();
    for (event, kind) in [
        ("vmstate_save", "write"),
        ("vmstate_load", "read"),
        ("empty_image_prepare", "write"),
        ("l1_shrink_write_table", "write"),
        ("l1_shrink_free_l2_clusters", "write"),
    ] {
        let rule = format!(
            ",file.inject-error.0.event={event},file.inject-error.0.iotype={kind},\
             file.inject-error.0.errno=28,file.inject-error.0.once=on"
        );
        let disk = qcow2(&layer, &folder.path().join(event), &rule);
        let node = disk.root().unwrap();
        let vector = blockplex_io::buffer::IoVector::zeroed(512);
        let saved = vector.clone();
        let save = layer
            .manage(node, async move |image: &Qcow2, io| image.write_vm_state(io, 0, &saved).await);
        let mut result = block_on(save).unwrap();
        let load = layer
            .manage(node, async move |image: &Qcow2, io| image.read_vm_state(io, 0, &vector).await);
        result = result.and(block_on(load).unwrap());
        result = result.and(disk.blocking().truncate(SIZE / 2));
        let empty = layer.manage(node, async move |image: &Qcow2, io| image.make_empty(io).await);
        result = result.and(block_on(empty).unwrap());
        assert_eq!(errno(result), 28, "{event}");
        close(&disk).unwrap_or_else(|error| panic!("{event}: {error}"));
    }
}

#[test]
fn the_reads_of_opening_are_announced_too() {
    let folder = tempfile::tempdir().unwrap();
    let layer = Blockplex::new().unwrap();
    for event in ["reftable_load", "refblock_load"] {
        let path = folder.path().join(event);
        create(&layer, &path);
        let tree = format!(
            "driver=qcow2,file.driver=blkdebug,file.x-image={},file.inject-error.0.event={event}",
            path.display()
        );
        assert_eq!(errno(open(&layer, &tree).map(drop)), 5, "{event}");
    }
}

#[test]
fn a_full_storage_met_by_an_l2_update_fails_the_flush_of_an_allocating_write() {
    let folder = tempfile::tempdir().unwrap();
    let layer = Blockplex::new().unwrap();
    let rule = ",file.inject-error.0.event=l2_update,file.inject-error.0.errno=28";
    let disk = qcow2(&layer, &folder.path().join("disk"), rule);
    let door = disk.blocking();
    let written = door.write(1 << 20, &[2; 65536]);
    assert_eq!(errno(written.and_then(|()| door.flush())), 28);
    assert_eq!(errno(close(&disk)), 28);
}

#[test]
fn every_step_of_a_read_and_a_write_of_qcow2_can_be_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let layer = Blockplex::new().unwrap();
    let disk = qcow2(&layer, &folder.path().join("disk"), "");
    let view = listener(&layer, &disk);
    for (event, request) in [
        (DebugEvent::L2Load, Request::read(0, blockplex_io::buffer::IoBuffer::zeroed(512))),
        (DebugEvent::ReadAio, Request::read(0, blockplex_io::buffer::IoBuffer::zeroed(512))),
        (DebugEvent::WriteAio, Request::write(0, blockplex_io::buffer::IoBuffer::zeroed(512))),
        (DebugEvent::FlushToOs, Request::flush()),
        (DebugEvent::FlushToDisk, Request::flush()),
    ] {
        blkdebug(&view).break_at(event, "tag");
        let user = disk.clone();
        let running = std::thread::spawn(move || user.blocking().run(request).map(drop));
        block_on(blkdebug(&view).wait_suspended(Some("tag"))).expect("off a loop");
        assert!(!running.is_finished(), "{event:?}");
        blkdebug(&view).resume("tag").unwrap();
        running.join().unwrap().unwrap();
    }
    drop(view);
    close(&disk).unwrap();
}
