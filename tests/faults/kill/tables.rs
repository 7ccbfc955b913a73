//! `snapshot`, `amend`, `resize`: what the guest sees is what it was, or what it was to be.

use super::super::encryption;
use super::super::image::{Sandbox, qemu_img, qemu_io, succeed, text};
use super::super::tools::Kind;
use super::scene::{IMAGE, Scene, assert_either, assert_same, attack, guest, make, prepare};

/// Compressed clusters, zeros, holes, and clusters that two snapshots share.
fn with_snapshots(options: &str) -> Sandbox {
    let ready = Sandbox::in_memory();
    let commands = ["write -q -P 1 0 1500k", "write -q -c -P 2 3M 64k", "write -q -P 3 3500k 100k"];
    make(&ready, IMAGE, options, "4M", &commands);
    prepare(&ready, "snapshot -c one IMAGE");
    qemu_io(&ready.at(IMAGE), &["write -q -P 4 300k 900k", "discard 64k 64k"]);
    prepare(&ready, "snapshot -c two IMAGE");
    qemu_io(&ready.at(IMAGE), &["write -q -P 5 0 100k", "write -z 1M 256k", "write -P 6 2M 500k"]);
    ready
}

/// The names of the snapshots that there are.
fn names(scene: &Scene) -> Vec<String> {
    let said = scene.peer("img snapshot -l FILE", IMAGE);
    succeed(&said, &scene.what);
    let lines = String::from_utf8_lossy(&said.stdout).into_owned();
    let name = |line: &str| line.split_whitespace().nth(1).map(str::to_owned);
    lines.lines().skip(2).filter_map(name).collect()
}

#[test]
fn snapshots_stay_as_they_were_when_a_tool_that_changes_them_is_killed() {
    for options in ["cluster_size=1k", "cluster_size=4k,compat=0.10", "extended_l2=on"] {
        let ready = with_snapshots(options);
        let old = |options: &str| guest("before", &ready, Kind::Plain, options, &ready.at(IMAGE));
        let [active, one, two] = [old(""), old("-l one "), old("-l two ")];
        for (line, may_be_gone) in [
            ("img snapshot -c new FILE", ""),
            ("img snapshot -d one FILE", "one"),
            ("img snapshot -a two FILE", ""),
        ] {
            attack(&ready, Kind::Plain, line, |scene| {
                scene.is_sound(IMAGE);
                let names = names(scene);
                for (name, bytes) in [("one", &one), ("two", &two), ("new", &active)] {
                    let is_there = names.iter().any(|other| other == name);
                    assert!(
                        is_there || name == may_be_gone || name == "new",
                        "{}: {name} is gone",
                        scene.what
                    );
                    if is_there {
                        assert_same(&scene.what, &scene.snapshot(IMAGE, name), bytes);
                    }
                }
                let now = scene.guest(IMAGE);
                let applied = line.contains("-a") && now == two;
                assert!(applied || now == active, "{}: a mixture", scene.what);
                scene.takes_writes(IMAGE);
                if names.iter().any(|name| name == "one") {
                    assert_same(&scene.what, &scene.snapshot(IMAGE, "one"), &one);
                }
                assert_same(&scene.what, &scene.snapshot(IMAGE, "two"), &two);
            });
        }
    }
}

#[test]
fn an_amendment_that_is_killed_leaves_what_the_guest_sees() {
    let commands = ["write -q -P 1 0 2M", "write -z 512k 1M", "write -q -P 3 3500k 100k"];
    let new = |options: &str| {
        let ready = Sandbox::in_memory();
        make(&ready, IMAGE, options, "4M", &commands);
        ready
    };
    let of_v3 = new("cluster_size=4k");
    let of_v2 = Sandbox::in_memory();
    make(&of_v2, IMAGE, "cluster_size=4k,compat=0.10", "4M", &["write -q -P 1 0 2M"]);
    let small = new("cluster_size=512,lazy_refcounts=on");
    let shared = with_snapshots("cluster_size=1k");
    for (ready, change) in [
        (&of_v3, "compat=0.10"),
        (&of_v2, "compat=1.1,refcount_bits=64,lazy_refcounts=on"),
        (&small, "refcount_bits=64"),
        (&small, "refcount_bits=1"),
        (&small, "compat=0.10,lazy_refcounts=off"),
        (&shared, "refcount_bits=8"),
        (&shared, "size=16M"),
    ] {
        let old = |options: &str| guest("before", ready, Kind::Plain, options, &ready.at(IMAGE));
        let active = old("");
        // The peer shows it with the size of the disk.
        let one = std::ptr::eq(ready, &raw const shared).then(|| old("-l one "));
        let line = format!("img amend -f qcow2 -o {change} FILE");
        attack(ready, Kind::Plain, &line, |scene| {
            scene.is_sound(IMAGE);
            assert_either(&scene.what, &scene.guest(IMAGE), &[&active]);
            if let Some(one) = &one {
                assert_either(&scene.what, &scene.snapshot(IMAGE, "one"), &[one]);
            }
            scene.succeed(&line, IMAGE);
            assert_either(&scene.what, &scene.guest(IMAGE), &[&active]);
            scene.takes_writes(IMAGE);
        });
    }
}

