//! Our image tools on malformed images, each command a process of its own.
//!
//! F7. It ends by itself and says so in its status: no panic, no signal, no hang, within a budget
//!     of memory. What it prints holds no control characters of the image's.
//! F8. What only looks changes nothing; nor does what is refused, nor a repair that fails.
//! F9. `check` does not call clean what the driver finds corrupt or refuses; `check -r all` ends
//!     clean, and the second one has nothing to do.

use super::image::{Sandbox, text};
use super::rows::Expected;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

/// After so many seconds a command hangs.
const LIMIT: &str = "30";
/// What it may allocate: `RLIMIT_DATA`, with the stacks of its threads in it.
const MEMORY: &str = "--data=268435456";
/// What `timeout` says of a command that it had to kill.
const KILLED: i32 = 137;
/// The status of a Rust program that panics.
const PANICKED: i32 = 101;

/// Commands that only look. `FILE` is the image, `OUT` another file.
pub const LOOK: [&str; 10] = [
    "img info FILE",
    "img info -f qcow2 --output json FILE",
    "img check -f qcow2 FILE",
    "img map -f qcow2 --output json FILE",
    "img measure -f qcow2 -O qcow2 FILE",
    "img convert -f qcow2 -O raw FILE OUT",
    "img convert -f qcow2 -l 1 -O qcow2 FILE OUT",
    "img snapshot -l FILE",
    "img compare -f qcow2 -F qcow2 FILE FILE",
    "io -r -f qcow2 -c read_0_64k -c map -c read_40M_64k FILE",
];

/// Commands that change what they open for writing.
pub const CHANGE: [&str; 12] = [
    "io -f qcow2 -c write_0_4k -c flush -c write_-z_40M_64k -c discard_0_64k -c flush FILE",
    "io -f qcow2 -c write_-c_64k_64k -c truncate_65M -c flush FILE",
    "img amend -f qcow2 -o lazy_refcounts=on FILE",
    "img amend -f qcow2 -o compat=0.10 FILE",
    "img amend -f qcow2 -o refcount_bits=64 FILE",
    "img resize -f qcow2 FILE +1M",
    "img resize -f qcow2 --shrink FILE 1M",
    "img snapshot -c new FILE",
    "img snapshot -d 1 FILE",
    "img snapshot -a 1 FILE",
    "img bitmap --add --clear -f qcow2 FILE new",
    "img rebase -u -f qcow2 -b  FILE",
];

/// The secret that opens an encrypted image.
pub const KEY: &str = "secret,id=s,data=hush";

/// How an image is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// By its file.
    Plain,
    /// With its key.
    Encrypted,
}

impl Kind {
    /// The words of a command line; spaces in a command of `io` are written as `_`.
    pub fn words(self, line: &str, sandbox: &Sandbox, file: &Path) -> Vec<String> {
        let file = text(file);
        let (line, disk) = match self {
            Kind::Plain => (line.to_owned(), vec![file.to_owned()]),
            Kind::Encrypted => {
                let options = format!("driver=qcow2,encrypt.key-secret=s,file.filename={file}");
                let words = ["--object", KEY, "--image-opts", &options];
                (line.replace("-f qcow2 ", ""), words.map(str::to_owned).into())
            }
        };
        line.split(' ')
            .flat_map(|word| match word {
                "FILE" => disk.clone(),
                "OUT" => vec![text(&sandbox.at("out")).to_owned()],
                // Options have underscores of their own.
                _ if line.starts_with("io ") => vec![word.replace('_', " ")],
                _ => vec![word.to_owned()],
            })
            .collect()
    }
}

