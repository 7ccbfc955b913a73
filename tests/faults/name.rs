//! Rows B: the names in an image, and what the gate makes of them.
//!
//! By default an image gets nothing that it names. With a gate it gets what lies in a granted
//! directory, read-only, in the format that it states.

use super::image::{self, DATA_FILE, Sandbox, backing, be32, be64, extensions, patched};
use super::rows::{FAR, REFUSED, Row, WORKS, bounded, judge, row};
use blockplex::drivers::qcow2::CreateOptions;
use blockplex::{Blockplex, OpenGate, OpenOptions, Result, block_on};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::Path;

/// An image of 64 MiB with nothing in it.
fn empty() -> &'static [u8] {
    static EMPTY: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    EMPTY.get_or_init(|| image::made("cluster_size=64k", "64M", &[]))
}

/// An image that names `name`.
fn overlay(name: &[u8], format: Option<&str>) -> Vec<u8> {
    patched(empty(), &backing(name, format))
}

fn granting(directory: &Path) -> OpenGate {
    OpenGate::deny_all().allow_directory(directory).expect("a directory")
}

/// Opens an image read-only and reads its first bytes.
fn try_read(path: &Path, gate: OpenGate) -> Result<Vec<u8>> {
    let path = path.to_owned();
    bounded("an open", move || {
        let layer = Blockplex::new()?;
        let options = OpenOptions::image("qcow2", &path).gate(gate).read_only();
        match block_on(layer.open("disk", options)).expect("no loop") {
            Ok(backend) => {
                let read = backend.blocking().read_to_vec(0, 512);
                block_on(backend.close()).expect("no loop")?;
                read
            }
            Err(error) => {
                assert_eq!(layer.graph().topology().nodes().count(), 0, "{error}: nodes stay");
                Err(error)
            }
        }
    })
}

/// The text of a refusal.
fn refusal(path: &Path, gate: OpenGate) -> String {
    match try_read(path, gate) {
        Ok(_) => panic!("{} opens", path.display()),
        Err(error) => {
            let text = error.to_string();
            assert!(!text.chars().any(char::is_control), "{text:?}");
            text
        }
    }
}

fn named(id: &str, name: &[u8], format: Option<&str>) -> Row {
    row(id, backing(name, format), REFUSED).gated()
}

#[test]
fn a_backing_name_must_lie_in_the_header_cluster() {
    let name = |offset: u64, length: u32| [be64(8, offset), be32(16, length)];
    judge([
        row("B01 offset", name(0x10001, 5), REFUSED).says(&["backing file name"]),
        row("B01 offset max", name(u64::MAX, 5), REFUSED).says(&["backing file name"]),
        row("B01 end", name(0xfffe, 5), REFUSED).says(&["backing file name"]),
        row("B01 length", name(0x1000, 1024), REFUSED).says(&["backing file name", "1023"]),
        row("B01 length max", name(0x1000, u32::MAX), REFUSED).says(&["backing file name"]),
        row("B03 no length", name(0x1000, 0), REFUSED).says(&["backing file name"]),
        row("B03 no offset", name(0, 5), REFUSED).says(&["backing file name"]),
    ]);
}

#[test]
fn names_that_are_no_plain_file_names_are_refused_even_through_a_gate() {
    let names: &[(&str, &[u8])] = &[
        ("B07", b"json:{\"driver\":\"null-co\",\"size\":\"64M\"}"),
        ("B07b nbd", b"nbd://localhost/disk"),
        ("B07b http", b"http://localhost/disk"),
        ("B07b ssh", b"ssh://localhost/disk"),
        ("B07b rbd", b"rbd:pool/disk"),
        ("B07b file", b"file:image.qcow2"),
        ("B07f", b"../../../../../../../../etc/passwd"),
        ("B07g zero", b"/dev/zero"),
        ("B07g mem", b"/proc/self/mem"),
        ("B07g fd", b"/dev/fd/0"),
        ("B07h", b"."),
        ("B07k", b"fat:/etc"),
        ("B07k rw", b"fat:rw:/etc"),
        ("B04", b"image.qcow2"),
        ("B05 ./", b".//./image.qcow2"),
    ];
    for (id, name) in names {
        for format in ["raw", "qcow2"] {
            judge([named(&format!("{id} as {format}"), name, Some(format))]);
        }
        judge([named(&format!("{id}, no format"), name, None)]);
    }
    judge([
        named("B07c", b"/etc/passwd", None).says(&["format"]),
        named("B07e", b"image.qcow2\0/etc/passwd", Some("raw")).says(&["NUL"]),
        named("B08", b"base.raw", Some("foo")).says(&["foo", "not supported"]),
        named("B08 control", b"base.raw", Some("f\x1bo")),
        named("B07l, missing", b"\x1b[2J\xff\n", Some("raw")).says(&["\\x1b[2J\\xff\\x0a"]),
    ]);
}

