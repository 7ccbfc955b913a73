//! Showing bytes that came from an image, a peer or a caller without letting them speak.

/// Makes `bytes` fit to be shown in a message, a log line or a terminal.
///
/// Letters and digits of any script and printable ASCII stay; all else (control characters,
/// invisible and direction-changing characters, bytes that are not UTF-8) becomes `\xNN`, and the
/// characters `\`, `'` and `"` get a backslash, so that the text can stand between quotes and can
/// be read back in one way only.
#[must_use]
pub fn escape_bytes(bytes: &[u8]) -> String {
    let mut shown = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            match character {
                '\\' | '\'' | '"' => {
                    shown.push('\\');
                    shown.push(character);
                }
                ' '..='~' => shown.push(character),
                _ if character.is_alphanumeric() => shown.push(character),
                _ => {
                    let mut buffer = [0; 4];
                    push_hex(&mut shown, character.encode_utf8(&mut buffer).as_bytes());
                }
            }
        }
        push_hex(&mut shown, chunk.invalid());
    }
    shown
}

fn push_hex(shown: &mut String, bytes: &[u8]) {
    for byte in bytes {
        shown.push_str(&format!("\\x{byte:02x}"));
    }
}

#[cfg(test)]
mod tests {
    use super::escape_bytes;

    #[test]
    fn readable_text_stays_as_it_is() {
        for text in ["/srv/images/base 1.qcow2", "größe", "日本", "a-b_c.d~%n$"] {
            assert_eq!(escape_bytes(text.as_bytes()), text);
        }
    }

    #[test]
    fn nothing_that_moves_a_terminal_gets_through() {
        assert_eq!(escape_bytes(b"a\x1b[2J\r\nb\0"), r"a\x1b[2J\x0d\x0ab\x00");
        assert_eq!(escape_bytes(b"\x7f\x9b\xff"), r"\x7f\x9b\xff");
        // A direction override and a zero-width space.
        assert_eq!(escape_bytes("\u{202e}a\u{200b}".as_bytes()), r"\xe2\x80\xaea\xe2\x80\x8b");
    }

    #[test]
    fn quotes_and_backslashes_cannot_be_forged() {
        assert_eq!(escape_bytes(br#"\x00 'a' "b""#), r#"\\x00 \'a\' \"b\""#);
    }
}
