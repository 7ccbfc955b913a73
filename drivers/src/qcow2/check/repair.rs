//! Refcounts put right in their blocks, one block after the other.

use super::compare::Counted;
use super::counters::Counters;
use super::image::Image;
use crate::qcow2::refcount_block;
use blockplex_graph::{Error, ErrorKind, Result};

/// Raises the refcounts that are lower than the references, durably.
pub(super) async fn raise(
    image: &Image<'_>,
    counted: &Counted,
    references: &Counters,
) -> Result<()> {
    correct(image, counted, references, |refcount, reference| refcount < reference).await
}

/// Lowers the refcounts that are higher than the references, durably.
pub(super) async fn lower(
    image: &Image<'_>,
    counted: &Counted,
    references: &Counters,
) -> Result<()> {
    correct(image, counted, references, |refcount, reference| refcount > reference).await
}

async fn correct(
    image: &Image<'_>,
    counted: &Counted,
    references: &Counters,
    is_wrong: impl Fn(u64, u64) -> bool,
) -> Result<()> {
    let order = image.geometry.refcount_order();
    let per_block = image.geometry.refcounts_per_block();
    for (&index, &offset) in &counted.blocks {
        let mut block = image.read(offset, image.geometry.cluster_size()).await?;
        let mut changed = false;
        for at in 0..per_block {
            let refcount = refcount_block::get(&block, order, at as usize).unwrap_or(0);
            let reference = references.get(index * per_block + at);
            if is_wrong(refcount, reference) {
                refcount_block::set(&mut block, order, at as usize, reference)
                    .map_err(|error| Error::new(ErrorKind::Corrupt, error.to_string()))?;
                changed = true;
            }
        }
        if changed {
            image.write(offset, &block).await?;
        }
    }
    image.file.flush().await
}
