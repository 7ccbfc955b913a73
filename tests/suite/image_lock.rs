//! Image locks: what each opener shows on the file, who is let in, and the other party's programs.

use blockplex::Backend;
use blockplex_graph::{Access, ErrorKind, Permissions};
use blockplex_tests::Bench;
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

/// The bytes of the file on which an OFD lock lies, as the kernel lists them.
fn locked_bytes(path: &Path) -> BTreeSet<u64> {
    let inode = std::fs::metadata(path).expect("the file is there").ino();
    let list = std::fs::read_to_string("/proc/locks").expect("the kernel lists locks");
    let mut bytes = BTreeSet::new();
    for line in list.lines() {
        // `7: OFDLCK ADVISORY  READ -1 fd:00:1234 100 101`
        let words: Vec<&str> = line.split_whitespace().collect();
        let place = words.iter().position(|word| *word == "OFDLCK");
        let Some([_, _, _, _, file, first, last]) = place.and_then(|at| words.get(at..at + 7))
        else {
            continue;
        };
        if file.rsplit(':').next() == Some(&inode.to_string()) {
            let number = |word: &str| word.parse::<u64>().expect("a byte's number");
            bytes.extend(number(first)..=number(last));
        }
    }
    bytes
}

/// The bytes that show `access`.
fn signs(access: Access) -> BTreeSet<u64> {
    let of = |permissions: Permissions, base: u64| {
        (0..4).filter(move |bit| permissions.bits() & 1 << bit != 0).map(move |bit| base + bit)
    };
    of(access.needed, 100).chain(of(!access.shared, 200)).collect()
}

fn open(bench: &Bench, path: &Path, extra: &str) -> blockplex::Result<Backend> {
    bench.open(&format!("driver=file,filename={}{extra}", path.display()))
}

#[test]
fn each_opener_shows_what_it_uses_and_what_it_denies_until_it_closes() {
    let (_directory, path) = crate::request::file();
    let bench = Bench::new();
    assert_eq!(locked_bytes(&path), BTreeSet::new());
    let reader = open(&bench, &path, ",read-only=on").unwrap();
    assert_eq!(locked_bytes(&path), signs(Access::READER));
    let second = open(&bench, &path, ",read-only=on").unwrap();
    bench.close(&reader).unwrap();
    assert_eq!(locked_bytes(&path), signs(Access::READER), "closing one drops no other's locks");
    bench.close(&second).unwrap();
    assert_eq!(locked_bytes(&path), BTreeSet::new());
    let writer = open(&bench, &path, "").unwrap();
    assert_eq!(locked_bytes(&path), signs(blockplex_tests::writer()));
    bench.close(&writer).unwrap();
    assert_eq!(locked_bytes(&path), BTreeSet::new());
}

#[test]
fn a_second_writer_is_refused_even_by_another_path_and_the_first_keeps_its_locks() {
    let (directory, path) = crate::request::file();
    let link = directory.path().join("another name");
    std::fs::hard_link(&path, &link).unwrap();
    let bench = Bench::new();
    let writer = open(&bench, &path, "").unwrap();
    let before = locked_bytes(&path);
    for name in [&path, &link] {
        let error = open(&bench, name, "").unwrap_err();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Locked, libc::EAGAIN));
        assert!(error.to_string().contains("lock"), "{error}");
        assert_eq!(locked_bytes(&path), before);
    }
    writer.blocking().write(0, b"still works").unwrap();
    let reader = open(&bench, &path, ",read-only=on").unwrap();
    bench.close(&reader).unwrap();
    assert_eq!(locked_bytes(&path), before);
    bench.close(&writer).unwrap();
}

