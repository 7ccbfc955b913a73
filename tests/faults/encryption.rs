//! Rows K: LUKS headers, and what is read of an encrypted disk, through the tools.

use super::image::{self, FILL, Patch, Sandbox, be16, be32, be64, patched, succeed, text};
use super::tools::{KEY, Kind, run, survive};
use std::fs;
use std::process::Command;

/// Offsets in the LUKS header: where the data begins, the length of the key, the iterations of
/// the digest, the first key slot and what is in it.
const PAYLOAD: u64 = 104;
const KEY_BYTES: u64 = 108;
const DIGEST_ITERATIONS: u64 = 164;
const SLOT: u64 = 208;
const SLOT_ITERATIONS: u64 = SLOT + 4;
const SLOT_OFFSET: u64 = SLOT + 40;
const SLOT_STRIPES: u64 = SLOT + 44;
/// The extension that says where the LUKS header is.
const CRYPTO: u32 = 0x0537_be77;

/// An encrypted image of the peer, its first cluster written.
pub fn luks(size: &str) -> Vec<u8> {
    let sandbox = Sandbox::in_memory();
    let path = sandbox.at("made.qcow2");
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let made = ["create", "-q", "--object", KEY, "-f", "qcow2", "-o", options, text(&path), size];
    succeed(&image::qemu_img(&made), "create");
    let disk = format!("driver=qcow2,encrypt.key-secret=s,file.filename={}", text(&path));
    let output = Command::new("qemu-io")
        .args(["--object", KEY, "-c", "write -P 0x11 0 64k", "--image-opts", &disk])
        .output();
    succeed(&output.expect("qemu-io is installed"), "write");
    fs::read(&path).expect("it was just made")
}

/// Where the LUKS header is.
fn header(bytes: &[u8]) -> u64 {
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let at = (112..4096).step_by(8).find(|at| word(*at) >> 32 == u64::from(CRYPTO));
    word(at.expect("an encrypted image") + 8)
}

/// The status of a read of the first cluster, with the key.
fn read(what: &str, bytes: &[u8]) -> i32 {
    let sandbox = Sandbox::in_memory();
    let path = sandbox.put("image.qcow2", bytes);
    let line = format!("io -r -f qcow2 -c read_-P_{FILL}_0_64k FILE");
    let (status, output) = run(what, &sandbox, Kind::Encrypted, &line, &path);
    let failed = String::from_utf8_lossy(&output.stdout).contains("verification failed");
    assert!(!failed, "{what}: reads what was never written");
    status
}

#[test]
fn a_luks_header_that_cannot_be_is_refused_at_once() {
    let base = luks("64M");
    let at = header(&base);
    assert_eq!(read("none", &base), 0);
    let rows = [
        ("K01", be32(at + SLOT_ITERATIONS, u32::MAX)),
        ("K01 none", be32(at + SLOT_ITERATIONS, 0)),
        ("K02", be32(at + DIGEST_ITERATIONS, u32::MAX)),
        ("K02 none", be32(at + DIGEST_ITERATIONS, 0)),
        ("K06", be32(at + KEY_BYTES, u32::MAX)),
        ("K06 none", be32(at + KEY_BYTES, 0)),
        ("K06 other", be32(at + KEY_BYTES, 33)),
        ("K07", be32(at + SLOT_STRIPES, u32::MAX)),
        ("K07 none", be32(at + SLOT_STRIPES, 0)),
        ("K08", be32(at + SLOT_OFFSET, u32::MAX)),
        ("K08 header", be32(at + SLOT_OFFSET, 0)),
        ("K08 overlap", be32(at + SLOT_OFFSET + 48, 8)),
        ("K10 magic", Patch::Bytes(at, vec![0])),
        ("K10 version", be16(at + 6, 2)),
        ("K10 cipher without NUL", Patch::Bytes(at + 8, vec![b'a'; 32])),
        ("K10 mode without NUL", Patch::Bytes(at + 40, vec![b'a'; 32])),
        ("K10 hash without NUL", Patch::Bytes(at + 72, vec![b'a'; 32])),
        ("K10 cipher of controls", Patch::Bytes(at + 8, b"\x1b[2J\r\n\0".to_vec())),
        ("K10 no active slot", be32(at + SLOT, 0xdead)),
        ("K10 slot state", be32(at + SLOT, 0x1234_5678)),
        ("K10 digest", Patch::Bytes(at + 112, vec![0; 20])),
        ("K10 cut", Patch::Length(at + 300)),
    ];
    for (what, patch) in rows {
        let bytes = patched(&base, &[patch]);
        survive(what, Kind::Encrypted, &bytes);
        assert_ne!(read(what, &bytes), 0, "{what}: opens");
    }
}

