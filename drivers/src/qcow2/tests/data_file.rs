//! External data files, in both directions with the peer.

use super::basics::pattern;
use super::concurrency::{hold, settle, write};
use super::crash::Random;
use crate::crypto::Secret;
use crate::crypto::luks::LuksCreateOptions;
use crate::qcow2::header::Version;
use crate::qcow2::testing::Scratch;
use crate::qcow2::testing::rig::{Rig, Setup, with_files};
use crate::qcow2::testing::volume::{Event, Volume};
use crate::qcow2::{
    CreateEncryption, CreateOptions, EncryptionOptions, Qcow2Options, create_with_data_file,
};
use blockplex_graph::{ErrorKind, Preallocation, Request};
use blockplex_io::buffer::IoBuffer;

/// An image with its data file, and where the peer finds both.
pub(super) struct Pair {
    pub(super) file: Volume,
    pub(super) data: Volume,
    pub(super) paths: (String, String),
}

impl Pair {
    fn from_peer(scratch: &Scratch, options: &str, size: &str) -> Pair {
        let data = scratch.path();
        let path = scratch.create(&format!("data_file={data}{options}"), size);
        Pair::read((path, data))
    }

    fn read(paths: (String, String)) -> Pair {
        let (file, data) = (Volume::from_file(&paths.0), Volume::from_file(&paths.1));
        Pair { file, data, paths }
    }

    pub(super) fn new(scratch: &Scratch, options: CreateOptions) -> Pair {
        let paths = (scratch.path(), scratch.path());
        let options = CreateOptions { data_file: Some(paths.1.clone().into()), ..options };
        let (file, data) = (Volume::default(), Volume::default());
        with_files([&file, &data], async |[file, data]| {
            create_with_data_file(&file, &data, &options).await
        })
        .unwrap();
        Pair { file, data, paths }
    }

    pub(super) fn rig(&self) -> Rig {
        Rig::open(&self.file, Setup { data: Some(self.data.clone()), ..Setup::default() }).unwrap()
    }

    pub(super) fn save(&self) {
        self.file.save(&self.paths.0);
        self.data.save(&self.paths.1);
    }

    fn judge(&self, scratch: &Scratch, model: &[u8], raw: bool) {
        self.save();
        scratch.check_clean(&self.paths.0);
        assert!(scratch.contents(&self.paths.0) == model);
        if raw {
            assert!(self.data.bytes() == model, "the data file is not the disk");
        }
    }
}

#[test]
fn what_the_peer_wrote_to_a_data_file_is_read() {
    let scratch = Scratch::new();
    for options in ["", ",data_file_raw=on", ",cluster_size=4k"] {
        let pair = Pair::from_peer(&scratch, options, "3M");
        scratch.qemu_io(&pair.paths.0, "write -P 0x11 0 100k");
        scratch.qemu_io(&pair.paths.0, "write -P 0x22 1M 1M");
        scratch.qemu_io(&pair.paths.0, "write -z 64k 64k");
        let pair = Pair::read(pair.paths);
        let mut rig = pair.rig();
        assert!(rig.read(0, 3 << 20) == scratch.contents(&pair.paths.0), "{options}");
        let status = rig.status(1 << 20, 1 << 20);
        assert_eq!((status.offset, status.data), (Some(1 << 20), true));
        rig.close();
    }
}

