//! Rows H: header fields that cannot be, are too large, or are on top of each other.

use super::image::{self, L1, Patch, REFCOUNT_TABLE, be32, be64};
use super::rows::{Expected, Fate, READ_ONLY, REFUSED, WORKS, judge, row};
use super::tools::{Kind, run};
use blockplex::drivers::probe::suggest_format;

/// It opens; the first cluster is not what it was.
const MISREAD: Expected = Expected {
    read_only: Some([Fate::Either, Fate::Fine]),
    read_write: Some([Fate::Either, Fate::Fine]),
    marked: false,
};

const SAYS_L1: &str = "L1 table";

/// A field of 32 bits that takes each of `values` and is refused by its name.
fn refused32(id: &str, at: u64, values: &[u32], name: &str) {
    judge(
        values.iter().map(|value| {
            row(format!("{id} {value:#x}"), [be32(at, *value)], REFUSED).says(&[name])
        }),
    );
}

#[test]
fn magic_version_and_cluster_size_must_be_known() {
    judge([row("H01", [Patch::Bytes(3, vec![0])], REFUSED).says(&["qcow2"])]);
    refused32("H02", 4, &[0, 1, 4, u32::MAX], "version");
    refused32("H03", 20, &[0, 8, 22, 31, 63, 64, u32::MAX], "cluster");
    let first_version = image::patched(image::base(), &[be32(4, 1)]);
    assert_eq!(suggest_format(&first_version).name(), "qcow", "H02p");
}

#[test]
fn the_header_must_have_a_possible_length() {
    refused32("H04b", 100, &[65537, 0x7fff_ffff, u32::MAX], "header length");
    judge([row("H04c", [be32(100, 105)], REFUSED).says(&["header length", "105"])]);
    // All fields there are; the rest of the cluster is fields of the future, kept as they are.
    judge([row("H04d", [be32(100, 65536), Patch::Bytes(112, vec![0; 65424])], WORKS)]);
}

#[test]
fn a_file_that_ends_before_its_tables_is_refused() {
    for length in [104, 512, 0x10000] {
        judge([row(format!("H05b {length}"), [Patch::Length(length)], REFUSED)]);
    }
    judge([row("H05c", [Patch::Length(L1)], REFUSED).says(&[SAYS_L1, "0x30000"])]);
}

#[test]
fn a_virtual_size_must_be_mapped_by_the_l1_table() {
    for size in [1 << 62, 1 << 63, u64::MAX] {
        let text = size.to_string();
        judge([row(format!("H06 {text}"), [be64(24, size)], REFUSED).says(&["size", &text])]);
    }
    let petabyte = [be64(24, 1 << 50), be32(36, 1 << 21)];
    judge([
        row("H06b", petabyte, REFUSED).says(&[SAYS_L1, "end of the file"]),
        row("H06a 0", [be64(24, 0)], WORKS),
        row("H06a 1", [be64(24, 1)], WORKS),
        row("H06c", [be64(24, 0x400_0001)], WORKS),
    ]);
}

#[test]
fn an_l1_table_must_fit_its_limits_and_the_file() {
    refused32("H07", 36, &[0], "L1 table size");
    refused32("H08", 36, &[u32::MAX, 0x40_0001], "L1 table size");
    judge([row("H08b", [be32(36, 0x40_0000)], REFUSED).says(&[SAYS_L1, "end of the file"])]);
    for offset in [0x30200, 0x1234_5678_90ab_cdef] {
        let hex = format!("{offset:#x}");
        let patches = [be64(40, offset)];
        judge([row("H09", patches, REFUSED).says(&["L1 table offset", &hex, "65536"])]);
    }
    judge([
        row("H11", [be64(40, 0x10_0000_0000)], REFUSED).says(&["L1 table offset", "0x1000000000"]),
        row("H11b", [be64(40, 0)], REFUSED).says(&["L1 table offset"]),
    ]);
}