/// Runs `blockplex` in `sandbox`. F7.
pub fn run(what: &str, sandbox: &Sandbox, kind: Kind, line: &str, file: &Path) -> (i32, Output) {
    let output = Command::new("timeout")
        .args(["-s", "KILL", LIMIT, "prlimit", MEMORY, env!("CARGO_BIN_EXE_blockplex")])
        .args(kind.words(line, sandbox, file))
        .current_dir(sandbox.path())
        .output()
        .expect("timeout and prlimit are installed");
    let shown = || {
        let [out, err] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
        format!("{what}: {line}: {}\n{out:.2000}{err:.2000}", output.status)
    };
    let status = output.status.code().unwrap_or_else(|| panic!("signal: {}", shown()));
    assert!(status != KILLED && status < 128, "killed: {}", shown());
    assert!(status != PANICKED, "panic: {}", shown());
    for bytes in [&output.stdout, &output.stderr] {
        let printed = String::from_utf8(bytes.clone());
        let printed = printed.unwrap_or_else(|_| panic!("bytes that are no text: {}", shown()));
        let forged = printed.chars().any(|letter| letter.is_control() && letter != '\n');
        assert!(!forged, "control characters: {}", shown());
    }
    (status, output)
}

/// Whether a file, which may have holes of terabytes, is still what it was.
fn is_same(path: &Path, bytes: &[u8]) -> bool {
    let length = fs::metadata(path).expect("it is there").len();
    length == bytes.len() as u64 && fs::read(path).expect("it is there") == bytes
}

/// What became of a command.
pub struct Ran {
    line: &'static str,
    status: i32,
    /// The image is what it was.
    same: bool,
}

/// F7 and F8, and of F9 what holds of any image. Gives what became of each command.
pub fn survive(what: &str, kind: Kind, bytes: &[u8]) -> Vec<Ran> {
    let sandbox = Sandbox::in_memory();
    let path = sandbox.put("image.qcow2", bytes);
    // Some name it.
    sandbox.put("data.raw", &[0x11; 0x10000]);
    let mut ran = Vec::new();
    for line in LOOK {
        let (status, _) = run(what, &sandbox, kind, line, &path);
        assert!(is_same(&path, bytes), "{what}: changed by: {line}");
        ran.push(Ran { line, status, same: true });
    }
    let mut same = true;
    for line in CHANGE {
        if !same {
            sandbox.put("image.qcow2", bytes);
        }
        let (status, _) = run(what, &sandbox, kind, line, &path);
        same = is_same(&path, bytes);
        ran.push(Ran { line, status, same });
    }
    judge_repair(what, kind, &sandbox, bytes);
    ran
}

/// F9.
fn judge_repair(what: &str, kind: Kind, sandbox: &Sandbox, bytes: &[u8]) {
    let path = sandbox.put("image.qcow2", bytes);
    run(what, sandbox, kind, "img check -f qcow2 -r leaks FILE", &path);
    let path = sandbox.put("image.qcow2", bytes);
    let (status, said) = run(what, sandbox, kind, "img check -f qcow2 -r all FILE", &path);
    if status != 0 {
        assert!(is_same(&path, bytes), "{what}: changed by a repair that failed: {said:?}");
        return;
    }
    let once = fs::read(&path).expect("it is there");
    for line in ["img check -f qcow2 FILE", "img check -f qcow2 -r all FILE"] {
        let (status, said) = run(what, sandbox, kind, line, &path);
        assert_eq!(status, 0, "{what}: not clean after a repair: {line}: {said:?}");
        assert!(is_same(&path, &once), "{what}: changed again by: {line}");
    }
}

/// F7 to F9 of a row.
pub fn judge(what: &str, bytes: &[u8], expected: Expected) {
    for Ran { line, status, same } in survive(what, Kind::Plain, bytes) {
        let looks = LOOK.contains(&line);
        let opens = line.contains("convert") || line.starts_with("io");
        if looks && opens && expected.read_only.is_none() {
            assert_ne!(status, 0, "{what}: succeeds: {line}");
        }
        if !looks && line.starts_with("io") && expected.read_write.is_none() {
            assert_ne!(status, 0, "{what}: succeeds: {line}");
            assert!(same, "{what}: changed by: {line}");
        }
        if expected.marked && line.starts_with("img check") {
            assert_ne!(status, 0, "{what}: called clean");
        }
    }
}
