//! `qemu-img create`.

use crate::pair::Pair;

#[test]
fn new_images_are_what_qemu_makes_of_the_same_options() {
    let pair = Pair::new();
    for options in ["cluster_size=64k", "compat=0.10", "refcount_bits=1,cluster_size=4k"] {
        pair.run(&format!("qemu-img create -f qcow2 -o {options} disk 10M"));
        pair.same_image("disk", "qcow2");
    }
    pair.run("qemu-img create -f raw disk 1M");
    pair.same_image("disk", "raw");
}

#[test]
fn options_that_cannot_be_are_refused_in_the_same_words() {
    let pair = Pair::new();
    for words in [
        "create -f qcow2 disk",
        "create -f qcow2 -o cluster_size=3k disk 1M",
        "create -f qcow2 -o refcount_bits=3 disk 1M",
        "create -f nonsense disk 1M",
        "create disk 1X",
        "create -f bochs disk 1M",
        "create -f qcow2 disk -- -1024",
        "create -f qcow2 disk -- -1k",
        "create -f qcow2 disk 16E",
        "create -f qcow2 disk 18446744073709551616",
        "create -f qcow2 disk 18446744073709551616k",
        "create -f qcow2 -o size=-1024 disk",
        "create -f qcow2 -o size=-1k disk",
        "create -f qcow2 -o size=16E disk",
        "create -f qcow2 -o size=x disk",
    ] {
        let answer = pair.run(&format!("qemu-img {words}"));
        assert_eq!(answer.status, 1, "{words}");
    }
}