/// The table is really there, 32 MiB of it. Its clusters have no refcounts, so the image can only
/// be read.
#[test]
fn the_largest_l1_table_opens() {
    let at = 0x10_0000;
    let table = [be32(36, 0x40_0000), be64(40, at), be64(at, 0x8000_0000_0004_0000)];
    let grown = [Patch::Length(at + (32 << 20))];
    judge([row("H08b real", [grown.as_slice(), &table].concat(), READ_ONLY).says(&["refcount"])]);
}

/// Which of the two is right nobody can tell: it may be read, and what is read is refused.
#[test]
fn tables_on_top_of_each_other_forbid_writing() {
    let unreadable = Expected { read_only: Some([Fate::Fails, Fate::Fails]), ..REFUSED };
    judge([
        row("H11c", [be64(40, REFCOUNT_TABLE)], unreadable).says(&["overlaps"]),
        row("H14e", [be64(48, L1)], READ_ONLY).says(&["refcount table", "overlaps"]),
    ]);
}

#[test]
fn a_refcount_table_must_fit_its_limits_and_the_file() {
    refused32("H12", 56, &[0], "refcount table size");
    refused32("H13", 56, &[0x2_0001, u32::MAX], "refcount table size");
    let unaligned = REFCOUNT_TABLE + 512;
    judge([
        row("H13c", [be32(56, 0x80)], READ_ONLY).says(&["refcount table"]),
        row("H14", [be64(48, unaligned)], REFUSED).says(&["refcount table offset", "0x10200"]),
        row("H14 max", [be64(48, 0xffff_ffff_ffff_0000)], REFUSED).says(&["refcount table offset"]),
        row("H14d", [be64(48, 0x10_0000_0000)], READ_ONLY).says(&["end of the file"]),
    ]);
}

#[test]
fn a_snapshot_table_must_fit_its_limits_and_the_file() {
    refused32("H15", 60, &[u32::MAX], "snapshot count");
    let far = [be32(60, 0xffff), be64(64, 0xffff_ffff_ffff_0000)];
    let beyond = [be32(60, 65536), be64(64, 0x100_0000)];
    judge([
        row("H15b", far, REFUSED).says(&["snapshot table offset", "0xffffffffffff0000"]),
        // Refused although there are no snapshots, as by the peer.
        row("H15c", [be64(64, 0x30200)], REFUSED).says(&["snapshot table offset", "0x30200"]),
        row("H15d", beyond, REFUSED).says(&["snapshot table offset", "end of the file"]),
    ]);
}

#[test]
fn a_refcount_width_must_be_possible_and_count_the_metadata() {
    refused32("H16", 96, &[7, 31, 32, 255, u32::MAX], "refcount_order");
    judge([row("H16-0", [be32(96, 0)], READ_ONLY).says(&["refcount 0"])]);
}

#[test]
fn encryption_needs_a_key_and_a_known_method() {
    let key = row("H17 1", [be32(32, 1)], REFUSED);
    judge([key.says(&["encrypt.key-secret", "required"])]);
    for (method, word) in [(2, "LUKS"), (3, "3"), (u32::MAX, "4294967295")] {
        let says = ["encryption method", word];
        judge([row(format!("H17 {method}"), [be32(32, method)], REFUSED).says(&says)]);
    }
}

#[test]
fn incompatible_features_must_be_known() {
    judge([
        row("H18", [be64(72, 1 << 63)], REFUSED).says(&["63"]),
        row("H18 all", [be64(72, u64::MAX)], REFUSED).says(&["63", "5"]),
        row("H19", [be64(72, 2)], READ_ONLY).says(&["corrupt"]),
        // Entries of 8 bytes taken for entries of 16: nothing impossible in this one.
        row("H22", [be64(72, 16)], MISREAD),
        row("H23", [be64(72, 4)], REFUSED).says(&["data-file"]),
        row("H23b", [be64(88, 2)], REFUSED).says(&["autoclear"]),
    ]);
}

