//! A model must never accuse a disk that keeps its promises, and must notice
//! every way of breaking them.

use super::super::plan::Plan;
use super::*;
use crate::random::Random;

const DISK: u64 = 0xd15c;
const SECTORS: u64 = 2048;

fn layout(threads: u32) -> Layout {
    Layout::new(SECTORS, threads, 8).unwrap()
}

/// A disk of one thread, to which operations are done at once.
struct Small {
    model: Model,
    bytes: Vec<u8>,
    extent: Extent,
}

impl Small {
    fn new() -> Self {
        let layout = layout(2);
        let extent = layout.chunk(layout.fine(), 0, 1);
        let bytes = vec![0; SECTORS as usize * SECTOR_BYTES];
        Self { model: Model::new(&layout, DISK, 0), bytes, extent }
    }

    fn write(&mut self) {
        let operation = Operation::Write { extent: self.extent, force_unit_access: false };
        let ticket = self.model.begin(operation);
        self.model.fill(&ticket, &mut self.bytes[range(self.extent)]);
        let verdict = self.model.end(ticket, Completion::Done(&[]));
        assert!(matches!(verdict, Verdict::Clean));
    }

    fn read(&mut self, extent: Extent) -> Result<(), Fault> {
        let mut ticket = self.model.begin(Operation::Read(extent));
        loop {
            let data = &self.bytes[range(extent)];
            ticket = match self.model.end(ticket, Completion::Done(data)) {
                Verdict::Clean => return Ok(()),
                Verdict::Mismatch(mismatch) => return Err(mismatch.fault),
                Verdict::ReadAgain(again) => again,
            }
        }
    }

    fn read_own(&mut self) -> Result<(), Fault> {
        self.read(self.extent)
    }
}

fn range(extent: Extent) -> std::ops::Range<usize> {
    let start = extent.first as usize * SECTOR_BYTES;
    start..start + extent.count as usize * SECTOR_BYTES
}

#[test]
fn what_was_written_is_accepted() {
    let mut disk = Small::new();
    assert_eq!(disk.read_own(), Ok(()));
    disk.write();
    assert_eq!(disk.read_own(), Ok(()));
    assert!(disk.model.histories.is_empty(), "all sectors are at rest");
}

#[test]
fn a_corrupted_sector_is_noticed() {
    let mut disk = Small::new();
    disk.write();
    // Byte 188 of the second sector, in the word that begins at 184.
    disk.bytes[range(disk.extent)][700] ^= 0x10;
    assert_eq!(disk.read_own(), Err(Fault::Damaged { first_wrong: 184 }));
}

#[test]
fn a_stale_sequence_is_noticed() {
    let mut disk = Small::new();
    disk.write();
    let old = disk.bytes.clone();
    disk.write();
    disk.bytes = old;
    let fault = Fault::Illegal { found: Value(1), legal: vec![Value(2)] };
    assert_eq!(disk.read_own(), Err(fault));
}

#[test]
fn a_lost_write_is_noticed() {
    let mut disk = Small::new();
    disk.write();
    disk.bytes.fill(0);
    let fault = Fault::Illegal { found: Value::ZERO, legal: vec![Value(1)] };
    assert_eq!(disk.read_own(), Err(fault));
}

#[test]
fn a_misplaced_sector_is_noticed_by_its_owner_and_by_others() {
    for to in [Small::new().extent.first + 1, 0, 8, SECTORS - 1] {
        let mut disk = Small::new();
        disk.write();
        let from = Extent { first: disk.extent.first, count: 1 };
        let sector = disk.bytes[range(from)].to_vec();
        let to = Extent { first: to, count: 1 };
        disk.bytes[range(to)].copy_from_slice(&sector);
        let fault = disk.read(to).unwrap_err();
        assert!(matches!(fault, Fault::Misplaced(stamp) if stamp.sector == from.first), "{to:?}");
    }
}

#[test]
fn data_of_another_run_is_noticed() {
    let mut earlier = Small::new();
    earlier.model = Model::new(&layout(2), DISK + 1, 0);
    earlier.write();
    let mut disk = Small::new();
    disk.write();
    disk.bytes = earlier.bytes;
    assert!(matches!(disk.read_own(), Err(Fault::OtherDisk(_))));
}

