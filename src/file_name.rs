//! What a file name on a command line stands for: a path, or a protocol and its own words.
//!
//! ```text
//!   disk.img, /dev/vg/disk, file:odd:name    a file or block device
//!   null-co://                               a protocol without words
//!   blkdebug:faults.conf:disk.img            a file in which requests fail as it is told
//!   json:{"driver": …}                       a description of nodes
//! ```
//!
//! As in QEMU, a name has a protocol when a colon comes before the first slash. These are names of
//! the caller's; what an image names passes the gate first.

use blockplex_drivers::file::sys;
use blockplex_drivers::options::{JSON_URL_PREFIX, OptionTree, Value};
use blockplex_graph::{Error, ErrorKind, Result};
use std::path::Path;

/// A file name, understood.
#[derive(Clone, Debug, PartialEq)]
pub struct FileName {
    tree: OptionTree,
    /// Not a description of nodes but the name of one protocol node.
    is_protocol: bool,
}

impl FileName {
    /// Understands `name`.
    ///
    /// # Errors
    ///
    /// `InvalidArgument`: an empty name, malformed JSON; `NotSupported`: a protocol that is not
    /// known, which the error names.
    pub fn parse(name: &str) -> Result<FileName> {
        if name.starts_with(JSON_URL_PREFIX) {
            let tree = OptionTree::from_json_url(name).map_err(|error| {
                let text = format!("Could not parse the JSON options: {error}");
                Error::new(ErrorKind::InvalidArgument, text).caused_by(error)
            })?;
            return Ok(FileName { tree, is_protocol: false });
        }
        let tree = match protocol_of(name) {
            None => file_tree(name)?,
            Some("file") => {
                let path = name.strip_prefix("file:").unwrap_or(name);
                // Still a path where it is read again, as a name relative to it is.
                match protocol_of(path) {
                    Some(_) => file_tree(&format!("./{path}"))?,
                    None => file_tree(path)?,
                }
            }
            Some("null-co") => null_tree(name)?,
            Some("blkdebug") => blkdebug_tree(name)?,
            Some(other) => {
                let text = format!("Unknown protocol '{}'", other.escape_default());
                return Err(Error::new(ErrorKind::NotSupported, text));
            }
        };
        Ok(FileName { tree, is_protocol: true })
    }

    /// Whether the name stands for a protocol node: a format is still to be put above it.
    pub fn is_protocol(&self) -> bool {
        self.is_protocol
    }

    /// The description of the nodes.
    pub fn into_tree(self) -> OptionTree {
        self.tree
    }
}

/// The protocol that a name begins with.
pub fn protocol_of(name: &str) -> Option<&str> {
    let end = name.find([':', '/'])?;
    let (protocol, rest) = name.split_at(end);
    rest.starts_with(':').then_some(protocol)
}

fn file_tree(path: &str) -> Result<OptionTree> {
    if path.is_empty() {
        let text = "The 'file' block driver requires a file name";
        return Err(Error::new(ErrorKind::InvalidArgument, text));
    }
    let driver = match sys::kind_at(Path::new(path)) {
        Ok(sys::FileKind::BlockDevice) => "host_device",
        // The open will say what else is wrong.
        _ => "file",
    };
    let mut tree = OptionTree::new();
    tree.set("driver", Value::from(driver));
    tree.set("filename", Value::from(path));
    Ok(tree)
}

/// `blkdebug:CONFIG:FILE`, without CONFIG for no rules.
fn blkdebug_tree(name: &str) -> Result<OptionTree> {
    let rest = name.strip_prefix("blkdebug:").unwrap_or(name);
    let Some((config, image)) = rest.split_once(':') else {
        let text = "blkdebug requires both config file and image path";
        return Err(Error::new(ErrorKind::InvalidArgument, text));
    };
    let mut tree = OptionTree::new();
    tree.set("driver", Value::from("blkdebug"));
    if !config.is_empty() {
        tree.set("config", Value::from(config));
    }
    tree.set("image", Value::Tree(FileName::parse(image)?.into_tree()));
    Ok(tree)
}

fn null_tree(name: &str) -> Result<OptionTree> {
    if name != "null-co://" {
        let text = "The only allowed filename for this driver is 'null-co://'";
        return Err(Error::new(ErrorKind::InvalidArgument, text));
    }
    let mut tree = OptionTree::new();
    tree.set("driver", Value::from("null-co"));
    Ok(tree)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_before_the_first_slash_makes_a_protocol() {
        assert_eq!(protocol_of("a.img"), None);
        assert_eq!(protocol_of("./a:b"), None);
        assert_eq!(protocol_of("/x/a:b"), None);
        assert_eq!(protocol_of("nbd:localhost:1"), Some("nbd"));
        assert_eq!(protocol_of("null-co://"), Some("null-co"));
    }

    #[test]
    fn names_say_what_they_stand_for_or_what_is_wrong() {
        let file = FileName::parse("file:odd:name").unwrap();
        assert!(file.is_protocol());
        assert_eq!(file.into_tree().get("filename"), Some(&Value::from("./odd:name")));
        assert!(!FileName::parse("json:{\"driver\": \"null-co\"}").unwrap().is_protocol());
        for (name, problem) in [
            ("", "requires a file name"),
            ("foo:bar", "Unknown protocol 'foo'"),
            ("json:{", "Could not parse the JSON options"),
            ("null-co://x", "only allowed filename"),
        ] {
            let error = FileName::parse(name).unwrap_err().to_string();
            assert!(error.contains(problem), "{name}: {error}");
        }
    }
}
