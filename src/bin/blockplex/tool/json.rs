//! JSON as QEMU's tools print it: members in an order of their own, four spaces a level, nothing but
//! ASCII. The same values are also printed for people, without brackets.

use std::fmt::Write as _;

/// A value to be printed.
#[derive(Clone, Debug, PartialEq)]
pub enum Json {
    /// `true` or `false`.
    Switch(bool),
    /// A whole number.
    Number(i128),
    /// Text.
    Text(String),
    /// A list.
    List(Vec<Json>),
    /// Members, in their order.
    Object(Vec<(&'static str, Json)>),
}

impl From<bool> for Json {
    fn from(value: bool) -> Json {
        Json::Switch(value)
    }
}

impl From<u64> for Json {
    fn from(value: u64) -> Json {
        Json::Number(value.into())
    }
}

impl From<u32> for Json {
    fn from(value: u32) -> Json {
        Json::Number(value.into())
    }
}

impl From<&str> for Json {
    fn from(value: &str) -> Json {
        Json::Text(value.to_owned())
    }
}

impl From<String> for Json {
    fn from(value: String) -> Json {
        Json::Text(value)
    }
}

impl Json {
    /// The text with its line breaks.
    pub fn pretty(&self) -> String {
        let mut text = String::new();
        self.write(&mut text, 0);
        text
    }

    fn write(&self, text: &mut String, level: usize) {
        let (open, close) = match self {
            Json::Switch(value) => return text.push_str(if *value { "true" } else { "false" }),
            Json::Number(value) => return text.push_str(&value.to_string()),
            Json::Text(value) => return text.push_str(&quoted(value)),
            Json::List(_) => ('[', ']'),
            Json::Object(_) => ('{', '}'),
        };
        text.push(open);
        let mut separator = "\n";
        let mut begin = |text: &mut String| {
            text.push_str(separator);
            separator = ",\n";
            text.push_str(&"    ".repeat(level + 1));
        };
        match self {
            Json::List(items) => {
                for item in items {
                    begin(text);
                    item.write(text, level + 1);
                }
            }
            Json::Object(members) => {
                for (name, value) in members {
                    begin(text);
                    text.push_str(&format!("{}: ", quoted(name)));
                    value.write(text, level + 1);
                }
            }
            _ => {}
        }
        text.push('\n');
        text.push_str(&"    ".repeat(level));
        text.push(close);
    }

    /// The members for people, each on a line of its own, `level` deep.
    pub fn for_people(&self, level: usize) -> String {
        let mut text = String::new();
        self.write_for_people(&mut text, level);
        text
    }

    fn write_for_people(&self, text: &mut String, level: usize) {
        let indent = "    ".repeat(level);
        let mut line = |name: &str, value: &Json| match value {
            Json::List(_) | Json::Object(_) => {
                text.push_str(&format!("{indent}{name}:\n"));
                value.write_for_people(text, level + 1);
            }
            Json::Switch(value) => text.push_str(&format!("{indent}{name}: {value}\n")),
            Json::Number(value) => text.push_str(&format!("{indent}{name}: {value}\n")),
            Json::Text(value) => text.push_str(&format!("{indent}{name}: {}\n", shown(value))),
        };
        match self {
            Json::Object(members) => {
                members.iter().for_each(|(name, value)| line(&name.replace('-', " "), value));
            }
            Json::List(items) => {
                let numbered = items.iter().enumerate();
                numbered.for_each(|(index, value)| line(&format!("[{index}]"), value));
            }
            _ => {}
        }
    }
}

/// A string in quotes, escaped to ASCII.
pub fn quoted(text: &str) -> String {
    let mut quoted = String::from('"');
    for letter in text.chars() {
        match letter {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\u{8}' => quoted.push_str("\\b"),
            '\u{c}' => quoted.push_str("\\f"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            ' '..='~' => quoted.push(letter),
            _ => {
                let mut units = [0; 2];
                for unit in letter.encode_utf16(&mut units) {
                    // Writing to a string cannot fail.
                    let _ = write!(quoted, "\\u{unit:04X}");
                }
            }
        }
    }
    quoted.push('"');
    quoted
}

/// Text for a terminal, which it must not be able to drive.
pub fn shown(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter.is_control() {
            true => shown.extend(letter.escape_default()),
            false => shown.push(letter),
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Json {
        Json::Object(vec![
            ("children", Json::List(vec![])),
            ("lazy-refcounts", false.into()),
            ("names", Json::List(vec!["a\"\u{e9}".into()])),
        ])
    }

    #[test]
    fn members_keep_their_order_and_empty_lists_take_two_lines() {
        let expected = "{\n    \"children\": [\n    ],\n    \"lazy-refcounts\": false,\n    \
                        \"names\": [\n        \"a\\\"\\u00E9\"\n    ]\n}";
        assert_eq!(sample().pretty(), expected);
    }

    #[test]
    fn people_get_no_brackets_and_no_dashes() {
        let expected =
            "    children:\n    lazy refcounts: false\n    names:\n        [0]: a\"\u{e9}\n";
        assert_eq!(sample().for_people(1), expected);
        assert_eq!(shown("a\u{1b}[2J"), "a\\u{1b}[2J");
    }
}
