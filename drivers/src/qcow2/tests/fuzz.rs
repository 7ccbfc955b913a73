//! Images with random damage: whatever they say, nothing panics, hangs or grows without bound, and
//! a read-only image is never written to.

use super::crash::Random;
use crate::qcow2::testing::Scratch;
use crate::qcow2::testing::rig::{Rig, Setup};
use crate::qcow2::testing::volume::Volume;
use blockplex_graph::Request;

/// Words that are likely to mean something somewhere.
const WORDS: [u64; 14] = [
    0,
    1,
    u64::MAX,
    1 << 63,
    1 << 62,
    1 << 63 | 1 << 62,
    0x00ff_ffff_ffff_fe00,
    0x8000_0000_0000_3000,
    0x8000_0000_0000_1000,
    0x8000_0000_0000_5001,
    0x8000_0000_0001_4000,
    0x0000_ffff_ffff_0000,
    1 << 40,
    1 << 62 | 0x4321,
];

fn damage(bytes: &mut [u8], random: &mut Random) {
    let cluster = 1 << bytes[23].min(21);
    for _ in 0..=random.below(4) {
        // Header, tables, and the first data.
        let metadata = (bytes.len() as u64).min(6 * cluster);
        match random.below(3) {
            0 => {
                let at = random.below(metadata) as usize;
                bytes[at] ^= 1 << random.below(8);
            }
            1 => {
                let word = WORDS[random.below(WORDS.len() as u64) as usize];
                let at = (random.below(metadata / 8) * 8) as usize;
                bytes[at..at + 8].copy_from_slice(&word.to_be_bytes());
            }
            _ => {
                // The beginning of a cluster is where tables have their entries.
                let word = WORDS[random.below(WORDS.len() as u64) as usize];
                let at =
                    (random.below(metadata / cluster) * cluster + random.below(16) * 8) as usize;
                bytes[at..at + 8].copy_from_slice(&word.to_be_bytes());
            }
        }
    }
}

/// Every kind of request; what they say does not matter.
fn use_it(rig: &mut Rig) {
    for offset in [0, 4096, 100_000, 500_000, 1_000_000] {
        let _ = rig.try_read(offset, 10_000);
        let _ = rig.try_write(offset + 77, &[3; 9000]);
        let _ = rig.request(Request::block_status(offset, 40_000));
    }
    let _ = rig.request(Request::write_zeroes(3000, 90_000).may_unmap());
    let _ = rig.request(Request::discard(200_000, 90_000));
    let _ = rig.request(Request::flush());
    let _ = rig.request(Request::truncate(3 << 20));
    let _ = rig.try_write(2 << 20, &[4; 5000]);
    let _ = rig.request(Request::flush());
    let _ = rig.try_read(0, 1 << 20);
}

#[test]
fn damaged_images_do_no_harm() {
    let scratch = Scratch::new();
    let path = scratch.create("cluster_size=4k", "1M");
    scratch.qemu_io(&path, "write -P 1 0 30k");
    scratch.qemu_io(&path, "write -P 2 500k 100k");
    let plain = scratch.read(&path);
    scratch.qemu_img(&["snapshot", "-c", "s", &path]);
    let packed = scratch.path();
    scratch.qemu_img(&["convert", "-c", "-O", "qcow2", "-o", "cluster_size=4k", &path, &packed]);
    let extended = scratch.create("cluster_size=16k,extended_l2=on", "1M");
    scratch.qemu_io(&extended, "write -P 1 3k 30k");
    scratch.qemu_io(&extended, "write -z 9k 4k");
    scratch.qemu_io(&extended, "write -P 2 500k 100k");
    let images = [plain, scratch.read(&path), scratch.read(&packed), scratch.read(&extended)];
    let mut random = Random(0x5eed);
    for round in 0..400 {
        let mut bytes = images[round % images.len()].clone();
        damage(&mut bytes, &mut random);
        let volume = Volume::new(&bytes);
        let read_only = Setup { read_only: true, ..Setup::default() };
        if let Ok(mut rig) = Rig::open(&volume, read_only) {
            use_it(&mut rig);
            rig.close();
            assert!(volume.bytes() == bytes, "round {round}: read-only was written to");
        }
        if let Ok(mut rig) = Rig::open(&volume, Setup::default()) {
            use_it(&mut rig);
            rig.abandon();
        }
    }
}
