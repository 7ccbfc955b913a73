//! How far the file reaches: it grows in steps, ahead of the clusters that are handed out, since a
//! write that also makes a file longer costs several times one that does not. What is left over
//! is cut off when the image is closed; after a crash it is a hole at the end.
//!
//! - **E1** Nothing is written past the extent. New clusters are covered before they are handed
//!   out; an entry that names a cluster past it (a damaged image) is not written in place.
//! - **E2** The extent grows one step at a time, and the file is only given lengths above it. So
//!   growing never cuts off anything that was written. It shrinks by [`FileExtent::cut`] alone,
//!   to the end of what is in use, while nothing is handed out.
//!   When a change of the length was torn down with its loop, it may still come: then the file does
//!   not grow any more, for that could cut off what was written since.
//! - **E3** A file whose length is fixed has no extent: its own end is the limit.

use crate::qcow2::geometry::Geometry;
use crate::qcow2::locks::{self, Ranked};
use blockplex_graph::{Child, Error, ErrorKind, Result};
use blockplex_io::lock::CoMutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// The smallest and the largest step, in bytes; in between it is a quarter of the file.
const MIN_STEP: u64 = 16 << 20;
const MAX_STEP: u64 = 256 << 20;

/// See the page.
pub(super) struct FileExtent {
    /// In bytes, whole clusters; `u64::MAX` for a file of fixed length (E3).
    end: AtomicU64,
    /// The turn to change the length.
    growing: Ranked<CoMutex<Length>, { locks::FILE_END }>,
    cluster_size: u64,
}

/// What is known of the length of the file.
#[derive(Default)]
struct Length {
    /// It was made longer here.
    grown: bool,
    /// It is being changed; found by whoever comes next, that was torn down.
    changing: bool,
}

impl Length {
    /// Gives the file another length.
    async fn change(&mut self, file: &Child, length: u64) -> Result<()> {
        if self.changing {
            let text = "a change of the file's length was torn down: the image must be opened anew";
            return Err(Error::new(ErrorKind::Io, text));
        }
        self.changing = true;
        let changed = file.truncate(length).await;
        self.changing = false;
        changed
    }
}

impl FileExtent {
    pub(super) fn new(geometry: &Geometry, file_length: u64) -> FileExtent {
        let end = geometry.align_up(file_length).unwrap_or(u64::MAX);
        FileExtent {
            end: AtomicU64::new(end),
            growing: Ranked::new(CoMutex::new(Length::default())),
            cluster_size: geometry.cluster_size(),
        }
    }

    pub(super) fn covers(&self, offset: u64, length: u64) -> bool {
        // Acquire, here and below: partner of the Release in `grow`; the file has grown before.
        offset.saturating_add(length) <= self.end.load(Ordering::Acquire)
    }

    /// Makes the file reach to `needed` at least, in bytes.
    pub(super) async fn cover(&self, file: &Child, needed: impl Fn() -> u64) -> Result<()> {
        if self.covers(needed(), 0) {
            return Ok(());
        }
        let mut known = self.growing.lock().await;
        let needed = needed();
        let end = self.end.load(Ordering::Acquire);
        if needed <= end {
            return Ok(());
        }
        let step = (needed / 4).clamp(MIN_STEP, MAX_STEP);
        let mut target = (needed + step).next_multiple_of(self.cluster_size);
        debug_assert!(target > end, "E2: {target} is not above {end}");
        let mut result = known.change(file, target).await;
        if matches!(&result, Err(error) if error.kind() == ErrorKind::NoSpace) {
            // No room for a whole step; perhaps there is for what is needed.
            target = needed.next_multiple_of(self.cluster_size);
            result = known.change(file, target).await;
        }
        match result {
            Ok(()) => known.grown = true,
            Err(error) if error.kind() == ErrorKind::NotSupported => target = u64::MAX,
            Err(error) => return Err(error),
        }
        // Release: partner of the Acquires.
        self.end.store(target, Ordering::Release);
        Ok(())
    }

    /// Cuts the file to `used` bytes, whole clusters, behind which nothing is in use or will be
    /// before this has ended.
    pub(super) async fn cut(&self, file: &Child, used: u64) -> Result<()> {
        let mut known = self.growing.lock().await;
        let end = self.end.load(Ordering::Acquire);
        if used >= end || end == u64::MAX {
            return Ok(());
        }
        // Release, both: as in `trim`. Whoever comes now would have to grow it again.
        self.end.store(used, Ordering::Release);
        match known.change(file, used).await {
            Ok(()) => known.grown = false,
            Err(error) => {
                self.end.store(end, Ordering::Release);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Cuts the file to `used` bytes, if it was made longer here. Nothing else may use it now.
    pub(super) async fn trim(&self, file: &Child, used: impl Fn() -> u64) -> Result<()> {
        let mut known = self.growing.lock().await;
        let (used, end) = (used(), self.end.load(Ordering::Acquire));
        if known.grown && used < end && end != u64::MAX {
            // From here on writes would have to grow it again.
            self.end.store(used, Ordering::Release);
            known.change(file, used).await?;
            known.grown = false;
        }
        Ok(())
    }
}
