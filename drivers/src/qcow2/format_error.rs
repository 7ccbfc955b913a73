//! Why bytes are not the qcow2 image that they should be.
//!
//! [`FormatError`] carries what a person needs to find the fault with a hex dump: the field, its
//! value, where it stands, and the rule that it breaks. A driver matches on
//! [`FormatError::kind`] only.

use std::fmt;

/// The most bytes of a string from an image that an error shows (the length of a name in the
/// feature-name table).
pub const SHOWN_BYTES: usize = 46;

/// What a caller may want to tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FormatErrorKind {
    /// The magic is wrong: this is some other format.
    OtherFormat,
    /// A field breaks a rule of the format, or a limit of this implementation.
    Malformed,
    /// The image is valid but uses a feature that is not implemented.
    Unsupported,
    /// The image says of itself that it is corrupt.
    MarkedCorrupt,
    /// What should be written does not fit into the space that the format has for it.
    NoSpace,
    /// An option for creating an image is out of range or contradicts another.
    InvalidOption,
}

/// Where a field stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A header field, at this byte of the file.
    Header(u64),
    /// A header extension (or something in it), at this byte of the file.
    Extension(u64),
    /// At no fixed byte: a creation option, or a value that was taken from an extension.
    Elsewhere,
}

/// One broken rule: field, value, place and rule.
///
/// Displayed as one sentence without a full stop, for example `L1 table offset 0x30200 (header
/// field at byte 40) is not a multiple of the cluster size 65536`. The text is safe to print:
/// strings from the image are escaped and cut to [`SHOWN_BYTES`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormatError {
    /// What kind of refusal this is.
    pub kind: FormatErrorKind,
    /// The field, in words.
    pub field: &'static str,
    /// Its value, as it should be shown.
    pub value: String,
    /// Where it stands.
    pub place: Place,
    /// The rule it breaks, as the rest of the sentence: "is not …", "exceeds …".
    pub rule: String,
}

impl FormatError {
    /// A [`FormatErrorKind::Malformed`] field with its value in decimal.
    pub(crate) fn number(
        field: &'static str,
        value: u64,
        place: Place,
        rule: impl Into<String>,
    ) -> Self {
        Self::text(field, value.to_string(), place, rule)
    }

    /// A [`FormatErrorKind::Malformed`] field with its value in hexadecimal: offsets and masks.
    pub(crate) fn hex(
        field: &'static str,
        value: u64,
        place: Place,
        rule: impl Into<String>,
    ) -> Self {
        Self::text(field, format!("{value:#x}"), place, rule)
    }

    /// A [`FormatErrorKind::Malformed`] field with its value given as text, which the caller has
    /// made safe to show (see [`escaped`]).
    pub(crate) fn text(
        field: &'static str,
        value: impl Into<String>,
        place: Place,
        rule: impl Into<String>,
    ) -> Self {
        FormatError {
            kind: FormatErrorKind::Malformed,
            field,
            value: value.into(),
            place,
            rule: rule.into(),
        }
    }

    /// The same error with another kind.
    pub(crate) fn of_kind(mut self, kind: FormatErrorKind) -> Self {
        self.kind = kind;
        self
    }
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.field, self.value)?;
        match self.place {
            Place::Header(byte) => write!(f, " (header field at byte {byte})")?,
            Place::Extension(byte) => write!(f, " (header extension at byte {byte})")?,
            Place::Elsewhere => {}
        }
        write!(f, " {}", self.rule)
    }
}

impl std::error::Error for FormatError {}

/// `bytes` in quotes, escaped so that no control character reaches a terminal or a log, and cut
/// after [`SHOWN_BYTES`] bytes of input (with `…` when something was cut off).
///
/// Any thread may call this.
pub fn escaped(bytes: &[u8]) -> String {
    let shown = bytes.get(..SHOWN_BYTES).unwrap_or(bytes);
    let cut = if shown.len() < bytes.len() { "…" } else { "" };
    format!("\"{}{cut}\"", shown.escape_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentence_names_field_value_place_and_rule() {
        let error = FormatError::hex(
            "L1 table offset",
            0x30200,
            Place::Header(40),
            "is not a multiple of the cluster size 65536",
        );
        assert_eq!(
            error.to_string(),
            "L1 table offset 0x30200 (header field at byte 40) is not a multiple of the cluster \
             size 65536"
        );
    }

    #[test]
    fn strings_from_images_are_escaped_and_cut() {
        assert_eq!(escaped(b"a%n\x1b[2J\n\xff"), r#""a%n\x1b[2J\n\xff""#);
        let long = escaped(&[b'x'; 1000]);
        assert_eq!(long.chars().filter(|&c| c == 'x').count(), SHOWN_BYTES);
        assert!(long.ends_with("…\""));
    }
}
