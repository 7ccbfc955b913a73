//! `open`, `close`, `reopen`: which file, and how.

use blockplex::OptionTree;
use blockplex::drivers::options::Value;
use blockplex::drivers::qcow2::CreateOptions;
use blockplex::graph::Role;
use blockplex::io::engine::EngineChoice;

use super::command::{Status, usage};
use super::session::{OpenFile, Session};
use crate::tool::getopt::{Opt, Parser, short, short_with};
use crate::tool::open::{CacheMode, Image, ImageOpenOptions, last_of_each};
use crate::tool::{Failure, wait};

const OPEN: &[Opt] = &[
    short("snapshot", 's'),
    short("copy-on-read", 'C'),
    short("nocache", 'n'),
    short("read-only", 'r'),
    short("native-aio", 'k'),
    short_with("aio", 'i'),
    short_with("cache", 't'),
    short_with("discard", 'd'),
    short_with("options", 'o'),
    short("force-share", 'U'),
];

const REOPEN: &[Opt] = &[
    short_with("cache", 'c'),
    short_with("options", 'o'),
    short("read-only", 'r'),
    short("writable", 'w'),
];

/// The options that every node can change while it is open.
const CHANGEABLE: [&str; 5] = ["read-only", "discard", "detect-zeroes", "cache", "force-share"];
const CHANGEABLE_RAW: [&str; 2] = ["offset", "size"];
const CHANGEABLE_QCOW2: [&str; 11] = [
    "lazy-refcounts",
    "pass-discard-request",
    "pass-discard-snapshot",
    "pass-discard-other",
    "discard-no-unref",
    "overlap-check",
    "cache-size",
    "l2-cache-size",
    "l2-cache-entry-size",
    "refcount-cache-size",
    "cache-clean-interval",
];

/// Which file, and how it is opened.
#[derive(Clone, Debug)]
pub struct Access {
    pub file: Option<String>,
    /// The file's name is options.
    pub image_opts: bool,
    pub format: Option<String>,
    read_only: bool,
    snapshot: bool,
    copy_on_read: bool,
    force_share: bool,
    cache: CacheMode,
    unmap: bool,
    engine: EngineChoice,
    /// Linux AIO was asked for, which is for direct I/O.
    native: bool,
    /// Options of the node, by their dotted names; they win.
    options: Vec<(String, String)>,
}

impl Default for Access {
    fn default() -> Access {
        Access {
            file: None,
            image_opts: false,
            format: None,
            read_only: false,
            snapshot: false,
            copy_on_read: false,
            force_share: false,
            cache: CacheMode { writethrough: true, ..CacheMode::default() },
            unmap: true,
            engine: EngineChoice::Auto,
            native: false,
            options: Vec::new(),
        }
    }
}

impl Access {
    /// Whether the file is opened for writing.
    pub fn writes(&self) -> bool {
        let given = self.options.iter().rev().find(|(name, _)| name == "read-only");
        match given {
            Some((_, value)) => matches!(value.as_str(), "off" | "no" | "false" | "n"),
            None => !self.read_only,
        }
    }