#[test]
fn a_permission_change_that_is_refused_leaves_the_locks_as_they_were() {
    let (_directory, path) = crate::request::file();
    let bench = Bench::new();
    let node = format!("driver=file,node-name=shared,filename={}", path.display());
    let options = blockplex::OpenOptions::parse(&node).unwrap();
    let wait = blockplex_tests::patience::wait::<
        std::pin::Pin<Box<dyn Future<Output = blockplex::Result<Backend>>>>,
    >;
    let shared = blockplex_tests::patience::wait("a node", bench.layer.add_node(options)).unwrap();
    let mine = bench.layer.clone();
    let reader = wait("a", Box::pin(async move { mine.open_backend("a", shared, true).await }));
    let reader = reader.unwrap();
    let other = open(&bench, &path, "").unwrap();
    let before = locked_bytes(&path);
    // Inside of the process nothing speaks against a writer; the other opener's locks do.
    let mine = bench.layer.clone();
    let error = wait("b", Box::pin(async move { mine.open_backend("b", shared, false).await }));
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Locked);
    assert_eq!(locked_bytes(&path), before);
    bench.close(&other).unwrap();
    let mine = bench.layer.clone();
    let writer = wait("c", Box::pin(async move { mine.open_backend("c", shared, false).await }));
    let writer = writer.unwrap();
    writer.blocking().write(0, b"now").unwrap();
    bench.close(&writer).unwrap();
    assert_eq!(locked_bytes(&path), signs(Access::READER), "what is not needed is let go");
    bench.close(&reader).unwrap();
    blockplex_tests::patience::wait("removal", bench.layer.remove_node(shared)).unwrap();
    assert_eq!(locked_bytes(&path), BTreeSet::new());
}

#[test]
fn locking_can_be_switched_off() {
    let (_directory, path) = crate::request::file();
    let bench = Bench::new();
    let writer = open(&bench, &path, "").unwrap();
    let unlocked = open(&bench, &path, ",locking=off").unwrap();
    bench.close(&unlocked).unwrap();
    bench.close(&writer).unwrap();
}

/// Runs QEMU's own tool on the image; `Err` with what it says.
fn qemu_io(path: &Path, read_only: bool, command: &str) -> Result<(), String> {
    let mut tool = Command::new("qemu-io");
    tool.args(["-f", "raw", "-c", command]);
    if read_only {
        tool.arg("-r");
    }
    let output = tool.arg(path).output().expect("qemu-io is installed (tests/run does that)");
    let text = String::from_utf8_lossy(&output.stderr).into_owned()
        + &String::from_utf8_lossy(&output.stdout);
    if output.status.success() && text.contains("ops") { Ok(()) } else { Err(text) }
}

#[test]
fn qemus_tools_are_kept_out_by_our_locks_and_let_in_after_the_close() {
    let (_directory, path) = crate::request::file();
    let bench = Bench::new();
    let writer = open(&bench, &path, "").unwrap();
    let refused = qemu_io(&path, false, "write -P 7 0 512").unwrap_err();
    assert!(refused.contains("lock"), "{refused}");
    qemu_io(&path, true, "read -P 0x5a 0 512").expect("a reader gets on with our writer");
    bench.close(&writer).unwrap();
    let reader = open(&bench, &path, ",read-only=on").unwrap();
    qemu_io(&path, false, "write -P 7 0 512").expect("a writer gets on with our reader");
    assert_eq!(reader.blocking().read_to_vec(0, 512).unwrap(), vec![7; 512]);
    bench.close(&reader).unwrap();
}

/// The file of a format shows that it is written and resized, and that nobody else may do that; its
/// external data file shows the same.
#[test]
fn an_external_data_file_is_locked_like_the_file_of_its_image() {
    let sandbox = blockplex_tests::image::Sandbox::new();
    let (image, data) = (sandbox.at("image"), sandbox.at("data"));
    sandbox.create(&image, &format!("data_file={}", data.display()), "1M");
    let bench = Bench::new();
    let data_file = format!("data-file.driver=file,data-file.filename={}", data.display());
    for read_only in ["off", "on"] {
        let text = format!(
            "driver=qcow2,read-only={read_only},{data_file},file.driver=file,file.filename={}",
            image.display()
        );
        let disk = bench.open(&text).unwrap();
        let held = locked_bytes(&image);
        assert!(!held.is_empty());
        assert_eq!(locked_bytes(&data), held, "read-only={read_only}");
        let write = ["-f", "raw", "-c", "write 0 512"];
        let output = Command::new("qemu-io").args(write).arg(&data).output().unwrap();
        assert!(!output.status.success(), "the peer writes to the data file");
        bench.close(&disk).unwrap();
    }
    assert_eq!(locked_bytes(&data), BTreeSet::new());
}
