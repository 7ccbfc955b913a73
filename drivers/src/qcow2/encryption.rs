//! Encrypted images: the guest's clusters are ciphertext; metadata is not, nor is the backing file.
//!
//! - **EN1** A guest cluster's place holds ciphertext in all its sectors: a new one is written as a
//!   whole, for zeros on disk would be read as noise. What should read as zeros, and is not
//!   written, says so in its entry.
//! - **EN2** With LUKS, the number of a sector is its place in the file that holds it; with the
//!   obsolete scheme it is its place in the disk (Q24: what is copied is decrypted by the old
//!   place and encrypted by the new one).
//! - **EN3** A key is known to be right before anything is read or written with it; where that
//!   cannot be known (the obsolete scheme) the password is the key.
//! - **EN4** Requests are whole sectors; the node's limits make them so. Others, of the driver
//!   itself, are widened by `transfer`.

mod options;

use super::Qcow2;
use super::header::{Header, encryption};
use super::locks::{self, Ranked};
use crate::crypto::luks::{
    self, DEFAULT_MAX_ITERATIONS, LuksCreateOptions, LuksHeader, MasterKey, SlotChange,
};
use crate::crypto::sectors::SectorCipher;
use crate::crypto::{Secret, legacy_aes, transfer};
use blockplex_graph::{Child, Error, ErrorKind, RequestFlags, Result};
use blockplex_io::buffer::IoVector;
use blockplex_io::lock::CoMutex;
use std::sync::Arc;

/// How an image is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EncryptionFormat {
    /// The obsolete scheme: AES-128-CBC, the password being the key.
    Aes,
    /// LUKS, version 1.
    Luks,
}

impl EncryptionFormat {
    /// Both, by their names in options.
    pub const NAMES: [(&'static str, EncryptionFormat); 2] =
        [("aes", EncryptionFormat::Aes), ("luks", EncryptionFormat::Luks)];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            EncryptionFormat::Aes => "aes",
            EncryptionFormat::Luks => "luks",
        }
    }
}

/// How an encrypted image is opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EncryptionOptions {
    /// `encrypt.format`: must be that of the image.
    pub format: Option<EncryptionFormat>,
    /// The secret that `encrypt.key-secret` names.
    pub key: Option<Secret>,
    /// `encrypt.max-iterations`: the most iterations of a key derivation; default:
    /// [`DEFAULT_MAX_ITERATIONS`].
    pub max_iterations: Option<u32>,
    /// The image may be opened without a key: for its metadata. Its data cannot be read or
    /// written then.
    pub metadata_only: bool,
}

/// What an image says of its encryption.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EncryptionInformation {
    /// The obsolete scheme.
    Aes,
    /// LUKS: the header, as it was when the image was opened.
    Luks(Box<LuksHeader>),
}

impl EncryptionInformation {
    /// Its format.
    pub fn format(&self) -> EncryptionFormat {
        match self {
            EncryptionInformation::Aes => EncryptionFormat::Aes,
            EncryptionInformation::Luks(_) => EncryptionFormat::Luks,
        }
    }
}

/// The encryption of a new image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CreateEncryption {
    /// The obsolete scheme.
    Aes(Secret),
    /// LUKS.
    Luks(LuksCreateOptions),
}

/// The encryption of an open image.
pub(super) struct Encryption {
    opened_with: EncryptionOptions,
    /// None: opened for its metadata.
    cipher: Option<Arc<SectorCipher>>,
    luks: Option<OpenLuks>,
}

struct OpenLuks {
    header: Ranked<CoMutex<LuksHeader>, { locks::LEAF }>,
    key: Option<MasterKey>,
    offset: u64,
    length: u64,
    max_iterations: u32,
}

fn refuse<T>(text: impl Into<String>) -> Result<T> {
    Err(Error::new(ErrorKind::InvalidArgument, text.into()))
}

impl Encryption {
    /// Opens the encryption of the image with this header; none if it is not encrypted.
    pub(super) async fn open(
        file: &Child,
        header: &Header,
        options: &EncryptionOptions,
    ) -> Result<Option<(Encryption, EncryptionInformation)>> {
        let format = match header.crypt_method {
            encryption::NONE => {
                // A key that nobody needs does no harm.
                return match options.format {
                    Some(format) => refuse(format!(
                        "No encryption in image header, but options specified format '{}'",
                        format.name()
                    )),
                    None => Ok(None),
                };
            }
            encryption::AES => EncryptionFormat::Aes,
            _ => EncryptionFormat::Luks,
        };
        if let Some(wanted) = options.format
            && wanted != format
        {
            return refuse(format!(
                "Header reported '{}' encryption format but options specify '{}'",
                format.name(),
                wanted.name()
            ));
        }
        if options.key.is_none() && !options.metadata_only {
            return Err(no_key());
        }
        let opened = match format {
            EncryptionFormat::Aes => {
                let cipher = options.key.as_ref().map(legacy_aes::sector_cipher).transpose()?;
                let cipher = cipher.map(Arc::new);
                let opened_with = options.clone();
                let encryption = Encryption { opened_with, cipher, luks: None };
                (encryption, EncryptionInformation::Aes)
            }
            EncryptionFormat::Luks => Encryption::open_luks(file, header, options).await?,
        };
        Ok(Some(opened))
    }

