//! Rows W: raw images, formats that are stated and never guessed, files that change under us.

use super::image::{self, Sandbox, patched, text};
use super::rows::bounded;
use blockplex::{Backend, Blockplex, Limits, OpenOptions, Request, Result, block_on};
use std::fs::{self, File};
use std::path::Path;

fn open(layer: &Blockplex, options: OpenOptions) -> Result<Backend> {
    block_on(layer.open("disk", options)).expect("no loop")
}

fn close(backend: &Backend) {
    block_on(backend.close()).expect("no loop").expect("closes");
}

/// W02, W03: bytes that are a qcow2 header, a boot sector and a VMDK descriptor at once.
#[test]
fn a_raw_disk_holds_any_bytes_and_stays_raw() {
    let sandbox = Sandbox::new();
    let mut polyglot = patched(image::base(), &image::backing(b"/etc/passwd", Some("raw")));
    polyglot[510..512].copy_from_slice(&[0x55, 0xaa]);
    polyglot[0x200..0x215].copy_from_slice(b"# Disk DescriptorFile");
    let path = sandbox.put("disk.raw", &vec![0; 1 << 20]);
    bounded("W03", move || {
        let layer = Blockplex::new().expect("a layer");
        let backend = open(&layer, OpenOptions::image("raw", &path)).expect("raw");
        backend.blocking().write(0, &polyglot).expect("W02: any bytes");
        close(&backend);
        let backend = open(&layer, OpenOptions::image("raw", &path)).expect("W04: still raw");
        assert_eq!(backend.length().expect("a root"), 1 << 20, "W04: of the file's length");
        let read = backend.blocking().read_to_vec(0, polyglot.len()).expect("a read");
        assert!(read == polyglot, "W03: the bytes as they are");
        close(&backend);
    });
}

#[test]
fn no_format_is_ever_guessed() {
    let sandbox = Sandbox::new();
    let qcow2 = sandbox.put("image", image::base());
    let plain = sandbox.put("plain", &[0; 4096]);
    bounded("W03", move || {
        let layer = Blockplex::new().expect("a layer");
        let nothing_stated = format!("file.driver=file,file.filename={}", text(&qcow2));
        let options = OpenOptions::parse(&nothing_stated).expect("options");
        let error = open(&layer, options).expect_err("W04: no driver is no default");
        assert!(error.to_string().contains("driver"), "{error}");
        for (path, format) in [(&plain, "qcow2"), (&qcow2, "vpc"), (&qcow2, "qcow"), (&qcow2, "")] {
            let options = OpenOptions::image(format, path);
            open(&layer, options).expect_err("stated wrong is refused");
        }
        // The file itself, without a format: its bytes.
        let bare = format!("driver=file,filename={}", text(&qcow2));
        let backend = open(&layer, OpenOptions::parse(&bare).expect("options")).expect("a file");
        let read = backend.blocking().read_to_vec(0, 4).expect("a read");
        assert_eq!(read, *b"QFI\xfb");
        close(&backend);
        assert_eq!(layer.graph().topology().nodes().count(), 0);
    });
}

fn shorten(path: &Path, length: u64) {
    File::options().write(true).open(path).expect("it is there").set_len(length).expect("cut");
}

/// W07. What is gone reads as zeros or fails; nothing waits for it for ever.
#[test]
fn a_file_that_shrinks_under_its_disk_reads_as_zeros_or_fails() {
    let sandbox = Sandbox::new();
    for (format, bytes) in [("raw", vec![7; 1 << 20]), ("qcow2", image::base().to_vec())] {
        let path = sandbox.put("disk", &bytes);
        bounded(&format!("W07 {format}"), move || {
            let layer = Blockplex::new().expect("a layer");
            let backend = open(&layer, OpenOptions::image(format, &path)).expect("opens");
            let disk = backend.blocking();
            disk.read_to_vec(0, 0x10000).expect("a read");
            for length in [image::DATA + 512, 512, 0] {
                shorten(&path, length);
                for (offset, size) in [(0, 0x10000), (0x7fe00, 0x400), (0xff000, 0x1000)] {
                    if let Ok(read) = disk.read_to_vec(offset, size) {
                        let known = |byte: &u8| [0, 7, image::FILL].contains(byte);
                        assert!(read.iter().all(known), "W07 {format}: foreign bytes");
                    }
                }
                // May fail, must end.
                drop(disk.write(0x80000, &[7; 4096]));
                drop(disk.flush());
            }
            drop(block_on(backend.close()).expect("no loop"));
        });
    }
}

