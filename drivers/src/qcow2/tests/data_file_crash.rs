//! Crashes of an image with an external data file, which lose of each file what was not flushed there.

use super::crash::{Legal, Random, SECTOR, SECTORS};
use super::data_file::Pair;
use crate::qcow2::CreateOptions;
use crate::qcow2::testing::Scratch;
use crate::qcow2::testing::volume::{Event, Volume, now};
use blockplex_graph::Request;

/// Runs random requests; gives the times between them and what was legal from then on.
fn workload(pair: &Pair, random: &mut Random) -> Vec<(u64, Legal)> {
    let mut rig = pair.rig();
    let mut legal = Legal::new();
    let mut moments = Vec::new();
    for version in 1..=100 {
        let start = random.below(SECTORS - 1);
        let longest = if random.below(4) == 0 { 300 } else { 8 };
        let length = 1 + random.below(longest.min(SECTORS - start));
        let kind = random.below(10);
        match kind {
            0..=4 => legal.written(start..start + length, version),
            5..=7 => legal.written(start..start + length, 0),
            _ => {}
        }
        moments.push((now(), legal.clone()));
        let (offset, bytes) = (start * SECTOR, length * SECTOR);
        match kind {
            0..=4 => {
                let sectors = start..start + length;
                let data = sectors.flat_map(|sector| super::crash::sector_bytes(sector, version));
                rig.write(offset, &data.collect::<Vec<_>>());
            }
            5 => drop(rig.request(Request::write_zeroes(offset, bytes)).unwrap()),
            6 => drop(rig.request(Request::write_zeroes(offset, bytes).may_unmap()).unwrap()),
            7 => drop(rig.request(Request::discard(offset, bytes)).unwrap()),
            _ => {
                rig.flush();
                legal.settle(&rig.read(0, (SECTORS * SECTOR) as usize));
            }
        }
        moments.push((now(), legal.clone()));
    }
    rig.abandon();
    moments
}

/// A volume at time `cut`: what was flushed there by then, and some of the rest.
fn crashed(base: &[u8], volume: &Volume, cut: u64, random: &mut Random) -> Volume {
    let journal = volume.timed_journal();
    let events: Vec<Event> =
        journal.into_iter().take_while(|(time, _)| *time < cut).map(|(_, event)| event).collect();
    super::crash::crashed(base, &events, random)
}

fn crash_test(options: CreateOptions, seed: u64) {
    let scratch = Scratch::new();
    let mut random = Random(seed);
    let pair = Pair::new(&scratch, options.clone());
    let bases = (pair.file.bytes(), pair.data.bytes());
    pair.file.record();
    pair.data.record();
    let begin = now();
    let moments = workload(&pair, &mut random);
    for _ in 0..8 {
        let cut = begin + random.below(now() - begin);
        let Some((_, legal)) = moments.iter().rfind(|(time, _)| *time <= cut) else { continue };
        let crashed = Pair {
            file: crashed(&bases.0, &pair.file, cut, &mut random),
            data: crashed(&bases.1, &pair.data, cut, &mut random),
            paths: pair.paths.clone(),
        };
        let what = format!("seed {seed}, cut at {}", cut - begin);
        crashed.save();
        scratch.check_allowing_leaks(&crashed.paths.0);
        legal.check(&scratch.contents(&crashed.paths.0), &what);
        if options.data_file_raw {
            // X3: by itself, too.
            legal.check(&crashed.data.bytes(), &format!("{what}, the raw file"));
        }
        let mut rig = crashed.rig();
        legal.check(&rig.read(0, (SECTORS * SECTOR) as usize), &what);
        rig.write(0, &[7; 100_000]);
        rig.close();
        crashed.save();
        scratch.check_allowing_leaks(&crashed.paths.0);
    }
}

#[test]
fn a_crash_with_a_data_file_leaves_a_whole_image() {
    for seed in 1..=3 {
        for (raw, cluster_size, extended_l2) in
            [(false, 4096, false), (true, 4096, false), (false, 16384, true), (true, 65536, true)]
        {
            let options = CreateOptions {
                cluster_size,
                extended_l2,
                data_file_raw: raw,
                ..CreateOptions::new(SECTORS * SECTOR)
            };
            crash_test(options, seed * 100 + cluster_size);
        }
    }
}
