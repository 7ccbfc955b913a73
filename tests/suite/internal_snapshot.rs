//! Internal snapshots and dirty bitmaps while several loops write.

use blockplex::drivers::qcow2::{CreateOptions, NewBitmap, NewSnapshot, SnapshotSelector};
use blockplex::{
    Backend, Blockplex, IoBuffer, IoThread, LoopConfig, OpenOptions, Request, block_on,
};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const SECTORS: u64 = 2048;
const WRITERS: u64 = 3;

/// What was written to each sector: the last number that was begun, and the last that ended.
struct History {
    begun: Vec<AtomicU64>,
    ended: Vec<AtomicU64>,
    stop: AtomicBool,
}

impl History {
    fn new() -> Arc<History> {
        let zeros = || (0..SECTORS).map(|_| AtomicU64::new(0)).collect();
        Arc::new(History { begun: zeros(), ended: zeros(), stop: AtomicBool::new(false) })
    }

    fn now(of: &[AtomicU64]) -> Vec<u64> {
        of.iter().map(|number| number.load(Ordering::SeqCst)).collect()
    }
}

/// Writes to every sector of its share, again and again, some at a time, until told to stop.
async fn write_on(backend: Backend, history: Arc<History>, share: u64) {
    let queue = backend.queue(&format!("writer {share}")).expect("a queue");
    let mut number = 0;
    while !history.stop.load(Ordering::SeqCst) {
        number += 1;
        let mut requests = Vec::new();
        for sector in (share..SECTORS).step_by(WRITERS as usize) {
            // A different selection each time.
            if !(sector * 7 + number * 13).is_multiple_of(11) {
                continue;
            }
            history.begun[sector as usize].store(number, Ordering::SeqCst);
            let bytes = number.to_le_bytes().repeat(64);
            let request = Request::write(sector * 512, IoBuffer::from_slice(&bytes));
            requests.push((sector, queue.request(request)));
        }
        for (sector, request) in requests {
            request.await.result.expect("written");
            history.ended[sector as usize].store(number, Ordering::SeqCst);
        }
    }
}

/// The numbers that a disk, or a snapshot of it, has in its sectors.
fn numbers(layer: &Blockplex, path: &Path, snapshot: Option<&str>) -> Vec<u64> {
    let options = OpenOptions::image("qcow2", path).read_only();
    let options = match snapshot {
        Some(name) => options.set("internal-snapshot", name),
        None => options,
    };
    let backend = block_on(layer.open("view", options)).expect("off a loop").expect("opens");
    let bytes = backend.blocking().read_to_vec(0, SECTORS as usize * 512).expect("reads");
    block_on(backend.close()).expect("off a loop").expect("closes");
    let number = |sector: &[u8]| {
        let (words, _) = sector.as_chunks::<8>();
        assert!(words.iter().all(|word| *word == words[0]), "a torn sector");
        u64::from_le_bytes(words[0])
    };
    bytes.chunks(512).map(number).collect()
}

fn check(path: &Path) {
    let output = Command::new("qemu-img").arg("check").arg(path).output().expect("it runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn snapshots_are_of_one_moment_and_bitmaps_miss_nothing_while_loops_write() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("disk.qcow2");
    let layer = Blockplex::new().expect("a layer");
    let create = CreateOptions { cluster_size: 4096, ..CreateOptions::new(SECTORS * 512) };
    block_on(layer.create_qcow2(&path, create)).expect("off a loop").expect("creates");
    let options = OpenOptions::image("qcow2", &path).set("overlap-check", "all");
    let backend = block_on(layer.open("disk", options)).expect("off a loop").expect("opens");
    let node = backend.root().expect("it has one");
    let history = History::new();
    let threads: Vec<_> = (0..WRITERS)
        .map(|share| {
            let thread = IoThread::spawn(LoopConfig::default()).expect("a loop");
            let (backend, history) = (backend.clone(), history.clone());
            let writer = move |_| write_on(backend, history, share);
            let task = thread.handle().spawn_with(writer).expect("it takes tasks");
            (thread, task)
        })
        .collect();
    let mut kept = Vec::new();
    let mut bitmap_from = Vec::new();
    for round in 0..24 {
        let name = format!("snapshot {round}");
        let before = History::now(&history.ended);
        let new = NewSnapshot::of_disk(name.as_str());
        block_on(layer.internal_snapshot_create(node, new)).expect("off a loop").expect("taken");
        let after = History::now(&history.begun);
        if round % 3 == 1 {
            let which = SnapshotSelector::Name(name.into_bytes());
            let deleted = block_on(layer.internal_snapshot_delete(node, which));
            deleted.expect("off a loop").expect("deleted");
        } else {
            kept.push((name, before, after));
        }
        if round == 12 {
            let new = NewBitmap { granularity: Some(512), ..NewBitmap::persistent("b") };
            block_on(layer.bitmap_add(node, new)).expect("off a loop").expect("added");
            // What was begun before may have ended before the bitmap came.
            bitmap_from = History::now(&history.begun);
        }
    }
    history.stop.store(true, Ordering::SeqCst);
    for (thread, task) in threads {
        block_on(task).expect("off a loop").expect("the writer ends");
        drop(thread);
    }
    let bits = layer.bitmap(node, b"b").expect("it is there");
    let last = History::now(&history.ended);
    for (sector, (from, last)) in (0..).zip(bitmap_from.iter().zip(&last)) {
        // Begun after the bitmap was there.
        assert!(last <= from || bits.is_dirty(sector * 512), "sector {sector} was written unseen");
    }
    assert!(last.iter().all(|number| *number > 0), "the writers got nowhere");
    block_on(backend.close()).expect("off a loop").expect("closes");
    check(&path);
    assert_eq!(numbers(&layer, &path, None), last);
    for (name, before, after) in kept {
        let found = numbers(&layer, &path, Some(&name));
        for (sector, number) in found.iter().enumerate() {
            let range = before[sector]..=after[sector];
            assert!(range.contains(number), "{name}, sector {sector}: {number}, not {range:?}");
        }
    }
}
