//! One iothread's part: it keeps a number of operations in flight through the
//! completion door and has a [`Model`] judge what they bring.
//!
//! A [`Worker`] goes through a sequence of operations on whatever loop runs it:
//! first those of its plan, then, when all have stopped, reads of everything it
//! owns. Between the two it is a plain value.
//!
//! Memory comes from a pool and is poisoned before a read, so that a read that
//! fills nothing does not pass for one that found what the memory held before.
//! One buffer in eight is given as two pieces that meet at an odd address, for
//! the paths that bounce.

use blockplex::io::event_loop::yield_now;
use blockplex::{Backend, BufferPool, Completion, Error, IoBuffer, IoVector, Queue, Request};

use super::block_pattern::SECTOR_BYTES;
use super::control::Control;
use super::layout::{Extent, Layout};
use super::plan::Operation;
use super::report::Tally;
use super::verify::{Completion as Completed, Model, Ticket, Verdict};
use crate::random::Random;

/// The first of the stream numbers of the seed that shape buffers.
const STREAM: u64 = 1 << 33;

/// What memory holds before a read. No stamped sector has two such bytes in its
/// magic number.
const POISON: u8 = 0xdb;

/// How many requests are reaped before the loop gets to do other things, where
/// everything completes on the spot.
const STINT: usize = 256;

/// The most memory that rests in a pool.
const POOL_BYTES: usize = 16 << 20;

/// One iothread's state.
pub struct Worker {
    thread: u32,
    disk: Backend,
    model: Model,
    tally: Tally,
    shapes: Random,
    pool: BufferPool,
    /// What is in flight, by cookie.
    slots: Vec<Option<Ticket>>,
    free: Vec<usize>,
    /// Reads to be made again.
    again: Vec<Ticket>,
}

impl Worker {
    /// The worker for a thread of the layout. `identity` goes into every stamp
    /// and should be another in each run.
    pub fn new(
        disk: &Backend,
        layout: &Layout,
        thread: u32,
        depth: u32,
        seed: u64,
        identity: u64,
    ) -> Self {
        let depth = depth as usize;
        Self {
            thread,
            disk: disk.clone(),
            model: Model::new(layout, identity, thread),
            tally: Tally::default(),
            shapes: Random::new(seed, STREAM + u64::from(thread)),
            pool: BufferPool::new(POOL_BYTES),
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).collect(),
            again: Vec::new(),
        }
    }

    /// What it has done.
    pub fn into_tally(self) -> Tally {
        self.tally
    }

    /// Goes through `operations` until they end, or one fails: that fails the
    /// run. Everything begun has ended when this returns.
    pub async fn perform(
        &mut self,
        mut operations: impl Iterator<Item = Operation>,
        control: &Control,
    ) {
        let queue = match self.disk.queue(&format!("iothread {}", self.thread)) {
            Ok(queue) => queue,
            Err(error) => return self.fail(control, "making a queue", &error),
        };
        let depth = self.slots.len();
        let mut completions: Vec<Completion> = Vec::with_capacity(depth);
        let mut stint = 0;
        loop {
            while let Some(slot) = self.free.pop() {
                let failed = control.failure().is_some();
                let ticket = if failed { None } else { self.next(&mut operations) };
                let Some(ticket) = ticket else {
                    self.free.push(slot);
                    break;
                };
                self.submit(&queue, slot, ticket);
            }
            if self.free.len() == depth {
                return;
            }
            queue.ready().await;
            stint += queue.reap(&mut completions, depth);
            for completion in completions.drain(..) {
                self.end(completion, control);
            }
            if stint >= STINT {
                stint = 0;
                yield_now().await;
            }
        }
    }

    fn next(&mut self, operations: &mut impl Iterator<Item = Operation>) -> Option<Ticket> {
        self.again.pop().or_else(|| operations.next().map(|next| self.model.begin(next)))
    }

    fn submit(&mut self, queue: &Queue, slot: usize, ticket: Ticket) {
        let request = match ticket.operation() {
            Operation::Read(extent) => {
                let mut buffer = self.pool.take(bytes(extent.count) as usize);
                buffer.fill(POISON);
                Request::read(bytes(extent.first), self.shape(buffer))
            }
            Operation::Write { extent, force_unit_access } => {
                let mut buffer = self.pool.take(bytes(extent.count) as usize);
                self.model.fill(&ticket, &mut buffer);
                let request = Request::write(bytes(extent.first), self.shape(buffer));
                if force_unit_access { request.fua() } else { request }
            }
            Operation::WriteZeroes { extent, may_unmap } => {
                let request = Request::write_zeroes(bytes(extent.first), bytes(extent.count));
                if may_unmap { request.may_unmap() } else { request }
            }
            Operation::Discard(extent) => {
                Request::discard(bytes(extent.first), bytes(extent.count))
            }
            Operation::Flush => Request::flush(),
        };
        self.slots[slot] = Some(ticket);
        queue.submit(request, slot as u64);
    }

    /// A buffer as one piece, or as two.
    fn shape(&mut self, buffer: IoBuffer) -> IoVector {
        let whole = IoVector::from(buffer);
        if self.shapes.below(8) != 0 {
            return whole;
        }
        let cut = self.shapes.below(whole.len() as u64) as usize;
        let parts = [whole.slice(0, cut), whole.slice(cut, whole.len() - cut)];
        IoVector::concatenate(&parts)
    }

    fn end(&mut self, completion: Completion, control: &Control) {
        let slot = completion.cookie as usize;
        let Some(ticket) = self.slots.get_mut(slot).and_then(Option::take) else {
            let text = format!("a request completed twice, or was never made (cookie {slot})");
            return control.fail(|| text);
        };
        self.free.push(slot);
        control.count_request(self.thread);
        let operation = ticket.operation();
        let verdict = match completion.result {
            Err(error) => {
                self.fail(control, &describe(&operation), &error);
                self.model.end(ticket, Completed::Failed)
            }
            Ok(_) => {
                self.tally.count(&operation);
                match completion.vector.into_buffer() {
                    Ok(buffer) => self.model.end(ticket, Completed::Done(&buffer)),
                    Err(vector) => self.model.end(ticket, Completed::Done(&vector.to_vec())),
                }
            }
        };
        match verdict {
            Verdict::Clean => {}
            Verdict::ReadAgain(ticket) => self.again.push(ticket),
            Verdict::Mismatch(mismatch) => self.tally.count_mismatch(self.thread, &mismatch),
        }
    }

    fn fail(&self, control: &Control, what: &str, error: &Error) {
        control.fail(|| format!("iothread {}: {what}: {}", self.thread, crate::message(error)));
    }
}

