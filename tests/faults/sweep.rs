//! Storage that fails: full, or one operation at a time, each in turn.
//!
//! What a request that failed leaves behind is, in each sector, what was there or what it wrote.
//! The image stays sound for the peer (clusters may leak), at once and after a new open.

use super::failing::{Plan, Rig};
use super::image::{Sandbox, check, guest_bytes, qemu_img, qemu_io, succeed, text};
use super::rows::bounded;
use blockplex::{ErrorKind, Result};
use std::fs;
use std::path::Path;
use std::sync::Arc;

const DISK: u64 = 4 << 20;
const SECTOR: usize = 512;

/// What is known of a disk: for each sector the bytes that may fill it.
struct Model {
    /// While the image is open, and after it was closed well.
    now: Vec<Vec<u8>>,
    /// When the image could not be closed: what was there at the last flush, and all since.
    torn_down: Vec<Vec<u8>>,
}

/// One request of the workload: a kind, a range in bytes.
#[derive(Clone, Copy, Debug)]
enum Step {
    Write(u64, usize, u8),
    Zero(u64, u64),
    Discard(u64, u64),
    Flush,
}

/// Allocates below two L2 tables, overwrites in place and across clusters, erases, writes again
/// where clusters were freed.
const WORKLOAD: [Step; 14] = [
    Step::Write(0, 0x3000, 1),
    Step::Write(0x30_0200, 0x2400, 2),
    Step::Flush,
    Step::Write(0x800, 0x1000, 3),
    Step::Write(0x2_0000, 0x400, 4),
    Step::Discard(0x1000, 0x1000),
    Step::Zero(0x30_0000, 0x1800),
    Step::Write(0x1000, 0x1000, 5),
    Step::Flush,
    Step::Write(0x21_0000, 0x5000, 6),
    Step::Zero(0, 0x3000),
    Step::Write(0x10_0000, 0x800, 7),
    Step::Discard(0x21_0000, 0x4000),
    Step::Flush,
];

impl Model {
    /// Of a disk with these bytes, alike in each sector.
    fn new(guest: &[u8]) -> Model {
        let now: Vec<_> = guest.chunks(SECTOR).map(|sector| vec![sector[0]]).collect();
        Model { torn_down: now.clone(), now }
    }

    /// Notes a request and its result.
    fn note(&mut self, step: Step, result: &Result<()>) {
        let (offset, length, byte) = match step {
            Step::Write(offset, length, byte) => (offset, length as u64, byte),
            Step::Zero(offset, length) | Step::Discard(offset, length) => (offset, length, 0),
            Step::Flush => {
                if result.is_ok() {
                    self.torn_down.clone_from(&self.now);
                }
                return;
            }
        };
        let sure = result.is_ok() && !matches!(step, Step::Discard(..));
        for sector in offset as usize / SECTOR..(offset + length) as usize / SECTOR {
            if sure {
                self.now[sector].clear();
            }
            self.now[sector].push(byte);
            self.torn_down[sector].push(byte);
        }
    }

    fn judge(&self, bytes: &[u8], what: &str) {
        compare(&self.now, bytes, what);
    }

    /// What the peer finds after a close with this result.
    fn judge_file(&self, path: &Path, closed: bool, what: &str) {
        let found = check(path).unwrap_or_else(|| panic!("{what}: the peer does not open it"));
        assert!(found.is_sound(), "{what}: {found:?}");
        let allowed = if closed { &self.now } else { &self.torn_down };
        compare(allowed, &guest_bytes(path, None), what);
    }
}

fn compare(allowed: &[Vec<u8>], bytes: &[u8], what: &str) {
    assert_eq!(bytes.len() as u64, DISK, "{what}: length");
    for (number, (allowed, sector)) in allowed.iter().zip(bytes.chunks(SECTOR)).enumerate() {
        let first = sector[0];
        let whole = sector.iter().all(|byte| *byte == first);
        assert!(whole, "{what}: sector {number} is of several writes");
        assert!(allowed.contains(&first), "{what}: sector {number}: {first}, not {allowed:?}");
    }
}

fn run(rig: &Rig, step: Step) -> Result<()> {
    match step {
        Step::Write(offset, length, byte) => rig.disk().write(offset, &vec![byte; length]),
        Step::Zero(offset, length) => rig.disk().write_zeroes(offset, length),
        Step::Discard(offset, length) => rig.disk().discard(offset, length),
        Step::Flush => rig.disk().flush(),
    }
}

