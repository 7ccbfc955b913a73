//! The options of group `encrypt`, for opening and creating images.

use super::{CreateEncryption, EncryptionFormat, EncryptionOptions};
use crate::crypto::Secrets;
use crate::crypto::luks::LuksCreateOptions;
use crate::crypto::luks::options::{take_max_iterations, take_secret, take_word};
use crate::options::OptionTree;
use blockplex_graph::{Error, ErrorKind, Result};

fn format_named(name: &str) -> Option<EncryptionFormat> {
    EncryptionFormat::NAMES.iter().find(|(known, _)| *known == name).map(|(_, format)| *format)
}

impl EncryptionOptions {
    /// Takes `format`, `key-secret` and `max-iterations` from the group.
    ///
    /// # Errors
    ///
    /// A format that is not known; a secret that there is not.
    pub fn take(group: &mut OptionTree, secrets: &Secrets) -> Result<EncryptionOptions> {
        Ok(EncryptionOptions {
            format: take_word(group, "format", format_named)?,
            key: take_secret(group, "key-secret", secrets)?,
            max_iterations: take_max_iterations(group)?,
            ..EncryptionOptions::default()
        })
    }
}

impl CreateEncryption {
    /// Takes `format`, `key-secret` and, for LUKS, the others from the group.
    ///
    /// # Errors
    ///
    /// As for LUKS; no `format`.
    pub fn take(group: &mut OptionTree, secrets: &Secrets) -> Result<CreateEncryption> {
        let refusal = |text| Error::new(ErrorKind::InvalidArgument, text);
        match take_word(group, "format", format_named)? {
            None => Err(refusal("Parameter 'encrypt.format' is missing")),
            Some(EncryptionFormat::Aes) => take_secret(group, "key-secret", secrets)?
                .map(CreateEncryption::Aes)
                .ok_or_else(|| refusal("Parameter 'encrypt.key-secret' is required for cipher")),
            Some(EncryptionFormat::Luks) => {
                LuksCreateOptions::take(group, secrets, "encrypt.").map(CreateEncryption::Luks)
            }
        }
    }
}
