//! LUKS options by their names, as creation and `amend` have them.

use super::{LuksCreateOptions, SlotChange};
use crate::crypto::cipher::CipherAlgorithm;
use crate::crypto::hash::HashAlgorithm;
use crate::crypto::iv::IvAlgorithm;
use crate::crypto::secret::{Secret, Secrets};
use crate::crypto::sectors::CipherMode;
use crate::options::{OptionError, OptionTree, Value};
use blockplex_graph::{Error, ErrorKind, Result};
use std::time::Duration;

/// The most milliseconds that a password may take.
const MAX_ITERATION_TIME: u64 = 1000 * 3600;

fn refusal(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidArgument, text.into())
}

fn invalid(error: OptionError) -> Error {
    refusal(error.to_string())
}

/// The secret that option `key` names, if it is given.
///
/// # Errors
///
/// There is no such secret.
pub fn take_secret(tree: &mut OptionTree, key: &str, secrets: &Secrets) -> Result<Option<Secret>> {
    let Some(id) = tree.take_str(key).map_err(invalid)? else { return Ok(None) };
    match secrets.get(&id) {
        Some(secret) => Ok(Some(secret.clone())),
        None => Err(refusal(format!("No secret with id '{}'", id.escape_default()))),
    }
}

/// `max-iterations`: the most iterations of a key derivation that are accepted, if it is given.
///
/// # Errors
///
/// No number of iterations.
pub fn take_max_iterations(tree: &mut OptionTree) -> Result<Option<u32>> {
    let most = tree.take_u64_within("max-iterations", 1..=u32::MAX.into()).map_err(invalid)?;
    // It lies within the range.
    Ok(most.map(|most| most as u32))
}

/// What the word at `key` stands for, if it is given.
pub(crate) fn take_word<T>(
    tree: &mut OptionTree,
    key: &str,
    find: impl Fn(&str) -> Option<T>,
) -> Result<Option<T>> {
    let Some(word) = tree.take_str(key).map_err(invalid)? else { return Ok(None) };
    let found = find(&word).ok_or_else(|| {
        refusal(format!("Parameter '{key}' does not accept value '{}'", word.escape_default()))
    });
    found.map(Some)
}

fn take_time(tree: &mut OptionTree) -> Result<Option<Duration>> {
    let time = tree.take_u64_within("iter-time", 0..=MAX_ITERATION_TIME).map_err(invalid)?;
    Ok(time.map(Duration::from_millis))
}

impl LuksCreateOptions {
    /// Takes `key-secret`, `cipher-alg`, `cipher-mode`, `ivgen-alg`, `ivgen-hash-alg`, `hash-alg`
    /// and `iter-time`. `prefix` (`encrypt.` or nothing) is for messages.
    ///
    /// # Errors
    ///
    /// A value that is not known; no `key-secret`, or one that names no secret, or none that is
    /// text.
    pub fn take(tree: &mut OptionTree, secrets: &Secrets, prefix: &str) -> Result<Self> {
        let id = match tree.get("key-secret") {
            Some(Value::String(id)) => id.escape_default().to_string(),
            _ => String::new(),
        };
        let password = take_secret(tree, "key-secret", secrets)?.ok_or_else(|| {
            refusal(format!("Parameter '{prefix}key-secret' is required for cipher"))
        })?;
        // The peer could never open it.
        if std::str::from_utf8(password.bytes()).is_err() {
            return Err(refusal(format!("Data from secret {id} is not valid UTF-8")));
        }
        let mut options = LuksCreateOptions::new(password);
        let suite = &mut options.suite;
        let algorithm = take_word(tree, "cipher-alg", CipherAlgorithm::by_name)?;
        suite.algorithm = algorithm.unwrap_or(suite.algorithm);
        suite.mode = take_word(tree, "cipher-mode", CipherMode::by_name)?.unwrap_or(suite.mode);
        suite.iv = take_word(tree, "ivgen-alg", IvAlgorithm::by_name)?.unwrap_or(suite.iv);
        let default = (suite.iv == IvAlgorithm::Essiv).then_some(HashAlgorithm::Sha256);
        suite.iv_hash = take_word(tree, "ivgen-hash-alg", HashAlgorithm::by_name)?.or(default);
        let hash = take_word(tree, "hash-alg", HashAlgorithm::by_name)?;
        options.hash = hash.unwrap_or(options.hash);
        options.iteration_time = take_time(tree)?.unwrap_or(options.iteration_time);
        options.suite.check()?;
        Ok(options)
    }
}