#[test]
fn an_image_gets_nothing_without_a_gate() {
    let sandbox = Sandbox::new();
    sandbox.put("base.raw", &[7; 4096]);
    let path = sandbox.put("image", &overlay(b"base.raw", Some("raw")));
    let text = refusal(&path, OpenGate::deny_all());
    fs::remove_file(sandbox.at("base.raw")).expect("it is there");
    assert_eq!(text, refusal(&path, OpenGate::deny_all()), "B07n: it does not even look");
}

/// B07n: what lies outside of the grant cannot be felt for.
#[test]
fn refusals_are_the_same_whether_or_not_the_target_exists() {
    let sandbox = Sandbox::new();
    for directory in ["granted", "secret"] {
        fs::create_dir(sandbox.at(directory)).expect("an empty directory");
    }
    let secret = sandbox.at("secret/file");
    symlink("../secret/file", sandbox.at("granted/link")).expect("a link");
    let names = [image::text(&secret), "../secret/file", "link"];
    let refusals = || -> Vec<String> {
        let mut texts = Vec::new();
        for name in names {
            for format in [Some("raw"), Some("qcow2"), None] {
                let path = sandbox.put("granted/image", &overlay(name.as_bytes(), format));
                texts.push(refusal(&path, granting(&sandbox.at("granted"))));
            }
        }
        texts
    };
    let without = refusals();
    fs::write(&secret, [7; 4096]).expect("a file");
    assert_eq!(refusals(), without);
}

#[test]
fn an_image_that_leads_back_to_itself_is_refused() {
    let sandbox = Sandbox::new();
    let gate = || granting(sandbox.path());
    let path = sandbox.put("a", &overlay(b"b", Some("qcow2")));
    sandbox.put("b", &overlay(b"c", Some("qcow2")));
    for (id, last) in [("2-cycle", "b"), ("3-cycle", "a"), ("symlink", "soft"), ("link", "hard")] {
        sandbox.put("c", &overlay(last.as_bytes(), Some("qcow2")));
        for link in ["soft", "hard"] {
            // Not there in the first round.
            drop(fs::remove_file(sandbox.at(link)));
        }
        symlink("a", sandbox.at("soft")).expect("a link");
        fs::hard_link(&path, sandbox.at("hard")).expect("a link");
        let text = refusal(&path, gate());
        assert!(text.contains("chain"), "B05 {id}: {text}");
    }
    // Its own bytes as a raw disk.
    sandbox.put("c", &overlay(b"a", Some("raw")));
    refusal(&path, gate());
}

#[test]
fn a_chain_of_two_hundred_opens_and_a_longer_one_is_refused() {
    let sandbox = Sandbox::new();
    let name = |number: usize| format!("image{number:03}");
    sandbox.put(&name(0), image::base());
    for number in 1..=201 {
        let below = name(number - 1);
        sandbox.put(&name(number), &overlay(below.as_bytes(), Some("qcow2")));
    }
    let gate = || granting(sandbox.path());
    let read = try_read(&sandbox.at(&name(200)), gate()).expect("B06: 200 backing files");
    assert_eq!(read, [image::FILL; 512], "B06: through the chain");
    refusal(&sandbox.at(&name(201)), gate());
}

#[test]
fn a_fifo_as_backing_file_does_not_block() {
    let sandbox = Sandbox::new();
    let status = std::process::Command::new("mkfifo").arg(sandbox.at("fifo")).status();
    assert!(status.expect("mkfifo is installed").success());
    for format in ["raw", "qcow2"] {
        let path = sandbox.put("image", &overlay(b"fifo", Some(format)));
        let text = refusal(&path, granting(sandbox.path()));
        assert!(text.contains("not a regular file"), "B07i: {text}");
    }
}

