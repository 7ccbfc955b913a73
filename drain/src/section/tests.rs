//! The rules of sections, one by one, on one or two threads.

use super::*;
use crate::DrainHooks;
use crate::ledger::{RequestRecord, kind};
use crate::testing::{CountingWake, block_on};
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

fn gate(name: &str) -> Arc<Gate> {
    Gate::new(name, None)
}

fn drain(gates: &[&Arc<Gate>]) -> Section {
    Section::freeze(gates.iter().map(|gate| Arc::clone(gate))).announce()
}

type Calls = Arc<Mutex<Vec<String>>>;

/// Appends `name+` and `name-` to a common log.
struct Log(String, Calls);

impl DrainHooks for Log {
    fn drain_begin(&self) {
        self.1.lock().push(format!("{}+", self.0));
    }
    fn drain_end(&self) {
        self.1.lock().push(format!("{}-", self.0));
    }
}

fn logging_gate(name: &str, calls: &Calls) -> Arc<Gate> {
    Gate::new(name, Some(Box::new(Log(name.to_owned(), calls.clone()))))
}

#[test]
fn an_idle_gate_settles_at_once() {
    let disk = gate("disk");
    let slot = disk.open_slot("queue");
    let section = drain(&[&disk]);
    assert!(section.is_settled());
    block_on(section.wait());
    assert!(!slot.try_enter());
    drop(section);
    assert!(slot.try_enter());
    slot.exit();
}

#[test]
fn the_last_exit_wakes_the_wait_and_only_the_last() {
    let (disk, nic) = (gate("disk"), gate("nic"));
    let slots = [disk.open_slot("0"), disk.open_slot("1"), nic.open_slot("0")];
    assert!(slots.iter().all(|slot| slot.try_enter()));
    assert!(slots[0].try_enter());
    let section = drain(&[&disk, &nic]);
    let (wake, waker) = CountingWake::new();
    let mut wait = section.wait();
    let mut poll = || Pin::new(&mut wait).poll(&mut Context::from_waker(&waker));
    assert!(poll().is_pending());
    slots[0].exit();
    slots[1].exit();
    assert_eq!(wake.count(), 0);
    slots[0].exit();
    assert_eq!(wake.count(), 1);
    assert!(poll().is_pending(), "the second gate is still busy");
    slots[2].exit();
    assert_eq!(wake.count(), 2);
    assert_eq!(poll(), Poll::Ready(()));
    assert!(section.is_settled());
}

#[test]
fn a_request_on_another_thread_is_waited_for() {
    let disk = gate("disk");
    let (admitted, was_admitted) = std::sync::mpsc::channel();
    let (release, was_released) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let disk = &disk;
        scope.spawn(move || {
            let slot = disk.open_slot("queue");
            assert!(slot.try_enter());
            admitted.send(()).expect("the test listens");
            was_released.recv().expect("the test releases");
            slot.exit();
        });
        was_admitted.recv().expect("the request is admitted");
        let section = drain(&[disk]);
        assert!(!section.is_settled());
        release.send(()).expect("the request waits");
        block_on(section.wait());
        assert_eq!(disk.in_flight(), 0);
    });
}

#[test]
fn two_waits_on_one_section_are_both_woken() {
    let disk = gate("disk");
    let slot = disk.open_slot("queue");
    assert!(slot.try_enter());
    let section = drain(&[&disk]);
    let (wake, waker) = CountingWake::new();
    let mut waits = [section.wait(), section.wait()];
    let mut context = Context::from_waker(&waker);
    for wait in &mut waits {
        assert!(Pin::new(wait).poll(&mut context).is_pending());
    }
    slot.exit();
    assert_eq!(wake.count(), 2);
    for wait in &mut waits {
        assert!(Pin::new(wait).poll(&mut context).is_ready());
    }
}

#[test]
fn nested_sections_open_with_the_last_whatever_the_order() {
    let (disk, nic) = (gate("disk"), gate("nic"));
    let slot = disk.open_slot("queue");
    let outer = drain(&[&disk, &nic]);
    let inner = drain(&[&disk]);
    assert_eq!((disk.frozen_count(), nic.frozen_count()), (2, 1));
    drop(outer);
    assert!(!slot.try_enter());
    assert!(!nic.is_frozen());
    assert!(inner.is_settled());
    drop(inner);
    assert!(slot.try_enter());
    slot.exit();
}

