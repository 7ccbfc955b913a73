//! The rows of the malformed-image catalogue that a header decides, on the catalogue's base
//! image; headers of the peer; and the way back to bytes.

use super::*;
use crate::qcow2::extension::UnknownExtension;
use crate::qcow2::format_error::FormatErrorKind as Kind;
use crate::qcow2::testing::Scratch;
use proptest::prelude::*;

/// The catalogue's base image G as far as a header is concerned: default options, 64 MiB, one
/// cluster written.
struct Image {
    cluster: Vec<u8>,
    file_length: u64,
}

/// The end of the base image's extensions: 112 fixed bytes, feature names, end marker.
const BASE_END: usize = 112 + 8 + 384 + 8;
const UNKNOWN: u32 = 0x1234_5678;

impl Image {
    fn base() -> Self {
        let mut header = Header::new(Geometry::new(16, 4, false).unwrap(), Version::V3, 64 << 20);
        header.l1_size = 1;
        header.l1_table_offset = 0x30000;
        header.refcount_table_offset = 0x10000;
        header.refcount_table_clusters = 1;
        Image { cluster: header.to_bytes().unwrap(), file_length: 0x60000 }
    }

    fn put(mut self, at: usize, bytes: &[u8]) -> Self {
        self.cluster[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn u32(self, at: usize, value: u32) -> Self {
        self.put(at, &value.to_be_bytes())
    }

    fn u64(self, at: usize, value: u64) -> Self {
        self.put(at, &value.to_be_bytes())
    }

    /// Replaces all extensions.
    fn extensions(mut self, list: &[(u32, &[u8])]) -> Self {
        self.cluster[112..].fill(0);
        let mut at = 112;
        for (kind, data) in list {
            self = self.u32(at, *kind).u32(at + 4, data.len() as u32).put(at + 8, data);
            at = (at + 8 + data.len()).next_multiple_of(8);
        }
        self
    }

    fn cut(mut self, length: u64) -> Self {
        self.file_length = length;
        self.cluster.truncate(length as usize);
        self
    }

    fn parse(&self) -> Result<Header, FormatError> {
        Header::parse(&self.cluster, self.file_length)
    }
}

/// What must become of an image.
enum Fate {
    /// R: refused, with this in the text.
    Refused(&'static str),
    /// RW✗: the first read-only reason has this in the text.
    ReadOnly(&'static str),
    Fine,
}
use Fate::{Fine, ReadOnly, Refused};

fn judge(rows: Vec<(&str, Image, Fate)>) {
    for (row, image, fate) in rows {
        match (fate, image.parse()) {
            (Refused(text), Err(error)) => {
                assert!(error.to_string().contains(text), "{row}: {error}");
            }
            (Refused(_), Ok(header)) => panic!("{row}: {header:?}"),
            (_, Err(error)) => panic!("{row}: {error}"),
            (ReadOnly(text), Ok(header)) => {
                let reasons = &header.read_only_reasons;
                assert!(reasons.iter().any(|r| r.to_string().contains(text)), "{row}: {reasons:?}");
            }
            (Fine, Ok(header)) => assert_eq!(header.read_only_reasons, [], "{row}"),
        }
    }
}

fn g() -> Image {
    Image::base()
}

#[test]
fn identity_rows() {
    let mut rows = vec![
        ("G", g(), Fine),
        ("H01", g().put(3, &[0]), Refused("this is not a qcow2 image")),
        ("H04b", g().u32(100, 65537), Refused("exceeds the cluster size 65536")),
        ("H04b", g().u32(100, 0x7fff_ffff), Refused("header length 2147483647")),
        ("H04b", g().u32(100, u32::MAX), Refused("header length 4294967295")),
        ("H04c", g().u32(100, 105), Refused("is not a multiple of 8")),
        ("H04d", g().u32(100, 65536), Fine),
        ("H04 short", g().u32(100, 96), Refused("is less than 104")),
        ("H05b", g().cut(104), Refused("cut short")),
        ("H05b", g().cut(512), Refused("past the end of the file")),
        ("H05b", g().cut(65536), Refused("past the end of the file")),
        ("H05c", g().cut(0x30000), Refused("L1 table offset 0x30000")),
        ("H05 empty", g().cut(0), Refused("cut short")),
        ("H05 three bytes", g().cut(3), Refused("cut short")),
    ];
    for version in [0, 1, 4, u32::MAX] {
        rows.push(("H02", g().u32(4, version), Refused("qcow version")));
    }
    for bits in [0, 8, 22, 31, 63, 64, u32::MAX] {
        rows.push(("H03", g().u32(20, bits), Refused("cluster_bits")));
    }
    judge(rows);
    let kind = |image: Image| image.parse().unwrap_err().kind;
    assert_eq!(kind(g().put(3, &[0])), Kind::OtherFormat);
    assert_eq!(kind(g().cut(3)), Kind::OtherFormat);
    assert_eq!(kind(g().u32(4, 1)), Kind::Unsupported);
}

#[test]
fn size_and_l1_rows() {
    let petabyte = || g().u64(24, 1 << 50);
    let mut full = g().u32(36, 0x40_0000);
    full.file_length = 0x30000 + (32 << 20);
    judge(vec![
        ("H06", g().u64(24, 1 << 62), Refused("virtual size 4611686018427387904")),
        ("H06", g().u64(24, 1 << 63), Refused("virtual size")),
        ("H06", g().u64(24, u64::MAX), Refused("virtual size")),
        ("H06a", g().u64(24, 0), Fine),
        ("H06a", g().u64(24, 1), Fine),
        ("H06c", g().u64(24, 0x400_0001), Fine),
        ("H06b", petabyte().u32(36, 1 << 21), Refused("past the end of the file at 0x60000")),
        ("H06b short", petabyte(), Refused("is less than the 2097152 entries")),
        ("H07", g().u32(36, 0), Refused("L1 table size 0")),
        ("H08", g().u32(36, u32::MAX), Refused("exceeds 4194304 entries")),
        ("H08", g().u32(36, 0x40_0001), Refused("exceeds 4194304 entries")),
        ("H08b", g().u32(36, 0x40_0000), Refused("past the end")),
        ("H08b whole", full, Fine),
        ("H09", g().u64(40, 0x30200), Refused("is not a multiple of the cluster size 65536")),
        ("H09", g().u64(40, 0x1234_5678_90ab_cdef), Refused("L1 table offset")),
        ("H11", g().u64(40, 0x10_0000_0000), Refused("past the end")),
        ("H11 wrap", g().u64(40, 0xffff_ffff_ffff_0000), Refused("past the end")),
        ("H11b", g().u64(40, 0), Refused("is the header itself")),
        ("H11c", g().u64(40, 0x10000), ReadOnly("overlaps the L1 table at 0x10000")),
        ("size 0, no L1", g().u64(24, 0).u32(36, 0).u64(40, 0), Fine),
    ]);
    let error = g().u64(40, 0x30200).parse().unwrap_err();
    let text = "L1 table offset 0x30200 (header field at byte 40) is not a multiple of the cluster \
                size 65536";
    assert_eq!(error.to_string(), text);
}

#[test]
fn refcount_table_rows() {
    let mut rows = vec![
        ("H12", g().u32(56, 0), Refused("leaves the image without refcounts")),
        ("H13", g().u32(56, 0x20001), Refused("exceeds 128 clusters")),
        ("H13", g().u32(56, u32::MAX), Refused("exceeds 128 clusters")),
        ("H13c", g().u32(56, 0x80), ReadOnly("past the end of the file")),
        ("H14", g().u64(48, 0x10200), Refused("is not a multiple")),
        ("H14", g().u64(48, 0xffff_ffff_ffff_0000), Refused("is past 2^56")),
        ("H14d", g().u64(48, 0x10_0000_0000), ReadOnly("past the end of the file")),
        ("H14e", g().u64(48, 0x30000), ReadOnly("overlaps the L1 table")),
        ("H14 header", g().u64(48, 0), ReadOnly("overlaps the header")),
        ("H16-0", g().u32(96, 0), Fine),
    ];
    for order in [7, 31, 32, 255, u32::MAX] {
        rows.push(("H16", g().u32(96, order), Refused("refcount_order")));
    }
    judge(rows);
}

#[test]
fn a_check_may_open_an_image_without_refcounts() {
    let image = g().u32(56, 0);
    let header = Header::parse_for_check(&image.cluster, image.file_length).unwrap();
    assert!(header.read_only_reasons[0].to_string().contains("refcount table size 0"));
    let broken = g().u64(40, 0x30200);
    Header::parse_for_check(&broken.cluster, broken.file_length).unwrap_err();
}

#[test]
fn snapshot_table_rows() {
    let table = |count, offset| g().u32(60, count).u64(64, offset);
    judge(vec![
        ("H15", table(u32::MAX, 0), Refused("exceeds 65536")),
        ("H15b", table(0xffff, 0xffff_ffff_ffff_0000), Refused("past the end")),
        ("H15c", table(0, 0x200), Refused("is not a multiple")),
        ("H15d", table(65536, 0x100_0000), Refused("past the end")),
        ("one", table(1, 0x50000), Fine),
        ("one in the header", table(1, 0), ReadOnly("overlaps the header")),
        ("one in the L1 table", table(1, 0x30000), ReadOnly("overlaps the L1 table")),
    ]);
}

#[test]
fn encryption_rows() {
    let luks = |offset: u64, length: u64| {
        let data = [offset.to_be_bytes(), length.to_be_bytes()].concat();
        g().u32(32, 2).extensions(&[(0x0537_be77, &data)])
    };
    judge(vec![
        ("H17", g().u32(32, 2), Refused("needs a crypto header extension")),
        ("H17", g().u32(32, 3), Refused("encryption method 3")),
        ("H17", g().u32(32, u32::MAX), Refused("encryption method 4294967295")),
        ("E08", luks(0x50000, 16).u32(32, 0), Refused("does not go with")),
        ("K03", luks(0x50000, 0), Refused("crypto header offset")),
        ("K04", luks(0x50200, 16), Refused("crypto header offset")),
        ("K05", luks(0x50000, 0x10001), Refused("crypto header offset")),
        ("K05", luks(0x50000, u64::MAX), Refused("crypto header offset")),
        ("K length", g().extensions(&[(0x0537_be77, &[0; 15])]), Refused("is not 16")),
    ]);
    assert_eq!(g().u32(32, 1).parse().unwrap().crypt_method, 1, "H17 AES");
    judge(vec![
        ("LUKS", luks(0x50000, 0x10000), Fine),
        ("LUKS on L1", luks(0x30000, 16), ReadOnly("overlaps the L1 table")),
    ]);
}

#[test]
fn feature_rows() {
    judge(vec![
        ("H18", g().u64(72, 1 << 63), Refused("unknown bits: 63")),
        ("H18 all", g().u64(72, u64::MAX), Refused("5, 6, 7, 8, 9, 10,")),
        ("H19", g().u64(72, 2), ReadOnly("mark the image as corrupt")),
        ("H20b", g().u64(72, 1), Fine),
        ("H21", g().put(104, &[1]), Refused("bit 3 is clear")),
        ("H21", g().u64(72, 8), Refused("bit 3 is set")),
        ("H21", g().put(104, &[2]), Refused("compression type 2")),
        ("H21", g().u64(72, 8).put(104, &[2]), Refused("compression type 2")),
        ("zstd", g().u64(72, 8).put(104, &[1]), Fine),
        // Whoever opens it must know the file.
        ("H23", g().u64(72, 4), Fine),
        ("H23b", g().u64(88, 2), Refused("there is no external data file")),
        ("H24", g().u64(88, 0xff << 56), Fine),
        ("H25", g().u64(80, u64::MAX), Fine),
    ]);
    assert!(g().u64(72, 1).parse().unwrap().is_dirty(), "H20b");
    let corrupt = g().u64(72, 2).parse().unwrap();
    assert_eq!(corrupt.read_only_reasons[0].kind, Kind::MarkedCorrupt, "H19");
    g().u64(72, 16).parse().unwrap();
    let named = g().extensions(&[(0x4441_5441, b"data.raw")]).u64(72, 4).parse().unwrap();
    assert!(named.has_data_file() && named.geometry().external_data(), "B10");
}

#[test]
fn extension_rows() {
    let fill = |length: u32| g().u32(112, UNKNOWN).u32(116, length);
    let x16 = [b'x'; 16];
    let x1000 = [b'x'; 1000];
    let named = |name: &[u8]| g().extensions(&[(0x4441_5441, name)]);
    let format = 0xe279_2aca;
    judge(vec![
        ("E01", fill(0x7fff_ffff), Refused("exceeds the 65416 bytes")),
        ("E01", fill(u32::MAX), Refused("header extension length 4294967295")),
        ("E01", fill(65536 - 120 + 1), Refused("exceeds the 65416 bytes")),
        ("E01 at most", fill(65536 - 120), Fine),
        ("E03", g().extensions(&[(format, &x16)]), Refused("has 16 bytes, not 0 to 15")),
        ("E03", g().extensions(&[(format, &x1000)]), Refused("has 1000 bytes")),
        ("E03 NUL", g().extensions(&[(format, b"raw\0q")]), Refused("contains a NUL")),
        ("E07", g().extensions(&[(format, b"raw"), (format, b"qcow2")]), Refused("second time")),
        (
            "E07",
            g().extensions(&[(0x4441_5441, b"a"), (0x4441_5441, b"b")]),
            Refused("second time"),
        ),
        ("B10e", named(b""), Refused("has 0 bytes")),
        ("B10e", named(&[b'x'; 60_000]), Refused("has 60000 bytes")),
        ("B10f", named(b"data.raw"), Fine),
        ("B10g", named(b"a\0b"), Refused("contains a NUL")),
    ]);
    let ignored = named(b"data.raw").parse().unwrap();
    assert!(ignored.warnings[0].to_string().contains("is ignored"), "B10f");
    assert_eq!(ignored.extensions.data_file_name.as_deref(), Some(&b"data.raw"[..]), "B10f");
}

#[test]
fn names_of_unknown_features_are_escaped_and_cut() {
    let mut table = vec![0, 20];
    table.extend(b"%n%s\x1b[2J\n");
    table.resize(47, b'A'); // 45 bytes of name and no NUL.
    let image = || g().extensions(&[(0x6803_f857, &table)]).u64(72, 1 << 20);
    let text = image().parse().unwrap_err().to_string();
    let end = "A".repeat(36);
    assert!(text.ends_with(&format!(r#"20 "%n%s\x1b[2J\n{end}""#)), "E05: {text}");
    judge(vec![("E05 without the bit", image().u64(72, 0), Fine)]);
}

#[test]
fn bitmap_extension_rows() {
    let bitmaps = |count: u32, reserved: u32, size: u64, offset: u64| {
        let mut data = [count.to_be_bytes(), reserved.to_be_bytes()].concat();
        data.extend(size.to_be_bytes());
        data.extend(offset.to_be_bytes());
        data
    };
    let with = |data: &[u8]| g().extensions(&[(0x2385_2875, data)]).u64(88, 1);
    let good = bitmaps(1, 0, 32, 0x50000);
    let limit = 67_107_840;
    let twice = g().extensions(&[(0x2385_2875, &good), (0x2385_2875, &good)]).u64(88, 1);
    judge(vec![
        ("good", with(&good), Fine),
        ("E06", with(&good[..23]), Refused("bitmaps extension length 23")),
        ("E06d", with(&bitmaps(1, 1, 32, 0x50000)), Refused("reserved field 1")),
        ("E06e", with(&bitmaps(1, 0, 1 << 40, 0x50000)), Refused("is not in 24..=67107840")),
        ("E06f", with(&bitmaps(1, 0, 32, 0x50200)), Refused("positive multiple")),
        ("E06h", with(&bitmaps(1, 0, 32, 0)), Refused("positive multiple")),
        ("E06g", with(&bitmaps(1, 0, limit, 0x50000)), Refused("past the end")),
        ("E06 small", with(&bitmaps(2, 0, 47, 0x50000)), Refused("is not in 48..=")),
        ("E06 none", with(&bitmaps(0, 0, 32, 0x50000)), Refused("bitmap count 0")),
        ("E06 many", with(&bitmaps(65536, 0, 32, 0x50000)), Refused("bitmap count 65536")),
        ("E06i", with(&bitmaps(0, 1, 0, 1)).u64(88, 0), Fine),
        ("M12", twice, Refused("second time")),
        ("overlap", with(&bitmaps(1, 0, 32, 0x30000)), ReadOnly("overlaps the L1 table")),
    ]);
    let stale = with(&good).u64(88, 0).parse().unwrap();
    assert!(stale.warnings[0].to_string().contains("stale"), "E06i");
    assert_eq!(stale.consistent_bitmaps(), None, "E06i");
}

#[test]
fn too_many_extensions_are_refused_at_once() {
    let geometry = Geometry::new(21, 4, false).unwrap();
    let mut header = Header::new(geometry, Version::V3, 0);
    header.refcount_table_offset = 2 << 20;
    header.refcount_table_clusters = 1;
    let mut cluster = header.to_bytes().unwrap();
    for record in cluster[112..].chunks_exact_mut(8) {
        record.copy_from_slice(&[0x12, 0x34, 0x56, 0x78, 0, 0, 0, 0]);
    }
    let error = Header::parse(&cluster, 8 << 20).unwrap_err();
    assert!(error.to_string().contains("257"), "E10: {error}");
    cluster[112 + 256 * 8..].fill(0);
    let header = Header::parse(&cluster, 8 << 20).unwrap();
    assert_eq!(header.extensions.unknown.len(), 256, "E10");
}

#[test]
fn backing_name_rows() {
    let end = BASE_END as u64;
    let at =
        |offset: u64, length: u32| g().put(BASE_END, &[b'n'; 2000]).u64(8, offset).u32(16, length);
    judge(vec![
        ("B01", at(65537, 5), Refused("backing file name offset 0x10001")),
        ("B01", at(65530, 7), Refused("is not between the header fields")),
        ("B01", at(u64::MAX, 5), Refused("backing file name offset")),
        ("B01", at(end, 1024), Refused("exceeds 1023")),
        ("B01", at(end, u32::MAX), Refused("exceeds 1023")),
        ("B01 inside the fields", at(96, 5), Refused("is not between the header fields")),
        ("B03", at(end, 0), Refused("although the name has the offset 0x200")),
        ("B03", at(0, 5), Refused("although the name has no offset")),
        ("B07e", at(end, 20).put(BASE_END + 7, &[0]), Refused(r"nnnnnnn\x00nnnn")),
        ("B07l", at(end, 1023), Fine),
        ("B07l", at(end, 3).put(BASE_END, &[0xff, 0x1b, 0x0a]), Fine),
        ("last bytes", at(65530, 6).put(65530, b"a.img!"), Fine),
    ]);
    let header = at(end, 1023).parse().unwrap();
    assert_eq!(header.backing_name, Some(vec![b'n'; 1023]));
}

#[test]
fn a_read_that_stops_in_the_extensions_is_noticed() {
    let image = g();
    let error = Header::parse(&image.cluster[..300], image.file_length).unwrap_err();
    assert!(error.to_string().contains("were read"), "{error}");
    Header::parse(&image.cluster[..BASE_END], image.file_length).unwrap();
}

#[test]
fn headers_of_the_peer_parse_and_come_back_byte_for_byte() {
    let scratch = Scratch::new();
    let rows = [
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=8k",
        "cluster_size=2M,refcount_bits=64",
        "lazy_refcounts=on,compression_type=zstd",
        "backing_file=base.img,backing_fmt=qcow2",
        "compat=0.10,backing_file=base.img,backing_fmt=raw",
        "extended_l2=on",
        "data_file=data.raw,data_file_raw=on",
    ];
    std::fs::write(scratch.path(), []).unwrap();
    for options in rows {
        let external = format!("data_file={}", scratch.path());
        let image = scratch.create(&options.replace("data_file=data.raw", &external), "64M");
        let bytes = scratch.read(&image);
        let bits = Header::cluster_bits_of(&bytes[..PROBE_BYTES]).unwrap();
        let cluster = &bytes[..1 << bits];
        let header = Header::parse(cluster, bytes.len() as u64).unwrap();
        assert_eq!(header.read_only_reasons, [], "{options}");
        assert_eq!(header.warnings, [], "{options}");
        assert_eq!(header.size, 64 << 20, "{options}");
        assert!(header.to_bytes().unwrap() == cluster, "{options}");
    }
}

#[test]
fn snapshots_and_bitmaps_of_the_peer_are_found() {
    let scratch = Scratch::new();
    let image = scratch.create("", "64M");
    scratch.qemu_img(&["bitmap", "--add", &image, "b"]);
    scratch.qemu_img(&["snapshot", "-c", "s", &image]);
    let bytes = scratch.read(&image);
    let header = Header::parse(&bytes[..65536], bytes.len() as u64).unwrap();
    assert_eq!((header.snapshot_count, &header.read_only_reasons[..]), (1, &[][..]));
    assert_eq!(header.consistent_bitmaps().unwrap().count, 1);
    assert!(header.to_bytes().unwrap() == bytes[..65536]);
}

#[test]
fn what_is_not_understood_survives_a_rewrite() {
    let list: [(u32, &[u8]); 3] = [(UNKNOWN, b"seven b"), (9, b""), (UNKNOWN, b"again")];
    let mut image = g().extensions(&list).u64(80, u64::MAX).u64(88, 0xff << 56);
    // One more header field.
    image.cluster.splice(112..112, *b"newfield");
    image.cluster.truncate(65536);
    let mut header = image.u32(100, 120).parse().unwrap();
    assert_eq!(header.unknown_fields, b"newfield");
    header.backing_name = Some(b"base".to_vec());
    let bytes = header.to_bytes().unwrap();
    let again = Header::parse(&bytes, 0x60000).unwrap();
    let kept: Vec<_> =
        list.map(|(kind, data)| UnknownExtension { kind, data: data.to_vec() }).into();
    assert_eq!(again.extensions.unknown, kept);
    assert_eq!(again.unknown_fields, b"newfield");
    assert_eq!(again.compatible_features, u64::MAX, "H25");
    assert_eq!(again.autoclear_features, 0, "H24");
    assert_eq!(again.backing_name.as_deref(), Some(&b"base"[..]));
}

#[test]
fn a_full_header_has_no_room_for_a_backing_name() {
    let data = vec![1; 65536 - BASE_END - 8];
    let mut header = g().parse().unwrap();
    header.extensions.unknown = vec![UnknownExtension { kind: UNKNOWN, data }];
    header.to_bytes().unwrap();
    header.backing_name = Some(b"base".to_vec());
    let error = header.to_bytes().unwrap_err();
    assert_eq!(error.kind, Kind::NoSpace, "E02: {error}");
}

#[test]
fn version_2_has_no_place_for_the_features_of_version_3() {
    let mut header = g().parse().unwrap();
    header.version = Version::V2;
    header.to_bytes().unwrap();
    header.compatible_features = feature::LAZY_REFCOUNTS;
    assert_eq!(header.to_bytes().unwrap_err().kind, Kind::InvalidOption);
}

proptest! {
    #[test]
    fn damaged_headers_never_panic_and_what_parses_comes_back(
        hits in prop::collection::vec((0..600_usize, any::<u8>()), 0..6),
        words in prop::collection::vec((0..14_usize, any::<u64>(), 0..64_u32), 0..3),
        file_length in prop_oneof![Just(0x60000_u64), any::<u64>()],
        cut in prop_oneof![Just(65536_usize), 0..700_usize],
    ) {
        let mut image = g().extensions(&[(0xe279_2aca, b"raw"), (UNKNOWN, b"data")]);
        for (at, value) in hits {
            image = image.put(at, &[value]);
        }
        for (word, value, shift) in words {
            image = image.u64(word * 8, value >> shift);
        }
        let bytes = &image.cluster[..cut];
        let Ok(header) = Header::parse(bytes, file_length) else {
            return Ok(());
        };
        if let Ok(written) = header.to_bytes() {
            let mut again = Header::parse(&written, file_length).unwrap();
            let expected_autoclear = header.autoclear_features & feature::KNOWN_AUTOCLEAR;
            prop_assert_eq!(again.autoclear_features, expected_autoclear);
            again.autoclear_features = header.autoclear_features;
            // Texts quote the autoclear bits as they were read.
            again.warnings = header.warnings.clone();
            prop_assert_eq!(again, header);
        }
    }
}
