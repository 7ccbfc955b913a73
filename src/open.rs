//! Opening: from a description to nodes of the graph.
//!
//! Children come first. A format driver reads its image through a node that exists and that a
//! private origin holds with the permissions that the image will need, so that no other process
//! changes the file between the first look at it and the node's life. When a step fails, what was
//! opened before it is closed again.
//!
//! An image's own words (its backing name) are data. They lead to another file only through the
//! caller's gate, read-only, in the format that the image states. Nothing is ever guessed, unless
//! the caller asked for it ([`OpenOptions::probe_formats`]): then the first bytes of a file decide
//! where nothing else does, and a file that they make raw is guarded.

mod driver;
mod qcow2;

use self::driver::{Children, Description};
use crate::layer::{Blockplex, ImagePlace};
use crate::options::{OpenOptions, invalid};
use blockplex_drivers::crypto::Secrets;
use blockplex_drivers::open_gate::{ChainGuard, FileIdentity, OpenGate};
use blockplex_drivers::options::{OptionTree, Reference};
use blockplex_drivers::probe::{self, PROBE_BYTES};
use blockplex_graph::driver::Driver;
use blockplex_graph::{
    Access, Child, DetectZeroes, DiscardMode, Error, ErrorKind, NodeId, NodeOptions, OriginId,
    Result,
};
use blockplex_io::buffer::IoVector;
use blockplex_io::event_loop::Local;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;

/// What was opened.
pub(crate) struct Opened {
    pub(crate) root: NodeId,
    /// All new nodes, children before parents.
    pub(crate) nodes: Vec<NodeId>,
    pub(crate) images: Vec<(NodeId, ImagePlace)>,
}

/// One tree being opened.
pub(crate) struct Opener<'a> {
    layer: &'a Blockplex,
    local: &'a Local,
    gate: OpenGate,
    secrets: Secrets,
    probing: bool,
    image_alone: bool,
    metadata_only: bool,
    whole_sectors: bool,
    chain: ChainGuard,
    nodes: Vec<NodeId>,
    images: Vec<(NodeId, ImagePlace)>,
}

/// What a child takes from its parent where it says nothing itself.
#[derive(Clone, Copy)]
pub(crate) struct Inherited {
    read_only: bool,
    direct: bool,
    no_flush: bool,
    force_share: bool,
    discard: DiscardMode,
}

/// A node that has been opened, as its parent's opening needs it.
#[derive(Clone)]
pub(crate) struct OpenNode {
    id: NodeId,
    /// The file at the bottom, where there is one.
    path: Option<PathBuf>,
    /// Its name as it was given, relative names in images being relative to the image's name.
    given: Option<PathBuf>,
    identity: Option<FileIdentity>,
}

type Opening<'f, T> = Pin<Box<dyn Future<Output = Result<T>> + 'f>>;

impl<'a> Opener<'a> {
    /// Opens a tree. Runs on the control loop.
    pub(crate) async fn open(
        layer: &'a Blockplex,
        local: &'a Local,
        options: OpenOptions,
    ) -> Result<Opened> {
        let probing = options.probes_formats();
        let image_alone = options.is_image_alone();
        let metadata_only = options.is_metadata_only();
        let whole_sectors = options.has_whole_sectors();
        let (tree, gate, secrets) = options.into_parts();
        let mut opener = Opener {
            layer,
            local,
            gate,
            secrets,
            probing,
            image_alone,
            metadata_only,
            whole_sectors,
            chain: ChainGuard::new(),
            nodes: Vec::new(),
            images: Vec::new(),
        };
        let inherited = Inherited {
            read_only: false,
            direct: false,
            no_flush: false,
            force_share: false,
            discard: DiscardMode::Ignore,
        };
        match opener.open_tree(tree, inherited).await {
            Ok(root) => Ok(Opened { root: root.id, nodes: opener.nodes, images: opener.images }),
            Err(error) => {
                opener.undo().await;
                Err(error)
            }
        }
    }

    /// Closes what has been opened, parents before children.
    async fn undo(mut self) {
        while let Some(node) = self.nodes.pop() {
            let closing = async {
                let mut change = self.layer.graph().begin().await;
                change.remove_node(node)?;
                let drained = change.drain().await?;
                change.commit(&drained).await
            };
            if let Err(error) = closing.await {
                tracing::error!(?node, %error, "a half-opened node did not close");
            }
        }
    }

