//! Guessing an image's format from its first bytes: for suggestions, never for decisions.
//!
//! A guest that owns a raw disk can write any header it likes to its first sector. If something
//! later *probes* that disk, the guest has turned it into, say, a qcow2 image whose backing file
//! is a secret of the host. So no open in this project probes. What is here serves two purposes:
//!
//! * [`suggest_format`] lets a tool tell its user "this looks like qcow2; say so if it is".
//! * [`looks_like_format`] is the guard for a raw node whose user did let a probe decide: such a
//!   node refuses writes that would make the next probe decide otherwise.
//!
//! The recognisers err on the side of recognising: the guard has to refuse whatever any other
//! program's probe might take for an image, or the guest is only one program away.

/// How many bytes from the start of an image are looked at: one sector.
pub const PROBE_BYTES: usize = 512;

/// What the first bytes of an image look like. A suggestion for a human to confirm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suggestion {
    /// Like an image of a format this project reads; the driver's name.
    Supported(&'static str),
    /// Like an image of a format this project knows by name only.
    Unsupported(&'static str),
    /// Like nothing known: raw, as far as one can tell.
    Raw,
}

impl Suggestion {
    /// The name of the format.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Supported(name) | Self::Unsupported(name) => name,
            Self::Raw => "raw",
        }
    }
}

/// Suggests a format for an image that begins with `first_bytes`, of which at most
/// [`PROBE_BYTES`] are looked at; fewer are taken as they are.
#[must_use]
pub fn suggest_format(first_bytes: &[u8]) -> Suggestion {
    let bytes = &first_bytes[..first_bytes.len().min(PROBE_BYTES)];
    if bytes.starts_with(b"QFI\xfb") {
        return match bytes.get(4..8) {
            // The first version is a format of its own, with a driver of its own.
            Some([0, 0, 0, 1]) => Suggestion::Unsupported("qcow"),
            _ => Suggestion::Supported("qcow2"),
        };
    }
    let known = MAGICS
        .iter()
        .find(|magic| bytes.get(magic.offset..).is_some_and(|rest| rest.starts_with(magic.bytes)))
        .map(|magic| magic.format);
    match known {
        Some(format) => Suggestion::Unsupported(format),
        None if is_vmdk_descriptor(bytes) => Suggestion::Unsupported("vmdk"),
        None => Suggestion::Raw,
    }
}

/// Whether a disk whose first sector is `sector0` would be taken for something else than raw.
///
/// For the one place below all write paths of a raw node that was opened by probing: it must look
/// at its own copy of the data (the guest may change the original between the look and the write)
/// and at the whole sector as it will be, not only at the part being written.
#[must_use]
pub fn looks_like_format(sector0: &[u8]) -> bool {
    suggest_format(sector0) != Suggestion::Raw
}

/// Bytes that mark a format, at a fixed place.
struct Magic {
    offset: usize,
    bytes: &'static [u8],
    format: &'static str,
}

const fn magic(offset: usize, bytes: &'static [u8], format: &'static str) -> Magic {
    Magic { offset, bytes, format }
}

const MAGICS: [Magic; 13] = [
    magic(0, b"QED\0", "qed"),
    magic(0, b"KDMV", "vmdk"),
    magic(0, b"COWD", "vmdk"),
    magic(0, b"# Disk DescriptorFile", "vmdk"),
    magic(0, b"vhdxfile", "vhdx"),
    magic(0, b"conectix", "vpc"),
    magic(0x40, &[0x7f, 0x10, 0xda, 0xbe], "vdi"),
    magic(0x40, &[0xbe, 0xda, 0x10, 0x7f], "vdi"),
    magic(0, b"LUKS\xba\xbe", "luks"),
    magic(0, b"WithoutFreeSpace", "parallels"),
    magic(0, b"WithouFreSpacExt", "parallels"),
    magic(0, b"Bochs Virtual HD Image", "bochs"),
    magic(0, b"#!/bin/sh\n#V2.0 Format\n", "cloop"),
];

/// Whether the text is a VMDK descriptor, which needs no magic: after comments and blank lines
/// comes a line with the version.
fn is_vmdk_descriptor(bytes: &[u8]) -> bool {
    bytes
        .split(|byte| *byte == b'\n')
        .map(<[u8]>::trim_ascii)
        .find(|line| !line.is_empty() && line[0] != b'#')
        .is_some_and(|line| {
            line.strip_prefix(b"version=")
                .is_some_and(|version| version.first().is_some_and(u8::is_ascii_digit))
        })
}

#[cfg(test)]
mod tests {
    use std::{fs, process::Command};

    use super::*;

    #[test]
    fn headers_are_known_by_their_magic() {
        let mut vdi = vec![b'<'; 0x40];
        vdi.extend([0x7f, 0x10, 0xda, 0xbe]);
        for (bytes, expected) in [
            (&b"QFI\xfb\0\0\0\x03"[..], Suggestion::Supported("qcow2")),
            (b"QFI\xfb\0\0\0\x02", Suggestion::Supported("qcow2")),
            (b"QFI\xfb\0\0\0\x01", Suggestion::Unsupported("qcow")),
            // The driver is to say what is wrong with these, not a probe.
            (b"QFI\xfb\xff\xff\xff\xff", Suggestion::Supported("qcow2")),
            (b"QFI\xfb", Suggestion::Supported("qcow2")),
            (&vdi, Suggestion::Unsupported("vdi")),
            (b"LUKS\xba\xbe\0\x02", Suggestion::Unsupported("luks")),
            (b"version=1\n", Suggestion::Unsupported("vmdk")),
            (b"# comment\r\n \r\n# more\nversion=3\r\n", Suggestion::Unsupported("vmdk")),
        ] {
            assert_eq!(suggest_format(bytes), expected, "{bytes:?}");
        }
    }

    #[test]
    fn everything_else_is_raw() {
        for bytes in [
            &b""[..],
            b"QFI",
            b"QFI\0\0\0\0\x03",
            b"\0QFI\xfb",
            b"# only comments\n",
            b"x\nversion=1\n",
            b"version=",
            &[0; 4096],
        ] {
            assert_eq!(suggest_format(bytes), Suggestion::Raw, "{bytes:?}");
            assert!(!looks_like_format(bytes));
        }
        let mut late = vec![b'\n'; PROBE_BYTES];
        late.extend(b"version=1\n");
        assert_eq!(suggest_format(&late), Suggestion::Raw);
    }

    /// The guard must know whatever the most common prober makes and knows.
    #[test]
    fn images_made_by_qemu_are_recognised() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        for format in ["qcow2", "qcow", "qed", "vdi", "vhdx", "vmdk", "vpc", "parallels"] {
            let made = Command::new("qemu-img")
                .args(["create", "-q", "-f", format])
                .arg(&path)
                .arg("8M")
                .status();
            let Ok(made) = made else {
                eprintln!("skipped: qemu-img is not installed");
                return;
            };
            assert!(made.success(), "{format}");
            let bytes = fs::read(&path).unwrap();
            assert_eq!(suggest_format(&bytes).name(), format);
            assert!(looks_like_format(&bytes[..PROBE_BYTES]));
            fs::remove_file(&path).unwrap();
        }
    }
}
