//! Block status against the peer's map of the same image: every extent, with where it is, how deep,
//! and why it reads as zeros.

use blockplex::{Blockplex, OpenGate, OpenOptions, block_on};
use blockplex_tests::image::{Sandbox, qemu_img, qemu_io, succeed, text};
use serde_json::Value;
use std::path::Path;

/// An extent, as the peer prints it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Extent {
    start: u64,
    length: u64,
    depth: u64,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    offset: Option<u64>,
}

impl Extent {
    /// Whether `next` goes on where this one ends.
    fn takes(&self, next: &Extent) -> bool {
        let as_this =
            Extent { start: self.start, length: self.length, offset: self.offset, ..next.clone() };
        as_this == *self && self.offset.map(|offset| offset + self.length) == next.offset
    }
}

fn peers_map(path: &Path) -> Vec<Extent> {
    let output = qemu_img(&["map", "-f", "qcow2", "--output=json", text(path)]);
    succeed(&output, "map");
    let rows: Vec<Value> = serde_json::from_slice(&output.stdout).expect("JSON");
    let flag = |row: &Value, name: &str| row[name].as_bool().expect("a flag");
    let number = |row: &Value, name: &str| row[name].as_u64();
    rows.iter()
        .map(|row| Extent {
            start: number(row, "start").expect("a number"),
            length: number(row, "length").expect("a number"),
            depth: number(row, "depth").expect("a number"),
            present: flag(row, "present"),
            zero: flag(row, "zero"),
            data: flag(row, "data"),
            compressed: flag(row, "compressed"),
            offset: number(row, "offset"),
        })
        .collect()
}

fn our_map(path: &Path, folder: &Path) -> Vec<Extent> {
    let layer = Blockplex::new().expect("a layer");
    let gate = OpenGate::deny_all().allow_directory(folder).expect("a folder");
    let options = OpenOptions::image("qcow2", path).gate(gate).read_only();
    let backend = block_on(layer.open("disk", options)).expect("no loop").expect("opens");
    let mut map: Vec<Extent> = Vec::new();
    let mut start = 0;
    let length = backend.length().expect("a length");
    while start < length {
        let status = backend.blocking().block_status(start, length - start).expect("a status");
        assert_eq!(status.file.is_some(), status.offset.is_some(), "{status:?}");
        let next = Extent {
            start,
            length: status.length,
            depth: status.depth.into(),
            present: status.is_present(),
            zero: status.zero,
            data: status.data,
            compressed: status.compressed,
            offset: status.offset,
        };
        match map.last_mut() {
            Some(last) if last.takes(&next) => last.length += next.length,
            _ => map.push(next),
        }
        start += status.length;
    }
    block_on(backend.close()).expect("no loop").expect("closes");
    map
}

/// Makes an image by the peer, and compares.
fn judge(options: &str, size: &str, commands: &[&str]) {
    let sandbox = Sandbox::new();
    let path = sandbox.at("image");
    let data = sandbox.at("data");
    sandbox.create(&path, &options.replace("DATA", text(&data)), size);
    qemu_io(&path, commands);
    assert_eq!(our_map(&path, sandbox.path()), peers_map(&path), "{options} {commands:?}");
}

const COMMANDS: &[&str] = &[
    "write -P 1 10k 1k",
    "write -P 2 130k 200k",
    "write -P 3 512k 192k",
    "write -z 192k 64k",
    "write -z -u 576k 64k",
    "discard 640k 64k",
    "write -P 4 900k 100k",
];

#[test]
fn plain_images_have_the_peers_map() {
    for options in ["", "compat=0.10", "cluster_size=512", "cluster_size=4k", "cluster_size=2M"] {
        let zeros = !options.contains("0.10");
        let commands: Vec<_> =
            COMMANDS.iter().copied().filter(|command| zeros || !command.contains("-z")).collect();
        judge(options, "1000k", &commands);
        judge(options, "1025024", &commands[..2]);
    }
}

#[test]
fn subclusters_have_the_peers_map() {
    for options in ["extended_l2=on", "extended_l2=on,cluster_size=16k"] {
        judge(options, "1000k", COMMANDS);
        judge(options, "1000k", &["write -P 1 0 1000k", "write -z 4k 6k", "write -z 256k 128k"]);
    }
}

#[test]
fn data_files_have_the_peers_map() {
    for options in ["data_file=DATA", "data_file=DATA,data_file_raw=on"] {
        judge(options, "1000k", COMMANDS);
        judge(&format!("{options},extended_l2=on"), "1000k", COMMANDS);
    }
}

#[test]
fn preallocated_images_have_the_peers_map() {
    for mode in ["metadata", "falloc", "full"] {
        for options in ["", ",extended_l2=on"] {
            let options = format!("preallocation={mode}{options}");
            judge(&options, "1000k", &[]);
            judge(&options, "1000k", &["write -P 1 100k 1k", "write -z 192k 64k"]);
        }
    }
}

#[test]
fn compressed_clusters_have_the_peers_map() {
    let sandbox = Sandbox::new();
    let raw =
        sandbox.put("raw", &(0..1_000_448_u32).map(|at| (at / 7777) as u8).collect::<Vec<_>>());
    for options in ["cluster_size=64k", "cluster_size=4k", "extended_l2=on"] {
        let path = sandbox.at("image");
        let arguments = [
            "convert",
            "-q",
            "-c",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-o",
            options,
            text(&raw),
            text(&path),
        ];
        succeed(&qemu_img(&arguments), "convert");
        qemu_io(&path, &["write -P 9 300k 100k", "write -z 500k 20k"]);
        assert_eq!(our_map(&path, sandbox.path()), peers_map(&path), "{options}");
    }
}

#[test]
fn chains_have_the_peers_map() {
    let sandbox = Sandbox::new();
    let base = sandbox.at("base");
    succeed(&qemu_img(&["create", "-q", "-f", "raw", text(&base), "200k"]), "create");
    let mut bytes = vec![0; 200 << 10];
    bytes[64 << 10..128 << 10].fill(1);
    std::fs::write(&base, &bytes).expect("a file");
    let (middle, top) = (sandbox.at("middle"), sandbox.at("top"));
    for options in ["", ",extended_l2=on"] {
        for (path, below, format, size) in
            [(&middle, &base, "raw", "1000k"), (&top, &middle, "qcow2", "1200k")]
        {
            let options = format!("backing_file={},backing_fmt={format}{options}", text(below));
            sandbox.create(path, &options, size);
        }
        qemu_io(&middle, &["write -P 1 10k 1k", "write -z 500k 3k", "write -P 3 900k 100k"]);
        qemu_io(&top, &["write -P 4 70k 4k", "write -z 520k 10k", "write -P 5 1100k 3k"]);
        for path in [&middle, &top] {
            assert_eq!(our_map(path, sandbox.path()), peers_map(path), "{options}");
        }
    }
}
