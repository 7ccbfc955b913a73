//! The result of a stress run. As JSON, its field names are the interface that
//! scripts rely on.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::mutation::Mutation;
use super::plan::Operation;
use super::verify::Mismatch;
use crate::units;

/// How many mismatches are described; the others are only counted.
const EXAMPLES_MAX: usize = 16;

/// What one iothread has done. Only that iothread touches it until it ends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// Reads, each verified.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Writes of zeroes.
    pub write_zeroes: u64,
    /// Discards.
    pub discards: u64,
    /// Flushes.
    pub flushes: u64,
    /// Requests that read what must not be there.
    #[serde(skip)]
    mismatches: u64,
    /// The first of them, described.
    #[serde(skip)]
    examples: Vec<String>,
}

impl Tally {
    /// Counts an operation that has completed.
    pub fn count(&mut self, operation: &Operation) {
        let counter = match operation {
            Operation::Read(_) => &mut self.reads,
            Operation::Write { .. } => &mut self.writes,
            Operation::WriteZeroes { .. } => &mut self.write_zeroes,
            Operation::Discard(_) => &mut self.discards,
            Operation::Flush => &mut self.flushes,
        };
        *counter += 1;
    }

    /// Counts a mismatch that iothread number `thread` met.
    pub fn count_mismatch(&mut self, thread: u32, mismatch: &Mismatch) {
        self.mismatches += 1;
        if self.examples.len() < EXAMPLES_MAX {
            self.examples.push(format!("iothread {thread}: {mismatch}"));
        }
    }

    fn operations(&self) -> u64 {
        self.reads + self.writes + self.write_zeroes + self.discards + self.flushes
    }

    fn merge(&mut self, other: &Self) {
        self.reads += other.reads;
        self.writes += other.writes;
        self.write_zeroes += other.write_zeroes;
        self.discards += other.discards;
        self.flushes += other.flushes;
        self.mismatches += other.mismatches;
        let room = EXAMPLES_MAX - self.examples.len();
        self.examples.extend(other.examples.iter().take(room).cloned());
    }
}

/// What the mutator has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MutationTally {
    done: BTreeMap<Mutation, u64>,
    /// Drained sections, those inside other mutations included.
    pub drains: u64,
}

impl MutationTally {
    /// Counts a mutation that has succeeded.
    pub fn count(&mut self, mutation: Mutation) {
        *self.done.entry(mutation).or_default() += 1;
    }
}

/// The result of a stress run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The image as the user named it, or what was used instead.
    pub image: String,
    /// Number of iothreads.
    pub iothreads: usize,
    /// Operations of all iothreads.
    pub operations: u64,
    /// The same by kind.
    #[serde(flatten)]
    by_kind: Tally,
    /// Changes of the graph.
    pub mutations: u64,
    /// The same by kind.
    mutations_by_kind: BTreeMap<&'static str, u64>,
    /// Drained sections.
    pub drains: u64,
    /// Requests that read what must not be there. Anything but 0 is a failure.
    pub mismatches: u64,
    /// Some of them.
    mismatch_examples: Vec<String>,
    /// How long, in seconds.
    pub seconds: f64,
    /// What repeats the operations.
    pub seed: u64,
}

impl Report {
    /// Sums up.
    pub fn new(
        image: String,
        seed: u64,
        wall: Duration,
        tallies: &[Tally],
        mutations: &MutationTally,
    ) -> Self {
        let mut by_kind = Tally::default();
        for tally in tallies {
            by_kind.merge(tally);
        }
        let done = |kind: Mutation| mutations.done.get(&kind).copied().unwrap_or_default();
        Self {
            image,
            iothreads: tallies.len(),
            operations: by_kind.operations(),
            mutations: mutations.done.values().sum(),
            mutations_by_kind: Mutation::ALL.map(|kind| (kind.name(), done(kind))).into(),
            drains: mutations.drains,
            mismatches: by_kind.mismatches,
            mismatch_examples: by_kind.examples.clone(),
            by_kind,
            seconds: wall.as_secs_f64(),
            seed,
        }
    }

    /// Whether every read was what it had to be.
    pub fn is_clean(&self) -> bool {
        self.mismatches == 0
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

/// For people; several lines, the last one the verdict.
impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wall = Duration::try_from_secs_f64(self.seconds).unwrap_or_default();
        let kinds = &self.by_kind;
        writeln!(
            formatter,
            "{}: {} operations by {} iothreads in {} (seed {})",
            self.image,
            self.operations,
            self.iothreads,
            units::seconds(wall),
            self.seed
        )?;
        writeln!(
            formatter,
            "  {} reads, {} writes, {} write-zeroes, {} discards, {} flushes",
            kinds.reads, kinds.writes, kinds.write_zeroes, kinds.discards, kinds.flushes
        )?;
        write!(formatter, "  {} mutations", self.mutations)?;
        for (index, (name, count)) in self.mutations_by_kind.iter().enumerate() {
            let separator = if index == 0 { ": " } else { ", " };
            write!(formatter, "{separator}{count} {}", name.replace('_', "-"))?;
        }
        writeln!(formatter, "; {} drained sections", self.drains)?;
        for example in &self.mismatch_examples {
            writeln!(formatter, "  {example}")?;
        }
        match self.mismatches {
            0 => writeln!(formatter, "no mismatch"),
            1 => writeln!(formatter, "1 MISMATCH"),
            more => writeln!(formatter, "{more} MISMATCHES"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::verify::Fault;
    use super::*;

    fn report(mismatches: u64) -> Report {
        let mut tally = Tally::default();
        tally.count(&Operation::Flush);
        tally.count(&Operation::Flush);
        let mismatch = Mismatch { sector: 77, fault: Fault::Damaged { first_wrong: 8 } };
        for _ in 0..mismatches {
            tally.count_mismatch(1, &mismatch);
        }
        let mut mutations = MutationTally { drains: 9, ..MutationTally::default() };
        mutations.count(Mutation::Snapshot);
        let wall = Duration::from_millis(1500);
        Report::new("disk.qcow2".to_owned(), 42, wall, &[tally, Tally::default()], &mutations)
    }

    #[test]
    fn scripts_find_the_fields_they_rely_on() {
        let value: serde_json::Value = serde_json::from_str(&report(1).json().unwrap()).unwrap();
        let fields = [
            ("operations", 2),
            ("mutations", 1),
            ("mismatches", 1),
            ("drains", 9),
            ("seed", 42),
            ("flushes", 2),
            ("iothreads", 2),
        ];
        for (name, expected) in fields {
            assert_eq!(value[name], expected, "{name}");
        }
        assert_eq!(value["seconds"], 1.5);
        assert_eq!(value["mutations_by_kind"]["snapshot"], 1);
    }

    #[test]
    fn every_mismatch_counts_but_only_some_are_described() {
        let report = report(1000);
        assert!(!report.is_clean());
        assert_eq!(report.mismatches, 1000);
        let text = report.to_string();
        assert_eq!(text.matches("iothread 1: sector 77: damaged").count(), EXAMPLES_MAX);
        assert!(text.ends_with("1000 MISMATCHES\n"), "{text}");
    }

    #[test]
    fn a_clean_run_says_so() {
        let report = report(0);
        assert!(report.is_clean());
        assert!(report.to_string().ends_with("no mismatch\n"));
    }
}
