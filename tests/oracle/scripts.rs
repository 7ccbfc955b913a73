//! What scripts do: descriptions of nodes in all spellings, `reopen`, and what images hold after
//! requests of odd sizes.

use crate::pair::Pair;

const SECRET: [&str; 4] = ["--object", "secret,id=s,data=one", "--object", "secret,id=t,data=two"];

/// Runs `qemu-io` on options, one command a line.
#[track_caller]
fn io(pair: &Pair, options: &str, commands: &str) -> i32 {
    let mut words = vec!["qemu-io"];
    words.extend(options.split_whitespace());
    for command in commands.lines().map(str::trim).filter(|line| !line.is_empty()) {
        words.extend(["-c", command]);
    }
    pair.run_words(&words).status
}

#[test]
fn a_window_of_a_file_ends_where_it_says_for_the_format_above_it_too() {
    let pair = Pair::new();
    pair.given("qemu-img create -q -f qcow2 disk 16M");
    pair.given("truncate -s 4M disk");
    let window =
        "driver=qcow2,file.driver=raw,file.size=4M,file.file.driver=file,file.file.filename=disk";
    let commands = "write -P 1 0 3M\nwrite -P 2 3M 2M\nread -P 1 0 3M";
    io(&pair, &format!("--image-opts {window}"), commands);
    // As long as it was.
    pair.run("qemu-img measure -f raw disk");
    let output = pair.run_theirs(&["qemu-img", "check", "disk"]);
    assert!(output.status.success());
    pair.run("qemu-img info --image-opts driver=raw,offset=512,size=1024,file.filename=disk");
}

#[test]
fn json_strings_may_stand_in_either_quotes() {
    let pair = Pair::new();
    pair.given("qemu-img create -q -f qcow2 disk 1M");
    for name in [
        "json:{'driver':'qcow2','file':{'driver':'file','filename':'disk'}}",
        "json:{'driver':\"qcow2\", \"file.filename\":'disk'}",
        "json:{'driver':'qcow2','file':{'driver':'file','filename':'disk'}",
    ] {
        pair.run_words(&["qemu-img", "map", name]);
    }
}

#[test]
fn options_of_a_backing_file_leave_it_the_one_that_the_image_names() {
    let pair = Pair::new();
    pair.given("qemu-img create -q -f qcow2 base 1M");
    pair.given("qemu-img create -q -f qcow2 -b base -F qcow2 top");
    pair.given_words(
        &["qemu-io", "-f", "qcow2", "base", "-c", "write -P 5 0 64k"].map(String::from),
    );
    let commands = "read -P 5 0 64k\nread -P 0 64k 64k";
    io(&pair, "--image-opts driver=qcow2,file.filename=top,backing.driver=qcow2", commands);
    io(&pair, "--image-opts driver=qcow2,file.filename=top,backing.lazy-refcounts=on", commands);
    io(&pair, "--image-opts driver=qcow2,file.filename=top,backing.driver=raw", "read 0 512");
}

#[test]
fn what_a_reopen_does_not_change_may_be_said() {
    let pair = Pair::new();
    pair.given("qemu-img create -q -f qcow2 base 1M");
    pair.given("qemu-img create -q -f qcow2 -b base -F qcow2 top");
    for options in [
        "node-name=foo",
        "file.node-name=foo",
        "backing.node-name=foo",
        "driver=raw",
        "file.driver=qcow2",
        "backing.driver=file",
        "driver=qcow2",
        "file.driver=file",
        "backing.driver=qcow2",
        "read-only=foo",
        "cache.no-flush=bar",
        "cache.direct=baz",
        "lazy-refcounts=42",
        "overlap-check.template=blubb",
        "cache-clean-interval=-1",
    ] {
        let reopen = format!("reopen -o {options}");
        pair.run_words(&["qemu-io", "-f", "qcow2", "top", "-c", &reopen]);
    }
    for options in ["node-name=foo", "file.node-name=foo", "backing.node-name=foo"] {
        let open = format!("open -o {options} top");
        let reopen = format!("reopen -o {options}");
        pair.run_words(&["qemu-io", "-f", "qcow2", "-c", &open, "-c", &reopen, "-c", "length"]);
    }
    let commands = "
        reopen -o cache-size=1M
        reopen -o l2-cache-size=512k
        reopen -o refcount-cache-size=128k
        reopen -o cache-size=2M
        reopen -o overlap-check=none
        reopen -o overlap-check.template=all
        reopen -o overlap-check.main-header=off
        reopen -o overlap-check=constant
        write -P 3 0 1M
        read -P 3 0 1M
        reopen -o cache-size=1M,l2-cache-size=64k,refcount-cache-size=64k
    ";
    io(&pair, "-f qcow2 top", commands);
    io(&pair, "-f null-co null-co://", "reopen\ninfo");
}

