//! `--object secret,id=…`: keys and passphrases by name.

use std::collections::BTreeMap;
use std::path::PathBuf;

use blockplex::OptionTree;

use super::{Failure, Tool};

/// The secrets given, by their ids.
#[derive(Clone, Default)]
pub struct Secrets(BTreeMap<String, Vec<u8>>);

impl Secrets {
    /// The bytes of the secret called `id`.
    pub fn get(&self, id: &str) -> Option<&[u8]> {
        self.0.get(id).map(Vec::as_slice)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.0.iter().map(|(id, bytes)| (id.as_str(), bytes.as_slice()))
    }
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl Tool {
    /// Takes in what `--object` says.
    ///
    /// # Errors
    ///
    /// An object that is no secret, or whose secret cannot be read.
    pub fn add_object(&mut self, text: &str) -> Result<(), Failure> {
        let invalid = |error: blockplex::OptionError| Failure::new(error.to_string());
        let mut tree = OptionTree::parse(text, Some("qom-type")).map_err(invalid)?;
        let missing = |name| Failure::new(format!("Parameter '{name}' is missing"));
        let kind = tree.take_str("qom-type").map_err(invalid)?;
        let kind = kind.ok_or_else(|| missing("qom-type"))?;
        if kind != "secret" {
            let text = format!("Parameter 'qom-type' does not accept value '{kind}'");
            return Err(Failure::new(text));
        }
        let id = tree.take_str("id").map_err(invalid)?.ok_or_else(|| missing("id"))?;
        if tree.contains("keyid") || tree.contains("iv") {
            return Err(Failure::new("secrets that are themselves encrypted are not supported"));
        }
        let words = [("raw", false), ("base64", true)];
        let base64 = tree.take_enum("format", &words).map_err(invalid)?.unwrap_or(false);
        let data = tree.take_str("data").map_err(invalid)?;
        let file = tree.take_str("file").map_err(invalid)?.map(PathBuf::from);
        if let Some((name, _)) = tree.iter().next() {
            return Err(Failure::new(format!("Parameter '{name}' is unexpected")));
        }
        let bytes = match (data, file) {
            (Some(_), Some(_)) => {
                return Err(Failure::new("'file' and 'data' are mutually exclusive"));
            }
            (None, None) => return Err(Failure::new("Either 'file' or 'data' must be provided")),
            (Some(data), None) => data.into_bytes(),
            (None, Some(path)) => std::fs::read(&path).map_err(|error| {
                let text = super::message::strerror(error.raw_os_error().unwrap_or(0));
                let path = path.display();
                Failure::new(format!("Unable to read {path}: Failed to open file “{path}”: {text}"))
            })?,
        };
        let bytes = if base64 { decode_base64(&bytes)? } else { bytes };
        if self.secrets.0.insert(id.clone(), bytes).is_some() {
            let text =
                format!("attempt to add duplicate property '{id}' to object (type 'container')");
            return Err(Failure::new(text));
        }
        Ok(())
    }
}

fn decode_base64(text: &[u8]) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut held) = (0_u32, 0);
    let digits = text.iter().filter(|byte| !byte.is_ascii_whitespace());
    for digit in digits.take_while(|byte| **byte != b'=') {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return Err(Failure::new("Base64 data is not valid")),
        };
        bits = bits << 6 | u32::from(value);
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
            bits &= (1 << held) - 1;
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_kept_by_name() {
        let mut tool = Tool::new("t");
        tool.add_object("secret,id=a,data=pass").unwrap();
        tool.add_object("qom-type=secret,id=b,data=cGFzcw==,format=base64").unwrap();
        assert_eq!(tool.secrets.get("a"), tool.secrets.get("b"));
        for (text, problem) in [
            ("x", "Parameter 'qom-type' does not accept value 'x'"),
            ("secret,data=x", "Parameter 'id' is missing"),
            ("secret,id=c", "Either 'file' or 'data' must be provided"),
        ] {
            assert_eq!(tool.add_object(text).unwrap_err().text(), Some(problem));
        }
    }
}
