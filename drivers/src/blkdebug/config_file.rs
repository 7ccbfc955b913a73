//! The configuration file of a `blkdebug` node.
//!
//! ```text
//! # a comment
//! [inject-error]
//! event = "l2_update"
//! errno = "28"
//!
//! [set-state]
//! event = "pwritev_done"
//! new_state = "2"
//! ```

use crate::options::{OptionTree, Value};
use blockplex_graph::{Error, ErrorKind, Result};

/// The longest file, in bytes.
pub(super) const MAX_FILE: u64 = 1 << 20;

/// The kinds of sections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Section {
    InjectError,
    SetState,
}

/// The sections of a file, in order; `name` is the file's, for errors.
pub(super) fn parse(text: &str, name: &str) -> Result<Vec<(Section, OptionTree)>> {
    let mut sections = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        let wrong = |problem: String| {
            Error::new(ErrorKind::InvalidArgument, format!("{name}:{number}: {problem}"))
        };
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(rest) = line.strip_prefix('[') {
            let section = match rest.strip_suffix(']') {
                Some("inject-error") => Section::InjectError,
                Some("set-state") => Section::SetState,
                Some(other) => {
                    let other = other.escape_default();
                    return Err(wrong(format!("There is no option group '{other}'")));
                }
                None => return Err(wrong("parse error".into())),
            };
            sections.push((section, OptionTree::new()));
            continue;
        }
        let Some((key, value)) = entry(line) else {
            return Err(wrong("parse error: neither [section] nor key = \"value\"".into()));
        };
        let Some((_, tree)) = sections.last_mut() else {
            return Err(wrong("no group defined".into()));
        };
        if tree.set(key, Value::from(value)).is_some() {
            return Err(wrong(format!("'{}' is given twice", key.escape_default())));
        }
    }
    Ok(sections)
}

/// `key = "value"`.
fn entry(line: &str) -> Option<(&str, &str)> {
    let (key, value) = line.split_once('=')?;
    let value = value.trim_start().strip_prefix('"')?;
    let value = value.get(..value.find('"')?)?;
    let key = key.trim_end();
    (!key.is_empty()).then_some((key, value))
}