fn bytes(sectors: u64) -> u64 {
    sectors * SECTOR_BYTES as u64
}

/// An operation, for an error message.
fn describe(operation: &Operation) -> String {
    let (name, extent) = match operation {
        Operation::Read(extent) => ("read", extent),
        Operation::Write { extent, .. } => ("write", extent),
        Operation::WriteZeroes { extent, .. } => ("write-zeroes", extent),
        Operation::Discard(extent) => ("discard", extent),
        Operation::Flush => return "flush".to_owned(),
    };
    let Extent { first, count } = *extent;
    format!("{name} of {count} sectors at sector {first}")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use blockplex::{Blockplex, IoThread, LoopConfig, OpenOptions, block_on};

    use super::super::mutation::Mutation;
    use super::super::plan::Plan;
    use super::super::report::{MutationTally, Report};
    use super::*;

    /// Lets one worker do some operations on a disk, then read all it owns.
    fn stress(options: &str) -> (Report, Option<String>) {
        let layer = Blockplex::new().unwrap();
        let options = OpenOptions::parse(options).unwrap();
        let disk = block_on(layer.open("disk", options)).unwrap().unwrap();
        let layout = Layout::new(disk.length().unwrap() / 512, 1, 8).unwrap();
        let mut worker = Worker::new(&disk, &layout, 0, 16, 7, 99);
        let thread = IoThread::spawn(LoopConfig::default()).unwrap();
        let work = move |_| async move {
            let control = Control::new(1);
            let mut plan = Plan::new(&layout, 7, 0);
            let planned = std::iter::from_fn(|| Some(plan.operation())).take(5000);
            worker.perform(planned, &control).await;
            worker.perform(layout.shares(0).map(Operation::Read), &control).await;
            (worker.into_tally(), control.failure())
        };
        let task = thread.handle().spawn_with(work).unwrap();
        let (tally, failure) = block_on(task).unwrap().unwrap();
        block_on(disk.close()).unwrap().unwrap();
        let mut mutations = MutationTally::default();
        mutations.count(Mutation::Drain);
        (Report::new("disk".into(), 7, Duration::ZERO, &[tally], &mutations), failure)
    }

    #[test]
    fn a_disk_that_keeps_its_promises_passes() {
        let (report, failure) = stress("driver=memory,size=2M");
        assert_eq!((report.mismatches, failure), (0, None));
        // All of the plan, then every share of 4 KiB.
        assert_eq!(report.operations, 5000 + 512);
    }

    #[test]
    fn a_disk_that_forgets_is_noticed() {
        let (report, failure) = stress("driver=null-co,size=2M,read-zeroes=on");
        assert_eq!(failure, None);
        assert!(report.mismatches > 0);
    }

    #[test]
    fn a_read_that_brings_nothing_is_noticed() {
        let (report, _) = stress("driver=null-co,size=2M,read-zeroes=off");
        assert!(report.to_string().contains("damaged from byte 0"), "{report}");
    }

    #[test]
    fn a_failed_request_ends_the_run_with_its_reason() {
        let (report, failure) = stress("driver=memory,size=2M,read-only=on");
        let failure = failure.unwrap();
        assert!(failure.starts_with("iothread 0: "), "{failure}");
        assert!(report.operations < 5000);
    }
}
