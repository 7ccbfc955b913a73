//! Secrets: what an option names and nobody prints.

use super::key_memory::KeyMemory;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// A password or key: any bytes. Cloning shares them; the last owner wipes them.
#[derive(Clone)]
pub struct Secret(Arc<KeyMemory>);

impl Secret {
    /// A secret of these bytes.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Secret {
        Secret(Arc::new(KeyMemory::new(&Zeroizing::new(bytes.into()))))
    }

    /// The bytes. Do not copy them to where they are not wiped.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Secret) -> bool {
        self.bytes().ct_eq(other.bytes()).into()
    }
}

impl Eq for Secret {}

/// Secrets by their identifiers, as options name them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Secrets(BTreeMap<String, Secret>);

impl Secrets {
    /// Adds a secret, in the place of one with the same identifier.
    pub fn insert(&mut self, id: impl Into<String>, secret: Secret) {
        self.0.insert(id.into(), secret);
    }

    /// The secret with this identifier.
    pub fn get(&self, id: &str) -> Option<&Secret> {
        self.0.get(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_equal_by_its_bytes_and_never_shown() {
        let mut secrets = Secrets::default();
        secrets.insert("a", Secret::new("hush"));
        assert_eq!(secrets.get("a"), Some(&Secret::new(b"hush".to_vec())));
        assert_ne!(secrets.get("a"), Some(&Secret::new("hus")));
        assert!(secrets.get("b").is_none());
        assert!(!format!("{secrets:?}").contains("hush"));
    }
}
