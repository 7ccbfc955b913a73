//! Options of an open image that change while it works: late refcounts, caches and what leaves
//! them.

use crate::qcow2::testing::Scratch;
use crate::qcow2::testing::rig::{Rig, Setup};
use crate::qcow2::testing::volume::{Event, Volume};
use crate::qcow2::{Qcow2, Qcow2Options};
use blockplex_graph::{ErrorKind, Request};

fn with(change: impl FnOnce(&mut Qcow2Options)) -> Qcow2Options {
    let mut options = Qcow2Options::default();
    change(&mut options);
    options
}

fn lazy(wanted: bool) -> Qcow2Options {
    with(|options| options.lazy_refcounts = Some(wanted))
}

/// Whether the dirty bit is set in the file.
fn is_dirty(volume: &Volume) -> bool {
    volume.bytes()[79] & 1 != 0
}

/// Where the refcount blocks of a small image are.
fn writes_refcounts(volume: &Volume) -> bool {
    let bytes = volume.bytes();
    let table = u64::from_be_bytes(bytes[48..56].try_into().unwrap()) as usize;
    let block = u64::from_be_bytes(bytes[table..table + 8].try_into().unwrap());
    let journal = volume.journal();
    journal.iter().any(|event| matches!(event, Event::Write(at, _) if at >> 16 == block >> 16))
}

#[test]
fn late_refcounts_are_not_written_at_a_flush_and_the_image_is_marked_first() {
    let scratch = Scratch::new();
    let path = scratch.create("lazy_refcounts=on", "8M");
    let volume = Volume::from_file(&path);
    let mut rig = Rig::writable(&volume);
    volume.record();
    rig.write(4 << 20, &[1; 4096]);
    assert!(writes_refcounts(&volume), "Y4: the L2 table");
    volume.record();
    for step in 0..8_u64 {
        rig.write(step << 17, &[1; 4096]);
        rig.flush();
        assert!(is_dirty(&volume));
    }
    assert!(!writes_refcounts(&volume));
    // Y1: before anything that the file did not hold yet is written to a table.
    let is_mark = |event: &Event| matches!(event, Event::Write(72, _));
    let journal = volume.journal();
    let mark = journal.iter().position(is_mark).unwrap();
    assert_eq!(journal[mark + 1], Event::Flush);
    rig.close();
    assert!(!is_dirty(&volume) && writes_refcounts(&volume), "Y2");
    volume.save(&path);
    scratch.check_clean(&path);
}

#[test]
fn late_refcounts_are_an_option_of_the_open_image() {
    let scratch = Scratch::new();
    let path = scratch.create("", "8M");
    let volume = Volume::from_file(&path);
    let mut rig = Rig::open(&volume, Setup { options: lazy(true), ..Setup::default() }).unwrap();
    rig.write(0, &[1; 4096]);
    rig.flush();
    assert!(is_dirty(&volume));
    rig.reopen(lazy(false)).unwrap();
    assert!(!is_dirty(&volume), "switched off, it is clean");
    let now = scratch.path();
    volume.save(&now);
    scratch.check_clean(&now);
    rig.write(1 << 20, &[1; 4096]);
    rig.flush();
    assert!(!is_dirty(&volume));
    rig.reopen(lazy(true)).unwrap();
    rig.write(2 << 20, &[1; 4096]);
    rig.flush();
    assert!(is_dirty(&volume));
    rig.reopen(Qcow2Options::default()).unwrap();
    assert!(!is_dirty(&volume), "what the image says");
    rig.close();
    volume.save(&path);
    scratch.check_clean(&path);

    let old = Volume::from_file(&scratch.create("compat=0.10", "8M"));
    let refused = Rig::open(&old, Setup { options: lazy(true), ..Setup::default() });
    assert_eq!(refused.map(drop).unwrap_err().kind(), ErrorKind::InvalidArgument);
    let mut rig = Rig::writable(&old);
    assert_eq!(rig.reopen(lazy(true)).unwrap_err().kind(), ErrorKind::InvalidArgument);
    rig.close();
}

