//! The options of encrypted images, as `-o` has them.

use blockplex::OptionTree;
use blockplex::drivers::crypto::Secrets;
use blockplex::drivers::crypto::luks::LuksCreateOptions;
use blockplex::drivers::qcow2::CreateEncryption;

use super::super::option_list::OptionList;
use super::super::{Failure, Tool};

/// Before the names of the options of an encrypted qcow2 image.
pub const GROUP: &str = "encrypt.";

/// The options whose names begin with `prefix`, without it.
pub fn group(options: &OptionList, prefix: &str) -> OptionTree {
    let mut group = OptionTree::new();
    for key in options.keys() {
        if let (Some(name), Some(value)) = (key.strip_prefix(prefix), options.get(key)) {
            group.set(name, value.into());
        }
    }
    group
}

/// Refuses what nobody has taken.
pub fn finish(group: &OptionTree, prefix: &str) -> Result<(), Failure> {
    match group.iter().next() {
        Some((name, _)) => Err(Failure::new(format!("Parameter '{prefix}{name}' is unexpected"))),
        None => Ok(()),
    }
}

/// How a new qcow2 image is to be encrypted, if at all.
///
/// # Errors
///
/// Options that are missing, wrong, or do not go together.
pub fn of_qcow2(
    options: &OptionList,
    secrets: &Secrets,
) -> Result<Option<CreateEncryption>, Failure> {
    let mut group = group(options, GROUP);
    if let Some(old) = options.switch("encryption")? {
        if group.contains("format") {
            return Err(Failure::new(
                "'encrypt.format' and its alias 'encryption' can't be used at the same time",
            ));
        }
        if old {
            group.set("format", "aes".into());
        }
    }
    if group.is_empty() {
        return Ok(None);
    }
    let encryption = CreateEncryption::take(&mut group, secrets)?;
    finish(&group, GROUP)?;
    Ok(Some(encryption))
}

/// What a new LUKS disk is to be. What is the disk's or the file's is left to others.
///
/// # Errors
///
/// As [`of_qcow2`].
pub fn of_luks(options: &OptionList, secrets: &Secrets) -> Result<LuksCreateOptions, Failure> {
    let mut group = OptionTree::new();
    for key in options.keys().filter(|key| !["size", "preallocation", "nocow"].contains(key)) {
        group.set(key, options.get(key).unwrap_or_default().into());
    }
    if options.switch("detached-header")? == Some(false) {
        group = without(&group, "detached-header");
    }
    let luks = LuksCreateOptions::take(&mut group, secrets, "")?;
    finish(&group, "")?;
    Ok(luks)
}

fn without(tree: &OptionTree, name: &str) -> OptionTree {
    let mut rest = OptionTree::new();
    for (key, value) in tree.iter().filter(|(key, _)| *key != name) {
        rest.set(key, value.clone());
    }
    rest
}

impl Tool {
    /// The options with which an image that was made with `options` is opened: its key.
    pub fn key_options(format: &str, options: &OptionList) -> Vec<(String, String)> {
        let name = if format == "luks" { "key-secret" } else { "encrypt.key-secret" };
        let key = options.get(name).map(|id| (name.to_owned(), id.to_owned()));
        key.into_iter().collect()
    }
}