#[test]
fn any_workload_leaves_what_the_peer_reads() {
    let scratch = Scratch::new();
    for (seed, raw, cluster_size) in
        [(1, false, 65536), (2, true, 65536), (3, false, 512), (4, true, 4096)]
    {
        let size = 3 * 512 * 1000;
        let options =
            CreateOptions { cluster_size, data_file_raw: raw, ..CreateOptions::new(size) };
        let pair = Pair::new(&scratch, options);
        let mut rig = pair.rig();
        let mut model = vec![0; size as usize];
        let mut random = Random(seed);
        for step in 0..60 {
            let start = random.below(size - 1);
            let length = 1 + random.below((size - start).min(200_000));
            let (from, to) = (start as usize, (start + length) as usize);
            match random.below(6) {
                0..=2 => {
                    let bytes = pattern(step, length as usize);
                    rig.write(start, &bytes);
                    model[from..to].copy_from_slice(&bytes);
                }
                3 => {
                    rig.request(Request::write_zeroes(start, length)).unwrap();
                    model[from..to].fill(0);
                }
                4 => {
                    rig.request(Request::write_zeroes(start, length).may_unmap()).unwrap();
                    model[from..to].fill(0);
                }
                _ => {
                    rig.request(Request::discard(start, length)).unwrap();
                    let first = start.next_multiple_of(cluster_size);
                    let last = match start + length == size {
                        true => size,
                        false => (start + length) / cluster_size * cluster_size,
                    };
                    if first < last {
                        model[first as usize..last as usize].fill(0);
                    }
                }
            }
        }
        assert!(rig.read(0, size as usize) == model, "seed {seed}");
        rig.close();
        assert_eq!(pair.data.length(), size, "it ends where the disk ends");
        pair.judge(&scratch, &model, raw);
    }
}

/// B10: the name alone opens nothing here; the driver says what is missing.
#[test]
fn metadata_can_be_read_without_the_data_file() {
    let scratch = Scratch::new();
    let pair = Pair::from_peer(&scratch, ",data_file_raw=on", "1M");
    let options = Qcow2Options { without_data_file: true, ..Qcow2Options::default() };
    let setup = Setup { options, read_only: true, ..Setup::default() };
    let error = Rig::open(&pair.file, Setup { read_only: false, ..setup.clone() }).map(drop);
    assert_eq!(error.unwrap_err().kind(), ErrorKind::InvalidArgument);
    let mut rig = Rig::open(&pair.file, setup).unwrap();
    assert_eq!(rig.status(0, 1 << 20).offset, Some(0));
    let error = rig.try_read(0, 512).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotSupported);
    assert!(error.to_string().contains("data file"), "{error}");
    rig.close();
}

/// X5, W1: no entry reaches the disk before the data that it shows.
#[test]
fn the_data_file_is_flushed_before_an_entry_is_written() {
    let scratch = Scratch::new();
    let pair = Pair::new(&scratch, CreateOptions::new(1 << 20));
    let mut rig = pair.rig();
    rig.write(0, &[1; 512]);
    rig.flush();
    let flushes = pair.data.flushes();
    rig.write(65536, &[2; 512]);
    let data = pair.data.clone();
    pair.file.set_gate(move |event| {
        let is_slice = matches!(event, Event::Write(_, bytes) if bytes.len() >= 512);
        assert!(!is_slice || data.flushes() > flushes, "an entry before its data");
        Ok(false)
    });
    rig.flush();
    assert!(pair.data.flushes() > flushes);
    rig.close();
}

/// X3: whatever fails or ends in between, zeros are in a raw data file before the entry says so.
#[test]
fn a_raw_data_file_is_zeroed_before_its_entries() {
    let scratch = Scratch::new();
    let options = CreateOptions { data_file_raw: true, ..CreateOptions::new(1 << 20) };
    let pair = Pair::new(&scratch, options);
    let mut rig = pair.rig();
    rig.write(0, &[1; 65536]);
    pair.data.set_gate(|event| match event {
        Event::Zero(..) | Event::Write(..) => Err(libc::EIO),
        _ => Ok(false),
    });
    assert!(rig.request(Request::write_zeroes(0, 65536)).is_err());
    assert!(rig.request(Request::discard(0, 65536)).is_err());
    pair.data.remove_gate();
    let mut model = vec![1; 65536];
    model.resize(1 << 20, 0);
    assert!(rig.read(0, 1 << 20) == model);
    rig.close();
    pair.judge(&scratch, &model, true);
}

