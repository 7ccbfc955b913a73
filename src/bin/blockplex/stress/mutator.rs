//! Changes the graph under the iothreads: carries out the plan of `mutation`
//! on a thread that owns no loop, and so waits for each change with
//! [`block_on`].
//!
//! The [`Mutator`] knows the part of the graph that it changes:
//!
//! ```text
//! backend ─► filters (the last one first) ─► format node ─► file
//!                                            └─► … older format nodes
//! ```
//!
//! A filter goes in or out anywhere among the filters; a snapshot puts an
//! overlay between them and the format node, and is the format node from then
//! on. All of it undone at the end: [`Mutator::run`] takes the filters out, and
//! the overlays go with the directory they are in.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use blockplex::drivers::file::FileReopen;
use blockplex::graph::{DetectZeroes, DiscardMode, NodeOptions, Role};
use blockplex::{
    Backend, Blockplex, Drained, Error, ErrorKind, NodeId, NodeReopen, OpenOptions, Result, Scope,
    SnapshotOptions, block_on,
};

use super::control::Control;
use super::mutation::{Limits, Mutation, MutationPlan};
use super::report::MutationTally;
use crate::random::Random;

/// A stream number of the seed that nobody else has.
const STREAM: u64 = (1 << 32) + 1;

/// Filters at the same time.
const FILTERS_MAX: u32 = 4;

/// Overlays in all: a read may have to ask each of them.
const SNAPSHOTS_MAX: u32 = 8;

/// Cluster sizes of overlays: smaller than the default, the default, larger.
const CLUSTER_SIZES: [u64; 3] = [4 << 10, 64 << 10, 256 << 10];

/// The longest that a drained section is held, in microseconds.
const HOLD_MICROSECONDS_MAX: u64 = 10_000;

/// How long a drained section may take to settle.
const DRAIN_DEADLINE: Duration = Duration::from_secs(20);

/// How often a pause looks whether the run is over.
const NAP: Duration = Duration::from_millis(20);

/// Changes the graph of one backend, which nobody else changes.
pub struct Mutator {
    layer: Blockplex,
    disk: Backend,
    random: Random,
    tally: MutationTally,
    /// Where overlays go.
    directory: PathBuf,
    snapshots: u32,
    /// The topmost node that is no filter of ours.
    format: NodeId,
    /// Our filters, from the lowest to the topmost.
    filters: Vec<NodeId>,
    /// Files that bypass the page cache by our doing.
    direct: BTreeSet<NodeId>,
    /// Whether files can bypass the page cache, as far as known.
    can_be_direct: bool,
}

impl Mutator {
    /// A mutator of `disk`. Overlays go to `directory`.
    ///
    /// # Errors
    /// The backend has no root.
    pub fn new(layer: &Blockplex, disk: &Backend, directory: PathBuf, seed: u64) -> Result<Self> {
        let format = disk
            .root()
            .ok_or_else(|| Error::new(ErrorKind::NoMedium, "the backend has no root node"))?;
        Ok(Self {
            layer: layer.clone(),
            disk: disk.clone(),
            random: Random::new(seed, STREAM),
            tally: MutationTally::default(),
            directory,
            snapshots: 0,
            format,
            filters: Vec::new(),
            direct: BTreeSet::new(),
            can_be_direct: true,
        })
    }

    /// How far the plan may go: an overlay has to name a file as its base.
    pub fn limits(&self) -> Limits {
        let snapshots = if self.bottom_file().is_some() { SNAPSHOTS_MAX } else { 0 };
        Limits { filters: FILTERS_MAX, snapshots }
    }

    /// Carries out a plan until the run stops or a change fails, which fails the
    /// run. Takes its filters out at the end.
    pub fn run(mut self, mut plan: MutationPlan, control: &Control) -> MutationTally {
        loop {
            let (pause, mutation) = plan.mutation();
            sleep(pause, control);
            if control.is_stopping() {
                break;
            }
            control.count_step();
            let result = self.apply(mutation);
            control.count_step();
            match result {
                Ok(true) => self.tally.count(mutation),
                Ok(false) => {}
                Err(error) => {
                    control.fail(|| format!("{}: {}", mutation.name(), crate::message(&error)));
                    break;
                }
            }
        }
        while let Some(filter) = self.filters.pop() {
            control.count_step();
            if let Err(error) = wait(self.layer.drop_filter(filter)) {
                control.fail(|| format!("taking a filter out: {}", crate::message(&error)));
            }
            control.count_step();
        }
        self.tally
    }

    /// Whether there was something to change.
    fn apply(&mut self, mutation: Mutation) -> Result<bool> {
        match mutation {
            Mutation::InsertFilter => self.insert_filter()?,
            Mutation::RemoveFilter => self.remove_filter()?,
            Mutation::Snapshot => self.snapshot()?,
            Mutation::Reopen => return self.reopen(),
            Mutation::Drain => self.drain()?,
        }
        Ok(true)
    }

    fn insert_filter(&mut self) -> Result<()> {
        let place = self.random.below(self.filters.len() as u64 + 1) as usize;
        let below = place.checked_sub(1).map_or(self.format, |index| self.filters[index]);
        let options = OpenOptions::parse("driver=raw")
            .map_err(|error| Error::new(ErrorKind::InvalidArgument, error.to_string()))?;
        let filter = wait(self.layer.insert_filter(below, options))?;
        self.filters.insert(place, filter);
        self.tally.drains += 1;
        Ok(())
    }