/// S-17: the limit is an option of its own.
#[test]
fn more_iterations_than_are_accepted_are_refused_by_the_name_of_the_option() {
    let base = luks("8M");
    let at = header(&base);
    let sandbox = Sandbox::in_memory();
    let says = |patch: Option<Patch>, option: &str| {
        let patches: Vec<Patch> = patch.into_iter().collect();
        let path = sandbox.put("image.qcow2", &patched(&base, &patches));
        let option = format!(
            "io -r --object {KEY} --image-opts -c length driver=qcow2,\
             encrypt.key-secret=s,file.filename={}{option}",
            text(&path)
        );
        let (status, said) = run("S-17", &sandbox, Kind::Plain, &option, &path);
        (status, String::from_utf8_lossy(&said.stderr).into_owned())
    };
    for (patch, most) in [
        (be32(at + SLOT_ITERATIONS, 10_000_001), "10000000"),
        (be32(at + DIGEST_ITERATIONS, 20_000_001), "20000000"),
    ] {
        let (status, text) = says(Some(patch), "");
        assert!(status == 1 && text.contains(most) && text.contains("max-iterations"), "{text}");
    }
    let (status, text) = says(None, ",encrypt.max-iterations=500");
    assert!(status == 1 && text.contains("max-iterations"), "{text}");
    let (status, text) = says(None, ",encrypt.max-iterations=4000000000");
    assert_eq!(status, 0, "{text}");
    let (status, text) = says(None, ",encrypt.max-iterations=0");
    assert!(status == 1 && text.contains("max-iterations"), "{text}");
}

/// K09: the data of a qcow2 image is where its tables say.
#[test]
fn the_payload_offset_of_an_encrypted_image_has_no_meaning() {
    let base = luks("64M");
    for offset in [0, u32::MAX] {
        let bytes = patched(&base, &[be32(header(&base) + PAYLOAD, offset)]);
        survive("K09", Kind::Encrypted, &bytes);
        // Refused, or read right.
        read("K09", &bytes);
    }
}

#[test]
fn an_encrypted_disk_shows_no_garbage() {
    let base = luks("64M");
    let word = |at: u64| {
        let at = at as usize;
        u64::from_be_bytes(base[at..at + 8].try_into().expect("eight bytes"))
    };
    let l2 = word(word(40)) & 0x00ff_ffff_ffff_fe00;
    // No cluster is compressed and encrypted.
    let compressed = patched(&base, &[be64(l2, word(l2) & !(1 << 63) | 1 << 62)]);
    survive("K11 compressed", Kind::Encrypted, &compressed);
    assert_ne!(read("K11 compressed", &compressed), 0);
    let sandbox = Sandbox::in_memory();
    for (what, entry) in [("never written", 0), ("zeros", 1), ("past the end", 0x100_0000)] {
        let path = sandbox.put("image.qcow2", &patched(&base, &[be64(l2 + 8, entry)]));
        let line = "io -r -f qcow2 -c read_-P_0_64k_64k FILE";
        let (status, output) = run(what, &sandbox, Kind::Encrypted, line, &path);
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(status == 0 && !printed.contains("failed"), "K11 {what}: {printed}");
    }
}
