//! New images, and images that grow.

use crate::qcow2::header::{CompressionType, Version};
use crate::qcow2::testing::Scratch;
use crate::qcow2::testing::rig::{Rig, Setup, with_file};
use crate::qcow2::testing::volume::{Event, Volume};
use crate::qcow2::{CreateOptions, create};
use blockplex_graph::{ErrorKind, Request};

#[test]
fn a_new_image_is_the_peers_and_ours() {
    let scratch = Scratch::new();
    let mut variants = vec![CreateOptions::new(1 << 40), CreateOptions::new(0)];
    variants.push(CreateOptions { version: Version::V2, ..CreateOptions::new(3 << 20) });
    variants.push(CreateOptions {
        cluster_size: 512,
        refcount_bits: 1,
        compression_type: CompressionType::Zstd,
        ..CreateOptions::new(1 << 30)
    });
    for options in variants {
        let volume = Volume::new(&[0xff; 300_000]);
        with_file(&volume, async |file| create(file, &options).await).unwrap();
        let path = scratch.path();
        volume.save(&path);
        scratch.check_clean(&path);
        let mut rig = Rig::writable(&volume);
        if options.size > 0 {
            rig.write(options.size - 1000, &[5; 1000]);
            assert_eq!(rig.read(options.size - 1001, 3), [0, 5, 5]);
        }
        rig.close();
        volume.save(&path);
        scratch.check_clean(&path);
    }
}

#[test]
fn options_that_cannot_be_leave_the_file_alone() {
    let volume = Volume::new(&[0xff; 1000]);
    let options = CreateOptions::new(1000);
    let error = with_file(&volume, async |file| create(file, &options).await).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert_eq!(volume.bytes(), [0xff; 1000]);
}

#[test]
fn a_disk_that_grows_grows_with_zeros() {
    let scratch = Scratch::new();
    for options in ["", "cluster_size=512", "compat=0.10"] {
        let path = scratch.create(options, "100k");
        let backing = Some(Volume::new(&[0x77; 300_000]));
        let volume = Volume::from_file(&path);
        let mut rig = Rig::open(&volume, Setup { backing, ..Setup::default() }).unwrap();
        rig.write(102_000, &[9; 400]);
        rig.request(Request::truncate(4 << 20)).unwrap();
        assert_eq!(rig.read(102_398, 4), [9, 9, 0, 0], "{options}");
        assert!(rig.read(102_400, (4 << 20) - 102_400).iter().all(|byte| *byte == 0));
        assert_eq!(rig.read(0, 4), [0x77; 4]);
        rig.write((4 << 20) - 5, &[1; 5]);
        let odd = rig.request(Request::truncate((4 << 20) + 100)).unwrap_err();
        assert_eq!(odd.kind(), ErrorKind::InvalidArgument);
        rig.close();
        volume.save(&path);
        scratch.check_clean(&path);
        assert!(scratch.qemu_img(&["info", &path]).contains("4 MiB"));
    }
}

/// Q14.
#[test]
fn entries_made_while_the_table_moves_are_not_lost() {
    let scratch = Scratch::new();
    // An L1 entry maps 32 KiB: the table moves again and again.
    let path = scratch.create("cluster_size=512", "64k");
    let volume = Volume::from_file(&path);
    let mut rig = Rig::writable(&volume);
    for step in 1..40_u64 {
        let size = (step + 1) << 17;
        rig.run(async |queue| {
            let bytes = blockplex_io::buffer::IoBuffer::from_slice(&[step as u8; 700]);
            let write = queue.request(Request::write((step - 1) << 15, bytes));
            let grow = queue.request(Request::truncate(size));
            grow.await.result.unwrap();
            write.await.result.unwrap();
        });
    }
    for step in 1..40_u64 {
        assert_eq!(rig.read((step - 1) << 15, 700), [step as u8; 700]);
    }
    rig.close();
    volume.save(&path);
    scratch.check_clean(&path);
    let contents = scratch.contents(&path);
    for step in 1..40_usize {
        let at = (step - 1) << 15;
        assert_eq!(contents[at..at + 700], [step as u8; 700]);
    }
}

/// As on a block device: nothing can be taken for zero, and nothing is made longer.
#[test]
fn a_file_of_fixed_length_holds_an_image_among_old_bytes() {
    let scratch = Scratch::new();
    let volume = Volume::new(&[0xff; 8 << 20]);
    volume.set_gate(|event| match event {
        Event::Truncate(_) => Err(libc::ENOTSUP),
        _ => Ok(false),
    });
    let options = CreateOptions::new(4 << 20);
    with_file(&volume, async |file| create(file, &options).await).unwrap();
    let mut rig = Rig::writable(&volume);
    let mut model = vec![0; 4 << 20];
    for step in 0..30_usize {
        let at = step * 130_000;
        rig.write(at as u64, &[step as u8 + 1; 3000]);
        model[at..at + 3000].fill(step as u8 + 1);
    }
    assert!(rig.read(0, 4 << 20) == model);
    rig.close();
    assert_eq!(volume.length(), 8 << 20);
    let path = scratch.path();
    volume.save(&path);
    scratch.check_clean(&path);
    assert!(scratch.contents(&path) == model);
}

/// E3: a device ends where it ends; a write that finds no room there fails, and nothing else does.
#[test]
fn a_full_device_of_fixed_length_fails_the_write_and_nothing_else() {
    const LENGTH: u64 = 1 << 20;
    let scratch = Scratch::new();
    let volume = Volume::new(&[0xff; LENGTH as usize]);
    volume.set_gate(|event| match event {
        Event::Truncate(_) => Err(libc::ENOTSUP),
        Event::Write(at, bytes) if at + bytes.len() as u64 > LENGTH => Err(libc::ENOSPC),
        _ => Ok(false),
    });
    let options = CreateOptions::new(4 << 20);
    with_file(&volume, async |file| create(file, &options).await).unwrap();
    let mut rig = Rig::writable(&volume);
    let mut written = 0;
    let error = loop {
        match rig.try_write(written << 16, &[written as u8 + 1; 65536]) {
            Ok(()) => written += 1,
            Err(error) => break error,
        }
        assert!(written < 16, "more than there is room for");
    };
    assert_eq!(error.errno(), libc::ENOSPC, "{error}");
    rig.flush();
    for cluster in 0..written {
        assert_eq!(rig.read(cluster << 16, 65536), [cluster as u8 + 1; 65536]);
    }
    rig.request(Request::discard(0, 65536)).unwrap();
    rig.flush();
    rig.write(written << 16, &[99; 65536]);
    rig.close();
    let path = scratch.path();
    volume.save(&path);
    scratch.check_clean(&path);
}
