//! The names an image may try, each against a gate that grants one directory.

use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::{MetadataExt, symlink},
};

use super::*;

/// A temporary directory with a granted and a secret part:
///
/// ```text
///   granted/base.img            granted/sub/other.img
///   granted/soft -> base.img    granted/out -> ../secret/file    granted/absolute -> …/base.img
///   secret/file
/// ```
struct Fixture {
    directory: tempfile::TempDir,
    gate: OpenGate,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir_all(at("granted/sub")).unwrap();
        fs::create_dir(at("secret")).unwrap();
        fs::write(at("granted/base.img"), "base").unwrap();
        fs::write(at("granted/sub/other.img"), "other").unwrap();
        fs::write(at("secret/file"), "secret").unwrap();
        symlink("base.img", at("granted/soft")).unwrap();
        symlink("../secret/file", at("granted/out")).unwrap();
        symlink(at("granted/base.img"), at("granted/absolute")).unwrap();
        let gate = OpenGate::deny_all().allow_directory(at("granted")).unwrap();
        Self { directory, gate }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Opens `name` as an image in `granted/` would ask for it.
    fn open(&self, name: impl AsRef<[u8]>) -> Result<(OwnedFd, PathBuf), GateError> {
        self.open_from("granted", name)
    }

    fn open_from(
        &self,
        base: &str,
        name: impl AsRef<[u8]>,
    ) -> Result<(OwnedFd, PathBuf), GateError> {
        let base = self.at(base);
        self.gate.open_named(Some(&base), name.as_ref(), Access::ReadOnly)
    }

    fn error(&self, name: impl AsRef<[u8]>) -> GateError {
        self.open(name).expect_err("must be refused")
    }
}

fn text(opened: Result<(OwnedFd, PathBuf), GateError>) -> String {
    let mut text = String::new();
    File::from(opened.unwrap().0).read_to_string(&mut text).unwrap();
    text
}

#[test]
fn names_inside_the_grant_open() {
    let fixture = Fixture::new();
    for name in ["base.img", "./base.img", "soft", "sub/../base.img", ".//sub/./../soft"] {
        assert_eq!(text(fixture.open(name)), "base", "{name}");
    }
    let absolute = fixture.at("granted/sub/other.img");
    assert_eq!(text(fixture.open(absolute.as_os_str().as_bytes())), "other");
    assert_eq!(text(fixture.open_from("granted/sub", "../base.img")), "base");
    // The image itself may lie outside; what counts is where the name leads.
    assert_eq!(text(fixture.open_from("secret", "../granted/soft")), "base");
}

#[test]
fn the_returned_path_is_the_base_for_the_next_name() {
    let fixture = Fixture::new();
    let (_, path) = fixture.open("sub/other.img").unwrap();
    let base = path.parent();
    let next = fixture.gate.open_named(base, b"../base.img", Access::ReadOnly);
    assert_eq!(text(next), "base");
}

#[test]
fn a_closed_gate_refuses_every_name() {
    let fixture = Fixture::new();
    let closed = OpenGate::deny_all();
    let base = fixture.at("granted");
    for name in ["base.img", "missing", "/dev/null", "/", ".", ".."] {
        assert_eq!(
            closed.open_named(Some(&base), name.as_bytes(), Access::ReadOnly).unwrap_err(),
            GateError::NotGranted(name.into())
        );
    }
}

#[test]
fn no_name_leads_out_of_the_grant() {
    let fixture = Fixture::new();
    let secret = fixture.at("secret/file");
    let secret = secret.to_str().unwrap();
    let through_root = format!("{}/../secret/file", fixture.at("granted").display());
    for name in [
        secret,
        &through_root,
        "../secret/file",
        "sub/../../secret/file",
        "../../../../../../../../etc/passwd",
        "/etc/passwd",
        "out",
        "absolute",
        "/dev/zero",
        "/proc/self/mem",
        "/dev/fd/0",
    ] {
        let error = fixture.error(name);
        assert_eq!(error, GateError::NotGranted(name.into()), "{name}");
    }
}

