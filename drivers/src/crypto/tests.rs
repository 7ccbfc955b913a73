//! Against the peer: every combination that it makes, both ways.

use super::luks::{
    DEFAULT_MAX_ITERATIONS, LuksCreateOptions, LuksHeader, Place, SlotChange, change_slots, create,
    header_bytes,
};
use super::sectors::{CipherMode, CipherSuite};
use super::{SECTOR, Secret};
use crate::crypto::cipher::CipherAlgorithm;
use crate::crypto::hash::HashAlgorithm;
use crate::crypto::iv::IvAlgorithm;
use crate::qcow2::testing::Scratch;
use crate::qcow2::testing::rig::with_file;
use crate::qcow2::testing::volume::Volume;
use blockplex_graph::ErrorKind;
use std::process::Command;
use std::time::Duration;

fn place(file: &blockplex_graph::Child) -> Place<'_> {
    Place { file, offset: 0, length: file.length() }
}

/// The payload of a LUKS image.
fn payload(image: &[u8], password: &str) -> blockplex_graph::Result<Vec<u8>> {
    let volume = Volume::new(image);
    let (header, key) = with_file(&volume, async |file| {
        let header = LuksHeader::read(place(file)).await?;
        let secret = Secret::new(password);
        let key = header.unlock(place(file), &secret, DEFAULT_MAX_ITERATIONS).await?;
        Ok::<_, blockplex_graph::Error>((header, key))
    })?;
    let mut bytes = image[header.payload_offset() as usize..].to_vec();
    key.cipher(&header.suite)?.decrypt(0, &mut bytes);
    Ok(bytes)
}

/// Suites of the peer: each cipher in each mode, and each kind of vector with one of them.
fn suites() -> Vec<CipherSuite> {
    let mut suites = Vec::new();
    for (number, name) in CipherAlgorithm::names().enumerate() {
        let algorithm = CipherAlgorithm::by_name(name).unwrap();
        for (mode_number, (_, mode)) in CipherMode::NAMES.into_iter().enumerate() {
            let (_, iv) = IvAlgorithm::NAMES[(number + mode_number) % 3];
            let iv_hash = (iv == IvAlgorithm::Essiv).then_some(HashAlgorithm::Sha256);
            let suite = CipherSuite { algorithm, mode, iv, iv_hash };
            // Keys of 24 bytes make material that is not whole sectors, on which the peer dies.
            if suite.check().is_ok() && suite.key_bytes() != 24 {
                suites.push(suite);
            }
        }
    }
    suites
}

fn peer_create(scratch: &Scratch, options: &str) -> String {
    let path = scratch.path();
    let options = format!("key-secret=s,iter-time=1,{options}");
    let object = "secret,id=s,data=hush";
    scratch.qemu_img(&[
        "create", "-q", "--object", object, "-f", "luks", "-o", &options, &path, "64k",
    ]);
    path
}

fn peer_io(path: &str, command: &str) {
    let image = format!("driver=luks,key-secret=s,file.filename={path}");
    let output = Command::new("qemu-io")
        .args(["--object", "secret,id=s,data=hush", "--image-opts", "-c", command, &image])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    let failed = text.contains("failed") || text.contains("rror") || !output.status.success();
    assert!(!failed, "{command}: {text}");
}

fn options(suite: CipherSuite) -> LuksCreateOptions {
    let iteration_time = Duration::from_millis(1);
    LuksCreateOptions { suite, iteration_time, ..LuksCreateOptions::new(Secret::new("hush")) }
}

