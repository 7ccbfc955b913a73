//! Encrypted images: made by one, used by the other; what is said of them, and of wrong keys.

use crate::pair::Pair;

const KEYS: &str = "--object secret,id=s,data=hush --object secret,id=n,data=new";

/// An image of every kind, made by QEMU.
fn images() -> Pair {
    let pair = Pair::new();
    pair.given(&format!(
        "qemu-img create -q {KEYS} -f qcow2 -o \
         encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 luks 1M"
    ));
    pair.given(&format!(
        "qemu-img create -q {KEYS} -f qcow2 -o encrypt.format=aes,encrypt.key-secret=s aes 1M"
    ));
    pair.given(&format!(
        "qemu-img create -q {KEYS} -f luks -o \
         key-secret=s,iter-time=10,cipher-mode=cbc,ivgen-alg=essiv disk 1M"
    ));
    pair.given("qemu-img create -q -f qcow2 plain 1M");
    pair
}

#[test]
fn info_tells_the_encryption_and_needs_no_key() {
    let pair = images();
    for image in ["luks", "aes", "disk"] {
        pair.run(&format!("qemu-img info {image}"));
        pair.run(&format!("qemu-img info --output=json {image}"));
    }
    pair.run(&format!(
        "qemu-img measure {KEYS} -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s --size 1G"
    ));
    pair.run(&format!("qemu-img measure {KEYS} -O luks -o key-secret=s --size 1G"));
}

#[test]
fn wrong_options_are_refused_in_the_same_words() {
    let pair = images();
    for options in [
        "encrypt.key-secret=s",
        "encrypt.format=luks",
        "encrypt.format=rot13,encrypt.key-secret=s",
        "encrypt.format=luks,encrypt.key-secret=x",
        "encrypt.format=aes,encrypt.key-secret=s,encrypt.cipher-alg=aes-128",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.hash-alg=crc32",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.nothing=1",
        "encryption=on,encrypt.format=luks,encrypt.key-secret=s",
    ] {
        pair.run(&format!("qemu-img create {KEYS} -f qcow2 -o {options} new 1M"));
    }
    pair.run("qemu-img create -f luks new 1M");
    pair.run(&format!(
        "qemu-img convert -c {KEYS} -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s plain new"
    ));
}

#[test]
fn what_either_makes_the_other_reads() {
    let pair = images();
    let luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    pair.run(&format!("qemu-img create -q {KEYS} -f qcow2 -o {luks} new 1M"));
    pair.given("qemu-img create -q -f raw data 1M");
    pair.given_words(
        &["qemu-io", "-f", "raw", "-c", "write -P 7 100k 300k", "data"].map(str::to_owned),
    );
    pair.run(&format!("qemu-img convert {KEYS} -f raw -O qcow2 -o {luks} data copy"));
    pair.run(&format!(
        "qemu-img convert {KEYS} -f raw -O luks -o key-secret=s,iter-time=10 data block"
    ));
    let (qcow2, block) = (
        "driver=qcow2,encrypt.key-secret=s,file.filename=",
        "driver=luks,key-secret=s,file.filename=",
    );
    for image in [format!("{qcow2}copy"), format!("{block}block"), format!("{qcow2}luks")] {
        pair.run(&format!(
            "qemu-img compare {KEYS} --image-opts driver=raw,file.filename=data {image}"
        ));
    }
    pair.run(&format!("qemu-img check {KEYS} --image-opts {qcow2}copy"));
}

#[test]
fn key_slots_are_amended_alike() {
    let pair = images();
    let amend = |image: &str, options: &str| {
        pair.run(&format!("qemu-img amend {KEYS} --image-opts -o {options} {image}"));
    };
    let luks = "driver=qcow2,encrypt.key-secret=s,file.filename=luks";
    for options in [
        "encrypt.new-secret=n",
        "encrypt.state=active",
        "encrypt.state=active,encrypt.new-secret=n,encrypt.keyslot=0",
        "encrypt.state=active,encrypt.new-secret=n,encrypt.keyslot=9",
        "encrypt.state=inactive",
        "encrypt.state=inactive,encrypt.keyslot=0",
        "encrypt.state=inactive,encrypt.old-secret=s",
        "encrypt.state=inactive,encrypt.old-secret=n",
        "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10",
        "encrypt.state=inactive,encrypt.keyslot=0,encrypt.old-secret=n",
        "encrypt.state=inactive,encrypt.keyslot=0",
        "encrypt.cipher-alg=aes-128",
    ] {
        amend(luks, options);
    }
    amend(
        "driver=qcow2,encrypt.key-secret=n,file.filename=luks",
        "encrypt.state=inactive,encrypt.old-secret=n",
    );
    // By force, what is gone may go again.
    pair.run(&format!(
        "qemu-img amend {KEYS} --force --image-opts -o encrypt.state=inactive,encrypt.keyslot=5 \
         driver=qcow2,encrypt.key-secret=s,file.filename=luks"
    ));
    amend(
        "driver=qcow2,encrypt.key-secret=s,file.filename=aes",
        "encrypt.state=active,encrypt.new-secret=n",
    );
    amend("driver=qcow2,file.filename=plain", "encrypt.state=active,encrypt.new-secret=n");
    let disk = "driver=luks,key-secret=s,file.filename=disk";
    for options in
        ["state=active,new-secret=n,iter-time=10", "state=inactive,old-secret=s", "size=5M"]
    {
        amend(disk, options);
    }
    amend("driver=luks,key-secret=n,file.filename=disk", "state=inactive,keyslot=1");
}