#[test]
fn a_name_is_bytes() {
    let sandbox = Sandbox::new();
    let long = vec![b'n'; 250];
    for name in [&b"\xff\xfe\x1b\n"[..], &long, "größe".as_bytes()] {
        let base = sandbox.path().join(OsStr::from_bytes(name));
        fs::write(base, [7; 4096]).expect("a file");
        let path = sandbox.put("image", &overlay(name, Some("raw")));
        let read = try_read(&path, granting(sandbox.path())).expect("B07l");
        assert_eq!(read, [7; 512], "B07l");
    }
}

/// B08: a guest that wrote a header to its raw disk is not believed.
#[test]
fn a_raw_backing_file_is_raw_whatever_is_in_it() {
    let sandbox = Sandbox::new();
    let mut polyglot = overlay(b"/etc/passwd", Some("raw"));
    polyglot[510..512].copy_from_slice(&[0x55, 0xaa]);
    sandbox.put("base.raw", &polyglot);
    let path = sandbox.put("image", &overlay(b"base.raw", Some("raw")));
    let read = try_read(&path, granting(sandbox.path())).expect("B08: it is raw");
    assert_eq!(read, polyglot[..512], "B08");
}

/// The caller's word stands above the image's: S-1.
#[test]
fn an_image_opens_without_what_it_names_when_the_caller_says_so() {
    let sandbox = Sandbox::new();
    let path = sandbox.put("image", &overlay(b"nbd://localhost/disk", None));
    let other = sandbox.put("other.raw", &[9; 4096]);
    bounded("S-1", move || {
        let layer = Blockplex::new().expect("a layer");
        let file = format!("driver=qcow2,read-only=on,file.driver=file,file.filename={path:?}")
            .replace('"', "");
        let alone = format!(
            r#"{{"driver": "qcow2", "read-only": true, "backing": null,
                "file": {{"driver": "file", "filename": {path:?}}}}}"#
        );
        let with = format!(
            "{file},backing.driver=raw,backing.file.driver=file,backing.file.filename={}",
            image::text(&other)
        );
        for (text, byte) in [(alone, 0), (with, 9)] {
            let options = OpenOptions::parse(&text).expect("options");
            let backend = block_on(layer.open("disk", options)).expect("no loop").expect("opens");
            let read = backend.blocking().read_to_vec(0, 512).expect("a read");
            assert_eq!(read, [byte; 512], "{text}");
            block_on(backend.close()).expect("no loop").expect("closes");
        }
    });
}

#[test]
fn a_data_file_is_opened_by_its_name_only_through_the_gate() {
    let data_file = |name: &[u8]| vec![be64(72, 4), extensions(&[(DATA_FILE, name)])];
    let bit_off = [extensions(&[(DATA_FILE, b"/etc/passwd")])];
    judge([
        row("B10", data_file(b"/etc/passwd"), REFUSED).gated().says(&["data file", "not within"]),
        row("B10 no gate", data_file(b"other.raw"), REFUSED).says(&["data file", "not within"]),
        row("B10e", data_file(b""), REFUSED).says(&["data file name"]),
        row("B10e long", data_file(&[b'd'; 60_000]), REFUSED).says(&["data file name", "60000"]),
        row("B10f", bit_off, WORKS),
        row("B10g", data_file(b"a\0/etc/passwd"), REFUSED).says(&["NUL"]),
        row("B11", data_file(b"image.qcow2"), REFUSED).gated().says(&["chain"]),
    ]);
}

