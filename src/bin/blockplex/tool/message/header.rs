//! Headers that make no sense: which of QEMU's sentences says so.
//!
//! The library names the field, its place, its value and the rule. Where QEMU has a sentence of its
//! own for a field it is taken; what QEMU would let pass keeps the library's words.

/// QEMU's sentence for an error that the library tells as `text`.
pub fn sentence(text: &str) -> Option<String> {
    let (what, rest) = text.split_once(" (header field at byte ")?;
    let (byte, rule) = rest.split_once(')')?;
    let value = what.rsplit(' ').next()?;
    let is_too_large = rule.starts_with(" exceeds ");
    let is_misplaced =
        rule.contains("2^56") || rule.contains("multiple") || rule.contains("aligned");
    let sentence = match byte {
        "4" => format!("Unsupported qcow2 version {value}"),
        "16" if is_too_large => "Backing file name too long".to_owned(),
        "20" => format!("Unsupported cluster size: 2^{value}"),
        "32" if rule.starts_with(" is not 0") => format!("Unsupported encryption method {value}"),
        "36" if is_too_large => "Active L1 table too large".to_owned(),
        "40" if is_misplaced => "Active L1 table offset invalid".to_owned(),
        "48" if is_misplaced => "Reference count table offset invalid".to_owned(),
        "56" if is_too_large => "Reference count table too large".to_owned(),
        "60" if is_too_large => "Snapshot table too large".to_owned(),
        "64" if is_misplaced => "Snapshot table offset invalid".to_owned(),
        "72" => format!("Unsupported qcow2 feature(s): {}", unknown_features(rule)?),
        "96" => "Reference count entry width too large; may not exceed 64 bits".to_owned(),
        _ => return None,
    };
    Some(sentence)
}

/// `have unknown bits: 7, 9` as the number that has them set.
fn unknown_features(rule: &str) -> Option<String> {
    let (_, bits) = rule.split_once("unknown bits: ")?;
    let mut mask = 0_u64;
    for bit in bits.split(", ") {
        mask |= 1_u64.checked_shl(bit.parse().ok()?)?;
    }
    Some(format!("Unknown incompatible feature: {mask:x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_have_the_sentences_of_the_peer() {
        for (ours, theirs) in [
            (
                "qcow version 4 (header field at byte 4) is not 2 or 3",
                "Unsupported qcow2 version 4",
            ),
            (
                "incompatible features 0x99000000 (header field at byte 72) have unknown bits: 24, \
                 27, 28, 31",
                "Unsupported qcow2 feature(s): Unknown incompatible feature: 99000000",
            ),
            (
                "L1 table size 2130706433 (header field at byte 36) exceeds 4194304 entries",
                "Active L1 table too large",
            ),
        ] {
            assert_eq!(sentence(ours).as_deref(), Some(theirs));
        }
        let kept = "L1 table offset 0x30000 (header field at byte 40) with 8 bytes there reaches \
                    past the end of the file at 0x11170";
        assert_eq!(sentence(kept), None);
        assert_eq!(sentence("something else"), None);
    }
}