#[test]
fn sectors_written_by_the_wrong_thread_are_noticed() {
    let mut disk = Small::new();
    disk.write();
    let owner = layout(2).place(disk.extent.first).unwrap().owner;
    let sector = disk.extent.first;
    let stamp = Stamp { disk: DISK, sector, writer: owner + 1, sequence: 1 };
    let bytes = &mut disk.bytes[range(disk.extent)];
    stamp.write_to(bytes.first_chunk_mut().unwrap());
    assert_eq!(disk.read_own(), Err(Fault::WrongWriter(stamp)));

    let layout = Layout::new(SECTORS, 3, 8).unwrap();
    let nobodys = (0..SECTORS).find(|&sector| layout.place(sector).is_none()).unwrap();
    disk.model = Model::new(&layout, DISK, 0);
    let stamp = Stamp { disk: DISK, sector: nobodys, writer: 0, sequence: 1 };
    let extent = Extent { first: nobodys, count: 1 };
    stamp.write_to(disk.bytes[range(extent)].first_chunk_mut().unwrap());
    assert_eq!(disk.read(extent), Err(Fault::NeverWritten(stamp)));
}

#[test]
fn a_short_read_is_noticed_and_a_failed_one_is_not_a_mismatch() {
    let mut disk = Small::new();
    let ticket = disk.model.begin(Operation::Read(disk.extent));
    let verdict = disk.model.end(ticket, Completion::Done(&[0; 512]));
    let Verdict::Mismatch(mismatch) = verdict else { panic!("{verdict:?}") };
    assert_eq!(mismatch, Mismatch { sector: disk.extent.first + 1, fault: Fault::Short });
    let ticket = disk.model.begin(Operation::Read(disk.extent));
    assert!(matches!(disk.model.end(ticket, Completion::Failed), Verdict::Clean));
    assert!(disk.model.histories.is_empty());
}

#[test]
fn a_torn_foreign_sector_is_read_again_before_it_is_a_fault() {
    let mut disk = Small::new();
    let layout = layout(2);
    let foreign = layout.chunk(layout.fine(), 1, 0);
    let ticket = disk.model.begin(Operation::Read(foreign));
    let torn = vec![0xaa; foreign.count as usize * SECTOR_BYTES];
    let verdict = disk.model.end(ticket, Completion::Done(&torn));
    let Verdict::ReadAgain(again) = verdict else { panic!("{verdict:?}") };
    let whole = vec![0; torn.len()];
    assert!(matches!(disk.model.end(again, Completion::Done(&whole)), Verdict::Clean));
    disk.bytes[range(foreign)].fill(0xaa);
    assert_eq!(disk.read(foreign), Err(Fault::Damaged { first_wrong: 0 }));
}

/// What the simulated disk does wrong, in one of many operations.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Flaw {
    None,
    /// A write does not reach the disk.
    Lost,
    /// A write goes to the cluster after the right one.
    Misdirected,
    /// The last sector of a write does not reach the disk.
    Short,
    /// A write of zeroes does not reach the disk.
    NotZeroed,
    /// A discard also hits the sectors behind it.
    DiscardsTooMuch,
    /// A completed write is undone, as by an allocation that was forgotten.
    RolledBack,
}

/// Several threads on one disk. Operations take effect, whole, at some moment
/// between their begin and their end.
struct Simulation {
    threads: Vec<(Plan, Model)>,
    bytes: Vec<u8>,
    flaw: Flaw,
    random: Random,
    operations: u64,
}

/// An operation that has begun: its thread, its data once it took effect.
struct Flight {
    thread: usize,
    ticket: Ticket,
    buffer: Vec<u8>,
    effective: bool,
}

impl Simulation {
    fn new(flaw: Flaw, seed: u64) -> Self {
        let layout = layout(3);
        let thread = |index| (Plan::new(&layout, seed, index), Model::new(&layout, DISK, index));
        Self {
            threads: (0..3).map(thread).collect(),
            bytes: vec![0; SECTORS as usize * SECTOR_BYTES],
            flaw,
            random: Random::new(seed, 99),
            operations: 0,
        }
    }