impl SlotChange {
    /// Takes `state`, `keyslot`, `old-secret`, `new-secret` and `iter-time`.
    ///
    /// # Errors
    ///
    /// A value that is not known, or options that do not go together.
    pub fn take(tree: &mut OptionTree, secrets: &Secrets) -> Result<SlotChange> {
        let states = |word: &str| match word {
            "active" => Some(true),
            "inactive" => Some(false),
            _ => None,
        };
        let active = take_word(tree, "state", states)?;
        let active = active.ok_or_else(|| refusal("Parameter 'state' is missing"))?;
        let slot = tree.take_u64("keyslot").map_err(invalid)?;
        let slot = slot.map(|slot| usize::try_from(slot).unwrap_or(usize::MAX));
        let old = take_secret(tree, "old-secret", secrets)?;
        let new = take_secret(tree, "new-secret", secrets)?;
        let iteration_time = take_time(tree)?;
        match (active, new) {
            (true, _) if old.is_some() => {
                Err(refusal("'old-secret' must not be given when activating keyslots"))
            }
            (true, Some(password)) => Ok(SlotChange::Activate { slot, password, iteration_time }),
            (true, None) => Err(refusal("'new-secret' is required to activate a keyslot")),
            (false, Some(_)) => {
                Err(refusal("'new-secret' must not be given when erasing keyslots"))
            }
            (false, None) if iteration_time.is_some() => {
                Err(refusal("'iter-time' must not be given when erasing keyslots"))
            }
            (false, None) => Ok(SlotChange::Erase { slot, password: old }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secrets() -> Secrets {
        let mut secrets = Secrets::default();
        secrets.insert("s", Secret::new("hush"));
        secrets
    }

    #[test]
    fn creation_options_have_the_defaults_of_the_peer() {
        let take = |text: &str| {
            let mut tree = OptionTree::parse(text, None).unwrap();
            let options = LuksCreateOptions::take(&mut tree, &secrets(), "encrypt.");
            tree.finish().unwrap();
            options
        };
        let secret = Secret::new("hush");
        assert_eq!(take("key-secret=s").unwrap(), LuksCreateOptions::new(secret));
        let essiv = take("key-secret=s,ivgen-alg=essiv,cipher-mode=cbc,iter-time=10").unwrap();
        assert_eq!(essiv.suite.iv_hash, Some(HashAlgorithm::Sha256));
        assert_eq!(essiv.iteration_time, Duration::from_millis(10));
        for (text, wanted) in [
            ("", "Parameter 'encrypt.key-secret' is required for cipher"),
            ("key-secret=t", "No secret with id 't'"),
            ("key-secret=s,cipher-alg=foo", "Parameter 'cipher-alg' does not accept value 'foo'"),
            ("key-secret=s,cipher-alg=cast5-128", "does not go with mode xts"),
            ("key-secret=s,ivgen-alg=essiv,ivgen-hash-alg=sha1", "20 bytes"),
        ] {
            let error = take(text).unwrap_err().to_string();
            assert!(error.contains(wanted), "{text}: {error}");
        }
    }

    #[test]
    fn slot_changes_that_contradict_themselves_are_refused() {
        let take = |text: &str| {
            let mut tree = OptionTree::parse(text, None).unwrap();
            SlotChange::take(&mut tree, &secrets())
        };
        assert!(take("state=active,new-secret=s,keyslot=3").is_ok());
        assert!(take("state=inactive,old-secret=s").is_ok());
        for (text, wanted) in [
            ("new-secret=s", "'state' is missing"),
            ("state=off", "does not accept value 'off'"),
            ("state=active", "'new-secret' is required"),
            ("state=active,new-secret=s,old-secret=s", "'old-secret' must not be given"),
            ("state=inactive,new-secret=s", "'new-secret' must not be given"),
            ("state=inactive,iter-time=5,keyslot=1", "'iter-time' must not be given"),
        ] {
            let error = take(text).unwrap_err().to_string();
            assert!(error.contains(wanted), "{text}: {error}");
        }
    }
}
