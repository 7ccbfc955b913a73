//! Two openers in one process, then this process and a running QEMU tool, each way round.

use std::{
    fs::File,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio},
};

use super::*;

/// What a format driver uses and shares on the file below a writable image.
const WRITER: (u64, u64) = (CONSISTENT_READ | WRITE | RESIZE, CONSISTENT_READ | WRITE_UNCHANGED);

fn lock_on(path: &Path) -> FileLock {
    let file = File::options().read(true).write(true).open(path).unwrap();
    FileLock::new(file).unwrap()
}

fn conflict_text(result: Result<(), LockError>) -> String {
    match result {
        Err(LockError::Conflict(conflict)) => conflict.to_string(),
        other => panic!("expected a conflict, got {other:?}"),
    }
}

/// For each byte of the table, whether somebody but `observer` holds it.
fn signs(observer: &FileLock) -> (u64, u64) {
    let held = |base: i64| {
        (0..NAMES.len()).fold(0, |set, n| match observer.ask_byte(byte(base, n), n, false) {
            Ok(()) => set,
            Err(LockError::Conflict(_)) => set | 1 << n,
            Err(error) => panic!("{error}"),
        })
    };
    (held(USED_BASE), held(DENIED_BASE))
}

#[test]
fn each_opener_shows_what_it_uses_and_denies() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let observer = lock_on(file.path());
    let mut lock = lock_on(file.path());
    assert_eq!(signs(&observer), (0, 0));
    lock.apply(WRITE | RESIZE, ALL & !RESIZE).unwrap();
    assert_eq!(signs(&observer), (WRITE | RESIZE, RESIZE));
    lock.apply(CONSISTENT_READ, ALL & !WRITE).unwrap();
    assert_eq!(signs(&observer), (CONSISTENT_READ, WRITE));
    lock.apply(0, u64::MAX).unwrap();
    assert_eq!(signs(&observer), (0, 0));
}

#[test]
fn every_pair_of_openers_is_judged_by_the_table() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let (mut first, mut second) = (lock_on(file.path()), lock_on(file.path()));
    for perm in 0..=ALL {
        for shared in 0..=ALL {
            first.apply(perm, shared).unwrap();
            for (wanted, lets) in [(0, ALL), (WRITE, ALL), (0, ALL & !RESIZE), WRITER] {
                let agrees = wanted & !shared == 0 && perm & !lets == 0;
                let result = second.apply(wanted, lets);
                assert_eq!(
                    result.is_ok(),
                    agrees,
                    "{perm} {shared} against {wanted} {lets}: {result:?}"
                );
                second.apply(0, ALL).unwrap();
            }
        }
    }
}

#[test]
fn a_failed_change_leaves_the_old_locks() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let observer = lock_on(file.path());
    let mut lock = lock_on(file.path());
    lock.apply(CONSISTENT_READ, ALL & !RESIZE).unwrap();
    let mut other = lock_on(file.path());
    other.apply(WRITE, ALL).unwrap();

    let before = signs(&observer);
    let refused = lock.apply(CONSISTENT_READ | WRITE, ALL & !WRITE & !RESIZE);
    assert_eq!(
        conflict_text(refused),
        "Failed to get shared \"write\" lock (is another process using the image?)"
    );
    assert_eq!(signs(&observer), before);
    lock.apply(CONSISTENT_READ | WRITE, ALL & !RESIZE).unwrap();
}

#[test]
fn until_commit_both_sets_are_held_and_abort_goes_back() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let observer = lock_on(file.path());
    let mut lock = lock_on(file.path());
    lock.apply(WRITE, ALL & !WRITE).unwrap();
    let settled = signs(&observer);

    lock.prepare(RESIZE, ALL & !RESIZE).unwrap();
    assert_eq!(signs(&observer), (WRITE | RESIZE, WRITE | RESIZE));
    lock.abort();
    assert_eq!(signs(&observer), settled);
    lock.commit();
    assert_eq!(signs(&observer), settled);

    lock.prepare(RESIZE, ALL).unwrap();
    lock.prepare(CONSISTENT_READ, ALL).unwrap();
    assert_eq!(signs(&observer), (WRITE | CONSISTENT_READ, WRITE));
    lock.commit();
    assert_eq!(signs(&observer), (CONSISTENT_READ, 0));
}

#[test]
fn dropping_the_lock_releases_it_though_the_file_stays_open() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let observer = lock_on(file.path());
    let data = File::options().read(true).write(true).open(file.path()).unwrap();
    let mut lock = FileLock::new(&data).unwrap();
    lock.apply(WRITE, 0).unwrap();
    lock.prepare(RESIZE, 0).unwrap();
    assert_eq!(signs(&observer), (WRITE | RESIZE, ALL));
    drop(lock);
    assert_eq!(signs(&observer), (0, 0));
    drop(data);
}

#[test]
fn closing_another_descriptor_of_the_file_releases_nothing() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let observer = lock_on(file.path());
    let mut lock = lock_on(file.path());
    lock.apply(WRITE, ALL).unwrap();
    drop(File::open(file.path()).unwrap());
    assert_eq!(signs(&observer), (WRITE, 0));
}

