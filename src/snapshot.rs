//! External snapshots: a new overlay on top of a node, while I/O goes on.

use crate::layer::{Blockplex, ImagePlace};
use crate::open::Opened;
use blockplex_drivers::file::{File, FileOptions};
use blockplex_drivers::qcow2::{self, CreateOptions, Qcow2, Qcow2Options};
use blockplex_graph::{
    Access, Child, DiscardMode, Error, ErrorKind, NodeId, NodeOptions, NodeView, Permissions,
    Result, Role,
};
use blockplex_io::event_loop::Local;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

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
            let image = overlay_of(&layer, node, options.cluster_size)?;
            let new = NewImage { layer: &layer, local: &local, path: &options.file };
            new.make(options.direct, image, async |file| {
                put_on_top(&layer, &local, node, file, options.node_name.as_deref()).await
            })
            .await
        })
        .await
    }

    /// Creates a qcow2 image in a new file, and its external data file, if it is to have one, in
    /// another one (the name is relative to the image's folder). Fails when a file exists.
    pub async fn create_qcow2(&self, path: impl AsRef<Path>, options: CreateOptions) -> Result<()> {
        let (layer, path) = (self.clone(), path.as_ref().to_owned());
        self.on_control(move |local| async move {
            let new = NewImage { layer: &layer, local: &local, path: &path };
            new.make(false, options, async |file| Ok(file)).await?;
            // Nothing uses the file's node: it was there for the creation only.
            layer.collect_unused().await
        })
        .await
    }
}

/// The image that an overlay of `node` is to be.
fn overlay_of(layer: &Blockplex, node: NodeId, cluster_size: Option<u64>) -> Result<CreateOptions> {
    let length = layer.graph().topology().node(node).map(|view| view.length());
    let length = length.ok_or_else(|| {
        Error::new(ErrorKind::NotFound, format!("{node:?} is not part of the graph"))
    })?;
    let place = layer.image_of(node).ok_or_else(|| {
        let text = "the node has no file that an overlay could name";
        Error::new(ErrorKind::NotSupported, text)
    })?;
    let mut image = CreateOptions::new(length);
    image.cluster_size = cluster_size.unwrap_or(image.cluster_size);
    image.backing_name = Some(place.path.into_os_string().into_encoded_bytes());
    image.backing_format = Some(place.format.into());
    Ok(image)
}

/// Opens the overlay in `file` and puts it in the place of `node`.
async fn put_on_top(
    layer: &Blockplex,
    local: &Local,
    node: NodeId,
    file: NodeId,
    name: Option<&str>,
) -> Result<NodeId> {
    let view = file_view(layer, file)?;
    let child = Child::for_control(local, &view, Permissions::CONSISTENT_READ);
    let driver = Qcow2::open(&child, Qcow2Options::default(), false).await?;
    let mut change = layer.graph().begin().await;
    let generic = NodeOptions { discard: DiscardMode::Unmap, ..NodeOptions::default() };
    let children = [(Role::File, file), (Role::Backing, node)];
    let overlay = change.add_node(name, Box::new(driver), generic, &children)?;
    change.replace_node(node, overlay)?;
    let drained = change.drain().await?;
    change.commit(&drained).await?;
    Ok(overlay)
}

/// A new image in a file that does not exist yet.
struct NewImage<'a> {
    layer: &'a Blockplex,
    local: &'a Local,
    path: &'a Path,
}

impl NewImage<'_> {
    /// Makes the file and a fresh image in it, and lets `finish` use the file's node; gives the
    /// image's node. When something fails, the file is removed, if it was made here.
    ///
    /// The layer learns of the nodes last: until then nothing uses them, and another's clearing up
    /// must not take them away.
    async fn make(
        &self,
        direct: bool,
        options: CreateOptions,
        finish: impl AsyncFnOnce(NodeId) -> Result<NodeId>,
    ) -> Result<NodeId> {
        create_file(self.local, self.path).await?;
        let data = options.data_file.as_ref().map(|name| self.beside(name));
        if let Some(data) = &data
            && let Err(error) = create_file(self.local, data).await
        {
            remove_file(self.local, self.path.to_owned()).await;
            return Err(error);
        }
        let mut nodes = Vec::new();
        let result = async {
            let file = self.add_file(self.path, direct).await?;
            nodes.push(file);
            let child = self.child(file)?;
            match &data {
                None => qcow2::create(&child, &options).await?,
                Some(path) => {
                    let data = self.add_file(path, direct).await?;
                    nodes.push(data);
                    let data = self.child(data)?;
                    qcow2::create_with_data_file(&child, &data, &options).await?;
                }
            }
            finish(file).await
        }
        .await;
        let path = std::path::absolute(self.path).unwrap_or_else(|_| self.path.to_owned());
        let place = |format| ImagePlace { path: path.clone(), format };
        let mut images: Vec<_> = nodes.iter().take(1).map(|file| (*file, place("file"))).collect();
        if let Ok(image) = &result
            && !nodes.contains(image)
        {
            nodes.push(*image);
            images.push((*image, place("qcow2")));
        }
        let root = nodes.last().copied();
        if let Some(root) = root {
            self.layer.remember(&Opened { root, nodes, images }, None);
        }
        if result.is_err() {
            if let Err(error) = self.layer.collect_unused().await {
                tracing::warn!(%error, "the node of a new file did not close");
            }
            remove_file(self.local, self.path.to_owned()).await;
            if let Some(data) = data {
                remove_file(self.local, data).await;
            }
        }
        result
    }

    /// The file that the image calls `name`.
    fn beside(&self, name: &[u8]) -> PathBuf {
        let folder = self.path.parent().unwrap_or(Path::new(""));
        folder.join(OsStr::from_bytes(name))
    }

    fn child(&self, file: NodeId) -> Result<Child> {
        let view = file_view(self.layer, file)?;
        let access = Access::WRITER.needed | Permissions::RESIZE;
        Ok(Child::for_control(self.local, &view, access))
    }

    async fn add_file(&self, path: &Path, direct: bool) -> Result<NodeId> {
        let path = path.to_owned();
        let how = FileOptions { write: true, direct, ..FileOptions::default() };
        let file = self.local.blocking(move || File::open(&path, how)).await?;
        let mut change = self.layer.graph().begin().await;
        let node = change.add_node(None, Box::new(file), NodeOptions::default(), &[])?;
        let drained = change.drain().await?;
        change.commit(&drained).await?;
        Ok(node)
    }
}

async fn create_file(local: &Local, path: &Path) -> Result<()> {
    let path = path.to_owned();
    let create = move || {
        std::fs::File::create_new(&path).map(drop).map_err(|error| {
            let text = format!("Could not create '{}': {error}", path.display());
            let kind = error.raw_os_error().map_or(ErrorKind::Io, ErrorKind::from_errno);
            Error::new(kind, text).caused_by(error)
        })
    };
    local.blocking(create).await
}

fn file_view(layer: &Blockplex, file: NodeId) -> Result<Arc<NodeView>> {
    let view = layer.graph().topology().node(file).cloned();
    view.ok_or_else(|| Error::new(ErrorKind::NotFound, "the file's node is gone"))
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
