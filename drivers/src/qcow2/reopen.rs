//! New options of an open image: prepared while it works, changed inside the drained section.

use super::Qcow2;
use super::cache_cleaning::{PreparedCleaning, clean_interval};
use super::cache_sizes::{CacheSizes, cache_sizes, slice_bits};
use super::discard::DiscardRules;
use super::encryption;
use super::layers::{Layers, NOWHERE};
use super::lazy_refcounts::{LazyRefcounts, wants_lazy};
use super::open::Qcow2Options;
use super::overlap::{OverlapChecks, Structure};
use super::refcounts::Refcounts;
use super::slice_cache::SliceCache;
use blockplex_graph::driver::PreparedReopen;
use blockplex_graph::{Error, ErrorKind, NodeIo, Result};
use std::any::Any;
use std::sync::Arc;

/// New options, prepared.
struct NewOptions {
    slices: Arc<SliceCache>,
    refcounts: Arc<Refcounts>,
    sizes: CacheSizes,
    cleaning: PreparedCleaning,
    discards: Arc<DiscardRules>,
    rules: DiscardRules,
    checks: OverlapChecks,
    lazy: Arc<LazyRefcounts>,
    was_lazy: bool,
    is_lazy: bool,
    committed: bool,
}

impl Qcow2 {
    pub(super) async fn prepare_reopen(
        &self,
        io: &NodeIo,
        options: Box<dyn Any>,
    ) -> Result<Box<dyn PreparedReopen>> {
        let Ok(options) = options.downcast::<Qcow2Options>() else {
            let text = "not options of a qcow2 node";
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        };
        let sizes = self.new_cache_sizes(&options)?;
        let checks = options.overlap_check.unwrap_or_default();
        let inactive = Structure::InactiveL2;
        if checks.contains(inactive) && !self.refcounts.checks().contains(inactive) {
            // It takes reading, with the snapshots at rest.
            let text = "overlap-check.inactive-l2 cannot be switched on while the image is open";
            return Err(Error::new(ErrorKind::NotSupported, text));
        }
        DiscardRules::check(&options, self.version)?;
        let is_lazy = wants_lazy(&options, &*self.header.lock().await)?;
        let interval = clean_interval(&options)?;
        let was_lazy = self.lazy.is_wanted();
        let prepared = Box::new(NewOptions {
            slices: self.slices.clone(),
            refcounts: self.refcounts.clone(),
            sizes,
            cleaning: self.cleaning.prepare(io.local(), interval),
            discards: self.discards.clone(),
            rules: DiscardRules::new(&options),
            checks,
            lazy: self.lazy.clone(),
            was_lazy,
            is_lazy,
            committed: false,
        });
        if was_lazy && !is_lazy {
            // From here on refcounts are written in time; the next write-back catches up, and
            // marks the image clean.
            self.lazy.set_wanted(false);
            if !self.read_only && !self.is_broken() {
                self.flush(&Layers::of(io)?).await?;
            }
        }
        Ok(prepared)
    }

    /// The caches that `options` ask for; the slices of an open image keep their size.
    fn new_cache_sizes(&self, options: &Qcow2Options) -> Result<CacheSizes> {
        if options.without_data_file && self.data_edge != NOWHERE {
            let text = "data-file cannot be changed while the image is open";
            return Err(Error::new(ErrorKind::NotSupported, text));
        }
        if options.snapshot != self.shown {
            let text = "the snapshot that a node shows cannot be changed while the image is open";
            return Err(Error::new(ErrorKind::NotSupported, text));
        }
        encryption::check_unchanged(self.encryption.as_ref(), &options.encryption)?;
        if slice_bits(options, &self.geometry)? != self.slice_bits {
            let text = "l2-cache-entry-size cannot be changed while the image is open";
            return Err(Error::new(ErrorKind::NotSupported, text));
        }
        cache_sizes(options, &self.geometry, self.disk_size(), self.slice_bits)
    }
}

impl PreparedReopen for NewOptions {
    fn commit(mut self: Box<Self>) {
        self.committed = true;
        self.slices.set_capacity(self.sizes.slices);
        self.refcounts.set_cache_bytes(self.sizes.refcounts);
        self.refcounts.set_checks(self.checks);
        self.cleaning.begin();
        self.discards.set(&self.rules);
        self.lazy.set_wanted(self.is_lazy);
    }
}

impl Drop for NewOptions {
    fn drop(&mut self) {
        if !self.committed {
            self.lazy.set_wanted(self.was_lazy);
        }
    }
}