    /// Takes an option of the command line or of `open`.
    ///
    /// # Errors
    ///
    /// A value that is none of those it can have.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), Failure> {
        match name {
            "read-only" => self.read_only = true,
            "snapshot" => self.snapshot = true,
            "copy-on-read" => self.copy_on_read = true,
            "force-share" => self.force_share = true,
            "nocache" => {
                self.cache = CacheMode { direct: true, ..CacheMode::default() };
            }
            "cache" => self.cache = cache_mode(value)?,
            "discard" => {
                self.unmap = match value {
                    "ignore" | "off" => false,
                    "unmap" | "on" => true,
                    _ => return Err(Failure::new(format!("Invalid discard option: {value}"))),
                };
            }
            "native-aio" => self.set_aio("native")?,
            "aio" => self.set_aio(value)?,
            other => return Err(Failure::new(format!("unknown option '{other}'"))),
        }
        Ok(())
    }

    fn set_aio(&mut self, mode: &str) -> Result<(), Failure> {
        self.engine = match mode {
            "threads" => EngineChoice::Threads,
            // What Linux AIO is good for, the ring does.
            "native" => EngineChoice::Auto,
            "io_uring" => EngineChoice::Ring,
            _ => return Err(Failure::new(format!("Invalid aio option: {mode}"))),
        };
        self.native = mode == "native";
        Ok(())
    }

    /// The same in the words of the tools.
    fn open_options(&self) -> ImageOpenOptions {
        ImageOpenOptions {
            filename: self.file.clone().unwrap_or_default(),
            image_opts: self.image_opts,
            format: self.format.clone(),
            write: self.writes(),
            force_share: self.force_share,
            cache: self.cache,
            unmap: self.unmap,
            overrides: self.options.clone(),
            ..ImageOpenOptions::default()
        }
    }

    /// What does not go together.
    fn check(&self) -> Result<(), Failure> {
        if self.copy_on_read && !self.writes() {
            return Err(Failure::new("Can't use copy-on-read on read-only device"));
        }
        if self.copy_on_read {
            return Err(Failure::new("copy-on-read is not supported"));
        }
        if self.native && !self.cache.direct {
            let text = "aio=native was specified, but it requires cache.direct=on, which was not \
                        specified.";
            return Err(Failure::new(text));
        }
        if self.force_share && self.writes() {
            return Err(Failure::new("force-share=on can only be used with read-only images"));
        }
        Ok(())
    }
}

fn cache_mode(value: &str) -> Result<CacheMode, Failure> {
    CacheMode::parse(value).ok_or_else(|| Failure::new(format!("Invalid cache option: {value}")))
}

/// An image, how it was opened, and the folder of its overlay.
type Opened = (Image, ImageOpenOptions, Option<tempfile::TempDir>);

impl Session {
    /// Opens a file.
    pub fn open(&mut self, access: Access) -> Status {
        if self.file.is_some() {
            self.tool.report("file open already, try 'help close'");
            return Status::Failed;
        }
        let opened = access.check().and_then(|()| self.open_image(&access));
        let opened = opened.and_then(|opened| refuse_read_only(&access, opened));
        match opened {
            Ok((image, options, overlay)) => {
                self.tool.warn_if_guarded(&image);
                let file = OpenFile::new(image, access, options, overlay);
                self.watch(&file);
                self.file = Some(file);
                Status::Done
            }
            Err(failure) => {
                let place = match &access.file {
                    Some(file) if !access.image_opts => format!(" device {file}"),
                    _ => String::new(),
                };
                failure.prefixed(&format!("can't open{place}: ")).print(&self.tool, None);
                Status::Failed
            }
        }
    }

    fn open_image(&mut self, access: &Access) -> Result<Opened, Failure> {
        self.use_engine(access.engine)?;
        if !access.snapshot {
            let options = access.open_options();
            return Ok((self.tool.open_quietly(&options)?, options, None));
        }
        let below = ImageOpenOptions { write: false, ..access.open_options() };
        let image = self.tool.open_quietly(&below)?;
        let size = image.length();
        image.close()?;
        let directory = tempfile::Builder::new().prefix("blockplex-io-").tempdir();
        let directory = directory.map_err(|error| Failure::new(error.to_string()))?;
        let overlay = directory.path().join("overlay.qcow2");
        let layer = self.tool.layer()?;
        wait(layer.create_qcow2(&overlay, CreateOptions::new(size?.next_multiple_of(512))))?;
        let mut words = vec!["driver=qcow2".to_owned(), "file.driver=file".to_owned()];
        words.push(format!("file.filename={}", escaped(&overlay.to_string_lossy())));
        flatten(&below.tree()?, "backing.", &mut words);
        let above = ImageOpenOptions {
            filename: words.join(","),
            image_opts: true,
            format: None,
            write: true,
            ..access.open_options()
        };
        Ok((self.tool.open_quietly(&above)?, above, Some(directory)))
    }

