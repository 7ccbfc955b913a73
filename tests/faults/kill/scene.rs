//! A tool that is killed: the files it works on, when it dies, and what is asked of them then.
//!
//! With `BLOCKPLEX_KILL=calls`, and `strace` installed, it dies at a call of `io_uring_enter` rather
//! than at a time, so that each round falls between two operations.

use super::super::image::{self, Sandbox, succeed, text};
use super::super::interop::Random;
use super::super::tool_mutation::seeds;
use super::super::tools::{Kind, run};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How often each command is killed in the gate.
const ROUNDS: u64 = 2;

/// Starts `blockplex` with a command line of ours.
pub fn start(sandbox: &Sandbox, kind: Kind, line: &str, file: &Path, input: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_blockplex"))
        .args(kind.words(line, sandbox, file))
        .current_dir(sandbox.path())
        .stdin(fs::File::open(input).expect("it is there"))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("our program")
}

/// Lets it run for some time, and kills it. Gives what it printed.
pub fn kill(mut child: Child, after: Duration) -> String {
    sleep(after);
    // It may have ended by itself.
    drop(child.kill());
    let mut printed = Vec::new();
    child.stdout.take().expect("a pipe").read_to_end(&mut printed).expect("a pipe can be read");
    child.wait().expect("our child");
    String::from_utf8_lossy(&printed).into_owned()
}

/// When a tool dies.
#[derive(Clone, Copy)]
enum Moments {
    /// After so long at most.
    Time(Duration),
    /// At one of so many calls of a thread.
    Calls(u64),
}

impl Moments {
    /// Of a tool that does all its work, on copies of the files.
    fn of(what: &str, ready: &Sandbox, kind: Kind, line: &str) -> Moments {
        let sandbox = copy(ready);
        let file = sandbox.at(IMAGE);
        if std::env::var("BLOCKPLEX_KILL").is_ok_and(|what| what == "calls") {
            let said = strace(&sandbox, kind, line, &["-C"]);
            let counts = String::from_utf8_lossy(&said.stderr).into_owned();
            let total = counts.lines().rfind(|line| line.contains("io_uring_enter"));
            let count = total.and_then(|line| line.split_whitespace().nth(3)?.parse().ok());
            return Moments::Calls(count.unwrap_or_else(|| panic!("{what}: {counts}")));
        }
        let begun = Instant::now();
        let (status, said) = run(what, &sandbox, kind, line, &file);
        assert!(matches!(status, 0 | 3), "{what}: {said:?}");
        Moments::Time(begun.elapsed())
    }

    /// Runs it until one of them.
    fn strike(self, random: &mut Random, sandbox: &Sandbox, kind: Kind, line: &str) {
        match self {
            Moments::Time(whole) => {
                let file = sandbox.at(IMAGE);
                let child = start(sandbox, kind, line, &file, Path::new("/dev/null"));
                kill(child, Duration::from_micros(random.below(whole.as_micros() as u64)));
            }
            Moments::Calls(count) => {
                let nth = 1 + random.below(count);
                let rule = format!("inject=io_uring_enter:signal=KILL:when={nth}");
                strace(sandbox, kind, line, &["-e", &rule]);
            }
        }
    }
}

fn strace(sandbox: &Sandbox, kind: Kind, line: &str, options: &[&str]) -> Output {
    Command::new("strace")
        .args(["-f", "-e", "trace=io_uring_enter"])
        .args(options)
        .arg(env!("CARGO_BIN_EXE_blockplex"))
        .args(kind.words(line, sandbox, &sandbox.at(IMAGE)))
        .current_dir(sandbox.path())
        .output()
        .expect("strace is installed")
}

/// What `FILE` stands for.
pub const IMAGE: &str = "image.qcow2";

/// The same files in another place.
fn copy(from: &Sandbox) -> Sandbox {
    let to = Sandbox::in_memory();
    for entry in fs::read_dir(from.path()).expect("a directory") {
        let path = entry.expect("a directory").path();
        let name = path.file_name().expect("a file").to_str().expect("a plain name");
        to.put(name, &fs::read(&path).expect("it is there"));
    }
    to
}

