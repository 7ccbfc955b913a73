//! Opening qcow2 images, and the chain of backing files that they name.

use super::driver::Description;
use super::{Inherited, OpenNode, Opener};
use crate::layer::ImagePlace;
use crate::options::invalid;
use blockplex_drivers::file::{File, FileOptions};
use blockplex_drivers::open_gate::{self, escape_bytes};
use blockplex_drivers::options::{OptionTree, Reference};
use blockplex_drivers::qcow2::{BackingReference, Qcow2, Qcow2Options};
use blockplex_drivers::raw::Raw;
use blockplex_graph::{
    Child, Error, ErrorKind, NodeId, NodeOptions, Permissions, Result, Role,
};
use std::path::Path;

impl Opener<'_> {
    pub(super) async fn open_qcow2(
        &mut self,
        name: Option<String>,
        description: Description,
    ) -> Result<OpenNode> {
        let Description { mut tree, options, inherited, .. } = description;
        let settings = qcow2_options(&mut tree)?;
        let backing = tree.take_reference("backing").map_err(invalid)?;
        let file = self.open_child(&mut tree, "file", inherited).await?;
        tree.finish().map_err(invalid)?;
        if let Some(identity) = file.identity {
            self.chain.descend(identity).map_err(|error| refused(&file, error.to_string()))?;
        }
        let below = Inherited { read_only: true, ..inherited };
        let backing = match backing {
            Some(Reference::Tree(tree)) => Some(self.open_tree(tree, below).await?.id),
            Some(Reference::Name(name)) => Some(self.existing(&name)?.id),
            Some(Reference::Nothing) => None,
            None => self.open_stated_backing(&file, &settings, below).await?,
        };
        let read_only = options.read_only;
        let id = self
            .add_over(name, file.id, options, backing, async |child| {
                Qcow2::open(&child, settings, read_only).await
            })
            .await?;
        if let Some(path) = &file.path {
            self.images.push((id, ImagePlace { path: path.clone(), format: "qcow2" }));
        }
        Ok(OpenNode { id, ..file })
    }

    /// Opens what the image itself names as its backing file, through the caller's gate.
    async fn open_stated_backing(
        &mut self,
        file: &OpenNode,
        settings: &Qcow2Options,
        inherited: Inherited,
    ) -> Result<Option<NodeId>> {
        let stated = {
            let topology = self.layer.graph().topology();
            let view = topology.node(file.id).ok_or_else(|| {
                Error::new(ErrorKind::NotFound, "the file's node is gone")
            })?;
            let granted = Permissions::CONSISTENT_READ;
            let child = Child::for_control(self.local, view, granted);
            Qcow2::stated_backing(&child).await?
        };
        let Some(BackingReference { name, format }) = stated else { return Ok(None) };
        let shown = escape_bytes(&name);
        let Some(format) = format else {
            let text = format!("the image names the backing file '{shown}' without its format");
            return Err(refused(file, text));
        };
        if !matches!(format.as_str(), "raw" | "qcow2") {
            let text = format!(
                "the image names the backing file '{shown}' in format '{}', which is not supported",
                format.escape_default()
            );
            return Err(refused(file, text));
        }
        let directory = file.path.as_deref().and_then(Path::parent).map(Path::to_owned);
        let gate = self.gate.clone();
        let opened = self
            .local
            .blocking(move || {
                let access = open_gate::Access::ReadOnly;
                gate.open_named(directory.as_deref(), &name, access)
            })
            .await;
        let (fd, path) = opened.map_err(|error| refused(file, error.to_string()))?;
        let how = FileOptions { write: false, direct: inherited.direct, ..FileOptions::default() };
        let backing = File::from_fd(fd, &path, how)?;
        let options = NodeOptions { read_only: true, ..NodeOptions::default() };
        let options = NodeOptions { no_flush: inherited.no_flush, ..options };
        let bottom = self.add_file(None, backing, options, path).await?;
        Ok(Some(self.open_backing_format(&format, bottom, settings, options, inherited).await?))
    }

    async fn open_backing_format(
        &mut self,
        format: &str,
        file: OpenNode,
        settings: &Qcow2Options,
        options: NodeOptions,
        inherited: Inherited,
    ) -> Result<NodeId> {
        if let Some(identity) = file.identity {
            self.chain.descend(identity).map_err(|error| refused(&file, error.to_string()))?;
        }
        let place = |format| file.path.clone().map(|path| ImagePlace { path, format });
        let id = if format == "raw" {
            let id = self.add(None, Box::new(Raw::default()), options, &[(Role::File, file.id)]).await?;
            self.images.extend(place("raw").map(|place| (id, place)));
            id
        } else {
            // Boxed: the chain below may be long.
            let below = Box::pin(self.open_stated_backing(&file, settings, inherited)).await?;
            let settings = settings.clone();
            let id = self
                .add_over(None, file.id, options, below, async |child| {
                    Qcow2::open(&child, settings, true).await
                })
                .await?;
            self.images.extend(place("qcow2").map(|place| (id, place)));
            id
        };
        Ok(id)
    }
}

fn qcow2_options(tree: &mut OptionTree) -> Result<Qcow2Options> {
    let mut options = Qcow2Options::default();
    if let Some(size) = tree.take_size("cache-size").map_err(invalid)? {
        options.cache_size = size;
    }
    if let Some(size) = tree.take_size("l2-cache-entry-size").map_err(invalid)? {
        options.l2_cache_entry_size = Some(size);
    }
    Ok(options)
}

/// An image that may not open what it names.
fn refused(file: &OpenNode, text: String) -> Error {
    let place = file.path.as_deref().map_or("an image".into(), |path| path.display().to_string());
    Error::new(ErrorKind::PermissionDenied, format!("{place}: {text}"))
}