/// What the image is before the workload.
struct Base {
    bytes: Vec<u8>,
    guest: Vec<u8>,
    snapshot: Option<Vec<u8>>,
}

impl Base {
    fn new(options: &str, commands: &[&str], with_snapshot: bool) -> Base {
        let sandbox = Sandbox::in_memory();
        let path = sandbox.at("image.qcow2");
        sandbox.create(&path, options, "4M");
        qemu_io(&path, commands);
        let guest = guest_bytes(&path, None);
        if with_snapshot {
            succeed(&qemu_img(&["snapshot", "-c", "first", text(&path)]), "a snapshot");
        }
        let bytes = fs::read(&path).expect("it was just made");
        Base { bytes, snapshot: with_snapshot.then(|| guest.clone()), guest }
    }

    fn empty() -> Base {
        Base::new("cluster_size=4k", &[], false)
    }

    /// All tables and clusters are shared with a snapshot.
    fn snapshot() -> Base {
        let commands = ["write -q -P 9 0 256k", "write -q -P 8 2M 128k", "write -q -c -P 7 3M 4k"];
        Base::new("cluster_size=4k", &commands, true)
    }

    /// The refcount table is nearly full: the workload makes it move.
    fn nearly_full() -> Base {
        let commands = ["write -q -P 9 0x220000 1920k", "write -q -P 8 0x40000 44k"];
        Base::new("cluster_size=512,refcount_bits=64", &commands, false)
    }

    fn judge(&self, path: &Path, model: &Model, closed: bool, what: &str) {
        model.judge_file(path, closed, what);
        if let Some(snapshot) = &self.snapshot {
            assert!(guest_bytes(path, Some("first")) == *snapshot, "{what}: the snapshot");
        }
    }
}

/// One round of the sweep; whether anything failed.
fn round(base: &Base, path: &Path, plan: Plan) -> bool {
    let what = format!("{plan:?}");
    let rig = Rig::open(path);
    rig.storage.plan(plan);
    let mut model = Model::new(&base.guest);
    let mut failures = 0;
    for step in WORKLOAD {
        let result = run(&rig, step);
        if let Err(error) = &result {
            assert_eq!(error.errno(), libc::EIO, "{what}: {step:?}: {error}");
            assert_ne!(error.kind(), ErrorKind::Corrupt, "{what}: {step:?}: {error}");
            failures += 1;
        }
        model.note(step, &result);
    }
    if !plan.from_then_on {
        let bytes = rig.disk().read_to_vec(0, DISK as usize);
        match bytes {
            Ok(bytes) => model.judge(&bytes, &what),
            Err(_) => failures += 1,
        }
    }
    let failed = rig.storage.failed();
    let closed = rig.close().is_ok();
    failures += usize::from(!closed);
    if plan.from_then_on && failed > 0 {
        assert!(failures > 0, "{what}: nobody was told of {failed} failures");
    }
    base.judge(path, &model, closed, &what);
    failed > 0
}

/// Every `stride`th operation until a round is not hit any more. Gives the image of that round.
fn sweep(base: Base, stride: usize, from_then_on: bool, torn: bool) -> Vec<u8> {
    let sandbox = Sandbox::in_memory();
    let base = Arc::new(base);
    for nth in (1..).step_by(stride) {
        let path = sandbox.put("image.qcow2", &base.bytes);
        let plan = Plan { nth: Some(nth), from_then_on, torn, ..Plan::default() };
        let hit = bounded(&format!("{plan:?}"), {
            let (base, path) = (base.clone(), path.clone());
            move || round(&base, &path, plan)
        });
        if !hit {
            assert!(nth > WORKLOAD.len(), "the workload has only {nth} operations");
            return fs::read(&path).expect("it is there");
        }
    }
    unreachable!("a workload has an end")
}

/// In all the ways in which operations fail: each one alone; with `stride`, those that follow as
/// well, or after half of a write.
fn sweep_all(base: fn() -> Base, stride: usize) -> Vec<u8> {
    sweep(base(), stride, true, false);
    sweep(base(), stride, false, true);
    sweep(base(), 1, false, false)
}

#[test]
fn any_operation_on_an_empty_image_may_fail() {
    sweep_all(Base::empty, 1);
}

#[test]
fn any_operation_on_an_image_with_a_snapshot_may_fail() {
    sweep_all(Base::snapshot, 1);
}

#[test]
fn any_operation_may_fail_while_the_refcount_table_grows() {
    let after = sweep_all(Base::nearly_full, 5);
    assert_ne!(after[48..56], Base::nearly_full().bytes[48..56], "the table has not moved");
}

