//! Each kind of request through each of the three doors, on each simple driver, and its errors.

use blockplex_graph::{Error, ErrorKind, Limits, Outcome, Request, RequestKind};
use blockplex_io::buffer::{IoBuffer, IoVector};
use blockplex_tests::{Bench, Door, pattern};
use std::path::PathBuf;

const MIB: u64 = 1 << 20;

/// A directory with a file of 1 MiB, whose every byte is 0x5a.
pub(crate) fn file() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("disk.img");
    std::fs::write(&path, vec![0x5a; MIB as usize]).expect("a file");
    (directory, path)
}

/// Disks of 1 MiB that keep data.
fn disks(path: &std::path::Path) -> Vec<String> {
    let path = path.display();
    vec![
        "driver=memory,size=1M,discard=unmap".to_owned(),
        "driver=raw,discard=unmap,file.driver=memory,file.size=1M".to_owned(),
        "driver=raw,size=1M,offset=64k,discard=unmap,file.driver=memory,file.size=2M".to_owned(),
        format!("driver=file,discard=unmap,filename={path}"),
        format!("driver=raw,discard=unmap,file.driver=file,file.filename={path}"),
        format!("driver=raw,discard=unmap,cache.direct=on,file.driver=file,file.filename={path}"),
    ]
}

/// Calls `check` for every disk and door.
fn everywhere(check: impl Fn(&Bench, Door, &blockplex::Backend)) {
    let (_directory, path) = file();
    let bench = Bench::new();
    for options in disks(&path) {
        for door in Door::ALL {
            let backend = bench.open(&options).unwrap_or_else(|e| panic!("{options}: {e}"));
            check(&bench, door, &backend);
            bench.close(&backend).expect("the disk closes");
        }
    }
}

fn write(offset: u64, bytes: &[u8]) -> Request {
    Request::write(offset, IoBuffer::from_slice(bytes))
}

fn read_back(
    bench: &Bench,
    door: Door,
    backend: &blockplex::Backend,
    at: u64,
    len: usize,
) -> Vec<u8> {
    let (outcome, vector) =
        bench.ask(door, backend, Request::read(at, IoVector::zeroed(len))).expect("a read");
    assert_eq!(outcome, Outcome::Done);
    vector.to_vec()
}

#[test]
fn what_was_written_is_read_whole_in_parts_and_scattered() {
    everywhere(|bench, door, disk| {
        let bytes = pattern(7, 20_000);
        bench.ask(door, disk, write(4000, &bytes)).unwrap();
        assert_eq!(read_back(bench, door, disk, 4000, 20_000), bytes);
        assert_eq!(read_back(bench, door, disk, 4777, 3), bytes[777..780]);
        // Scattered over three pieces, the first of which lies at an odd address.
        let big = IoVector::zeroed(30_000);
        let parts = [big.slice(1, 999), big.slice(5000, 1), big.slice(10_001, 19_000)];
        let scattered = IoVector::concatenate(&parts);
        bench.ask(door, disk, Request::read(4000, scattered.clone())).unwrap();
        assert_eq!(scattered.to_vec(), bytes);
        // And gathered back, reversed in order of pieces, elsewhere.
        let gathered = IoVector::concatenate(&[parts[2].clone(), parts[0].clone()]);
        bench.ask(door, disk, Request::write(100_001, gathered)).unwrap();
        assert_eq!(read_back(bench, door, disk, 100_001, 19_000), bytes[1000..]);
        assert_eq!(read_back(bench, door, disk, 119_001, 999), bytes[..999]);
    });
}

#[test]
fn zeroes_read_as_zeros_with_and_without_unmap_and_leave_their_neighbours() {
    everywhere(|bench, door, disk| {
        bench.ask(door, disk, write(0, &pattern(9, 200_000))).unwrap();
        for request in
            [Request::write_zeroes(1000, 70_001), Request::write_zeroes(1000, 140_000).may_unmap()]
        {
            let length = request.length as usize;
            bench.ask(door, disk, request).unwrap();
            let after = read_back(bench, door, disk, 0, 200_000);
            assert!(after[1000..1000 + length].iter().all(|byte| *byte == 0));
            assert!(after[..1000].iter().all(|byte| *byte != 0));
            assert!(after[1000 + length..].iter().any(|byte| *byte != 0));
        }
    });
}

