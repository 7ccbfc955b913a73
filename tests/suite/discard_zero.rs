//! Discards, write-zeroes, zero detection, force unit access and flushes, as the driver sees them.

use blockplex_drivers::raw::Raw;
use blockplex_graph::driver::Role;
use blockplex_graph::{
    DetectZeroes, DiscardMode, ErrorKind, NodeOptions, Origin, Request, RequestKind,
};
use blockplex_io::buffer::IoBuffer;
use blockplex_tests::{Probe, ProbeHandle, Stage, pattern, writer};
use std::sync::Arc;

const SIZE: u64 = 16 << 10;

fn disk(discard: DiscardMode, detect_zeroes: DetectZeroes) -> (Stage, ProbeHandle, Arc<Origin>) {
    let stage = Stage::new(1);
    let (driver, probe) = Probe::new(SIZE as usize);
    let options = NodeOptions { discard, detect_zeroes, ..NodeOptions::default() };
    let node = stage.add_with("disk", driver, options, &[]);
    let (user, _) = stage.origin("user", node, writer());
    (stage, probe, user)
}

/// What has reached the driver since the last look.
fn kinds(probe: &ProbeHandle, seen: usize) -> Vec<RequestKind> {
    probe.log()[seen..].iter().map(|request| request.kind).collect()
}

#[test]
fn a_discard_reaches_the_driver_only_where_it_is_passed_on() {
    for (mode, calls) in [(DiscardMode::Ignore, 0), (DiscardMode::Unmap, 1)] {
        let (stage, probe, user) = disk(mode, DetectZeroes::Off);
        stage.run(0, &user, Request::discard(0, SIZE)).unwrap();
        assert_eq!(probe.calls(RequestKind::Discard), calls);
    }
}

#[test]
fn may_unmap_reaches_the_driver_only_where_discards_are_passed_on() {
    for (mode, unmaps) in [(DiscardMode::Ignore, false), (DiscardMode::Unmap, true)] {
        let (stage, probe, user) = disk(mode, DetectZeroes::Off);
        stage.run(0, &user, Request::write_zeroes(0, SIZE).may_unmap()).unwrap();
        stage.run(0, &user, Request::write_zeroes(0, SIZE)).unwrap();
        let flags: Vec<bool> = probe.log().iter().map(|zero| zero.flags.may_unmap).collect();
        assert_eq!(flags, [unmaps, false]);
    }
}

#[test]
fn a_write_of_zeros_becomes_write_zeroes_as_the_option_says() {
    let expected = [
        (DetectZeroes::Off, RequestKind::Write, false),
        (DetectZeroes::On, RequestKind::WriteZeroes, false),
        (DetectZeroes::Unmap, RequestKind::WriteZeroes, true),
    ];
    for (detect, kind, unmaps) in expected {
        let (stage, probe, user) = disk(DiscardMode::Unmap, detect);
        let data = IoBuffer::from_slice(&pattern(1, SIZE as usize));
        stage.run(0, &user, Request::write(0, data)).unwrap();
        assert_eq!(kinds(&probe, 0), [RequestKind::Write]);
        stage.run(0, &user, Request::write(512, IoBuffer::zeroed(1024))).unwrap();
        let request = probe.log().pop().unwrap();
        assert_eq!((request.kind, request.flags.may_unmap), (kind, unmaps));
        assert_eq!((request.offset, request.length), (512, 1024));
        // One byte that is none.
        let mut almost = vec![0; 1024];
        almost[1023] = 1;
        stage.run(0, &user, Request::write(512, IoBuffer::from_slice(&almost))).unwrap();
        assert_eq!(kinds(&probe, 2), [RequestKind::Write]);
        assert_eq!(probe.bytes()[512..1536], almost);
    }
}

#[test]
fn nodes_that_pass_requests_on_as_they_are_hide_none_that_do_not() {
    // Pass-through nodes above and below one that looks for zeros and one that shows a window.
    let (stage, (driver, probe)) = (Stage::new(1), Probe::new(SIZE as usize));
    let mut node = stage.add("disk", driver, &[]);
    let window = Raw::new(512, Some(8192), SIZE).unwrap();
    let detects = NodeOptions { detect_zeroes: DetectZeroes::On, ..NodeOptions::default() };
    let layers = [
        ("first", Raw::default(), NodeOptions::default()),
        ("window", window, NodeOptions::default()),
        ("second", Raw::default(), NodeOptions::default()),
        ("detects", Raw::default(), detects),
        ("third", Raw::default(), NodeOptions::default()),
    ];
    for (name, driver, options) in layers {
        node = stage.add_with(name, driver, options, &[(Role::File, node)]);
    }
    let (user, _) = stage.origin("user", node, writer());
    let data = pattern(1, 1024);
    stage.run(0, &user, Request::write(0, IoBuffer::from_slice(&data))).unwrap();
    stage.run(0, &user, Request::write(512, IoBuffer::zeroed(512))).unwrap();
    assert_eq!(kinds(&probe, 0), [RequestKind::Write, RequestKind::WriteZeroes]);
    assert_eq!(probe.bytes()[512..1024], data[..512]);
    assert_eq!(probe.bytes()[1024..1536], [0; 512]);
    let beyond = stage.run(0, &user, Request::read(8192 - 512, IoBuffer::zeroed(1024)));
    assert_eq!(beyond.unwrap_err().kind(), ErrorKind::OutOfRange);
}