#[test]
fn locks_move_to_another_open_of_the_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let observer = lock_on(file.path());
    let mut lock = lock_on(file.path());
    lock.apply(CONSISTENT_READ, ALL & !WRITE).unwrap();
    // A descriptor for reading alone can hold them too.
    lock.move_to(File::open(file.path()).unwrap()).unwrap();
    assert_eq!(signs(&observer), (CONSISTENT_READ, WRITE));
    lock.apply(WRITE, ALL).unwrap();
    assert_eq!(signs(&observer), (WRITE, 0));
}

#[test]
fn a_lock_of_a_foreign_kind_is_a_conflict_not_a_wait() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let foreign = lock_on(file.path());
    foreign.set_lock(libc::F_WRLCK, byte(USED_BASE, 1)).unwrap();
    let mut lock = lock_on(file.path());
    let text = conflict_text(lock.apply(CONSISTENT_READ | WRITE, ALL));
    assert!(text.starts_with("Failed to get \"write\" lock"), "{text}");
    assert_eq!(signs(&foreign), (0, 0));
}

/// A qcow2 image, unless the QEMU tools are missing here.
fn image() -> Option<tempfile::NamedTempFile> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(file.path())
        .arg("1M")
        .status();
    match made {
        Ok(status) => {
            assert!(status.success());
            Some(file)
        }
        Err(_) => {
            eprintln!("skipped: the QEMU tools are not installed");
            None
        }
    }
}

fn qemu(program: &str, arguments: &[&str], path: &Path) -> Output {
    Command::new(program).args(arguments).arg(path).output().unwrap()
}

/// A `qemu-io` that has the image open, until it is told to go.
struct Holder {
    child: Child,
    input: ChildStdin,
    /// Kept, as it would die of writing into a closed pipe.
    output: BufReader<ChildStdout>,
}

impl Holder {
    fn start(arguments: &[&str], path: &Path) -> Self {
        let mut child = Command::new("qemu-io")
            .args(arguments)
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        // It takes commands once the image is open. The second one's prompt flushes the answer to
        // the first.
        input.write_all(b"length\nlength\n").unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut answer = String::new();
        output.read_line(&mut answer).unwrap();
        assert!(answer.contains("1 MiB"), "{answer}");
        Self { child, input, output }
    }

    fn leave(self) {
        let Self { mut child, input, output } = self;
        drop(input);
        child.wait().unwrap();
        drop(output);
    }
}

#[test]
fn a_running_qemu_keeps_us_out() {
    let Some(image) = image() else { return };
    let writer = Holder::start(&["-f", "qcow2"], image.path());
    let observer = lock_on(image.path());
    let (used, denied) = signs(&observer);
    assert_eq!(used & (WRITE | RESIZE), WRITE | RESIZE);
    assert_eq!(denied, WRITE | RESIZE);

    let mut lock = lock_on(image.path());
    let text = conflict_text(lock.apply(WRITER.0, WRITER.1));
    assert!(text.starts_with("Failed to get \"write\" lock"), "{text}");
    let text = conflict_text(lock.apply(CONSISTENT_READ, ALL & !WRITE));
    assert!(text.starts_with("Failed to get shared \"write\" lock"), "{text}");
    lock.apply(CONSISTENT_READ, ALL).unwrap();
    writer.leave();
    lock.apply(WRITER.0, WRITER.1).unwrap();
}

#[test]
fn a_reading_qemu_lets_us_read_and_not_write() {
    let Some(image) = image() else { return };
    let reader = Holder::start(&["-r", "-f", "qcow2"], image.path());
    let mut lock = lock_on(image.path());
    lock.apply(CONSISTENT_READ, CONSISTENT_READ | WRITE_UNCHANGED).unwrap();
    let text = conflict_text(lock.apply(WRITER.0, WRITER.1));
    assert!(text.starts_with("Failed to get \"write\" lock"), "{text}");
    reader.leave();
    lock.apply(WRITER.0, WRITER.1).unwrap();
}

#[test]
fn we_keep_a_qemu_out() {
    let Some(image) = image() else { return };
    let mut lock = lock_on(image.path());
    lock.apply(WRITER.0, WRITER.1).unwrap();
    let info = qemu("qemu-img", &["info", "-f", "qcow2"], image.path());
    let text = String::from_utf8_lossy(&info.stderr);
    assert!(!info.status.success());
    assert!(text.contains("Failed to get shared \"write\" lock"), "{text}");
    let forced = qemu("qemu-img", &["info", "-U", "-f", "qcow2"], image.path());
    assert!(forced.status.success());

    lock.apply(CONSISTENT_READ, ALL & !WRITE & !RESIZE).unwrap();
    let write = ["-f", "qcow2", "-c", "write 0 64k"];
    let refused = qemu("qemu-io", &write, image.path());
    let text = String::from_utf8_lossy(&refused.stderr);
    assert!(text.contains("Failed to get \"write\" lock"), "{text}");
    let read = ["-r", "-f", "qcow2", "-c", "read 0 64k"];
    assert!(qemu("qemu-io", &read, image.path()).status.success());

    drop(lock);
    assert!(qemu("qemu-io", &write, image.path()).status.success());
}
