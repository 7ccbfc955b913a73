//! Rows S: the snapshot table and the L1 tables that it names.

use super::image::{self, FILL, L1, Patch, REFCOUNT_BLOCK, Sandbox, be16, be32, be64};
use super::rows::{REFUSED, WORKS, judge, row};
use blockplex::drivers::qcow2::SnapshotSelector;
use blockplex::{Blockplex, ErrorKind, OpenGate, OpenOptions, block_on};
use std::fs;

/// Where the tests put the table.
const TABLE: u64 = 0x60000;

/// An entry with identifier "1" and name "s".
fn entry(l1_offset: u64, l1_size: u32, disk_size: u64) -> Vec<u8> {
    let mut bytes = l1_offset.to_be_bytes().to_vec();
    bytes.extend(l1_size.to_be_bytes());
    bytes.extend([0, 1, 0, 1]);
    bytes.resize(36, 0);
    bytes.extend(16_u32.to_be_bytes());
    bytes.extend([0; 8]);
    bytes.extend(disk_size.to_be_bytes());
    bytes.extend(*b"1s");
    bytes.resize(64, 0);
    bytes
}

/// The table in a counted cluster of its own, which the file has whole.
fn table(bytes: Vec<u8>, count: u32) -> Vec<Patch> {
    vec![
        be32(60, count),
        be64(64, TABLE),
        Patch::Bytes(TABLE, vec![0; 0x10000]),
        Patch::Bytes(TABLE, bytes),
        be16(REFCOUNT_BLOCK + 12, 1),
    ]
}

#[test]
fn a_snapshot_that_cannot_be_used_is_in_nobodys_way() {
    const SIZE: u64 = 64 << 20;
    let rows = [
        ("S01 unaligned", entry(0x30200, 1, SIZE), ErrorKind::InvalidArgument),
        ("S01 far", entry(1 << 40, 1, SIZE), ErrorKind::InvalidArgument),
        ("S01 header", entry(0, 1, SIZE), ErrorKind::InvalidArgument),
        ("S02", entry(0x70000, 0x1000_0000, SIZE), ErrorKind::InvalidArgument),
        ("S02 most", entry(0x70000, u32::MAX, SIZE), ErrorKind::InvalidArgument),
        ("S05", entry(L1, 1, SIZE), ErrorKind::Corrupt),
        ("S06", entry(0x50000, 1, 1 << 63), ErrorKind::InvalidArgument),
    ];
    for (id, bytes, kind) in rows {
        let patches = table(bytes, 1);
        if kind != ErrorKind::Corrupt {
            judge([row(id, patches.clone(), WORKS)]);
        }
        let sandbox = Sandbox::new();
        let path = sandbox.put("image.qcow2", &image::patched(image::base(), &patches));
        let options = OpenOptions::image("qcow2", &path).gate(OpenGate::deny_all());
        let layer = Blockplex::new().expect("a layer");
        let view = options.clone().read_only().set("internal-snapshot", "s");
        let refused = block_on(layer.open("view", view)).expect("no loop").expect_err("unusable");
        assert_eq!(refused.kind(), kind, "{id}: {refused}");
        let backend = block_on(layer.open("disk", options)).expect("no loop").expect("opens");
        let node = backend.root().expect("it has one");
        let which = || SnapshotSelector::IdOrName(b"1".to_vec());
        let applied = block_on(layer.internal_snapshot_apply(node, which())).expect("no loop");
        assert_eq!(applied.expect_err("unusable").kind(), kind, "{id}");
        let written = backend.blocking().write(0, &[FILL; 512]);
        // Two L1 tables in one place are damage; the rest is one entry's own affair.
        assert_eq!(written.is_ok(), kind != ErrorKind::Corrupt, "{id}");
        block_on(backend.close()).expect("no loop").expect("closes");
        let marked = fs::read(&path).expect("it is there")[79] & 2 != 0;
        assert_eq!(marked, kind == ErrorKind::Corrupt, "{id}");
    }
}

#[test]
fn an_entry_must_fit_its_limits_and_the_file() {
    let with = |at: usize, value: &[u8]| {
        let mut bytes = entry(0x50000, 1, 64 << 20);
        bytes[at..at + value.len()].copy_from_slice(value);
        table(bytes, 1)
    };
    judge([
        row("S03", with(36, &0x10000_u32.to_be_bytes()), REFUSED).says(&["extra data", "65536"]),
        row("S03 most", with(36, &[0xff; 4]), REFUSED).says(&["extra data", "4294967295"]),
        row("S04", with(12, &[0xff; 4]), REFUSED).says(&["entry 0", "end of the file"]),
        row("S07", table(Vec::new(), 131_072), REFUSED).says(&["snapshot count", "131072"]),
    ]);
    let empty = [
        be32(60, 65536),
        be64(64, TABLE),
        Patch::Length(TABLE + 65536 * 40),
        Patch::Bytes(REFCOUNT_BLOCK + 12, [0_u8, 1].repeat(40)),
    ];
    // The peer takes seconds to say that each of them lacks its extra data: not asked.
    let sandbox = Sandbox::new();
    let path = sandbox.put("image.qcow2", &image::patched(image::base(), &empty));
    let options = OpenOptions::image("qcow2", &path).gate(OpenGate::deny_all());
    let layer = Blockplex::new().expect("a layer");
    let backend = block_on(layer.open("disk", options)).expect("no loop").expect("S08");
    let node = backend.root().expect("it has one");
    assert_eq!(layer.internal_snapshots(node).expect("a list").len(), 65536, "S08");
    block_on(backend.close()).expect("no loop").expect("closes");
}

#[test]
fn names_are_escaped_wherever_they_are_shown() {
    let mut bytes = entry(0x30200, 1, 64 << 20);
    bytes[14..16].copy_from_slice(&4_u16.to_be_bytes());
    bytes[57..61].copy_from_slice(b"\n\x1b\xff/");
    judge([row("S09", table(bytes, 1), WORKS)]);
}
