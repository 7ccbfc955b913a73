//! How many iterations of a key derivation a time is worth on this machine.

use super::{DEFAULT_MAX_ITERATIONS, most_iterations};
use crate::crypto::hash::HashAlgorithm;
use std::time::{Duration, Instant};

/// The least, whatever the time.
const MIN_ITERATIONS: u32 = 1000;
/// Measuring is long enough to be trusted after this.
const MEASURED: Duration = Duration::from_millis(20);

/// Iterations that take about `time` for a key of `length` bytes, within what is accepted at
/// opening. Takes a few hundredths of a second (K3).
pub(super) fn iterations(hash: HashAlgorithm, length: usize, time: Duration) -> u32 {
    let most = most_iterations(DEFAULT_MAX_ITERATIONS, hash, length);
    let mut count = MIN_ITERATIONS;
    loop {
        let start = Instant::now();
        hash.derive(b"password", &[0; 32], count, length);
        let elapsed = start.elapsed();
        if elapsed >= MEASURED || count >= most / 2 {
            let wanted = f64::from(count) * time.as_secs_f64() / elapsed.as_secs_f64().max(1e-9);
            // A conversion of floats ends at the bounds of the type.
            return (wanted as u32).clamp(MIN_ITERATIONS, most);
        }
        count *= 2;
    }
}
