//! Rows E: header extensions.

use super::image::{self, BACKING_FORMAT, DATA_FILE, Patch, be32, be64, extensions};
use super::rows::{REFUSED, WORKS, judge, row};
use super::tools::{Kind, run};
use std::fs;

const UNKNOWN: u32 = 0x1234_5678;
const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
const CRYPTO: u32 = 0x0537_be77;

/// The data of a bitmaps extension.
fn bitmaps(count: u32, reserved: u32, size: u64, offset: u64) -> Vec<u8> {
    let mut data = [count.to_be_bytes(), reserved.to_be_bytes()].concat();
    data.extend(size.to_be_bytes());
    data.extend(offset.to_be_bytes());
    data
}

/// With the autoclear bit that says that the bitmaps are up to date.
fn with_bitmaps(data: &[u8]) -> Vec<Patch> {
    vec![be64(88, 1), extensions(&[(BITMAPS, data)])]
}

#[test]
fn an_extension_must_end_in_the_header_cluster() {
    let room = 0x10000 - 120;
    for length in [0x7fff_ffff, u32::MAX, room + 1] {
        let patches = [be32(112, UNKNOWN), be32(116, length)];
        let says = ["extension length", &length.to_string()];
        judge([row(format!("E01 {length}"), patches, REFUSED).says(&says)]);
    }
    let data = vec![0xaa; room as usize];
    let full = [be32(112, UNKNOWN), be32(116, room), Patch::Bytes(120, data)];
    judge([row("E01 full", full, WORKS)]);
}

/// E02.
#[test]
fn a_header_without_room_for_a_name_stays_as_it_is() {
    let room = 0x10000 - 120;
    let full = [be32(112, UNKNOWN), be32(116, room), Patch::Bytes(120, vec![0xaa; room as usize])];
    let sandbox = image::Sandbox::new();
    let bytes = image::patched(image::base(), &full);
    let path = sandbox.put("image.qcow2", &bytes);
    sandbox.put("base.raw", &[7; 4096]);
    for line in [
        "img rebase -u -f qcow2 -F raw -b base.raw FILE",
        "img rebase -f qcow2 -F raw -b base.raw FILE",
    ] {
        let (status, said) = run("E02", &sandbox, Kind::Plain, line, &path);
        let text = String::from_utf8_lossy(&said.stderr).into_owned();
        assert!(status == 1 && text.contains("space"), "E02: {line}: {status}: {text}");
        assert!(fs::read(&path).expect("it is there") == bytes, "E02: changed by: {line}");
    }
}

#[test]
fn a_backing_format_must_be_short() {
    for length in [16, 1000] {
        let patches = [extensions(&[(BACKING_FORMAT, &vec![b'q'; length])])];
        let says = ["backing format", &length.to_string()];
        judge([row(format!("E03 {length}"), patches, REFUSED).says(&says)]);
    }
}

/// An image's own name for a feature is shown escaped and cut.
#[test]
fn a_feature_name_cannot_forge_the_message() {
    let mut names = vec![0, 20];
    names.extend(b"%n%s\x1b[2J\r\nall is well'\"\xff ");
    names.resize(47, b'A');
    let patches = [be64(72, 1 << 20), extensions(&[(FEATURE_NAMES, &names)])];
    judge([row("E05", patches, REFUSED).says(&["20", "%n%s\\x1b[2J"])]);
}

#[test]
fn a_bitmap_directory_must_be_possible() {
    let good = bitmaps(1, 0, 32, 0x70000);
    let past = bitmaps(1, 0, 67_107_840, 0x70000);
    judge([
        row("E06", with_bitmaps(&good[..23]), REFUSED).says(&["bitmaps extension length", "23"]),
        row("E06d", with_bitmaps(&bitmaps(1, 1, 32, 0x70000)), REFUSED).says(&["reserved"]),
        row("E06e", with_bitmaps(&bitmaps(1, 0, 1 << 40, 0x70000)), REFUSED)
            .says(&["bitmap directory size", "1099511627776"]),
        row("E06f", with_bitmaps(&bitmaps(1, 0, 32, 0x70200)), REFUSED).says(&["0x70200"]),
        row("E06h", with_bitmaps(&bitmaps(1, 0, 32, 0)), REFUSED)
            .says(&["bitmap directory offset"]),
        row("E06g", with_bitmaps(&past), REFUSED).says(&["bitmap directory offset"]),
        row("M12", with_bitmaps(&bitmaps(0, 0, 0, 0)), REFUSED).says(&["bitmap count"]),
        // Stale ones are nobody's business.
        row("E06i", [extensions(&[(BITMAPS, &good)])], WORKS),
    ]);
}

#[test]
fn an_extension_that_stands_twice_is_refused() {
    let formats = extensions(&[(BACKING_FORMAT, b"raw"), (BACKING_FORMAT, b"qcow2")]);
    let files = extensions(&[(DATA_FILE, b"a"), (DATA_FILE, b"b")]);
    let good = bitmaps(1, 0, 32, 0x70000);
    let twice = extensions(&[(BITMAPS, &good), (BITMAPS, &good)]);
    judge([
        row("E07 format", [formats], REFUSED).says(&["backing format", "second time"]),
        row("E07 data file", [files], REFUSED).says(&["data file", "second time"]),
        row("E07 bitmaps", [twice], REFUSED).says(&["bitmaps", "second time"]),
    ]);
}

#[test]
fn a_crypto_header_without_encryption_is_refused() {
    let crypto = [0x50000_u64.to_be_bytes(), 512_u64.to_be_bytes()].concat();
    judge([row("E08", [extensions(&[(CRYPTO, &crypto)])], REFUSED).says(&["crypto header"])]);
}

#[test]
fn a_quarter_of_a_million_extensions_are_refused_at_once() {
    let large = image::made("cluster_size=2M", "64M", &[]);
    let record = [UNKNOWN.to_be_bytes(), [0; 4]].concat();
    let many = Patch::Bytes(112, record.repeat(262_000));
    judge([row("E10", [many], REFUSED).says(&["extension", "256"]).on(&large)]);
}
