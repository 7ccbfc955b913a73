//! Taking options out of a tree, each as the type its owner wants.
//!
//! A value may come typed from JSON or as text from `key=value`; both are accepted for every type,
//! so that a driver does not see which spelling its caller used. Each `take_…` returns `None` when
//! the option is absent, and removes it when it is present, even if it turns out to be wrong.

use super::{Number, OptionError, OptionTree, Value, join, size::parse_size};
use crate::open_gate::escape_bytes;

/// How many left-over options [`OptionTree::finish`] names before it only counts.
const NAMED_LEFTOVERS: usize = 20;

/// How many characters of a wrong value an error shows.
const SHOWN: usize = 64;

/// What an option that stands for a block node may hold.
#[derive(Clone, Debug, PartialEq)]
pub enum Reference {
    /// The name of a node that exists already.
    Name(String),
    /// The description of a node to be opened.
    Tree(OptionTree),
    /// Explicitly no node: a JSON null, or an empty text where there are no nulls.
    Nothing,
}

impl OptionTree {
    /// Takes a text. Numbers and booleans are not texts: a name such as `1` comes as a string in
    /// either spelling.
    ///
    /// # Errors
    ///
    /// The value is not a string.
    pub fn take_str(&mut self, key: &str) -> Result<Option<String>, OptionError> {
        match self.entries.remove(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong_kind(key, "a string", &other)),
        }
    }

    /// Takes a text that must be there.
    ///
    /// # Errors
    ///
    /// The option is absent, or not a string.
    pub fn require_str(&mut self, key: &str) -> Result<String, OptionError> {
        self.take_str(key)?.ok_or_else(|| self.missing(key))
    }

    /// Takes a size in bytes; text may have a unit and a fraction, as [`parse_size`] reads them.
    ///
    /// # Errors
    ///
    /// Not a size, or larger than `u64::MAX` bytes.
    pub fn take_size(&mut self, key: &str) -> Result<Option<u64>, OptionError> {
        match self.entries.remove(key) {
            None => Ok(None),
            Some(Value::Number(Number::Unsigned(bytes))) => Ok(Some(bytes)),
            Some(Value::String(text)) => match parse_size(&text) {
                Ok(bytes) => Ok(Some(bytes)),
                Err(problem) => Err(self.wrong_text(key, &text, problem)),
            },
            Some(other) => Err(self.wrong_kind(key, "a size in bytes", &other)),
        }
    }

    /// Takes a whole number from 0 to `u64::MAX`; text is decimal or, after `0x`, hexadecimal.
    ///
    /// # Errors
    ///
    /// Not such a number. A leading zero is refused, since some readers take it for octal.
    pub fn take_u64(&mut self, key: &str) -> Result<Option<u64>, OptionError> {
        match self.entries.remove(key) {
            None => Ok(None),
            Some(Value::Number(Number::Unsigned(number))) => Ok(Some(number)),
            Some(Value::String(text)) => match parse_u64(&text) {
                Some(number) => Ok(Some(number)),
                None => Err(self.wrong_text(key, &text, "is not a whole number within 64 bits")),
            },
            Some(other) => Err(self.wrong_kind(key, "a whole number", &other)),
        }
    }

    /// As [`OptionTree::take_u64`], for a number that must lie within `range`.
    ///
    /// # Errors
    ///
    /// Not a number, or out of the range, which the error names.
    pub fn take_u64_within(
        &mut self,
        key: &str,
        range: std::ops::RangeInclusive<u64>,
    ) -> Result<Option<u64>, OptionError> {
        match self.take_u64(key)? {
            Some(number) if !range.contains(&number) => Err(OptionError::new(
                self.path_of(key),
                format!("{number} is not within {} to {}", range.start(), range.end()),
            )),
            other => Ok(other),
        }
    }

    /// Takes a yes or no; text is one of `on`, `yes`, `true`, `y`, `off`, `no`, `false`, `n`.
    ///
    /// # Errors
    ///
    /// Anything else.
    pub fn take_bool(&mut self, key: &str) -> Result<Option<bool>, OptionError> {
        match self.entries.remove(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(Value::String(text)) => match text.as_str() {
                "on" | "yes" | "true" | "y" => Ok(Some(true)),
                "off" | "no" | "false" | "n" => Ok(Some(false)),
                _ => Err(self.wrong_text(key, &text, "is neither 'on' nor 'off'")),
            },
            Some(other) => Err(self.wrong_kind(key, "'on' or 'off'", &other)),
        }
    }

    /// Takes one of a few words, and returns what stands beside it in `choices`. A JSON boolean
    /// counts as `on` or `off`.
    ///
    /// # Errors
    ///
    /// None of the words; the error lists them.
    pub fn take_enum<T: Clone>(
        &mut self,
        key: &str,
        choices: &[(&str, T)],
    ) -> Result<Option<T>, OptionError> {
        let text = match self.entries.remove(key) {
            None => return Ok(None),
            Some(Value::String(text)) => text,
            Some(Value::Bool(value)) => if value { "on" } else { "off" }.to_owned(),
            Some(other) => return Err(self.wrong_kind(key, "a word", &other)),
        };
        match choices.iter().find(|(word, _)| *word == text) {
            Some((_, choice)) => Ok(Some(choice.clone())),
            None => {
                let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
                let problem = format!("is none of {}", words.join(", "));
                Err(self.wrong_text(key, &text, &problem))
            }
        }
    }

    /// Takes a group of options. The caller must take its members and finish it in turn.
    ///
    /// # Errors
    ///
    /// The value is not a group.
    pub fn take_subtree(&mut self, key: &str) -> Result<Option<Self>, OptionError> {
        match self.entries.remove(key) {
            None => Ok(None),
            Some(Value::Tree(tree)) => Ok(Some(tree.placed(self.path_of(key)))),
            Some(other) => Err(self.wrong_kind(key, "a group of options", &other)),
        }
    }

    /// Takes what stands for a block node: a node's name, a description, or explicitly nothing.
    ///
    /// # Errors
    ///
    /// None of the three.
    pub fn take_reference(&mut self, key: &str) -> Result<Option<Reference>, OptionError> {
        match self.entries.remove(key) {
            None => Ok(None),
            Some(value) => reference(self.path_of(key), value).map(Some),
        }
    }

    /// Takes a list of block nodes, such as the children of a quorum.
    ///
    /// # Errors
    ///
    /// Not a list, or a member is not a node's name or description; the error names the member.
    pub fn take_reference_list(
        &mut self,
        key: &str,
    ) -> Result<Option<Vec<Reference>>, OptionError> {
        let Some(items) = self.take_list(key)? else {
            return Ok(None);
        };
        let path = self.path_of(key);
        items
            .into_iter()
            .enumerate()
            .map(|(index, item)| reference(join(&path, index), item))
            .collect::<Result<Vec<_>, _>>()
            .map(Some)
    }

    /// Takes a list of groups of options, or one group.
    ///
    /// # Errors
    ///
    /// Neither, or a member is not a group; the error names the member.
    pub fn take_subtree_list(&mut self, key: &str) -> Result<Option<Vec<Self>>, OptionError> {
        if let Some(Value::Tree(_)) = self.get(key) {
            return Ok(self.take_subtree(key)?.map(|tree| vec![tree]));
        }
        let Some(items) = self.take_list(key)? else {
            return Ok(None);
        };
        let mut trees = Vec::with_capacity(items.len());
        for (index, item) in items.into_iter().enumerate() {
            let path = join(&self.path_of(key), index);
            match item {
                Value::Tree(tree) => trees.push(tree.placed(path)),
                other => return Err(expected(path, "a group of options", &other)),
            }
        }
        Ok(Some(trees))
    }

    /// Takes a list of texts.
    ///
    /// # Errors
    ///
    /// Not a list, or a member is not a string; the error names the member.
    pub fn take_str_list(&mut self, key: &str) -> Result<Option<Vec<String>>, OptionError> {
        let Some(items) = self.take_list(key)? else {
            return Ok(None);
        };
        let path = self.path_of(key);
        let text = |(index, item)| match item {
            Value::String(text) => Ok(text),
            other => Err(expected(join(&path, index), "a string", &other)),
        };
        items.into_iter().enumerate().map(text).collect::<Result<Vec<_>, _>>().map(Some)
    }

    /// The end: everything known has been taken, so whatever is left is unknown.
    ///
    /// # Errors
    ///
    /// Something is left; the error names it, with full dotted paths.
    pub fn finish(self) -> Result<(), OptionError> {
        let mut leftovers = Leftovers::default();
        for (key, value) in &self.entries {
            leftovers.collect(join(&self.path, key), value);
        }
        match leftovers.count {
            0 => Ok(()),
            1 => Err(OptionError::new(leftovers.named.concat(), "is unknown here")),
            count => {
                let mut message = format!("unknown options '{}'", leftovers.named.join("', '"));
                if count > leftovers.named.len() {
                    let more = count - leftovers.named.len();
                    message.push_str(&format!(" and {more} more"));
                }
                Err(OptionError::new("", message))
            }
        }
    }

    /// The error that `key` must be given, for options the typed methods treat as optional.
    #[must_use]
    pub fn missing(&self, key: &str) -> OptionError {
        OptionError::new(self.path_of(key), "must be given")
    }

    fn take_list(&mut self, key: &str) -> Result<Option<Vec<Value>>, OptionError> {
        match self.entries.remove(key) {
            None => Ok(None),
            Some(Value::List(items)) => Ok(Some(items)),
            Some(other) => Err(self.wrong_kind(key, "a list", &other)),
        }
    }

    /// This tree, knowing where it was taken from.
    fn placed(mut self, path: String) -> Self {
        self.path = path;
        self
    }

    fn wrong_kind(&self, key: &str, wanted: &str, found: &Value) -> OptionError {
        expected(self.path_of(key), wanted, found)
    }

    fn wrong_text(&self, key: &str, text: &str, problem: &str) -> OptionError {
        let mut shown: String = text.chars().take(SHOWN).collect();
        if shown.len() < text.len() {
            shown.push_str("...");
        }
        OptionError::new(
            self.path_of(key),
            format!("'{}' {problem}", escape_bytes(shown.as_bytes())),
        )
    }
}

