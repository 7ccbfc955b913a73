//! A limit on bytes a second.

use std::time::Duration;

use blockplex::Local;
use parking_lot::Mutex;

/// Lets so many bytes pass in a second, all lanes together. A lane that has been let through may
/// overdraw by its one chunk; the next waits until that is paid.
pub struct RateLimit {
    bytes_per_second: u64,
    /// When the bytes let through so far are paid, in the loops' nanoseconds.
    paid_at: Mutex<u64>,
}

impl RateLimit {
    /// `bytes_per_second` is at least 1.
    pub fn new(bytes_per_second: u64) -> RateLimit {
        RateLimit { bytes_per_second: bytes_per_second.max(1), paid_at: Mutex::new(0) }
    }

    /// Waits until `bytes` may pass.
    pub async fn pass(&self, local: &Local, bytes: u64) {
        let now = local.refresh_now();
        let start = {
            let mut paid_at = self.paid_at.lock();
            let start = now.max(*paid_at);
            let cost = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
            *paid_at = start.saturating_add(u64::try_from(cost).unwrap_or(u64::MAX));
            start
        };
        if start > now {
            local.sleep(Duration::from_nanos(start - now)).await;
        }
    }
}
