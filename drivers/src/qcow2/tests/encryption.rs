//! Encrypted images, both ways with the peer.

use crate::crypto::Secret;
use crate::crypto::cipher::CipherAlgorithm;
use crate::crypto::hash::HashAlgorithm;
use crate::crypto::iv::IvAlgorithm;
use crate::crypto::luks::{LuksCreateOptions, SlotChange};
use crate::crypto::sectors::{CipherMode, CipherSuite};
use crate::qcow2::testing::Scratch;
use crate::qcow2::testing::rig::{Rig, Setup, with_file};
use crate::qcow2::testing::volume::Volume;
use crate::qcow2::{
    CreateEncryption, CreateOptions, EncryptionFormat, EncryptionInformation, EncryptionOptions,
    Qcow2, Qcow2Options, create,
};
use blockplex_graph::{ErrorKind, Preallocation};
use std::process::Command;
use std::time::Duration;

const OBJECT: &str = "secret,id=s,data=hush";

fn luks() -> LuksCreateOptions {
    let iteration_time = Duration::from_millis(1);
    LuksCreateOptions { iteration_time, ..LuksCreateOptions::new(Secret::new("hush")) }
}

fn image(encryption: CreateEncryption, change: impl FnOnce(&mut CreateOptions)) -> Volume {
    let mut options = CreateOptions { cluster_size: 4096, ..CreateOptions::new(1 << 20) };
    options.encryption = Some(encryption);
    change(&mut options);
    let volume = Volume::new(&[]);
    with_file(&volume, async |file| create(file, &options).await).unwrap();
    volume
}

fn with_key(key: &str) -> Setup {
    let encryption =
        EncryptionOptions { key: Some(Secret::new(key)), ..EncryptionOptions::default() };
    Setup { options: Qcow2Options { encryption, ..Qcow2Options::default() }, ..Setup::default() }
}

fn open(volume: &Volume) -> Rig {
    Rig::open(volume, with_key("hush")).unwrap()
}

fn peer(path: &str, commands: &[&str]) {
    let image = format!("driver=qcow2,encrypt.key-secret=s,file.filename={path}");
    let mut program = Command::new("qemu-io");
    program.args(["--object", OBJECT, "--image-opts"]);
    for command in commands {
        program.args(["-c", command]);
    }
    let output = program.arg(&image).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    let failed = text.contains("failed") || text.contains("rror") || !output.status.success();
    assert!(!failed, "{commands:?}: {text}");
}

fn check_clean(scratch: &Scratch, path: &str) {
    let image = format!("driver=qcow2,encrypt.key-secret=s,file.filename={path}");
    scratch.qemu_img(&["check", "-q", "--object", OBJECT, "--image-opts", &image]);
}

/// Bytes that differ by sector.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at / 512 % 251) as u8 ^ at as u8).collect()
}

#[test]
fn the_peer_reads_what_was_written_here() {
    let scratch = Scratch::new();
    for (version, encryption) in [
        ("LUKS", CreateEncryption::Luks(luks())),
        ("AES", CreateEncryption::Aes(Secret::new("hush"))),
    ] {
        let volume = image(encryption, |_| ());
        let mut rig = open(&volume);
        rig.write(512, &[0x11; 512]);
        rig.write(5000, &[0x22; 300]);
        rig.write(100 << 10, &[0x33; 300 << 10]);
        assert_eq!(rig.read(512, 512), [0x11; 512]);
        assert_eq!(rig.read(4096, 904), [0; 904]);
        assert_eq!(rig.read(5000, 300), [0x22; 300]);
        assert_eq!(rig.read(100 << 10, 300 << 10), vec![0x33; 300 << 10]);
        rig.close();
        let path = scratch.path();
        volume.save(&path);
        assert!(!volume.bytes().windows(64).any(|bytes| bytes == [0x33; 64]), "{version}");
        peer(
            &path,
            &[
                "read -P 0 0 512",
                "read -P 0x11 512 512",
                "read -P 0 1024 3976",
                "read -P 0x22 5000 300",
                "read -P 0 5300 4k",
                "read -P 0x33 100k 300k",
                "read -P 0 400k 624k",
            ],
        );
        check_clean(&scratch, &path);
    }
}

