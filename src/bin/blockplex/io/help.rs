//! What `--help` and `help COMMAND` say.

/// The help of the program.
pub fn usage(program: &str) -> String {
    format!(
        "Usage: {program} [OPTIONS]... [-c STRING]... [file]
Reads, writes and breaks disk images, by command or by script.

  -c, --cmd STRING     run this command; may be repeated. Without it, commands
                       are read from stdin
  -f, --format FMT     the format of the image; without it, its first bytes
                       decide
      --image-opts     the file is given as options (driver=...,file...)
      --object OBJECT  define an object, such as a secret
  -r, --read-only      open for reading only
  -s, --snapshot       write to a temporary overlay, which is thrown away
  -n, --nocache        past the page cache, as -t none
  -t, --cache MODE     none, writeback, unsafe, directsync or writethrough
                       (the default)
  -d, --discard MODE   whether discards reach the file: ignore or unmap (the
                       default)
  -i, --aio MODE       how requests are made: threads, native or io_uring
  -k, --native-aio     as -i native
  -C, --copy-on-read   not supported
  -m, --misalign       use memory that is off its alignment
  -U, --force-share    whatever others do with the image meanwhile
  -T, --trace WHAT     accepted with a warning: RUST_LOG says what is traced
      --allow DIRECTORY|PROTOCOL, --trust-images
                       what images may open by themselves
  -h, --help           print this help and exit
  -V, --version        print the version and exit

'{program} -c help' lists the commands.
"
    )
}

/// What there is to be said of a command beside its line.
pub fn of(command: &str) -> Option<&'static str> {
    Some(match command {
        "read" => READ,
        "readv" => READV,
        "write" => WRITE,
        "writev" => WRITEV,
        "aio_read" => AIO_READ,
        "aio_write" => AIO_WRITE,
        "discard" => DISCARD,
        "open" => OPEN,
        "reopen" => REOPEN,
        "sigraise" => SIGRAISE,
        _ => return None,
    })
}

const READ: &str = "
 Reads 'len' bytes at 'off'. Both may have a unit: 'read -v 512 1k'.

 -b, -- the VM state instead of the disk
 -C, -- one line of statistics, for programs
 -l, -- how many bytes -P compares
 -p, -- accepted, and means nothing
 -P, -- compare what was read with this byte
 -q, -- print no statistics and no dump
 -r, -- accepted, and means nothing: memory need not be registered
 -s, -- where -P begins to compare, within what was read
 -v, -- dump what was read
";

const READV: &str = "
 Reads at 'off' into several pieces of memory, as long as the lengths say:
 'readv -v 512 1k 1k'.

 -C, -- one line of statistics, for programs
 -P, -- compare what was read with this byte
 -q, -- print no statistics and no dump
 -r, -- accepted, and means nothing: memory need not be registered
 -v, -- dump what was read
";

const WRITE: &str = "
 Writes 'len' bytes at 'off', each of them 0xcd: 'write 512 1k'.

 -b, -- the VM state instead of the disk
 -c, -- compressed
 -C, -- one line of statistics, for programs
 -f, -- durable on return
 -n, -- with -z: fail rather than write zeros out
 -p, -- accepted, and means nothing
 -P, -- this byte instead
 -q, -- print no statistics
 -r, -- accepted, and means nothing: memory need not be registered
 -s, -- the beginning of this file instead, over and over
 -u, -- with -z: the space may be given back
 -z, -- zeros, as one write-zeroes request
";

const WRITEV: &str = "
 Writes at 'off' from several pieces of memory, as long as the lengths say:
 'writev 512 1k 1k'.

 -C, -- one line of statistics, for programs
 -f, -- durable on return
 -P, -- this byte instead of 0xcd
 -q, -- print no statistics
 -r, -- accepted, and means nothing: memory need not be registered
";

const AIO_READ: &str = "
 Reads as 'readv' does, but does not wait: 'aio_flush' does. What comes of it is
 printed when another command waits for something; it does not make this one
 fail.

 -C, -- one line of statistics, for programs
 -i, -- do nothing but count as an invalid request
 -P, -- compare what was read with this byte
 -q, -- print no statistics and no dump
 -r, -- accepted, and means nothing: memory need not be registered
 -v, -- dump what was read
";

const AIO_WRITE: &str = "
 Writes as 'writev' does, but does not wait: 'aio_flush' does. What comes of it is
 printed when another command waits for something; it does not make this one
 fail.

 -C, -- one line of statistics, for programs
 -f, -- durable when it ends
 -i, -- do nothing but count as an invalid request
 -P, -- this byte instead of 0xcd
 -q, -- print no statistics
 -r, -- accepted, and means nothing: memory need not be registered
 -u, -- with -z: the space may be given back
 -z, -- zeros, as one write-zeroes request
";

const DISCARD: &str = "
 Says that 'len' bytes at 'off' are not needed any more: 'discard 512 1k'.

 -C, -- one line of statistics, for programs
 -q, -- print no statistics
";

const OPEN: &str = "
 Opens a file for the commands that follow: 'open -n -o driver=raw disk.img'.

 -r, -- for reading only
 -s, -- write to a temporary overlay
 -C, -- not supported
 -n, -- past the page cache
 -U, -- whatever others do with it meanwhile
 -k, -- as -i native
 -i, -- how requests are made: threads, native or io_uring
 -t, -- the cache mode
 -d, -- whether discards reach the file
 -o, -- options of the node, by their names
";

const REOPEN: &str = "
 Opens the image anew with other options: 'reopen -o lazy-refcounts=on'. What is
 not given stays as it is.

 -r, -- for reading only
 -w, -- for writing, too
 -c, -- the cache mode
 -o, -- options of the node, by their names
";

const SIGRAISE: &str = "
 Sends a signal, by its number, to the program itself: 'sigraise 15'.
";
