//! What happens to the graph meanwhile: a sequence of changes drawn from the
//! seed, with pauses between them.
//!
//! The plan keeps count of the filters and snapshots it has called for, so that
//! it never removes what is not there and never grows a chain beyond its
//! limits.

use std::time::Duration;

use crate::random::Random;

/// A stream number of the seed that no iothread has.
const STREAM: u64 = 1 << 32;

/// A change of the graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mutation {
    /// Put a filter above the image, on top of the others or among them.
    InsertFilter,
    /// Take a filter away; there is one.
    RemoveFilter,
    /// Continue in a new overlay over the present top image.
    Snapshot,
    /// Reopen the image with other options.
    Reopen,
    /// Drain, and go on.
    Drain,
}

impl Mutation {
    /// Each kind once.
    pub const ALL: [Self; 5] =
        [Self::InsertFilter, Self::RemoveFilter, Self::Snapshot, Self::Reopen, Self::Drain];

    /// Its name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::InsertFilter => "insert_filter",
            Self::RemoveFilter => "remove_filter",
            Self::Snapshot => "snapshot",
            Self::Reopen => "reopen",
            Self::Drain => "drain",
        }
    }

    /// How often it is drawn, compared to the others.
    fn weight(self) -> u64 {
        match self {
            Self::InsertFilter | Self::RemoveFilter => 6,
            Self::Snapshot => 1,
            Self::Reopen => 2,
            Self::Drain => 5,
        }
    }
}

/// How far the graph may grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Filters above the disk at the same time.
    pub filters: u32,
    /// Snapshots in all; 0 where the format has none.
    pub snapshots: u32,
}

/// The changes of one run.
#[derive(Clone, Debug)]
pub struct MutationPlan {
    random: Random,
    /// Seconds between two changes, on average.
    mean_pause: f64,
    limits: Limits,
    filters: u32,
    snapshots: u32,
}

impl MutationPlan {
    /// A plan of `per_second` changes on average; `None` if that is 0.
    pub fn new(seed: u64, per_second: f64, limits: Limits) -> Option<Self> {
        (per_second > 0.0).then(|| Self {
            random: Random::new(seed, STREAM),
            // A rate next to 0 would pause for longer than a `Duration` can.
            mean_pause: (1.0 / per_second).min(1e9),
            limits,
            filters: 0,
            snapshots: 0,
        })
    }

    /// How long to wait, and what to do then.
    pub fn mutation(&mut self) -> (Duration, Mutation) {
        // Pauses of independent events: many short ones, a few long ones; ten
        // means are not exceeded.
        let pause = -(1.0 - self.random.fraction()).ln() * self.mean_pause;
        let pause = Duration::from_secs_f64(pause.min(10.0 * self.mean_pause));
        let mutation = self.draw();
        match mutation {
            Mutation::InsertFilter => self.filters += 1,
            Mutation::RemoveFilter => self.filters -= 1,
            Mutation::Snapshot => self.snapshots += 1,
            Mutation::Reopen | Mutation::Drain => {}
        }
        (pause, mutation)
    }

    fn draw(&mut self) -> Mutation {
        let weight = |each: Mutation| if self.allows(each) { each.weight() } else { 0 };
        let weights = Mutation::ALL.map(weight);
        let mut draw = self.random.below(weights.iter().sum());
        for (mutation, weight) in Mutation::ALL.into_iter().zip(weights) {
            if draw < weight {
                return mutation;
            }
            draw -= weight;
        }
        // Not reached: the draw is below the sum of the weights.
        Mutation::Drain
    }

    fn allows(&self, mutation: Mutation) -> bool {
        match mutation {
            Mutation::InsertFilter => self.filters < self.limits.filters,
            Mutation::RemoveFilter => self.filters > 0,
            Mutation::Snapshot => self.snapshots < self.limits.snapshots,
            Mutation::Reopen | Mutation::Drain => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { filters: 3, snapshots: 5 };

    fn plan(seed: u64) -> MutationPlan {
        MutationPlan::new(seed, 50.0, LIMITS).unwrap()
    }

    #[test]
    fn a_seed_repeats() {
        let draw = |seed| {
            let mut plan = plan(seed);
            (0..100).map(|_| plan.mutation()).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn the_graph_keeps_its_limits() {
        let mut plan = plan(3);
        let (mut filters, mut snapshots) = (0_u32, 0);
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..10_000 {
            let (_, mutation) = plan.mutation();
            seen.insert(mutation);
            match mutation {
                Mutation::InsertFilter => filters += 1,
                Mutation::RemoveFilter => filters = filters.checked_sub(1).expect("a filter"),
                Mutation::Snapshot => snapshots += 1,
                Mutation::Reopen | Mutation::Drain => {}
            }
            assert!(filters <= LIMITS.filters && snapshots <= LIMITS.snapshots);
        }
        assert_eq!(snapshots, LIMITS.snapshots);
        assert_eq!(seen.len(), Mutation::ALL.len());
    }

    #[test]
    fn pauses_are_as_long_as_the_rate_says_on_average() {
        let mut plan = plan(4);
        let total: Duration = (0..10_000).map(|_| plan.mutation().0).sum();
        assert!((190.0..210.0).contains(&total.as_secs_f64()), "{total:?}");
    }

    #[test]
    fn no_rate_is_no_plan_and_a_tiny_one_does_not_overflow() {
        assert!(MutationPlan::new(1, 0.0, LIMITS).is_none());
        let mut plan = MutationPlan::new(1, f64::MIN_POSITIVE, LIMITS).unwrap();
        assert!((0..100).all(|_| plan.mutation().0 <= Duration::from_secs(10_000_000_000)));
    }
}
