//! `qemu-img convert`, `dd`, `compare` and `bench`.

use crate::pair::Pair;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

/// Images of 4 MiB (but `long`, and `odd` of a few bytes): data, zeros of all kinds and holes.
fn images() -> Pair {
    let pair = Pair::new();
    for (name, size) in [("a", "4M"), ("b", "4M"), ("long", "5M"), ("other", "4M")] {
        pair.given(&format!("qemu-img create -q -f qcow2 {name} {size}"));
    }
    let write = |name: &str, commands: &[&str]| {
        let mut words: Vec<String> = ["qemu-io", "-f", "qcow2"].map(str::to_owned).into();
        for command in commands {
            words.extend(["-c".to_owned(), (*command).to_owned()]);
        }
        words.push(name.to_owned());
        pair.given_words(&words);
    };
    let data = ["write -P 1 512k 1M", "write -P 2 3M 100k", "write -P 5 2500123 77"];
    write("a", &data);
    write("a", &["write -z 2M 128k", "write -P 0 3584k 128k"]);
    write("b", &[data[2], data[1], data[0], "write -z 0 64k"]);
    write("long", &data);
    write("other", &data);
    write("other", &["write -P 3 0x120123 5"]);
    pair.given("qemu-img convert -O raw a raw");
    pair.given("cp raw odd");
    pair.given("truncate -s 1000 odd");
    pair
}

#[test]
fn copies_have_the_same_bytes_whatever_the_options() {
    let pair = images();
    for options in [
        "-O qcow2",
        "-O raw -S 512",
        "-O raw -S 0 -m 1",
        "-O qcow2 -S 0",
        "-O qcow2 -m 16 -W",
        "-O qcow2 -c",
        "-O qcow2 -c -m 16 -W -o compression_type=zstd,cluster_size=2M",
        "-O qcow2 -o compat=0.10,cluster_size=512",
        "-O raw -T none -t none -r 1G",
        "-O qcow2 -U --salvage -t writethrough",
    ] {
        let format = if options.contains("raw") { "raw" } else { "qcow2" };
        pair.run(&format!("qemu-img convert {options} a copy"));
        pair.same_image("copy", format);
    }
    pair.run("qemu-img convert -f raw -O qcow2 raw copy");
    pair.same_image("copy", "qcow2");
    pair.run("qemu-img convert -f raw -C raw copy");
    pair.same_image("copy", "raw");
    pair.run("qemu-img convert -O qcow2 a odd long copy");
    pair.same_image("copy", "qcow2");
    pair.run("qemu-img convert -p -q a copy");
    pair.run("qemu-img convert --image-opts driver=qcow2,file.filename=a copy");
    pair.same_image("copy", "raw");
}

#[test]
fn progress_has_the_same_steps() {
    let pair = Pair::new();
    pair.given("qemu-img create -q a 40M");
    let words = ["qemu-io", "-f", "raw", "-c", "write -q -P 1 0 17M", "-c", "write -q 21M 3M", "a"];
    pair.given_words(&words.map(str::to_owned));
    pair.given("qemu-img create -q -f qcow2 -b a -F raw overlay");
    for command in [
        "convert -p -O qcow2 a b",
        "convert -p -S 0 -O qcow2 a c",
        "compare -p -f raw -F qcow2 a b",
        "compare -p -f raw -F raw a c",
        "rebase -p -F qcow2 -b b overlay",
    ] {
        pair.run(&format!("qemu-img {command}"));
    }
}

#[test]
fn a_copy_that_fails_inside_of_a_chunk_names_the_chunk() {
    let pair = Pair::new();
    pair.given("qemu-img create -q a 6M");
    let words = ["qemu-io", "-f", "raw", "-c", "write -q -P 1 0 6M", "a"];
    pair.given_words(&words.map(str::to_owned));
    pair.given("qemu-img create -q -f qcow2 b 6M");
    let broken = "driver=raw,file.driver=blkdebug,file.inject-error.0.event=read_aio,\
                  file.inject-error.0.sector=7000,file.image.driver=file,file.image.filename=a";
    for options in ["", "-W", "-W -m 1 -S 1M"] {
        pair.run(&format!("qemu-img convert {options} --image-opts {broken} -O qcow2 copy"));
    }
    let broken = broken.replace("read_aio", "write_aio");
    for options in ["", "-W", "-W -m 1 -S 1M"] {
        pair.run(&format!("qemu-img convert {options} -n --target-image-opts b {broken}"));
    }
}

