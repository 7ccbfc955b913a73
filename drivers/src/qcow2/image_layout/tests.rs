//! Fresh images against the peer: judged by its checker, and compared byte for byte.

use super::*;
use crate::qcow2::testing::Scratch;

fn options(size: u64, change: impl FnOnce(&mut CreateOptions)) -> CreateOptions {
    let mut options = CreateOptions::new(size);
    change(&mut options);
    options
}

fn file_of(layout: &ImageLayout) -> Vec<u8> {
    let mut file = vec![0; layout.file_length as usize];
    for (offset, bytes) in &layout.writes {
        file[*offset as usize..][..bytes.len()].copy_from_slice(bytes);
    }
    file
}

#[test]
fn the_peer_finds_nothing_wrong_with_our_images() {
    let scratch = Scratch::new();
    let (k, m, g, t) = (1 << 10, 1 << 20, 1_u64 << 30, 1_u64 << 40);
    let rows = [
        options(0, |_| {}),
        options(512, |_| {}),
        options(64 * m, |o| o.version = Version::V2),
        options(64 * m + 512, |o| o.lazy_refcounts = true),
        options(2 * t, |_| {}),
        options(128 * g, |o| (o.cluster_size, o.refcount_bits) = (512, 64)),
        options(g, |o| (o.cluster_size, o.refcount_bits) = (512, 1)),
        options(4 * t, |o| (o.cluster_size, o.refcount_bits) = (4 * k, 64)),
        options(t, |o| (o.cluster_size, o.refcount_bits) = (2 * m, 2)),
        options(g, |o| o.compression_type = CompressionType::Zstd),
    ];
    for options in rows {
        let layout = ImageLayout::new(&options).unwrap();
        let image = scratch.path();
        let file = file_of(&layout);
        std::fs::write(&image, &file).unwrap();
        let said = scratch.qemu_img(&["check", "-f", "qcow2", &image]);
        assert!(said.contains("No errors were found"), "{options:?}: {said}");
        let info = scratch.qemu_img(&["info", "-f", "qcow2", &image]);
        assert!(info.contains(&format!("({} bytes)", options.size)), "{options:?}: {info}");
        let cluster = &file[..options.cluster_size as usize];
        let parsed = Header::parse(cluster, layout.file_length).unwrap();
        assert_eq!(parsed, layout.header);
        assert!(
            file[layout.zeros.start as usize..layout.zeros.end as usize].iter().all(|&b| b == 0)
        );
    }
}

#[test]
fn the_peer_can_write_to_our_images() {
    let scratch = Scratch::new();
    for (cluster_size, refcount_bits) in [(512, 1), (4096, 4), (65536, 16), (2 << 20, 64)] {
        let options = options(16 << 20, |o| {
            (o.cluster_size, o.refcount_bits) = (cluster_size, refcount_bits);
        });
        let image = scratch.path();
        std::fs::write(&image, file_of(&ImageLayout::new(&options).unwrap())).unwrap();
        scratch.qemu_io(&image, "write -P 7 1000k 3M");
        let read = scratch.qemu_io(&image, "read -P 7 1000k 3M");
        assert!(!read.contains("failed"), "{cluster_size}: {read}");
        let said = scratch.qemu_img(&["check", "-f", "qcow2", &image]);
        assert!(said.contains("No errors were found"), "{cluster_size}: {said}");
    }
}

