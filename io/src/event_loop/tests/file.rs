//! Reads, writes and the like (W11–W14, W18, C01).

use super::*;
use crate::buffer::{IoBuffer, IoVector, StableMemory};
use crate::engine::{Engine, Operation, RawOp, Sink};
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::atomic::AtomicU8;

on_each_engine! {
    what_was_written_is_read_back_in_whatever_pieces
    a_read_across_the_end_is_short_and_one_behind_it_is_empty
    errors_come_back_as_negative_errnos
    space_is_allocated_and_punched
    more_operations_than_the_ring_holds_all_complete_once
    a_chain_of_completions_that_submit_uses_no_stack
    a_sink_that_panics_loses_no_other_result
    a_dropped_read_keeps_its_memory_until_the_kernel_is_done
    memory_of_an_embedder_is_kept_until_its_read_has_ended
    a_cancellation_that_meets_the_completion_changes_nothing
    operations_on_a_loop_that_has_ended_are_refused
}

fn scratch() -> Arc<OwnedFd> {
    Arc::new(OwnedFd::from(tempfile::tempfile().expect("a temporary file")))
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index % 251) as u8).collect()
}

fn vector(bytes: &[u8]) -> IoVector {
    IoBuffer::from_slice(bytes).into_vector()
}

fn what_was_written_is_read_back_in_whatever_pieces(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let (local, file, bytes) = (event_loop.local(), scratch(), pattern(20_000));
    event_loop.block_on(async {
        let parts = [vector(&bytes[..100]), vector(&bytes[100..9_000]), vector(&bytes[9_000..])];
        let whole = IoVector::concatenate(&parts);
        assert_eq!(local.write_at(Arc::clone(&file), whole, 512, false).await, 20_000);
        let overwrite = vector(&bytes[..10]);
        assert_eq!(local.write_at(Arc::clone(&file), overwrite, 512, true).await, 10);
        assert_eq!(local.fsync(Arc::clone(&file), true).await, 0);
        assert_eq!(local.fsync(Arc::clone(&file), false).await, 0);
        let one = IoVector::zeroed(20_000);
        assert_eq!(local.read_at(Arc::clone(&file), one.clone(), 512).await, 20_000);
        assert_eq!(one.to_vec(), bytes);
        let pieces = [IoVector::zeroed(7), IoVector::zeroed(19_993)];
        let several = IoVector::concatenate(&pieces);
        assert_eq!(local.read_at(file, several.clone(), 512).await, 20_000);
        assert_eq!(several.to_vec(), bytes);
    });
    assert_eq!(event_loop.local().ops_in_flight(), 0);
}

fn a_read_across_the_end_is_short_and_one_behind_it_is_empty(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let (local, file) = (event_loop.local(), scratch());
    event_loop.block_on(async {
        assert_eq!(local.write_at(Arc::clone(&file), vector(&[7; 256]), 0, false).await, 256);
        let room = IoVector::zeroed(512);
        assert_eq!(local.read_at(Arc::clone(&file), room.clone(), 0).await, 256);
        assert_eq!(local.read_at(Arc::clone(&file), room, 256).await, 0);
        assert_eq!(local.read_at(file, IoVector::empty(), 0).await, 0);
    });
}

fn errors_come_back_as_negative_errnos(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let local = event_loop.local();
    let readable = Arc::new(OwnedFd::from(File::open("/dev/null").unwrap()));
    event_loop.block_on(async {
        let write = local.write_at(Arc::clone(&readable), vector(&[1]), 0, false);
        assert_eq!(write.await, -libc::EBADF);
        let read = local.read_at(scratch(), IoVector::zeroed(1), u64::MAX - 1);
        assert_eq!(read.await, -libc::EINVAL);
        let allocate = local.fallocate(readable, 0, 0, 1);
        assert!(allocate.await < 0);
    });
}

