//! `blkdebug` under `qemu-io`: what fails, and who waits.

use crate::pair::Pair;

/// A pair of folders with a raw image, and a qcow2 image of which one cluster is written.
fn images() -> Pair {
    let pair = Pair::new();
    pair.run("qemu-img create -f raw r 1M");
    pair.run("qemu-img create -f qcow2 q 64M");
    pair.run_words(&["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", "q"]);
    pair
}

/// Runs commands, one a line, on a format node over `blkdebug` with these options.
#[track_caller]
fn faulty(pair: &Pair, image: (&str, &str), options: &str, commands: &str) -> i32 {
    let (format, name) = image;
    let mut tree = format!(
        "driver={format},file.driver=blkdebug,file.image.driver=file,file.image.filename={name}"
    );
    for option in options.split_whitespace() {
        tree.push_str(",file.");
        tree.push_str(option);
    }
    let mut words = vec!["qemu-io", "--image-opts", &tree];
    for command in commands.lines().map(str::trim).filter(|line| !line.is_empty()) {
        words.extend(["-c", command]);
    }
    pair.run_words(&words).status
}

const RAW: (&str, &str) = ("raw", "r");
const QCOW2: (&str, &str) = ("qcow2", "q");

#[test]
fn injected_errors_meet_the_same_requests() {
    let pair = images();
    let all = "
        read 0 512
        map
        alloc 0 512
        write 0 512
        flush
        discard 0 512
        write -z 0 512
        truncate 2M
        length
        write 2k 1k
        read 2k 1k
    ";
    for options in [
        "inject-error.0.event=none",
        "inject-error.0.event=none inject-error.0.iotype=block-status",
        "inject-error.0.event=none inject-error.0.iotype=write inject-error.0.errno=28",
        "inject-error.0.event=none inject-error.0.once=on inject-error.0.immediately=on",
        "inject-error.0.event=none inject-error.0.sector=5",
        "inject-error.0.event=pwritev inject-error.0.iotype=write",
        "inject-error.0.event=pwritev_done inject-error.0.iotype=read inject-error.0.once=on",
        "inject-error.0.event=flush_to_disk inject-error.0.once=on",
        "inject-error.0.event=none inject-error.0.iotype=read inject-error.1.event=pwritev \
         inject-error.1.sector=5 inject-error.1.iotype=write",
    ] {
        faulty(&pair, RAW, options, all);
    }
    // Without `opt-discard`, QEMU divides by zero when such a node is discarded.
    let transfers = "
        write -P 1 100 5000
        read -P 1 100 5000
        write -z 512 64k
        read -P 0 512 64k
        flush
    ";
    faulty(&pair, RAW, "align=512 opt-discard=64k", "discard 0 1k\ndiscard 0 128k");
    for options in [
        "align=4k",
        "align=512 max-write-zero=4k opt-write-zero=1k opt-discard=64k max-discard=64k",
        "align=512 max-transfer=4k",
    ] {
        faulty(&pair, RAW, options, transfers);
    }
}

#[test]
fn states_follow_each_other_alike() {
    let pair = images();
    for options in [
        "inject-error.0.event=pwritev inject-error.0.state=2 inject-error.0.iotype=write \
         set-state.0.event=pwritev_done set-state.0.new_state=2",
        "inject-error.0.event=pwritev inject-error.0.state=1 inject-error.0.iotype=write \
         set-state.0.event=pwritev_done set-state.0.state=1 set-state.0.new_state=2",
        "inject-error.0.event=pwritev inject-error.0.state=3 inject-error.0.once=on \
         set-state.0.event=pwritev set-state.0.state=1 set-state.0.new_state=2 \
         set-state.1.event=pwritev set-state.1.state=2 set-state.1.new_state=3",
    ] {
        faulty(&pair, RAW, options, "write 0 512\nwrite 0 512\nwrite 0 512\nwrite 0 512");
    }
}