#[test]
fn whoever_sends_sigusr1_is_told_how_far_a_copy_is() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("a"), vec![1; 100 << 20]).unwrap();
    let mut copy = Command::new(env!("CARGO_BIN_EXE_blockplex"))
        .args(["img", "convert", "-f", "raw", "-O", "raw", "-r", "40M", "a", "copy"])
        .current_dir(&folder)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The target is made after the signal has become harmless.
    while !folder.path().join("copy").exists() {
        assert_eq!(copy.try_wait().unwrap(), None, "the copy ended at once");
        std::thread::yield_now();
    }
    let process = rustix::process::Pid::from_child(&copy);
    rustix::process::kill_process(process, rustix::process::Signal::USR1).unwrap();
    let mut line = String::new();
    BufReader::new(copy.stderr.take().unwrap()).read_line(&mut line).unwrap();
    copy.kill().unwrap();
    copy.wait().unwrap();
    let percent = line.strip_prefix("    (").and_then(|rest| rest.strip_suffix("/100%)\n"));
    let percent: f32 = percent.unwrap_or_else(|| panic!("{line:?}")).parse().unwrap();
    assert!((0.0..100.0).contains(&percent), "{line}");
}

#[test]
fn copies_onto_a_backing_file_or_over_an_image_leave_out_what_is_there() {
    let pair = images();
    pair.given("qemu-img create -q -f qcow2 -b other -F qcow2 overlay 6M");
    pair.given_words(
        &[
            "qemu-io",
            "-f",
            "qcow2",
            "-c",
            "write -P 9 1M 300k",
            "-c",
            "write -P 9 5M 64k",
            "overlay",
        ]
        .map(str::to_owned),
    );
    pair.run("qemu-img convert -O qcow2 -B other -F qcow2 overlay copy");
    pair.same_image("copy", "qcow2");
    pair.run("qemu-img convert -n -O qcow2 a other");
    pair.same_image("other", "qcow2");
    pair.given("qemu-img create -q -f qcow2 empty 4M");
    pair.run("qemu-img convert -n --target-is-zero -O qcow2 a empty");
    pair.same_image("empty", "qcow2");
    pair.run("qemu-img convert -n --target-image-opts a driver=qcow2,file.filename=empty");
    pair.same_image("empty", "qcow2");
}

#[test]
fn a_snapshot_is_copied_as_it_was() {
    let pair = images();
    pair.given("qemu-img snapshot -c one a");
    pair.given_words(&["qemu-io", "-f", "qcow2", "-c", "write -P 9 1M 1M", "a"].map(str::to_owned));
    for which in ["one", "1", "snapshot.name=one", "snapshot.id=1,snapshot.name=one", "two"] {
        pair.run(&format!("qemu-img convert -l {which} a copy"));
        pair.same_image("copy", "raw");
    }
    pair.run("qemu-img convert -f raw -l one raw copy");
}

#[test]
fn bitmaps_are_copied_with_their_image() {
    let pair = images();
    pair.given("qemu-img bitmap --add a first");
    pair.given("qemu-img bitmap --add -g 128k a second");
    pair.given_words(&["qemu-io", "-f", "qcow2", "-c", "write 1M 1M", "a"].map(str::to_owned));
    pair.given("qemu-img bitmap --disable a second");
    pair.run("qemu-img convert --bitmaps -O qcow2 a copy");
    pair.same_image("copy", "qcow2");
    pair.run("qemu-img bitmap --merge second copy first");
    for words in ["a a copy", "-f raw raw copy", "-o compat=0.10 a copy"] {
        let answer = pair.run(&format!("qemu-img convert --bitmaps -O qcow2 {words}"));
        assert_eq!(answer.status, 1, "{words}");
    }
}