#[test]
fn a_gate_named_twice_is_frozen_once() {
    let disk = gate("disk");
    let section = drain(&[&disk, &disk]);
    assert_eq!(disk.frozen_count(), 1);
    assert_eq!(section.gates().len(), 1);
    assert!(section.covers(&disk) && !section.covers(&gate("disk")));
    drop(section);
    assert_eq!(disk.frozen_count(), 0);
}

#[test]
fn an_unannounced_freeze_opens_again_without_hooks() {
    let calls = Calls::default();
    let disk = logging_gate("disk", &calls);
    let frozen = Section::freeze([disk.clone()]);
    let reference = frozen.reference();
    assert!(disk.is_frozen() && reference.is_active());
    drop(frozen);
    assert!(!disk.is_frozen() && !reference.is_active());
    assert!(calls.lock().is_empty());
}

#[test]
fn hooks_run_once_per_outermost_section_last_gate_first_at_the_end() {
    let calls = Calls::default();
    let (a, b) = (logging_gate("a", &calls), logging_gate("b", &calls));
    let outer = drain(&[&a, &b]);
    let inner = drain(&[&b]);
    drop(inner);
    drop(outer);
    assert_eq!(*calls.lock(), ["a+", "b+", "b-", "a-"]);
    let first = drain(&[&a]);
    let second = drain(&[&a]);
    drop(first);
    assert_eq!(calls.lock().len(), 5, "the second section still needs the hooks begun");
    drop(second);
    assert_eq!(calls.lock()[4..], ["a+", "a-"]);
}

/// While `drain_end` runs, another section of the same gate begins.
#[derive(Default)]
struct BeginsAgain {
    gate: Mutex<Option<Arc<Gate>>>,
    section: Mutex<Option<Section>>,
    calls: Mutex<Vec<&'static str>>,
}

impl DrainHooks for Arc<BeginsAgain> {
    fn drain_begin(&self) {
        self.calls.lock().push("begin");
    }
    fn drain_end(&self) {
        self.calls.lock().push("end");
        let gate = self.gate.lock().take();
        let section = gate.map(|gate| drain(&[&gate]));
        if let Some(section) = &section {
            assert!(!section.is_settled(), "settled before its drain_begin (D2)");
        }
        *self.section.lock() = section;
    }
}

#[test]
fn a_section_begun_inside_drain_end_waits_for_its_own_begin() {
    let hooks = Arc::<BeginsAgain>::default();
    let disk = Gate::new("disk", Some(Box::new(hooks.clone())));
    *hooks.gate.lock() = Some(disk.clone());
    drop(drain(&[&disk]));
    assert_eq!(*hooks.calls.lock(), ["begin", "end", "begin"]);
    let section = hooks.section.lock().take().expect("begun in drain_end");
    assert!(section.is_settled());
    drop(section);
    assert_eq!(*hooks.calls.lock(), ["begin", "end", "begin", "end"]);
}

#[test]
fn a_hook_that_panics_does_not_block_the_gate() {
    struct Panics;
    impl DrainHooks for Panics {
        fn drain_begin(&self) {
            panic!("a hook's own bug");
        }
        fn drain_end(&self) {}
    }
    let disk = Gate::new("disk", Some(Box::new(Panics)));
    let frozen = Section::freeze([disk.clone()]);
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| frozen.announce()));
    assert!(outcome.is_err());
    assert!(!disk.is_frozen(), "the unwound section has opened it again");
}

#[test]
fn an_adopted_gate_stays_shut_until_its_adopting_section_ends() {
    let (a, b) = (gate("a"), gate("b"));
    let slot = b.open_slot("queue");
    let section = drain(&[&a]);
    let reference = section.reference();
    let committer = drain(&[&b]);
    assert!(section.is_settled() && committer.is_settled());
    assert!(reference.adopt(b.clone()));
    assert!(!section.adopt(b.clone()), "listed already");
    drop(committer);
    assert!(!slot.try_enter());
    assert!(section.is_settled() && reference.covers(&b));
    drop(section);
    assert!(slot.try_enter());
    slot.exit();
    let other = drain(&[&b]);
    assert!(!reference.adopt(b.clone()), "the section has ended");
    assert_eq!(b.frozen_count(), 1);
    drop(other);
}