#[test]
fn protocols_are_opened_by_their_names() {
    let pair = Pair::new();
    pair.given("qemu-img create -q -f qcow2 disk 1M");
    pair.run("qemu-img info -f file disk");
    pair.run("qemu-img map -f file disk");
    pair.run("qemu-img map -f null-co disk");
    pair.run("qemu-img info -f null-co null-co://");
    io(&pair, "-f file disk", "read 42 42\nreopen -o cache.no-flush=on\nread 42 42\ninfo");
    let limits = "driver=blkdebug,image.driver=qcow2,align=4k,max-transfer=64k";
    let open = format!("open -o {limits} blkdebug::disk");
    io(&pair, "-f raw", &format!("{open}\nwrite -P 3 1000 128k\nread -P 3 1000 128k\nlength"));
    pair.same_image("disk", "qcow2");
}

#[test]
fn discards_reach_a_file_whatever_it_would_like_best() {
    let pair = Pair::new();
    pair.given("qemu-img create -q -f qcow2 disk 8M");
    pair.given_words(
        &["qemu-io", "-f", "qcow2", "disk", "-c", "write -P 9 0 8M"].map(String::from),
    );
    let open = "open -o driver=blkdebug,image.driver=qcow2,align=512,opt-discard=1536k,\
                max-discard=1536k,opt-write-zero=1536k,max-write-zero=1536k blkdebug::disk";
    io(&pair, "-f raw", &format!("{open}\ndiscard 1000001 3000000\nwrite -z 5000001 2500000"));
    pair.run("qemu-img map --output=json -f qcow2 disk");
    pair.same_image("disk", "qcow2");
}

#[test]
fn raw_data_files_tell_of_their_requests() {
    let pair = Pair::new();
    pair.given("qemu-img create -q -f qcow2 -o data_file=data disk 64k");
    for event in ["write_aio", "read_aio"] {
        let blkdebug = format!(
            "data-file.driver=raw,data-file.file.driver=blkdebug,data-file.file.image.driver=file,\
             data-file.file.image.filename=data,data-file.file.inject-error.0.event={event},\
             data-file.file.inject-error.0.errno=5,data-file.file.inject-error.0.once=on"
        );
        let image = format!("--image-opts driver=qcow2,file.filename=disk,{blkdebug}");
        io(&pair, &image, "write -P 1 0 64k\nread -P 1 0 64k\nread -P 1 0 64k");
        pair.run("qemu-io -f qcow2 disk -c map");
    }
}

#[test]
fn keys_are_asked_for_where_data_is() {
    let pair = Pair::new();
    let make = |name: &str, secret: &str| {
        let options =
            format!("encrypt.format=luks,encrypt.key-secret={secret},encrypt.iter-time=10");
        let mut words = vec!["qemu-img", "create", "-q", "-f", "qcow2", "-o", &options];
        words.extend(SECRET);
        words.extend([name, "1M"]);
        pair.given_words(&words.into_iter().map(String::from).collect::<Vec<_>>());
    };
    make("base", "s");
    pair.given("qemu-img create -q -f qcow2 plain 1M");
    // The size of an encrypted image is no secret.
    pair.run("qemu-img create -f qcow2 -b base -F qcow2 over");
    let run = |words: &[&str]| pair.run_words(&[words, &SECRET[..]].concat());
    run(&[
        "qemu-img",
        "map",
        "--image-opts",
        "driver=qcow2,encrypt.key-secret=s,file.filename=plain",
    ]);
    pair.run(
        "qemu-img info --image-opts driver=qcow2,encrypt.key-secret=unknown,file.filename=base",
    );
    make("top", "t");
    pair.given("qemu-img rebase -u -f qcow2 -b base -F qcow2 plain");
    let both = "driver=qcow2,file.filename=plain,backing.driver=qcow2,backing.file.filename=base,\
                backing.encrypt.key-secret=s";
    run(&["qemu-io", "--image-opts", both, "-c", "write -P 7 1000 70000"]);
    run(&["qemu-img", "commit", "--image-opts", both]);
    run(&["qemu-io", "--image-opts", both, "-c", "read -P 7 1000 70000", "-c", "map"]);
    let base = "driver=qcow2,file.filename=base,encrypt.key-secret=s";
    run(&["qemu-io", "--image-opts", base, "-c", "read -P 7 1000 70000", "-c", "read -P 0 0 1000"]);
}

