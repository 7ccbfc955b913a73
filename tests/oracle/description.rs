//! Images that are described instead of named: what lies in what, and where the data is.

use crate::pair::Pair;

/// Opens `description` with `qemu-io` and runs `commands`.
fn open(pair: &Pair, description: &str, commands: &[&str]) -> i32 {
    let mut words = vec!["qemu-io"];
    commands.iter().for_each(|command| words.extend(["-c", command]));
    words.push(description);
    pair.run_words(&words).status
}

#[test]
fn an_image_may_lie_in_an_image() {
    let pair = Pair::new();
    pair.given("qemu-img create -q -f qcow2 inner 1M");
    pair.given_words(
        &["qemu-io", "-f", "qcow2", "-c", "write -P 7 4k 4k", "inner"].map(str::to_owned),
    );
    pair.given("qemu-img convert -f raw -O qcow2 inner outer");
    let described = "json:{'driver': 'qcow2', 'file': {'driver': 'qcow2', 'file': {'filename': \
                     'outer'}}}";
    assert_eq!(open(&pair, described, &["read -P 7 4k 4k", "write -P 8 8k 4k", "length"]), 0);
    assert_eq!(open(&pair, described, &["read -P 7 4k 4k", "read -P 8 8k 4k"]), 0);
    pair.run_words(&["qemu-img", "check", described]);
    pair.same_image("outer", "qcow2");
}

#[test]
fn an_explicit_null_keeps_the_backing_file_away() {
    let pair = Pair::new();
    pair.given("qemu-img create -q -f qcow2 base 1M");
    pair.given_words(
        &["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 4k", "base"].map(str::to_owned),
    );
    pair.given("qemu-img create -q -f qcow2 -b base -F qcow2 top");
    let file = "'file': {'driver': 'file', 'filename': 'top'}";
    open(&pair, &format!("json:{{'driver': 'qcow2', {file}}}"), &["read -P 7 0 4k"]);
    open(
        &pair,
        &format!("json:{{'driver': 'qcow2', {file}, 'backing': null}}"),
        &["read -P 0 0 4k"],
    );
}

/// QEMU takes names of data files relative to where it runs.
#[test]
fn the_name_of_a_data_file_may_be_changed_and_go() {
    let pair = Pair::trusting();
    pair.given("mkdir folder");
    pair.run("qemu-img create -f qcow2 -o data_file=data folder/image 1M");
    pair.run_words(&["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", "folder/image"]);
    let given = "driver=qcow2,data-file.filename=data,file.filename=folder/image";
    for name in ["missing", ""] {
        pair.run_words(&[
            "qemu-img",
            "amend",
            "-o",
            &format!("data_file={name}"),
            "--image-opts",
            given,
        ]);
        pair.run("qemu-io -f qcow2 -c length folder/image");
        pair.run_words(&["qemu-io", "-c", "read -P 7 0 64k", "--image-opts", given]);
        pair.run(&format!("qemu-img info --image-opts {given}"));
        pair.run(&format!("qemu-img info --output=json --image-opts {given}"));
    }
    pair.run(&format!("qemu-img check --image-opts {given}"));
    pair.run("qemu-img amend -o data_file=x data");
}
