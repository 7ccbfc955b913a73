//! Check and repair of malformed images, through the library.
//!
//! F5. A check changes nothing. A repair ends clean, and then has nothing more to do, or it changes
//!     nothing; what it leaves clean can be opened for writing.
//! F6. What the driver found corrupt is not called clean; nor is what the peer calls corrupt.

use super::image::{self, Sandbox, be16, patched, text};
use super::rows::Expected;
use blockplex::drivers::qcow2::amend::{AmendOptions, amend};
use blockplex::drivers::qcow2::check::{self as checks, CheckOptions, CheckReport, Fix};
use blockplex::drivers::qcow2::entry::Version;
use blockplex::graph::Child;
use blockplex::{Backend, Blockplex, OpenOptions, Result, block_on};
use std::fs;
use std::path::Path;

/// The file alone.
fn file(path: &Path) -> OpenOptions {
    let description = format!("driver=file,filename={}", text(path));
    OpenOptions::parse(&description).expect("a description")
}

fn check(path: &Path, fix: Fix) -> Result<CheckReport> {
    let layer = Blockplex::new().expect("a layer");
    let options = if fix == Fix::None { file(path).read_only() } else { file(path) };
    let work = async move |file: &Child| checks::check(file, CheckOptions { fix }).await;
    block_on(layer.with_image_file(options, work)).expect("no loop")
}

fn open(path: &Path) -> Result<Backend> {
    let layer = Blockplex::new().expect("a layer");
    block_on(layer.open("disk", OpenOptions::image("qcow2", path))).expect("no loop")
}

/// F5 and F6 of one image.
pub fn judge(id: &str, bytes: &[u8], expected: Expected) {
    // Some are of terabytes, and hold nothing; a look at each of their bytes would tell no more.
    let is_same = |path: &Path| fs::read(path).expect("it is there") == bytes;
    let sandbox = Sandbox::in_memory();
    let path = sandbox.put("checked.qcow2", bytes);
    let found = check(&path, Fix::None);
    assert!(is_same(&path), "{id}: changed by a check");
    let Ok(found) = found else {
        let repaired = check(&path, Fix::All);
        assert!(repaired.is_err() && is_same(&path), "{id}: {repaired:?}");
        return;
    };
    let peer = image::check(&path);
    if expected.marked || peer.is_some_and(|peer| !peer.is_sound()) {
        assert!(!found.is_clean(), "{id}: called clean; the peer: {peer:?}");
    }
    let repaired = check(&path, Fix::All).unwrap_or_else(|error| panic!("{id}: {error}"));
    if repaired.exit_code() != 0 {
        assert!(is_same(&path), "{id}: changed by a repair that was not: {repaired:?}");
        return;
    }
    let after = fs::read(&path).expect("it is there");
    let again = check(&path, Fix::All).unwrap_or_else(|error| panic!("{id}: {error}"));
    assert!(again.is_clean(), "{id}: not clean: {again:?}");
    assert!(after == fs::read(&path).expect("it is there"), "{id}: a second repair changed it");
    if needs_more(&after) {
        return;
    }
    assert_eq!(image::check(&path), Some(image::Check::CLEAN), "{id}");
    if expected.read_only.is_some() {
        let backend = open(&path).unwrap_or_else(|error| panic!("{id}: repaired: {error}"));
        block_on(backend.close()).expect("no loop").expect("closes");
    }
}

/// Whether it takes more than the file to open the image: a backing file, or a key.
fn needs_more(bytes: &[u8]) -> bool {
    bytes[8..16] != [0; 8] || bytes[32..36] != [0; 4]
}

#[test]
fn an_image_is_checked_repaired_and_amended_through_the_library() {
    let sandbox = Sandbox::in_memory();
    let path = sandbox.put("image.qcow2", &patched(image::base(), &[be16(0x2000a, 2)]));
    let found = check(&path, Fix::None).expect("a qcow2 image");
    let lines: Vec<String> = found.messages.iter().map(ToString::to_string).collect();
    assert_eq!(lines[0], "Leaked cluster 5 refcount=2 reference=1");
    assert_eq!((found.exit_code(), found.leaks, found.corruptions), (2, 1, 1));
    assert!(check(&path, Fix::All).expect("a repair").is_clean());
    let options = AmendOptions {
        version: Some(Version::V3),
        refcount_bits: Some(64),
        lazy_refcounts: Some(true),
        ..AmendOptions::default()
    };
    let layer = Blockplex::new().expect("a layer");
    let work = async move |file: &Child| amend(file, &options, &mut |_, _| {}).await;
    block_on(layer.with_image_file(file(&path), work)).expect("no loop").expect("amended");
    assert_eq!(image::check(&path), Some(image::Check::CLEAN));
    // Nobody checks what somebody writes to.
    let backend = open(&path).expect("opens");
    let refused = check(&path, Fix::All).expect_err("it is in use");
    drop(refused);
    block_on(backend.close()).expect("no loop").expect("closes");
}