#[test]
fn zeros_over_all_the_data_of_a_cluster_of_the_backing_file_need_no_place() {
    let pair = Pair::new();
    pair.given("qemu-img create -q -f qcow2 -o cluster_size=512 base 1M");
    pair.given("qemu-img create -q -f qcow2 -o cluster_size=4k -b base -F qcow2 top");
    let data =
        ["qemu-io", "-f", "qcow2", "base", "-c", "write -P 9 5k 1k", "-c", "write -P 9 9k 1k"];
    pair.given_words(&data.map(String::from));
    io(&pair, "-f qcow2 top", "write -z 5k 1k\nread -P 0 4k 4k\nwrite -z 10k 1k\nread -P 9 9k 1k");
    pair.run("qemu-img map --output=json -f qcow2 top");
    pair.same_image("top", "qcow2");
}

#[test]
fn a_new_raw_image_has_its_first_block() {
    let pair = Pair::new();
    for size in ["512", "4k", "1M"] {
        pair.run(&format!("qemu-img create -f raw disk {size}"));
        pair.run("qemu-img map --output=json -f raw disk");
    }
    pair.run("qemu-img create -f raw -o preallocation=falloc disk 1M");
    pair.run("qemu-img map --output=json -f raw disk");
    pair.run("qemu-img measure -O qcow2 -f raw disk");
}

#[test]
fn measure_tells_of_bitmaps_where_the_target_can_have_them() {
    let pair = Pair::new();
    pair.given("qemu-img create -q -f qcow2 disk 8M");
    pair.given("qemu-img bitmap --add disk b");
    pair.run("qemu-img measure -O qcow2 -f qcow2 disk");
    pair.run("qemu-img measure -O qcow2 -o compat=0.10 -f qcow2 disk");
    pair.run("qemu-img measure -l snapshot.foo=bar");
}

#[test]
fn bitmaps_are_changed_without_what_the_image_stands_on() {
    let pair = Pair::new();
    pair.given("qemu-img create -q -f qcow2 base 1M");
    pair.given("qemu-img create -q -f qcow2 -b base -F qcow2 top");
    pair.run("qemu-img bitmap --add top b");
    pair.run("qemu-img bitmap --add --merge b -b top -F qcow2 -f qcow2 base c");
    pair.run("qemu-img info base");
    pair.given("rm base");
    pair.run("qemu-img bitmap --remove top b");
}

#[test]
fn leaks_that_are_repaired_leave_right_flags() {
    let pair = Pair::new();
    pair.given("qemu-img create -q -f qcow2 disk 1M");
    pair.given_words(&["qemu-io", "-f", "qcow2", "disk", "-c", "write 0 64k"].map(String::from));
    pair.given("qemu-img snapshot -c s disk");
    // The snapshot is gone, its clusters are not.
    pair.poke("disk", 60, &[0; 12]);
    pair.run("qemu-img check -r leaks disk");
    pair.run("qemu-img check disk");
}

