//! Against temporary files. What the file system below may lack is asked for first.

use std::{fs::File, os::unix::fs::FileExt};

use super::*;

const BLOCK: u64 = 1 << 20;

fn writable() -> OpenOptions {
    OpenOptions { write: true, ..OpenOptions::default() }
}

/// 4 MiB with data in the second and the last quarter.
fn sparse() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(4 * BLOCK).unwrap();
    let data = vec![1; usize::try_from(BLOCK).unwrap()];
    file.write_all_at(&data, BLOCK).unwrap();
    file.write_all_at(&data, 3 * BLOCK).unwrap();
    file.sync_all().unwrap();
    file
}

/// All extents between `offset` and `end`, neighbours of one kind joined.
fn extents(file: &File, mut offset: u64, end: u64) -> Vec<(ExtentKind, u64)> {
    let mut all: Vec<(ExtentKind, u64)> = Vec::new();
    while offset < end {
        let extent = next_extent(file, offset, end).unwrap();
        assert!(extent.length > 0 && extent.length <= end - offset);
        offset += extent.length;
        match all.last_mut() {
            Some((kind, length)) if *kind == extent.kind => *length += extent.length,
            _ => all.push((extent.kind, extent.length)),
        }
    }
    all
}

/// Whether holes are reported below here at all.
fn reports_holes() -> bool {
    let file = tempfile::tempfile().unwrap();
    file.set_len(BLOCK).unwrap();
    extents(&file, 0, BLOCK) == [(ExtentKind::Hole, BLOCK)]
}

#[test]
fn holes_and_data_are_told_apart() {
    use ExtentKind::{Data, Hole};
    let file = sparse();
    if !reports_holes() {
        assert_eq!(extents(&file, 0, 4 * BLOCK), [(Data, 4 * BLOCK)]);
        return;
    }
    assert_eq!(
        extents(&file, 0, 4 * BLOCK),
        [(Hole, BLOCK), (Data, BLOCK), (Hole, BLOCK), (Data, BLOCK)]
    );
    assert_eq!(extents(&file, BLOCK + 7, BLOCK + 8), [(Data, 1)]);
    assert_eq!(extents(&file, 2 * BLOCK - 1, 2 * BLOCK + 1), [(Data, 1), (Hole, 1)]);
    // Past the end of the file nothing is stored.
    assert_eq!(extents(&file, 4 * BLOCK - 1, 6 * BLOCK), [(Data, 1), (Hole, 2 * BLOCK)]);
    assert_eq!(extents(&file, 9 * BLOCK, 10 * BLOCK), [(Hole, BLOCK)]);
    let far = i64::MAX as u64;
    assert_eq!(extents(&file, far - 1, far), [(Hole, 1)]);
}

#[test]
fn impossible_ranges_are_refused() {
    let file = sparse();
    for (offset, end) in [(1, 1), (2, 1), (0, 1 << 63), (u64::MAX - 1, u64::MAX)] {
        let error = next_extent(&file, offset, end).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "{offset}..{end}");
    }
}

#[test]
fn length_follows_truncation() {
    let file = tempfile::tempfile().unwrap();
    assert_eq!(length(&file).unwrap(), 0);
    truncate(&file, 4097).unwrap();
    assert_eq!(length(&file).unwrap(), 4097);
    truncate(&file, 1).unwrap();
    assert_eq!(length(&file).unwrap(), 1);
    for impossible in [1 << 63, u64::MAX] {
        let error = truncate(&file, impossible).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFBIG));
    }
    assert_eq!(length(&file).unwrap(), 1);
}

#[test]
fn a_block_size_is_a_power_of_two_from_a_sector_on() {
    let size = block_size(tempfile::tempfile().unwrap()).unwrap();
    assert!(size.is_power_of_two() && size >= 512, "{size}");
}

#[test]
fn open_gives_the_asked_access_and_a_blocking_descriptor() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let missing = open(&path, writable()).unwrap_err();
    assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    let create = OpenOptions { create: true, ..writable() };
    let fd = open(&path, create).unwrap();
    truncate(&fd, 10).unwrap();
    assert_eq!(length(open(&path, create).unwrap()).unwrap(), 10);

    let fd = open(&path, OpenOptions::default()).unwrap();
    let flags = fcntl_getfl(&fd).unwrap();
    assert_eq!(flags & OFlags::RWMODE, OFlags::RDONLY);
    assert!(!flags.contains(OFlags::NONBLOCK));
    assert!(truncate(&fd, 0).is_err());
    let flags = rustix::io::fcntl_getfd(&fd).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
}

#[test]
fn what_is_neither_file_nor_device_is_refused_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("fifo");
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, mode, 0).unwrap();
    for (path, errno) in [
        (fifo.as_path(), libc::EINVAL),
        (directory.path(), libc::EISDIR),
        (Path::new("/dev/null"), libc::EINVAL),
    ] {
        let error = open(path, OpenOptions::default()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(errno), "{path:?}");
    }
}

#[test]
fn reads_aligned_as_reported_are_accepted() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    std::fs::write(&path, vec![7; 4 * LARGEST_ALIGNMENT]).unwrap();
    let direct = OpenOptions { direct: true, ..OpenOptions::default() };
    let Ok(fd) = open(&path, direct) else {
        eprintln!("skipped: no O_DIRECT on this file system");
        return;
    };
    let tried = tried_alignment(fd.as_fd()).unwrap();
    for alignment in [direct_alignment(&fd).unwrap(), tried] {
        let (memory, offset) = (alignment.memory as usize, alignment.offset as usize);
        assert!(memory.is_power_of_two() && offset.is_power_of_two());
        let mut buffer = vec![0; offset + 4 * memory];
        // Aligned to just that much, and to no more.
        let start = buffer.as_ptr().align_offset(2 * memory) + memory;
        let read = pread(&fd, &mut buffer[start..start + offset], offset as u64);
        assert_eq!(read, Ok(offset), "{alignment:?}");
        assert!(buffer[start..start + offset].iter().all(|byte| *byte == 7));
    }
}

#[test]
fn each_allocation_mode_does_what_it_says() {
    let page = vec![0xff; 8192];
    for (mode, grows, zeroes) in [
        (AllocateMode::Reserve, true, false),
        (AllocateMode::PunchHole, false, true),
        (AllocateMode::ZeroRange, true, true),
        (AllocateMode::ZeroRangeKeepSize, false, true),
    ] {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&page, 0).unwrap();
        match allocate(&file, mode, 4096, 8192) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                eprintln!("skipped: no {mode:?} on this file system");
                continue;
            }
            Err(error) => panic!("{mode:?}: {error}"),
        }
        let expected = if grows { 12288 } else { 8192 };
        assert_eq!(length(&file).unwrap(), expected, "{mode:?}");
        let mut bytes = [0; 8192];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes[..4096].iter().all(|byte| *byte == 0xff), "{mode:?}");
        let rest = if zeroes { 0 } else { 0xff };
        assert!(bytes[4096..].iter().all(|byte| *byte == rest), "{mode:?}");
    }
    assert!(allocate(tempfile::tempfile().unwrap(), AllocateMode::Reserve, 0, 0).is_err());
}

#[test]
fn raw_modes_are_the_kernels_numbers() {
    assert_eq!(AllocateMode::Reserve.raw(), 0);
    assert_eq!(
        AllocateMode::PunchHole.raw(),
        libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE
    );
    assert_eq!(AllocateMode::ZeroRange.raw(), libc::FALLOC_FL_ZERO_RANGE);
    assert_eq!(
        AllocateMode::ZeroRangeKeepSize.raw(),
        libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE
    );
}
