//! Rows M: the directory of persistent bitmaps, and their tables.

use super::image::{self, DATA, L1, Patch, REFCOUNT_BLOCK, Sandbox, be16, be64, extensions};
use super::rows::{Expected, READ_ONLY, REFUSED, WORKS, judge, row};
use blockplex::{Blockplex, OpenGate, OpenOptions, block_on};

/// The number of the bitmaps extension.
const BITMAPS: u32 = 0x2385_2875;
/// Where the tests put directory, table and bits.
const DIRECTORY: u64 = 0x70000;
const TABLE: u64 = 0x80000;
const BITS: u64 = 0x90000;

/// An entry named "b": a table of one entry, a bit for each 64 KiB.
fn entry() -> Vec<u8> {
    let mut bytes = TABLE.to_be_bytes().to_vec();
    bytes.extend(1_u32.to_be_bytes());
    bytes.extend([0, 0, 0, 2, 1, 16, 0, 1, 0, 0, 0, 0]);
    bytes.extend(*b"b\0\0\0\0\0\0\0");
    bytes
}

/// The entry with other bytes at `at`.
fn with(at: usize, value: &[u8]) -> Vec<u8> {
    let mut bytes = entry();
    bytes[at..at + value.len()].copy_from_slice(value);
    bytes
}

/// An image with a directory of `count` entries, everything counted and inside of the file.
fn directory(entries: &[u8], count: u32, table: u64) -> Vec<Patch> {
    let mut extension = count.to_be_bytes().to_vec();
    extension.extend([0; 4]);
    extension.extend((entries.len() as u64).to_be_bytes());
    extension.extend(DIRECTORY.to_be_bytes());
    let mut patches = vec![
        be64(88, 1),
        extensions(&[(BITMAPS, &extension)]),
        Patch::Length(BITS + 0x10000),
        Patch::Bytes(DIRECTORY, entries.to_vec()),
        be64(TABLE, table),
    ];
    patches.extend([7, 8, 9].map(|cluster| be16(REFCOUNT_BLOCK + cluster * 2, 1)));
    patches
}

fn entry_row(id: &str, at: usize, value: &[u8], expected: Expected) {
    judge([row(id, directory(&with(at, value), 1, BITS), expected).says(&["bitmap"])]);
}

#[test]
fn a_good_directory_works() {
    // The far write leaves the third cluster of the old bits free: the new ones are elsewhere.
    judge([row("none", directory(&entry(), 1, BITS), WORKS)]);
}

#[test]
fn an_entry_must_be_possible_and_fit_the_directory() {
    entry_row("M01", 18, &[0xff, 0xff], REFUSED);
    entry_row("M02", 18, &[0, 0], REFUSED);
    for bits in [0, 8, 32, 255] {
        entry_row(&format!("M03 {bits}"), 17, &[bits], REFUSED);
    }
    entry_row("M04 0", 8, &[0; 4], REFUSED);
    entry_row("M04 most", 8, &[0xff; 4], REFUSED);
    let mut long = directory(&with(8, &0x2000_u32.to_be_bytes()), 1, 0);
    long.push(Patch::Length(TABLE + 0x8000));
    judge([row("M04 past the end", long, REFUSED).says(&["bitmap", "end of the file"])]);
    entry_row("M05 unaligned", 0, &0x80200_u64.to_be_bytes(), REFUSED);
    entry_row("M05 zero", 0, &[0; 8], REFUSED);
    entry_row("M05c", 0, &(1_u64 << 32).to_be_bytes(), REFUSED);
    entry_row("M06", 16, &[2], REFUSED);
    entry_row("M07", 12, &[0x80, 0, 0, 2], REFUSED);
    entry_row("M08", 20, &[0, 0, 0, 8], REFUSED);
    let mut extra = with(20, &[0, 0, 0, 8]);
    extra.extend([0; 8]);
    judge([row("M08 whole", directory(&extra, 1, BITS), REFUSED).says(&["extra data"])]);
    let twice = [entry(), entry()].concat();
    judge([row("M11", directory(&twice, 2, BITS), REFUSED).says(&["second"])]);
}

#[test]
fn a_table_must_name_clusters_of_its_own() {
    let table = |id: &str, raw: u64, expected| {
        judge([row(id, directory(&entry(), 1, raw), expected).says(&["bitmap"])]);
    };
    table("M09", 0xff00_0000_0000_01fe, REFUSED);
    table("M09 unaligned", BITS + 0x200, REFUSED);
    table("M09 both", BITS + 1, REFUSED);
    table("M09c", L1, REFUSED);
    table("M09c itself", TABLE, REFUSED);
    table("M09c directory", DIRECTORY, REFUSED);
    table("M09c far", 1 << 40, REFUSED);
    table("M09c uncounted", 0xa0000, REFUSED);
    let mut uncounted = directory(&entry(), 1, BITS);
    uncounted.push(be16(REFCOUNT_BLOCK + 18, 0));
    judge([row("M09c uncounted", uncounted, READ_ONLY).says(&["refcount 0"])]);
    let shared = directory(&with(0, &DATA.to_be_bytes()), 1, BITS);
    // The data as a table: its entries cannot be.
    judge([row("M09 data", shared, REFUSED)]);
}

#[test]
fn a_bitmap_in_use_is_shown_and_can_only_be_removed() {
    let patches = directory(&with(12, &[0, 0, 0, 3]), 1, BITS);
    judge([row("M10", patches.clone(), WORKS)]);
    let sandbox = Sandbox::new();
    let path = sandbox.put("image.qcow2", &image::patched(image::base(), &patches));
    let options = OpenOptions::image("qcow2", &path).gate(OpenGate::deny_all());
    let layer = Blockplex::new().expect("a layer");
    let backend = block_on(layer.open("disk", options)).expect("no loop").expect("opens");
    let node = backend.root().expect("it has one");
    assert!(layer.bitmaps(node).expect("a list")[0].inconsistent);
    layer.bitmap(node, b"b").expect_err("of no use");
    block_on(layer.bitmap_clear(node, b"b")).expect("no loop").expect_err("of no use");
    block_on(layer.bitmap_remove(node, b"b")).expect("no loop").expect("goes");
    block_on(backend.close()).expect("no loop").expect("closes");
    assert_eq!(image::check(&path), Some(image::Check::CLEAN), "M10");
}