#[test]
fn nodes_go_by_the_names_that_say_all_of_them() {
    let pair = Pair::new();
    pair.given("qemu-img create -q -f raw disk 1M");
    pair.given("qemu-img create -q -f qcow2 base 1M");
    pair.given("qemu-img create -q -f qcow2 -b base -F qcow2 top");
    for options in [
        "driver=raw,file.driver=blkdebug,file.image.filename=disk",
        "driver=raw,file.driver=blkdebug,file.image.filename=disk,file.align=4096,\
         file.inject-error.0.event=none,file.inject-error.0.errno=5",
        "driver=raw,size=1024,offset=512,file.filename=disk",
        "driver=raw,file.driver=null-co,file.size=1M,file.read-zeroes=on",
        "driver=qcow2,file.driver=blkdebug,file.image.filename=top,file.max-transfer=4k",
        "driver=qcow2,file.filename=top,lazy-refcounts=on,cache-size=1M",
    ] {
        for command in ["info", "info --output=json", "map"] {
            pair.run(&format!("qemu-img {command} --image-opts {options}"));
        }
    }
    pair.run_words(&[
        "qemu-img",
        "info",
        "json:{'driver':'raw','size':512,'file':{'driver':'file','filename':'disk'}}",
    ]);
}

#[test]
fn a_colon_in_a_name_after_file_is_a_part_of_it() {
    let pair = Pair::new();
    pair.run("qemu-img create -f qcow2 base 1M");
    pair.run("qemu-img create -f qcow2 -b base -F qcow2 file:image:top");
    pair.run("qemu-img info ./image:top");
    pair.run("qemu-img info file:image:top");
    pair.run("qemu-img map file:image:top");
}

#[test]
fn what_is_copied_into_an_existing_image_need_not_have_a_backing_format() {
    let pair = Pair::new();
    pair.given("qemu-img create -q -f qcow2 a 1M");
    pair.given("qemu-img create -q -f qcow2 b 1M");
    pair.run("qemu-img convert -O qcow2 -B a -n a b");
    pair.run("qemu-img convert -O qcow2 -B a a c");
}

#[test]
fn snapshots_of_other_programs_are_listed_alike() {
    let pair = Pair::new();
    pair.given("qemu-img create -q -f qcow2 disk 1M");
    pair.given("qemu-img snapshot -c one disk");
    let table = {
        let answer = pair.run_theirs(&["qemu-io", "-f", "raw", "-r", "-c", "read -v 64 8", "disk"]);
        let text = String::from_utf8(answer.stdout).unwrap();
        let bytes = text.split_whitespace().skip(1).take(8).map(|it| u64::from_str_radix(it, 16));
        bytes.fold(0, |sum, byte| sum << 8 | byte.unwrap())
    };
    // No instruction count.
    pair.poke("disk", table + 40 + 16, &[0xff; 8]);
    pair.run("qemu-img snapshot -l disk");
    pair.run("qemu-img info --output=json disk");
}

#[test]
fn a_disk_that_grows_over_a_longer_backing_file_takes_its_storage() {
    let pair = Pair::new();
    for mode in ["off", "metadata", "falloc", "full"] {
        pair.given("qemu-img create -q -f qcow2 base 2M");
        pair.given("qemu-img create -q -f qcow2 -b base -F qcow2 top 640k");
        pair.given_words(
            &["qemu-io", "-f", "qcow2", "base", "-c", "write -P 9 0 2M"].map(String::from),
        );
        pair.run(&format!("qemu-img resize -f qcow2 --preallocation={mode} top 3M"));
        pair.run("qemu-img map --output=json -f qcow2 top");
        pair.same_image("top", "qcow2");
    }
}

#[test]
fn what_is_no_file_is_told() {
    let pair = Pair::new();
    pair.given("mkdir folder");
    pair.given("qemu-img create -q -f raw disk 1M");
    for options in ["driver=file,filename=folder", "driver=file,filename=/dev/null,locking=off"] {
        for reads in ["", "-r "] {
            let open = format!("open {reads}-o {options}");
            pair.run_words(&["qemu-io", "-c", &open]);
        }
    }
    pair.run_words(&["qemu-io", "-c", "open -r -o driver=host_device,filename=folder"]);
    pair.run_words(&["qemu-io", "-c", "open -r -o driver=host_device,filename=disk"]);
    pair.run("qemu-img info folder");
}

#[test]
fn files_are_made_like_raw_images() {
    let pair = Pair::new();
    pair.run("qemu-img create -f file disk 1M");
    pair.run("qemu-img create -f file -o preallocation=full,nocow=off disk 1M");
    pair.run("qemu-img create -f file -o help");
    for format in ["file", "raw", "luks", "qcow2"] {
        pair.run(&format!("qemu-img create -f {format} -o help disk"));
    }
    pair.run("qemu-img create -f qcow2 -o extent_size_hint=0 disk 1M");
}

