//! One row: patches, what is to happen, and the oracle that looks whether it does.

use super::image::{self, Check, FILL, Patch, Sandbox};
use super::{offline, tools};
use blockplex::{Backend, Blockplex, Error, ErrorKind, OpenGate, OpenOptions, Result, block_on};
use std::fs;
use std::io::Read;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

/// After this a row hangs, on a machine with much else to do, too.
const LIMIT: Duration = Duration::from_secs(60);
/// The offset of the requests that do not meet the first cluster.
pub const FAR: u64 = 40 << 20;
/// The corrupt bit, in the incompatible features.
const CORRUPT: u8 = 2;
/// The header's feature bits: the only bytes that marking an image changes.
const FEATURES: std::ops::Range<usize> = 72..96;

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It succeeds (a read of the first cluster finds what was written there).
    Fine,
    /// It fails with EIO.
    Fails,
    /// It ends, one way or the other.
    Either,
}

use Fate::{Either, Fails, Fine};

/// What is to happen to an image.
#[derive(Clone, Copy, Debug)]
pub struct Expected {
    /// Opened read-only: reads of the first cluster and of a far one; `None`: refused.
    pub read_only: Option<[Fate; 2]>,
    /// Opened read-write: writes to both places; `None`: refused.
    pub read_write: Option<[Fate; 2]>,
    /// Whether the read-write run marks the image as corrupt.
    pub marked: bool,
}

/// R: refused in both modes.
pub const REFUSED: Expected = Expected { read_only: None, read_write: None, marked: false };
/// RW✗: read-only it opens and reads.
pub const READ_ONLY: Expected = Expected { read_only: Some([Fine, Fine]), ..REFUSED };
/// OK.
pub const WORKS: Expected =
    Expected { read_only: Some([Fine, Fine]), read_write: Some([Fine, Fine]), marked: false };
/// C, with the damage above the whole first L2 table.
pub const CORRUPT_TABLE: Expected =
    Expected { read_only: Some([Fails, Fails]), read_write: Some([Fails, Fails]), marked: true };
/// C, with the damage in the entry of the first cluster. The far write comes too late.
pub const CORRUPT_ENTRY: Expected =
    Expected { read_only: Some([Fails, Fine]), read_write: Some([Fails, Fails]), marked: true };
/// The first cluster cannot be read; nothing else is wrong.
pub const UNREADABLE: Expected =
    Expected { read_only: Some([Fails, Fine]), read_write: Some([Fails, Fine]), marked: false };

/// A malformed image and what is to happen to it.
pub struct Row {
    id: String,
    patches: Vec<Patch>,
    expected: Expected,
    says: Vec<String>,
    base: Option<Vec<u8>>,
    gated: bool,
    leaks: bool,
}

/// A row on the base image.
pub fn row(id: impl Into<String>, patches: impl Into<Vec<Patch>>, expected: Expected) -> Row {
    let (id, patches) = (id.into(), patches.into());
    Row { id, patches, expected, says: Vec::new(), base: None, gated: false, leaks: false }
}

impl Row {
    /// The refusal names this: the field, its value, the limit.
    pub fn says(mut self, words: &[&str]) -> Row {
        self.says.extend(words.iter().map(|word| (*word).to_owned()));
        self
    }

    /// On another image.
    pub fn on(mut self, base: &[u8]) -> Row {
        self.base = Some(base.to_vec());
        self
    }

    /// With a gate that grants the image's directory.
    pub fn gated(mut self) -> Row {
        self.gated = true;
        self
    }

    /// The peer may find leaked clusters afterwards that it did not see before.
    pub fn leaks(mut self) -> Row {
        self.leaks = true;
        self
    }

    /// Looks whether what is to happen happens.
    pub fn judge(self) {
        let what = self.id.clone();
        let bytes = image::patched(self.base.as_deref().unwrap_or(image::base()), &self.patches);
        let (expected, gated) = (self.expected, self.gated);
        bounded(&what, move || self.judge_here());
        if gated {
            // The tools grant more to images than this row does.
            tools::survive(&what, tools::Kind::Plain, &bytes);
        } else {
            tools::judge(&what, &bytes, expected);
        }
    }

