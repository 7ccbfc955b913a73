//! External snapshots: a new overlay on top of a node, while I/O goes on.

use crate::layer::{Blockplex, ImagePlace};
use crate::open::Opened;
use blockplex_drivers::file::{File, FileOptions, sys};
use blockplex_drivers::qcow2::{self, CreateOptions, Qcow2, Qcow2Options};
use blockplex_graph::{
    Access, Child, DiscardMode, Error, ErrorKind, NodeId, NodeOptions, Permissions, Result, Role,
};
use blockplex_io::event_loop::Local;
use std::path::{Path, PathBuf};

/// What to take a snapshot into.
#[derive(Clone, Debug)]
pub struct SnapshotOptions {
    /// The file of the overlay. It must not exist.
    pub file: PathBuf,
    /// The overlay's node name.
    pub node_name: Option<String>,
    /// Its cluster size in bytes; 64 KiB when not given.
    pub cluster_size: Option<u64>,
    /// Past the page cache.
    pub direct: bool,
}

impl SnapshotOptions {
    /// An overlay in `file`, a qcow2 image.
    pub fn new(file: impl Into<PathBuf>) -> SnapshotOptions {
        SnapshotOptions { file: file.into(), node_name: None, cluster_size: None, direct: false }
    }
}

impl Blockplex {
    /// Takes a snapshot of a node: makes a qcow2 overlay and puts it in the node's place for all
    /// that use the node. From then on writes go to the overlay, and the node does not change.
    /// Gives the overlay's node. On an error nothing has changed, and the file is gone again.
    pub async fn snapshot(&self, node: NodeId, options: SnapshotOptions) -> Result<NodeId> {
        let layer = self.clone();
        self.on_control(move |local| async move {
            let path = options.file.clone();
            let result = take(&layer, &local, node, options).await;
            if let Err(error) = &result
                && error.kind() != ErrorKind::Exists
            {
                layer.collect_unused().await?;
                remove_file(&local, path).await;
            }
            result
        })
        .await
    }

    /// Creates a qcow2 image in a new file. Fails when the file exists.
    pub async fn create_qcow2(&self, path: impl AsRef<Path>, options: CreateOptions) -> Result<()> {
        let (layer, path) = (self.clone(), path.as_ref().to_owned());
        self.on_control(move |local| async move {
            let result = create(&layer, &local, &path, false, options).await;
            layer.collect_unused().await?;
            if let Err(error) = &result
                && error.kind() != ErrorKind::Exists
            {
                remove_file(&local, path).await;
            }
            result.map(drop)
        })
        .await
    }
}

async fn take(
    layer: &Blockplex,
    local: &Local,
    node: NodeId,
    options: SnapshotOptions,
) -> Result<NodeId> {
    let length = layer.graph().topology().node(node).map(|view| view.length());
    let length = length.ok_or_else(|| {
        Error::new(ErrorKind::NotFound, format!("{node:?} is not part of the graph"))
    })?;
    let place = layer.image_of(node).ok_or_else(|| {
        let text = "the node has no file that an overlay could name";
        Error::new(ErrorKind::NotSupported, text)
    })?;
    let mut image = CreateOptions::new(length);
    if let Some(cluster_size) = options.cluster_size {
        image.cluster_size = cluster_size;
    }
    image.backing_name = Some(place.path.into_os_string().into_encoded_bytes());
    image.backing_format = Some(place.format.into());
    let file = create(layer, local, &options.file, options.direct, image).await?;
    let driver = {
        let topology = layer.graph().topology();
        let view = topology.node(file).ok_or_else(|| Error::new(ErrorKind::NotFound, "no file"))?;
        let child = Child::for_control(local, view, Permissions::CONSISTENT_READ);
        Qcow2::open(&child, Qcow2Options::default(), false).await?
    };
    let mut change = layer.graph().begin().await;
    let generic = NodeOptions { discard: DiscardMode::Unmap, ..NodeOptions::default() };
    let children = [(Role::File, file), (Role::Backing, node)];
    let overlay =
        change.add_node(options.node_name.as_deref(), Box::new(driver), generic, &children)?;
    change.replace_node(node, overlay)?;
    let drained = change.drain().await?;
    change.commit(&drained).await?;
    let place = ImagePlace { path: absolute(&options.file), format: "qcow2" };
    let opened = Opened { root: overlay, nodes: vec![overlay], images: vec![(overlay, place)] };
    layer.remember(&opened, None);
    Ok(overlay)
}

/// Makes a file with a fresh image in it; gives its node, which is implicit.
async fn create(
    layer: &Blockplex,
    local: &Local,
    path: &Path,
    direct: bool,
    options: CreateOptions,
) -> Result<NodeId> {
    let opened = path.to_owned();
    let file = local
        .blocking(move || {
            std::fs::File::create_new(&opened).map_err(|error| {
                let text = format!("Could not create '{}': {error}", opened.display());
                let kind = error.raw_os_error().map_or(ErrorKind::Io, ErrorKind::from_errno);
                Error::new(kind, text).caused_by(error)
            })?;
            File::open(&opened, FileOptions { write: true, direct, ..FileOptions::default() })
        })
        .await?;
    debug_assert_eq!(sys::length(&*file.descriptor()?)?, 0, "the file is new");
    let mut change = layer.graph().begin().await;
    let node = change.add_node(None, Box::new(file), NodeOptions::default(), &[])?;
    let drained = change.drain().await?;
    change.commit(&drained).await?;
    drop(drained);
    let place = ImagePlace { path: absolute(path), format: "file" };
    let opened = Opened { root: node, nodes: vec![node], images: vec![(node, place)] };
    layer.remember(&opened, None);
    let view = layer.graph().topology().node(node).cloned();
    let view = view.ok_or_else(|| Error::new(ErrorKind::NotFound, "the file's node is gone"))?;
    let access = Access::WRITER.needed | Permissions::RESIZE;
    qcow2::create(&Child::for_control(local, &view, access), &options).await?;
    Ok(node)
}

async fn remove_file(local: &Local, path: PathBuf) {
    local
        .blocking(move || {
            if let Err(error) = std::fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), %error, "could not be removed");
            }
        })
        .await;
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}