#[test]
fn what_the_peer_wrote_is_read_and_changed_here() {
    let scratch = Scratch::new();
    for options in [
        "encrypt.format=luks,encrypt.iter-time=1",
        "encrypt.format=aes",
        "encrypt.format=luks,encrypt.iter-time=1,encrypt.ivgen-alg=essiv,encrypt.cipher-mode=cbc",
        "encrypt.format=luks,encrypt.iter-time=1,extended_l2=on,cluster_size=32k",
        "encrypt.format=luks,encrypt.iter-time=1,compat=0.10,cluster_size=512",
    ] {
        let path = scratch.path();
        let options = format!("{options},encrypt.key-secret=s");
        let arguments = ["create", "-q", "--object", OBJECT, "-f", "qcow2", "-o", &options];
        scratch.qemu_img(&[&arguments[..], &[&path, "2M"]].concat());
        peer(&path, &["write -P 0x44 3k 200k", "write -P 0x55 1M 512"]);
        let volume = Volume::from_file(&path);
        let mut rig = open(&volume);
        assert_eq!(rig.read(0, 3072), [0; 3072], "{options}");
        assert_eq!(rig.read(3072, 200 << 10), vec![0x44; 200 << 10], "{options}");
        assert_eq!(rig.read(1 << 20, 1024), [[0x55; 512], [0; 512]].concat(), "{options}");
        // In place, ragged and new.
        rig.write(8 << 10, &[0x66; 1536]);
        rig.write((1 << 20) + 512, &[0x77; 100]);
        rig.write((1 << 20) + (300 << 10) + 512, &[0x78; 512]);
        rig.close();
        volume.save(&path);
        peer(
            &path,
            &[
                "read -P 0x44 3k 5k",
                "read -P 0x66 8k 1536",
                "read -P 0x44 9728 1k",
                "read -P 0x55 1M 512",
                "read -P 0x77 1049088 100",
                "read -P 0 1049188 512",
                "read -P 0x78 1356288 512",
            ],
        );
        check_clean(&scratch, &path);
    }
}

#[test]
fn suites_and_large_requests_read_back() {
    let serpent = CipherSuite {
        algorithm: CipherAlgorithm::Serpent256,
        mode: CipherMode::Cbc,
        iv: IvAlgorithm::Essiv,
        iv_hash: Some(HashAlgorithm::Sha256),
    };
    for suite in [luks().suite, serpent] {
        let volume = image(CreateEncryption::Luks(LuksCreateOptions { suite, ..luks() }), |_| ());
        let mut rig = open(&volume);
        let bytes = pattern(700 << 10);
        rig.write(1536, &bytes);
        rig.write(2048, &bytes[512..1024]);
        rig.close();
        let mut rig = open(&volume);
        assert!(rig.read(1536, 700 << 10) == bytes);
        assert_eq!(rig.read(1000, 5000)[536..], bytes[..4464]);
        rig.close();
    }
}

#[test]
fn copies_of_shared_and_backing_clusters_are_decrypted_by_the_old_place_and_encrypted_by_the_new() {
    let backing = Volume::new(&pattern(1 << 20));
    let volume = image(CreateEncryption::Luks(luks()), |_| ());
    let setup = Setup { backing: Some(backing), ..with_key("hush") };
    let mut rig = Rig::open(&volume, setup.clone()).unwrap();
    rig.write(4096 + 512, &[1; 512]);
    let mut wanted = pattern(1 << 20);
    wanted[4608..5120].fill(1);
    assert!(rig.read(0, 1 << 20) == wanted);
    rig.close();
    // A snapshot of the peer shares the cluster.
    let scratch = Scratch::new();
    let path = scratch.path();
    volume.save(&path);
    let image = format!("driver=qcow2,encrypt.key-secret=s,file.filename={path}");
    scratch.qemu_img(&["snapshot", "--object", OBJECT, "--image-opts", "-c", "s", &image]);
    let volume = Volume::from_file(&path);
    let mut rig = Rig::open(&volume, Setup { ..setup }).unwrap();
    rig.write(4096 + 1024, &[2; 100]);
    wanted[5120..5220].fill(2);
    assert!(rig.read(0, 1 << 20) == wanted);
    rig.close();
    volume.save(&path);
    check_clean(&scratch, &path);
}