    /// Closes the open file, if there is one. Whether that went well.
    pub fn close(&mut self) -> bool {
        let Some(OpenFile { image, overlay, .. }) = self.file.take() else { return true };
        let closed = image.close();
        drop(overlay);
        if let Err(failure) = closed {
            failure.print(&self.tool, None);
            return false;
        }
        true
    }
}

/// An image whose options make it read-only cannot be opened for writing.
fn refuse_read_only(access: &Access, opened: Opened) -> Result<Opened, Failure> {
    let asks_to_write = !access.read_only;
    if asks_to_write && opened.0.view()?.options().read_only {
        opened.0.close()?;
        return Err(Failure::new("Block node is read-only"));
    }
    Ok(opened)
}

/// A value within `key=value,…`.
fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

/// A tree as `key=value` words, each key with `prefix` before it.
fn flatten(tree: &OptionTree, prefix: &str, words: &mut Vec<String>) {
    for (key, value) in tree.iter() {
        flatten_value(value, &format!("{prefix}{key}"), words);
    }
}

fn flatten_value(value: &Value, name: &str, words: &mut Vec<String>) {
    match value {
        Value::String(text) => words.push(format!("{name}={}", escaped(text))),
        Value::Number(number) => words.push(format!("{name}={number}")),
        Value::Bool(on) => words.push(format!("{name}={}", if *on { "on" } else { "off" })),
        Value::Null => words.push(format!("{name}=")),
        Value::Tree(tree) => flatten(tree, &format!("{name}."), words),
        Value::List(items) => {
            for (index, item) in items.iter().enumerate() {
                flatten_value(item, &format!("{name}.{index}"), words);
            }
        }
    }
}

/// Options `key=value,…` by their dotted names.
fn parse_options(text: &str) -> Result<(OptionTree, Vec<(String, String)>), Failure> {
    let tree = OptionTree::from_keyval(&last_of_each(text), None);
    let tree = tree.map_err(|error| Failure::new(error.to_string()))?;
    let mut words = Vec::new();
    flatten(&tree, "", &mut words);
    let pairs = words.iter().filter_map(|word| word.split_once('='));
    let pairs = pairs.map(|(key, value)| (key.to_owned(), value.replace(",,", ",")));
    let pairs = pairs.collect();
    Ok((tree, pairs))
}

/// Ends a command with a message.
fn fail(session: &Session, failure: &Failure) -> Status {
    failure.print(&session.tool, None);
    Status::Failed
}

/// `open`.
pub fn open(session: &mut Session, words: &[String]) -> Status {
    let mut parser = Parser::new(&words[0], None, OPEN, words[1..].to_vec());
    let mut access = Access { image_opts: session.image_opts, ..Access::default() };
    let mut given = None;
    loop {
        let option = match parser.next() {
            Ok(Some(option)) => option,
            Ok(None) => break,
            Err(_) => return usage("open"),
        };
        let taken = match option.name {
            "options" => {
                given = Some(option.value);
                Ok(())
            }
            name => access.set(name, &option.value),
        };
        if let Err(failure) = taken {
            return fail(session, &failure);
        }
    }
    let mut files = parser.positional();
    if files.len() > 1 {
        return usage("open");
    }
    access.file = files.pop();
    match (&access.file, given) {
        (None, Some(options)) => {
            access.file = Some(options);
            access.image_opts = true;
        }
        (Some(_), Some(options)) => match parse_options(&options) {
            Ok((_, pairs)) => {
                for (name, value) in pairs {
                    match name.as_str() {
                        "driver" if !access.image_opts => access.format = Some(value),
                        _ => access.options.push((name, value)),
                    }
                }
            }
            Err(failure) => return fail(session, &failure),
        },
        (None, None) => {
            let failure = Failure::new("can't open: Must specify either driver or file");
            return fail(session, &failure);
        }
        (Some(_), None) => {}
    }
    session.open(access)
}

