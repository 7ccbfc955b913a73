//! Where metadata is: by cluster, with its kinds; and without a lock, for those kinds that are
//! watched.

use super::cluster_set::ClusterHasher;
use crate::dirty_bitmap::tree::{MAX_CHUNKS, Tree};
use crate::qcow2::overlap::{OverlapChecks, Structure};
use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use std::ops::Range;
use std::sync::Arc;

/// The clusters that hold metadata. The first kind that claims a cluster has it; others may be laid
/// over it.
pub(super) struct Metadata {
    clusters: HashMap<u64, u16, BuildHasherDefault<ClusterHasher>>,
    checks: OverlapChecks,
    watched: Arc<Tree>,
}

impl Metadata {
    pub(super) fn new() -> Metadata {
        let watched = Arc::new(Tree::default());
        Metadata { clusters: HashMap::default(), checks: OverlapChecks::default(), watched }
    }

    /// The watched clusters by number, those below 2^32: for readers without a lock.
    pub(super) fn watched(&self) -> Arc<Tree> {
        self.watched.clone()
    }

    pub(super) fn checks(&self) -> OverlapChecks {
        self.checks
    }

    pub(super) fn set_checks(&mut self, checks: OverlapChecks) {
        self.checks = checks;
        self.watched.clear(0, MAX_CHUNKS - 1);
        for (cluster, kinds) in &self.clusters {
            self.watch(*cluster, *kinds);
        }
    }

    pub(super) fn contains(&self, cluster: u64) -> bool {
        self.clusters.contains_key(&cluster)
    }

    /// Remembers a cluster, unless it is known already; whether it was not.
    pub(super) fn insert(&mut self, cluster: u64, structure: Structure) -> bool {
        let mut is_new = false;
        self.clusters.entry(cluster).or_insert_with(|| {
            is_new = true;
            structure.bit()
        });
        if is_new {
            self.watch(cluster, structure.bit());
        }
        is_new
    }

    pub(super) fn extend(&mut self, clusters: Range<u64>, structure: Structure) {
        for cluster in clusters {
            self.insert(cluster, structure);
        }
    }

    /// A cluster is of this kind, too.
    pub(super) fn overlay(&mut self, cluster: u64, structure: Structure) {
        let kinds = self.clusters.entry(cluster).or_insert(0);
        *kinds |= structure.bit();
        let kinds = *kinds;
        self.watch(cluster, kinds);
    }

    /// No cluster is of this kind any more.
    pub(super) fn forget(&mut self, structure: Structure) {
        self.clusters.retain(|_, kinds| {
            *kinds &= !structure.bit();
            *kinds != 0
        });
        self.set_checks(self.checks);
    }

    /// Forgets all clusters but these.
    pub(super) fn keep(&mut self, is_kept: impl Fn(u64) -> bool) {
        self.clusters.retain(|cluster, _| is_kept(*cluster));
        self.set_checks(self.checks);
    }

    /// Whether no cluster from `end` on is known.
    pub(super) fn ends_before(&self, end: u64) -> bool {
        self.clusters.keys().all(|cluster| *cluster < end)
    }

    pub(super) fn remove(&mut self, cluster: u64) {
        if self.clusters.remove(&cluster).is_some() && cluster < MAX_CHUNKS {
            self.watched.clear(cluster, cluster);
        }
    }

    /// A watched kind other than those of `own` that has one of these clusters.
    pub(super) fn find(&self, clusters: Range<u64>, own: u16) -> Option<Structure> {
        let wanted = self.checks.bits() & !own;
        let hit = clusters
            .filter_map(|cluster| self.clusters.get(&cluster))
            .find_map(|kinds| Some(kinds & wanted).filter(|hit| *hit != 0))?;
        let named = Structure::NAMED.iter().map(|(_, structure)| *structure);
        named.chain([Structure::Other]).find(|structure| hit & structure.bit() != 0)
    }

    fn watch(&self, cluster: u64, kinds: u16) {
        if kinds & self.checks.bits() != 0 && cluster < MAX_CHUNKS {
            self.watched.set(cluster, cluster);
        }
    }
}