    fn judge_here(self) {
        let sandbox = Sandbox::in_memory();
        let before = image::patched(self.base.as_deref().unwrap_or(image::base()), &self.patches);
        let path = sandbox.put("image.qcow2", &before);
        let gate = if self.gated {
            OpenGate::deny_all().allow_directory(sandbox.path()).expect("a directory")
        } else {
            OpenGate::deny_all()
        };
        let options = OpenOptions::image("qcow2", &path).gate(gate);
        self.judge_read_only(&path, &before, options.clone().read_only());
        self.judge_read_write(&path, &before, options);
        offline::judge(&self.id, &before, self.expected);
    }

    fn judge_read_only(&self, path: &Path, before: &[u8], options: OpenOptions) {
        let layer = Blockplex::new().expect("a layer");
        match (self.open(&layer, options), self.expected.read_only) {
            (Err(error), None) => self.judge_refusal(&layer, &error),
            (Ok(backend), Some(fates)) => {
                let disk = backend.blocking();
                for ((offset, fate), what) in places(&backend).zip(fates).zip(["first", "far"]) {
                    let Some((offset, length)) = offset else { continue };
                    let read = disk.read_to_vec(offset, length);
                    self.judge_fate(what, fate, read.as_ref().map(|_| ()));
                    let expected = if what == "first" { FILL } else { 0 };
                    if let (Ok(bytes), Fine) = (read, fate) {
                        let same = bytes.iter().all(|byte| *byte == expected);
                        assert!(same, "{}: the {what} read finds other bytes", self.id);
                    }
                }
                block_on(backend.close()).expect("no loop").expect("nothing to write");
            }
            (Err(error), Some(_)) => panic!("{}: not even read-only: {error}", self.id),
            (Ok(_), None) => panic!("{}: opens read-only", self.id),
        }
        assert!(fs::read(path).expect("it is there") == before, "{}: changed (ro)", self.id);
    }

    fn judge_read_write(&self, path: &Path, before: &[u8], options: OpenOptions) {
        let layer = Blockplex::new().expect("a layer");
        match (self.open(&layer, options.clone()), self.expected.read_write) {
            (Err(error), None) => {
                self.judge_refusal(&layer, &error);
                let after = fs::read(path).expect("it is there");
                assert!(after == before, "{}: changed by a refusal", self.id);
            }
            (Ok(backend), Some(fates)) => {
                let written = self.write(&backend, fates);
                drop(layer);
                self.judge_result(path, before, options, &written);
            }
            (Err(error), Some(_)) => panic!("{}: not read-write: {error}", self.id),
            (Ok(_), None) => panic!("{}: opens read-write", self.id),
        }
    }

    /// Writes at both places, flushes, closes. Gives the places that were written.
    fn write(&self, backend: &Backend, fates: [Fate; 2]) -> Vec<(u64, usize)> {
        let disk = backend.blocking();
        let mut written = Vec::new();
        for ((place, fate), what) in places(backend).zip(fates).zip(["first", "far"]) {
            let Some((offset, length)) = place else { continue };
            let bytes = vec![0x5a; length.min(4096)];
            let result = disk.write(offset, &bytes);
            self.judge_fate(what, fate, result.as_ref().copied());
            if result.is_ok() {
                written.push((offset, bytes.len()));
            }
        }
        let flushed = disk.flush();
        let closed = block_on(backend.close()).expect("no loop");
        if !self.expected.marked {
            flushed.unwrap_or_else(|error| panic!("{}: flush: {error}", self.id));
            closed.unwrap_or_else(|error| panic!("{}: close: {error}", self.id));
        }
        written
    }

    fn judge_result(
        &self,
        path: &Path,
        before: &[u8],
        options: OpenOptions,
        written: &[(u64, usize)],
    ) {
        let after = beginning(path);
        let is_marked = after[79] & CORRUPT != 0;
        let version = after[7];
        assert_eq!(is_marked, self.expected.marked && version >= 3, "{}: mark", self.id);
        if written.is_empty() && self.expected.marked {
            let same = after.len() == before.len()
                && after[..FEATURES.start] == before[..FEATURES.start]
                && after[FEATURES.end..] == before[FEATURES.end..];
            assert!(same, "{}: more than the mark was written", self.id);
        }
        let layer = Blockplex::new().expect("a layer");
        if is_marked {
            let error = self.open(&layer, options.clone()).err();
            let error = error.unwrap_or_else(|| panic!("{}: writable again", self.id));
            assert!(error.to_string().contains("corrupt"), "{}: {error}", self.id);
        }
        let backend = self.open(&layer, options.read_only());
        let backend = backend.unwrap_or_else(|error| panic!("{}: reopened: {error}", self.id));
        for (offset, length) in written {
            let read = backend.blocking().read_to_vec(*offset, *length);
            let read = read.unwrap_or_else(|error| panic!("{}: read back: {error}", self.id));
            assert!(read.iter().all(|byte| *byte == 0x5a), "{}: lost at {offset:#x}", self.id);
        }
        block_on(backend.close()).expect("no loop").expect("nothing to write");
        if !self.expected.marked {
            self.judge_check(path, before);
        }
    }

