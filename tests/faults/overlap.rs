//! The option `overlap-check`: a snapshot that claims the disk's L1 table, under each spelling.

use super::image::{self, FILL, L1, Patch, REFCOUNT_BLOCK, Sandbox, be16, be32, be64};
use super::rows::FAR;
use blockplex::{Blockplex, OpenGate, OpenOptions, block_on};
use std::fs;

/// Where the snapshot table is put.
const TABLE: u64 = 0x60000;

/// A snapshot whose L1 table is the disk's (S05).
fn claimed() -> Vec<u8> {
    let mut entry = L1.to_be_bytes().to_vec();
    entry.extend(1_u32.to_be_bytes());
    entry.extend([0, 1, 0, 1]);
    entry.resize(36, 0);
    entry.extend(16_u32.to_be_bytes());
    entry.extend([0; 8]);
    entry.extend((64_u64 << 20).to_be_bytes());
    entry.extend(*b"1s");
    let patches = [
        be32(60, 1),
        be64(64, TABLE),
        Patch::Bytes(TABLE, vec![0; 0x10000]),
        Patch::Bytes(TABLE, entry),
        be16(REFCOUNT_BLOCK + 12, 1),
        // No table yet: the first write must change the L1 table.
        be64(L1, 0),
    ];
    image::patched(image::base(), &patches)
}

#[test]
fn every_spelling_says_what_is_watched() {
    let stops: [(&[(&str, &str)], bool); 7] = [
        (&[], true),
        (&[("overlap-check", "cached")], true),
        (&[("overlap-check", "all")], true),
        (&[("overlap-check", "constant")], false),
        (&[("overlap-check.template", "none")], false),
        (&[("overlap-check.template", "none"), ("overlap-check.inactive-l1", "on")], true),
        (&[("overlap-check.inactive-l1", "off")], false),
    ];
    for (settings, stops) in stops {
        let sandbox = Sandbox::new();
        let path = sandbox.put("image.qcow2", &claimed());
        let layer = Blockplex::new().expect("a layer");
        let mut options = OpenOptions::image("qcow2", &path).gate(OpenGate::deny_all());
        for (key, value) in settings {
            options = options.set(key, *value);
        }
        let backend = block_on(layer.open("disk", options)).expect("no loop").expect("opens");
        let disk = backend.blocking();
        let flushed = disk.write(FAR, &[FILL; 512]).and_then(|()| disk.flush());
        assert_eq!(flushed.is_err(), stops, "{settings:?}: {flushed:?}");
        let closed = block_on(backend.close()).expect("no loop");
        assert!(stops || closed.is_ok(), "{settings:?}: {closed:?}");
        let marked = fs::read(&path).expect("it is there")[79] & 2 != 0;
        assert_eq!(marked, stops, "{settings:?}");
    }
    for (key, value) in [("overlap-check", "some"), ("overlap-check.active-l3", "on")] {
        let sandbox = Sandbox::new();
        let path = sandbox.put("image.qcow2", image::base());
        let layer = Blockplex::new().expect("a layer");
        let options = OpenOptions::image("qcow2", &path).gate(OpenGate::deny_all()).set(key, value);
        block_on(layer.open("disk", options)).expect("no loop").expect_err(key);
    }
}
