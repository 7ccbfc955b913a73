//! Two folders, two sets of programs, one command line.

use crate::mask::mask;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

/// A folder for QEMU's programs and one for ours, with the same files in them.
pub struct Pair {
    root: TempDir,
    /// Our programs let images open whatever they name, as QEMU's do.
    trusting: bool,
}

/// What both programs answered.
#[derive(Debug)]
pub struct Answer {
    /// The exit status.
    pub status: i32,
}

impl Pair {
    /// Two empty folders, and our programs under QEMU's names.
    pub fn new() -> Pair {
        let root = tempfile::tempdir().unwrap();
        for folder in ["theirs", "ours", "bin"] {
            std::fs::create_dir(root.path().join(folder)).unwrap();
        }
        for name in ["qemu-img", "qemu-io"] {
            let link = root.path().join("bin").join(name);
            std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_blockplex"), link).unwrap();
        }
        Pair { root, trusting: false }
    }

    /// The same; images may open whatever they name.
    pub fn trusting() -> Pair {
        Pair { trusting: true, ..Pair::new() }
    }

    /// The folder of our images.
    fn ours(&self) -> PathBuf {
        self.root.path().join("ours")
    }

    /// The folder of QEMU's images.
    fn theirs(&self) -> PathBuf {
        self.root.path().join("theirs")
    }

    /// Runs a command line (`qemu-img create -f qcow2 a 1M`; words are cut at spaces) in both
    /// folders and demands the same answer.
    #[track_caller]
    pub fn run(&self, line: &str) -> Answer {
        let words: Vec<&str> = line.split_whitespace().collect();
        self.run_words(&words)
    }

    /// As [`Pair::run`], with the words given one by one.
    #[track_caller]
    pub fn run_words(&self, words: &[&str]) -> Answer {
        let theirs = self.run_theirs(words);
        let ours = self.run_ours(words);
        let [theirs_text, ours_text] = [&theirs, &ours].map(show);
        assert_eq!(
            ours_text,
            theirs_text,
            "ours (left) and QEMU's (right) differ after: {words:?}\nfolders: {:?}",
            self.root.path()
        );
        Answer { status: code(&ours) }
    }

    /// Has QEMU's program make something in both folders.
    #[track_caller]
    pub fn given(&self, line: &str) {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        self.given_words(&words);
    }

    /// As [`Pair::given`], with the words given one by one.
    #[track_caller]
    pub fn given_words(&self, words: &[String]) {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        for folder in [self.theirs(), self.ours()] {
            let output = run(Path::new(words[0]), &words[1..], &folder);
            assert_eq!(code(&output), 0, "{words:?}: {}", show(&output));
        }
    }

    /// What our program alone answers: its status, and all that it prints.
    pub fn ours_says(&self, line: &str) -> (i32, String) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let output = self.run_ours(&words);
        (code(&output), show(&output))
    }

    /// Changes the same bytes of a file in both folders.
    pub fn poke(&self, name: &str, offset: u64, bytes: &[u8]) {
        use std::os::unix::fs::FileExt;
        for folder in [self.theirs(), self.ours()] {
            let file = std::fs::OpenOptions::new().write(true).open(folder.join(name)).unwrap();
            file.write_all_at(bytes, offset).unwrap();
        }
    }

    /// Some bytes of a file of ours.
    pub fn peek(&self, name: &str, offset: u64, length: usize) -> Vec<u8> {
        use std::os::unix::fs::FileExt;
        let mut bytes = vec![0; length];
        let file = std::fs::File::open(self.ours().join(name)).unwrap();
        file.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    /// As [`Pair::run`], with `input` on stdin.
    #[track_caller]
    pub fn run_input(&self, line: &str, input: &str) -> Answer {
        let words: Vec<&str> = line.split_whitespace().collect();
        let file = self.root.path().join("input");
        std::fs::write(&file, input).unwrap();
        let run = |program: &Path, folder: &Path| {
            let input = std::fs::File::open(&file).unwrap();
            Command::new(program)
                .args(&words[1..])
                .current_dir(folder)
                .stdin(input)
                .output()
                .unwrap_or_else(|error| panic!("{}: {error}", program.display()))
        };
        let theirs = run(Path::new(words[0]), &self.theirs());
        let ours = run(&self.root.path().join("bin").join(words[0]), &self.ours());
        assert_eq!(show(&ours), show(&theirs), "ours (left) and QEMU's (right): {input:?}");
        Answer { status: code(&ours) }
    }

    /// Runs QEMU's program alone.
    pub fn run_theirs(&self, words: &[&str]) -> Output {
        run(Path::new(words[0]), &words[1..], &self.theirs())
    }

    /// Runs our program alone.
    pub fn run_ours(&self, words: &[&str]) -> Output {
        let program = self.root.path().join("bin").join(words[0]);
        let trust: &[&str] = if self.trusting { &["--trust-images"] } else { &[] };
        run(&program, &[trust, &words[1..]].concat(), &self.ours())
    }

    /// Demands that QEMU finds nothing wrong with our image (its own may leak), and that the guest
    /// sees the same bytes in both.
    #[track_caller]
    pub fn same_image(&self, name: &str, format: &str) {
        let output = run(Path::new("qemu-img"), &["check", "-f", format, name], &self.ours());
        assert!(matches!(code(&output), 0 | 63), "our {name}: {}", show(&output));
        let ours = self.ours().join(name);
        let theirs = self.theirs().join(name);
        let [ours, theirs] = [ours, theirs].map(|path| path.to_string_lossy().into_owned());
        let words = ["compare", "-f", format, "-F", format, &theirs, &ours];
        let output = run(Path::new("qemu-img"), &words, self.root.path());
        assert_eq!(code(&output), 0, "{name}: {}", show(&output));
    }
}

fn run(program: &Path, arguments: &[&str], folder: &Path) -> Output {
    Command::new(program)
        .args(arguments)
        .current_dir(folder)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}", program.display()))
}

fn code(output: &Output) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    output.status.code().unwrap_or_else(|| -output.status.signal().unwrap_or(0))
}

/// Status and masked output, for comparison and for messages.
fn show(output: &Output) -> String {
    let text = |bytes: &[u8]| mask(&String::from_utf8_lossy(bytes));
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    format!("status {}\n--- stdout\n{stdout}--- stderr\n{stderr}", code(output))
}
