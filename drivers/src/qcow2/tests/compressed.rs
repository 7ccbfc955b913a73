//! Compressed writes: judged by the peer, packed as it packs, and safe against what goes on beside
//! them.

use super::concurrency::{hold, settle, write};
use crate::qcow2::Qcow2Options;
use crate::qcow2::testing::Scratch;
use crate::qcow2::testing::rig::{Rig, Setup};
use crate::qcow2::testing::volume::{Event, Volume};
use blockplex_graph::{ErrorKind, Request, Result};
use blockplex_io::buffer::{IoBuffer, IoVector};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

fn compressed(rig: &mut Rig, offset: u64, bytes: &[u8]) -> Result<()> {
    let memory = IoBuffer::from_slice(bytes);
    rig.request(Request::write(offset, memory).compressed()).map(drop)
}

/// Bytes that compress to about a quarter.
fn text(length: usize, seed: u64) -> Vec<u8> {
    let word = |i: u64| (i.wrapping_mul(seed * 2 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)) >> 52;
    let words = (0_u64..).flat_map(|i| format!("{:x} word ", word(i)).into_bytes());
    words.take(length).collect()
}

fn noise(length: usize) -> Vec<u8> {
    let mut state = 1_u64;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    })
    .take(length)
    .collect()
}

/// The end of the last cluster in use.
fn end_offset(scratch: &Scratch, image: &str) -> u64 {
    let text = scratch.qemu_img(&["check", "--output=json", image]);
    let at = text.find("\"image-end-offset\": ").unwrap() + 20;
    text[at..].chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
}

#[test]
fn the_peer_reads_what_was_written_compressed_and_its_images_are_no_smaller() {
    let scratch = Scratch::new();
    let rows = [
        ("", 3 << 20),
        ("compression_type=zstd", 3 << 20),
        ("cluster_size=4k", (1 << 20) + 512),
        ("cluster_size=2M,compression_type=zstd", 9 << 20),
        ("cluster_size=512", 65536),
        ("cluster_size=16k,extended_l2=on", 1 << 20),
        ("lazy_refcounts=on", 1 << 20),
        ("refcount_bits=1", 1 << 20),
        ("compat=0.10", 1 << 20),
    ];
    for (options, size) in rows {
        let mut contents = text(size, 7);
        // One cluster that does not shrink.
        let middle = (size / 2) & !0x7fff;
        let length = (size / 4).min(65536);
        contents[middle..middle + length].copy_from_slice(&noise(length));
        let raw = scratch.path();
        std::fs::write(&raw, &contents).unwrap();
        let theirs = scratch.path();
        let mut arguments = vec!["convert", "-c", "-W", "-m1", "-f", "raw", "-O", "qcow2"];
        if !options.is_empty() {
            arguments.extend(["-o", options]);
        }
        arguments.extend([raw.as_str(), theirs.as_str()]);
        scratch.qemu_img(&arguments);

        let path = scratch.create(options, &size.to_string());
        let volume = Volume::from_file(&path);
        let mut rig = Rig::writable(&volume);
        for (index, part) in contents.chunks(2 << 20).enumerate() {
            compressed(&mut rig, (index as u64) << 21, part).unwrap();
        }
        assert!(rig.read(0, size) == contents, "{options}");
        assert!(rig.status(0, 512).compressed, "{options}: {:?}", rig.status(0, 65536));
        rig.close();
        volume.save(&path);
        scratch.check_clean(&path);
        assert!(scratch.contents(&path) == contents, "{options}");
        let (ours, theirs) = (end_offset(&scratch, &path), end_offset(&scratch, &theirs));
        println!("{options}: {ours} bytes, the peer {theirs}");
        assert!(ours <= theirs + theirs / 20 + 65536, "{options}: {ours} bytes, the peer {theirs}");
    }
}

