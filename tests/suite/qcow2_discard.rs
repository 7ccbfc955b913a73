//! What discards and zeros leave in a qcow2 image under each rule, next to what the peer leaves.

use blockplex::{Backend, Blockplex, OpenOptions, Request, block_on};
use blockplex_tests::image::{self, Check, Sandbox, qemu_img, succeed, text};
use serde_json::Value;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

/// One request: the peer's command, and ours.
#[derive(Clone, Copy)]
enum Step {
    Write(u64, u64),
    Zero(u64, u64),
    Unmap(u64, u64),
    Discard(u64, u64),
}

use Step::{Discard, Unmap, Write, Zero};

impl Step {
    fn command(self) -> String {
        match self {
            Write(at, length) => format!("write -P 1 {at} {length}"),
            Zero(at, length) => format!("write -z {at} {length}"),
            Unmap(at, length) => format!("write -z -u {at} {length}"),
            Discard(at, length) => format!("discard {at} {length}"),
        }
    }

    fn run(self, backend: &Backend) {
        let disk = backend.blocking();
        let request = match self {
            Write(at, length) => {
                return disk.write(at, &vec![1; length as usize]).expect("a write");
            }
            Zero(at, length) => Request::write_zeroes(at, length),
            Unmap(at, length) => Request::write_zeroes(at, length).may_unmap(),
            Discard(at, length) => Request::discard(at, length),
        };
        disk.run(request).expect("runs").result.expect("succeeds");
    }
}

const KIB: u64 = 1024;
const STEPS: [Step; 8] = [
    Write(0, 1024 * KIB),
    Discard(64 * KIB, 128 * KIB),
    Zero(256 * KIB, 64 * KIB),
    Unmap(384 * KIB, 64 * KIB),
    Discard(500 * KIB, 100 * KIB),
    Unmap(700 * KIB, 100 * KIB),
    Write(96 * KIB, 4 * KIB),
    Discard(256 * KIB, 64 * KIB),
];

fn description(path: &Path, rules: &str) -> String {
    format!("driver=qcow2,{rules}file.driver=file,file.filename={}", text(path))
}

fn by_peer(path: &Path, rules: &str) {
    let mut command = Command::new("qemu-io");
    for step in STEPS {
        command.args(["-c", &step.command()]);
    }
    command.args(["--image-opts", &description(path, rules)]);
    succeed(&command.output().expect("qemu-io is installed"), rules);
}

fn by_us(path: &Path, rules: &str) {
    let layer = Blockplex::new().expect("a layer");
    let options = OpenOptions::parse(&description(path, rules)).expect("options");
    let backend = block_on(layer.open("disk", options)).expect("no loop").expect("opens");
    for step in STEPS {
        step.run(&backend);
    }
    block_on(backend.close()).expect("no loop").expect("closes");
}

/// The peer's map, with whether there is a place instead of where, which is each one's own choice.
fn map(path: &Path) -> Vec<String> {
    let output = qemu_img(&["map", "-f", "qcow2", "--output=json", text(path)]);
    succeed(&output, "map");
    let rows: Vec<Value> = serde_json::from_slice(&output.stdout).expect("JSON");
    let mut sectors = Vec::new();
    for row in rows {
        let [start, length] = ["start", "length"].map(|name| row[name].as_u64().expect("a number"));
        let offset = row.get("offset").is_some();
        // Data that is a hole in the file is data: what of a cluster is written is each one's choice.
        let text = format!("{} {} {offset}", row["present"], row["data"]);
        sectors.extend((start / 512..(start + length) / 512).map(|_| text.clone()));
    }
    sectors
}

#[test]
fn rules_for_discards_do_what_they_do_with_the_peer() {
    for options in ["cluster_size=64k", "cluster_size=4k", "cluster_size=64k,refcount_bits=1"] {
        for discard in ["discard=ignore,", "discard=unmap,"] {
            for pass in ["", "pass-discard-request=off,", "pass-discard-other=on,"] {
                for keep in ["", "discard-no-unref=on,"] {
                    let rules = format!("{discard}{pass}{keep}");
                    let sandbox = Sandbox::new();
                    let (peer, ours) = (sandbox.at("peer"), sandbox.at("ours"));
                    for path in [&peer, &ours] {
                        sandbox.create(path, options, "1M");
                    }
                    by_peer(&peer, &rules);
                    by_us(&ours, &rules);
                    for (sector, (our, peers)) in map(&ours).iter().zip(map(&peer)).enumerate() {
                        assert_eq!(*our, peers, "{options} {rules}: sector {sector}");
                    }
                    assert_eq!(image::check(&ours), Some(Check::CLEAN), "{options} {rules}");
                    assert!(image::guest_bytes(&ours, None) == image::guest_bytes(&peer, None));
                    // And the holes in the file: none, or about as much as the peer's.
                    let taken = |path: &Path| path.metadata().expect("it is there").blocks() * 512;
                    let (peers, our) = (taken(&peer), taken(&ours));
                    assert!(our.abs_diff(peers) <= 128 << 10, "{options} {rules}: {our} {peers}");
                }
            }
        }
    }
}

#[test]
fn discard_no_unref_needs_version_3() {
    let sandbox = Sandbox::new();
    let path = sandbox.at("image");
    sandbox.create(&path, "compat=0.10", "1M");
    let layer = Blockplex::new().expect("a layer");
    let text = description(&path, "discard-no-unref=on,");
    let options = OpenOptions::parse(&text).expect("options");
    let error = block_on(layer.open("disk", options)).expect("no loop").expect_err("version 2");
    assert!(error.to_string().contains("discard-no-unref"), "{error}");
}
