//! Who is being waited for, in words: what a drain that takes too long prints.

use crate::gate::Gate;
use crate::ledger::{RequestRecord, kind};
use std::fmt;

/// How many requests `Display` spells out.
const SPELLED_OUT: usize = 8;

/// A slot with requests in flight. A picture for people, taken while they run: count and requests
/// may disagree, and a request may show a mixture of what used its record one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The gate's name.
    pub gate: String,
    /// The slot's label.
    pub slot: String,
    /// Requests admitted and not ended.
    pub in_flight: u64,
    /// What the owner recorded about them, the oldest first; requests without a record are only counted.
    pub requests: Vec<RequestRecord>,
    /// When the picture was taken, on the clock of [`RequestRecord::started_ns`].
    pub now_ns: u64,
}

impl Holder {
    pub(crate) fn of_gate(gate: &Gate, now_ns: u64) -> Vec<Holder> {
        let slots = gate.busy_slots();
        let holders = slots.iter().map(|slot| {
            let mut requests = slot.requests();
            // The oldest first: the one that a drain waits for is rarely the youngest.
            requests.sort_by_key(|request| request.started_ns);
            Holder {
                gate: gate.name().to_owned(),
                slot: slot.label().to_owned(),
                in_flight: slot.in_flight(),
                requests,
                now_ns,
            }
        });
        holders.collect()
    }

    /// Nanoseconds since the oldest recorded request was admitted.
    pub fn oldest_age_ns(&self) -> Option<u64> {
        let ages = self.requests.iter().map(|request| request.age_ns(self.now_ns));
        ages.max()
    }
}

impl RequestRecord {
    /// Nanoseconds since the request was admitted; 0 if `now_ns` lies before that.
    pub fn age_ns(&self, now_ns: u64) -> u64 {
        now_ns.saturating_sub(self.started_ns)
    }
}

/// `backend 'disk0' queue 'loop 1': read 4096 bytes at 8192, node 3, 12 ms`
impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: ", self.gate, self.slot)?;
        for (index, request) in self.requests.iter().take(SPELLED_OUT).enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            let age = Age(request.age_ns(self.now_ns));
            write!(f, "{separator}{request}, {age}")?;
        }
        let spelled_out = self.requests.len().min(SPELLED_OUT);
        let rest = self.in_flight.saturating_sub(spelled_out as u64);
        match (spelled_out, rest) {
            (0, rest) => write!(f, "{rest} in flight"),
            (_, 0) => Ok(()),
            (_, rest) => write!(f, "; and {rest} more"),
        }
    }
}

/// `read 4096 bytes at 8192, node 3`
impl fmt::Display for RequestRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = match self.kind {
            kind::READ => "read",
            kind::WRITE => "write",
            kind::WRITE_ZEROES => "write zeroes",
            kind::DISCARD => "discard",
            kind::FLUSH => "flush",
            kind::BLOCK_STATUS => "block status",
            kind::TRUNCATE => "truncate",
            kind::STEP => "step",
            _ => "",
        };
        match self.kind {
            kind::FLUSH => write!(f, "{verb}")?,
            kind::TRUNCATE => write!(f, "{verb} to {} bytes", self.offset)?,
            _ if verb.is_empty() => {
                let (kind, length, offset) = (self.kind, self.length, self.offset);
                write!(f, "request of kind {kind}, {length} bytes at {offset}")?;
            }
            _ => write!(f, "{verb} {} bytes at {}", self.length, self.offset)?,
        }
        write!(f, ", node {}", self.node)
    }
}

struct Age(u64);

impl fmt::Display for Age {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            ns @ 0..1_000_000 => write!(f, "{} us", ns / 1_000),
            ns @ 1_000_000..10_000_000_000 => write!(f, "{} ms", ns / 1_000_000),
            ns => write!(f, "{} s", ns / 1_000_000_000),
        }
    }
}

#[cfg(all(test, not(loom), not(shuttle)))]
mod tests {
    use super::*;

    fn holder(in_flight: u64, requests: Vec<RequestRecord>) -> Holder {
        Holder {
            gate: "backend 'disk0'".to_owned(),
            slot: "queue 'loop 1'".to_owned(),
            in_flight,
            requests,
            now_ns: 20_000_000_000,
        }
    }

    fn request(kind: u8, age_ns: u64) -> RequestRecord {
        RequestRecord {
            kind,
            offset: 8192,
            length: 4096,
            started_ns: 20_000_000_000 - age_ns,
            node: 3,
        }
    }

    #[test]
    fn a_holder_reads_as_a_sentence() {
        let one = holder(1, vec![request(kind::READ, 12_300_000)]);
        assert_eq!(
            one.to_string(),
            "backend 'disk0' queue 'loop 1': read 4096 bytes at 8192, node 3, 12 ms"
        );
        let many = holder(3, vec![request(kind::FLUSH, 500_000), request(99, 11_000_000_000)]);
        assert_eq!(
            many.to_string(),
            "backend 'disk0' queue 'loop 1': flush, node 3, 500 us; \
             request of kind 99, 4096 bytes at 8192, node 3, 11 s; and 1 more"
        );
        assert_eq!(many.oldest_age_ns(), Some(11_000_000_000));
        let unknown = holder(2, Vec::new());
        assert_eq!(unknown.to_string(), "backend 'disk0' queue 'loop 1': 2 in flight");
        assert_eq!(unknown.oldest_age_ns(), None);
    }

    #[test]
    fn a_long_list_is_cut() {
        let text = holder(100, vec![request(kind::WRITE, 0); 100]).to_string();
        assert_eq!(text.matches("write 4096").count(), SPELLED_OUT);
        assert!(text.ends_with("; and 92 more"), "{text}");
    }

    #[test]
    fn a_clock_that_lags_gives_age_zero() {
        let mut early = holder(1, vec![request(kind::TRUNCATE, 0)]);
        early.now_ns = 5;
        assert!(early.to_string().ends_with("truncate to 8192 bytes, node 3, 0 us"), "{early}");
    }
}
