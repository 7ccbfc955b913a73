//! The order of what reaches the file, read from its journal: between two writes of which one needs
//! the other stands a flush.

use crate::qcow2::testing::Scratch;
use crate::qcow2::testing::rig::Rig;
use crate::qcow2::testing::volume::{Event, Volume};

fn number(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap())
}

/// The writes of a journal that touch a range of the file, as indices.
pub(super) fn writes(journal: &[Event], start: u64, length: u64) -> Vec<usize> {
    let touches = |event: &Event| match event {
        Event::Write(at, bytes) => *at < start + length && start < at + bytes.len() as u64,
        Event::Zero(at, count) => *at < start + length && start < at + count,
        _ => false,
    };
    (0..journal.len()).filter(|at| touches(&journal[*at])).collect()
}

/// Demands a flush between what stands at `first` in the journal and what stands at `then`.
pub(super) fn flushed_between(journal: &[Event], first: usize, then: usize, what: &str) {
    assert!(first < then, "{what}: {first} comes after {then}");
    let flushed = journal[first..then].contains(&Event::Flush);
    assert!(flushed, "{what}: no flush between {first} and {then}: {journal:?}");
}

/// W1, W2: the data, its refcount and the L2 table come before the entries that name them.
#[test]
fn an_entry_is_written_after_a_flush_of_its_data_and_counts() {
    let scratch = Scratch::new();
    for options in ["", "cluster_size=4k", "extended_l2=on,cluster_size=16k"] {
        let volume = Volume::from_file(&scratch.create(options, "256M"));
        let mut rig = Rig::writable(&volume);
        volume.record();
        for step in 0..4_u64 {
            rig.write(step * (50 << 20), &[7; 5000]);
            rig.flush();
        }
        let (journal, bytes) = (volume.journal(), volume.bytes());
        let cluster = 1_u64 << u32::from_be_bytes(bytes[20..24].try_into().unwrap());
        let l1 = number(&bytes, 40);
        let counts = number(&bytes, number(&bytes, 48));
        for step in 0..4_u64 {
            let what = format!("{options}, step {step}");
            let host = rig.status(step * (50 << 20), 512).offset.unwrap();
            let per_table = cluster * cluster / if options.contains("extended") { 16 } else { 8 };
            let index = step * (50 << 20) / per_table;
            let table = number(&bytes, l1 + index * 8) & 0x00ff_ffff_ffff_fe00;
            let stride = if options.contains("extended") { 16 } else { 8 };
            let entry = table + step * (50 << 20) % per_table / cluster * stride;
            let data = writes(&journal, host, 512)[0];
            // The first write of a table makes it, whole.
            let entries = writes(&journal, entry, 8);
            let (made, written) = (entries[0], *entries.last().unwrap());
            let names = |at: &usize| match &journal[*at] {
                Event::Write(start, bytes) => {
                    number(bytes, entry - start) & 0x00ff_ffff_ffff_fe00 == host
                }
                _ => false,
            };
            let first = *entries.iter().find(|at| names(at)).unwrap();
            flushed_between(&journal, data, first, &format!("{what}: data"));
            let count = writes(&journal, counts + host / cluster * 2, 2);
            flushed_between(&journal, count[0], first, &format!("{what}: refcount"));
            let named = *writes(&journal, l1 + index * 8, 8)
                .iter()
                .find(|at| match &journal[**at] {
                    Event::Write(start, bytes) => {
                        number(bytes, l1 + index * 8 - start) & 0x00ff_ffff_ffff_fe00 == table
                    }
                    _ => false,
                })
                .unwrap();
            flushed_between(&journal, made, named, &format!("{what}: L2 table"));
            let count = writes(&journal, counts + table / cluster * 2, 2);
            flushed_between(&journal, count[0], named, &format!("{what}: count of the table"));
            flushed_between(&journal, written, journal.len(), &format!("{what}: the end"));
        }
        rig.close();
    }
}

/// W4: while the refcount table grows and moves.
#[test]
fn refcount_blocks_are_durable_before_the_table_and_the_table_before_the_header() {
    let scratch = Scratch::new();
    // A block counts 64 clusters, a cluster of the table names 64 blocks.
    let volume = Volume::from_file(&scratch.create("cluster_size=512,refcount_bits=64", "16M"));
    let mut rig = Rig::writable(&volume);
    volume.record();
    for step in 0..24_u64 {
        rig.write(step * (512 << 10), &vec![7; 400_000]);
        rig.flush();
    }
    let journal = volume.journal();
    let moves: Vec<usize> = writes(&journal, 48, 8);
    assert!(moves.len() > 2, "the table moved {} times", moves.len());
    let mut blocks = 0;
    for moved in moves {
        let Event::Write(48, place) = &journal[moved] else { panic!("{:?}", journal[moved]) };
        let table = number(place, 0);
        let written = *writes(&journal[..moved], table, 8).last().unwrap();
        flushed_between(&journal, written, moved, "table and header");
        let Event::Write(_, entries) = &journal[written] else { panic!("a table of zeros") };
        for entry in entries.as_chunks::<8>().0 {
            let block = u64::from_be_bytes(*entry);
            if block == 0 {
                continue;
            }
            // Those that were there when the journal began are not in it.
            if let Some(last) = writes(&journal[..written], block, 512).last() {
                flushed_between(&journal, *last, written, "block and table");
                blocks += 1;
            }
        }
    }
    assert!(blocks > 100, "{blocks} blocks");
    rig.close();
    let path = scratch.path();
    volume.save(&path);
    scratch.check_clean(&path);
}