#[test]
fn discards_and_flushes_succeed() {
    everywhere(|bench, door, disk| {
        bench.ask(door, disk, write(0, &pattern(3, 1 << 17))).unwrap();
        bench.ask(door, disk, Request::discard(0, 1 << 16)).unwrap();
        bench.ask(door, disk, Request::flush()).unwrap();
        bench.ask(door, disk, write(8, b"durable").fua()).unwrap();
        assert_eq!(read_back(bench, door, disk, 1 << 16, 1 << 16), pattern(3, 1 << 17)[1 << 16..]);
    });
}

#[test]
fn block_status_tells_data_from_zeros_up_to_the_end() {
    everywhere(|bench, door, disk| {
        bench.ask(door, disk, write(0, &pattern(3, 1 << 17))).unwrap();
        bench.ask(door, disk, Request::write_zeroes(1 << 17, 1 << 17).may_unmap()).unwrap();
        let status = bench.status(door, disk, 0, 1 << 17).unwrap();
        assert!(status.data && status.allocated && !status.zero, "{status:?}");
        assert_eq!(status.length, 1 << 17);
        let status = bench.status(door, disk, 1 << 17, 1 << 17).unwrap();
        assert!(status.zero && status.length == 1 << 17, "{status:?}");
    });
}

#[test]
fn requests_of_no_bytes_succeed_and_do_nothing() {
    everywhere(|bench, door, disk| {
        for offset in [0, 4096, MIB] {
            for request in [
                Request::read(offset, IoVector::empty()),
                Request::write(offset, IoVector::empty()),
                Request::discard(offset, 0),
                Request::write_zeroes(offset, 0),
            ] {
                let kind = request.kind;
                let result = bench.ask(door, disk, request);
                assert!(result.is_ok(), "{kind:?} of nothing at {offset}: {result:?}");
            }
            assert_eq!(bench.status(door, disk, offset, 0).unwrap().length, 0);
        }
    });
}

#[test]
fn block_status_is_cut_at_the_end_and_is_empty_beyond_it() {
    everywhere(|bench, door, disk| {
        let status = bench.status(door, disk, MIB - 4096, MIB).unwrap();
        assert!(status.length > 0 && status.length <= 4096, "{status:?}");
        for offset in [MIB, MIB + 512, u64::MAX] {
            assert_eq!(bench.status(door, disk, offset, 4096).unwrap().length, 0);
        }
    });
}

#[test]
fn ranges_beyond_the_end_are_eio_and_touch_nothing() {
    everywhere(|bench, door, disk| {
        let before = read_back(bench, door, disk, MIB - 512, 512);
        for (offset, length) in
            [(MIB - 1, 2), (MIB, 1), (MIB + 1, 512), (u64::MAX, 1), (u64::MAX - 511, 512)]
        {
            for request in [
                Request::read(offset, IoVector::zeroed(length)),
                Request::write(offset, IoVector::zeroed(length)),
                Request::discard(offset, length as u64),
                Request::write_zeroes(offset, length as u64),
            ] {
                let error: Error = bench.ask(door, disk, request).unwrap_err();
                assert_eq!((error.kind(), error.errno()), (ErrorKind::OutOfRange, libc::EIO));
                assert_eq!(error.range(), Some((offset, length as u64)));
            }
        }
        let error = bench.ask(door, disk, Request::write_zeroes(0, u64::MAX)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange);
        assert_eq!(read_back(bench, door, disk, MIB - 512, 512), before);
        assert_eq!(disk.length().unwrap(), MIB);
    });
}

