//! What the tests share: images made and judged by the peer's tools, files in memory that keep a
//! journal, and an open image with its graph.

pub(crate) mod rig;
pub(crate) mod volume;

use std::path::{Path, PathBuf};
use std::process::Command;

/// A folder for the images of one test, gone with it.
pub(crate) struct Scratch {
    directory: tempfile::TempDir,
    made: std::cell::Cell<u32>,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        Scratch { directory: tempfile::tempdir().unwrap(), made: std::cell::Cell::new(0) }
    }

    /// A path for an image that does not exist yet.
    pub(crate) fn path(&self) -> String {
        self.made.set(self.made.get() + 1);
        let path: PathBuf = self.directory.path().join(format!("{}.img", self.made.get()));
        path.to_str().unwrap().to_owned()
    }

    /// The path of a fresh image made by the peer.
    pub(crate) fn create(&self, options: &str, size: &str) -> String {
        let path = self.path();
        let mut arguments = vec!["create", "-q", "-u", "-f", "qcow2"];
        if !options.is_empty() {
            arguments.extend(["-o", options]);
        }
        arguments.extend([path.as_str(), size]);
        self.qemu_img(&arguments);
        path
    }

    /// What `qemu-img` said; it must succeed.
    pub(crate) fn qemu_img(&self, arguments: &[&str]) -> String {
        run("qemu-img", arguments)
    }

    pub(crate) fn qemu_io(&self, image: &str, command: &str) -> String {
        run("qemu-io", &["-f", "qcow2", "-c", command, image])
    }

    /// `qemu-img check` finds no corruption; leaks are allowed.
    pub(crate) fn check_allowing_leaks(&self, image: &str) {
        let output = Command::new("qemu-img").args(["check", "-q", image]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        assert!(matches!(output.status.code(), Some(0 | 3)), "{text}");
    }

    /// `qemu-img check` finds nothing but leaks and clusters that are ours alone without saying so,
    /// which costs a copy and no more.
    pub(crate) fn check_harmless(&self, image: &str) {
        let output = Command::new("qemu-img").args(["check", image]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        for line in text.lines().filter(|line| line.starts_with("ERROR")) {
            let harmless = line.contains("OFLAG_COPIED") && line.ends_with("refcount=1");
            assert!(harmless, "{text}");
        }
        assert!(matches!(output.status.code(), Some(0 | 2 | 3)), "{text}");
    }

    /// `qemu-img check` finds nothing but leaks.
    pub(crate) fn check_sound(&self, image: &str) {
        let output = Command::new("qemu-img").args(["check", "-q", image]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(matches!(output.status.code(), Some(0 | 3)), "{text}");
    }

    /// `qemu-img check` finds nothing at all.
    pub(crate) fn check_clean(&self, image: &str) {
        self.qemu_img(&["check", "-q", image]);
    }

    /// What the peer reads from the whole image.
    pub(crate) fn contents(&self, image: &str) -> Vec<u8> {
        let raw = self.path();
        self.qemu_img(&["convert", "-f", "qcow2", "-O", "raw", image, &raw]);
        self.read(&raw)
    }

    pub(crate) fn read(&self, path: &str) -> Vec<u8> {
        std::fs::read(Path::new(path)).unwrap()
    }
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}
