//! `qemu-img resize`, `snapshot`, `amend` and `check`: images changed by both programs.

use crate::pair::Pair;

#[test]
fn resized_images_are_the_same() {
    let pair = Pair::new();
    for format in ["qcow2", "raw"] {
        pair.run(&format!("qemu-img create -f {format} disk 1M"));
        for size in ["2M", "+1M", "-1M", "1", "+0"] {
            pair.run(&format!("qemu-img resize -f {format} disk {size}"));
            pair.run(&format!("qemu-img resize -f {format} --shrink disk {size}"));
            pair.same_image("disk", format);
        }
        for mode in ["falloc", "full", "nonsense"] {
            pair.run(&format!("qemu-img resize -f {format} --preallocation={mode} disk +1M"));
            pair.same_image("disk", format);
        }
    }
    pair.run("qemu-img create -f raw disk 1M");
    pair.run("qemu-img resize disk 3M");
}

#[test]
fn snapshots_are_taken_applied_and_deleted_alike() {
    let pair = Pair::new();
    pair.given("qemu-img create -q -f qcow2 disk 4M");
    for line in [
        "snapshot -l disk",
        "snapshot -c one disk",
        "snapshot -c two disk",
        "snapshot -c two disk",
        "snapshot -l disk",
        "snapshot -a two disk",
        "snapshot -d two disk",
        "snapshot -d three disk",
        "snapshot -a three disk",
        "snapshot disk",
        "map --output=json disk",
    ] {
        pair.run(&format!("qemu-img {line}"));
        pair.same_image("disk", "qcow2");
    }
}

#[test]
fn amended_images_are_the_same() {
    let pair = Pair::new();
    pair.run("qemu-img create -f qcow2 disk 4M");
    for options in [
        "compat=0.10",
        "compat=1.1,lazy_refcounts=on",
        "refcount_bits=8",
        "size=8M",
        "compat=0.10,refcount_bits=16,size=9M",
        "cluster_size=4k",
        "nonsense=1",
        "backing_file=x",
        "compat=9",
    ] {
        pair.run(&format!("qemu-img amend -f qcow2 -o {options} disk"));
        pair.same_image("disk", "qcow2");
    }
}

#[test]
fn bitmaps_are_changed_alike() {
    let pair = Pair::new();
    pair.given("qemu-img create -q -f qcow2 disk 4M");
    pair.given("qemu-img create -q -f qcow2 other 4M");
    pair.given("qemu-img bitmap --add other b");
    for words in [
        "disk b",
        "--add disk",
        "--add disk b",
        "--add disk b",
        "--add -g 1M --disable disk c",
        "--add -g 3 disk d",
        "--clear -g 1M disk b",
        "--enable disk c",
        "--merge b disk c",
        "--merge x disk c",
        "-b other -F qcow2 --merge b disk c",
        "-b other --add disk e",
        "--clear --disable disk b",
        "--remove disk x",
        "--remove disk b",
    ] {
        pair.run(&format!("qemu-img bitmap {words}"));
        pair.run("qemu-img map --output=json disk");
        pair.run("qemu-img measure -O qcow2 disk");
        pair.same_image("disk", "qcow2");
    }
}

/// An image of which one cluster is used by nobody.
fn leaky() -> Pair {
    let pair = Pair::new();
    pair.given("qemu-img create -q -f qcow2 -o preallocation=metadata disk 4M");
    // The first entry of the L2 table, which follows header, refcounts and L1 table.
    pair.poke("disk", 4 << 16, &[0; 8]);
    pair
}

#[test]
fn damage_is_found_and_repaired_alike() {
    for line in ["check disk", "check --output=json disk", "check -q disk"] {
        assert_eq!(leaky().run(&format!("qemu-img {line}")).status, 3, "{line}");
    }
    for line in ["check -r leaks disk", "check -r all --output=json disk"] {
        let pair = leaky();
        assert_eq!(pair.run(&format!("qemu-img {line}")).status, 0, "{line}");
        pair.run("qemu-img check disk");
        pair.same_image("disk", "qcow2");
    }
    let pair = Pair::new();
    pair.run("qemu-img create -f raw disk 1M");
    assert_eq!(pair.run("qemu-img check -f raw disk").status, 63);
}

#[test]
fn the_progress_of_an_amendment_is_told_in_the_same_steps() {
    let pair = Pair::new();
    pair.given("qemu-img create -q -f qcow2 base 2G");
    for (snapshot, options) in
        [(false, "compat=0.10"), (true, "compat=0.10"), (false, "lazy_refcounts=on")]
    {
        pair.given("qemu-img create -q -f qcow2 -b base -F qcow2 top");
        pair.given_words(
            &["qemu-io", "-c", "write -z 0 64k", "-c", "write -z 1G 64k", "top"].map(str::to_owned),
        );
        if snapshot {
            pair.given("qemu-img snapshot -c one top");
        }
        pair.run(&format!("qemu-img amend -p -o {options} top"));
        pair.same_image("top", "qcow2");
    }
    pair.run("qemu-img amend -f bochs -o help");
}

#[test]
fn the_progress_of_a_copy_counts_data_alone() {
    let pair = Pair::new();
    pair.given("qemu-img create -q -f qcow2 a 64M");
    pair.given_words(&["qemu-io", "-c", "write 0 1M", "-c", "write 4M 1M", "a"].map(str::to_owned));
    pair.run("qemu-img convert -p -f qcow2 -O qcow2 a b");
}