    /// The first mismatch in so many steps.
    fn run(&mut self, steps: u32) -> Option<Mismatch> {
        let mut flights: Vec<Flight> = Vec::new();
        for _ in 0..steps {
            let chosen = self.random.below(flights.len() as u64) as usize;
            match self.random.below(3) {
                0 if flights.len() < 12 => flights.push(self.begin()),
                1 if chosen < flights.len() => self.take_effect(&mut flights[chosen]),
                _ if chosen < flights.len() => {
                    let flight = flights.swap_remove(chosen);
                    if let Err(mismatch) = self.end(flight, &mut flights) {
                        return Some(mismatch);
                    }
                }
                _ => {}
            }
        }
        None
    }

    fn begin(&mut self) -> Flight {
        let thread = self.random.below(self.threads.len() as u64) as usize;
        let (plan, model) = &mut self.threads[thread];
        let ticket = model.begin(plan.operation());
        let mut buffer = Vec::new();
        if let Operation::Write { extent, .. } | Operation::Read(extent) = ticket.operation() {
            buffer.resize(extent.count as usize * SECTOR_BYTES, 0xcc);
            model.fill(&ticket, &mut buffer);
        }
        self.operations += 1;
        Flight { thread, ticket, buffer, effective: false }
    }

    fn take_effect(&mut self, flight: &mut Flight) {
        if std::mem::replace(&mut flight.effective, true) {
            return;
        }
        let flawed = self.random.below(20) == 0;
        match flight.ticket.operation() {
            Operation::Read(extent) => flight.buffer.copy_from_slice(&self.bytes[range(extent)]),
            Operation::Write { extent, .. } => self.write(extent, &flight.buffer, flawed),
            Operation::WriteZeroes { extent, .. } => {
                if !(flawed && self.flaw == Flaw::NotZeroed) {
                    self.bytes[range(extent)].fill(0);
                }
            }
            Operation::Discard(mut extent) => {
                if flawed && self.flaw == Flaw::DiscardsTooMuch {
                    extent.count = (extent.count + 64).min(SECTORS - extent.first);
                }
                if self.random.percent(50) {
                    self.bytes[range(extent)].fill(0);
                }
            }
            Operation::Flush => {}
        }
    }

    fn write(&mut self, mut extent: Extent, data: &[u8], flawed: bool) {
        let mut length = data.len();
        if flawed {
            match self.flaw {
                Flaw::Lost => return,
                Flaw::Misdirected if extent.first + 128 + extent.count <= SECTORS => {
                    extent.first += 128;
                }
                Flaw::Short => length -= SECTOR_BYTES,
                _ => {}
            }
        }
        let before = self.bytes[range(extent)].to_vec();
        self.bytes[range(extent)][..length].copy_from_slice(&data[..length]);
        if flawed && self.flaw == Flaw::RolledBack && self.random.percent(50) {
            self.bytes[range(extent)].copy_from_slice(&before);
        }
    }

    fn end(&mut self, mut flight: Flight, flights: &mut Vec<Flight>) -> Result<(), Mismatch> {
        self.take_effect(&mut flight);
        let model = &mut self.threads[flight.thread].1;
        match model.end(flight.ticket, Completion::Done(&flight.buffer)) {
            Verdict::Clean => Ok(()),
            Verdict::Mismatch(mismatch) => Err(mismatch),
            Verdict::ReadAgain(ticket) => {
                flights.push(Flight { ticket, effective: false, ..flight });
                Ok(())
            }
        }
    }
}

#[test]
fn a_disk_that_keeps_its_promises_is_never_accused() {
    for seed in 0..10 {
        let mut simulation = Simulation::new(Flaw::None, seed);
        if let Some(mismatch) = simulation.run(20_000) {
            panic!("seed {seed}: {mismatch}");
        }
        assert!(simulation.operations > 4_000);
    }
}

#[test]
fn every_flaw_of_a_disk_is_noticed() {
    for flaw in [
        Flaw::Lost,
        Flaw::Misdirected,
        Flaw::Short,
        Flaw::NotZeroed,
        Flaw::DiscardsTooMuch,
        Flaw::RolledBack,
    ] {
        for seed in 0..5 {
            let found = Simulation::new(flaw, seed).run(20_000);
            assert!(found.is_some(), "{flaw:?} went unnoticed with seed {seed}");
        }
    }
}

#[test]
fn a_mismatch_can_be_understood_from_its_message() {
    let fault = Fault::Illegal { found: Value::ZERO, legal: vec![Value(3), Value(4)] };
    let text = Mismatch { sector: 9, fault }.to_string();
    assert_eq!(text, "sector 9: contains zeroes, but may only contain write 3 or write 4");
}
