//! `qemu-io`, command by command.

use crate::pair::Pair;

/// Runs `qemu-io ARGUMENTS -c COMMAND …`; one command a line.
#[track_caller]
fn io(pair: &Pair, arguments: &str, commands: &str) -> i32 {
    let mut words = vec!["qemu-io"];
    words.extend(arguments.split_whitespace());
    for command in commands.lines().map(str::trim).filter(|line| !line.is_empty()) {
        words.extend(["-c", command]);
    }
    pair.run_words(&words).status
}

/// A pair of folders with a raw and a qcow2 image of 1 MiB.
fn images() -> Pair {
    let pair = Pair::new();
    pair.run("qemu-img create -f raw r 1M");
    pair.run("qemu-img create -f qcow2 q 1M");
    pair
}

#[test]
fn reads_and_writes_say_what_they_did() {
    let pair = images();
    let commands = "
        write -P 0x21 0 16
        read -v 0 20
        write -P 0x5a 3 20
        read -v 3 40
        read 1 513
        read -P 0xcd 0 512
        read -qP 0xaa 0 512
        read -P 0x5a -s 3 -l 20 0 512
        read -P 0x5a -l 20 -s 4 0 512
        write -C 0 512
        read -Cv 0 16
        write -q 0 512
        write -f 0 512
        write -p 0 512
        write -r 0 512
        write 0 0
        read -v 0 0
        writev -P 4 0 512 1k
        readv -P 4 0 1k 512
        readv -v 0 16 16
        readv -qP 5 0 512
        write -z 0 64k
        write -zu 64k 64k
        write -z -f 128k 512
        read 0x0 0x200
        read 0 1.5k
        read 0 -- 512
        read 0 512 -q
        flush
    ";
    assert_eq!(io(&pair, "-f raw r", commands), 1);
    assert_eq!(io(&pair, "-f qcow2 q", commands), 1);
    pair.same_image("r", "raw");
    pair.same_image("q", "qcow2");
}

#[test]
fn what_cannot_be_is_refused_in_the_same_words() {
    let pair = images();
    let commands = "
        foo
        read
        read 0
        read -x 0 1
        read -1 512
        read a 512
        read 0 b
        read 0 1kk
        read 0 4G
        read 1M 512
        read -P 300 0 512
        read -P x 0 512
        read -P -1 0 512
        read -s 1 0 512
        read -l 1 0 512
        read -l x -P 0 0 512
        read -P 0 -l -3 0 512
        read -P 0 -s 100 -l 500 0 512
        read -P 0 -s 600 0 512
        read -b 0 512
        read -b 1 512
        read -i 0 512
        read 0 512;read 0 512
        read \"0\" 512
        write -z -P 1 0 512
        write -u 0 512
        write -n 0 512
        write -b -z 0 512
        write -f -c 0 512
        write -c 0 512
        write -c 100 512
        write -b 0 512
        write -s nofile 0 512
        write -s /dev/null 0 512
        write -s r -P 3 0 512
        write -z -r 0 512
        write -z 0 4G
        write 2M 512
        readv 0
        readv 0 2G 512
        readv 0 1G 1G
        readv 0 x
        writev -z 0 512
        discard 0
        discard x 5
        discard 0 4G
        discard 2M 512
        discard -z 0 512
        alloc
        alloc x
        alloc -1
        map x
        length x
        truncate
        truncate x
        truncate -m bogus 1M
        truncate -5
        truncate 9E
        sleep
        sleep x
        sleep -1
        sigraise
        sigraise x
        sigraise 99999999999
        break foo
        break foo A
        remove_break A
        resume A
        wait_break
        zone_report 0 1
        zone_open 0 1
        zone_close 0 1
        zone_finish 0 1
        zone_reset 0 1
        zone_append 0 512 512
        zone_append 0 512
        zap 0 x 1
        zone_report 0
        close x
        open a b
        open -z
        open
        reopen x
        reopen -z
        reopen -r -w
        reopen -c foo
        reopen -o read-only=on -r
        reopen -o cache.direct=on -c none
        reopen -o driver=qcow2
        reopen -o file.locking=off
        reopen -o node-name=foo
    ";
    assert_eq!(io(&pair, "-f raw r", commands), 1);
    pair.same_image("r", "raw");
}

#[test]
fn extents_lengths_and_information_are_the_same() {
    let pair = images();
    let commands = "
        alloc 0
        alloc 0 2M
        alloc 1023 5
        alloc 2M
        map
        length
        info
        discard 0 64k
        discard -q 64k 512
        discard -C 0 512
        truncate 2M
        length
        map
        truncate -m falloc 3M
        length
        truncate -m full 1M
    ";
    assert_eq!(io(&pair, "-f raw r", commands), 1);
    let commands = "
        alloc 0 1M
        map
        write 128k 64k
        alloc 64k 128k
        alloc 128k 65536
        map
        info
        truncate 2M
        truncate -m full 1M
        length
        write 1536k 1k
        map
        write -c 512k 64k
        write -c 512k 64k
        write -c 64k 512
        write -b 0 512
        read -b 0 512
        read -b -P 0 4k 512
    ";
    assert_eq!(io(&pair, "-f qcow2 q", commands), 1);
    pair.same_image("q", "qcow2");
    pair.run("qemu-img bitmap --add q b");
    pair.run("qemu-img create -f qcow2 -o compat=0.10 old 1M");
    assert_eq!(io(&pair, "-r -f qcow2 q", "info"), 0);
    assert_eq!(io(&pair, "-f qcow2 old", "info"), 0);
}

