//! Everything at once, for a few seconds: four loops, two disks, changes, drains and reopens by
//! two control threads. Every byte is checked, and in the end all counts balance.

use blockplex_drivers::file::{File, FileOptions, FileReopen};
use blockplex_drivers::memory::Memory;
use blockplex_drivers::raw::Raw;
use blockplex_graph::driver::{Driver, Role};
use blockplex_graph::{
    DetectZeroes, DiscardMode, NodeId, NodeOptions, Origin, Queue, Request, Scope,
};
use blockplex_io::buffer::IoBuffer;
use blockplex_io::event_loop::Local;
use blockplex_tests::{Hooks, Probe, ProbeHandle, Stage, pattern, sharing_writer};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const LOOPS: usize = 4;
const TASKS: usize = 3;
const REGION: usize = 64 << 10;
const SIZE: usize = LOOPS * TASKS * REGION;

/// Numbers that look random and come from a seed.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % bound
    }
}

struct Disk {
    /// Filters go above it.
    node: NodeId,
    /// The node at the bottom.
    leaf: NodeId,
    has_file: bool,
    guard: ProbeHandle,
    user: Arc<Origin>,
    hooks: Hooks,
}

fn disk(stage: &Stage, names: [&'static str; 4], driver: impl Driver, has_file: bool) -> Disk {
    let leaf = stage.add(names[0], driver, &[]);
    let (probe, guard) = Probe::new(0);
    let middle = stage.add(names[1], probe, &[(Role::Filtered, leaf)]);
    let raw = Raw::new(0, None, SIZE as u64).expect("the window fits");
    let node = stage.add(names[2], raw, &[(Role::File, middle)]);
    let (user, hooks) = stage.origin(names[3], node, sharing_writer());
    Disk { node, leaf, has_file, guard, user, hooks }
}

/// Requests in one region, each checked, until told to stop; gives their number.
async fn work(
    local: Local,
    disk: (blockplex_graph::BlockGraph, Arc<Origin>),
    region: usize,
    stop: Arc<AtomicBool>,
) -> u64 {
    let queue = Queue::open(&disk.0, &disk.1, &local, "stress");
    let mut numbers = Numbers(region as u64 * 7919 + 1);
    let mut model = vec![0u8; REGION];
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        let start = numbers.below(REGION);
        let length = numbers.below(REGION - start).min(1 << numbers.below(14));
        let offset = (region * REGION + start) as u64;
        let range = start..start + length;
        let request = match numbers.below(8) {
            0..3 => {
                let bytes = pattern(count + offset, length);
                model[range].copy_from_slice(&bytes);
                Request::write(offset, IoBuffer::from_slice(&bytes))
            }
            3 => {
                model[range].fill(0);
                Request::write(offset, IoBuffer::zeroed(length))
            }
            4 => {
                model[range].fill(0);
                Request::write_zeroes(offset, length as u64).may_unmap()
            }
            5 if numbers.below(16) == 0 => Request::flush(),
            _ => {
                let read = queue.request(Request::read(offset, IoBuffer::zeroed(length))).await;
                read.result.expect("a read");
                assert_eq!(read.vector.to_vec(), model[range], "region {region} at {start}");
                count += 1;
                continue;
            }
        };
        queue.request(request).await.result.expect("a request");
        count += 1;
    }
    let whole = Request::read((region * REGION) as u64, IoBuffer::zeroed(REGION));
    assert_eq!(queue.request(whole).await.vector.to_vec(), model, "region {region} at the end");
    count + 1
}

/// Changes, drains and reopens until the time is up, then takes its filters out again.
fn meddle(stage: &Stage, disks: &[Disk], seed: u64, until: Instant) -> usize {
    let mut numbers = Numbers(seed);
    let mut filters: Vec<NodeId> = Vec::new();
    let mut done = 0;
    while Instant::now() < until {
        let disk = &disks[numbers.below(disks.len())];
        match numbers.below(5) {
            0 if filters.len() < 6 => filters.push(insert(stage, disk.node, numbers.below(2) == 0)),
            0 | 1 if !filters.is_empty() => {
                let filter = filters.swap_remove(numbers.below(filters.len()));
                remove(stage, filter);
            }
            2 => reopen(stage, disk, &mut numbers),
            _ => drain(stage, disk, &mut numbers),
        }
        done += 1;
    }
    filters.into_iter().for_each(|filter| remove(stage, filter));
    done
}