/// `close`.
pub fn close(session: &mut Session, _words: &[String]) -> Status {
    session.release();
    if session.close() { Status::Done } else { Status::Failed }
}

/// `reopen`.
pub fn reopen(session: &mut Session, words: &[String]) -> Status {
    let mut parser = Parser::new(&words[0], None, REOPEN, words[1..].to_vec());
    let (mut writable, mut cache, mut given) = (None, None, None);
    loop {
        let option = match parser.next() {
            Ok(Some(option)) => option,
            Ok(None) => break,
            Err(_) => return usage("reopen"),
        };
        match option.name {
            "cache" => match cache_mode(&option.value) {
                Ok(mode) => cache = Some(mode),
                Err(failure) => return fail(session, &failure),
            },
            "options" => given = Some(option.value),
            _ if writable.is_some() => {
                return fail(session, &Failure::new("Only one -r/-w option may be given"));
            }
            name => writable = Some(name == "writable"),
        }
    }
    if !parser.positional().is_empty() {
        return usage("reopen");
    }
    let changes = Changes { writable, cache, given };
    match changes.apply(session) {
        Ok(access) => exchange(session, access),
        Err(failure) => fail(session, &failure),
    }
}

/// What a `reopen` changes.
struct Changes {
    writable: Option<bool>,
    cache: Option<CacheMode>,
    given: Option<String>,
}

impl Changes {
    /// The access to the open file with these changes.
    fn apply(self, session: &Session) -> Result<Access, Failure> {
        let Some(file) = &session.file else { return Err(Failure::new("no file is open")) };
        let mut access = file.access.clone();
        let (tree, pairs) = parse_options(self.given.as_deref().unwrap_or_default())?;
        if self.writable.is_some() && tree.contains("read-only") {
            return Err(Failure::new("Cannot set both -r/-w and 'read-only'"));
        }
        if self.cache.is_some() && tree.contains("cache") {
            return Err(Failure::new("Cannot set both -c and the cache options"));
        }
        let driver = file.image.format()?;
        let mut changes = Vec::new();
        for (name, value) in pairs {
            let is_as_before = is_current(file, &name, &value)?;
            if is_changeable(driver, &name) {
                changes.push((name, value));
            } else if !is_as_before {
                let last = name.rsplit('.').next().unwrap_or(&name);
                return Err(Failure::new(format!("Cannot change the option '{last}'")));
            }
        }
        let pairs = changes;
        if access.writes() && pairs.iter().any(|(name, value)| name == "read-only" && value == "on")
        {
            let view = file.image.view()?;
            let name = view.name();
            let text = format!("Read-only block node '{name}' cannot support read-write users");
            return Err(Failure::new(text));
        }
        join(&mut access.options, pairs);
        if let Some(writable) = self.writable {
            access.options.retain(|(name, _)| name != "read-only");
            let read_only = if writable { "off" } else { "on" };
            access.options.push(("read-only".into(), read_only.into()));
        }
        if let Some(cache) = self.cache {
            access.options.retain(|(name, _)| !name.starts_with("cache."));
            let word = |on: bool| if on { "on" } else { "off" }.to_owned();
            access.options.push(("cache.direct".into(), word(cache.direct)));
            access.options.push(("cache.no-flush".into(), word(cache.no_flush)));
            access.cache = cache;
        }
        Ok(access)
    }
}

/// Whether an option can be changed while the image is open.
fn is_changeable(driver: &str, name: &str) -> bool {
    let first = name.split('.').next().unwrap_or(name);
    let own: &[&str] = match driver {
        "raw" => &CHANGEABLE_RAW,
        "qcow2" => &CHANGEABLE_QCOW2,
        _ => &[],
    };
    CHANGEABLE.contains(&first) || own.contains(&first)
}