#[test]
fn a_magic_link_inside_the_grant_is_refused() {
    let gate = OpenGate::deny_all().allow_directory("/proc/self").unwrap();
    let name = b"/proc/self/fd/0";
    assert_eq!(
        gate.open_named(None, name, Access::ReadOnly).unwrap_err(),
        GateError::NotGranted("/proc/self/fd/0".into())
    );
}

#[test]
fn refusals_do_not_tell_what_exists_outside() {
    let fixture = Fixture::new();
    let names = ["../secret/file", "out", "sub/../../secret/file"];
    let before: Vec<String> = names.iter().map(|name| fixture.error(name).to_string()).collect();
    fs::remove_dir_all(fixture.at("secret")).unwrap();
    let after: Vec<String> = names.iter().map(|name| fixture.error(name).to_string()).collect();
    assert_eq!(before, after);
}

#[test]
fn a_missing_file_inside_the_grant_is_called_missing() {
    let fixture = Fixture::new();
    assert_eq!(fixture.error("gone"), GateError::Missing("gone".into()));
    assert_eq!(
        fixture.error("gone/../../secret/file"),
        GateError::Missing("gone/../../secret/file".into())
    );
}

#[test]
fn schemes_are_refused_and_a_late_colon_is_none() {
    let fixture = Fixture::new();
    for name in [
        "json:{\"driver\":\"null-co\"}",
        "nbd://host/disk",
        "http://host/disk",
        "fat:rw:/etc",
        "file:base.img",
        ":base.img",
        "\u{1b}:x",
    ] {
        assert_eq!(fixture.error(name), GateError::Scheme(escape_bytes(name.as_bytes())), "{name}");
    }
    fs::write(fixture.at("granted/a:b"), "colon").unwrap();
    assert_eq!(text(fixture.open("./a:b")), "colon");
}

#[test]
fn a_granted_scheme_is_named_and_no_other() {
    let gate = OpenGate::deny_all().allow_protocol("nbd").unwrap();
    assert_eq!(gate.granted_scheme(b"nbd://host/disk"), Ok(Some("nbd")));
    assert_eq!(gate.granted_scheme(b"/a/b:c"), Ok(None));
    assert_eq!(gate.granted_scheme(b"a"), Ok(None));
    for name in [&b"nbds://host"[..], b"json:{}", b"\xff:x", b"NBD:x"] {
        assert!(gate.granted_scheme(name).is_err());
    }
    // Even then the gate itself opens files only.
    assert!(matches!(gate.open_named(None, b"nbd:x", Access::ReadOnly), Err(GateError::Scheme(_))));
    for scheme in ["json", "file", "fat", "blkdebug", "", "a:b", "a/b"] {
        assert!(gate.clone().allow_protocol(scheme).is_err(), "{scheme}");
    }
}

#[test]
fn malformed_names_are_refused_before_anything_is_looked_up() {
    let fixture = Fixture::new();
    assert_eq!(fixture.error(""), GateError::Empty);
    assert_eq!(
        fixture.error("base.img\0/x/secret"),
        GateError::Nul(r"base.img\x00/x/secret".into())
    );
    assert_eq!(fixture.error(vec![b'a'; 70_000]), GateError::TooLong(70_000));
    let relative = fixture.gate.open_named(None, b"base.img", Access::ReadOnly);
    assert_eq!(relative.unwrap_err(), GateError::NoBase("base.img".into()));
}

#[test]
fn names_are_bytes_on_the_way_in_and_escaped_on_the_way_out() {
    let fixture = Fixture::new();
    let name = b"a\xff\x1b[2J";
    let shown = r"'a\xff\x1b[2J': no such file";
    assert_eq!(fixture.error(name).to_string(), shown);
    fs::write(fixture.at("granted").join(OsStr::from_bytes(name)), "bytes").unwrap();
    assert_eq!(text(fixture.open(name)), "bytes");
}

