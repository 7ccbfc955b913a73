//! The result of a measurement, as numbers.
//!
//! Each iothread hands in a [`Tally`]; [`Report::new`] makes the figures of
//! each and of all together. The report is what `--output json` prints: its
//! field names are the interface that scripts rely on. `table` prints the same
//! for people.

use std::time::Duration;

use serde::Serialize;

use super::histogram::Histogram;

/// What one iothread has done. Only that iothread touches it until it ends.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Reads that succeeded.
    pub reads: u64,
    /// Writes that succeeded.
    pub writes: u64,
    /// Latencies of both.
    pub latencies: Histogram,
}

impl Tally {
    fn requests(&self) -> u64 {
        self.reads + self.writes
    }

    fn merge(&mut self, other: &Self) {
        self.reads += other.reads;
        self.writes += other.writes;
        self.latencies.merge(&other.latencies);
    }
}

/// What was measured; these fields stand at the top of the JSON object.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Description {
    /// The images as the user named them, or what was used instead.
    pub images: Vec<String>,
    /// `--rw`, as it is written on the command line.
    pub rw: String,
    /// Bytes of each request.
    pub bs: u64,
    /// Requests in flight in each queue.
    pub depth: u32,
    /// The part of each disk that was used, in bytes.
    pub size: u64,
    /// Whether the host's page cache was bypassed.
    pub direct: bool,
    /// What the requests were drawn from.
    pub seed: u64,
    /// How the kernel was asked, such as `io_uring`.
    pub engine: String,
}

/// Latencies in nanoseconds. Percentiles are at most 1.6 % too high.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Latencies {
    /// The arithmetic mean.
    pub mean: f64,
    /// The median.
    pub p50: u64,
    /// Nine of ten requests took at most this.
    pub p90: u64,
    /// 99 of 100.
    pub p99: u64,
    /// 999 of 1000.
    pub p99_9: u64,
    /// The longest of all, exactly.
    pub max: u64,
}

impl Latencies {
    /// `None` if nothing was recorded.
    fn of(histogram: &Histogram) -> Option<Self> {
        Some(Self {
            mean: histogram.mean()?,
            p50: histogram.percentile(50.0)?,
            p90: histogram.percentile(90.0)?,
            p99: histogram.percentile(99.0)?,
            p99_9: histogram.percentile(99.9)?,
            max: histogram.most()?,
        })
    }
}

/// The figures of one iothread, or of all together.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figures {
    /// Reads and writes.
    pub requests: u64,
    /// Of these, reads.
    pub reads: u64,
    /// Of these, writes.
    pub writes: u64,
    /// Requests a second.
    pub iops: f64,
    /// Mebibytes a second.
    pub mib_per_s: f64,
    /// The time measured, divided by the requests. With several requests in
    /// flight this is less than any of them took: it is the cost, not the
    /// latency. `null` if there were none.
    pub ns_per_request: Option<f64>,
    /// Latencies; `null` if there were no requests.
    pub latency_ns: Option<Latencies>,
}

impl Figures {
    fn new(tally: &Tally, block_bytes: u64, wall: Duration) -> Self {
        let requests = tally.requests();
        let seconds = wall.as_secs_f64();
        let iops = if seconds > 0.0 { requests as f64 / seconds } else { 0.0 };
        Self {
            requests,
            reads: tally.reads,
            writes: tally.writes,
            iops,
            mib_per_s: iops * block_bytes as f64 / f64::from(1 << 20),
            ns_per_request: (requests > 0).then(|| wall.as_nanos() as f64 / requests as f64),
            latency_ns: Latencies::of(&tally.latencies),
        }
    }
}

/// The result of a measurement.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// What was measured.
    #[serde(flatten)]
    pub description: Description,
    /// How long, in seconds.
    pub seconds: f64,
    /// The figures of all iothreads together.
    #[serde(flatten)]
    pub all: Figures,
    /// The figures of each.
    pub iothreads: Vec<Figures>,
}

impl Report {
    /// Sums up. `wall` is the time from the first submission to the last
    /// completion, the same for all.
    pub fn new(description: Description, wall: Duration, tallies: &[Tally]) -> Self {
        let mut sum = Tally::default();
        for tally in tallies {
            sum.merge(tally);
        }
        let figures = |tally| Figures::new(tally, description.bs, wall);
        Self {
            seconds: wall.as_secs_f64(),
            all: figures(&sum),
            iothreads: tallies.iter().map(figures).collect(),
            description,
        }
    }

    /// The report as one JSON object, with a line end.
    ///
    /// # Errors
    /// None that a report can cause; serde's interface has one.
    pub fn json(&self) -> serde_json::Result<String> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        Ok(text)
    }
}

/// A report to try tables and plots on.
#[cfg(test)]
pub(super) fn example(tallies: &[Tally]) -> Report {
    let description = Description {
        images: vec!["disk.qcow2".to_owned()],
        rw: "randread".to_owned(),
        bs: 4096,
        depth: 32,
        size: 64 << 20,
        direct: false,
        seed: 1,
        engine: "io_uring".to_owned(),
    };
    Report::new(description, Duration::from_secs(2), tallies)
}

/// An iothread whose every request was a read that took `nanoseconds`.
#[cfg(test)]
pub(super) fn steady(requests: u64, nanoseconds: u64) -> Tally {
    let mut tally = Tally { reads: requests, ..Tally::default() };
    for _ in 0..requests {
        tally.latencies.record_nanoseconds(nanoseconds);
    }
    tally
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_is_the_sum_of_its_iothreads() {
        let report = example(&[steady(3000, 100), steady(1000, 1000)]);
        assert_eq!(report.all.requests, 4000);
        assert_eq!(report.all.iops, 2000.0);
        assert_eq!(report.all.mib_per_s, 2000.0 * 4096.0 / 1_048_576.0);
        assert_eq!(report.all.ns_per_request, Some(500_000.0));
        assert_eq!(report.iothreads[1].ns_per_request, Some(2_000_000.0));
        let latencies = report.all.latency_ns.unwrap();
        assert_eq!(latencies.mean, 325.0);
        assert_eq!((latencies.p50, latencies.p90, latencies.max), (100, 1000, 1000));
    }

    #[test]
    fn scripts_find_the_fields_they_rely_on() {
        let text = example(&[steady(10, 100), steady(10, 100)]).json().unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        for scope in [&value, &value["iothreads"][0], &value["iothreads"][1]] {
            for key in ["iops", "mib_per_s", "ns_per_request"] {
                assert!(scope[key].is_f64(), "{key} in {scope}");
            }
            for key in ["mean", "p50", "p90", "p99", "p99_9", "max"] {
                assert!(scope["latency_ns"][key].is_number(), "{key} in {scope}");
            }
        }
        assert_eq!(value["rw"], "randread");
        assert_eq!(value["bs"], 4096);
        assert_eq!(value["depth"], 32);
        assert_eq!(value["images"][0], "disk.qcow2");
        assert_eq!(value["seconds"], 2.0);
        assert_eq!(value["iothreads"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn an_iothread_without_requests_has_no_latencies_rather_than_wrong_ones() {
        let text = example(&[steady(10, 100), Tally::default()]).json().unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["iothreads"][1]["iops"], 0.0);
        assert!(value["iothreads"][1]["ns_per_request"].is_null());
        assert!(value["iothreads"][1]["latency_ns"].is_null());
    }
}