#[test]
fn copies_that_make_no_sense_are_refused_in_the_same_words() {
    let pair = images();
    for words in [
        "a",
        "-m 17 a copy",
        "-m x a copy",
        "-S 100 a copy",
        "-S 32M a copy",
        "-r x a copy",
        "-t foo a copy",
        "-T foo a copy",
        "-O foo a copy",
        "-c -O raw a copy",
        "-c -C a copy",
        "-C -S 0 a copy",
        "-C --salvage a copy",
        "-B other a copy",
        "-F raw a copy",
        "-O qcow2 -B other a copy",
        "-O qcow2 -B other -F qcow2 a a copy",
        "-O qcow2 -o foo=1 a copy",
        "-O qcow2 -c -o preallocation=full a copy",
        "-O qcow2 a a",
        "-O qcow2 a no/such",
        "-n -O qcow2 a missing",
        "-n -O raw long raw",
        "-n -o size=1 a copy",
        "--target-is-zero a copy",
        "--target-image-opts a copy",
        "--image-opts -f qcow2 a copy",
        "--skip-broken-bitmaps a copy",
        "--bitmaps -O raw a copy",
        "--no-such-option a copy",
        "missing copy",
    ] {
        let answer = pair.run(&format!("qemu-img convert {words}"));
        assert_eq!(answer.status, 1, "{words}");
    }
}

#[test]
fn dd_copies_the_same_blocks() {
    let pair = images();
    for words in [
        "if=a of=copy",
        "bs=1M count=2 if=a of=copy",
        "bs=1M count=2 skip=1 if=a of=copy",
        "bs=1M count=2 skip=3 if=a of=copy",
        "bs=300 skip=1 -f raw if=odd of=copy",
        "count=0 if=a of=copy",
        "--image-opts if=driver=qcow2,file.filename=a of=copy",
    ] {
        pair.run(&format!("qemu-img dd {words}"));
        pair.same_image("copy", "raw");
    }
    pair.run("qemu-img dd -O qcow2 bs=1000 -f raw if=odd of=copy");
    pair.same_image("copy", "qcow2");
    for words in [
        "",
        "if=a",
        "bs=0 if=a of=c",
        "bs=x if=a of=c",
        "foo=1 if=a of=c",
        "abc",
        "-O foo if=a of=c",
    ] {
        assert_eq!(pair.run(&format!("qemu-img dd {words}")).status, 1, "{words}");
    }
}

#[test]
fn comparisons_find_the_same_difference() {
    let pair = images();
    for (words, status) in [
        ("a b", 0),
        ("-s a b", 1),
        ("-q -s a b", 1),
        ("-f qcow2 -F raw a raw", 0),
        ("a other", 1),
        ("-f raw -F qcow2 raw other", 1),
        ("a long", 0),
        ("-s long a", 1),
        ("-U -T none a b", 0),
        ("a missing", 2),
        ("-T foo a b", 2),
        ("-F foo a b", 2),
        ("a", 1),
        ("--image-opts driver=qcow2,file.filename=a driver=qcow2,file.filename=b", 0),
        ("--image-opts -f qcow2 a b", 2),
    ] {
        assert_eq!(pair.run(&format!("qemu-img compare {words}")).status, status, "{words}");
    }
}

#[test]
fn benchmarks_send_the_same_requests() {
    let pair = images();
    for (words, status) in [
        ("-c 100 a", 0),
        ("-c 100 -d 4 -s 8k -S 64k -o 4k -i threads a", 0),
        ("-w -c 103 -d 4 --flush-interval 10 --pattern 7 a", 0),
        ("-w -c 103 -d 4 --flush-interval 10 --no-drain --pattern 8 -S 3000 a", 0),
        ("-w -c 10 -t writethrough a", 0),
        ("-c 10 -S 100k -s 1M -o 3584k a", 1),
        ("-c 1k a", 1),
        ("-d 0 a", 1),
        ("-n a", 1),
        ("-i foo a", 1),
        ("-w --flush-interval 10 a", 1),
        ("--flush-interval 3 a", 1),
        ("-w -U a", 1),
    ] {
        assert_eq!(pair.run(&format!("qemu-img bench {words}")).status, status, "{words}");
        pair.same_image("a", "qcow2");
    }
}