#[test]
fn a_detected_write_of_zeros_with_fua_is_made_durable() {
    let (stage, probe, user) = disk(DiscardMode::Ignore, DetectZeroes::On);
    stage.run(0, &user, Request::write(0, IoBuffer::zeroed(512)).fua()).unwrap();
    assert_eq!(kinds(&probe, 0), [RequestKind::WriteZeroes, RequestKind::Flush]);
}

#[test]
fn write_zeroes_that_the_driver_cannot_do_are_written_out_unless_that_is_refused() {
    let (stage, probe, user) = disk(DiscardMode::Unmap, DetectZeroes::Off);
    let data = IoBuffer::from_slice(&pattern(1, SIZE as usize));
    stage.run(0, &user, Request::write(0, data)).unwrap();
    probe.fail_next(RequestKind::WriteZeroes, libc::EOPNOTSUPP);
    let error = stage.run(0, &user, Request::write_zeroes(100, 5000).no_fallback()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotSupported);
    assert!(probe.bytes().iter().all(|byte| *byte != 0));
    probe.fail_next(RequestKind::WriteZeroes, libc::EOPNOTSUPP);
    stage.run(0, &user, Request::write_zeroes(100, 5000)).unwrap();
    let bytes = probe.bytes();
    assert!(bytes[100..5100].iter().all(|byte| *byte == 0));
    assert!(bytes[..100].iter().chain(&bytes[5100..]).all(|byte| *byte != 0));
    assert_eq!(kinds(&probe, 2), [RequestKind::WriteZeroes, RequestKind::Write]);
    // Any other error is an error, and nothing is written out.
    probe.fail_next(RequestKind::WriteZeroes, libc::ENOSPC);
    let error = stage.run(0, &user, Request::write_zeroes(0, 512)).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::NoSpace, libc::ENOSPC));
    assert_eq!(kinds(&probe, 4), [RequestKind::WriteZeroes]);
}

#[test]
fn write_zeroes_with_fua_flush_after_the_zeros_on_either_way() {
    let (stage, probe, user) = disk(DiscardMode::Ignore, DetectZeroes::Off);
    stage.run(0, &user, Request::write_zeroes(0, 512).fua()).unwrap();
    assert_eq!(kinds(&probe, 0), [RequestKind::WriteZeroes, RequestKind::Flush]);
    probe.fail_next(RequestKind::WriteZeroes, libc::EOPNOTSUPP);
    stage.run(0, &user, Request::write_zeroes(0, 512).fua()).unwrap();
    let last = kinds(&probe, 2);
    assert_eq!(last, [RequestKind::WriteZeroes, RequestKind::Write, RequestKind::Flush]);
    // A flush that fails fails the request.
    probe.fail_next(RequestKind::Flush, libc::EIO);
    let error = stage.run(0, &user, Request::write_zeroes(0, 512).fua()).unwrap_err();
    assert_eq!(error.errno(), libc::EIO);
}

#[test]
fn a_write_with_fua_reaches_the_driver_as_such() {
    let (stage, probe, user) = disk(DiscardMode::Ignore, DetectZeroes::Off);
    stage.run(0, &user, Request::write(0, IoBuffer::zeroed(512)).fua()).unwrap();
    stage.run(0, &user, Request::write(0, IoBuffer::zeroed(512))).unwrap();
    let flags: Vec<bool> = probe.log().iter().map(|write| write.flags.fua).collect();
    assert_eq!(flags, [true, false]);
}

#[test]
fn no_flush_keeps_flushes_from_the_driver() {
    for (no_flush, calls) in [(false, 1), (true, 0)] {
        let stage = Stage::new(1);
        let (driver, probe) = Probe::new(4096);
        let options = NodeOptions { no_flush, ..NodeOptions::default() };
        let node = stage.add_with("disk", driver, options, &[]);
        let (user, _) = stage.origin("user", node, writer());
        stage.run(0, &user, Request::flush()).unwrap();
        assert_eq!(probe.calls(RequestKind::Flush), calls);
    }
}

#[test]
fn an_error_of_the_driver_is_that_requests_and_no_others() {
    let (stage, probe, user) = disk(DiscardMode::Unmap, DetectZeroes::Off);
    for (kind, request) in [
        (RequestKind::Read, Request::read(0, IoBuffer::zeroed(512))),
        (RequestKind::Write, Request::write(0, IoBuffer::zeroed(512))),
        (RequestKind::Discard, Request::discard(0, 512)),
        (RequestKind::Flush, Request::flush()),
        (RequestKind::BlockStatus, Request::block_status(0, 512)),
    ] {
        probe.fail_next(kind, libc::EIO);
        let error = stage.run(0, &user, request.clone()).unwrap_err();
        assert_eq!((error.errno(), error.node()), (libc::EIO, Some("disk")));
        stage.run(0, &user, request).unwrap();
    }
}
