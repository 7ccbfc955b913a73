//! New images over files: one that is there is emptied, one that is not is made.

use crate::layer::Blockplex;
use blockplex_drivers::file::{File, FileOptions, sys};
use blockplex_graph::driver::Driver;
use blockplex_graph::{Access, Child, Error, ErrorKind, NodeOptions, Permissions, Result};
use blockplex_io::event_loop::Local;
use std::path::{Path, PathBuf};

impl Blockplex {
    /// Has `fill` make an image in the file at `path`. A file that is there is emptied first, once
    /// its locks are held; a block device keeps its length. When something fails, a file that was
    /// made here is removed.
    ///
    /// # Errors
    ///
    /// The file cannot be made or locked; what `fill` says.
    pub async fn create_over(
        &self,
        path: impl AsRef<Path>,
        fill: impl AsyncFnOnce(&Child) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let (layer, path) = (self.clone(), path.as_ref().to_owned());
        self.on_control(async move |local| {
            write_over(&layer, &local, path, async |file| fill(file).await).await
        })
        .await
    }

    /// As [`Blockplex::create_over`], with a second file, at `data`, for the image's data.
    ///
    /// # Errors
    ///
    /// A file cannot be made or locked; what `fill` says.
    pub async fn create_over_two(
        &self,
        path: impl AsRef<Path>,
        data: impl AsRef<Path>,
        fill: impl AsyncFnOnce(&Child, &Child) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let layer = self.clone();
        let (path, data) = (path.as_ref().to_owned(), data.as_ref().to_owned());
        self.on_control(async move |local| {
            write_over(&layer, &local, data, async |data| {
                write_over(&layer, &local, path, async |file| fill(file, data).await).await
            })
            .await
        })
        .await
    }
}

/// Makes a file, or empties one, and fills it.
async fn write_over(
    layer: &Blockplex,
    local: &Local,
    path: PathBuf,
    fill: impl AsyncFnOnce(&Child) -> Result<()>,
) -> Result<()> {
    let (file, is_new) = open_or_make(local, path.clone()).await?;
    let result = fill_held(layer, local, file, fill).await;
    if result.is_err() && is_new {
        let removed = local.blocking(move || std::fs::remove_file(path)).await;
        if let Err(error) = removed {
            tracing::warn!(%error, "a file that was to be an image could not be removed");
        }
    }
    result
}

/// The file, and whether it is new.
async fn open_or_make(local: &Local, path: PathBuf) -> Result<(File, bool)> {
    let make = move || {
        let is_new = !path.exists();
        let how = sys::OpenOptions { write: true, direct: false, create: true };
        let options = FileOptions { write: true, ..FileOptions::default() };
        let fd = sys::open(&path, how).map_err(|error| {
            let kind = error.raw_os_error().map_or(ErrorKind::Io, ErrorKind::from_errno);
            let text = format!("Could not create '{}': {error}", path.display());
            Error::new(kind, text).caused_by(error)
        })?;
        Ok((File::from_fd(fd, &path, options)?, is_new))
    };
    local.blocking(make).await
}

/// Empties `file` and fills it, while an origin of its own holds it for writing.
async fn fill_held(
    layer: &Blockplex,
    local: &Local,
    file: File,
    fill: impl AsyncFnOnce(&Child) -> Result<()>,
) -> Result<()> {
    let graph = layer.graph();
    let is_device = file.driver_name() == "host_device";
    let needed = Access::WRITER.needed | Permissions::RESIZE;
    let access = Access { needed, shared: Permissions::ALL }.through_format_file(true);
    let mut change = graph.begin().await;
    let node = change.add_node(None, Box::new(file), NodeOptions::default(), &[])?;
    let origin = change.add_origin("creating", access, None);
    change.set_root(origin.id(), Some(node))?;
    let drained = change.drain().await?;
    change.commit(&drained).await?;
    drop(drained);
    let filled = async {
        let topology = graph.topology();
        let view = topology
            .node(node)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, "the file's node is gone"))?;
        let child = Child::for_control(local, view, needed);
        if !is_device {
            child.truncate(0).await?;
        }
        fill(&child).await
    }
    .await;
    let mut change = graph.begin().await;
    change.remove_origin(origin.id())?;
    change.remove_node(node)?;
    let drained = change.drain().await?;
    let closed = change.commit(&drained).await;
    filled.and(closed)
}