#[test]
fn images_are_those_of_the_peer_byte_for_byte() {
    let scratch = Scratch::new();
    let backing = |o: &mut CreateOptions| {
        o.backing_name = Some(b"base.img".to_vec());
        o.backing_format = Some(b"raw".to_vec());
    };
    let rows = [
        ("", options(64 << 20, |_| {})),
        ("compat=0.10", options(1 << 30, |o| o.version = Version::V2)),
        ("cluster_size=512", options(1 << 20, |o| o.cluster_size = 512)),
        ("cluster_size=4k", options(1 << 20, |o| o.cluster_size = 4096)),
        ("cluster_size=2M", options(1 << 40, |o| o.cluster_size = 2 << 20)),
        ("lazy_refcounts=on", options(1 << 20, |o| o.lazy_refcounts = true)),
        ("compression_type=zstd", options(0, |o| o.compression_type = CompressionType::Zstd)),
        ("backing_file=base.img,backing_fmt=raw", options(4096, backing)),
        (
            "cluster_size=512,backing_file=base.img,backing_fmt=raw",
            options(4096, |o| {
                backing(o);
                o.cluster_size = 512;
            }),
        ),
        (
            "compat=0.10,backing_file=base.img,backing_fmt=raw",
            options(4096, |o| {
                backing(o);
                o.version = Version::V2;
            }),
        ),
        ("refcount_bits=1", options(1 << 20, |o| o.refcount_bits = 1)),
        ("refcount_bits=2", options(1 << 20, |o| o.refcount_bits = 2)),
        ("refcount_bits=4", options(1 << 20, |o| o.refcount_bits = 4)),
        ("refcount_bits=8", options(1 << 20, |o| o.refcount_bits = 8)),
        ("refcount_bits=32", options(1 << 20, |o| o.refcount_bits = 32)),
        ("refcount_bits=64", options(1 << 20, |o| o.refcount_bits = 64)),
    ];
    for (text, options) in rows {
        let image = scratch.create(text, &options.size.to_string());
        let layout = ImageLayout::new(&options).unwrap();
        let mut theirs = scratch.read(&image);
        theirs.resize(layout.file_length as usize, 0);
        assert!(theirs == file_of(&layout), "{text}");
    }
}

#[test]
fn impossible_options_are_refused_by_name() {
    let v2 = Version::V2;
    let name = || Some(b"b".to_vec());
    let rows: [(&str, CreateOptions); 18] = [
        ("size 513", options(513, |_| {})),
        ("size 2251799813685760", options((2 << 50) + 512, |_| {})),
        ("size 18446744073709551104", options(u64::MAX - 511, |_| {})),
        ("cluster_size 0", options(0, |o| o.cluster_size = 0)),
        ("cluster_size 256", options(0, |o| o.cluster_size = 256)),
        ("cluster_size 3000", options(0, |o| o.cluster_size = 3000)),
        ("cluster_size 4194304", options(0, |o| o.cluster_size = 4 << 20)),
        ("refcount_bits 0", options(0, |o| o.refcount_bits = 0)),
        ("refcount_bits 3", options(0, |o| o.refcount_bits = 3)),
        ("refcount_bits 128", options(0, |o| o.refcount_bits = 128)),
        ("lazy_refcounts on", options(0, |o| (o.version, o.lazy_refcounts) = (v2, true))),
        ("refcount_bits 8", options(0, |o| (o.version, o.refcount_bits) = (v2, 8))),
        (
            "compression_type zstd",
            options(0, |o| (o.version, o.compression_type) = (v2, CompressionType::Zstd)),
        ),
        ("backing_fmt \"b\"", options(0, |o| o.backing_format = name())),
        ("backing_file \"b\"", options(0, |o| o.backing_name = name())),
        (
            "backing_fmt \"xxxxxxxxxxxxxxxx\"",
            options(0, |o| (o.backing_name, o.backing_format) = (name(), Some(vec![b'x'; 16]))),
        ),
        (
            "backing file name \"a\\x00b\"",
            options(0, |o| {
                (o.backing_name, o.backing_format) = (Some(b"a\0b".to_vec()), name());
            }),
        ),
        (
            "backing file name \"x",
            options(0, |o| (o.backing_name, o.backing_format) = (Some(vec![b'x'; 1024]), name())),
        ),
    ];
    for (start, options) in rows {
        let error = ImageLayout::new(&options).unwrap_err();
        assert_eq!(error.kind, FormatErrorKind::InvalidOption, "{error}");
        assert!(error.to_string().starts_with(start), "{start}: {error}");
    }
}

#[test]
fn names_that_do_not_fit_the_header_are_refused() {
    let options = options(0, |o| {
        o.cluster_size = 1024;
        o.backing_name = Some(vec![b'x'; 1000]);
        o.backing_format = Some(b"raw".to_vec());
    });
    let error = ImageLayout::new(&options).unwrap_err();
    assert_eq!(error.kind, FormatErrorKind::NoSpace, "{error}");
}
