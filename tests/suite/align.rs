//! Requests that do not suit a node: widened, bounced, ordered. Against a flat array.

use blockplex::io::event_loop::Local;
use blockplex_drivers::file::{File, FileOptions};
use blockplex_drivers::memory::Memory;
use blockplex_graph::{
    DetectZeroes, DiscardMode, ErrorKind, Limits, NodeId, NodeOptions, Origin, Queue, Request,
};
use blockplex_io::buffer::{IoBuffer, IoVector};
use blockplex_tests::{Narrow, Point, Probe, Stage, pattern, reader, sharing_writer, writer};
use proptest::prelude::*;
use std::path::Path;
use std::sync::Arc;

const SIZE: usize = 64 << 10;

/// Limits of a disk with blocks of `alignment` bytes.
fn blocks(alignment: u32) -> Limits {
    Limits { request_alignment: alignment, memory_alignment: alignment, ..Limits::UNLIMITED }
}

fn direct(path: &Path) -> File {
    let options = FileOptions { write: true, direct: true, ..FileOptions::default() };
    File::open(path, options).expect("the file system has O_DIRECT")
}

/// A stage with a disk of `SIZE` zeros in a file past the page cache, blocks at least `alignment`.
fn direct_disk(alignment: u32) -> (tempfile::TempDir, Stage, NodeId) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("disk");
    std::fs::write(&path, vec![0; SIZE]).expect("a file");
    let stage = Stage::new(1);
    let driver = Narrow::new(direct(&path), blocks(alignment));
    let options = NodeOptions { discard: DiscardMode::Unmap, ..NodeOptions::default() };
    let node = stage.add_with("disk", driver, options, &[]);
    (directory, stage, node)
}

/// What a guest may ask.
#[derive(Clone, Debug)]
enum Op {
    Read { at: usize, pieces: Vec<(usize, usize)> },
    Write { at: usize, pieces: Vec<(usize, usize)>, seed: u64, fua: bool },
    Zero { at: usize, length: usize, unmap: bool },
    Flush,
}

fn op() -> impl Strategy<Value = Op> {
    // Pieces: bytes skipped before it (so that addresses are odd) and its length, 0 included.
    let piece = (0usize..40, prop_oneof![Just(0usize), 1usize..20, 1usize..5000, Just(4096)]);
    let pieces = prop::collection::vec(piece, 0..6);
    prop_oneof![
        3 => (0..SIZE, pieces.clone()).prop_map(|(at, pieces)| Op::Read { at, pieces }),
        4 => (0..SIZE, pieces, any::<u64>(), any::<bool>())
            .prop_map(|(at, pieces, seed, fua)| Op::Write { at, pieces, seed, fua }),
        2 => (0..SIZE, 0..10_000usize, any::<bool>())
            .prop_map(|(at, length, unmap)| Op::Zero { at, length, unmap }),
        1 => Just(Op::Flush),
    ]
}

/// Scattered memory, its pieces cut so that they end at the disk's end.
fn scattered(at: usize, pieces: &[(usize, usize)]) -> IoVector {
    let mut left = SIZE - at;
    let parts: Vec<IoVector> = pieces
        .iter()
        .map(|(skip, length)| {
            let length = (*length).min(left);
            left -= length;
            IoVector::zeroed(skip + length).slice(*skip, length)
        })
        .collect();
    IoVector::concatenate(&parts)
}

async fn replay(queue: &Queue, model: &mut [u8], op: Op) {
    match op {
        Op::Read { at, pieces } => {
            let vector = scattered(at, &pieces);
            let length = vector.len();
            let completion = queue.request(Request::read(at as u64, vector)).await;
            completion.result.expect("a read in range");
            assert_eq!(completion.vector.to_vec(), model[at..at + length]);
        }
        Op::Write { at, pieces, seed, fua } => {
            let vector = scattered(at, &pieces);
            let bytes = pattern(seed, vector.len());
            vector.copy_from_slice(0, &bytes);
            model[at..at + bytes.len()].copy_from_slice(&bytes);
            let write = Request::write(at as u64, vector);
            let write = if fua { write.fua() } else { write };
            queue.request(write).await.result.expect("a write in range");
        }
        Op::Zero { at, length, unmap } => {
            let length = length.min(SIZE - at);
            model[at..at + length].fill(0);
            let zero = Request::write_zeroes(at as u64, length as u64);
            let zero = if unmap { zero.may_unmap() } else { zero };
            queue.request(zero).await.result.expect("zeroes in range");
        }
        Op::Flush => drop(queue.request(Request::flush()).await.result.expect("a flush")),
    }
}

