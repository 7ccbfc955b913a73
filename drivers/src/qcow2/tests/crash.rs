//! Crashes: after a random workload the file is cut at some moment, with some of what was not
//! flushed lost, and must be whole: no corruption, and every sector holds the last durable value
//! or one written after it (P4), never another sector's (Q25).

use crate::qcow2::testing::Scratch;
use crate::qcow2::testing::rig::{Rig, Setup};
use crate::qcow2::testing::volume::{Event, Volume};
use blockplex_graph::Request;
use blockplex_io::buffer::IoBuffer;

/// A small generator of numbers: the test prints its seed.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

pub(super) const SECTOR: u64 = 512;
pub(super) const SECTORS: u64 = 1024;

/// The contents of a sector: its number and the number of the write; all zeros for 0.
pub(super) fn sector_bytes(sector: u64, version: u64) -> Vec<u8> {
    if version == 0 {
        return vec![0; SECTOR as usize];
    }
    [sector, version].map(u64::to_le_bytes).concat().repeat(32)
}

/// The versions that each sector may hold after a crash at some point of the journal.
#[derive(Clone)]
pub(super) struct Legal(Vec<Vec<u64>>);

impl Legal {
    pub(super) fn new() -> Legal {
        Legal(vec![vec![0]; SECTORS as usize])
    }

    pub(super) fn written(&mut self, sectors: std::ops::Range<u64>, version: u64) {
        for sector in sectors {
            self.0[sector as usize].push(version);
        }
    }

    /// All that was written is durable now.
    fn flushed(&mut self) {
        for versions in &mut self.0 {
            versions.drain(..versions.len() - 1);
        }
    }

    /// Takes what the sectors are found to hold for what they hold, durably.
    pub(super) fn settle(&mut self, contents: &[u8]) {
        for (sector, versions) in self.0.iter_mut().enumerate() {
            let at = sector * SECTOR as usize;
            let held = &contents[at..at + SECTOR as usize];
            let is_held = |v: &u64| sector_bytes(sector as u64, *v) == held;
            let held = versions.iter().copied().find(is_held).unwrap();
            versions.push(held);
        }
        self.flushed();
    }

    pub(super) fn check(&self, contents: &[u8], what: &str) {
        for (sector, versions) in self.0.iter().enumerate() {
            let at = sector * SECTOR as usize;
            let found = &contents[at..at + SECTOR as usize];
            let legal = versions.iter().any(|v| sector_bytes(sector as u64, *v) == found);
            assert!(legal, "{what}: sector {sector} holds {:?}, not {versions:?}", &found[..16]);
        }
    }
}

/// What the test remembers of a moment: how long the journal was, and what was legal then.
struct Moment {
    journal: usize,
    legal: Legal,
}

/// Runs random requests; gives the journal and the moments between them. `legal` of a moment
/// covers crashes up to the next one.
fn workload(volume: &Volume, cluster_size: u64, random: &mut Random) -> Vec<Moment> {
    let mut rig = Rig::open(volume, Setup::default()).unwrap();
    volume.record();
    let mut legal = Legal::new();
    let mut moments = Vec::new();
    for version in 1..=120 {
        let start = random.below(SECTORS - 1);
        let longest = if random.below(4) == 0 { 300 } else { 8 };
        let length = 1 + random.below(longest.min(SECTORS - start));
        let kind = random.below(11);
        if kind == 10 {
            let cluster = (cluster_size / SECTOR).max(1);
            let start = start / cluster * cluster;
            write_compressed(
                volume,
                &mut rig,
                start..start + cluster,
                version,
                &mut legal,
                &mut moments,
            );
            continue;
        }
        match kind {
            0..=4 => legal.written(start..start + length, version),
            5..=7 => legal.written(start..start + length, 0),
            _ => {}
        }
        // Until the request has ended, old and new are both legal.
        moments.push(Moment { journal: volume.journal().len(), legal: legal.clone() });
        let (offset, bytes) = (start * SECTOR, length * SECTOR);
        match kind {
            0..=4 => {
                let sectors = start..start + length;
                let data: Vec<u8> =
                    sectors.flat_map(|sector| sector_bytes(sector, version)).collect();
                rig.write(offset, &data);
            }
            5 => {
                rig.request(Request::write_zeroes(offset, bytes)).unwrap();
            }
            6 => {
                rig.request(Request::write_zeroes(offset, bytes).may_unmap()).unwrap();
            }
            7 => {
                // Only whole clusters are zeros for sure; the rest may be anything legal.
                rig.request(Request::discard(offset, bytes)).unwrap();
            }
            _ => {
                rig.flush();
                // A discard leaves what is not a whole cluster: ask what is there now.
                let now = rig.read(0, (SECTORS * SECTOR) as usize);
                legal.check(&now, "without a crash");
                legal.settle(&now);
            }
        }
        moments.push(Moment { journal: volume.journal().len(), legal: legal.clone() });
    }
    moments
}