/// W08. As large as the file system allows.
#[test]
fn offsets_at_the_end_of_the_largest_file_do_not_overflow() {
    let directories = ["/dev/shm", "/tmp"].iter().filter(|path| Path::new(path).is_dir());
    let mut opened = 0;
    for directory in directories {
        let Ok(directory) = tempfile::tempdir_in(directory) else { continue };
        for length in [i64::MAX as u64, Limits::MAX_LENGTH, 1 << 62, (16 << 40) - 4096] {
            let path = directory.path().join("huge");
            if File::create(&path).expect("a file").set_len(length).is_err() {
                continue;
            }
            opened += usize::from(bounded(&format!("W08 {length:#x}"), move || {
                let ends = use_the_ends(&path, length);
                fs::remove_file(&path).expect("it is there");
                ends
            }));
        }
    }
    assert!(opened > 0, "W08: no file system with large files");
}

/// Whether it opened: what exceeds the limit need not.
fn use_the_ends(path: &Path, length: u64) -> bool {
    let layer = Blockplex::new().expect("a layer");
    let backend = match open(&layer, OpenOptions::image("raw", path)) {
        Ok(backend) => backend,
        Err(error) if length > Limits::MAX_LENGTH => {
            assert!(error.to_string().contains("length"), "W08: {error}");
            return false;
        }
        Err(error) => panic!("W08 {length:#x}: {error}"),
    };
    let disk = backend.blocking();
    let end = backend.length().expect("a root");
    assert_eq!(end, length, "W08");
    assert_eq!(disk.read_to_vec(end - 512, 512).expect("the last sector"), [0; 512]);
    let status = disk.block_status(end - 4096, 4096).expect("a status");
    assert!((1..=4096).contains(&status.length), "W08: {status:?}");
    for offset in [end - 511, end, i64::MAX as u64 - 511, i64::MAX as u64, u64::MAX - 511, u64::MAX]
    {
        disk.read_to_vec(offset, 512).expect_err("W08: past the end");
        disk.write(offset, &[1; 512]).expect_err("W08: past the end");
        disk.discard(offset, 512).expect_err("W08: past the end");
        disk.write_zeroes(offset, 512).expect_err("W08: past the end");
        if let Ok(status) = disk.block_status(offset, 512) {
            assert!(status.length <= end.saturating_sub(offset), "W08: {status:?} at {offset:#x}");
        }
    }
    for size in [u64::MAX, u64::MAX - 512, i64::MAX as u64] {
        disk.discard(4096, size).expect_err("W08: longer than the disk");
        disk.write_zeroes(4096, size).expect_err("W08: longer than the disk");
    }
    disk.run(Request::truncate(u64::MAX)).map(drop).expect_err("W08: longer than any file");
    close(&backend);
    true
}

#[test]
fn a_window_must_lie_in_the_file() {
    let sandbox = Sandbox::new();
    let path = sandbox.put("disk", &[7; 4096]);
    bounded("a window", move || {
        let layer = Blockplex::new().expect("a layer");
        for (offset, size) in [
            (u64::MAX, 0),
            (u64::MAX, u64::MAX),
            (4097, 0),
            (4096, 1),
            (1, u64::MAX),
            (1, 4096),
            (i64::MAX as u64, i64::MAX as u64),
        ] {
            let options = OpenOptions::image("raw", &path).set("offset", offset).set("size", size);
            let error = open(&layer, options).expect_err("outside of the file");
            assert!(error.to_string().contains("4096"), "{offset}, {size}: {error}");
        }
    });
}
