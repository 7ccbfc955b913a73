//! `qemu-img commit` and `rebase`: chains of images.

use crate::pair::Pair;

/// `top` on `mid` on `base`, of 6, 4 and 5 MiB; `new`, of another content.
fn chain() -> Pair {
    let pair = Pair::new();
    pair.given("qemu-img create -q -f qcow2 base 5M");
    pair.given("qemu-img create -q -f qcow2 -b base -F qcow2 mid 4M");
    pair.given("qemu-img create -q -f qcow2 -b mid -F qcow2 top 6M");
    pair.given("qemu-img create -q -f qcow2 new 5632k");
    for (name, commands) in [
        ("base", ["write -P 9 0 2M", "write -P 6 4M 1M"]),
        ("mid", ["write -P 8 512k 512k", "write -z 1M 128k"]),
        ("top", ["write -P 7 768k 512k", "write -z 1536k 64k"]),
        ("top", ["write -P 3 5888k 64k", "write -P 0 1792k 64k"]),
        ("new", ["write -P 9 0 1M", "write -P 1 2560k 1000"]),
        ("new", ["write -P 8 512k 150k", "write -P 2 5M 100k"]),
    ] {
        let [first, second] = commands;
        let words = ["qemu-io", "-f", "qcow2", "-c", first, "-c", second, name];
        pair.given_words(&words.map(str::to_owned));
    }
    pair
}

fn same_chain(pair: &Pair) {
    for name in ["top", "mid", "base"] {
        pair.same_image(name, "qcow2");
    }
}

#[test]
fn commits_move_the_same_bytes_down() {
    for words in
        ["top", "-d top", "-q -t none top", "mid", "--image-opts driver=qcow2,file.filename=top"]
    {
        let pair = chain();
        assert_eq!(pair.run(&format!("qemu-img commit {words}")).status, 0, "{words}");
        same_chain(&pair);
    }
    // What lies between is not what it was.
    let pair = chain();
    pair.run("qemu-img commit -r 1G -b base top");
    pair.same_image("top", "qcow2");
    pair.same_image("base", "qcow2");
}

#[test]
fn a_raw_base_and_an_overlay_with_snapshots_are_committed_to() {
    let pair = chain();
    pair.given("qemu-img create -q -f raw raw 3M");
    pair.given("qemu-img create -q -f qcow2 -b raw -F raw over 4M");
    pair.given_words(
        &["qemu-io", "-f", "qcow2", "-c", "write -P 5 1M 1M", "over"].map(str::to_owned),
    );
    pair.run("qemu-img commit over");
    pair.same_image("over", "qcow2");
    pair.same_image("raw", "raw");
    pair.given("qemu-img snapshot -c one mid");
    pair.run("qemu-img commit mid");
    pair.run("qemu-img snapshot -l mid");
    same_chain(&pair);
}

#[test]
fn rebased_images_show_what_they_showed() {
    for words in [
        "-b new -F qcow2",
        "-c -b new -F qcow2",
        "-b base -F qcow2",
        "-b ./mid -F qcow2",
        "-b new -F raw",
        "-u -b new -F qcow2",
        "-U -t none -T none -b new -F qcow2",
    ] {
        let pair = chain();
        assert_eq!(pair.run(&format!("qemu-img rebase {words} top")).status, 0, "{words}");
        pair.same_image("top", "qcow2");
    }
    for words in [["-q", "-b", "", "top"], ["-c", "-b", "", "top"]] {
        let pair = chain();
        pair.run_words(&[["qemu-img", "rebase"].as_slice(), &words].concat());
        pair.same_image("top", "qcow2");
    }
}

#[test]
fn an_image_without_a_backing_file_hides_the_one_that_it_gets() {
    // Not in version 2, where QEMU 10.0 lets the new backing file show.
    let pair = chain();
    pair.given("qemu-img create -q -f qcow2 alone 6M");
    pair.run("qemu-img rebase -b new -F qcow2 alone");
    pair.same_image("alone", "qcow2");
}

#[test]
fn commits_and_rebases_that_make_no_sense_are_refused_in_the_same_words() {
    let pair = chain();
    for words in [
        "commit",
        "commit base",
        "commit -b missing top",
        "commit -b top top",
        "commit -t foo top",
        "commit -r x top",
        "commit missing",
        "rebase top",
        "rebase -b missing -F qcow2 top",
        "rebase -b new top",
        "rebase -u -b new top",
        "rebase -b new -F foo top",
        "rebase -b top -F qcow2 top",
        "rebase -t foo -b new -F qcow2 top",
        "rebase -T foo -b new -F qcow2 top",
        "rebase --image-opts -f qcow2 -b new top",
    ] {
        assert_eq!(pair.run(&format!("qemu-img {words}")).status, 1, "{words}");
    }
    same_chain(&pair);
}

#[test]
fn a_base_is_named_as_the_images_of_the_chain_name_it() {
    let chain = || {
        let pair = Pair::new();
        pair.given("mkdir folder");
        pair.given("qemu-img create -q -f qcow2 folder/base 1M");
        pair.given("qemu-img create -q -f qcow2 -b base -F qcow2 folder/mid");
        pair.given("qemu-img create -q -f qcow2 -b mid -F qcow2 folder/top");
        pair
    };
    for (base, status) in
        [("mid", 0), ("base", 0), ("./base", 0), ("folder/mid", 1), ("folder/base", 1), ("top", 1)]
    {
        assert_eq!(chain().run(&format!("qemu-img commit -b {base} folder/top")).status, status);
    }
}

#[test]
fn a_commit_that_fails_says_why() {
    let pair = Pair::trusting();
    pair.given("qemu-img create -q -f qcow2 base 1M");
    let description = "json:{'driver':'qcow2','file':{'driver':'blkdebug','inject-error':[{'event':\
                       'write_aio','errno':28,'once':true}],'image':{'driver':'file','filename':\
                       'base'}}}";
    pair.run_words(&["qemu-img", "create", "-f", "qcow2", "-b", description, "-F", "qcow2", "top"]);
    pair.run_words(&["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", "top"]);
    assert_eq!(pair.run("qemu-img commit top").status, 1);
    pair.same_image("base", "qcow2");
}

/// With a data file the metadata's write fails, at the end.
#[test]
fn a_commit_that_fails_at_its_end_says_why() {
    let pair = Pair::trusting();
    pair.given("qemu-img create -q -f qcow2 -o data_file=data base 1M");
    let description = "json:{'driver':'qcow2','file':{'driver':'blkdebug','inject-error':[{'event':\
                       'none','iotype':'write','errno':28}],'image':{'driver':'file','filename':\
                       'base'}}}";
    pair.run_words(&["qemu-img", "create", "-f", "qcow2", "-b", description, "-F", "qcow2", "top"]);
    pair.run_words(&["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", "top"]);
    let ours = pair.ours_says("qemu-img commit top");
    assert!(
        ours.0 == 1 && ours.1.contains("Block job failed: No space left on device"),
        "{ours:?}"
    );
}
