//! Runs a stress: opens the image, starts iothreads and mutator, collects.

use std::error::Error;
use std::process::ExitCode;

use crate::command_line::StressOptions;

/// Does what `options` describe and prints the result; the status is a failure
/// if anything read was not what it had to be.
///
/// # Errors
/// Whatever kept the image from being opened, used or reported on.
pub fn run(_options: &StressOptions) -> Result<ExitCode, Box<dyn Error>> {
    Err("the engine is not linked yet".into())
}
