//! Copies that the file system makes (`-C`): from a raw image to a raw image, without the data
//! going through this program. What a file system shares instead of copying, it shares.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockplex::Local;
use blockplex::drivers::file::File;
use blockplex::drivers::raw::Raw;
use blockplex::graph::{NodeView, Role};
use rustix::fs::copy_file_range;

/// The files of two raw images.
pub struct Offload {
    from: Arc<OwnedFd>,
    to: Arc<OwnedFd>,
    /// The file system has refused; the copy goes the ordinary way from then on.
    refused: AtomicBool,
}

impl Offload {
    /// For two nodes; none where either is more than a file.
    pub fn between(from: &NodeView, to: &NodeView) -> Option<Offload> {
        let (from, to) = (file_of(from)?, file_of(to)?);
        Some(Offload { from, to, refused: AtomicBool::new(false) })
    }

    /// Copies a range to the same place of the other file; `false`: that has to be done otherwise.
    pub async fn copy(&self, local: &Local, offset: u64, length: u64) -> bool {
        if self.refused.load(Ordering::Relaxed) {
            return false;
        }
        let (from, to) = (self.from.clone(), self.to.clone());
        let copied = local.blocking(move || copy_all(&from, &to, offset, length)).await;
        if !copied {
            self.refused.store(true, Ordering::Relaxed);
        }
        copied
    }
}

fn copy_all(from: &OwnedFd, to: &OwnedFd, offset: u64, length: u64) -> bool {
    let mut done = 0;
    while done < length {
        let (mut at, mut into) = (offset + done, offset + done);
        let part = usize::try_from(length - done).unwrap_or(usize::MAX);
        match copy_file_range(from, Some(&mut at), to, Some(&mut into), part) {
            Ok(copied) if copied > 0 => done += copied as u64,
            _ => return false,
        }
    }
    true
}

/// The file that a node is nothing but.
fn file_of(node: &NodeView) -> Option<Arc<OwnedFd>> {
    if let Some(file) = node.driver_as::<File>() {
        return file.descriptor().ok();
    }
    let raw = node.driver_as::<Raw>()?;
    let child = node.child(node.edge_in_role(Role::File)?)?;
    let whole = !raw.has_window() && !raw.is_guarded();
    whole.then(|| file_of(child)).flatten()
}
