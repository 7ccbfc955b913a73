//! `qemu-img info`, `map` and `measure`: what is said of images that QEMU made.

use crate::pair::Pair;

/// A chain with data, zeros and compressed clusters, and images with all kinds of options.
fn images() -> Pair {
    let pair = Pair::new();
    for line in [
        "qemu-img create -q -f qcow2 base 4M",
        "qemu-io -f qcow2 -c write\t0\t128k -c write\t-z\t256k\t64k -c write\t-c\t512k\t64k base",
        "qemu-img create -q -f qcow2 -b base -F qcow2 overlay 5M",
        "qemu-io -f qcow2 -c write\t64k\t10k overlay",
        "qemu-img create -q -f raw disk 1M",
        "qemu-io -f raw -c write\t300k\t5k disk",
        "qemu-img create -q -f qcow2 -o compat=0.10 old 1M",
        "qemu-img create -q -f qcow2 -o data_file=data,data_file_raw=on external 1M",
        "qemu-img create -q -f qcow2 -o cluster_size=16k,extended_l2=on fine 1M",
        "qemu-io -f qcow2 -c write\t3k\t1k fine",
        "qemu-img create -q -f qcow2 -o compression_type=zstd,lazy_refcounts=on snap 1M",
        "qemu-img snapshot -c first snap",
        "qemu-img snapshot -c second snap",
        "qemu-img create -q -f qcow2 -u -b gone -F raw alone 1M",
    ] {
        // Tabs stand for the spaces inside of a word.
        pair.given_words(&words(line));
    }
    pair
}

fn words(line: &str) -> Vec<String> {
    line.split(' ').map(|word| word.replace('\t', " ")).collect()
}

const IMAGES: [&str; 9] =
    ["base", "overlay", "disk", "old", "external", "fine", "snap", "alone", "nothing"];

#[test]
fn info_says_the_same_of_every_image() {
    let pair = images();
    for image in IMAGES {
        pair.run(&format!("qemu-img info {image}"));
        pair.run(&format!("qemu-img info --output=json {image}"));
    }
    pair.run("qemu-img info --backing-chain overlay");
    pair.run("qemu-img info --backing-chain --output=json overlay");
    pair.run("qemu-img info --backing-chain alone");
    pair.run("qemu-img info --image-opts driver=qcow2,file.filename=overlay");
    pair.run_words(&["qemu-img", "info", "json:{\"driver\":\"raw\",\"file.filename\":\"base\"}"]);
}

#[test]
fn map_says_the_same_of_every_image() {
    let pair = images();
    for image in IMAGES {
        pair.run(&format!("qemu-img map {image}"));
        pair.run(&format!("qemu-img map --output=json {image}"));
    }
    pair.run("qemu-img map --output=json -s 60k -l 10k overlay");
    pair.run("qemu-img map --output=json -s 5M overlay");
    pair.run("qemu-img map -s -1 overlay");
}

#[test]
fn measure_says_the_same_of_every_image_and_size() {
    let pair = images();
    for image in IMAGES {
        pair.run(&format!("qemu-img measure -O qcow2 {image}"));
        pair.run(&format!("qemu-img measure --output=json -O qcow2 -o cluster_size=4k {image}"));
        pair.run(&format!("qemu-img measure -O raw {image}"));
    }
    pair.run("qemu-img measure -O qcow2 -o preallocation=full --size 1G");
    pair.run("qemu-img measure -O qcow2 --size 7E");
    pair.run("qemu-img measure -O qcow2 -l first snap");
    pair.run("qemu-img measure -O qcow2 -l third snap");
    pair.run("qemu-img measure --size 1G disk");
    pair.run("qemu-img measure");
}

#[test]
fn wrong_command_lines_are_refused_in_the_same_words() {
    let pair = Pair::new();
    for line in [
        "qemu-img",
        "qemu-img nonsense",
        "qemu-img --nonsense",
        "qemu-img info",
        "qemu-img info a b",
        "qemu-img info --o a",
        "qemu-img info --output=x a",
        "qemu-img info --output",
        "qemu-img info -x a",
        "qemu-img info --image-opts -f raw a",
        "qemu-img info foo:bar",
        "qemu-img map -l x a",
        "qemu-img check -r some a",
        "qemu-img check -T some a",
        "qemu-img resize a",
        "qemu-img resize a 1x",
        "qemu-img snapshot -c a -d b c",
        "qemu-img amend a",
        "qemu-img create --object secret,id=a a 1M",
    ] {
        assert_eq!(pair.run(line).status, 1, "{line}");
    }
}
