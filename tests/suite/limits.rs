//! Limits of nodes: how transfers are cut, and what a parent takes over.

use blockplex_drivers::file::{File, FileOptions};
use blockplex_drivers::raw::Raw;
use blockplex_graph::driver::Role;
use blockplex_graph::{ErrorKind, Limits, NodeOptions, Request};
use blockplex_io::buffer::{IoBuffer, IoVector};
use blockplex_tests::{Narrow, Probe, Stage, pattern, reader, writer};

const SIZE: usize = 1 << 20;

#[test]
fn a_transfer_longer_than_the_node_takes_is_cut_and_arrives_whole() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    for (max_transfer, max_segments) in
        [(4096, 1024), (12_288, 1024), (4096, 1), (0, 3), (1 << 19, 0)]
    {
        std::fs::write(&path, vec![0; SIZE]).unwrap();
        let stage = Stage::new(1);
        let options = FileOptions { write: true, ..FileOptions::default() };
        let limits = Limits { max_transfer, max_segments, ..Limits::UNLIMITED };
        let file = Narrow::new(File::open(&path, options).unwrap(), limits);
        let below = stage.add("file", file, &[]);
        let raw = Raw::new(0, None, SIZE as u64).unwrap();
        let node = stage.add("raw", raw, &[(Role::File, below)]);
        let view = stage.graph.topology().node(node).cloned().unwrap();
        assert_eq!(view.limits().max_transfer, max_transfer, "the parent takes it over");
        let (user, _) = stage.origin("user", node, writer());
        let bytes = pattern(u64::from(max_transfer), SIZE - 1000);
        // In one piece, and in seven of different lengths.
        let whole: IoVector = IoBuffer::from_slice(&bytes).into();
        let cuts = [0, 1, 4097, 100_000, 100_001, 500_000, 777_777, bytes.len()];
        let parts: Vec<IoVector> =
            cuts.windows(2).map(|cut| whole.slice(cut[0], cut[1] - cut[0])).collect();
        for vector in [whole.clone(), IoVector::concatenate(&parts)] {
            stage.run(0, &user, Request::write(1000, vector.clone())).unwrap();
            assert_eq!(std::fs::read(&path).unwrap()[1000..], bytes);
            vector.fill(0, bytes.len(), 0);
            stage.run(0, &user, Request::read(1000, vector.clone())).unwrap();
            assert_eq!(vector.to_vec(), bytes);
            std::fs::write(&path, vec![0; SIZE]).unwrap();
            vector.copy_from_slice(0, &bytes);
        }
    }
}

#[test]
fn a_request_that_is_too_long_is_refused_before_it_runs() {
    let stage = Stage::new(1);
    let node = stage.add("disk", blockplex_drivers::null::Null::default(), &[]);
    let (user, _) = stage.origin("user", node, reader());
    // The same page over and over: more bytes than a request may have, in little memory.
    let page = IoVector::zeroed(1 << 20);
    let parts: Vec<IoVector> = (0..2049).map(|_| page.clone()).collect();
    let error = stage.run(0, &user, Request::read(0, IoVector::concatenate(&parts))).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::InvalidArgument, libc::EINVAL));
    let longest = IoVector::concatenate(&parts).slice(0, Limits::MAX_REQUEST as usize);
    let error = stage.run(0, &user, Request::read(0, longest)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfRange, "allowed, but longer than this disk");
    let mut lying = Request::read(0, IoVector::zeroed(512));
    lying.length = 4096;
    let error = stage.run(0, &user, lying).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
}

#[test]
fn an_alignment_that_is_no_power_of_two_is_refused() {
    let stage = Stage::new(0);
    for (request_alignment, memory_alignment) in [(0, 1), (3, 1), (1, 0), (1, 48)] {
        let limits = Limits { request_alignment, memory_alignment, ..Limits::UNLIMITED };
        let driver = Box::new(Probe::new(4096).0.limits(limits));
        let error = stage
            .change(move |change| change.add_node(None, driver, NodeOptions::default(), &[]))
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
    assert_eq!(stage.graph.topology().nodes().count(), 0);
}