#[test]
fn a_disk_with_a_data_file_grows_with_it() {
    let scratch = Scratch::new();
    for raw in [false, true] {
        let options = CreateOptions { data_file_raw: raw, ..CreateOptions::new(100 << 10) };
        let pair = Pair::new(&scratch, options);
        let mut rig = pair.rig();
        rig.write(100_000, &[9; 2400]);
        rig.request(Request::truncate(2 << 20)).unwrap();
        rig.write((2 << 20) - 5, &[1; 5]);
        let mut model = vec![0; 2 << 20];
        model[100_000..102_400].fill(9);
        model[(2 << 20) - 5..].fill(1);
        assert!(rig.read(0, 2 << 20) == model);
        rig.close();
        pair.judge(&scratch, &model, raw);
    }
}

#[test]
fn an_entry_that_names_another_place_is_damage() {
    let scratch = Scratch::new();
    let pair = Pair::from_peer(&scratch, "", "1M");
    scratch.qemu_io(&pair.paths.0, "write -P 0x11 0 100k");
    let pair = Pair::read(pair.paths);
    // A place of another cluster, compressed, and the peer's own place for cluster 0.
    for (word, fails) in
        [(0x8000_0000_0002_0000_u64, true), (1 << 62 | 1 << 20, true), (1 << 63, false)]
    {
        let mut bytes = pair.file.bytes();
        bytes[0x40000..0x40008].copy_from_slice(&word.to_be_bytes());
        let volume = Volume::new(&bytes);
        let setup = Setup { data: Some(pair.data.clone()), read_only: true, ..Setup::default() };
        let mut rig = Rig::open(&volume, setup).unwrap();
        match rig.try_read(0, 512) {
            Ok(_) => assert!(!fails, "{word:#x}"),
            Err(error) => {
                assert!(fails && error.kind() == ErrorKind::Corrupt, "{word:#x}: {error}")
            }
        }
        assert_eq!(rig.read(65536, 4), [0x11; 4]);
        rig.close();
    }
}

#[test]
fn data_file_options_that_cannot_be_are_refused() {
    let name = || Some(b"data".to_vec());
    let rows = [
        CreateOptions { data_file_raw: true, ..CreateOptions::new(1 << 20) },
        CreateOptions { data_file: Some(Vec::new()), ..CreateOptions::new(1 << 20) },
        CreateOptions { data_file: name(), version: Version::V2, ..CreateOptions::new(1 << 20) },
        CreateOptions {
            data_file: name(),
            data_file_raw: true,
            backing_name: name(),
            backing_format: Some(b"raw".to_vec()),
            ..CreateOptions::new(1 << 20)
        },
    ];
    for options in rows {
        let (file, data) = (Volume::new(&[7; 10]), Volume::new(&[7; 10]));
        let error = with_files([&file, &data], async |[file, data]| {
            create_with_data_file(&file, &data, &options).await
        });
        assert_eq!(error.unwrap_err().kind(), ErrorKind::InvalidArgument, "{options:?}");
        assert_eq!((file.bytes(), data.bytes()), (vec![7; 10], vec![7; 10]));
    }
}

#[test]
fn a_disk_with_a_data_file_shrinks_and_is_mapped_ahead_with_it() {
    let scratch = Scratch::new();
    for raw in [false, true] {
        let options = CreateOptions {
            data_file_raw: raw,
            preallocation: Preallocation::Metadata,
            ..CreateOptions::new(2 << 20)
        };
        let pair = Pair::new(&scratch, options);
        let mut rig = pair.rig();
        assert!(rig.status(0, 2 << 20).data, "mapped");
        rig.write(0, &vec![5; 2 << 20]);
        rig.request(Request::truncate((1 << 20) + 512)).unwrap();
        assert_eq!(pair.data.length(), (1 << 20) + 512);
        let grow = Request::truncate(3 << 20).preallocated(Preallocation::Metadata);
        rig.request(grow).unwrap();
        assert_eq!(pair.data.length(), 3 << 20);
        let error = rig.request(Request::write(0, IoBuffer::zeroed(65536)).compressed());
        assert_eq!(error.unwrap_err().kind(), ErrorKind::NotSupported);
        rig.close();
        let mut model = vec![0; 3 << 20];
        model[..(1 << 20) + 512].fill(5);
        pair.judge(&scratch, &model, raw);
    }
}