#[test]
fn zeros_are_zeros_wherever_they_come_from() {
    use blockplex_graph::Request;
    let volume = image(CreateEncryption::Luks(luks()), |_| ());
    let mut rig = open(&volume);
    rig.write(0, &[9; 16384]);
    rig.request(Request::write_zeroes(4096, 6000)).unwrap();
    assert_eq!(rig.read(4096, 6000), [0; 6000]);
    rig.write(4096 + 512, &[7; 512]);
    assert_eq!(rig.read(4096, 512), [0; 512]);
    assert_eq!(rig.read(5120, 512), [0; 512]);
    assert_eq!(rig.read(10096, 200), [9; 200]);
    assert_eq!(rig.status(0, 4096).offset, None, "nobody finds plain data there");
    rig.close();
    for preallocation in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        let change = |options: &mut CreateOptions| options.preallocation = preallocation;
        let volume = image(CreateEncryption::Luks(luks()), change);
        let mut rig = open(&volume);
        assert!(rig.read(0, 1 << 20).iter().all(|byte| *byte == 0), "{preallocation:?}");
        let length = volume.length();
        rig.write(512, &[7; 512]);
        assert_eq!(rig.read(0, 4096), [vec![0; 512], vec![7; 512], vec![0; 3072]].concat());
        rig.close();
        assert_eq!(volume.length(), length, "{preallocation:?}: its place was there");
    }
}

#[test]
fn without_a_key_nothing_is_opened_but_metadata() {
    let volume = image(CreateEncryption::Luks(luks()), |_| ());
    let before = volume.bytes();
    let error = |setup: Setup| Rig::open(&volume, setup).err().unwrap();
    assert!(error(Setup::default()).to_string().contains("'encrypt.key-secret' is required"));
    let wrong = error(with_key("no"));
    assert_eq!(wrong.kind(), ErrorKind::PermissionDenied);
    let mut other = with_key("hush");
    other.options.encryption.format = Some(EncryptionFormat::Aes);
    assert!(error(other).to_string().contains("Header reported 'luks'"));
    let mut limited = with_key("hush");
    limited.options.encryption.max_iterations = Some(999);
    assert_eq!(error(limited).kind(), ErrorKind::LimitExceeded);
    let mut metadata = Setup::default();
    metadata.options.encryption.metadata_only = true;
    let mut rig = Rig::open(&volume, metadata).unwrap();
    assert_eq!(rig.read(0, 512), [0; 512], "the metadata says so");
    assert!(rig.try_write(0, &[1; 512]).unwrap_err().to_string().contains("key-secret"));
    rig.close();
    assert_eq!(volume.bytes(), before);
    let plain = Volume::new(&[]);
    with_file(&plain, async |file| create(file, &CreateOptions::new(1 << 20)).await).unwrap();
    // A key that nobody needs does no harm; who wants encryption says so.
    Rig::open(&plain, with_key("hush")).unwrap().close();
    let mut demanding = with_key("hush");
    demanding.options.encryption.format = Some(EncryptionFormat::Luks);
    assert!(Rig::open(&plain, demanding).is_err());
}

#[test]
fn an_image_tells_its_encryption_and_its_key_slots_change() {
    let volume = image(CreateEncryption::Luks(luks()), |_| ());
    let options = with_key("hush").options;
    with_file(&volume, async |file| {
        let driver = Qcow2::open(file, options, false).await.unwrap();
        let Some(EncryptionInformation::Luks(header)) = &driver.information().encryption else {
            panic!("not LUKS");
        };
        assert_eq!(header.payload_offset(), 2_068_480);
        assert_eq!(header.slots.iter().filter(|slot| slot.active).count(), 1);
        let change = SlotChange::Activate {
            slot: None,
            password: Secret::new("new"),
            iteration_time: Some(Duration::from_millis(1)),
        };
        driver.change_key_slots(file, &change, false).await.unwrap();
        let erase = SlotChange::Erase { slot: Some(0), password: None };
        driver.change_key_slots(file, &erase, false).await.unwrap();
        assert!(driver.change_key_slots(file, &erase, false).await.is_err());
        assert!(!driver.luks_header().await.unwrap().slots[0].active);
    });
    assert!(Rig::open(&volume, with_key("hush")).is_err());
    Rig::open(&volume, with_key("new")).unwrap().close();
}

#[test]
fn refused_combinations() {
    let refused = |change: fn(&mut CreateOptions)| {
        let mut options = CreateOptions::new(1 << 20);
        options.encryption = Some(CreateEncryption::Luks(luks()));
        change(&mut options);
        let volume = Volume::new(&[]);
        with_file(&volume, async |file| create(file, &options).await).unwrap_err();
        assert_eq!(volume.length(), 0);
    };
    refused(|options| {
        options.version = crate::qcow2::entry::Version::V2;
        options.preallocation = Preallocation::Metadata;
    });
    refused(|options| {
        let Some(CreateEncryption::Luks(luks)) = &mut options.encryption else { return };
        luks.suite.algorithm = CipherAlgorithm::Cast5;
    });
}