/// A LUKS image of ours with `payload`.
fn our_image(options: &LuksCreateOptions, payload: &[u8]) -> Vec<u8> {
    let fresh = with_file(&Volume::new(&[0; 512]), async |file| {
        create(file.local(), options).await.unwrap()
    });
    let mut image = vec![0; header_bytes(&options.suite) as usize];
    for (offset, bytes) in fresh.writes() {
        image[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
    let mut payload = payload.to_vec();
    fresh.key.cipher(&options.suite).unwrap().encrypt(0, &mut payload);
    image.extend(payload);
    image
}

/// The peer takes a second to make an image: a few stand for all.
#[test]
fn images_of_the_peer_are_read() {
    let scratch = Scratch::new();
    for options in [
        "ivgen-alg=plain64",
        "cipher-alg=serpent-128,cipher-mode=cbc,ivgen-alg=essiv,hash-alg=sha512",
        "cipher-alg=cast5-128,cipher-mode=ctr,ivgen-alg=plain,hash-alg=ripemd160",
        "cipher-alg=aes-128,ivgen-alg=essiv,ivgen-hash-alg=md5",
    ] {
        let path = peer_create(&scratch, options);
        peer_io(&path, "write -P 0x5a 512 1k");
        let bytes = payload(&scratch.read(&path), "hush").unwrap();
        assert_eq!(bytes[512..1536], [0x5a; 1024], "{options}");
        assert_eq!(bytes.len(), 65536);
    }
}

/// The peer reads what we wrote and we what it wrote.
fn exchange(scratch: &Scratch, options: &LuksCreateOptions) {
    let mut bytes = vec![0; 8 << 10];
    bytes[512..1536].fill(0x5a);
    let path = scratch.path();
    std::fs::write(&path, our_image(options, &bytes)).unwrap();
    peer_io(&path, "read -P 0x5a 512 1k");
    peer_io(&path, "read -P 0 1536 1k");
    peer_io(&path, "write -P 0x77 4k 512");
    bytes[4096..4608].fill(0x77);
    assert_eq!(payload(&scratch.read(&path), "hush").unwrap(), bytes, "{options:?}");
}

#[test]
fn every_suite_and_every_hash_is_exchanged_with_the_peer() {
    let scratch = Scratch::new();
    for suite in suites() {
        exchange(&scratch, &options(suite));
    }
    let suite = LuksCreateOptions::new(Secret::new("x")).suite;
    for (_, hash) in HashAlgorithm::NAMES {
        exchange(&scratch, &LuksCreateOptions { hash, ..options(suite) });
    }
}

#[test]
fn keys_of_24_bytes_work_although_the_peer_cannot_read_them() {
    let algorithm = CipherAlgorithm::Serpent192;
    let suite =
        CipherSuite { algorithm, mode: CipherMode::Cbc, iv: IvAlgorithm::Plain, iv_hash: None };
    let image = our_image(&options(suite), &[9; 512]);
    assert_eq!(payload(&image, "hush").unwrap(), [9; 512]);
}

#[test]
fn a_wrong_password_opens_nothing() {
    let image = our_image(&options(LuksCreateOptions::new(Secret::new("x")).suite), &[9; 512]);
    let error = payload(&image, "hus").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied);
    assert!(error.to_string().contains("Invalid password, cannot unlock any keyslot"));
}

#[test]
fn malformed_headers_are_refused_by_name() {
    let good = our_image(&options(LuksCreateOptions::new(Secret::new("x")).suite), &[9; 512]);
    let rows: &[(usize, &[u8], &str)] = &[
        (0, b"X", "magic"),
        (6, &[0, 2], "version 2"),
        (8, &[b'a'; 32], "not NUL terminated"),
        (40, &[b'x'; 32], "not NUL terminated"),
        (72, &[b's'; 32], "not NUL terminated"),
        (8, b"rot13\0", "cipher 'rot13'"),
        (40, b"gcm-plain\0", "cipher mode"),
        (40, b"xts\0", "cipher mode"),
        (40, b"xts-essiv\0", "without a hash"),
        (40, b"xts-essiv:sha1\0", "essiv needs"),
        (72, b"crc32\0", "hash 'crc32'"),
        (108, &[0xff; 4], "key of 4294967295 bytes"),
        (108, &[0; 4], "key of 0 bytes"),
        (164, &[0; 4], "digest are 0"),
        (164, &[0xff; 4], "the digest of the key has 4294967295 iterations"),
        (208, &[1; 4], "key slot 0 has state"),
        (212, &[0xff; 4], "key slot 0 has 4294967295 iterations"),
        (212, &[0; 4], "key slot 0 has 0 iterations"),
        (208 + 40, &[0, 0, 0, 1], "overlaps the header"),
        (208 + 40, &[0xff; 4], "overlaps the payload"),
        (208 + 48 + 40, &[0, 0, 0, 9], "overlaps key slot 0"),
        (208 + 44, &[0xff; 4], "stripes"),
        (208 + 44, &[0; 4], "stripes"),
        (104, &[0, 0, 0, 9], "overlaps the payload"),
    ];
    for (at, bytes, wanted) in rows {
        let mut image = good.clone();
        image[*at..*at + bytes.len()].copy_from_slice(bytes);
        let error = payload(&image, "hush").unwrap_err().to_string();
        assert!(error.contains(wanted), "byte {at}: {error}");
    }
    for length in [0, 100, 591, 592, 100 << 10] {
        assert!(payload(&good[..length], "hush").is_err(), "{length}");
    }
}

#[test]
fn key_slots_come_and_go_and_the_last_one_stays() {
    let image = our_image(&options(LuksCreateOptions::new(Secret::new("x")).suite), &[9; SECTOR]);
    let volume = Volume::new(&image);
    let (old, new) = (Secret::new("hush"), Secret::new("new"));
    with_file(&volume, async |file| {
        let place = place(file);
        let mut header = LuksHeader::read(place).await.unwrap();
        let max = DEFAULT_MAX_ITERATIONS;
        let key = header.unlock(place, &old, max).await.unwrap();
        let iteration_time = Some(Duration::from_millis(1));
        let add = |slot| SlotChange::Activate { slot, password: new.clone(), iteration_time };
        for slot in [None, Some(7)] {
            change_slots(&mut header, place, &key, &add(slot), (false, max)).await.unwrap();
        }
        let mut fails = async |change: SlotChange, wanted: &str| {
            let result = change_slots(&mut header, place, &key, &change, (false, max)).await;
            let text = result.unwrap_err().to_string();
            assert!(text.contains(wanted), "{text}");
        };
        let erase = |slot, password: Option<&Secret>| SlotChange::Erase {
            slot,
            password: password.cloned(),
        };
        fails(add(Some(7)), "Refusing to overwrite active keyslot 7").await;
        fails(add(Some(8)), "Invalid keyslot 8").await;
        fails(erase(None, None), "must be given").await;
        fails(erase(Some(3), None), "already erased").await;
        fails(erase(Some(0), Some(&new)), "doesn't contain").await;
        fails(erase(None, Some(&Secret::new("no"))), "No keyslots match").await;
        change_slots(&mut header, place, &key, &erase(None, Some(&new)), (false, max))
            .await
            .unwrap();
        // By force, what is gone may go again.
        let gone = erase(Some(3), None);
        change_slots(&mut header, place, &key, &gone, (true, max)).await.unwrap();
        let header = LuksHeader::read(place).await.unwrap();
        assert_eq!(header.slots.iter().filter(|slot| slot.active).count(), 1);
        assert!(header.unlock(place, &new, max).await.is_err());
        let mut again = header;
        for change in [erase(Some(0), None), erase(None, Some(&old))] {
            let result = change_slots(&mut again, place, &key, &change, (false, max)).await;
            assert!(result.unwrap_err().to_string().contains("irreversibly"));
        }
        change_slots(&mut again, place, &key, &erase(Some(0), None), (true, max)).await.unwrap();
        assert!(again.unlock(place, &old, max).await.is_err());
    });
}