/// An open that fails leaves nothing behind, and writes nothing.
#[test]
fn any_operation_of_opening_may_fail() {
    let base = Base::snapshot();
    let sandbox = Sandbox::in_memory();
    let path = sandbox.put("image.qcow2", &base.bytes);
    for nth in 1.. {
        let plan = Plan { nth: Some(nth), ..Plan::default() };
        let opened = bounded(&format!("{plan:?}"), {
            let path = path.clone();
            move || {
                Rig::try_open(&path, plan).map(|rig| {
                    rig.storage.plan(Plan::default());
                    rig.close()
                })
            }
        });
        assert!(fs::read(&path).expect("it is there") == base.bytes, "{plan:?}: written to");
        match opened {
            Err(error) => assert_eq!(error.errno(), libc::EIO, "{plan:?}: {error}"),
            Ok(closed) => {
                closed.expect("nothing to write");
                assert!(nth > 4, "header, L1, refcount table and block are read: {nth}");
                return;
            }
        }
    }
}

/// Room for the file as it is, and one more cluster in each round: each kind of allocation finds
/// none once. A sparse file may still get longer, or not even that.
#[test]
fn a_full_storage_fails_writes_and_nothing_else() {
    let bases = [(Base::empty(), 4096), (Base::snapshot(), 4096), (Base::nearly_full(), 512)];
    for (base, cluster) in bases {
        let sandbox = Sandbox::in_memory();
        let base = Arc::new(base);
        for (clusters, bounded_length) in (0..16).flat_map(|n| [(n, false), (n, true)]) {
            let path = sandbox.put("image.qcow2", &base.bytes);
            let room = Some(base.bytes.len() as u64 + clusters * cluster);
            let plan = Plan { room, bounded_length, ..Plan::default() };
            let base = base.clone();
            let failed = bounded("a full storage", move || full(&base, &path, plan));
            assert!(failed > 0 || clusters > 0, "there was room after all");
        }
    }
}

/// How many requests failed.
fn full(base: &Base, path: &Path, plan: Plan) -> usize {
    let what = format!("{plan:?}");
    let rig = Rig::open(path);
    rig.storage.plan(plan);
    let mut model = Model::new(&base.guest);
    let mut failed = Vec::new();
    for step in WORKLOAD {
        let result = run(&rig, step);
        if let Err(error) = &result {
            assert_eq!(error.kind(), ErrorKind::NoSpace, "{what}: {step:?}: {error}");
            failed.push(step);
        }
        model.note(step, &result);
    }
    let bytes = rig.disk().read_to_vec(0, DISK as usize);
    model.judge(&bytes.unwrap_or_else(|error| panic!("{what}: {error}")), &what);

    rig.storage.plan(Plan::default());
    for &step in &failed {
        let result = run(&rig, step);
        assert!(result.is_ok(), "{what}: {step:?} with room again: {result:?}");
        model.note(step, &result);
    }
    rig.close().unwrap_or_else(|error| panic!("{what}: close: {error}"));
    base.judge(path, &model, true, &what);
    failed.len()
}

/// The room does not come back before the image is closed, and the image is sound all the same.
#[test]
fn an_image_on_full_storage_is_sound_when_it_is_opened_again() {
    let sandbox = Sandbox::in_memory();
    let base = Arc::new(Base::empty());
    for clusters in (4..24).step_by(2) {
        let path = sandbox.put("image.qcow2", &base.bytes);
        let base = base.clone();
        bounded("a full storage", move || {
            let what = format!("room for {clusters} clusters");
            let rig = Rig::open(&path);
            rig.storage.plan(Plan {
                room: Some(clusters << 12),
                bounded_length: clusters % 4 == 0,
                ..Plan::default()
            });
            let mut model = Model::new(&base.guest);
            for step in WORKLOAD {
                let result = run(&rig, step);
                model.note(step, &result);
            }
            // Metadata may not find room either.
            let closed = rig.close().is_ok();
            base.judge(&path, &model, closed, &what);
            if !closed {
                model.now.clone_from(&model.torn_down);
            }

            let rig = Rig::open(&path);
            for step in WORKLOAD {
                let result = run(&rig, step);
                assert!(result.is_ok(), "{what}: {step:?} after a new open: {result:?}");
                model.note(step, &result);
            }
            rig.close().unwrap_or_else(|error| panic!("{what}: close: {error}"));
            base.judge(&path, &model, true, &what);
        });
    }
}
