//! Rows of the malformed-image catalogue for single entries, and round trips.

use super::*;
use crate::qcow2::geometry::{MAX_CLUSTER_BITS, MIN_CLUSTER_BITS};
use proptest::prelude::*;

fn geometry(cluster_bits: u32) -> Geometry {
    Geometry::new(cluster_bits, 4, false).unwrap()
}

#[test]
fn bad_l1_entries_are_corruption() {
    let rows = [
        ("T02", 0x8000_0000_0004_2a00, EntryRule::Unaligned),
        ("T04 high", 0xff00_0000_0004_0000, EntryRule::Reserved(0x7f << 56)),
        ("T04 low", 0x8000_0000_0004_01fe, EntryRule::Reserved(0x1fe)),
        ("T04 zero flag", 0x8000_0000_0004_0001, EntryRule::Reserved(1)),
        ("T05", COPIED, EntryRule::CopiedNothing),
    ];
    for (row, raw, rule) in rows {
        let error = L1Entry::decode(raw, &geometry(16)).unwrap_err();
        assert_eq!(error.rule, rule, "{row}");
        assert!(error.is_corruption(), "{row}");
    }
}

#[test]
fn offsets_the_decoder_cannot_judge_are_left_to_the_driver() {
    let rows = [
        ("T01", 0x8000_0000_0003_0000, 0x30000, true),
        ("T03", 0x00ff_ffff_ffff_0000, 0x00ff_ffff_ffff_0000, false),
    ];
    for (row, raw, host, copied) in rows {
        let entry = L1Entry::decode(raw, &geometry(16)).unwrap();
        assert_eq!(entry, L1Entry::Table { host, copied }, "{row}");
    }
    let far = L2Entry::decode(0x80ff_ffff_ffff_0000, &geometry(16), Version::V3).unwrap();
    let host = 0x00ff_ffff_ffff_0000;
    assert_eq!(far, Cluster::Normal { host, copied: true }, "T08");
}

proptest! {
    #[test]
    fn the_short_way_to_decode_says_nothing_else(
        cluster_bits in MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS,
        external in any::<bool>(),
        extended in any::<bool>(),
        v3 in any::<bool>(),
        host in any::<u64>(),
        align in 0..24_u32,
        flags in 0..8_u64,
    ) {
        let extended = extended && cluster_bits >= 14;
        let geometry =
            Geometry::new(cluster_bits, 4, extended).unwrap().with_external_data(external);
        let version = if v3 { Version::V3 } else { Version::V2 };
        let flag = |bit: u64, set: u64| if flags & bit == 0 { 0 } else { set };
        let bits = flag(1, COPIED) | flag(2, COMPRESSED) | flag(4, ZERO);
        // Places, and all that is nearly one.
        let raw = ((host >> (flags * 8)) << align) | bits;
        let said = L2Entry::plain(raw, &geometry);
        match L2Entry::decode(raw, &geometry, version) {
            Ok(Cluster::Normal { host, copied }) if host != 0 && !extended => {
                prop_assert_eq!(said, Some((host, copied)));
            }
            _ => prop_assert_eq!(said, None),
        }
    }
}

#[test]
fn bad_l2_entries_are_corruption() {
    let v3 = Version::V3;
    let rows = [
        ("T07", COPIED, v3, EntryRule::CopiedNothing),
        ("T07 zero", COPIED | ZERO, v3, EntryRule::CopiedNothing),
        ("T09 high", 0x3f << 56 | 0x50000, v3, EntryRule::Reserved(0x3f << 56)),
        ("T09 low", COPIED | 0x501fe, v3, EntryRule::Reserved(0x1fe)),
        ("T10", COPIED | 0x50001, Version::V2, EntryRule::ZeroFlag),
        ("T15b", COPIED | COMPRESSED | 0x50000, v3, EntryRule::CompressedCopied),
        ("unaligned", COPIED | 0x50200, v3, EntryRule::Unaligned),
    ];
    for (row, raw, version, rule) in rows {
        let error = L2Entry::decode(raw, &geometry(16), version).unwrap_err();
        assert_eq!(error.rule, rule, "{row}");
        assert!(error.is_corruption(), "{row}");
    }
}

#[test]
fn bad_compressed_entries_only_lose_their_cluster() {
    let rows = [
        ("T15d", COMPRESSED, 16, EntryRule::CompressedInHeader),
        ("T15c", COMPRESSED | 1 << 56, 9, EntryRule::TooFar),
        ("T15c end", COMPRESSED | ((1 << 56) - 1) | 1 << 61, 9, EntryRule::TooFar),
    ];
    for (row, raw, bits, rule) in rows {
        let error = L2Entry::decode(raw, &geometry(bits), Version::V3).unwrap_err();
        assert_eq!(error.rule, rule, "{row}");
        assert!(!error.is_corruption(), "{row}");
    }
}

