use super::*;
use blockplex_graph::{BlockGraph, NodeOptions};
use blockplex_io::buffer::IoVector;
use blockplex_io::event_loop::{EventLoop, LoopConfig};
use std::os::unix::fs::MetadataExt;

/// A regular file whose fsync fails, on every Linux: procfs has none.
const CANNOT_BE_FLUSHED: &str = "/proc/self/comm";

fn write_of(flags: RequestFlags, vector: &IoVector) -> MapRequest<'_> {
    let (kind, loop_index) = (RequestKind::Write, 0);
    MapRequest { kind, flags, offset: 0, length: 4, vector, position: 0, loop_index }
}

#[test]
fn a_failed_flush_is_final_and_fails_durable_writes_but_not_plain_ones() {
    let mut event_loop = EventLoop::new(LoopConfig::default()).unwrap();
    let local = event_loop.local();
    event_loop.block_on(async {
        let how = FileOptions { write: true, locking: Locking::Off, ..FileOptions::default() };
        let file = File::open(Path::new(CANNOT_BE_FLUSHED), how).unwrap();
        let graph = BlockGraph::new();
        let mut change = graph.begin().await;
        let id = change.add_node(None, Box::new(file), NodeOptions::default(), &[]).unwrap();
        let drained = change.drain().await.unwrap();
        change.commit(&drained).await.unwrap();
        let view = graph.topology().node(id).unwrap().clone();
        let io = NodeIo::for_control(&local, &view);
        let memory = IoVector::zeroed(4);
        let durable = RequestFlags { fua: true, ..RequestFlags::default() };
        let before = view.driver().map(&view, &write_of(durable, &memory));
        assert!(matches!(before, Map::File { .. }), "{before:?}");

        for _ in 0..2 {
            let error = view.driver().serve(&io, Request::flush()).await.unwrap_err();
            assert_eq!(error.errno(), libc::EINVAL);
        }
        let after = view.driver().map(&view, &write_of(durable, &memory));
        assert!(matches!(&after, Map::Fail(e) if e.errno() == libc::EINVAL), "{after:?}");
        let plain = view.driver().map(&view, &write_of(RequestFlags::default(), &memory));
        assert!(matches!(plain, Map::File { .. }), "{plain:?}");
    });
}

#[test]
fn a_file_grows_with_the_storage_that_was_asked_for() {
    let mut event_loop = EventLoop::new(LoopConfig::default()).unwrap();
    let local = event_loop.local();
    let scratch = tempfile::tempdir().unwrap();
    event_loop.block_on(async {
        let path = scratch.path().join("disk");
        std::fs::write(&path, [7; 1000]).unwrap();
        let how = FileOptions { write: true, ..FileOptions::default() };
        let file = File::open(&path, how).unwrap();
        let graph = BlockGraph::new();
        let mut change = graph.begin().await;
        let id = change.add_node(None, Box::new(file), NodeOptions::default(), &[]).unwrap();
        let drained = change.drain().await.unwrap();
        change.commit(&drained).await.unwrap();
        let view = graph.topology().node(id).unwrap().clone();
        let io = NodeIo::for_control(&local, &view);
        let resize = async |length, mode| {
            let request = Request::truncate(length).preallocated(mode);
            view.driver().serve(&io, request).await.map(drop)
        };
        let stored = || std::fs::metadata(&path).unwrap().blocks() * 512;
        resize(1 << 20, Preallocation::Off).await.unwrap();
        assert!(stored() < 1 << 19);
        resize(3 << 20, Preallocation::Falloc).await.unwrap();
        assert!((2 << 20..=5 << 19).contains(&stored()), "{}", stored());
        resize(5 << 20, Preallocation::Full).await.unwrap();
        assert!(stored() >= 4 << 20);
        for (length, mode) in [(1, Preallocation::Falloc), (6 << 20, Preallocation::Metadata)] {
            let error = resize(length, mode).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotSupported);
        }
        let too_much = resize(1 << 62, Preallocation::Falloc).await.unwrap_err();
        assert!(matches!(too_much.errno(), libc::ENOSPC | libc::EFBIG), "{too_much}");
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 5 << 20, "a failure leaves the length");
        assert!(bytes[..1000] == [7; 1000] && bytes[1000..].iter().all(|byte| *byte == 0));
    });
}
