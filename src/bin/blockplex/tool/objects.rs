//! `--object secret,id=…`: keys and passphrases by name.

use blockplex::OptionTree;
use blockplex::drivers::crypto::secret_object;

use super::message::describe;
use super::{Failure, Tool};

impl Tool {
    /// Takes in what `--object` says.
    ///
    /// # Errors
    ///
    /// An object that is no secret, or whose secret cannot be read.
    pub fn add_object(&mut self, text: &str) -> Result<(), Failure> {
        let invalid = |error: blockplex::OptionError| Failure::new(error.to_string());
        let mut tree = OptionTree::parse(text, Some("qom-type")).map_err(invalid)?;
        let kind = tree.take_str("qom-type").map_err(invalid)?;
        let kind = kind.ok_or_else(|| Failure::new("Parameter 'qom-type' is missing"))?;
        if kind != "secret" {
            let text = format!("Parameter 'qom-type' does not accept value '{kind}'");
            return Err(Failure::new(text));
        }
        let (id, secret) = secret_object::from_options(tree, &self.secrets)
            .map_err(|error| Failure::new(unexpected(&describe(&error))))?;
        if self.secrets.get(&id).is_some() {
            let text =
                format!("attempt to add duplicate property '{id}' to object (type 'container')");
            return Err(Failure::new(text));
        }
        self.secrets.insert(id, secret);
        Ok(())
    }
}

/// An unknown option in the words of QEMU's tools.
fn unexpected(text: &str) -> String {
    let name =
        text.strip_prefix("option '").and_then(|rest| rest.strip_suffix("': is unknown here"));
    match name {
        Some(name) => format!("Parameter '{name}' is unexpected"),
        None => text.to_owned(),
    }
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
            ("secret,id=c,data=x,zz=1", "Parameter 'zz' is unexpected"),
        ] {
            assert_eq!(tool.add_object(text).unwrap_err().text(), Some(problem));
        }
    }
}
