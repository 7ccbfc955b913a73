//! Images that somebody left as they are: dirty, with features of a later time, with headers that make
//! no sense.

use crate::pair::Pair;

/// Runs `qemu-io` with these commands.
fn io(pair: &Pair, name: &str, commands: &[&str]) -> i32 {
    let mut words = vec!["qemu-io", "-f", "qcow2"];
    commands.iter().for_each(|command| words.extend(["-c", command]));
    words.push(name);
    pair.run_words(&words).status
}

#[test]
fn a_killed_writer_of_late_refcounts_leaves_only_data_uncounted() {
    let pair = Pair::new();
    pair.run("qemu-img create -f qcow2 -o lazy_refcounts=on a 64M");
    io(&pair, "a", &["write -P 1 0 512", "flush", "abort"]);
    pair.run("qemu-img check a");
    // Who reads it leaves it as it is, who writes counts anew.
    pair.run_words(&["qemu-io", "-r", "-f", "qcow2", "-c", "read -P 1 0 512", "a"]);
    pair.run("qemu-img check a");
    io(&pair, "a", &["write 0 512"]);
    assert_eq!(pair.run("qemu-img check a").status, 0);
    pair.same_image("a", "qcow2");
    // Of version 2 there is no such mark.
    io(&pair, "a", &["write -P 2 1M 512", "flush", "abort"]);
    pair.run("qemu-img amend -o compat=0.10 a");
    pair.same_image("a", "qcow2");
}

#[test]
fn features_of_a_later_time_are_named_or_forgotten() {
    let pair = Pair::new();
    pair.run("qemu-img create -f qcow2 incompatible 1M");
    pair.poke("incompatible", 72, &(0b101_u64 << 60).to_be_bytes());
    pair.run("qemu-img info incompatible");
    // The feature name table is the first extension: its first entry becomes one for bit 60.
    pair.poke("incompatible", 120, &[0, 60]);
    pair.run("qemu-img info incompatible");
    pair.run("qemu-io -c close incompatible");
    let autoclear = |pair: &Pair, change: &str| {
        pair.run("qemu-img create -q -f qcow2 autoclear 1M");
        pair.poke("autoclear", 88, &(1_u64 << 63).to_be_bytes());
        assert_eq!(pair.run(change).status, 0, "{change}");
        pair.peek("autoclear", 88, 8)
    };
    for (change, kept) in [
        ("qemu-img check autoclear", 1 << 63),
        ("qemu-img check -r leaks autoclear", 0),
        ("qemu-img check -r all autoclear", 0),
        ("qemu-img amend -o lazy_refcounts=on autoclear", 0),
    ] {
        assert_eq!(autoclear(&pair, change), u64::to_be_bytes(kept), "{change}");
    }
}

#[test]
fn headers_that_make_no_sense_are_refused_in_the_same_words() {
    let pair = Pair::new();
    for (offset, bytes) in [
        (8, &u64::MAX.to_be_bytes()[..]),
        (24, &(1_u64 << 60).to_be_bytes()),
        (36, &[0; 4]),
        (36, &[0, 1, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0]),
        (40, &0x8000_0000_0000_0000_u64.to_be_bytes()),
        (60, &[0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0]),
        (100, &[0x7f, 0xff, 0xff, 0xff]),
        (112, &[0x12, 0x34, 0x56, 0x78, 0x7f, 0xff, 0xff, 0xff]),
    ] {
        pair.run("qemu-img create -q -f qcow2 a 64M");
        pair.poke("a", offset, bytes);
        assert_eq!(pair.run("qemu-img info a").status, 1, "field at {offset}");
        assert_eq!(io(&pair, "a", &["read 0 512"]), 1, "field at {offset}");
    }
}

/// What is wrong is said once, in words that people know, and marks the image if it can.
#[test]
fn corrupt_entries_are_told_in_the_same_words() {
    let l2_table = |pair: &Pair| {
        let at = u64::from_be_bytes(pair.peek("a", 40, 8).try_into().unwrap());
        (at, u64::from_be_bytes(pair.peek("a", at, 8).try_into().unwrap()) & !(1 << 63))
    };
    let image = || {
        let pair = Pair::new();
        pair.given("qemu-img create -q -f qcow2 a 64M");
        pair.given_words(&["qemu-io", "-f", "qcow2", "-c", "write 0 128k", "a"].map(str::to_owned));
        pair
    };
    let read_only = ["qemu-io", "-r", "-f", "qcow2", "-c", "read 0 512", "-c", "read 64k 512", "a"];
    for (in_l1, entry) in [(true, 0x42a00), (false, 0x52a00), (false, 0x52a01)] {
        for command in ["read 0 512", "write 0 512"] {
            let pair = image();
            let (l1, l2) = l2_table(&pair);
            pair.poke("a", if in_l1 { l1 } else { l2 }, &(1_u64 << 63 | entry).to_be_bytes());
            pair.run_words(&read_only);
            io(&pair, "a", &[command]);
            assert_eq!(pair.peek("a", 72, 8)[7], 2, "{entry:#x}, {command}");
            io(&pair, "a", &["read 0 512"]);
            pair.run_words(&read_only);
        }
    }
    // Onto the refcount block, the snapshot's table, the table itself.
    for entry in [0x20000, 0x40000] {
        let pair = image();
        let (_, l2) = l2_table(&pair);
        pair.poke("a", l2, &(1_u64 << 63 | entry).to_be_bytes());
        io(&pair, "a", &["write 0 512"]);
    }
}

#[test]
fn snapshots_with_tables_that_make_no_sense_are_refused_in_the_same_words() {
    let pair = Pair::new();
    pair.given("qemu-img create -q -f qcow2 a 64M");
    pair.given_words(&["qemu-io", "-f", "qcow2", "-c", "write 0 64k", "a"].map(str::to_owned));
    pair.given("qemu-img snapshot -c one a");
    let table = u64::from_be_bytes(pair.peek("a", 64, 8).try_into().unwrap());
    let good = pair.peek("a", table, 12);
    for bad in [[0, 0, 0, 0, 0, 0x40, 2, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0x40, 0, 0, 0x10, 0, 0, 0]]
    {
        pair.poke("a", table, &bad);
        pair.run("qemu-img convert -l one -O raw a b");
        pair.run("qemu-img snapshot -a one a");
        pair.run("qemu-img snapshot -d one a");
        pair.run("qemu-img snapshot -l a");
    }
    pair.poke("a", table, &good);
    assert_eq!(pair.run("qemu-img snapshot -d one a").status, 0);
}
