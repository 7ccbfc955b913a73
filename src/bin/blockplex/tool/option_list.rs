//! `-o key=value,…`: options of a format, collected from the command line.

use super::Failure;
use super::size::{self, SizeError};

/// The options given, in their order. A comma within a value is doubled; what stands without a
/// value is switched on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OptionList {
    pairs: Vec<(String, String)>,
    help: bool,
}

impl OptionList {
    /// Adds the options of one `-o`.
    ///
    /// # Errors
    ///
    /// A text that is no list.
    pub fn add(&mut self, text: &str) -> Result<(), Failure> {
        let trailing = text.len() - text.trim_end_matches(',').len();
        if text.is_empty() || text.starts_with(',') || trailing % 2 == 1 {
            return Err(Failure::new(format!("Invalid option list: {text}")));
        }
        for piece in split(text) {
            if piece == "help" || piece == "?" {
                self.help = true;
                continue;
            }
            let pair = match piece.split_once('=') {
                Some((key, value)) => (key.to_owned(), value.to_owned()),
                None => match piece.strip_prefix("no") {
                    Some(key) if !key.is_empty() => (key.to_owned(), "off".to_owned()),
                    _ => (piece, "on".to_owned()),
                },
            };
            self.pairs.push(pair);
        }
        Ok(())
    }

    /// Whether the user asks what options there are.
    pub fn wants_help(&self) -> bool {
        self.help
    }

    /// The value that counts: the last.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.pairs.iter().rev().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// Sets an option.
    pub fn set(&mut self, key: &str, value: impl Into<String>) {
        self.pairs.push((key.to_owned(), value.into()));
    }

    /// The names given, in their order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.pairs.iter().map(|(key, _)| key.as_str())
    }

    /// A size.
    ///
    /// # Errors
    ///
    /// The value is none.
    pub fn size(&self, key: &str) -> Result<Option<u64>, Failure> {
        let Some(text) = self.get(key) else { return Ok(None) };
        size::parse(text).map(Some).map_err(|error| {
            Failure::new(match error {
                SizeError::Invalid => size::expected_size(key),
                SizeError::OutOfRange => {
                    format!("Value '{text}' is out of range for parameter '{key}'")
                }
            })
        })
    }

    /// A switch.
    ///
    /// # Errors
    ///
    /// The value is none.
    pub fn switch(&self, key: &str) -> Result<Option<bool>, Failure> {
        match self.get(key) {
            None => Ok(None),
            Some("on" | "yes" | "true" | "y") => Ok(Some(true)),
            Some("off" | "no" | "false" | "n") => Ok(Some(false)),
            Some(_) => Err(Failure::new(format!("Parameter '{key}' expects 'on' or 'off'"))),
        }
    }

    /// A whole number.
    ///
    /// # Errors
    ///
    /// The value is none.
    pub fn number(&self, key: &str) -> Result<Option<u64>, Failure> {
        let Some(text) = self.get(key) else { return Ok(None) };
        let number = match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => text.parse(),
        };
        number.map(Some).map_err(|_| Failure::new(format!("Parameter '{key}' expects a number")))
    }
}

/// The pieces of a list, with doubled commas undone.
fn split(text: &str) -> Vec<String> {
    let mut pieces = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        let Some(piece) = pieces.last_mut() else { break };
        if letter != ',' {
            piece.push(letter);
        } else if letters.next_if_eq(&',').is_some() {
            piece.push(',');
        } else {
            pieces.push(String::new());
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_options_win_and_doubled_commas_are_one() {
        let mut list = OptionList::default();
        list.add("size=1M,backing_file=a,,b,lazy_refcounts").unwrap();
        list.add("size=2M").unwrap();
        assert_eq!(list.size("size").unwrap(), Some(2 << 20));
        assert_eq!(list.get("backing_file"), Some("a,b"));
        assert_eq!(list.switch("lazy_refcounts").unwrap(), Some(true));
        assert!(!list.wants_help());
        list.add("?").unwrap();
        assert!(list.wants_help());
        assert!(list.add(",x").is_err());
    }
}
