//! The options by which most commands say which image they mean.

use crate::tool::getopt::{Given, Opt, long, long_with, opt, with};
use crate::tool::open::{CacheMode, ImageOpenOptions};
use crate::tool::{Failure, Tool};

/// `-f`, `--image-opts`, `-U`, `-T` and `--object`, as given.
#[derive(Clone, Debug, Default)]
pub struct Source {
    /// `-f`.
    pub format: Option<String>,
    /// `--image-opts`.
    pub image_opts: bool,
    /// `-U`.
    pub force_share: bool,
}

/// `-h`.
pub const HELP: Opt = opt("help", 'h');
/// `-q`.
pub const QUIET: Opt = opt("quiet", 'q');
/// `-f`.
pub const FORMAT: Opt = with("format", 'f');
/// `--image-opts`.
pub const IMAGE_OPTS: Opt = long("image-opts");
/// `-U`.
pub const FORCE_SHARE: Opt = opt("force-share", 'U');
/// `--object`.
pub const OBJECT: Opt = long_with("object");

impl Source {
    /// Takes one of these options; whether it was one.
    ///
    /// # Errors
    ///
    /// An object that cannot be.
    pub fn take(&mut self, tool: &mut Tool, given: &Given) -> Result<bool, Failure> {
        match given.name {
            "format" => self.format = Some(given.value.clone()),
            "image-opts" => self.image_opts = true,
            "force-share" => self.force_share = true,
            "object" => tool.add_object(&given.value)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// How the image called `filename` is opened.
    ///
    /// # Errors
    ///
    /// Options that exclude each other.
    pub fn open_options(&self, filename: &str) -> Result<ImageOpenOptions, Failure> {
        if self.image_opts && self.format.is_some() {
            return Err(Failure::new("--image-opts and --format are mutually exclusive"));
        }
        Ok(ImageOpenOptions {
            image_opts: self.image_opts,
            format: self.format.clone(),
            force_share: self.force_share,
            ..ImageOpenOptions::new(filename)
        })
    }
}

/// The cache mode that `-t` or `-T` names; `which` is how the message calls it.
///
/// # Errors
///
/// It names none.
pub fn cache_mode(which: &str, name: &str) -> Result<CacheMode, Failure> {
    CacheMode::parse(name)
        .ok_or_else(|| Failure::new(format!("Invalid {which}cache option: {name}")))
}
