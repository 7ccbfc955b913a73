//! Option trees: how a caller describes a block node, in text or in JSON.
//!
//! A description is a tree of named values (`driver`, `file.filename`, `children.0.driver` …). It
//! arrives in one of three spellings, all of which end in the same [`OptionTree`]:
//!
//! ```text
//!   driver=qcow2,file.driver=file,file.filename=/a,,b      keyval.rs
//!   {"driver": "qcow2", "file": {"driver": "file", …}}     json.rs     ──▶ draft.rs ──▶ OptionTree
//!   json:{"driver": "qcow2", "file.driver": "file", …}     json.rs                        │ take.rs
//!                                                                                         ▼
//!                                                                        driver's own typed options
//! ```
//!
//! A driver *takes* the options it knows, each as the type it wants, and then calls
//! [`OptionTree::finish`], which refuses whatever is left: an option nobody understood is an error,
//! never silently dropped.
//!
//! # Invariants
//!
//! * **O1** Whatever the spelling, the same description gives an equal tree.
//! * **O2** A key is given once. Given twice, or both as a value and as the parent of other keys,
//!   it is an error: which of the two was meant cannot be known.
//! * **O3** A tree nests at most [`MAX_DEPTH`] deep and comes from at most [`MAX_TEXT`] bytes of
//!   text, so that recursion and memory are bounded whoever wrote the text.
//! * **O4** Each error names the full dotted path of the option it is about.
//!
//! What is deliberately absent: defaults and the meaning of any option (the drivers know these),
//! and opening anything.

use std::{collections::BTreeMap, fmt};

mod draft;
mod json;
mod keyval;
mod size;
mod take;

pub use self::{json::JSON_URL_PREFIX, size::parse_size, take::Reference};

/// How deep a tree may nest. Long backing chains are described by the images themselves, not here.
pub const MAX_DEPTH: usize = 100;

/// The longest text, in bytes, that is parsed at all.
pub const MAX_TEXT: usize = 1 << 20;

/// What went wrong with an option, and with which.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionError {
    /// The full dotted path of the option (`file.filename`), or empty if the text as a whole is
    /// wrong.
    pub path: String,
    /// What is wrong with it, without the path.
    pub message: String,
}

impl OptionError {
    /// An error about the option at `path`; empty for the text as a whole.
    pub fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self { path: path.into(), message: message.into() }
    }
}

impl fmt::Display for OptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() {
            f.write_str(&self.message)
        } else {
            write!(f, "option '{}': {}", self.path, self.message)
        }
    }
}

impl std::error::Error for OptionError {}

/// A number as JSON has them. Text spellings never produce one: there `1` is a string until a
/// driver takes it as a number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Number {
    /// A whole number from 0 on.
    Unsigned(u64),
    /// A whole number below 0.
    Negative(i64),
    /// Anything with a fraction or an exponent, or too large for the two others.
    Float(f64),
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsigned(number) => number.fmt(f),
            Self::Negative(number) => number.fmt(f),
            Self::Float(number) => number.fmt(f),
        }
    }
}

/// One value of a tree.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Text; also any scalar that came from a `key=value` spelling.
    String(String),
    /// A JSON number.
    Number(Number),
    /// A JSON boolean.
    Bool(bool),
    /// A JSON null.
    Null,
    /// Named values.
    Tree(OptionTree),
    /// Numbered values.
    List(Vec<Value>),
}

impl Value {
    /// What kind of value this is, for messages.
    fn kind(&self) -> &'static str {
        match self {
            Self::String(_) => "a string",
            Self::Number(_) => "a number",
            Self::Bool(_) => "a boolean",
            Self::Null => "null",
            Self::Tree(_) => "a group of options",
            Self::List(_) => "a list",
        }
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::String(text.to_owned())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::String(text)
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Number(Number::Unsigned(number))
    }
}

impl From<OptionTree> for Value {
    fn from(tree: OptionTree) -> Self {
        Self::Tree(tree)
    }
}

/// A map from option names to values, ordered by name.
///
/// Obtain one with [`OptionTree::parse`] or its more particular siblings, consume it with the
/// `take_…` methods, end with [`OptionTree::finish`]. Plain data: any thread may own one.
#[derive(Clone, Debug, Default, PartialEq)]
#[must_use = "take the options and call `finish`, or unknown options go unnoticed"]
pub struct OptionTree {
    /// Where this tree hangs in the one it was taken from; empty for a root and for a tree that
    /// has not been taken yet.
    path: String,
    entries: BTreeMap<String, Value>,
}

impl OptionTree {
    /// An empty tree.
    pub fn new() -> Self {
        Self::default()
    }

    /// Parses any spelling: text that starts with `{` or `json:` is JSON, all else is `key=value`
    /// pairs as [`OptionTree::from_keyval`] reads them.
    ///
    /// # Errors
    ///
    /// Malformed text, a key given twice, or limits exceeded; the error names the key.
    pub fn parse(text: &str, implied_key: Option<&str>) -> Result<Self, OptionError> {
        if text.starts_with(JSON_URL_PREFIX) {
            Self::from_json_url(text)
        } else if text.starts_with('{') {
            Self::from_json(text)
        } else {
            Self::from_keyval(text, implied_key)
        }
    }

    /// Sets the option `key` of this tree itself (`key` is one name, not a dotted path), and
    /// returns the value that was there before.
    pub fn set(&mut self, key: impl Into<String>, value: Value) -> Option<Value> {
        self.entries.insert(key.into(), value)
    }

    /// Whether the option `key` is present and not yet taken.
    #[must_use]
    pub fn contains(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// The value of `key`, without taking it.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries.get(key)
    }

    /// The names and values not yet taken, in the order of the names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Whether nothing is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The full dotted path of `key` of this tree, for messages about it.
    #[must_use]
    pub fn path_of(&self, key: &str) -> String {
        join(&self.path, key)
    }
}

/// `key` below `path`, with a dot where one is needed.
fn join(path: &str, key: impl fmt::Display) -> String {
    if path.is_empty() { key.to_string() } else { format!("{path}.{key}") }
}

/// Refuses text longer than [`MAX_TEXT`] (O3).
fn check_length(text: &str) -> Result<(), OptionError> {
    if text.len() > MAX_TEXT {
        return Err(OptionError::new(
            "",
            format!("options of {} bytes are too long (limit {MAX_TEXT})", text.len()),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
