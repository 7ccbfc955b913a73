//! Who opened which file, as the kernel tells it: no file outside of what was granted is opened,
//! by the library or by the tools.

use super::image::{self, DATA_FILE, Sandbox, backing, be64, extensions, patched, text};
use super::rows::bounded;
use super::tools::{CHANGE, Kind, LOOK, run};
use blockplex::{Blockplex, OpenGate, OpenOptions, block_on};
use rustix::fs::inotify;
use std::fs;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::Path;

/// Sees every open of the files in a directory.
struct Witness(OwnedFd);

impl Witness {
    fn of(directory: &Path) -> Witness {
        let flags = inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC;
        let watcher = inotify::init(flags).expect("inotify");
        inotify::add_watch(&watcher, directory, inotify::WatchFlags::OPEN).expect("a watch");
        Witness(watcher)
    }

    /// The names of what was opened since the last look.
    fn opened(&self) -> Vec<String> {
        let mut memory = [std::mem::MaybeUninit::uninit(); 8192];
        let mut reader = inotify::Reader::new(&self.0, &mut memory);
        let mut names = Vec::new();
        loop {
            match reader.next() {
                Ok(event) => names.push(format!("{:?}", event.file_name())),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return names,
                Err(error) => panic!("inotify: {error}"),
            }
        }
    }
}

/// A directory for the image, and one that is nobody's business, with a file.
fn two_directories() -> (Sandbox, Witness) {
    let sandbox = Sandbox::new();
    for name in ["granted", "secret"] {
        fs::create_dir(sandbox.at(name)).expect("an empty directory");
    }
    sandbox.put("secret/file", image::base());
    symlink("../secret/file", sandbox.at("granted/link")).expect("a link");
    let witness = Witness::of(&sandbox.at("secret"));
    (sandbox, witness)
}

/// Ways to name the file that is nobody's business.
fn names(sandbox: &Sandbox) -> Vec<String> {
    let secret = sandbox.at("secret/file");
    let secret = text(&secret);
    [
        "PATH",
        "../secret/file",
        "./../granted/link",
        "link",
        "file:PATH",
        "raw:PATH",
        "fat:PATH",
        "nbd+unix:///disk?socket=PATH",
        r#"json:{"driver":"raw","file":{"driver":"file","filename":"PATH"}}"#,
        r#"json:{"driver":"file","filename":"PATH"}"#,
        r#"json:{"driver":"qcow2","file.driver":"file","file.filename":"PATH"}"#,
    ]
    .iter()
    .map(|name| name.replace("PATH", secret))
    .collect()
}

fn with_data_file(name: &str) -> Vec<u8> {
    patched(image::base(), &[be64(72, 4), extensions(&[(DATA_FILE, name.as_bytes())])])
}

/// Opens an image for reading and for writing; whatever becomes of it.
fn open(path: &Path, gate: &OpenGate) {
    for read_only in [true, false] {
        let options = OpenOptions::image("qcow2", path).gate(gate.clone());
        let options = options.set("read-only", read_only);
        bounded("an open", move || {
            let layer = Blockplex::new().expect("a layer");
            if let Ok(backend) = block_on(layer.open("disk", options)).expect("no loop") {
                drop(backend.blocking().read_to_vec(0, 512));
                block_on(backend.close()).expect("no loop").expect("closes");
            }
        });
    }
}

#[test]
fn the_library_opens_nothing_outside_of_the_grant() {
    let (sandbox, witness) = two_directories();
    let gates = [
        OpenGate::deny_all(),
        OpenGate::deny_all().allow_directory(sandbox.at("granted")).expect("a directory"),
    ];
    for name in names(&sandbox) {
        let mut images = vec![with_data_file(&name)];
        for format in [None, Some("raw"), Some("qcow2")] {
            images.push(patched(image::base(), &backing(name.as_bytes(), format)));
        }
        for bytes in images {
            let path = sandbox.put("granted/image.qcow2", &bytes);
            for gate in &gates {
                open(&path, gate);
                assert_eq!(witness.opened(), Vec::<String>::new(), "{name}");
            }
        }
    }
    // The witness sees what is granted.
    let path = sandbox.put(
        "granted/image.qcow2",
        &patched(image::base(), &backing(b"../secret/file", Some("qcow2"))),
    );
    open(&path, &OpenGate::deny_all().allow_directory(sandbox.path()).expect("a directory"));
    assert_ne!(witness.opened(), Vec::<String>::new());
}

/// Backing files they follow to local files, for habit's sake; data files not, nor anything that
/// is more than a file name.
#[test]
fn the_tools_open_nothing_that_is_not_granted() {
    let (sandbox, witness) = two_directories();
    let lines = || LOOK.iter().chain(&CHANGE[..3]);
    let judge = |name: &str, bytes: &[u8], lines: &[&str]| {
        for line in lines {
            let path = sandbox.put("granted/image.qcow2", bytes);
            run(name, &sandbox, Kind::Plain, line, &path);
            assert_eq!(witness.opened(), Vec::<String>::new(), "{name}: {line}");
        }
    };
    for name in names(&sandbox) {
        let lines: Vec<&str> = lines().copied().collect();
        judge(&name, &with_data_file(&name), &lines);
        let is_plain = !name.contains(':') || name.starts_with("file:");
        let looks = if is_plain { &LOOK[..2] } else { &lines[..] };
        for format in [None, Some("raw")] {
            judge(&name, &patched(image::base(), &backing(name.as_bytes(), format)), looks);
        }
    }
    // The witness sees what they follow.
    let bytes = patched(image::base(), &backing(b"../secret/file", Some("qcow2")));
    let path = sandbox.put("granted/image.qcow2", &bytes);
    run("followed", &sandbox, Kind::Plain, "io -r -f qcow2 -c read_1M_64k FILE", &path);
    assert_ne!(witness.opened(), Vec::<String>::new());
}