#[test]
fn only_regular_files_open_and_a_fifo_does_not_block() {
    let fixture = Fixture::new();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        fixture.at("granted/fifo"),
        FileType::Fifo,
        Mode::RUSR | Mode::WUSR,
        0,
    )
    .unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(fixture.at("granted/socket")).unwrap();
    for name in ["fifo", "socket", "sub", ".", "sub/.."] {
        let error = fixture.error(name);
        assert_eq!(error, GateError::NotAFile(name.into()), "{name}");
    }
    let devices = OpenGate::deny_all().allow_directory("/dev").unwrap();
    assert_eq!(
        devices.allow_block_devices().open_named(None, b"/dev/null", Access::ReadOnly).unwrap_err(),
        GateError::NotAFile("/dev/null".into())
    );
}

#[test]
fn the_descriptor_blocks_closes_on_exec_and_has_the_asked_access() {
    let fixture = Fixture::new();
    for (access, mode) in [(Access::ReadOnly, OFlags::RDONLY), (Access::ReadWrite, OFlags::RDWR)] {
        let base = fixture.at("granted");
        let (fd, _) = fixture.gate.open_named(Some(&base), b"base.img", access).unwrap();
        let flags = fcntl_getfl(&fd).unwrap();
        assert!(!flags.contains(OFlags::NONBLOCK));
        assert_eq!(flags & OFlags::RWMODE, mode);
        let flags = rustix::io::fcntl_getfd(&fd).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }
}

#[test]
fn a_grant_is_the_directory_as_it_was_when_granted() {
    let fixture = Fixture::new();
    fs::rename(fixture.at("granted"), fixture.at("moved")).unwrap();
    fs::rename(fixture.at("secret"), fixture.at("granted")).unwrap();
    let name = fixture.at("granted/file");
    let error = fixture.error(name.as_os_str().as_bytes());
    assert!(matches!(error, GateError::Missing(_)), "{error}");
}

#[test]
fn a_grant_through_a_link_is_known_by_both_names() {
    let fixture = Fixture::new();
    symlink("granted", fixture.at("alias")).unwrap();
    let gate = OpenGate::deny_all().allow_directory(fixture.at("alias")).unwrap();
    for name in ["alias/base.img", "granted/base.img"] {
        let name = fixture.at(name);
        let opened = gate.open_named(None, name.as_os_str().as_bytes(), Access::ReadOnly);
        assert_eq!(text(opened), "base");
    }
}

#[test]
fn overlapping_grants_are_all_tried() {
    let fixture = Fixture::new();
    let gate = OpenGate::deny_all()
        .allow_directory(fixture.at("granted/sub"))
        .and_then(|gate| gate.allow_directory(fixture.at("granted")))
        .unwrap();
    let name = fixture.at("granted/sub/../base.img");
    let opened = gate.open_named(None, name.as_os_str().as_bytes(), Access::ReadOnly);
    assert_eq!(text(opened), "base");
}

#[test]
fn only_directories_can_be_granted() {
    let fixture = Fixture::new();
    for name in ["granted/base.img", "nowhere"] {
        let granted = OpenGate::deny_all().allow_directory(fixture.at(name));
        assert!(granted.is_err(), "{name}");
    }
}

#[test]
fn identity_follows_the_file_not_the_name() {
    let fixture = Fixture::new();
    let identity = |name: &str| FileIdentity::of(fixture.open(name).unwrap().0).unwrap();
    assert_eq!(identity("soft"), identity("base.img"));
    assert_ne!(identity("sub/other.img"), identity("base.img"));
    let metadata = fs::metadata(fixture.at("granted/base.img")).unwrap();
    assert_eq!(identity("soft").ino, metadata.ino());
}