    async fn open_luks(
        file: &Child,
        header: &Header,
        options: &EncryptionOptions,
    ) -> Result<(Encryption, EncryptionInformation)> {
        let Some(extension) = header.extensions.crypto_header else {
            return refuse("the image has no LUKS header");
        };
        let (offset, length) = (extension.offset, extension.length);
        let place = luks::Place { file, offset, length };
        let header = LuksHeader::read(place).await?;
        let max_iterations = options.max_iterations.unwrap_or(DEFAULT_MAX_ITERATIONS);
        let key = match &options.key {
            Some(password) => Some(header.unlock(place, password, max_iterations).await?),
            None => None,
        };
        let cipher = key.as_ref().map(|key| key.cipher(&header.suite)).transpose()?;
        let information = EncryptionInformation::Luks(Box::new(header.clone()));
        let header = Ranked::new(CoMutex::new(header));
        let luks = Some(OpenLuks { header, key, offset, length, max_iterations });
        let (cipher, opened_with) = (cipher.map(Arc::new), options.clone());
        Ok((Encryption { opened_with, cipher, luks }, information))
    }

    fn cipher(&self) -> Result<&Arc<SectorCipher>> {
        self.cipher.as_ref().ok_or_else(no_key)
    }

    /// The byte by which sectors are numbered (EN2).
    fn numbered_by(&self, host: u64, guest: u64) -> u64 {
        if self.luks.is_some() { host } else { guest }
    }

    /// Fills `vector` with what the bytes of `data` from `host` on mean, at guest offset `guest`.
    pub(super) async fn read(
        &self,
        data: &Child,
        (host, guest): (u64, u64),
        vector: IoVector,
    ) -> Result<()> {
        let place = (host, self.numbered_by(host, guest));
        transfer::read(data, self.cipher()?, place, &vector).await
    }

    /// Writes `vector`, encrypted, to `data` from `host` on, at guest offset `guest`.
    pub(super) async fn write(
        &self,
        data: &Child,
        (host, guest): (u64, u64),
        vector: IoVector,
    ) -> Result<()> {
        let place = (host, self.numbered_by(host, guest));
        let flags = RequestFlags::default();
        transfer::write(data, self.cipher()?, place, &vector, flags).await
    }
}

/// Refuses new options of an open image that would change its encryption.
pub(super) fn check_unchanged(open: Option<&Encryption>, new: &EncryptionOptions) -> Result<()> {
    let has = open.map(|open| &open.opened_with);
    let format = open.map(|open| match open.luks {
        Some(_) => EncryptionFormat::Luks,
        None => EncryptionFormat::Aes,
    });
    let other_key = new.key.is_some() && new.key != has.and_then(|has| has.key.clone());
    if other_key || (new.format.is_some() && new.format != format) {
        let text = "encryption options cannot be changed while the image is open";
        return Err(Error::new(ErrorKind::NotSupported, text));
    }
    Ok(())
}

fn no_key() -> Error {
    let text = "Parameter 'encrypt.key-secret' is required for cipher";
    Error::new(ErrorKind::InvalidArgument, text)
}

impl Qcow2 {
    /// Refuses what an image without a key for its data cannot do.
    pub(super) fn check_key(&self) -> Result<()> {
        match &self.encryption {
            Some(encryption) => encryption.cipher().map(drop),
            None => Ok(()),
        }
    }

    /// Changes the key slots of an image that is encrypted with LUKS and was opened with a key;
    /// durable on return. With `force`, also what loses the data for ever.
    ///
    /// # Errors
    ///
    /// `NotSupported` for an image without key slots; a change that cannot be; those of the file.
    pub async fn change_key_slots(
        &self,
        file: &Child,
        change: &SlotChange,
        force: bool,
    ) -> Result<()> {
        let luks = self.encryption.as_ref().and_then(|encryption| encryption.luks.as_ref());
        let Some(luks) = luks else {
            let text = match &self.encryption {
                Some(_) => "Only LUKS encryption options can be amended",
                None => "Can't amend encryption options - encryption not present",
            };
            return Err(Error::new(ErrorKind::NotSupported, text));
        };
        let key = luks.key.as_ref().ok_or_else(no_key)?;
        self.prepare_for_writing(file).await?;
        let mut header = luks.header.lock().await;
        let place = luks::Place { file, offset: luks.offset, length: luks.length };
        let limits = (force, luks.max_iterations);
        luks::change_slots(&mut header, place, key, change, limits).await
    }

    /// The LUKS header of the image as it is now.
    pub async fn luks_header(&self) -> Option<LuksHeader> {
        let luks = self.encryption.as_ref()?.luks.as_ref()?;
        Some(luks.header.lock().await.clone())
    }

    /// Whether a place of data reads as zeros because the file does (EN1).
    pub(super) fn zeros_are_zeros(&self) -> bool {
        self.encryption.is_none()
    }
}

/// The bytes of a new image's LUKS header, with their offsets in it; none for other schemes.
pub(super) async fn new_key_header(
    file: &Child,
    encryption: Option<&CreateEncryption>,
) -> Result<Vec<(u64, Vec<u8>)>> {
    match encryption {
        Some(CreateEncryption::Luks(options)) => {
            Ok(luks::create(file.local(), options).await?.writes().into())
        }
        Some(CreateEncryption::Aes(_)) | None => Ok(Vec::new()),
    }
}