fn space_is_allocated_and_punched(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let (local, file) = (event_loop.local(), scratch());
    event_loop.block_on(async {
        assert_eq!(local.fallocate(Arc::clone(&file), 0, 0, 16_384).await, 0);
        let filled = vector(&[9; 16_384]);
        assert_eq!(local.write_at(Arc::clone(&file), filled, 0, false).await, 16_384);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        assert_eq!(local.fallocate(Arc::clone(&file), mode, 4096, 4096).await, 0);
        let room = IoVector::zeroed(16_384);
        assert_eq!(local.read_at(file, room.clone(), 0).await, 16_384);
        assert!(room.is_zero(4096, 4096));
        assert!(!room.is_zero(0, 4096) && !room.is_zero(8192, 4096));
    });
}

/// Counts completions by token.
struct Tally {
    results: RefCell<Vec<Option<i32>>>,
    left: Cell<usize>,
    waker: RefCell<Option<Waker>>,
}

impl Tally {
    fn new(count: usize) -> Rc<Tally> {
        let results = RefCell::new(vec![None; count]);
        Rc::new(Tally { results, left: Cell::new(count), waker: RefCell::new(None) })
    }

    async fn all(&self) {
        poll_fn(|context| {
            if self.left.get() == 0 {
                return Poll::Ready(());
            }
            *self.waker.borrow_mut() = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

impl Sink for Tally {
    fn complete(&self, token: u64, result: i32) {
        let before = self.results.borrow_mut()[token as usize].replace(result);
        assert_eq!(before, None, "an operation completes once");
        self.left.set(self.left.get() - 1);
        if self.left.get() == 0
            && let Some(waker) = self.waker.take()
        {
            waker.wake();
        }
    }
}

#[expect(unsafe_code, reason = "an operation without memory keeps the promise about it")]
fn submit_nop(local: &Local, sink: Rc<dyn Sink>, token: u64) {
    // SAFETY: it points to no memory and names no descriptor.
    unsafe { local.submit(RawOp::Nop, sink, token) };
}

fn more_operations_than_the_ring_holds_all_complete_once(config: LoopConfig) {
    const COUNT: usize = 1_000;
    let mut event_loop = new_loop(LoopConfig { ring_entries: 2, ..config });
    let (local, file) = (event_loop.local(), scratch());
    let tally = Tally::new(COUNT);
    for token in 0..COUNT {
        submit_nop(&local, tally.clone(), token as u64);
    }
    assert_eq!(local.ops_in_flight(), COUNT);
    event_loop.block_on(async {
        tally.all().await;
        assert!(tally.results.borrow().iter().all(|result| *result == Some(0)));
        // The same with real ones.
        assert_eq!(local.write_at(Arc::clone(&file), vector(&[3; 4096]), 0, false).await, 4096);
        let reads: Vec<_> = (0..200)
            .map(|_| local.spawn(local.read_at(Arc::clone(&file), IoVector::zeroed(4096), 0)))
            .collect();
        for read in reads {
            assert_eq!(read.await, Ok(4096));
        }
    });
    if let Engine::Ring(ring) = &local.core().engine {
        assert_eq!(ring.overflows(), 0);
    }
}

/// Submits its successor from its completion.
struct Chain {
    local: Local,
    left: Cell<u32>,
    own: RefCell<Option<Rc<Chain>>>,
}

impl Sink for Chain {
    fn complete(&self, _: u64, _: i32) {
        let left = self.left.get();
        let Some(own) = self.own.borrow_mut().take() else { return };
        if left > 0 {
            self.left.set(left - 1);
            *self.own.borrow_mut() = Some(Rc::clone(&own));
            submit_nop(&self.local, own, 0);
        }
    }
}

fn a_chain_of_completions_that_submit_uses_no_stack(config: LoopConfig) {
    const LINKS: u32 = 200_000;
    let run = move || {
        let mut event_loop = new_loop(config);
        let local = event_loop.local();
        let chain = Rc::new(Chain {
            local: local.clone(),
            left: Cell::new(LINKS),
            own: RefCell::new(None),
        });
        *chain.own.borrow_mut() = Some(Rc::clone(&chain));
        submit_nop(&local, chain.clone(), 0);
        while local.ops_in_flight() > 0 {
            event_loop.run_once(None);
        }
        assert_eq!(chain.left.get(), 0);
    };
    // Two hundred thousand frames of even ten bytes would not fit.
    let small = std::thread::Builder::new().stack_size(256 << 10).spawn(run).unwrap();
    assert!(small.join().is_ok());
}

fn a_sink_that_panics_loses_no_other_result(config: LoopConfig) {
    struct Grumpy;
    impl Sink for Grumpy {
        fn complete(&self, _: u64, _: i32) {
            panic!("a sink's own fault");
        }
    }
    let mut event_loop = new_loop(config);
    let local = event_loop.local();
    let tally = Tally::new(2);
    submit_nop(&local, tally.clone(), 0);
    submit_nop(&local, Rc::new(Grumpy), 0);
    submit_nop(&local, tally.clone(), 1);
    event_loop.block_on(tally.all());
    assert_eq!(*tally.results.borrow(), [Some(0), Some(0)]);
}

/// Polls `operation` once, which starts it.
fn start(event_loop: &mut EventLoop, operation: &mut Operation) {
    event_loop.block_on(poll_fn(|context| {
        assert!(Pin::new(&mut *operation).poll(context).is_pending());
        Poll::Ready(())
    }));
}

fn a_dropped_read_keeps_its_memory_until_the_kernel_is_done(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let local = event_loop.local();
    let (reader, writer) = io::pipe().unwrap();
    let (reader, memory) = (Arc::new(OwnedFd::from(reader)), IoVector::zeroed(64));
    let mut read = local.read_at(Arc::clone(&reader), memory.clone(), 0);
    start(&mut event_loop, &mut read);
    drop(read);
    assert_eq!((local.ops_in_flight(), local.orphans()), (1, 1));
    assert_eq!(Arc::strong_count(&reader), 2, "the descriptor stays open");
    let Err(memory) = memory.into_buffer() else { panic!("the operation shares the memory") };
    io::Write::write_all(&mut &writer, b"late").unwrap();
    while local.ops_in_flight() > 0 {
        event_loop.run_once(None);
    }
    assert_eq!(local.orphans(), 0);
    let Ok(buffer) = memory.into_buffer() else { panic!("nobody shares the memory any more") };
    assert_eq!(&buffer[..5], b"late\0");
    assert_eq!(Arc::strong_count(&reader), 1);
}

/// Memory of a guest, as an embedder has it.
struct Region(Box<[AtomicU8]>);

// SAFETY: the box neither moves nor goes before the region does.
#[expect(unsafe_code, reason = "the test is an embedder")]
unsafe impl StableMemory for Region {}

/// C02: the embedder takes the memory away while a read is in flight, and the reader has left.
#[expect(unsafe_code, reason = "the test is an embedder")]
fn memory_of_an_embedder_is_kept_until_its_read_has_ended(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let local = event_loop.local();
    let (reader, writer) = io::pipe().unwrap();
    let region = Arc::new(Region((0..64).map(|_| AtomicU8::new(0)).collect()));
    let piece = libc::iovec { iov_base: region.0.as_ptr().cast_mut().cast(), iov_len: 64 };
    let watch = Arc::downgrade(&region);
    // SAFETY: the piece is the region's memory, all of it.
    let memory = unsafe { IoVector::from_memory(region, &[piece]) };
    let mut read = local.read_at(Arc::new(reader.into()), memory, 0);
    start(&mut event_loop, &mut read);
    drop(read);
    assert_eq!(local.ops_in_flight(), 1);
    assert!(watch.upgrade().is_some(), "the kernel may still write to it");
    io::Write::write_all(&mut &writer, b"late").unwrap();
    while local.ops_in_flight() > 0 {
        event_loop.run_once(None);
    }
    assert!(watch.upgrade().is_none(), "nobody needs it any more");
}

/// C04: the kernel is done when the cancellation comes, or not yet. There is one result, and it says
/// what has happened.
fn a_cancellation_that_meets_the_completion_changes_nothing(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let local = event_loop.local();
    for round in 0..100_u8 {
        let (reader, writer) = io::pipe().unwrap();
        let reader = Arc::new(OwnedFd::from(reader));
        let memory = IoVector::zeroed(1);
        let mut read = local.read_at(Arc::clone(&reader), memory.clone(), 0);
        start(&mut event_loop, &mut read);
        io::Write::write_all(&mut &writer, &[round | 1]).unwrap();
        read.cancel();
        if round % 3 == 0 {
            read.cancel();
        }
        let result = event_loop.block_on(read);
        // What was not read is still there, and the next operation is not the cancelled one.
        if result == -libc::ECANCELED {
            let again = local.read_at(reader, memory.clone(), 0);
            assert_eq!(event_loop.block_on(again), 1);
        } else {
            assert_eq!(result, 1);
        }
        assert_eq!(memory.to_vec(), [round | 1]);
        assert_eq!((local.ops_in_flight(), local.orphans()), (0, 0));
    }
}

fn operations_on_a_loop_that_has_ended_are_refused(config: LoopConfig) {
    let event_loop = new_loop(config);
    let local = event_loop.local();
    drop(event_loop);
    assert_eq!(block_on(local.fsync(scratch(), true)), Ok(-libc::ECANCELED));
    let tally = Tally::new(1);
    submit_nop(&local, tally.clone(), 0);
    assert_eq!(*tally.results.borrow(), [Some(-libc::ECANCELED)]);
    assert!(local.spawn(async {}).is_finished());
}

mod ring_only {
    use super::*;

    #[test]
    fn a_refused_submission_is_offered_again_and_keeps_its_memory() {
        on(EngineChoice::Ring, |config| {
            let mut event_loop = new_loop(config);
            let (local, file) = (event_loop.local(), scratch());
            let Engine::Ring(ring) = &local.core().engine else { panic!("a ring was asked for") };
            ring.refuse_next(&[libc::EAGAIN, libc::EBUSY, libc::EAGAIN, libc::ENOMEM]);
            let memory = vector(&[5; 4096]);
            let mut write = local.write_at(Arc::clone(&file), memory.clone(), 0, false);
            start(&mut event_loop, &mut write);
            drop(write);
            assert_eq!((local.ops_in_flight(), local.orphans()), (1, 1));
            let Err(memory) = memory.into_buffer() else { panic!("the ring shares the memory") };
            while local.ops_in_flight() > 0 {
                event_loop.run_once(None);
            }
            assert!(memory.into_buffer().is_ok());
            let room = IoVector::zeroed(4096);
            assert_eq!(event_loop.block_on(local.read_at(file, room.clone(), 0)), 4096);
            assert_eq!(room.to_vec(), [5; 4096]);
        });
    }

    #[test]
    fn a_backlog_that_the_kernel_refused_is_offered_again_without_a_kick() {
        on(EngineChoice::Ring, |config| {
            let mut event_loop = new_loop(LoopConfig { ring_entries: 2, ..config });
            let local = event_loop.local();
            let Engine::Ring(ring) = &local.core().engine else { panic!("a ring was asked for") };
            ring.refuse_next(&[libc::EAGAIN; 20]);
            let tally = Tally::new(40);
            for token in 0..40 {
                submit_nop(&local, tally.clone(), token);
            }
            event_loop.block_on(tally.all());
        });
    }

    #[test]
    fn try_again_is_tried_again_a_bounded_number_of_times() {
        on(EngineChoice::Ring, |config| {
            let mut event_loop = new_loop(config);
            let local = event_loop.local();
            let (file, memory) = (scratch(), vector(&[5; 512]));
            let Engine::Ring(ring) = &local.core().engine else { panic!("a ring was asked for") };
            ring.answer_next(
                (0..16).map(|n| if n % 2 == 0 { -libc::EAGAIN } else { -libc::EINTR }),
            );
            let write = local.write_at(Arc::clone(&file), memory.clone(), 0, false);
            assert_eq!(event_loop.block_on(write), 512);
            ring.answer_next([-libc::EAGAIN; 17]);
            assert_eq!(event_loop.block_on(local.write_at(file, memory, 0, false)), -libc::EAGAIN);
        });
    }

    #[test]
    fn a_read_in_flight_is_cancelled_on_demand() {
        on(EngineChoice::Ring, |config| {
            let mut event_loop = new_loop(config);
            let local = event_loop.local();
            let (reader, _writer) = io::pipe().unwrap();
            let mut read = local.read_at(Arc::new(reader.into()), IoVector::zeroed(1), 0);
            start(&mut event_loop, &mut read);
            read.cancel();
            assert_eq!(event_loop.block_on(read), -libc::ECANCELED);
        });
    }
}