#[test]
fn compressed_length_reaches_to_the_end_of_the_last_sector() {
    let decode = |raw| L2Entry::decode(raw, &geometry(16), Version::V2).unwrap();
    let (host, length) = (0x50000, 512);
    assert_eq!(decode(COMPRESSED | 0x50000), Cluster::Compressed { host, length });
    let (host, length) = (0x501ff, 1 + 512);
    assert_eq!(decode(COMPRESSED | 1 << 54 | 0x501ff), Cluster::Compressed { host, length });
    let (host, length) = (0x50000, 256 * 512);
    let raw = COMPRESSED | 255 << 54 | 0x50000;
    assert_eq!(decode(raw), Cluster::Compressed { host, length }, "T15e");
}

#[test]
fn what_cannot_be_stored_is_refused() {
    let (v2, v3) = (Version::V2, Version::V3);
    let (copied, length) = (true, 1);
    let rows = [
        (Cluster::Normal { host: 0, copied }, v3, EntryRule::CopiedNothing),
        (Cluster::Normal { host: 512, copied }, v3, EntryRule::Unaligned),
        (Cluster::Normal { host: 1 << 56, copied }, v3, EntryRule::TooFar),
        (Cluster::Zero { host: None, copied: false }, v2, EntryRule::ZeroFlag),
        (Cluster::Zero { host: None, copied }, v3, EntryRule::CopiedNothing),
        (Cluster::Compressed { host: 1 << 54, length }, v3, EntryRule::TooFar),
        (Cluster::Compressed { host: 9, length }, v3, EntryRule::CompressedInHeader),
        (Cluster::Compressed { host: 1 << 20, length: 0 }, v3, EntryRule::CompressedLength),
        (Cluster::Compressed { host: 1 << 20, length: 131_073 }, v3, EntryRule::CompressedLength),
        (Cluster::Compressed { host: 1 << 20, length: u64::MAX }, v3, EntryRule::CompressedLength),
    ];
    for (cluster, version, rule) in rows {
        let error = L2Entry::encode(cluster, &geometry(16), version).unwrap_err();
        assert_eq!(error.rule, rule, "{cluster:?}");
    }
}

#[test]
fn zero_flag_of_an_extended_entry_is_reserved() {
    let geometry = Geometry::new(16, 4, true).unwrap();
    let error = L2Entry::decode(ZERO, &geometry, Version::V3).unwrap_err();
    assert_eq!(error.rule, EntryRule::ZeroFlag);
}

#[test]
fn refcount_table_entries_are_clean_offsets() {
    let rows = [
        ("T13 unaligned", 0x20200, EntryRule::Unaligned),
        ("T13", 0xffff_ffff_ffff_0000, EntryRule::TooFar),
        ("T13f", 0x201ff, EntryRule::Reserved(0x1ff)),
    ];
    for (row, raw, rule) in rows {
        let error = decode_refcount_table_entry(raw, &geometry(16)).unwrap_err();
        assert_eq!(error.rule, rule, "{row}");
        assert!(error.is_corruption(), "{row}");
    }
    assert_eq!(decode_refcount_table_entry(0, &geometry(16)), Ok(None));
    assert_eq!(decode_refcount_table_entry(0x20000, &geometry(16)), Ok(Some(0x20000)));
}

fn any_entry() -> impl Strategy<Value = u64> {
    // Mostly entries with few bits out of place, else nearly all would be refused.
    prop_oneof![
        any::<u64>(),
        any::<u64>().prop_map(|raw| raw & (COPIED | 0x00ff_ffff_ffe0_0001)),
        any::<u64>().prop_map(|raw| raw & !COPIED & !(0xff << 40) | COMPRESSED),
    ]
}

proptest! {
    #[test]
    fn whatever_decodes_encodes_to_the_same_bits(
        raw in any_entry(),
        bits in MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS,
        version in prop_oneof![Just(Version::V2), Just(Version::V3)],
    ) {
        let geometry = geometry(bits);
        if let Ok(cluster) = L2Entry::decode(raw, &geometry, version) {
            prop_assert_eq!(L2Entry::encode(cluster, &geometry, version), Ok(raw));
            if let Cluster::Compressed { length, .. } = cluster {
                prop_assert!((1..=2 * geometry.cluster_size()).contains(&length));
            }
        }
        if let Ok(entry) = L1Entry::decode(raw, &geometry) {
            prop_assert_eq!(entry.encode(&geometry), Ok(raw));
        }
    }
}
