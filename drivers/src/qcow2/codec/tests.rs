//! Round trips, the peer's streams, and streams made to hurt.

use super::*;
use crate::qcow2::entry::{Cluster, L1Entry, L2Entry};
use crate::qcow2::header::Header;
use crate::qcow2::testing::Scratch;
use proptest::prelude::*;

const KINDS: [CompressionType; 2] = [CompressionType::Deflate, CompressionType::Zstd];

fn decompress(kind: CompressionType, bytes: &[u8], bits: u32) -> Result<Vec<u8>, CodecError> {
    let mut cluster = vec![0; 1 << bits];
    Decompressor::new(kind, bits)?.decompress(bytes, &mut cluster)?;
    Ok(cluster)
}

fn compress(kind: CompressionType, cluster: &[u8]) -> Result<Option<Vec<u8>>, CodecError> {
    let mut compressor = Compressor::new(kind)?;
    let first = compressor.compress(cluster);
    assert_eq!(
        first,
        compressor.compress(cluster),
        "a compressor that was used compresses the same"
    );
    Ok(first)
}

/// Bytes that compress well, but not to nothing.
fn text(length: usize) -> Vec<u8> {
    let lines = (0_u64..).flat_map(|i| format!("line {}\n", i * i % 977).into_bytes());
    lines.take(length).collect()
}

#[test]
fn a_cluster_survives_the_round_trip() {
    for kind in KINDS {
        for bits in [9, 12, 16, 21] {
            let cluster = text(1 << bits);
            let compressed = compress(kind, &cluster).unwrap().unwrap();
            assert!(compressed.len() < cluster.len());
            assert_eq!(decompress(kind, &compressed, bits).unwrap(), cluster, "{kind:?} {bits}");
        }
    }
}

#[test]
fn a_decompressor_can_be_used_again_after_an_error() {
    for kind in KINDS {
        let cluster = text(4096);
        let compressed = compress(kind, &cluster).unwrap().unwrap();
        let mut decompressor = Decompressor::new(kind, 12).unwrap();
        let mut output = vec![0; 4096];
        for _ in 0..3 {
            let cut = &compressed[..compressed.len() / 2];
            decompressor.decompress(cut, &mut output).unwrap_err();
            decompressor.decompress(&compressed, &mut output).unwrap();
            assert_eq!(output, cluster, "{kind:?}");
        }
    }
}

#[test]
fn what_does_not_shrink_is_not_compressed() {
    let mut state = 1_u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    })
    .take(65536)
    .collect();
    for kind in KINDS {
        assert_eq!(compress(kind, &noise).unwrap(), None, "{kind:?}");
    }
}

#[test]
fn padding_of_the_last_sector_is_ignored_and_more_is_not() {
    for kind in KINDS {
        let cluster = text(65536);
        let mut compressed = compress(kind, &cluster).unwrap().unwrap();
        compressed.resize(compressed.len() + 511, 0xa5);
        assert_eq!(decompress(kind, &compressed, 16).unwrap(), cluster, "{kind:?}");
        compressed.push(0xa5);
        assert_eq!(decompress(kind, &compressed, 16), Err(CodecError::Trailing), "T15h {kind:?}");
    }
}

#[test]
fn garbage_short_and_empty_streams_are_errors() {
    for kind in KINDS {
        let garbage = vec![0x11; 65536];
        decompress(kind, &garbage, 16).expect_err("T15");
        decompress(kind, &[], 16).expect_err("empty");
        let half = compress(kind, &text(32768)).unwrap().unwrap();
        assert_eq!(decompress(kind, &half, 16), Err(CodecError::Short), "{kind:?}");
    }
}

#[test]
fn a_bomb_fills_one_cluster_at_most() {
    let zeros = vec![0; 8 << 20];
    let deflated = compress(CompressionType::Deflate, &zeros).unwrap().unwrap();
    let result = decompress(CompressionType::Deflate, &deflated, 16);
    assert_eq!(result, Err(CodecError::Trailing), "T15f");
    let frame = compress(CompressionType::Zstd, &zeros).unwrap().unwrap();
    decompress(CompressionType::Zstd, &frame, 16).expect_err("T15f");
    let twice = compress(CompressionType::Zstd, &text(8192)).unwrap().unwrap();
    decompress(CompressionType::Zstd, &twice, 12).expect_err("one cluster too many");
}