/// Kills the tool with this command line on copies of the files that are `ready`, round after
/// round, and asks `judge` each time.
pub fn attack(ready: &Sandbox, kind: Kind, line: &str, judge: impl Fn(&Scene)) {
    let moments = Moments::of(line, ready, kind, line);
    for seed in seeds(ROUNDS) {
        let mut random = Random::new(seed);
        let sandbox = copy(ready);
        moments.strike(&mut random, &sandbox, kind, line);
        let scene = Scene {
            what: format!("{line}, seed {seed}"),
            kind,
            sandbox,
            ours: seed.is_multiple_of(2),
        };
        judge(&scene);
    }
}

/// What a killed tool left.
pub struct Scene {
    /// What happened.
    pub what: String,
    kind: Kind,
    sandbox: Sandbox,
    /// Whether our tools repair and write before the peer's.
    ours: bool,
}

impl Scene {
    pub fn new(what: String, kind: Kind, sandbox: Sandbox, ours: bool) -> Scene {
        Scene { what, kind, sandbox, ours }
    }

    /// Where a file is.
    pub fn at(&self, name: &str) -> PathBuf {
        self.sandbox.at(name)
    }

    /// The bytes of a file.
    pub fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.at(name)).unwrap_or_else(|error| panic!("{}: {name}: {error}", self.what))
    }

    /// One of our tools, which runs to its end. Gives its status.
    pub fn run(&self, line: &str, name: &str) -> (i32, Output) {
        run(&self.what, &self.sandbox, self.kind, line, &self.at(name))
    }

    /// Runs one of our tools, which succeeds.
    pub fn succeed(&self, line: &str, name: &str) {
        let (status, said) = self.run(line, name);
        assert_eq!(status, 0, "{}: {line}: {said:?}", self.what);
    }

    /// `qemu-img`, with a command line of ours.
    pub fn peer(&self, line: &str, name: &str) -> Output {
        peer(&self.sandbox, self.kind, line, &self.at(name))
    }

    /// Waits until the kernel has let go of the files of who was killed, and so of their locks.
    pub fn wait(&self, name: &str) {
        let locked = || {
            let said = self.peer("img check -f qcow2 FILE", name);
            String::from_utf8_lossy(&said.stderr).contains("lock")
        };
        let begun = Instant::now();
        while locked() {
            assert!(begun.elapsed() < Duration::from_secs(20), "{}: stays locked", self.what);
            sleep(Duration::from_millis(10));
        }
    }

    /// Asserts that an image is sound: clusters may leak; a dirty image may need a repair.
    pub fn is_sound(&self, name: &str) {
        self.wait(name);
        let dirty = self.bytes(name)[79] & 1 != 0;
        let repair = "img check -f qcow2 -r all FILE";
        if dirty && self.ours {
            self.succeed(repair, name);
        } else if dirty {
            let said = self.peer(repair, name);
            assert_eq!(said.status.code(), Some(0), "{}: {said:?}", self.what);
        }
        let line = "img check -f qcow2 FILE";
        let (theirs, (_, ours)) = (self.peer(line, name), self.run(line, name));
        // Version 2 has no dirty bit: flags of a snapshot may be clear that could be set.
        let is_old = self.bytes(name)[7] == 2;
        for said in [theirs, ours] {
            let text = String::from_utf8_lossy(&said.stderr).into_owned();
            let mut errors = text.lines().filter(|line| line.starts_with("ERROR"));
            let harmless =
                |line: &str| line.contains("OFLAG_COPIED") && line.ends_with("refcount=1");
            let fine = match said.status.code() {
                Some(0 | 3) => true,
                Some(2) => is_old && errors.all(harmless),
                _ => false,
            };
            assert!(fine, "{}: {name}: {said:?}", self.what);
        }
    }

    /// The guest's bytes, as the peer reads them.
    pub fn guest(&self, name: &str) -> Vec<u8> {
        guest(&self.what, &self.sandbox, self.kind, "", &self.at(name))
    }

    /// What the guest saw when an internal snapshot was taken.
    pub fn snapshot(&self, name: &str, snapshot: &str) -> Vec<u8> {
        guest(&self.what, &self.sandbox, self.kind, &format!("-l {snapshot} "), &self.at(name))
    }

    /// Asserts that the peer and we write to an image, and that both read what is there then.
    pub fn takes_writes(&self, name: &str) {
        let mut expected = self.guest(name);
        let ours = || self.succeed("io -f qcow2 -c write_-q_-P_5_0_4k -c flush FILE", name);
        let theirs = || {
            let words = self.kind.words(
                "io -f qcow2 -c write_-P_5_4k_4k FILE",
                &self.sandbox,
                &self.at(name),
            );
            let said = Command::new("qemu-io").args(&words[1..]).output();
            succeed(&said.expect("qemu-io is installed"), &self.what);
        };
        if self.ours {
            ours();
            theirs();
        } else {
            theirs();
            ours();
        }
        expected[..8192].fill(5);
        assert_same(&self.what, &self.guest(name), &expected);
        let out = self.at("out");
        self.succeed("img convert -f qcow2 -O raw FILE OUT", name);
        assert_same(&self.what, &fs::read(out).expect("it was just made"), &expected);
        self.is_sound(name);
    }
}

