//! Which snapshot is meant.

use super::Snapshot;
use crate::open_gate::escape_bytes;
use blockplex_graph::{Error, ErrorKind, Result};

/// Names one internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotSelector {
    /// The one with this identifier, else the first one with this name.
    IdOrName(Vec<u8>),
    /// The first one with this name.
    Name(Vec<u8>),
    /// The one that agrees with all that is given.
    Both {
        /// Its identifier.
        id: Option<Vec<u8>>,
        /// Its name.
        name: Option<Vec<u8>>,
    },
}

impl SnapshotSelector {
    /// What the option `-l` of the tools means: `snapshot.id=…,snapshot.name=…` with one of them
    /// or both (a comma in a value stands twice), or an identifier or a name.
    ///
    /// # Errors
    ///
    /// `InvalidArgument`: after `snapshot.` comes something else.
    pub fn parse(text: &str) -> Result<SnapshotSelector> {
        if !text.starts_with("snapshot.") {
            return Ok(SnapshotSelector::IdOrName(text.into()));
        }
        let (mut id, mut name) = (None, None);
        for part in split_at_single_commas(text) {
            let (slot, value) = match part.split_once('=') {
                Some(("snapshot.id", value)) => (&mut id, value),
                Some(("snapshot.name", value)) => (&mut name, value),
                _ => {
                    let part = part.escape_default();
                    let text = format!("'{part}' is neither snapshot.id=… nor snapshot.name=…");
                    return Err(Error::new(ErrorKind::InvalidArgument, text));
                }
            };
            *slot = Some(value.as_bytes().to_vec());
        }
        Ok(SnapshotSelector::Both { id, name })
    }

    /// The snapshot that is meant.
    pub(in crate::qcow2) fn choose<'a>(&self, snapshots: &'a [Snapshot]) -> Result<&'a Snapshot> {
        let index = self.find(snapshots)?;
        snapshots.get(index).ok_or_else(|| Error::new(ErrorKind::NotFound, "no such snapshot"))
    }

    /// The index of the snapshot that is meant.
    pub(super) fn find(&self, snapshots: &[Snapshot]) -> Result<usize> {
        let position = |is_it: &dyn Fn(&Snapshot) -> bool| snapshots.iter().position(is_it);
        let found = match self {
            SnapshotSelector::IdOrName(text) => position(&|snapshot| snapshot.entry.id == *text)
                .or_else(|| position(&|snapshot| snapshot.entry.name == *text)),
            SnapshotSelector::Name(name) => position(&|snapshot| snapshot.entry.name == *name),
            SnapshotSelector::Both { id, name } => position(&|Snapshot { entry, .. }| {
                id.as_ref().is_none_or(|id| entry.id == *id)
                    && name.as_ref().is_none_or(|name| entry.name == *name)
            }),
        };
        found.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("the image has no snapshot {self}"))
        })
    }
}

impl std::fmt::Display for SnapshotSelector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SnapshotSelector::IdOrName(text) => write!(f, "'{}'", escape_bytes(text)),
            SnapshotSelector::Name(name) => write!(f, "named '{}'", escape_bytes(name)),
            SnapshotSelector::Both { id, name } => {
                let none = "any".to_owned();
                let shown = |part: &Option<Vec<u8>>| {
                    part.as_ref().map_or(none.clone(), |part| format!("'{}'", escape_bytes(part)))
                };
                write!(f, "with identifier {} and name {}", shown(id), shown(name))
            }
        }
    }
}

/// The parts between single commas; a double one stands for a comma.
fn split_at_single_commas(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        if character == ',' && characters.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(last) = parts.last_mut() {
            last.push(character);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_option_of_the_tools_is_understood() {
        let parse = |text| SnapshotSelector::parse(text).unwrap();
        assert_eq!(parse("a,b"), SnapshotSelector::IdOrName(b"a,b".to_vec()));
        let both = |id: Option<&str>, name: Option<&str>| SnapshotSelector::Both {
            id: id.map(|id| id.into()),
            name: name.map(|name| name.into()),
        };
        assert_eq!(parse("snapshot.id=1"), both(Some("1"), None));
        assert_eq!(parse("snapshot.name=a,,b,snapshot.id=2"), both(Some("2"), Some("a,b")));
        assert!(SnapshotSelector::parse("snapshot.other=1").is_err());
        assert!(SnapshotSelector::parse("snapshot.id=1,x").is_err());
    }
}