#[test]
fn deflate_stops_at_a_whole_cluster() {
    let longer = compress(CompressionType::Deflate, &vec![7; 65537]).unwrap().unwrap();
    assert_eq!(decompress(CompressionType::Deflate, &longer, 16).unwrap(), vec![7; 65536]);
}

#[test]
fn strange_zstd_frames_are_errors() {
    let kind = CompressionType::Zstd;
    // Magic, a frame header without content size, its window descriptor: exponent 21 over 1 KiB.
    let huge_window = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 21 << 3, 0x01, 0x00, 0x00];
    assert_eq!(decompress(kind, &huge_window, 16), Err(CodecError::Garbage), "T15h window");
    let good = compress(kind, &text(65536)).unwrap().unwrap();
    let mut skippable = vec![0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4];
    skippable.extend(&good);
    assert_eq!(decompress(kind, &skippable, 16), Err(CodecError::Garbage), "T15h skippable");
    let halves = compress(kind, &text(32768)).unwrap().unwrap().repeat(2);
    assert_eq!(decompress(kind, &halves, 16), Err(CodecError::Short), "T15h two frames");
}

#[test]
fn a_frame_without_content_size_decodes_when_its_window_is_small() {
    // One raw block of 512 bytes behind a window of 1 KiB.
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x00];
    frame.extend(&(512_u32 << 3 | 1).to_le_bytes()[..3]);
    frame.extend(text(512));
    assert_eq!(decompress(CompressionType::Zstd, &frame, 9).unwrap(), text(512));
}

/// Every compressed cluster of `image`, decoded, with its guest offset.
fn compressed_clusters(image: &[u8]) -> Vec<(u64, Vec<u8>)> {
    let header = Header::parse(image, image.len() as u64).unwrap();
    let geometry = header.geometry();
    let word = |at: u64| {
        let at = at as usize;
        u64::from_be_bytes(image[at..at + 8].try_into().unwrap())
    };
    let mut found = Vec::new();
    for l1_index in 0..u64::from(header.l1_size) {
        let raw = word(header.l1_table_offset + l1_index * 8);
        let L1Entry::Table { host: table, .. } = L1Entry::decode(raw, &geometry).unwrap() else {
            continue;
        };
        for l2_index in 0..geometry.l2_entries() {
            let raw = word(table + l2_index * 8);
            let cluster = L2Entry::decode(raw, &geometry, header.version).unwrap();
            if let Cluster::Compressed { host, length } = cluster {
                let end = (host + length).min(image.len() as u64);
                let bytes = &image[host as usize..end as usize];
                let bits = geometry.cluster_bits();
                let decoded = decompress(header.compression_type, bytes, bits).unwrap();
                found.push((geometry.guest_offset(l1_index, l2_index as u32).unwrap(), decoded));
            }
        }
    }
    found
}

#[test]
fn streams_of_the_peer_decode_to_what_it_compressed() {
    let scratch = Scratch::new();
    let raw = scratch.path();
    let content = text(4 << 20);
    std::fs::write(&raw, &content).unwrap();
    for kind in ["zlib", "zstd"] {
        for size in ["512", "4k", "64k", "2M"] {
            let image = scratch.path();
            let options = format!("compression_type={kind},cluster_size={size}");
            let arguments = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options];
            scratch.qemu_img(&[&arguments[..], &[raw.as_str(), image.as_str()]].concat());
            let clusters = compressed_clusters(&scratch.read(&image));
            assert!(!clusters.is_empty(), "{kind} {size}");
            for (offset, bytes) in clusters {
                let start = offset as usize;
                assert!(content[start..start + bytes.len()] == bytes, "{kind} {size} {offset}");
            }
        }
    }
}

proptest! {
    #[test]
    fn damaged_streams_never_panic(
        zstd: bool,
        hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let kind = KINDS[usize::from(zstd)];
        let mut bytes = compress(kind, &text(4096)).unwrap().unwrap();
        for (at, value) in hits {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        // Whatever comes out, it is a cluster or an error.
        if let Ok(cluster) = decompress(kind, &bytes, 12) {
            prop_assert_eq!(cluster.len(), 4096);
        }
    }
}
