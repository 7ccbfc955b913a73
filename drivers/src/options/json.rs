//! The JSON spelling, plain and as a `json:{…}` file name.
//!
//! `serde_json` does the parsing. It keeps the last of two equal keys without a word and only
//! stops at its own nesting limit, so the text is first walked once by [`Scan`], which refuses
//! repeated keys (O2) and deep nesting (O3) and leaves everything else to the real parser.
//!
//! Strings may also stand in single quotes, as in the peer's dialect; that is undone first.
//!
//! Inside JSON too, a dotted key means nesting: `{"file.driver": "file"}` and
//! `{"file": {"driver": "file"}}` are the same tree (O1), and both may be used side by side.

use std::borrow::Cow;
use std::collections::BTreeSet;

use serde_json::Value as Json;

use super::{MAX_DEPTH, Number, OptionError, OptionTree, Value, check_length, draft::Draft, join};
use crate::open_gate::escape_bytes;

/// What a file name that is really a JSON description starts with.
pub const JSON_URL_PREFIX: &str = "json:";

impl OptionTree {
    /// Parses a JSON object.
    ///
    /// # Errors
    ///
    /// Malformed JSON, anything but an object outermost, a key given twice (also once nested and
    /// once dotted), an impossible key name, or limits exceeded.
    pub fn from_json(text: &str) -> Result<Self, OptionError> {
        check_length(text)?;
        let text = double_quoted(text);
        Scan::default().run(text.as_bytes())?;
        let json: Json =
            serde_json::from_str(&text).map_err(|error| malformed(&error.to_string()))?;
        let Json::Object(members) = json else {
            return Err(malformed("the outermost value is not an object"));
        };
        let mut draft = Draft::default();
        for (key, value) in members {
            insert(&mut draft, &key, value)?;
        }
        draft.finish()
    }

    /// Parses a `json:{…}` file name, as management software passes them where a plain name is
    /// expected. Only ever for names *the caller* gave: a name found inside an image goes through
    /// [`OpenGate`](crate::open_gate::OpenGate), which refuses this form.
    ///
    /// # Errors
    ///
    /// As [`OptionTree::from_json`]; also when the prefix is missing.
    pub fn from_json_url(text: &str) -> Result<Self, OptionError> {
        match text.strip_prefix(JSON_URL_PREFIX) {
            Some(json) => Self::from_json(json),
            None => Err(malformed("the name does not start with 'json:'")),
        }
    }
}

/// Adds `value` and all below it to the draft, under `path`. Recursion is bounded by the scan.
fn insert(draft: &mut Draft, path: &str, value: Json) -> Result<(), OptionError> {
    let leaf = match value {
        Json::Null => Value::Null,
        Json::Bool(bool) => Value::Bool(bool),
        Json::String(string) => Value::String(string),
        Json::Number(number) => Value::Number(convert(&number)),
        Json::Array(items) if items.is_empty() => Value::List(Vec::new()),
        Json::Array(items) => {
            for (index, item) in items.into_iter().enumerate() {
                insert(draft, &join(path, index), item)?;
            }
            return Ok(());
        }
        Json::Object(members) => {
            draft.insert_group(path)?;
            for (key, value) in members {
                // An empty name must reach the draft's check, and `join` would hide it.
                insert(draft, &format!("{path}.{key}"), value)?;
            }
            return Ok(());
        }
    };
    draft.insert(path, leaf)
}

/// The text with all strings in double quotes. A `\'` is a `'` in either kind of string.
fn double_quoted(text: &str) -> Cow<'_, str> {
    if !text.contains('\'') {
        return Cow::Borrowed(text);
    }
    let mut plain = String::with_capacity(text.len() + 16);
    let mut open = None;
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        match (letter, open) {
            ('\\', Some(_)) => match letters.next() {
                Some('\'') => plain.push('\''),
                next => plain.extend(std::iter::once('\\').chain(next)),
            },
            ('\'' | '"', None) => {
                open = Some(letter);
                plain.push('"');
            }
            (quote, Some(begun)) if quote == begun => {
                open = None;
                plain.push('"');
            }
            ('"', Some(_)) => plain.push_str("\\\""),
            (letter, _) => plain.push(letter),
        }
    }
    Cow::Owned(plain)
}

fn convert(number: &serde_json::Number) -> Number {
    if let Some(unsigned) = number.as_u64() {
        Number::Unsigned(unsigned)
    } else if let Some(negative) = number.as_i64() {
        Number::Negative(negative)
    } else {
        // Every JSON number is one of the three; should that ever change, not-a-number is refused
        // by everything that takes a number.
        Number::Float(number.as_f64().unwrap_or(f64::NAN))
    }
}

fn malformed(message: &str) -> OptionError {
    OptionError::new("", format!("malformed JSON: {message}"))
}

/// A walk over the tokens of a JSON text that sees only strings, brackets, colons and commas.
///
/// It need not be right about malformed text, as the parser refuses that anyway; on well-formed
/// text a string followed by a colon is a key of the innermost open object.
#[derive(Default)]
struct Scan {
    /// The brackets that are open, outermost first.
    open: Vec<Level>,
    /// Where the last string lies, its quotes included.
    last_string: Option<(usize, usize)>,
}

/// One open bracket.
struct Level {
    is_list: bool,
    /// Objects: the keys so far, and the last of them.
    keys: BTreeSet<String>,
    last_key: String,
    /// Lists: the index of the item the walk is in.
    item: usize,
}

impl Scan {
    fn run(mut self, text: &[u8]) -> Result<(), OptionError> {
        let mut at = 0;
        while let Some(&byte) = text.get(at) {
            match byte {
                b'"' => {
                    let end = string_end(text, at);
                    self.last_string = Some((at, end));
                    at = end;
                    continue;
                }
                b'{' | b'[' => self.open(byte == b'[', at)?,
                b'}' | b']' => {
                    self.open.pop();
                }
                b':' => self.key(text)?,
                b',' => {
                    if let Some(level) = self.open.last_mut() {
                        level.item += 1;
                    }
                }
                _ => {}
            }
            at += 1;
        }
        Ok(())
    }

    fn open(&mut self, is_list: bool, at: usize) -> Result<(), OptionError> {
        if self.open.len() == MAX_DEPTH {
            return Err(malformed(&format!("more than {MAX_DEPTH} levels deep at byte {at}")));
        }
        self.open.push(Level { is_list, keys: BTreeSet::new(), last_key: String::new(), item: 0 });
        Ok(())
    }

    /// A colon: the string before it was a key. Keys are compared unescaped, as `"a"` and
    /// `"\u0061"` are the same one.
    fn key(&mut self, text: &[u8]) -> Result<(), OptionError> {
        let Some((start, end)) = self.last_string.take() else {
            return Ok(());
        };
        let Ok(key) = serde_json::from_slice::<String>(&text[start..end]) else {
            return Ok(());
        };
        let Some(level) = self.open.last_mut() else {
            return Ok(());
        };
        level.last_key.clone_from(&key);
        if level.keys.insert(key) {
            Ok(())
        } else {
            Err(OptionError::new(self.path(), "given twice"))
        }
    }

    /// The dotted path of the place the walk is at.
    fn path(&self) -> String {
        let path = self.open.iter().fold(String::new(), |path, level| {
            if level.is_list { join(&path, level.item) } else { join(&path, &level.last_key) }
        });
        escape_bytes(path.as_bytes())
    }
}

/// Where the string that opens at `start` ends, its closing quote included.
fn string_end(text: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while let Some(&byte) = text.get(at) {
        match byte {
            b'"' => return at + 1,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    text.len()
}