/// B10, B11: through the gate, or by the caller's own word, it is opened, and always as it is.
#[test]
fn a_data_file_is_raw_whatever_is_in_it() {
    let sandbox = Sandbox::new();
    let path = sandbox.at("image");
    let data = sandbox.at("data");
    let options = format!("data_file={}", image::text(&data));
    sandbox.create(&path, &options, "1M");
    image::qemu_io(&path, &["write -P 7 0 128k"]);
    // The guest writes an image that names another file.
    let guest = overlay(b"/etc/passwd", Some("raw"));
    let read = try_read(&path, granting(sandbox.path())).expect("B10: granted");
    assert_eq!(read, [7; 512]);
    bounded("B11", {
        let (path, data, guest) = (path.clone(), data.clone(), guest.clone());
        move || {
            let gates = [
                (granting(data.parent().expect("a folder")), String::new()),
                (
                    OpenGate::deny_all(),
                    format!(r#""data-file": {{"driver": "file", "filename": {data:?}}},"#),
                ),
            ];
            for (gate, option) in gates {
                let text = format!(
                    r#"{{"driver": "qcow2", {option} "file": {{"driver": "file", "filename": {path:?}}}}}"#
                );
                let layer = Blockplex::new().expect("a layer");
                let options = OpenOptions::parse(&text).expect("options").gate(gate);
                let backend =
                    block_on(layer.open("disk", options)).expect("no loop").expect("opens");
                let disk = backend.blocking();
                disk.write(0, &guest).expect("a write");
                disk.flush().expect("a flush");
                assert_eq!(disk.read_to_vec(0, 512).expect("a read"), guest[..512]);
                block_on(backend.close()).expect("no loop").expect("closes");
            }
        }
    });
    assert_eq!(fs::read(&data).expect("it is there")[..512], guest[..512]);
    assert_eq!(image::check(&path), Some(image::Check::CLEAN));
    // Without the data file there is nothing but metadata.
    bounded("B10 info", move || {
        let layer = Blockplex::new().expect("a layer");
        let text = format!(
            r#"{{"driver": "qcow2", "read-only": true, "data-file": null,
                "file": {{"driver": "file", "filename": {path:?}}}}}"#
        );
        let options = OpenOptions::parse(&text).expect("options");
        let backend = block_on(layer.open("disk", options)).expect("no loop").expect("opens");
        let error = backend.blocking().read_to_vec(0, 512).expect_err("no data");
        assert!(error.to_string().contains("data file"), "{error}");
        block_on(backend.close()).expect("no loop").expect("closes");
        let plain = text.replace(r#""data-file": null"#, r#""data-file": "none""#);
        let options = OpenOptions::parse(&plain).expect("options");
        block_on(layer.open("disk", options)).expect("no loop").expect_err("no such node");
    });
}

/// A new image with a data file, made and opened by name.
#[test]
fn an_image_with_a_data_file_is_created_with_it() {
    let sandbox = Sandbox::new();
    let (path, data) = (sandbox.at("image"), sandbox.at("data"));
    let gate = granting(sandbox.path());
    bounded("a new data file", {
        // The peer takes a relative name from its own current folder.
        let (path, name) = (path.clone(), image::text(&data).into());
        move || {
            let layer = Blockplex::new().expect("a layer");
            let options = CreateOptions {
                data_file: Some(name),
                data_file_raw: true,
                ..CreateOptions::new(1 << 20)
            };
            let create = || block_on(layer.create_qcow2(&path, options.clone())).expect("no loop");
            create().expect("it is new");
            create().expect_err("it is there");
            let options = OpenOptions::image("qcow2", &path).gate(gate);
            let backend = block_on(layer.open("disk", options)).expect("no loop").expect("opens");
            backend.blocking().write(70_000, &[5; 10]).expect("a write");
            block_on(backend.close()).expect("no loop").expect("closes");
        }
    });
    let raw = fs::read(&data).expect("it is there");
    assert_eq!((raw.len(), &raw[70_000..70_010]), (1 << 20, &[5; 10][..]));
    assert!(image::guest_bytes(&path, None) == raw);
    assert_eq!(image::check(&path), Some(image::Check::CLEAN));
}

/// A backing file that is damaged fails the reads that go through to it, and nobody marks
/// anything: neither the backing file, which is read-only, nor the overlay, which is sound.
#[test]
fn a_damaged_backing_file_does_not_damage_its_overlay() {
    let sandbox = Sandbox::new();
    let damaged = patched(image::base(), &[be64(image::L2, 0x8000_0000_0000_0000)]);
    let base = sandbox.put("base", &damaged);
    let path = sandbox.put("image", &overlay(b"base", Some("qcow2")));
    let gate = granting(sandbox.path());
    bounded("a damaged backing file", {
        let path = path.clone();
        move || {
            let layer = Blockplex::new().expect("a layer");
            let options = OpenOptions::image("qcow2", &path).gate(gate);
            let backend = block_on(layer.open("disk", options)).expect("no loop").expect("opens");
            let disk = backend.blocking();
            disk.read_to_vec(0, 512).expect_err("it goes through");
            disk.write(512, &[1; 512]).expect_err("so does copy-on-write");
            disk.write(0, &[2; 0x10000]).expect("a whole cluster does not");
            disk.write(FAR, &[3; 512]).expect("nothing wrong there");
            disk.flush().expect("a flush");
            block_on(backend.close()).expect("no loop").expect("closes");
        }
    });
    assert_eq!(fs::read(&base).expect("it is there"), damaged);
    assert_eq!(fs::read(&path).expect("it is there")[79], 0, "no mark");
    assert_eq!(image::check(&path), Some(image::Check::CLEAN));
}