#[test]
fn a_gate_adopted_before_the_announcement_is_announced_with_the_rest() {
    let calls = Calls::default();
    let born = logging_gate("born", &calls);
    let birth = Section::freeze([born.clone()]);
    let frozen = Section::freeze([gate("a")]);
    assert!(frozen.reference().adopt(born.clone()));
    let section = frozen.announce();
    drop(birth);
    assert!(section.is_settled());
    assert_eq!(*calls.lock(), ["born+"]);
    drop(section);
    assert_eq!(*calls.lock(), ["born+", "born-"]);
    assert!(!born.is_frozen());
}

#[test]
fn a_gate_adopted_without_its_hooks_begun_begins_them_in_the_wait() {
    let calls = Calls::default();
    let born = logging_gate("born", &calls);
    let birth = Section::freeze([born.clone()]);
    let section = drain(&[&gate("a")]);
    assert!(section.adopt(born.clone()));
    assert!(calls.lock().is_empty(), "adoption calls no hook");
    assert!(!section.is_settled());
    block_on(section.wait());
    assert_eq!(*calls.lock(), ["born+"]);
    drop(birth);
    drop(section);
    assert_eq!(*calls.lock(), ["born+", "born-"]);
}

#[test]
fn a_cancelled_wait_leaves_no_waker_and_the_section_shut() {
    let disk = gate("disk");
    let slot = disk.open_slot("queue");
    assert!(slot.try_enter());
    let section = drain(&[&disk]);
    let (wake, waker) = CountingWake::new();
    let mut wait = section.wait();
    assert!(Pin::new(&mut wait).poll(&mut Context::from_waker(&waker)).is_pending());
    drop(wait);
    assert_eq!(Arc::strong_count(&wake), 2, "only this test's own two are left");
    slot.exit();
    assert_eq!(wake.count(), 0);
    assert!(disk.is_frozen() && section.is_settled());
}

#[test]
fn refused_requests_do_not_unsettle_a_section() {
    let disk = gate("disk");
    let section = drain(&[&disk]);
    block_on(section.wait());
    let slot = disk.open_slot("opened during the section");
    let second = drain(&[&disk]);
    for _ in 0..10 {
        assert!(!slot.try_enter());
        assert!(section.is_settled() && second.is_settled());
    }
}

#[test]
fn a_generation_is_the_origins_own() {
    let (a, b) = (gate("a"), gate("b"));
    let section = drain(&[&a]);
    a.bump_generation();
    drop(section);
    assert_eq!((a.generation(), b.generation()), (1, 0));
}

#[test]
fn holders_are_the_busy_slots_of_the_sections_gates() {
    let (disk, other) = (gate("backend 'disk0'"), gate("backend 'other'"));
    let (busy, idle) = (disk.open_slot("queue 'loop 1'"), disk.open_slot("queue 'loop 2'"));
    let foreign = other.open_slot("queue 'loop 1'");
    assert!(busy.try_enter() && foreign.try_enter());
    let record = RequestRecord {
        kind: kind::READ,
        offset: 8192,
        length: 4096,
        started_ns: 1_000_000,
        node: 2,
    };
    busy.record(5, record);
    busy.set_node(5, 3);
    let section = drain(&[&disk]);
    let holders = section.holders_at(13_000_000);
    let texts: Vec<_> = holders.iter().map(ToString::to_string).collect();
    let expected = "backend 'disk0' queue 'loop 1': read 4096 bytes at 8192, node 3, 12 ms";
    assert_eq!(texts, [expected]);
    busy.clear_record(5);
    busy.exit();
    assert!(section.holders().is_empty());
    foreign.exit();
    assert_eq!(idle.in_flight(), 0);
}

#[test]
fn sections_travel_between_threads() {
    fn is_send_and_sync<T: Send + Sync>() {}
    is_send_and_sync::<Section>();
    is_send_and_sync::<Frozen>();
    is_send_and_sync::<SectionRef>();
    is_send_and_sync::<Settle<'static>>();
    let disk = gate("disk");
    let frozen = Section::freeze([disk.clone()]);
    let section = std::thread::spawn(move || frozen.announce()).join();
    let section = section.expect("announcing does not panic");
    assert!(section.is_settled());
    std::thread::spawn(move || drop(section)).join().expect("ending does not panic");
    assert!(!disk.is_frozen());
}