#[test]
fn background_requests_are_reported_when_something_waits() {
    let pair = images();
    let commands = "
        aio_write -P 7 0 512 512
        aio_flush
        aio_read -P 7 0 1k
        aio_flush
        aio_read -v 0 16
        aio_flush
        aio_read -qP 8 0 512
        aio_flush
        aio_write -z 0 512
        aio_flush
        aio_write -zf 0 512
        aio_flush
        aio_write -C 0 512
        aio_flush
        aio_write -q 0 512
        aio_read 2M 512
        aio_flush
        aio_write 2M 512
        length
        aio_flush
        aio_write -i 0 512
        aio_read -i 0 512
        aio_write -z 0 512 512
        aio_write -u 0 512
        aio_write -z -r 0 512
        aio_write -b 0 1
        aio_read -x 0 1
        aio_read 0
        aio_read 0 x
        aio_read x 1
        aio_write -P 300 0 1
        aio_write 0 2G
        aio_write -z x 1
        aio_flush foo
    ";
    assert_eq!(io(&pair, "-f raw r", commands), 1);
    assert_eq!(io(&pair, "-f raw r", "aio_read 0 512"), 0, "reported at the end");
    pair.same_image("r", "raw");
}

#[test]
fn files_are_opened_closed_and_opened_anew() {
    let pair = images();
    let commands = "
        close
        length
        read 0 512
        open -o driver=raw r
        open r
        length
        close
        open -o driver=qcow2 r
        open nofile
        open -t foo r
        open -d foo r
        open -i foo r
        open -U r
        open -t writethrough -o driver=raw r
        length
        close
        open -n -o driver=raw r
        read 0 4k
        close
        open -d unmap -i threads -o driver=raw r
        read 0 512
        close
        open -o driver=qcow2,file.filename=q
        length
        close
        open -o read-only=on,driver=raw r
        open -r -o driver=raw r
        write 0 512
        discard 0 512
        truncate 2M
        flush
        close
    ";
    assert_eq!(io(&pair, "-f raw r", commands), 1);
    let commands = "
        reopen
        reopen -r
        write 0 512
        reopen -w
        write 0 512
        reopen -c none
        write 0 4k
        reopen -c unsafe
        reopen -o discard=unmap
        reopen -o detect-zeroes=on
        reopen -o driver=raw
        reopen -o offset=512
        length
        reopen -o size=512
        length
    ";
    assert_eq!(io(&pair, "-f raw r", commands), 1);
    let commands = "write 0 64k\nreopen -o l2-cache-size=1M\nread 0 64k\nreopen -r\nread 0 64k";
    assert_eq!(io(&pair, "-f qcow2 q", commands), 0);
    pair.same_image("r", "raw");
    pair.same_image("q", "qcow2");
}

#[test]
fn a_snapshot_keeps_the_image_as_it_is() {
    let pair = images();
    let commands = "write -P 9 0 512\nread -P 9 0 512\nread -P 0 512 512";
    assert_eq!(io(&pair, "-s -f raw r", commands), 0);
    assert_eq!(io(&pair, "-s -f qcow2 q", commands), 0);
    assert_eq!(io(&pair, "-f raw r", "read -P 0 0 1M"), 0);
    assert_eq!(io(&pair, "-f qcow2 q", "read -P 0 0 1M\nmap"), 0);
}

#[test]
fn the_command_line_is_understood_alike() {
    let pair = images();
    let some = "read 0 512\nlength";
    for arguments in [
        "-f raw r",
        "-f raw -r r",
        "-f raw -m r",
        "-f raw -n r",
        "-f raw --cache=none r",
        "-f raw -t directsync r",
        "-f raw -d unmap r",
        "-f raw -i io_uring r",
        "-f raw -i threads r",
        "-f raw -U r",
        "-f raw -U -r r",
        "-f qcow2 -r q",
        "q",
        "-r r",
        "-f qcow2 r",
        "-f foo r",
        "nofile",
        "--image-opts driver=raw,file.filename=r",
        "--image-opts driver=qcow2,file.driver=file,file.filename=q",
        "--image-opts driver=raw,file.filename=nofile",
        "--image-opts filename=r",
        "--image-opts -f raw driver=raw,file.filename=r",
        "-t foo r",
        "-d foo r",
        "-i foo r",
        "--object secret,id=a,data=foo -f raw r",
        "-T foo -f raw r",
    ] {
        io(&pair, arguments, some);
    }
    io(&pair, "-f raw r", "quit\nlength");
    io(&pair, "-f raw r", "q 1\nlength");
    io(&pair, "", "length\nflush\nclose\nmap\nhelp length\nsleep 1\nsigraise 0\nopen -r q\nlength");
    io(
        &pair,
        "-f raw r",
        "help\nhelp length\n? l\nhelp foo\nhelp a b\nl\nf\na 0\nw 0 1\nr 0 1\nd 0 1",
    );
    io(&pair, "-f raw r", "read  0   512");
    io(&pair, "-f raw r", "sigraise 15\nlength");
    io(&pair, "-f raw r", "abort\nlength");
}

#[test]
fn a_script_is_prompted_for_and_its_failures_are_counted() {
    let pair = images();
    for script in [
        "",
        "length",
        "read 0 512\n\nlength\nfoo\n",
        "read 0 512\nquit\nlength\n",
        "close\nlength\nopen -r q\nlength\n",
        "aio_write 0 512\nsleep 50\nlength\n",
        "# no comment\n   \nread 0 512\n",
    ] {
        pair.run_input("qemu-io -f raw r", script);
    }
    pair.run_input("qemu-io", "length\n");
}