fn reference(path: String, value: Value) -> Result<Reference, OptionError> {
    match value {
        Value::Null => Ok(Reference::Nothing),
        Value::String(name) if name.is_empty() => Ok(Reference::Nothing),
        Value::String(name) => Ok(Reference::Name(name)),
        Value::Tree(tree) => Ok(Reference::Tree(tree.placed(path))),
        other => Err(expected(path, "a node name or a group of options", &other)),
    }
}

fn expected(path: String, wanted: &str, found: &Value) -> OptionError {
    let found = match found {
        Value::Number(number) => format!("the number {number}"),
        other => other.kind().to_owned(),
    };
    OptionError::new(path, format!("must be {wanted}, not {found}"))
}

/// The paths of options nobody took, the first few by name.
#[derive(Default)]
struct Leftovers {
    named: Vec<String>,
    count: usize,
}

impl Leftovers {
    fn collect(&mut self, path: String, value: &Value) {
        match value {
            Value::Tree(tree) if !tree.is_empty() => {
                for (key, value) in &tree.entries {
                    self.collect(join(&path, key), value);
                }
            }
            Value::List(items) if !items.is_empty() => {
                for (index, item) in items.iter().enumerate() {
                    self.collect(join(&path, index), item);
                }
            }
            _ => {
                self.count += 1;
                if self.named.len() < NAMED_LEFTOVERS {
                    self.named.push(path);
                }
            }
        }
    }
}

/// A number as text, without the forms that different readers take differently.
fn parse_u64(text: &str) -> Option<u64> {
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        return plain.then(|| u64::from_str_radix(digits, 16).ok()).flatten();
    }
    let plain = text.bytes().all(|byte| byte.is_ascii_digit());
    let octal = text.len() > 1 && text.starts_with('0');
    (plain && !octal).then(|| text.parse().ok()).flatten()
}