#[test]
fn truncation_works_where_lengths_can_change_and_is_enotsup_elsewhere() {
    let (_directory, path) = file();
    let bench = Bench::new();
    for door in Door::ALL {
        for options in [
            format!("driver=file,filename={}", path.display()),
            format!("driver=raw,file.driver=file,file.filename={}", path.display()),
        ] {
            let disk = bench.open(&options).unwrap();
            bench.ask(door, &disk, Request::truncate(2 * MIB)).unwrap();
            assert_eq!(disk.length().unwrap(), 2 * MIB);
            assert_eq!(read_back(&bench, door, &disk, MIB, 4096), vec![0; 4096]);
            bench.ask(door, &disk, write(MIB, &pattern(1, 4096))).unwrap();
            bench.ask(door, &disk, Request::truncate(MIB)).unwrap();
            bench.ask(door, &disk, Request::truncate(2 * MIB)).unwrap();
            assert_eq!(read_back(&bench, door, &disk, MIB, 4096), vec![0; 4096], "new space");
            bench.ask(door, &disk, Request::truncate(MIB)).unwrap();
            let error = bench.ask(door, &disk, Request::truncate(u64::MAX)).unwrap_err();
            assert_eq!(error.errno(), libc::EINVAL);
            assert_eq!(std::fs::metadata(&path).unwrap().len(), MIB);
            bench.close(&disk).unwrap();
        }
        for options in [
            "driver=memory,size=1M",
            "driver=null-co,size=1M",
            "driver=raw,size=1M,file.driver=memory,file.size=1M",
        ] {
            let disk = bench.open(options).unwrap();
            let error = bench.ask(door, &disk, Request::truncate(4096)).unwrap_err();
            assert_eq!((error.kind(), error.errno()), (ErrorKind::NotSupported, libc::ENOTSUP));
            assert_eq!(disk.length().unwrap(), MIB);
            bench.close(&disk).unwrap();
        }
    }
}

#[test]
fn a_read_only_disk_reads_flushes_and_refuses_every_change_with_eacces() {
    let (_directory, path) = file();
    let bench = Bench::new();
    for door in Door::ALL {
        for options in disks(&path) {
            let disk = bench.open(&format!("{options},read-only=on")).unwrap();
            read_back(&bench, door, &disk, 0, 512);
            bench.ask(door, &disk, Request::flush()).unwrap();
            bench.status(door, &disk, 0, 512).unwrap();
            for request in [
                write(0, b"no"),
                Request::write_zeroes(0, 512),
                Request::discard(0, 512),
                Request::truncate(512),
            ] {
                let error = bench.ask(door, &disk, request).unwrap_err();
                assert_eq!((error.kind(), error.errno()), (ErrorKind::ReadOnly, libc::EACCES));
            }
            bench.close(&disk).unwrap();
        }
    }
    assert_eq!(std::fs::read(&path).unwrap(), vec![0x5a; MIB as usize]);
}

#[test]
fn null_answers_everything_and_reads_zeros_when_told_to() {
    let bench = Bench::new();
    for door in Door::ALL {
        for latency in ["", ",latency-ns=1000"] {
            let disk =
                bench.open(&format!("driver=null-co,size=1M,read-zeroes=on{latency}")).unwrap();
            let dirty = IoVector::zeroed(4096);
            dirty.fill(0, 4096, 0xff);
            bench.ask(door, &disk, Request::write(0, dirty.clone())).unwrap();
            bench.ask(door, &disk, Request::read(0, dirty.clone())).unwrap();
            assert_eq!(dirty.to_vec(), vec![0; 4096]);
            bench.ask(door, &disk, Request::flush()).unwrap();
            assert!(bench.status(door, &disk, 0, 4096).unwrap().zero);
            bench.close(&disk).unwrap();
        }
    }
}

#[test]
fn offsets_at_the_largest_length_do_not_wrap() {
    let bench = Bench::new();
    let size = Limits::MAX_LENGTH;
    for options in [
        format!("driver=null-co,size={size}"),
        format!("driver=raw,offset=4096,file.driver=null-co,file.size={size}"),
    ] {
        let disk = bench.open(&options).unwrap();
        let length = disk.length().unwrap();
        for door in Door::ALL {
            bench.ask(door, &disk, Request::read(length - 512, IoVector::zeroed(512))).unwrap();
            bench.ask(door, &disk, Request::write_zeroes(0, length)).unwrap();
            for offset in [length - 511, length, i64::MAX as u64, u64::MAX - 511] {
                let request = Request::read(offset, IoVector::zeroed(512));
                let error = bench.ask(door, &disk, request).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::OutOfRange);
            }
        }
        bench.close(&disk).unwrap();
    }
    let error = bench.open("driver=null-co,size=9223372036854775807").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
}