fn insert(stage: &Stage, below: NodeId, quick: bool) -> NodeId {
    let inserted = stage.change(move |change| {
        let probe = Probe::new(0).0;
        let probe = Box::new(if quick { probe.quick() } else { probe });
        let discard = DiscardMode::Unmap;
        let options = NodeOptions { discard, ..NodeOptions::default() };
        let filter = change.add_node(None, probe, options, &[(Role::Filtered, below)])?;
        change.insert_filter(below, filter)?;
        Ok(filter)
    });
    inserted.expect("a filter goes in")
}

fn remove(stage: &Stage, filter: NodeId) {
    let removed = stage.change(move |change| {
        change.drop_filter(filter)?;
        change.remove_node(filter)
    });
    removed.expect("a filter comes out");
}

fn reopen(stage: &Stage, disk: &Disk, numbers: &mut Numbers) {
    let (graph, leaf, node, has_file) = (stage.graph.clone(), disk.leaf, disk.node, disk.has_file);
    let direct = numbers.below(2) == 0;
    let detect_zeroes = [DetectZeroes::Off, DetectZeroes::Unmap][numbers.below(2)];
    let work = stage.spawn(numbers.below(LOOPS), move |_| async move {
        let mut change = graph.begin().await;
        let discard = DiscardMode::Unmap;
        let options = NodeOptions { discard, detect_zeroes, ..NodeOptions::default() };
        change.set_options(node, options)?;
        if has_file {
            change.reopen(leaf, Box::new(FileReopen { direct })).await?;
        }
        let drained = change.drain().await?;
        change.commit(&drained).await
    });
    stage.wait("a reopen", work).expect("not cancelled").expect("a reopen");
}

/// Up to three sections, one inside of the other or overlapping, ended in some order.
fn drain(stage: &Stage, disk: &Disk, numbers: &mut Numbers) {
    let mut held = Vec::new();
    for _ in 0..=numbers.below(3) {
        let scope = match numbers.below(4) {
            0 => Scope::Everything,
            1 => Scope::Subtree(disk.node),
            2 => Scope::Origin(disk.user.id()),
            _ => Scope::node(disk.leaf),
        };
        held.push(stage.drain(scope));
        disk.guard.forbid();
    }
    thread::sleep(Duration::from_micros(numbers.below(300) as u64));
    while !held.is_empty() {
        disk.guard.allow();
        drop(held.swap_remove(numbers.below(held.len())));
    }
}

#[test]
fn io_on_four_loops_survives_changes_drains_and_reopens_with_every_byte_right() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, vec![0; SIZE]).unwrap();
    let stage = Stage::new(LOOPS);
    let options = FileOptions { write: true, ..FileOptions::default() };
    let file = File::open(&path, options).unwrap();
    let memory = Memory::new(SIZE as u64).unwrap();
    let disks = [
        disk(&stage, ["memory", "guard-m", "raw-m", "user m"], memory, false),
        disk(&stage, ["file", "guard-f", "raw-f", "user f"], file, true),
    ];
    let stop = Arc::new(AtomicBool::new(false));
    let mut workers = [Vec::new(), Vec::new()];
    for region in 0..LOOPS * TASKS {
        for (disk, workers) in disks.iter().zip(&mut workers) {
            let target = (stage.graph.clone(), disk.user.clone());
            let stop = stop.clone();
            workers
                .push(stage.spawn(region % LOOPS, move |local| work(local, target, region, stop)));
        }
    }
    let until = Instant::now() + Duration::from_millis(2500);
    let meddled: usize = thread::scope(|scope| {
        let (stage, disks) = (&stage, &disks);
        let controls = [3, 5].map(|seed| scope.spawn(move || meddle(stage, disks, seed, until)));
        controls.into_iter().map(|control| control.join().expect("no panic")).sum()
    });
    stop.store(true, Ordering::Relaxed);
    for (disk, workers) in disks.iter().zip(workers) {
        let requests: u64 =
            workers.into_iter().map(|worker| stage.wait("a worker", worker).unwrap()).sum();
        assert_eq!(disk.user.statistics().operations(), requests);
        assert_eq!(disk.guard.violations(), 0);
        assert_eq!(disk.hooks.begun(), disk.hooks.ended());
        assert_eq!(stage.root_name(&disk.user).as_deref().map(|name| &name[..3]), Some("raw"));
        assert!(requests > 0);
    }
    assert_eq!(stage.graph.topology().nodes().count(), 6);
    assert!(meddled > 0);
    let drained = stage.drain(Scope::Everything);
    assert!(disks.iter().all(|disk| disk.guard.running() == 0));
    drop(drained);
}
