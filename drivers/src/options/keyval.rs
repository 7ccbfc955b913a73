//! The `key=value,key=value` spelling, both directions.
//!
//! ```text
//!   text    = [ first ] { "," pair } [ "," ]
//!   first   = pair | value              a bare first value belongs to the implied key
//!   pair    = key "=" value
//!   value   = { any byte but "," | ",," }     ",," stands for one comma
//! ```
//!
//! Every value read from this spelling is a string. Repeating a key is an error (O2), where the
//! last one would win in QEMU.

use super::{OptionError, OptionTree, Value, check_length, draft::Draft, join};
use crate::open_gate::escape_bytes;

/// How much of a piece of text an error shows.
const SHOWN: usize = 64;

impl OptionTree {
    /// Parses `key=value` pairs. If `implied_key` is given and the text begins with a value
    /// without a key, that value is the implied key's.
    ///
    /// # Errors
    ///
    /// A pair without `=`, an impossible key name, a key given twice or as both value and parent,
    /// list indices with gaps, or limits exceeded; the error names the key.
    pub fn from_keyval(text: &str, implied_key: Option<&str>) -> Result<Self, OptionError> {
        check_length(text)?;
        let mut draft = Draft::default();
        let mut rest = text;
        let mut implied = implied_key;
        while !rest.is_empty() {
            let key_end = rest.find(['=', ',']).unwrap_or(rest.len());
            let has_key = rest[key_end..].starts_with('=');
            let key = match implied.take() {
                // An empty implied value would be a stray comma, not a value.
                Some(implied_key) if !has_key && key_end > 0 => implied_key,
                _ if has_key => {
                    let key = &rest[..key_end];
                    rest = &rest[key_end + 1..];
                    key
                }
                _ => return Err(no_equals_sign(&rest[..key_end])),
            };
            let (value, tail) = split_value(rest);
            draft.insert(key, Value::String(value))?;
            rest = tail;
        }
        draft.finish()
    }

    /// Spells this tree as `key=value` pairs that [`OptionTree::from_keyval`] turns into an equal
    /// tree, numbers and booleans becoming strings of the same meaning.
    ///
    /// # Errors
    ///
    /// Nulls, empty lists and empty groups have no such spelling.
    pub fn to_keyval(&self) -> Result<String, OptionError> {
        let mut text = String::new();
        for (key, value) in self.iter() {
            write_value(&mut text, &join("", key), value)?;
        }
        Ok(text)
    }
}

/// Reads a value up to a single comma, undoubling commas; returns it and what follows the comma.
fn split_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    while let Some(comma) = rest.find(',') {
        value.push_str(&rest[..comma]);
        rest = &rest[comma + 1..];
        let Some(after) = rest.strip_prefix(',') else {
            return (value, rest);
        };
        value.push(',');
        rest = after;
    }
    value.push_str(rest);
    (value, "")
}

/// Appends the pairs `value` under `path` stands for.
fn write_value(text: &mut String, path: &str, value: &Value) -> Result<(), OptionError> {
    let scalar = match value {
        Value::String(string) => string.clone(),
        Value::Number(number) => number.to_string(),
        Value::Bool(bool) => if *bool { "on" } else { "off" }.to_owned(),
        Value::Tree(tree) if !tree.is_empty() => {
            for (key, value) in tree.iter() {
                write_value(text, &join(path, key), value)?;
            }
            return Ok(());
        }
        Value::List(items) if !items.is_empty() => {
            for (index, item) in items.iter().enumerate() {
                write_value(text, &join(path, index), item)?;
            }
            return Ok(());
        }
        Value::Null | Value::Tree(_) | Value::List(_) => {
            return Err(OptionError::new(
                path,
                "null and empty groups cannot be spelled as key=value",
            ));
        }
    };
    if !text.is_empty() {
        text.push(',');
    }
    text.push_str(path);
    text.push('=');
    text.push_str(&scalar.replace(',', ",,"));
    Ok(())
}

fn no_equals_sign(piece: &str) -> OptionError {
    let shown: String = piece.chars().take(SHOWN).collect();
    OptionError::new(
        "",
        format!("expected '=' after parameter '{}'", escape_bytes(shown.as_bytes())),
    )
}
