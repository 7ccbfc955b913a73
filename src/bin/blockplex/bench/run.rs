//! Runs a measurement: opens the images, starts the iothreads, collects.

use std::error::Error;

use crate::command_line::BenchOptions;

/// Measures what `options` describe and prints the result.
///
/// # Errors
/// Whatever kept the images from being opened, measured or reported.
pub fn run(_options: &BenchOptions) -> Result<(), Box<dyn Error>> {
    Err("the engine is not linked yet".into())
}