/// H23: the name is the image's to say, or the caller's, whose file is then the only one.
#[test]
fn a_data_file_without_a_name_is_the_callers_to_name() {
    let sandbox = image::Sandbox::new();
    let path = sandbox.at("image.qcow2");
    let data = sandbox.at("data.raw");
    sandbox.create(&path, &format!("data_file={}", image::text(&data)), "1M");
    image::qemu_io(&path, &["write -P 7 0 128k"]);
    let mut bytes = std::fs::read(&path).expect("it was just made");
    let nameless = |bytes: &mut Vec<u8>| *bytes = image::patched(bytes, &[image::extensions(&[])]);
    nameless(&mut bytes);
    let path = sandbox.put("image.qcow2", &bytes);
    let plain = "io -r -f qcow2 -c read_-P_7_0_64k FILE";
    let (status, said) = run("H23", &sandbox, Kind::Plain, plain, &path);
    let text = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(status == 1 && text.contains("data-file"), "H23: {text}");
    let options = format!(
        "driver=qcow2,file.filename={},data-file.driver=file,data-file.filename={}",
        image::text(&path),
        image::text(&data)
    );
    let line = format!("io --image-opts -c read_-P_7_0_64k -c write_-P_8_64k_4k {options}");
    let (status, said) = run("H23 explicit", &sandbox, Kind::Plain, &line, &path);
    let printed = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(status == 0 && !printed.contains("failed"), "H23 explicit: {printed}");
    let raw = std::fs::read(&data).expect("it is there");
    assert_eq!((raw[0], raw[0x10000], raw[0x11000]), (7, 8, 7), "H23 explicit");
    // A data file for an image that has none.
    let path = sandbox.put("image.qcow2", image::base());
    let (status, said) = run("no data file", &sandbox, Kind::Plain, &line, &path);
    let text = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(status == 1 && text.contains("data"), "{text}");
    assert!(std::fs::read(&path).expect("it is there") == image::base(), "changed");
    assert!(std::fs::read(&data).expect("it is there") == raw, "the other file has changed");
}

/// A writer repairs it first.
#[test]
fn a_dirty_image_is_read_and_repaired_by_who_writes() {
    judge([row("H20b", [be64(72, 1)], WORKS)]);
}

#[test]
fn the_compression_type_must_agree_with_its_feature_bit() {
    let kind = |number: u8| Patch::Bytes(104, vec![number]);
    judge([
        row("H21 no bit", [kind(1)], REFUSED).says(&["compression type"]),
        row("H21 no type", [be64(72, 8)], REFUSED).says(&["compression type"]),
        row("H21 unknown", [kind(2)], REFUSED).says(&["compression type", "2"]),
        row("H21 unknown, bit", [be64(72, 8), kind(2)], REFUSED).says(&["compression type", "2"]),
    ]);
}

/// Unknown autoclear bits are gone after the first write (H24), and unknown compatible ones stay
/// (H25).
#[test]
fn unknown_features_that_need_not_be_known_are_treated_by_their_kind() {
    judge([
        row("H24", [be64(88, 0xff00_0000_0000_0000)], WORKS),
        row("H25", [be64(80, u64::MAX)], WORKS),
    ]);
    let sandbox = image::Sandbox::new();
    let patches = [be64(80, u64::MAX), be64(88, 0xff00_0000_0000_0000)];
    let path = sandbox.put("image", &image::patched(image::base(), &patches));
    super::rows::bounded("H24", {
        let path = path.clone();
        move || {
            let layer = blockplex::Blockplex::new().expect("a layer");
            let options = blockplex::OpenOptions::image("qcow2", &path);
            let backend =
                blockplex::block_on(layer.open("disk", options)).expect("no loop").expect("opens");
            backend.blocking().write(0, &[1; 512]).expect("a write");
            blockplex::block_on(backend.close()).expect("no loop").expect("closes");
        }
    });
    let after = std::fs::read(&path).expect("it is there");
    assert_eq!(after[80..88], [0xff; 8], "H25: compatible features");
    assert_eq!(after[88..96], [0; 8], "H24: autoclear features");
}
