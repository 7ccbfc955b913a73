//! Block limits: what a node asks of the requests that reach it, and how limits combine.

/// Limits of one node. All in bytes unless said otherwise; 0 means "no limit" for maxima and
/// "none known" for optima.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Offsets and lengths must be multiples of it; others are widened by read-modify-write. A
    /// power of two, at least 1.
    pub request_alignment: u32,
    /// Addresses and lengths of memory must be multiples of it; others are bounced.
    pub memory_alignment: u32,
    /// The alignment at which memory is handled best.
    pub optimal_memory_alignment: u32,
    /// The largest transfer of one request; larger ones are split.
    pub max_transfer: u32,
    /// The transfer size that suits best.
    pub optimal_transfer: u32,
    /// The most pieces of memory in one request.
    pub max_segments: u32,
    /// Alignment of write-zeroes that the node does efficiently.
    pub write_zeroes_alignment: u32,
    /// The largest write-zeroes.
    pub max_write_zeroes: u64,
    /// Alignment of discards that have an effect.
    pub discard_alignment: u32,
    /// The largest discard.
    pub max_discard: u64,
}

impl Limits {
    /// The longest request that is accepted at all (QEMU's bound as well).
    pub const MAX_REQUEST: u64 = (1 << 31) - 512;

    /// The largest node length: room for arithmetic on offsets (QEMU rounds INT64_MAX down to
    /// 1 GiB).
    pub const MAX_LENGTH: u64 = i64::MAX as u64 & !((1 << 30) - 1);

    /// No limits.
    pub const UNLIMITED: Limits = Limits {
        request_alignment: 1,
        memory_alignment: 1,
        optimal_memory_alignment: 4096,
        max_transfer: 0,
        optimal_transfer: 0,
        max_segments: libc::UIO_MAXIOV as u32,
        write_zeroes_alignment: 0,
        max_write_zeroes: 0,
        discard_alignment: 0,
        max_discard: 0,
    };

    /// What a parent inherits from a child: memory alignment and sizes of transfers. Request
    /// alignment is not inherited, since each node widens requests for itself.
    #[must_use]
    pub fn merge_child(self, child: &Limits) -> Limits {
        Limits {
            memory_alignment: self.memory_alignment.max(child.memory_alignment),
            optimal_memory_alignment: self
                .optimal_memory_alignment
                .max(child.optimal_memory_alignment),
            max_transfer: min_non_zero(self.max_transfer, child.max_transfer),
            optimal_transfer: self.optimal_transfer.max(child.optimal_transfer),
            max_segments: min_non_zero(self.max_segments, child.max_segments),
            ..self
        }
    }

    /// Whether `offset` and `length` need no widening.
    pub fn is_aligned(&self, offset: u64, length: u64) -> bool {
        (offset | length) & (u64::from(self.request_alignment) - 1) == 0
    }
}

fn min_non_zero(a: u32, b: u32) -> u32 {
    match (a, b) {
        (0, other) | (other, 0) => other,
        (a, b) => a.min(b),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_takes_the_stricter_of_each_inherited_limit_and_keeps_its_request_alignment() {
        let child = Limits {
            request_alignment: 4096,
            memory_alignment: 512,
            max_transfer: 1 << 20,
            ..Limits::UNLIMITED
        };
        let parent = Limits { max_transfer: 2 << 20, ..Limits::UNLIMITED }.merge_child(&child);
        assert_eq!(parent.request_alignment, 1);
        assert_eq!(parent.memory_alignment, 512);
        assert_eq!(parent.max_transfer, 1 << 20);
        assert!(!child.is_aligned(4096, 512) && child.is_aligned(8192, 4096));
    }
}