    /// F4.
    fn judge_check(&self, path: &Path, before: &[u8]) {
        let after = image::check(path);
        if after == Some(Check::CLEAN) {
            return;
        }
        let sandbox = Sandbox::in_memory();
        let before = image::check(&sandbox.put("before.qcow2", before));
        let no_worse = match (before, after) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(before), Some(after)) => {
                after.corruptions <= before.corruptions
                    && after.errors <= before.errors
                    && (after.leaks <= before.leaks || self.leaks)
            }
        };
        assert!(no_worse, "{}: check said {before:?}, now {after:?}", self.id);
    }

    fn open(&self, layer: &Blockplex, options: OpenOptions) -> Result<Backend> {
        block_on(layer.open("disk", options)).expect("no loop")
    }

    fn judge_fate(&self, what: &str, fate: Fate, result: Result<(), &Error>) {
        match (result, fate) {
            (Err(error), Fails) => {
                assert_eq!(error.errno(), libc::EIO, "{}: {what}: {error}", self.id);
                self.judge_text(error);
            }
            (Err(error), Either) => drop(self.judge_text(error)),
            (Ok(()), Fine | Either) => {}
            (Ok(()), Fails) => panic!("{}: the {what} request succeeds", self.id),
            (Err(error), Fine) => panic!("{}: the {what} request fails: {error}", self.id),
        }
    }

    fn judge_refusal(&self, layer: &Blockplex, error: &Error) {
        let text = self.judge_text(error);
        for word in &self.says {
            assert!(text.contains(word.as_str()), "{}: no '{word}' in: {text}", self.id);
        }
        let nodes = layer.graph().topology().nodes().count();
        assert_eq!(nodes, 0, "{}: nodes stay behind a refusal", self.id);
    }

    /// F3; and the control thread has not died over it (F1).
    fn judge_text(&self, error: &Error) -> String {
        let text = error.to_string();
        assert!(!text.chars().any(char::is_control), "{}: {text:?}", self.id);
        assert!(text.len() < 4096, "{}: a text of {} bytes", self.id, text.len());
        assert_ne!(error.kind(), ErrorKind::Gone, "{}: {text}", self.id);
        text
    }
}

/// The bytes of a file; of one that a damaged entry has made enormous, the first of them.
fn beginning(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    let file = fs::File::open(path).expect("it is there");
    file.take(256 << 20).read_to_end(&mut bytes).expect("a file can be read");
    bytes
}

/// Judges all rows.
pub fn judge(rows: impl IntoIterator<Item = Row>) {
    rows.into_iter().for_each(Row::judge);
}

/// Where the requests go: offset and length, if the disk has the place at all.
fn places(backend: &Backend) -> impl Iterator<Item = Option<(u64, usize)>> {
    let length = backend.length().expect("it has a root");
    [0, FAR].into_iter().map(move |offset| {
        let rest = length.saturating_sub(offset).min(0x10000) as usize;
        (rest > 0).then_some((offset, rest))
    })
}

/// Runs `work` on a thread of its own, and panics when it takes too long. Passes a panic on.
pub fn bounded<T: Send + 'static>(what: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = channel();
    let thread = thread::spawn(move || {
        // Nobody listens any more when the limit has passed.
        drop(sender.send(work()));
    });
    match receiver.recv_timeout(LIMIT) {
        Ok(value) => value,
        Err(RecvTimeoutError::Timeout) => panic!("{what}: no end in {LIMIT:?}"),
        Err(RecvTimeoutError::Disconnected) => match thread.join() {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(()) => panic!("{what}: ended without a result"),
        },
    }
}
