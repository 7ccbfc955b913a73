//! Which image to open: by name, or by a tree of options.

use std::fmt;
use std::path::PathBuf;

/// One image as the user named it. Displayed as such, escaped, in messages and
/// results.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageSource {
    /// `[-f FMT] IMAGE`
    File {
        /// The file.
        path: PathBuf,
        /// Its format; `None`: to be found out from its first bytes.
        format: Option<String>,
    },
    /// `--image-opts OPTS`: `driver=qcow2,file.filename=…`, or JSON.
    Options(String),
}

impl fmt::Display for ImageSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::File { path, .. } => path.to_string_lossy(),
            Self::Options(options) => options.as_str().into(),
        };
        // A name must not be able to drive the terminal it is printed on.
        for character in name.chars() {
            if character.is_control() {
                write!(formatter, "{}", character.escape_default())?;
            } else {
                write!(formatter, "{character}")?;
            }
        }
        Ok(())
    }
}

/// The images of a command line. clap has made sure that not both kinds are
/// given.
pub(super) fn sources(
    paths: Vec<PathBuf>,
    format: Option<String>,
    options: Vec<String>,
) -> Vec<ImageSource> {
    let files = paths.into_iter().map(|path| ImageSource::File { path, format: format.clone() });
    files.chain(options.into_iter().map(ImageSource::Options)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_displayed_name_cannot_drive_the_terminal() {
        let source = ImageSource::File { path: PathBuf::from("a\u{1b}[2J.raw"), format: None };
        assert_eq!(source.to_string(), "a\\u{1b}[2J.raw");
    }
}