    fn open_tree<'f>(
        &'f mut self,
        mut tree: OptionTree,
        inherited: Inherited,
    ) -> Opening<'f, OpenNode> {
        Box::pin(async move {
            let name = tree.take_str("node-name").map_err(invalid)?;
            let (options, inherited) = take_generic(&mut tree, inherited)?;
            // As in QEMU, what has a file name and no driver is a file.
            let driver = match tree.take_str("driver").map_err(invalid)? {
                Some(driver) => driver,
                None if tree.contains("filename") => "file".to_owned(),
                None if self.probing && tree.contains("file") => {
                    let file = self.open_child(&mut tree, "file", inherited).await?;
                    let driver = self.probe(&file).await?.to_owned();
                    let file = Some(file);
                    let description = Description { driver, tree, options, inherited, file };
                    return self.open_node(name, description).await;
                }
                None => return Err(invalid(tree.missing("driver"))),
            };
            let description = Description { driver, tree, options, inherited, file: None };
            self.open_node(name, description).await
        })
    }

    /// Opens the child that stands at `key`.
    async fn open_child(
        &mut self,
        tree: &mut OptionTree,
        key: &'static str,
        inherited: Inherited,
    ) -> Result<OpenNode> {
        match tree.take_reference(key).map_err(invalid)? {
            Some(Reference::Tree(child)) => self.open_tree(child, inherited).await,
            Some(Reference::Name(name)) => self.existing(&name),
            Some(Reference::Nothing) | None => Err(invalid(tree.missing(key))),
        }
    }

    /// The format that the first bytes of a file speak for.
    async fn probe(&self, file: &OpenNode) -> Result<&'static str> {
        // Whoever uses the file meanwhile is met when the image is opened.
        let (holder, child) = hold_as(self.layer, self.local, file.id, Access::READER).await?;
        let memory = IoVector::zeroed(PROBE_BYTES);
        let result = child.read(0, memory.clone()).await;
        self.let_go(holder).await;
        result?;
        Ok(probe::suggest_format(&memory.to_vec()).name())
    }

    fn existing(&self, name: &str) -> Result<OpenNode> {
        let id = self.layer.find_node(name)?;
        let path = self.layer.image_of(id).map(|place| place.path);
        Ok(OpenNode { id, given: path.clone(), path, identity: None })
    }

    /// Adds a node whose driver needs no look at its children.
    async fn add(
        &mut self,
        name: Option<String>,
        driver: Box<dyn Driver>,
        options: NodeOptions,
        children: &Children,
    ) -> Result<NodeId> {
        let mut change = self.layer.graph().begin().await;
        let id = change.add_node(name.as_deref(), driver, options, children)?;
        let drained = change.drain().await?;
        change.commit(&drained).await?;
        self.nodes.push(id);
        Ok(id)
    }

    /// Has a private origin hold `file` as a format driver above it will, so that it can be read, and
    /// repaired if it is going to be written.
    async fn hold(&self, file: NodeId, read_only: bool) -> Result<(OriginId, Child)> {
        hold(self.layer, self.local, file, read_only).await
    }

    /// Adds the driver that has read its file, and lets go of the file in the same step.
    async fn add_held(
        &mut self,
        holder: OriginId,
        name: Option<&str>,
        driver: Box<dyn Driver>,
        options: NodeOptions,
        children: &Children,
    ) -> Result<NodeId> {
        let mut change = self.layer.graph().begin().await;
        change.remove_origin(holder)?;
        let id = change.add_node(name, driver, options, children)?;
        let drained = change.drain().await?;
        change.commit(&drained).await?;
        self.nodes.push(id);
        Ok(id)
    }

    /// Lets go of a file after all.
    async fn let_go(&self, holder: OriginId) {
        let_go(self.layer, holder).await;
    }
}

/// Has a private origin hold `file` as a format driver would.
pub(crate) async fn hold(
    layer: &Blockplex,
    local: &Local,
    file: NodeId,
    read_only: bool,
) -> Result<(OriginId, Child)> {
    hold_as(layer, local, file, Access::READER.through_format_file(!read_only)).await
}