#[test]
fn a_data_file_is_for_images_that_have_one() {
    let pair = Pair::new();
    pair.given("qemu-img create -q -f qcow2 -o data_file=data disk 1M");
    pair.given("qemu-img create -q -f qcow2 other 1M");
    for (image, file) in [("disk", "data"), ("disk", "nowhere"), ("other", "data")] {
        let open = format!("open -o data-file.filename={file} {image}");
        pair.run_words(&["qemu-io", "-f", "qcow2", "-c", &open, "-c", "write -P 3 0 64k"]);
    }
    pair.run("qemu-io -f qcow2 -c map disk");
}

#[test]
fn a_filter_on_top_has_the_names_of_what_is_below() {
    let pair = Pair::new();
    pair.given("qemu-img create -q -f qcow2 base 1M");
    pair.given("qemu-img create -q -f qcow2 -b base -F qcow2 top");
    pair.given_words(&["qemu-io", "-f", "qcow2", "base", "-c", "write 0 256k"].map(String::from));
    pair.given_words(&["qemu-io", "-f", "qcow2", "top", "-c", "write 64k 64k"].map(String::from));
    pair.run(
        "qemu-img map --image-opts driver=blkdebug,image.driver=qcow2,image.file.filename=top",
    );
}

#[test]
fn a_raw_disk_ends_with_a_whole_sector() {
    let pair = Pair::new();
    for bytes in ["320", "1", "4609"] {
        pair.given("truncate -s 0 disk");
        pair.given(&format!("truncate -s {bytes} disk"));
        for command in ["info", "map --output=json", "map", "measure -O qcow2"] {
            pair.run(&format!("qemu-img {command} -f raw disk"));
        }
        io(&pair, "-r -f raw disk", "length\nread -P 0 0 512\nread -v 300 100\nread 300 10k");
        pair.run("qemu-img convert -f raw -O qcow2 disk copy");
        pair.same_image("copy", "qcow2");
        pair.run("qemu-img compare -f raw -F qcow2 disk copy");
        pair.run("qemu-img dd -f raw -O raw if=disk of=other bs=100");
        pair.run("qemu-img info -f raw other");
        io(&pair, "-f raw disk", "write -P 5 100 300\nlength\nread -P 5 100 300\nwrite -z 0 512");
        pair.run("qemu-img map --output=json -f raw disk");
        pair.run("qemu-img resize -f raw disk +0");
        pair.run("qemu-img info -f raw disk");
    }
}

#[test]
fn of_an_option_that_is_given_twice_the_last_counts() {
    let pair = Pair::new();
    pair.given("qemu-img create -q -f qcow2 disk 1M");
    pair.given("qemu-img create -q -f raw a,b=c 2M");
    pair.run("qemu-img map --image-opts driver=raw,file.filename=nowhere,driver=qcow2,file.filename=disk");
    pair.run("qemu-img info --image-opts driver=raw,file.filename=disk,file.filename=a,,b=c");
    let open = "open -o driver=raw,driver=qcow2,lazy-refcounts=foo,lazy-refcounts=on disk";
    pair.run_words(&["qemu-io", "-c", open, "-c", "length"]);
    let json = "json:{\"driver\": \"raw\", \"driver\": \"qcow2\", \"file.filename\": \"disk\"}";
    assert_eq!(pair.run_theirs(&["qemu-img", "info", json]).status.code(), Some(1));
    assert_eq!(pair.run_ours(&["qemu-img", "info", json]).status.code(), Some(1));
}

#[test]
fn a_password_that_is_no_text_makes_no_image() {
    let pair = Pair::new();
    for options in
        ["-f luks -o key-secret=s", "-f qcow2 -o encrypt.format=luks,encrypt.key-secret=s"]
    {
        let secret = "--object secret,id=s,data=/w==,format=base64";
        let answer = pair.run(&format!("qemu-img create {secret} {options} disk 1M"));
        assert_eq!(answer.status, 1);
        pair.run("qemu-img info disk");
    }
}