#[test]
fn what_cannot_be_stored_compressed_is_refused() {
    let scratch = Scratch::new();
    let volume = Volume::from_file(&scratch.create("", "300k"));
    let mut rig = Rig::writable(&volume);
    for (offset, length) in [(0, 4096), (512, 65536), (65536, 65536 + 512)] {
        let error = compressed(&mut rig, offset, &vec![1; length]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
    rig.write(0, &[1; 512]);
    compressed(&mut rig, 65536, &[2; 65536]).unwrap();
    for taken in [0, 65536] {
        let error = compressed(&mut rig, taken, &[3; 65536]).unwrap_err();
        assert_eq!(error.errno(), libc::EIO, "{error}");
    }
    rig.request(Request::write_zeroes(131_072, 65536)).unwrap();
    compressed(&mut rig, 131_072, &[3; 65536]).unwrap();
    // The last, short one.
    compressed(&mut rig, 262_144, &[4; 45056]).unwrap();
    let flags = Request::write_zeroes(0, 65536).compressed();
    assert_eq!(rig.request(flags).unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert_eq!((rig.read(0, 1)[0], rig.read(65536, 1)[0], rig.read(262_144, 1)[0]), (1, 2, 4));
    rig.close();
    let path = scratch.path();
    volume.save(&path);
    scratch.check_clean(&path);
}

#[test]
fn clusters_that_share_a_host_cluster_go_one_by_one() {
    let scratch = Scratch::new();
    let volume = Volume::from_file(&scratch.create("", "4M"));
    let mut rig = Rig::writable(&volume);
    let contents = text(1 << 20, 3);
    compressed(&mut rig, 0, &contents).unwrap();
    rig.flush();
    // Overwritten, discarded, zeroed; and more is packed in between.
    rig.write(65536, &[9; 4096]);
    rig.request(Request::discard(131_072, 131_072)).unwrap();
    rig.flush();
    compressed(&mut rig, 1 << 20, &contents[..131_072]).unwrap();
    rig.request(Request::write_zeroes(262_144, 262_144).may_unmap()).unwrap();
    rig.flush();
    compressed(&mut rig, 2 << 20, &contents).unwrap();
    rig.close();
    let path = scratch.path();
    volume.save(&path);
    scratch.check_clean(&path);
    let now = scratch.contents(&path);
    let mut expected = contents.clone();
    expected[65536..69632].fill(9);
    expected[131_072..524_288].fill(0);
    assert!(now[..1 << 20] == expected && now[2 << 20..3 << 20] == contents);
    assert!(now[1 << 20..][..131_072] == contents[..131_072]);
}

/// Many requests at once, over one image, with small caches.
#[test]
fn compressed_writes_beside_each_other_and_beside_others_lose_nothing() {
    let scratch = Scratch::new();
    for options in ["", "cluster_size=512", "cluster_size=4k,refcount_bits=2"] {
        let path = scratch.create(options, "1M");
        let volume = Volume::from_file(&path);
        let options = Qcow2Options { l2_cache_size: Some(1024), ..Qcow2Options::default() };
        let mut rig = Rig::open(&volume, Setup { options, ..Setup::default() }).unwrap();
        let contents = text(1 << 20, 5);
        rig.run(async |queue| {
            let requests = contents.chunks(65536).enumerate().map(|(index, part)| {
                let request = Request::write((index as u64) << 16, IoBuffer::from_slice(part));
                if index % 4 == 1 { request } else { request.compressed() }
            });
            let running: Vec<_> = requests.map(|request| queue.request(request)).collect();
            for request in running {
                request.await.result.unwrap();
            }
        });
        assert!(rig.read(0, 1 << 20) == contents);
        rig.close();
        volume.save(&path);
        scratch.check_clean(&path);
        assert!(scratch.contents(&path) == contents);
    }
}

/// Q04: while a compressed cluster is being read, it is overwritten, and others are packed where
/// it was or near it.
#[test]
fn a_compressed_cluster_that_is_being_read_stays_until_it_is_read() {
    let scratch = Scratch::new();
    let volume = Volume::from_file(&scratch.create("", "4M"));
    let mut rig = Rig::writable(&volume);
    let contents = text(65536, 11);
    compressed(&mut rig, 0, &contents).unwrap();
    rig.flush();
    let held = Arc::new(AtomicBool::new(true));
    let reads = Arc::new(AtomicU64::new(0));
    volume.set_gate({
        let (held, reads) = (held.clone(), reads.clone());
        move |event| {
            let is_data = matches!(event, Event::Read(_, length) if *length % 4096 != 0);
            reads.fetch_add(u64::from(is_data), Ordering::Relaxed);
            Ok(is_data && held.load(Ordering::Relaxed))
        }
    });
    rig.run(async |queue| {
        let memory = IoVector::zeroed(65536);
        let read = queue.request(Request::read(0, memory.clone()));
        let write = |at, byte, packed| {
            let request = Request::write(at, IoBuffer::from_slice(&[byte; 65536]));
            if packed { request.compressed() } else { request }
        };
        queue.request(write(0, 1, false)).await.result.unwrap();
        for step in 1..20_u64 {
            queue.request(Request::flush()).await.result.unwrap();
            queue.request(write(step << 16, step as u8, step % 2 == 0)).await.result.unwrap();
        }
        assert!(reads.load(Ordering::Relaxed) > 0, "the read has begun");
        held.store(false, Ordering::Relaxed);
        read.await.result.unwrap();
        assert!(memory.to_vec() == contents);
    });
    volume.remove_gate();
    assert_eq!(rig.read(0, 65536), [1; 65536]);
    rig.close();
    let path = scratch.path();
    volume.save(&path);
    scratch.check_clean(&path);
}

/// PK2, Q08: packing goes on neither in a cluster whose bytes are being discarded, nor in one that
/// is another's by now.
#[test]
fn nothing_is_packed_into_a_cluster_that_was_given_back() {
    let scratch = Scratch::new();
    for is_held in [true, false] {
        let volume = Volume::from_file(&scratch.create("", "4M"));
        let mut rig = Rig::writable(&volume);
        let contents = text(65536, 11);
        compressed(&mut rig, 0, &contents).unwrap();
        rig.flush();
        rig.request(Request::discard(0, 65536)).unwrap();
        let held = hold(&volume, move |event| is_held && matches!(event, Event::Zero(..)));
        rig.run(async |queue| {
            let flush = queue.request(Request::flush());
            settle().await;
            assert_eq!(queue.in_flight(), u64::from(is_held), "a hole is being made");
            if !is_held {
                queue.request(Request::flush()).await.result.unwrap();
                // It takes the place that is free now.
                queue.request(write(1 << 16, 65536, 7)).await.result.unwrap();
            }
            let packed = Request::write(2 << 16, IoBuffer::from_slice(&contents)).compressed();
            queue.request(packed).await.result.unwrap();
            held.store(false, Ordering::Relaxed);
            flush.await.result.unwrap();
        });
        assert!(rig.read(2 << 16, 65536) == contents);
        let byte = if is_held { 0 } else { 7 };
        assert_eq!(rig.read(1 << 16, 65536), [byte; 65536]);
        rig.close();
        let path = scratch.path();
        volume.save(&path);
        scratch.check_clean(&path);
    }
}

#[test]
fn a_failed_compressed_write_leaves_a_whole_image() {
    let scratch = Scratch::new();
    for options in ["", "cluster_size=512,refcount_bits=64"] {
        let start = Volume::from_file(&scratch.create(options, "1M")).bytes();
        let path = scratch.path();
        let contents = text(131_072, 1);
        for victim in 0..30 {
            let volume = Volume::new(&start);
            let mut rig = Rig::writable(&volume);
            let mut count = 0;
            volume.set_gate(move |event| {
                let is_change = !matches!(event, Event::Read(..));
                count += u32::from(is_change);
                if is_change && count == victim + 1 { Err(libc::ENOSPC) } else { Ok(false) }
            });
            let written = compressed(&mut rig, 0, &contents);
            let flushed = rig.request(Request::flush());
            volume.remove_gate();
            volume.save(&path);
            scratch.check_allowing_leaks(&path);
            if written.is_err() {
                // What was stored before the failure stays.
                rig.request(Request::discard(0, 131_072)).unwrap();
                compressed(&mut rig, 0, &contents).unwrap();
            }
            rig.close();
            volume.save(&path);
            scratch.check_clean(&path);
            assert!(scratch.contents(&path)[..131_072] == contents);
            if written.is_ok() && flushed.is_ok() {
                break;
            }
        }
    }
}