/// `qemu-img`, with a command line of ours.
pub fn peer(sandbox: &Sandbox, kind: Kind, line: &str, file: &Path) -> Output {
    let words = kind.words(line, sandbox, file);
    image::qemu_img(&words[1..].iter().map(String::as_str).collect::<Vec<_>>())
}

/// The guest's bytes, as the peer reads them; with options of a conversion.
pub fn guest(what: &str, sandbox: &Sandbox, kind: Kind, options: &str, file: &Path) -> Vec<u8> {
    let line = format!("img convert -f qcow2 {options}-O raw FILE OUT");
    succeed(&peer(sandbox, kind, &line, file), what);
    fs::read(sandbox.at("out")).expect("it was just made")
}

/// Asserts that two disks are alike, and says where they are not.
pub fn assert_same(what: &str, found: &[u8], expected: &[u8]) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    if found != expected {
        let wrong = found.iter().zip(expected).position(|(found, expected)| found != expected);
        let at = wrong.expect("they differ");
        panic!("{what}: {} at {at:#x}, not {}", found[at], expected[at]);
    }
}

/// Asserts that each sector is one of the disks', each of which ends in zeros.
pub fn assert_either(what: &str, found: &[u8], disks: &[&[u8]]) {
    const ZEROS: [u8; 512] = [0; 512];
    for (number, sector) in found.chunks(512).enumerate() {
        let at = number * 512;
        let is_of = |disk: &&[u8]| {
            let theirs = disk.get(at..).unwrap_or_default();
            let (own, rest) = sector.split_at(theirs.len().min(sector.len()));
            theirs.starts_with(own) && ZEROS.starts_with(rest)
        };
        assert!(disks.iter().any(is_of), "{what}: {} at {at:#x} is of none", sector[0]);
    }
}

/// An image of the peer in `sandbox`, after some commands of its I/O tool.
pub fn make(sandbox: &Sandbox, name: &str, options: &str, size: &str, commands: &[&str]) {
    let path = sandbox.at(name);
    sandbox.create(&path, options, size);
    if !commands.is_empty() {
        image::qemu_io(&path, commands);
    }
}

/// `qemu-img` with these words, of which `IMAGE` is the image in `sandbox`.
pub fn prepare(sandbox: &Sandbox, words: &str) {
    let path = sandbox.at(IMAGE);
    let of = |word| if word == "IMAGE" { text(&path) } else { word };
    let words: Vec<&str> = words.split(' ').map(of).collect();
    succeed(&image::qemu_img(&words), &words.join(" "));
}