/// Whatever becomes of the other slots, the password that nobody takes away opens the image.
#[test]
fn key_slots_that_were_being_changed_lock_nobody_out() {
    let ready = Sandbox::in_memory();
    ready.put(IMAGE, &encryption::luks("8M"));
    let add = "img amend --object secret,id=n,data=other \
               -o encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10 FILE";
    let words = Kind::Encrypted.words(add, &ready, &ready.at(IMAGE));
    let expected = guest("before", &ready, Kind::Encrypted, "", &ready.at(IMAGE));
    let two = Sandbox::in_memory();
    two.put(IMAGE, &encryption::luks("8M"));
    let path = text(&two.at(IMAGE)).to_owned();
    let said: Vec<String> =
        words[1..].iter().map(|word| word.replace(text(&ready.at(IMAGE)), &path)).collect();
    succeed(&qemu_img(&said.iter().map(String::as_str).collect::<Vec<_>>()), "a second slot");
    let remove = "img amend -o encrypt.state=inactive,encrypt.keyslot=1 FILE";
    for (ready, line) in [(&ready, add), (&two, remove)] {
        attack(ready, Kind::Encrypted, line, |scene| {
            scene.is_sound(IMAGE);
            assert_eq!(scene.guest(IMAGE).len(), expected.len(), "{}", scene.what);
            assert_same(&scene.what, &scene.guest(IMAGE)[..0x1_0000], &expected[..0x1_0000]);
            scene.takes_writes(IMAGE);
        });
    }
}

#[test]
fn a_disk_that_was_being_resized_has_the_old_or_the_new_size_and_its_bytes() {
    let plain = Sandbox::in_memory();
    let commands = ["write -q -P 1 0 1500k", "write -q -c -P 2 3M 64k", "write -q -P 3 3500k 596k"];
    make(&plain, IMAGE, "cluster_size=1k", "4M", &commands);
    let shared = with_snapshots("cluster_size=1k");
    for (ready, line) in [
        (&plain, "img resize -f qcow2 FILE +1M"),
        (&plain, "img resize -f qcow2 FILE +28M"),
        (&plain, "img resize -f qcow2 --preallocation metadata FILE +2M"),
        (&plain, "img resize -f qcow2 --preallocation full FILE +2M"),
        (&plain, "img resize -f qcow2 --shrink FILE 1M"),
        (&shared, "img resize -f qcow2 FILE +28M"),
    ] {
        let old = guest("before", ready, Kind::Plain, "", &ready.at(IMAGE));
        let shrinks = line.contains("--shrink");
        attack(ready, Kind::Plain, line, |scene| {
            scene.is_sound(IMAGE);
            let now = scene.guest(IMAGE);
            let whole = if shrinks { now.len().min(1 << 20) } else { now.len().min(old.len()) };
            assert_same(&scene.what, &now[..whole], &old[..whole]);
            // What is dropped may be gone; what is new is nothing yet.
            assert_either(
                &scene.what,
                &now,
                &if shrinks { vec![&old[..], &[]] } else { vec![&old[..]] },
            );
            if std::ptr::eq(ready, &raw const shared) {
                assert_eq!(names(scene), ["one", "two"], "{}", scene.what);
            }
            scene.takes_writes(IMAGE);
        });
    }
}