async fn hold_as(
    layer: &Blockplex,
    local: &Local,
    file: NodeId,
    access: Access,
) -> Result<(OriginId, Child)> {
    let graph = layer.graph();
    let mut change = graph.begin().await;
    let holder = change.add_origin("opening", access, None);
    change.set_root(holder.id(), Some(file))?;
    let drained = change.drain().await?;
    change.commit(&drained).await?;
    let topology = graph.topology();
    let view = topology
        .node(file)
        .ok_or_else(|| Error::new(ErrorKind::NotFound, "the file's node is gone"))?;
    let child = Child::for_control(local, view, access.needed);
    Ok((holder.id(), child))
}

/// Takes a private origin away again.
pub(crate) async fn let_go(layer: &Blockplex, holder: OriginId) {
    let removal = async {
        let mut change = layer.graph().begin().await;
        change.remove_origin(holder)?;
        let drained = change.drain().await?;
        change.commit(&drained).await
    };
    if let Err(error) = removal.await {
        tracing::error!(%error, "a private origin did not go");
    }
}

/// A filter to be put above `below`: its name, driver and generic options.
pub(crate) fn filter(
    layer: &Blockplex,
    below: NodeId,
    options: OpenOptions,
) -> Result<(Option<String>, Box<dyn Driver>, NodeOptions)> {
    let (mut tree, _, _) = options.into_parts();
    let name = tree.take_str("node-name").map_err(invalid)?;
    let topology = layer.graph().topology();
    let view = topology.node(below).ok_or_else(|| {
        Error::new(ErrorKind::NotFound, format!("{below:?} is not part of the graph"))
    })?;
    let inherited = Inherited {
        read_only: view.is_read_only(),
        direct: false,
        no_flush: false,
        force_share: false,
        // A filter passes on what reaches it, unless it is told otherwise.
        discard: DiscardMode::Unmap,
    };
    let (generic, _) = take_generic(&mut tree, inherited)?;
    let driver = driver::filter(&mut tree, view)?;
    tree.finish().map_err(invalid)?;
    Ok((name, driver, generic))
}

/// The options that every node has.
fn take_generic(tree: &mut OptionTree, inherited: Inherited) -> Result<(NodeOptions, Inherited)> {
    let discard = [
        ("ignore", DiscardMode::Ignore),
        ("off", DiscardMode::Ignore),
        ("unmap", DiscardMode::Unmap),
        ("on", DiscardMode::Unmap),
    ];
    let zeroes =
        [("off", DetectZeroes::Off), ("on", DetectZeroes::On), ("unmap", DetectZeroes::Unmap)];
    let mut cache = tree.take_subtree("cache").map_err(invalid)?.unwrap_or_default();
    let direct = cache.take_bool("direct").map_err(invalid)?.unwrap_or(inherited.direct);
    let no_flush = cache.take_bool("no-flush").map_err(invalid)?.unwrap_or(inherited.no_flush);
    cache.finish().map_err(invalid)?;
    let read_only = tree.take_bool("read-only").map_err(invalid)?.unwrap_or(inherited.read_only);
    let force_share = tree.take_bool("force-share").map_err(invalid)?;
    let force_share = force_share.unwrap_or(inherited.force_share);
    if force_share && !read_only {
        let text = "force-share=on can only be used with read-only images";
        return Err(Error::new(ErrorKind::InvalidArgument, text));
    }
    let options = NodeOptions {
        read_only,
        discard: tree.take_enum("discard", &discard).map_err(invalid)?.unwrap_or(inherited.discard),
        detect_zeroes: tree
            .take_enum("detect-zeroes", &zeroes)
            .map_err(invalid)?
            .unwrap_or_default(),
        no_flush,
    };
    if options.detect_zeroes == DetectZeroes::Unmap && options.discard != DiscardMode::Unmap {
        let text = "detect-zeroes=unmap needs discard=unmap";
        return Err(Error::new(ErrorKind::InvalidArgument, text));
    }
    let inherited = Inherited {
        read_only: options.read_only,
        direct,
        no_flush,
        force_share,
        // Format drivers decide themselves what they give back to their file (as in QEMU).
        discard: DiscardMode::Unmap,
    };
    Ok((options, inherited))
}
