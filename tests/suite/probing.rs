//! Opening as the tools do it: formats that nobody states, files that others use, what a gate lets
//! be read.

use blockplex::drivers::qcow2::{self, CreateOptions};
use blockplex::drivers::raw::Raw;
use blockplex::{Backend, Blockplex, OpenGate, OpenOptions, block_on};
use blockplex_graph::ErrorKind;
use std::path::Path;

fn layer() -> Blockplex {
    Blockplex::new().expect("a layer")
}

fn open(layer: &Blockplex, options: OpenOptions) -> blockplex::Result<Backend> {
    block_on(layer.open("test", options)).expect("no loop runs here")
}

fn unstated(path: &Path) -> OpenOptions {
    let text = format!("file.driver=file,file.filename={}", path.display());
    OpenOptions::parse(&text).expect("options")
}

fn close(backend: &Backend) {
    block_on(backend.close()).expect("no loop runs here").expect("it closes");
}

/// A qcow2 image at `path`, made over whatever is there.
fn make(layer: &Blockplex, path: &Path, options: CreateOptions) {
    let work = layer.create_over(path, async move |file| qcow2::create(file, &options).await);
    block_on(work).expect("no loop runs here").expect("it is made");
}

#[test]
fn formats_are_probed_only_where_the_caller_asks_for_it() {
    let directory = tempfile::tempdir().unwrap();
    let (path, layer) = (directory.path().join("image"), layer());
    std::fs::write(&path, [7; 100]).unwrap();
    make(&layer, &path, CreateOptions::new(1 << 20));
    assert_eq!(open(&layer, unstated(&path)).unwrap_err().kind(), ErrorKind::InvalidArgument);
    let image = open(&layer, unstated(&path).probe_formats()).unwrap();
    let root = layer.graph().topology().node(image.root().unwrap()).cloned().unwrap();
    assert_eq!(root.driver().driver_name(), "qcow2");
    assert_eq!(image.length().unwrap(), 1 << 20);
    close(&image);
}

#[test]
fn what_a_probe_took_for_raw_cannot_be_made_to_look_like_an_image() {
    let directory = tempfile::tempdir().unwrap();
    let (path, layer) = (directory.path().join("disk"), layer());
    std::fs::write(&path, [0; 4096]).unwrap();
    let disk = open(&layer, unstated(&path).probe_formats()).unwrap();
    let root = layer.graph().topology().node(disk.root().unwrap()).cloned().unwrap();
    assert!(root.driver_as::<Raw>().unwrap().is_guarded());
    let door = disk.blocking();
    assert_eq!(door.write(0, b"QFI\xfb\0\0\0\x03").unwrap_err().errno(), libc::EPERM);
    // Nor in two parts, each of which is harmless.
    door.write(0, b"QFI").unwrap();
    assert_eq!(door.write(3, b"\xfb").unwrap_err().errno(), libc::EPERM);
    // Nor as a part of a longer write; what is no header may go anywhere.
    let mut long = vec![1; 2048];
    door.write(0, &long).unwrap();
    long[..4].copy_from_slice(b"QFI\xfb");
    assert!(door.write(0, &long).is_err());
    door.write(512, &long).unwrap();
    close(&disk);
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(bytes[..512], [1; 512]);
    assert_eq!(bytes[512..516], *b"QFI\xfb");

    // Read-only, or stated to be raw: nothing to guard.
    for options in [unstated(&path).probe_formats().read_only(), OpenOptions::image("raw", &path)] {
        let disk = open(&layer, options).unwrap();
        let root = layer.graph().topology().node(disk.root().unwrap()).cloned().unwrap();
        assert!(!root.driver_as::<Raw>().unwrap().is_guarded());
        close(&disk);
    }
}

#[test]
fn a_reader_that_shares_everything_comes_in_beside_a_writer() {
    let directory = tempfile::tempdir().unwrap();
    let (path, layer) = (directory.path().join("image"), layer());
    make(&layer, &path, CreateOptions::new(1 << 20));
    let writer = open(&layer, OpenOptions::image("qcow2", &path)).unwrap();
    let other = Blockplex::new().unwrap();
    let reading = OpenOptions::image("qcow2", &path).read_only();
    assert_eq!(open(&other, reading.clone()).unwrap_err().kind(), ErrorKind::Locked);
    let reader = open(&other, reading.set("force-share", true)).unwrap();
    close(&reader);
    let writing = OpenOptions::image("qcow2", &path).set("force-share", true);
    assert_eq!(open(&other, writing).unwrap_err().kind(), ErrorKind::InvalidArgument);
    close(&writer);
}

#[test]
fn the_root_directory_may_be_granted_for_reading_with_its_absolute_links() {
    let directory = tempfile::tempdir().unwrap();
    let (base, link) = (directory.path().join("base"), directory.path().join("link"));
    let (path, layer) = (directory.path().join("overlay"), layer());
    std::fs::write(&base, vec![9; 1 << 20]).unwrap();
    std::os::unix::fs::symlink(&base, &link).unwrap();
    let mut overlay = CreateOptions::new(1 << 20);
    overlay.backing_name = Some(b"link".to_vec());
    overlay.backing_format = Some(b"raw".to_vec());
    make(&layer, &path, overlay);
    let denied = open(&layer, OpenOptions::image("qcow2", &path)).unwrap_err();
    assert_eq!(denied.kind(), ErrorKind::PermissionDenied);
    let gate = OpenGate::deny_all().allow_reading("/").unwrap();
    let image = open(&layer, OpenOptions::image("qcow2", &path).gate(gate)).unwrap();
    assert_eq!(image.blocking().read_to_vec(4096, 3).unwrap(), [9; 3]);
    close(&image);
    // Without what it names.
    let alone = OpenOptions::image("qcow2", &path).image_alone();
    let image = open(&layer, alone).unwrap();
    assert_eq!(image.blocking().read_to_vec(4096, 3).unwrap(), [0; 3]);
    close(&image);
}