/// A process that dies leaves the mark; opening the image for writing counts anew, here and there.
#[test]
fn an_image_that_was_left_with_late_refcounts_is_repaired() {
    let scratch = Scratch::new();
    let path = scratch.create("lazy_refcounts=on,cluster_size=4k", "8M");
    let volume = Volume::from_file(&path);
    let mut rig = Rig::writable(&volume);
    rig.write(0, &vec![7; 1 << 20]);
    rig.request(Request::discard(0, 65536)).unwrap();
    rig.flush();
    let left = Volume::new(&volume.bytes());
    left.save(&path);
    rig.close();
    scratch.qemu_io(&path, "read -P 7 64k 960k");
    let mut rig = Rig::writable(&left);
    assert_eq!(rig.read(65536, 983_040), vec![7; 983_040]);
    rig.write(4 << 20, &vec![8; 1 << 20]);
    rig.close();
    assert!(!is_dirty(&left));
    left.save(&path);
    scratch.check_clean(&path);
}

/// The peer leaves an image dirty.
#[test]
fn a_failed_close_leaves_the_mark() {
    let scratch = Scratch::new();
    let path = scratch.create("lazy_refcounts=on", "8M");
    let volume = Volume::from_file(&path);
    let mut rig = Rig::writable(&volume);
    rig.write(0, &[1; 4096]);
    rig.flush();
    volume.set_gate(|event| match event {
        Event::Write(..) => Err(libc::EIO),
        _ => Ok(false),
    });
    rig.abandon();
    volume.remove_gate();
    assert!(is_dirty(&volume));
    volume.save(&path);
    scratch.qemu_img(&["check", "-q", "-r", "all", &path]);
    scratch.check_clean(&path);
}

#[test]
fn what_is_not_used_leaves_the_caches_and_what_is_dirty_stays() {
    let scratch = Scratch::new();
    let path = scratch.create("cluster_size=512", "4M");
    let volume = Volume::from_file(&path);
    let mut rig = Rig::writable(&volume);
    for at in 0..64_u64 {
        rig.write(at << 16, &[1; 512]);
    }
    rig.flush();
    rig.write(0, &[2; 512]);
    rig.request(Request::discard(1 << 16, 512)).unwrap();
    let pass = |rig: &mut Rig| {
        rig.manage(async |driver: &Qcow2, _io| {
            driver.cleaning.pass();
            (driver.slices.len(), driver.refcounts.blocks_in_memory())
        })
    };
    pass(&mut rig);
    let (slices, _) = pass(&mut rig);
    assert_eq!(slices, 1, "the one with the discarded cluster");
    // What was freed is counted after the first one.
    rig.flush();
    rig.flush();
    pass(&mut rig);
    assert_eq!(pass(&mut rig), (0, 0));
    assert_eq!(rig.read(2 << 16, 512), [1; 512]);
    assert_eq!(pass(&mut rig).0, 1, "used since");
    rig.close();
    volume.save(&path);
    scratch.check_clean(&path);
}

#[test]
fn cleaning_can_be_switched_on_and_off() {
    let scratch = Scratch::new();
    let volume = Volume::from_file(&scratch.create("", "4M"));
    let interval = |seconds| with(|options| options.cache_clean_interval = Some(seconds));
    let mut rig = Rig::open(&volume, Setup { options: interval(0), ..Setup::default() }).unwrap();
    for seconds in [1, 0, 3600, 1] {
        rig.reopen(interval(seconds)).unwrap();
        rig.write(0, &[1; 512]);
    }
    let too_long = rig.reopen(interval(1 << 32)).unwrap_err();
    assert_eq!(too_long.kind(), ErrorKind::InvalidArgument);
    rig.close();
}