#[test]
fn statistics_count_each_kind_its_bytes_and_its_failures() {
    let bench = Bench::new();
    let disk = bench.open("driver=memory,size=1M").unwrap();
    for door in Door::ALL {
        bench.ask(door, &disk, write(0, &[1; 1000])).unwrap();
        bench.ask(door, &disk, Request::flush()).unwrap();
        bench.ask(door, &disk, Request::read(MIB, IoVector::zeroed(1))).unwrap_err();
        bench.ask(door, &disk, Request::truncate(0)).unwrap_err();
    }
    let statistics = disk.statistics();
    let tally = |kind| {
        let tally = statistics.of(kind);
        (tally.operations, tally.bytes, tally.failed)
    };
    assert_eq!(tally(RequestKind::Write), (3, 3000, 0));
    assert_eq!(tally(RequestKind::Flush), (3, 0, 0));
    assert_eq!(tally(RequestKind::Read), (0, 0, 3));
    assert_eq!(tally(RequestKind::Truncate), (0, 0, 3));
    assert_eq!(statistics.operations(), 6);
    bench.close(&disk).unwrap();
}

#[test]
fn an_error_says_what_was_done_where_and_to_which_node() {
    let bench = Bench::new();
    let disk = bench.open("driver=memory,size=1M,node-name=ram").unwrap();
    for door in Door::ALL {
        let error = bench.ask(door, &disk, Request::read(MIB, IoVector::zeroed(512))).unwrap_err();
        assert_eq!((error.operation(), error.node()), (Some("read"), Some("ram")), "{door:?}");
        let text = error.to_string();
        assert!(text.starts_with("read of 512 bytes at 1048576 on node 'ram'"), "{text}");
    }
    bench.close(&disk).unwrap();
}

#[test]
fn a_raw_disk_takes_any_bytes_and_stays_raw() {
    // A guest that writes the header of another format to its first sector has written data (W02).
    let (_directory, path) = file();
    let bench = Bench::new();
    let options = format!("driver=raw,file.driver=file,file.filename={}", path.display());
    let mut header = vec![0; 512];
    header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    for door in Door::ALL {
        let disk = bench.open(&options).unwrap();
        bench.ask(door, &disk, write(0, &header)).unwrap();
        bench.close(&disk).unwrap();
        let disk = bench.open(&options).unwrap();
        assert_eq!(read_back(&bench, door, &disk, 0, 512), header);
        assert_eq!(disk.length().unwrap(), MIB);
        bench.close(&disk).unwrap();
    }
}

#[test]
fn a_sparse_file_of_terabytes_is_read_and_written_at_its_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("huge");
    // The largest power of two that the file system takes, less a byte.
    let file = std::fs::File::create(&path).unwrap();
    let size = (40..63).rev().map(|bits| (1 << bits) - 1).find(|size| file.set_len(*size).is_ok());
    let size = size.unwrap();
    let bench = Bench::new();
    let disk = bench.open(&format!("driver=file,filename={}", path.display())).unwrap();
    assert_eq!(disk.length().unwrap(), size);
    for door in Door::ALL {
        bench.ask(door, &disk, write(size - 5, b"tail!")).unwrap();
        assert_eq!(read_back(&bench, door, &disk, size - 5, 5), b"tail!");
        assert_eq!(read_back(&bench, door, &disk, size / 2, 4096), vec![0; 4096]);
        let error = bench.ask(door, &disk, write(size - 4, b"tail!")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange);
        assert!(bench.status(door, &disk, 0, u64::MAX).unwrap().zero);
    }
    bench.close(&disk).unwrap();
}
