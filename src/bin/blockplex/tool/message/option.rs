//! Options with values that they cannot have: which of QEMU's sentences says so.

/// What names of options of nodes below begin with, from the top down.
const BELOW: [&str; 5] = ["backing.", "data-file.", "file.", "image.", "file."];

/// QEMU's sentence for an error that the library tells as `text`.
pub fn sentence(text: &str) -> Option<String> {
    if text
        == "Could not parse the JSON options: malformed JSON: the outermost value is not an object"
    {
        return Some("Invalid JSON object given".to_owned());
    }
    let (name, rest) = text.strip_prefix("option '")?.split_once("': '")?;
    let (value, rule) = rest.split_once("' is ")?;
    if rule == "neither 'on' nor 'off'" {
        // The peer names options of nodes below as these nodes do.
        let name = BELOW.iter().fold(name, |name, below| name.strip_prefix(below).unwrap_or(name));
        return Some(format!("Parameter '{name}' expects 'on' or 'off'"));
    }
    if rule.starts_with("not a size") {
        return Some(format!(
            "Parameter '{name}' expects a non-negative number below 2^64\nOptional suffix k, M, G, \
             T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively."
        ));
    }
    match (name, rule.strip_prefix("none of ")) {
        ("detect-zeroes", Some(_)) => Some(format!("invalid parameter value: {value}")),
        ("overlap-check" | "overlap-check.template", Some(allowed)) => Some(format!(
            "Unsupported value '{value}' for qcow2 option 'overlap-check'. Allowed are any of the \
             following: {allowed}"
        )),
        ("cache-clean-interval", None) if value.starts_with('-') => {
            Some("Cache clean interval too big".to_owned())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_the_sentences_of_the_peer() {
        let size = sentence("option 'cache-size': 'x' is not a size (units are B, K)");
        let size = size.unwrap_or_default();
        assert!(size.starts_with("Parameter 'cache-size' expects a non-negative number"), "{size}");
        assert_eq!(
            sentence("option 'overlap-check': 'x' is none of none, all").as_deref(),
            Some(
                "Unsupported value 'x' for qcow2 option 'overlap-check'. Allowed are any of the \
                 following: none, all"
            )
        );
        assert_eq!(
            sentence("option 'backing.file.locking': 'x' is neither 'on' nor 'off'").as_deref(),
            Some("Parameter 'locking' expects 'on' or 'off'")
        );
        assert_eq!(sentence("option 'other': 'x' is none of none, all"), None);
        assert_eq!(sentence("something else"), None);
    }
}
