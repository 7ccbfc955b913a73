//! `secret,id=…,data=…`: how tools are given secrets.
//!
//! | option | meaning |
//! |---|---|
//! | `id` | the name by which other options call it |
//! | `data` | the bytes themselves (visible to who sees the command line) |
//! | `file` | a file that holds them; all of its bytes count, a line end as well |
//! | `format` | `raw` (default) or `base64` |
//! | `keyid`, `iv` | they are encrypted with AES-256-CBC: the secret with the key (32 bytes), and the initialisation vector in base64 |

use super::cipher::CipherAlgorithm;
use super::secret::{Secret, Secrets};
use crate::options::{OptionError, OptionTree};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use blockplex_graph::{Error, ErrorKind, Result};
use std::io::Read as _;
use zeroize::Zeroizing;

/// The most bytes of a secret's file.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Bytes of a block of AES.
const BLOCK: usize = 16;

#[derive(Clone, Copy, Default)]
enum Format {
    #[default]
    Raw,
    Base64,
}

/// The secret that `text` describes, and its identifier; `known` are those that it may refer to.
/// Reads the file that it names: may block.
///
/// # Errors
///
/// Options that are wrong; a file that cannot be read; bytes that cannot be decoded or decrypted.
/// No error says anything of the secret.
pub fn parse(text: &str, known: &Secrets) -> Result<(String, Secret)> {
    from_options(OptionTree::parse(text, Some("qom-type")).map_err(invalid)?, known)
}

/// As [`parse`], from options that have been parsed.
///
/// # Errors
///
/// As for [`parse`].
pub fn from_options(mut tree: OptionTree, known: &Secrets) -> Result<(String, Secret)> {
    if let Some(kind) = tree.take_str("qom-type").map_err(invalid)?
        && kind != "secret"
    {
        let text = format!("object type '{}' is not supported (secret is)", kind.escape_default());
        return Err(Error::new(ErrorKind::NotSupported, text));
    }
    let id = tree.take_str("id").map_err(invalid)?;
    let id = id.ok_or_else(|| refusal("Parameter 'id' is missing"))?;
    check_identifier(&id)?;
    let data = tree.take_str("data").map_err(invalid)?.map(Zeroizing::new);
    let file = tree.take_str("file").map_err(invalid)?;
    let formats = [("raw", Format::Raw), ("base64", Format::Base64)];
    let format = tree.take_enum("format", &formats).map_err(invalid)?.unwrap_or_default();
    let key = tree.take_str("keyid").map_err(invalid)?;
    let iv = tree.take_str("iv").map_err(invalid)?;
    tree.finish().map_err(invalid)?;
    let bytes = match (data, file) {
        (Some(data), None) => Zeroizing::new(data.as_bytes().to_vec()),
        (None, Some(file)) => read_file(&file)?,
        (Some(_), Some(_)) => return Err(refusal("'file' and 'data' are mutually exclusive")),
        (None, None) => return Err(refusal("Either 'file' or 'data' must be provided")),
    };
    let bytes = match format {
        Format::Raw => bytes,
        Format::Base64 => decode(&bytes)?,
    };
    let secret = match key {
        None => Secret::new(bytes.to_vec()),
        Some(key) => {
            let key = known
                .get(&key)
                .ok_or_else(|| refusal(format!("No secret with id '{}'", key.escape_default())))?;
            decrypt(bytes, key, iv.as_deref())?
        }
    };
    Ok((id, secret))
}

fn invalid(error: OptionError) -> Error {
    refusal(error.to_string())
}

fn refusal(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidArgument, text.into())
}

fn check_identifier(id: &str) -> Result<()> {
    let mut bytes = id.bytes();
    let begins = bytes.next().is_some_and(|byte| byte.is_ascii_alphabetic());
    if begins && bytes.all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte)) {
        return Ok(());
    }
    let text = "Parameter 'id' expects an identifier: letters, digits, '-', '.' and '_', a letter \
                first";
    Err(refusal(text))
}

fn read_file(name: &str) -> Result<Zeroizing<Vec<u8>>> {
    let failed = |doing: &str, error: std::io::Error| {
        let name = name.escape_default();
        let text = format!("Unable to read {name}: Failed to {doing} file “{name}”: {error}");
        Error::new(Error::from(error).kind(), text)
    };
    let file = std::fs::File::open(name).map_err(|error| failed("open", error))?;
    let mut bytes = Zeroizing::new(Vec::new());
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(|error| failed("read", error))?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        let text = format!("the secret in {} is longer than 1 MiB", name.escape_default());
        return Err(Error::new(ErrorKind::LimitExceeded, text));
    }
    Ok(bytes)
}