#[test]
fn qcow2_announces_where_qemu_does() {
    for event in ["l2_load", "l2_update", "read_aio", "write_aio", "flush_to_os", "pwritev"] {
        let pair = images();
        let rule =
            format!("inject-error.0.event={event} inject-error.0.errno=28 inject-error.0.once=on");
        let status = faulty(&pair, QCOW2, &rule, "read -P 1 0 64k\nwrite 64k 64k\nflush");
        assert_eq!(status, 1, "{event}");
        pair.run_words(&["qemu-io", "-f", "qcow2", "-c", "read -P 1 0 64k", "q"]);
        pair.run_words(&["qemu-img", "check", "-q", "q"]);
    }
}

#[test]
fn requests_wait_at_breakpoints_and_overtake_each_other() {
    let pair = images();
    for commands in [
        "break pwritev A\naio_write -P 1 0 512\nwait_break A\nwrite -P 2 0 512\nresume A\naio_flush\n\
         read -P 1 0 512",
        "break pwritev A\nbreak pwritev_done B\naio_write 0 512\nwait_break A\nresume A\n\
         wait_break B\nresume B\naio_flush\nresume A\nbreak bogus A\nremove_break C",
        "break flush_to_os A\nremove_break A\nflush",
    ] {
        faulty(&pair, RAW, "", commands);
    }
    for event in ["l2_load", "read_aio"] {
        let commands =
            format!("break {event} A\naio_read -P 1 0 512\nwait_break A\nresume A\naio_flush");
        assert_eq!(faulty(&pair, QCOW2, "", &commands), 0);
    }
    for event in ["l2_load", "write_aio", "cluster_alloc"] {
        let pair = images();
        let commands = format!(
            "break {event} A\naio_write -P 3 128k 512\nwait_break A\nresume A\naio_flush\n\
             read -P 3 128k 512"
        );
        assert_eq!(faulty(&pair, QCOW2, "", &commands), 0, "{event}");
        pair.same_image("q", "qcow2");
    }
    pair.run("qemu-io -c quit blkdebug::q");
}

#[test]
fn wrong_options_are_refused() {
    let pair = images();
    for options in ["align=3", "max-transfer=3G", "align=512 opt-write-zero=100"] {
        assert_eq!(faulty(&pair, RAW, options, "length"), 1, "{options}");
    }
    pair.run("qemu-io -c length blkdebug:q");
}

/// The second write would fail.
#[test]
fn a_zero_cluster_among_data_is_written_with_its_neighbours_at_once() {
    for extended in ["off", "on"] {
        let pair = Pair::new();
        pair.run(&format!("qemu-img create -f qcow2 -o extended_l2={extended} q 1M"));
        pair.run_words(&["qemu-io", "-f", "qcow2", "-c", "write -P 2 0 192k", "q"]);
        pair.run_words(&["qemu-io", "-f", "qcow2", "-c", "write -z 64k 64k", "q"]);
        let map = || pair.run("qemu-img map --output=json q");
        map();
        let options = "set-state.0.event=write_aio set-state.0.new_state=2 \
                       inject-error.0.event=write_aio inject-error.0.state=2";
        assert_eq!(faulty(&pair, QCOW2, options, "write -P 3 0 192k"), 0);
        map();
        pair.same_image("q", "qcow2");
    }
}

#[test]
fn an_image_that_was_only_read_is_closed_without_a_flush() {
    let pair = images();
    assert_eq!(faulty(&pair, QCOW2, "inject-error.0.event=l2_load", "read 0 512"), 1);
}

#[test]
fn one_rule_needs_no_number_and_a_file_name_goes_below() {
    let pair = images();
    for options in [
        "file.driver=blkdebug,file.inject-error.event=l2_load q",
        "driver=qcow2,file.driver=blkdebug,file.inject-error.event=l2_load,file.image.filename=q",
        "file.driver=blkdebug,file.set-state.event=l2_load,file.set-state.new_state=2 q",
    ] {
        let open = format!("open -o {options}");
        pair.run_words(&["qemu-io", "-c", &open, "-c", "read 0 512", "-c", "read 0 512"]);
    }
}
