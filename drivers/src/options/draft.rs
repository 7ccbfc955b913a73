//! The half-built tree both parsers fill: values arrive under dotted paths, in any order, and
//! [`Draft::finish`] turns what has gathered into an [`OptionTree`].
//!
//! One place decides what a path may look like, what conflicts with what (O2) and how deep it goes
//! (O3), so that the text and the JSON spelling cannot come to differ (O1).
//!
//! A group whose names are all indices (`0`, `1`, …) becomes a list; that can only be known once
//! everything has arrived, hence the draft.

use std::collections::BTreeMap;

use super::{MAX_DEPTH, OptionError, OptionTree, Value, join};
use crate::open_gate::escape_bytes;

/// The longest single name between two dots, in bytes.
const MAX_NAME: usize = 128;

/// The longest dotted path, in bytes. It keeps the work per option bounded, as each path is built
/// and checked as a whole.
const MAX_PATH: usize = 1024;

/// A node of the half-built tree.
enum Node {
    Leaf(Value),
    Branch(BTreeMap<String, Node>),
}

/// A tree that is being filled.
#[derive(Default)]
pub(super) struct Draft {
    root: BTreeMap<String, Node>,
}

impl Draft {
    /// Puts a scalar (or an empty list) at the dotted `path`.
    pub(super) fn insert(&mut self, path: &str, value: Value) -> Result<(), OptionError> {
        let (parent, name) = self.reach(path)?;
        match parent.get(name) {
            None => {
                parent.insert(name.to_owned(), Node::Leaf(value));
                Ok(())
            }
            Some(Node::Leaf(_)) => Err(OptionError::new(path, "given twice")),
            Some(Node::Branch(_)) => Err(mixed(path)),
        }
    }

    /// Makes sure there is a group at the dotted `path`, so that an empty one is not lost.
    pub(super) fn insert_group(&mut self, path: &str) -> Result<(), OptionError> {
        let (parent, name) = self.reach(path)?;
        match parent.entry(name.to_owned()).or_insert_with(|| Node::Branch(BTreeMap::new())) {
            Node::Branch(_) => Ok(()),
            Node::Leaf(_) => Err(mixed(path)),
        }
    }

    /// The group that holds the last name of `path`, made if need be, and that name.
    fn reach<'draft, 'path>(
        &'draft mut self,
        path: &'path str,
    ) -> Result<(&'draft mut BTreeMap<String, Node>, &'path str), OptionError> {
        check_path(path)?;
        let mut group = &mut self.root;
        let mut start = 0;
        while let Some(length) = path[start..].find('.') {
            let end = start + length;
            let node = group
                .entry(path[start..end].to_owned())
                .or_insert_with(|| Node::Branch(BTreeMap::new()));
            match node {
                Node::Branch(inner) => group = inner,
                Node::Leaf(_) => return Err(mixed(&path[..end])),
            }
            start = end + 1;
        }
        Ok((group, &path[start..]))
    }

    /// The finished tree.
    pub(super) fn finish(self) -> Result<OptionTree, OptionError> {
        match finish_group(self.root, "")? {
            Value::Tree(tree) => Ok(tree),
            _ => Err(OptionError::new("", "the outermost options need names, not indices")),
        }
    }
}

/// Turns a group into a list if all its names are indices, else into a tree.
fn finish_group(group: BTreeMap<String, Node>, path: &str) -> Result<Value, OptionError> {
    let indices = group.keys().filter(|name| is_index(name)).count();
    if indices == 0 {
        let mut tree = OptionTree::new();
        for (name, node) in group {
            let value = finish_node(node, path, &name)?;
            tree.set(name, value);
        }
        return Ok(Value::Tree(tree));
    }
    if indices < group.len() {
        return Err(OptionError::new(path, "has both names and indices below it"));
    }
    // Distinct indices without leading zeros are distinct numbers, so `count` numbers all below
    // `count` are exactly 0..count.
    let count = group.len();
    let mut items: Vec<Option<Value>> = (0..count).map(|_| None).collect();
    for (name, node) in group {
        let index = name.parse::<usize>().ok().filter(|index| *index < count);
        let Some(index) = index else {
            return Err(OptionError::new(
                join(path, &name),
                format!("the indices of this list of {count} do not run from 0 on without a gap"),
            ));
        };
        items[index] = Some(finish_node(node, path, &name)?);
    }
    Ok(Value::List(items.into_iter().flatten().collect()))
}

/// Turns one member of the group at `path` into its value.
fn finish_node(node: Node, path: &str, name: &str) -> Result<Value, OptionError> {
    match node {
        Node::Leaf(value) => Ok(value),
        Node::Branch(inner) => finish_group(inner, &join(path, name)),
    }
}

/// Whether `name` stands for a place in a list. [`check_path`] has refused all other names that
/// begin with a digit.
fn is_index(name: &str) -> bool {
    name.starts_with(|first: char| first.is_ascii_digit())
}

/// Refuses a path that is too long, too deep or has a name that could not be one.
fn check_path(path: &str) -> Result<(), OptionError> {
    if path.len() > MAX_PATH {
        return Err(OptionError::new(
            "",
            format!("a key of {} bytes is too long (limit {MAX_PATH})", path.len()),
        ));
    }
    let mut depth = 0;
    for name in path.split('.') {
        depth += 1;
        if depth > MAX_DEPTH {
            return Err(OptionError::new(
                "",
                format!("options nest deeper than {MAX_DEPTH} levels"),
            ));
        }
        if let Some(problem) = name_problem(name) {
            // The name may be anything at all, so it is cut and escaped before it is shown.
            let mut end = name.len().min(MAX_NAME);
            while !name.is_char_boundary(end) {
                end -= 1;
            }
            let shown = escape_bytes(&name.as_bytes()[..end]);
            return Err(OptionError::new("", format!("key name '{shown}' {problem}")));
        }
    }
    Ok(())
}

/// Why `name` cannot name an option, if so. Names start with a letter or underscore and go on with
/// letters, digits, `-`, `_`; indices are decimal without leading zeros.
fn name_problem(name: &str) -> Option<&'static str> {
    let Some(&first) = name.as_bytes().first() else {
        return Some("is empty");
    };
    if name.len() > MAX_NAME {
        return Some("is too long");
    }
    if first.is_ascii_digit() {
        let canonical = name.bytes().all(|byte| byte.is_ascii_digit())
            && (name.len() == 1 || first != b'0')
            && name.len() <= 9;
        return (!canonical).then_some("is not a list index");
    }
    let fits = (first.is_ascii_alphabetic() || first == b'_')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
    (!fits).then_some("has characters a key cannot have")
}

fn mixed(path: &str) -> OptionError {
    OptionError::new(path, "given both as a value and with further options below it")
}
