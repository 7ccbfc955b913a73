//! Headers that make no sense: which of QEMU's sentences says so.
//!
//! The library names the field, its place, its value and the rule. Where QEMU has a sentence of its
//! own for a field it is taken; what QEMU would let pass keeps the library's words.

/// QEMU's sentence for an error that the library tells as `text`.
pub fn sentence(text: &str) -> Option<String> {
    if text.starts_with("header extension length ") && text.contains(" exceeds the ") {
        return Some("Header extension too large".to_owned());
    }
    let (what, rest) = text.split_once(" (header field at byte ")?;
    let (byte, rule) = rest.split_once(')')?;
    let value = what.rsplit(' ').next()?;
    let is_too_large = rule.starts_with(" exceeds ");
    let is_misplaced =
        rule.contains("2^56") || rule.contains("multiple") || rule.contains("aligned");
    let is_beyond_counting = || is_beyond_counting(value, rule).unwrap_or(false);
    let sentence = match byte {
        "4" => format!("Unsupported qcow2 version {value}"),
        "16" if is_too_large => "Backing file name too long".to_owned(),
        "16" if rule.contains(" the offset 0xffff") => "Invalid backing file offset".to_owned(),
        "20" => format!("Unsupported cluster size: 2^{value}"),
        "24" if is_too_large => "Image is too big".to_owned(),
        "32" if rule.starts_with(" is not 0") => format!("Unsupported encryption method {value}"),
        "36" if is_too_large => "Active L1 table too large".to_owned(),
        "36" if rule.starts_with(" is less than ") => "L1 table is too small".to_owned(),
        "40" if is_misplaced || is_beyond_counting() => "Active L1 table offset invalid".to_owned(),
        "48" if is_misplaced || is_beyond_counting() => {
            "Reference count table offset invalid".to_owned()
        }
        "56" if rule.starts_with(" leaves the image without refcounts") => {
            "Image does not contain a reference count table".to_owned()
        }
        "56" if is_too_large => "Reference count table too large".to_owned(),
        "60" if is_too_large => "Snapshot table too large".to_owned(),
        "64" if is_misplaced || is_beyond_counting() => "Snapshot table offset invalid".to_owned(),
        "72" => format!("Unsupported qcow2 feature(s): {}", unknown_features(rule)?),
        "96" => "Reference count entry width too large; may not exceed 64 bits".to_owned(),
        "100" if is_too_large => "qcow2 header exceeds cluster size".to_owned(),
        _ => return None,
    };
    Some(sentence)
}

/// Whether a table at `offset` that ` with SIZE bytes there reaches past the end of the file` ends
/// where QEMU's numbers do: what ends before that it tries to read.
fn is_beyond_counting(offset: &str, rule: &str) -> Option<bool> {
    let offset = u64::from_str_radix(offset.strip_prefix("0x")?, 16).ok()?;
    let (size, _) = rule.strip_prefix(" with ")?.split_once(" bytes there reaches past")?;
    let end = offset.checked_add(size.parse().ok()?);
    Some(end.is_none_or(|end| end > i64::MAX as u64))
}

/// `have unknown bits: 7 "a name", 9` as the names that are known, and the number that has the
/// other bits set.
fn unknown_features(rule: &str) -> Option<String> {
    let (_, mut rest) = rule.split_once("unknown bits: ")?;
    let (mut names, mut mask) = (Vec::new(), 0_u64);
    while !rest.is_empty() {
        let end = rest.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(rest.len());
        let bit = rest[..end].parse().ok()?;
        rest = &rest[end..];
        match rest.strip_prefix(" \"").and_then(|name| name.split_once('"')) {
            Some((name, after)) => {
                names.push(name.to_owned());
                rest = after;
            }
            None => mask |= 1_u64.checked_shl(bit)?,
        }
        rest = rest.strip_prefix(", ").unwrap_or(rest);
    }
    if mask != 0 {
        names.push(format!("Unknown incompatible feature: {mask:x}"));
    }
    Some(names.join(", "))
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
                "incompatible features 0xe000000000000000 (header field at byte 72) have unknown \
                 bits: 61 \"a, 1\", 62, 63 \"b\"",
                "Unsupported qcow2 feature(s): a, 1, b, Unknown incompatible feature: \
                 4000000000000000",
            ),
            (
                "snapshot table offset 0xffffffffffff0000 (header field at byte 64) with 80 bytes \
                 there reaches past the end of the file at 0x30008",
                "Snapshot table offset invalid",
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