    fn remove_filter(&mut self) -> Result<()> {
        let place = self.random.below(self.filters.len() as u64) as usize;
        let filter = self.filters.remove(place);
        self.tally.drains += 1;
        wait(self.layer.drop_filter(filter))
    }

    fn snapshot(&mut self) -> Result<()> {
        self.snapshots += 1;
        let path = self.directory.join(format!("overlay-{}.qcow2", self.snapshots));
        let cluster_size = *self.one_of(&CLUSTER_SIZES);
        let options =
            SnapshotOptions { cluster_size: Some(cluster_size), ..SnapshotOptions::new(path) };
        self.format = wait(self.layer.snapshot(self.format, options))?;
        self.tally.drains += 1;
        Ok(())
    }

    /// Turns the page cache of the file at the bottom on or off, or changes what
    /// a node makes of zeroes and discards.
    fn reopen(&mut self) -> Result<bool> {
        let coin = self.random.percent(50);
        if let Some(file) = self.bottom_file().filter(|_| coin && self.can_be_direct) {
            return self.reopen_file(file);
        }
        let place = self.random.below(self.filters.len() as u64 + 1) as usize;
        let node = place.checked_sub(1).map_or(self.format, |index| self.filters[index]);
        let Some(before) = self.options_of(node) else { return Ok(false) };
        let zeroes = [DetectZeroes::Off, DetectZeroes::On, DetectZeroes::Unmap];
        let detect_zeroes = *self.one_of(&zeroes);
        let discard = match detect_zeroes {
            // It asks for the other.
            DetectZeroes::Unmap => DiscardMode::Unmap,
            _ => *self.one_of(&[DiscardMode::Ignore, DiscardMode::Unmap]),
        };
        let options = NodeOptions { detect_zeroes, discard, ..before };
        self.tally.drains += 1;
        wait(self.layer.reopen(vec![NodeReopen { node, options: Some(options), driver: None }]))?;
        Ok(true)
    }

    fn reopen_file(&mut self, file: NodeId) -> Result<bool> {
        let direct = !self.direct.contains(&file);
        let driver = Some(Box::new(FileReopen { direct }) as Box<_>);
        match wait(self.layer.reopen(vec![NodeReopen { node: file, options: None, driver }])) {
            Ok(()) if direct => self.direct.insert(file),
            Ok(()) => self.direct.remove(&file),
            // Not every file system can.
            Err(error) if direct && self.direct.is_empty() => {
                tracing::info!(%error, "this file cannot bypass the page cache");
                self.can_be_direct = false;
                return Ok(false);
            }
            Err(error) => return Err(error),
        };
        self.tally.drains += 1;
        Ok(true)
    }

    /// Holds one drained section for a while, or two that overlap.
    fn drain(&mut self) -> Result<()> {
        let first = self.hold_section()?;
        if self.random.percent(60) {
            drop(first);
            return Ok(());
        }
        let second = self.hold_section()?;
        // Either of them may end first.
        let (sooner, later) =
            if self.random.percent(50) { (first, second) } else { (second, first) };
        drop(sooner);
        self.hold();
        drop(later);
        Ok(())
    }

    fn hold_section(&mut self) -> Result<Drained> {
        let nodes = [self.format].iter().chain(&self.filters).copied().collect();
        let root = self.filters.last().copied().unwrap_or(self.format);
        let scope = match self.random.below(4) {
            0 => self.disk.scope(),
            1 => Scope::Subtree(root),
            2 => Scope::Nodes(nodes),
            _ => Scope::Everything,
        };
        let section = wait(self.layer.drain_within(scope, DRAIN_DEADLINE))?;
        self.tally.drains += 1;
        self.hold();
        Ok(section)
    }

    fn hold(&mut self) {
        let time = self.random.below(HOLD_MICROSECONDS_MAX);
        std::thread::sleep(Duration::from_micros(time));
    }

    /// The file below the format node; none if it is not on one.
    fn bottom_file(&self) -> Option<NodeId> {
        let topology = self.layer.graph().topology();
        let mut view = topology.node(self.format)?;
        loop {
            let below = [Role::File, Role::Filtered];
            let edge = below.into_iter().find_map(|role| view.edge_in_role(role));
            match edge.and_then(|edge| view.child(edge)) {
                Some(child) => view = child,
                None => break,
            }
        }
        matches!(view.driver().driver_name(), "file" | "host_device").then(|| view.id())
    }

    fn options_of(&self, node: NodeId) -> Option<NodeOptions> {
        self.layer.graph().topology().node(node).map(|view| *view.options())
    }

    fn one_of<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.random.below(choices.len() as u64) as usize]
    }
}

/// Waits for a change of the graph on a thread that owns no loop.
fn wait<T>(change: impl Future<Output = Result<T>>) -> Result<T> {
    block_on(change).map_err(|error| Error::new(ErrorKind::OnLoopThread, error.to_string()))?
}

/// Sleeps for `time`, or until the run stops.
fn sleep(time: Duration, control: &Control) {
    let start = Instant::now();
    while !control.is_stopping() {
        let left = time.saturating_sub(start.elapsed());
        if left.is_zero() {
            return;
        }
        std::thread::sleep(left.min(NAP));
    }
}