/// Zeros in the data file of an encrypted disk are no zeros of the disk.
#[test]
fn a_preallocated_data_file_of_an_encrypted_disk_reads_as_zeros() {
    let scratch = Scratch::new();
    let secret = || Secret::new("hush");
    for extended_l2 in [false, true] {
        let iteration_time = std::time::Duration::from_millis(1);
        let luks = LuksCreateOptions { iteration_time, ..LuksCreateOptions::new(secret()) };
        let options = CreateOptions {
            extended_l2,
            encryption: Some(CreateEncryption::Luks(luks)),
            preallocation: Preallocation::Metadata,
            ..CreateOptions::new(1 << 20)
        };
        let pair = Pair::new(&scratch, options);
        let encryption = EncryptionOptions { key: Some(secret()), ..EncryptionOptions::default() };
        let options = Qcow2Options { encryption, ..Qcow2Options::default() };
        let setup = Setup { options, data: Some(pair.data.clone()), ..Setup::default() };
        let mut rig = Rig::open(&pair.file, setup).unwrap();
        assert!(rig.read(0, 1 << 20) == vec![0; 1 << 20], "extended {extended_l2}");
        rig.write(70_000, &[5; 3000]);
        let mut model = vec![0; 1 << 20];
        model[70_000..73_000].fill(5);
        assert!(rig.read(0, 1 << 20) == model, "extended {extended_l2}");
        rig.close();
        assert!(!pair.data.bytes().windows(64).any(|bytes| bytes == [5; 64]));
    }
}

/// X2, X3: a write in place that was late when the disk shrank leaves bytes behind the end of the
/// data file; they do not come back with a disk that grows.
#[test]
fn a_late_write_behind_the_end_of_a_data_file_does_not_come_back() {
    let scratch = Scratch::new();
    for (raw, mode) in [(true, Preallocation::Off), (false, Preallocation::Metadata)] {
        let options = CreateOptions { data_file_raw: raw, ..CreateOptions::new(2 << 20) };
        let pair = Pair::new(&scratch, options);
        let mut rig = pair.rig();
        rig.write(0, &vec![1; 2 << 20]);
        let held = hold(&pair.data, |event| matches!(event, Event::Write(_, b) if b[0] == 9));
        rig.run(async |queue| {
            let late = queue.request(write((2 << 20) - 4096, 4096, 9));
            settle().await;
            queue.request(Request::truncate(1 << 20)).await.result.unwrap();
            held.store(false, std::sync::atomic::Ordering::Relaxed);
            late.await.result.unwrap();
        });
        assert_eq!(pair.data.length(), 2 << 20, "it was late");
        rig.request(Request::truncate(2 << 20).preallocated(mode)).unwrap();
        assert!(rig.read(1 << 20, 1 << 20).iter().all(|byte| *byte == 0), "raw {raw}");
        rig.close();
        let mut model = vec![1; 1 << 20];
        model.resize(2 << 20, 0);
        pair.judge(&scratch, &model, raw);
    }
}

/// X2: the rest of the last cluster is zeros in the image only.
#[test]
fn a_write_to_the_last_cluster_leaves_the_data_file_as_long_as_the_disk() {
    let scratch = Scratch::new();
    for raw in [false, true] {
        let size = (1 << 20) + 1536;
        let options = CreateOptions { data_file_raw: raw, ..CreateOptions::new(size) };
        let pair = Pair::new(&scratch, options);
        let mut rig = pair.rig();
        rig.request(Request::discard(1 << 20, 1536)).unwrap();
        rig.write((1 << 20) + 512, &[3; 512]);
        rig.flush();
        assert_eq!(pair.data.length(), size, "raw {raw}");
        rig.close();
        let mut model = vec![0; size as usize];
        model[(1 << 20) + 512..][..512].fill(3);
        pair.judge(&scratch, &model, raw);
    }
}