/// Whether an option of the open file, or of a node below, has this value.
fn is_current(file: &OpenFile, name: &str, value: &str) -> Result<bool, Failure> {
    let mut tree = file.options.tree()?;
    for (name, value) in &file.options.overrides {
        tree.set(name.clone(), value.as_str().into());
    }
    if tree.get(name) == Some(&Value::from(value)) {
        return Ok(true);
    }
    let mut view = file.image.view()?;
    let (mut path, mut options) = (name, Some(tree));
    while let Some((child, rest)) = path.split_once('.') {
        let role = match child {
            "file" => Role::File,
            "backing" => Role::Backing,
            "data-file" => Role::Data,
            _ => break,
        };
        let Some(below) = view.edge_in_role(role).and_then(|edge| view.child(edge)).cloned() else {
            return Ok(false);
        };
        options = options.and_then(|options| match options.get(child) {
            Some(Value::Tree(below)) => Some(below.clone()),
            _ => None,
        });
        (view, path) = (below, rest);
    }
    let given = options.as_ref().and_then(|options| options.get(path));
    Ok(match path {
        "driver" => view.driver().driver_name() == value,
        "node-name" => view.name() == value,
        _ => given == Some(&Value::from(value)),
    })
}

/// Puts new options to the old ones, as far as these still count beside them: what says how large
/// caches are, or what is watched over, is said anew as a whole.
fn join(old: &mut Vec<(String, String)>, new: Vec<(String, String)>) {
    const SIZES: [&str; 3] = ["cache-size", "l2-cache-size", "refcount-cache-size"];
    let gives = |options: &[(String, String)], name: &str| options.iter().any(|it| it.0 == name);
    if gives(&new, "overlap-check") || gives(&new, "overlap-check.template") {
        old.retain(|(name, _)| name.split('.').next() != Some("overlap-check"));
    }
    let is_whole = gives(&new, "cache-size");
    if is_whole {
        old.retain(|(name, _)| !SIZES.contains(&name.as_str()));
    }
    old.retain(|(name, _)| !gives(&new, name));
    old.extend(new);
    if old.iter().any(|(name, _)| name.starts_with("overlap-check.")) {
        let template = old.iter_mut().find(|(name, _)| name == "overlap-check");
        template.into_iter().for_each(|(name, _)| name.push_str(".template"));
    }
    if !is_whole && SIZES.iter().all(|name| gives(old, name)) {
        old.retain(|(name, _)| name != "cache-size");
    }
}

/// Closes the open file and opens it with another access; with the old one, if that fails.
fn exchange(session: &mut Session, access: Access) -> Status {
    if !session.settle() {
        session.tool.report("a request is suspended at a breakpoint: resume it first");
        return Status::Failed;
    }
    let Some(OpenFile { image, access: before, options: old, overlay, .. }) = session.file.take()
    else {
        return Status::Failed;
    };
    let new = access.open_options();
    let wanted = ImageOpenOptions {
        write: new.write,
        cache: new.cache,
        overrides: new.overrides,
        ..old.clone()
    };
    if let Err(failure) = image.close() {
        failure.print(&session.tool, None);
    }
    let mut result = Status::Done;
    let opened = match access.check().and_then(|()| session.tool.open_quietly(&wanted)) {
        Ok(image) => Ok((image, access, wanted)),
        Err(failure) => {
            failure.print(&session.tool, None);
            result = Status::Failed;
            session.tool.open_quietly(&old).map(|image| (image, before, old))
        }
    };
    match opened {
        Ok((image, access, options)) => {
            let file = OpenFile::new(image, access, options, overlay);
            session.watch(&file);
            session.file = Some(file);
        }
        Err(failure) => {
            failure.print(&session.tool, None);
            result = Status::Failed;
        }
    }
    result
}