/// Replays `ops` on one queue; then the disk has the model's bytes.
fn compare(stage: &Stage, user: &Arc<Origin>, ops: Vec<Op>) {
    let (graph, origin) = (stage.graph.clone(), user.clone());
    stage.on(0, move |local: Local| async move {
        let queue = Queue::open(&graph, &origin, &local, "model");
        let mut model = vec![0; SIZE];
        for op in ops {
            replay(&queue, &mut model, op).await;
        }
        let whole = queue.request(Request::read(0, IoVector::zeroed(SIZE))).await;
        assert_eq!(whole.vector.to_vec(), model);
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn any_requests_past_the_page_cache_leave_what_they_leave_in_an_array(
        ops in prop::collection::vec(op(), 1..40),
        alignment in prop_oneof![Just(512u32), Just(4096)],
    ) {
        let (_directory, stage, node) = direct_disk(alignment);
        let (user, _) = stage.origin("user", node, writer());
        compare(&stage, &user, ops);
    }

    #[test]
    fn any_requests_to_a_disk_with_blocks_and_small_transfers_do_so_too(
        ops in prop::collection::vec(op(), 1..40),
        alignment in prop_oneof![Just(1u32), Just(512), Just(4096)],
        detect_zeroes in prop_oneof![Just(DetectZeroes::Off), Just(DetectZeroes::Unmap)],
    ) {
        let stage = Stage::new(1);
        let memory = Memory::new(SIZE as u64).expect("a small disk");
        let limits = Limits { max_transfer: 8192, max_segments: 2, ..blocks(alignment) };
        let discard = DiscardMode::Unmap;
        let options = NodeOptions { discard, detect_zeroes, ..NodeOptions::default() };
        let node = stage.add_with("disk", Narrow::new(memory, limits), options, &[]);
        let (user, _) = stage.origin("user", node, writer());
        compare(&stage, &user, ops);
    }
}

#[test]
fn neighbours_that_share_a_block_never_lose_a_write() {
    // Eight writers on four loops, each with its own 100 bytes of the same two 4096-byte blocks.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, vec![0; SIZE]).unwrap();
    let stage = Stage::new(4);
    let node = stage.add("disk", Narrow::new(direct(&path), blocks(4096)), &[]);
    let (user, _) = stage.origin("user", node, sharing_writer());
    let offset = |writer: usize| 3700 + 100 * writer as u64;
    let writers: Vec<_> = (0..8)
        .map(|writer| {
            let (graph, origin) = (stage.graph.clone(), user.clone());
            stage.spawn(writer % 4, move |local| async move {
                let queue = Queue::open(&graph, &origin, &local, "neighbour");
                for round in 0..40u64 {
                    let bytes = pattern(round * 8 + writer as u64, 100);
                    let write = Request::write(offset(writer), IoBuffer::from_slice(&bytes));
                    queue.request(write).await.result.unwrap();
                    // Nobody has overwritten it from an old copy of the block.
                    let read = Request::read(offset(writer), IoBuffer::zeroed(100));
                    assert_eq!(queue.request(read).await.vector.to_vec(), bytes);
                }
            })
        })
        .collect();
    for writer in writers {
        stage.wait("a writer", writer).unwrap();
    }
    for writer in 0..8 {
        let read = Request::read(offset(writer), IoBuffer::zeroed(100));
        let bytes = stage.run(0, &user, read).unwrap().vector.to_vec();
        assert_eq!(bytes, pattern(39 * 8 + writer as u64, 100));
    }
}

#[test]
fn an_aligned_write_waits_for_the_unaligned_one_that_has_read_its_block() {
    let stage = Stage::new(1);
    let (driver, probe) = Probe::new(8192);
    let node = stage.add("disk", driver.limits(blocks(512)), &[]);
    let (user, _) = stage.origin("user", node, sharing_writer());
    // The unaligned write stops after it has read the block that it writes a part of.
    probe.shut_for(Point::BeforeCompletion, 1);
    let small = stage.start(0, &user, Request::write(10, IoBuffer::from_slice(&[1; 10])));
    probe.wait_stopped(1);
    let whole = stage.start(0, &user, Request::write(0, IoBuffer::from_slice(&[2; 512])));
    let apart = Request::write(512, IoBuffer::from_slice(&[3; 512]));
    stage.run(0, &user, apart).expect("another block waits for nobody");
    assert_eq!(probe.bytes()[0], 0, "the aligned write waits");
    probe.open(Point::BeforeCompletion);
    assert!(stage.finish(small).result.is_ok() && stage.finish(whole).result.is_ok());
    assert_eq!(probe.bytes()[..512], [2; 512]);
}

#[test]
fn what_lies_beyond_the_end_of_a_file_reads_as_zeros_past_the_page_cache_too() {
    for length in [1, 511, 513, 1000, 4097, 6000] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let bytes = pattern(length, length as usize);
        std::fs::write(&path, &bytes).unwrap();
        let stage = Stage::new(1);
        let node = stage.add("disk", direct(&path), &[]);
        let (user, _) = stage.origin("user", node, reader());
        let all = Request::read(0, IoVector::zeroed(length as usize));
        assert_eq!(stage.run(0, &user, all).unwrap().vector.to_vec(), bytes, "{length}");
        let last = Request::read(length - 1, IoVector::zeroed(1));
        assert_eq!(
            stage.run(0, &user, last).unwrap().vector.to_vec(),
            bytes[length as usize - 1..]
        );
        let beyond = Request::read(length, IoVector::zeroed(1));
        assert_eq!(stage.run(0, &user, beyond).unwrap_err().kind(), ErrorKind::OutOfRange);
    }
}

#[test]
fn a_write_into_the_ragged_tail_of_a_file_past_the_page_cache_keeps_what_was_there() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    let mut bytes = pattern(1, 1000);
    std::fs::write(&path, &bytes).unwrap();
    let stage = Stage::new(1);
    let node = stage.add("disk", Narrow::new(direct(&path), blocks(512)), &[]);
    let (user, _) = stage.origin("user", node, writer());
    bytes[700..1000].fill(3);
    stage.run(0, &user, Request::write(700, IoBuffer::from_slice(&[3; 300]))).unwrap();
    // The block is written whole, so that the file may end with it; what is beyond is zeros.
    let file = std::fs::read(&path).unwrap();
    assert_eq!(file[..1000], bytes);
    assert!(file.len() <= 1024 && file[1000..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_file_that_shrinks_under_us_reads_as_zeros_and_never_hangs() {
    for direct in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        std::fs::write(&path, vec![7; SIZE]).unwrap();
        let stage = Stage::new(1);
        let options = FileOptions { write: true, direct, ..FileOptions::default() };
        let node = stage.add("disk", File::open(&path, options).unwrap(), &[]);
        let (user, _) = stage.origin("user", node, reader());
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(5000).unwrap();
        let all = stage.run(0, &user, Request::read(0, IoVector::zeroed(SIZE))).unwrap();
        let bytes = all.vector.to_vec();
        assert_eq!((&bytes[..5000], &bytes[5000..]), (&[7; 5000][..], &vec![0; SIZE - 5000][..]));
        let gone = stage.run(0, &user, Request::read(40_000, IoVector::zeroed(4096))).unwrap();
        assert_eq!(gone.vector.to_vec(), vec![0; 4096]);
    }
}

#[test]
fn thousands_of_pieces_of_one_byte_are_one_request() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, vec![0; SIZE]).unwrap();
    let stage = Stage::new(1);
    let options = FileOptions { write: true, ..FileOptions::default() };
    let node = stage.add("disk", File::open(&path, options).unwrap(), &[]);
    let (user, _) = stage.origin("user", node, writer());
    for count in [1, 1023, 1024, 1025, 3000] {
        let bytes = pattern(count as u64, count);
        let memory = IoVector::zeroed(2 * count);
        memory.fill(0, 2 * count, 0xff);
        let parts: Vec<IoVector> = (0..count).map(|index| memory.slice(2 * index, 1)).collect();
        let scattered = IoVector::concatenate(&parts);
        scattered.copy_from_slice(0, &bytes);
        stage.run(0, &user, Request::write(77, scattered.clone())).unwrap();
        assert_eq!(std::fs::read(&path).unwrap()[77..77 + count], bytes);
        scattered.fill(0, count, 0);
        stage.run(0, &user, Request::read(77, scattered.clone())).unwrap();
        assert_eq!(scattered.to_vec(), bytes);
        let between: Vec<u8> = memory.to_vec().into_iter().skip(1).step_by(2).collect();
        assert_eq!(between, vec![0xff; count], "what lies between the pieces is not touched");
    }
}
