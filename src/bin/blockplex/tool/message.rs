//! The library's errors in the words of QEMU's tools, for people and programs that know those.
//!
//! The library says more (which node, which range, which errno); what the tools would not say is
//! cut off here, and a few sentences are exchanged.

mod header;
mod option;

use blockplex::Error;

/// The text of an errno, as C's `strerror` gives it.
pub fn strerror(errno: i32) -> String {
    plain(&std::io::Error::from_raw_os_error(errno).to_string())
}

/// An error of opening or managing an image.
pub fn describe(error: &Error) -> String {
    let mut text = plain(error.message());
    // `'/dir/image': what is wrong`, once for each image on the way down.
    let mut prefix = String::new();
    loop {
        const BACKING: &str = "Could not open backing file: ";
        if let Some(rest) = text.strip_prefix(BACKING) {
            prefix.push_str(BACKING);
            text = rest.to_owned();
        } else if text.starts_with('\'')
            && let Some((path, rest)) = text.split_once("': ")
        {
            if let Some(lock) = rest.strip_suffix(" (is another process using the image?)") {
                text = format!("{lock}\nIs another process using the image [{}]?", &path[1..]);
                break;
            }
            text = rest.to_owned();
        } else {
            break;
        }
    }
    const MALFORMED: &str = "malformed JSON: EOF while parsing";
    if let Some((before, _)) = text.split_once(MALFORMED) {
        text = format!("{before}JSON parse error, premature EOI");
    }
    match text.as_str() {
        "preallocation cannot be used for shrinking a file" => {
            text = "Cannot use preallocation for shrinking files".to_owned();
        }
        "preallocation cannot be used for shrinking an image" => {
            text = "Preallocation can't be used for shrinking an image".to_owned();
        }
        _ => {}
    }
    if text.starts_with("size ") && text.ends_with(", the most with this cluster size") {
        text = "Failed to grow the L1 table: File too large".to_owned();
    }
    if text == "a file has no preallocation mode 'metadata'" {
        text = "Unsupported preallocation mode: metadata".to_owned();
    }
    if let Some(sentence) = option::sentence(&text) {
        text = sentence;
    }
    if text.ends_with("this is not a qcow2 image") {
        text = "Image is not in qcow2 format".to_owned();
    }
    if text.contains("its L1 table offset ") && text.ends_with(" is no cluster of the file") {
        text = "Snapshot L1 table offset invalid".to_owned();
    }
    if text.contains("its L1 table of ") && text.contains(" entries exceeds ") {
        text = "Snapshot L1 table too large".to_owned();
    }
    if let Some(sentence) = header::sentence(&text) {
        text = sentence;
    }
    if text.contains("mark the image as corrupt (bit 1)") {
        text = "qcow2: Image is corrupt; cannot be opened read/write".to_owned();
    }
    if let Some((driver, _)) =
        text.strip_prefix("driver '").and_then(|rest| rest.split_once("' is not supported ("))
    {
        text = format!("Unknown driver '{driver}'");
    }
    prefix + &text
}

/// Takes the numbers of errnos out of a text.
fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find(" (os error ") {
        plain.push_str(&rest[..start]);
        rest = rest[start..].split_once(')').map_or("", |(_, rest)| rest);
    }
    plain + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockplex::ErrorKind;

    #[test]
    fn errors_are_told_in_the_words_of_the_peers_tools() {
        for (ours, theirs) in [
            (
                "Could not open 'x': No such file or directory (os error 2)",
                "Could not open 'x': No such file or directory",
            ),
            (
                "'/a/b': magic 0x1 is not 0x2: this is not a qcow2 image",
                "Image is not in qcow2 format",
            ),
            ("Could not open backing file: '/a': broken", "Could not open backing file: broken"),
            (
                "'x': Failed to get \"write\" lock (is another process using the image?)",
                "Failed to get \"write\" lock\nIs another process using the image [x]?",
            ),
        ] {
            assert_eq!(describe(&Error::new(ErrorKind::Io, ours)), theirs);
        }
        assert_eq!(strerror(28), "No space left on device");
    }
}