/// Line ends in base64 are skipped, as files have them.
fn decode(bytes: &[u8]) -> Result<Zeroizing<Vec<u8>>> {
    let mut digits = Zeroizing::new(bytes.to_vec());
    digits.retain(|byte| !byte.is_ascii_whitespace());
    let decoded = STANDARD.decode(&*digits);
    // The error quotes a byte of the secret.
    decoded.map(Zeroizing::new).map_err(|_| refusal("Base64 data contains invalid characters"))
}

/// AES-256-CBC with the padding of PKCS #7.
fn decrypt(mut bytes: Zeroizing<Vec<u8>>, key: &Secret, iv: Option<&str>) -> Result<Secret> {
    let iv = iv.ok_or_else(|| refusal("IV is required to decrypt secret"))?;
    let iv = decode(iv.as_bytes())?;
    let Ok(mut previous) = <[u8; BLOCK]>::try_from(&**iv) else {
        return Err(refusal(format!("IV should be {BLOCK} bytes long, not {}", iv.len())));
    };
    let cipher = match decode(key.bytes()) {
        Ok(key) if key.len() == 32 => CipherAlgorithm::Aes256.keyed(&key)?,
        _ if key.bytes().len() == 32 => CipherAlgorithm::Aes256.keyed(key.bytes())?,
        _ => return Err(refusal("Key should be 32 bytes long")),
    };
    let (blocks, rest) = bytes.as_chunks_mut::<BLOCK>();
    if !rest.is_empty() || blocks.is_empty() {
        return Err(refusal("the encrypted secret is not whole blocks of 16 bytes"));
    }
    for block in blocks {
        let ciphertext = *block;
        cipher.decrypt(block);
        block.iter_mut().zip(previous).for_each(|(byte, before)| *byte ^= before);
        previous = ciphertext;
    }
    let padding = bytes.last().copied().unwrap_or(0);
    let length = bytes.len().checked_sub(usize::from(padding));
    let Some(length) = length.filter(|_| (1..=BLOCK as u8).contains(&padding)) else {
        return Err(refusal("Incorrect padding found on decrypted data"));
    };
    bytes.truncate(length);
    Ok(Secret::new(std::mem::take(&mut *bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of(text: &str) -> Vec<u8> {
        parse(text, &Secrets::default()).unwrap().1.bytes().to_vec()
    }

    fn error_of(text: &str) -> String {
        parse(text, &Secrets::default()).unwrap_err().to_string()
    }

    #[test]
    fn a_secret_comes_from_its_data_or_from_a_whole_file() {
        assert_eq!(bytes_of("secret,id=s,data=a,,b c"), b"a,b c");
        assert_eq!(bytes_of("secret,id=s,data=YWJj,format=base64"), b"abc");
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"abc\n").unwrap();
        assert_eq!(bytes_of(&format!("secret,id=s,file={}", file.path().display())), b"abc\n");
        let (id, _) =
            parse(r#"{"qom-type":"secret","id":"x-1","data":"a"}"#, &Secrets::default()).unwrap();
        assert_eq!(id, "x-1");
    }

    #[test]
    fn wrong_descriptions_are_refused_and_quote_no_secret() {
        for (text, wanted) in [
            ("secret,data=hush", "'id' is missing"),
            ("secret,id=s", "Either 'file' or 'data'"),
            ("secret,id=s,data=hush,file=b", "mutually exclusive"),
            ("secret,id=s,data=hush%,format=base64", "invalid characters"),
            ("secret,id=1,data=hush", "identifier"),
            ("secret,id=s,data=hush,foo=1", "foo"),
            ("secret,id=s,file=/nonexistent", "Unable to read"),
            ("secret,id=s,data=hush,keyid=k", "No secret with id 'k'"),
            ("tls-creds,id=s", "object type"),
        ] {
            let error = error_of(text);
            assert!(error.contains(wanted) && !error.contains("hush"), "{text}: {error}");
        }
    }

    #[test]
    fn an_encrypted_secret_is_decrypted_with_the_one_that_it_names() {
        let cipher = CipherAlgorithm::Aes256.keyed(&[7; 32]).unwrap();
        let mut block = *b"letmein\x09\x09\x09\x09\x09\x09\x09\x09\x09";
        block.iter_mut().for_each(|byte| *byte ^= 1);
        cipher.encrypt(&mut block);
        let mut known = Secrets::default();
        known.insert("k", Secret::new(STANDARD.encode([7; 32])));
        let text = format!(
            "secret,id=s,keyid=k,format=base64,data={},iv={}",
            STANDARD.encode(block),
            STANDARD.encode([1; 16])
        );
        assert_eq!(parse(&text, &known).unwrap().1.bytes(), b"letmein");
        let without = text.split(",iv=").next().unwrap().to_owned();
        assert!(parse(&without, &known).unwrap_err().to_string().contains("IV"));
        known.insert("k", Secret::new("short"));
        assert!(parse(&text, &known).is_err());
    }
}