/// A compressed write; one to a place that is taken is refused, and nothing has happened.
fn write_compressed(
    volume: &Volume,
    rig: &mut Rig,
    sectors: std::ops::Range<u64>,
    version: u64,
    legal: &mut Legal,
    moments: &mut Vec<Moment>,
) {
    let before = legal.clone();
    legal.written(sectors.clone(), version);
    moments.push(Moment { journal: volume.journal().len(), legal: legal.clone() });
    let offset = sectors.start * SECTOR;
    let data: Vec<u8> = sectors.flat_map(|sector| sector_bytes(sector, version)).collect();
    let memory = IoBuffer::from_slice(&data);
    if rig.request(Request::write(offset, memory).compressed()).is_err() {
        *legal = before;
    }
    moments.push(Moment { journal: volume.journal().len(), legal: legal.clone() });
}

/// The file after a crash when `cut` operations had been done: all that was flushed, and some of
/// the rest.
pub(super) fn crashed(base: &[u8], journal: &[Event], random: &mut Random) -> Volume {
    let volume = Volume::new(base);
    let durable = journal.iter().rposition(|event| *event == Event::Flush).unwrap_or(0);
    for (at, event) in journal.iter().enumerate() {
        if at <= durable || random.below(2) == 0 {
            match event {
                // A torn write: some of its sectors.
                Event::Write(offset, bytes) if at > durable => {
                    for (index, sector) in bytes.chunks(SECTOR as usize).enumerate() {
                        if random.below(4) > 0 {
                            let offset = offset + index as u64 * SECTOR;
                            volume.apply(&Event::Write(offset, sector.to_vec()));
                        }
                    }
                }
                event => volume.apply(event),
            }
        }
    }
    volume
}

fn crash_test(options: &str, seed: u64) {
    let scratch = Scratch::new();
    let mut random = Random(seed);
    let volume = Volume::from_file(&scratch.create(options, "512k"));
    let base = volume.bytes();
    let cluster_size = 1_u64 << u32::from_be_bytes(base[20..24].try_into().unwrap());
    let moments = workload(&volume, cluster_size, &mut random);
    let journal = volume.journal();
    let path = scratch.path();
    let flushes: Vec<usize> =
        (0..journal.len()).filter(|at| journal[*at] == Event::Flush).collect();
    for round in 0..8 {
        // Mostly just before a flush, when most is at stake.
        let cut = match round % 4 {
            0 => random.below(journal.len() as u64 + 1) as usize,
            _ => flushes[random.below(flushes.len() as u64) as usize],
        };
        // The last moment before the cut says what was legal then.
        let Some(moment) = moments.iter().rfind(|moment| moment.journal <= cut) else { continue };
        let crashed = crashed(&base, &journal[..cut], &mut random);
        crashed.save(&path);
        let what = format!("{options}, seed {seed}, cut at {cut}");
        if crashed.bytes()[79] & 1 != 0 {
            // Refcounts are late; whoever opens the image for writing counts anew, the peer too.
            assert!(options.contains("lazy"), "{what}: marked dirty");
            scratch.qemu_img(&["check", "-q", "-r", "all", &path]);
        }
        scratch.check_allowing_leaks(&path);
        moment.legal.check(&scratch.contents(&path), &what);
        // And for us: it opens, reads the same, and can be written.
        let mut rig = Rig::writable(&crashed);
        moment.legal.check(&rig.read(0, (SECTORS * SECTOR) as usize), &what);
        rig.write(0, &vec![7; 100_000]);
        rig.close();
        crashed.save(&path);
        scratch.check_allowing_leaks(&path);
    }
}

#[test]
fn a_crash_at_any_moment_leaves_a_whole_image() {
    for seed in 1..=3 {
        crash_test("cluster_size=4k", seed);
        crash_test("cluster_size=512,refcount_bits=64", 100 + seed);
        crash_test("cluster_size=64k", 200 + seed);
        crash_test("cluster_size=16k,extended_l2=on", 300 + seed);
        crash_test("cluster_size=512,lazy_refcounts=on", 300 + seed);
        crash_test("cluster_size=4k,lazy_refcounts=on", 400 + seed);
    }
}
