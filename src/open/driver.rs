//! What each driver takes from a description.

use super::{Inherited, OpenNode, Opener};
use crate::layer::ImagePlace;
use crate::options::invalid;
use blockplex_drivers::blkdebug::{Blkdebug, BlkdebugOptions};
use blockplex_drivers::crypto::luks::options::{take_max_iterations, take_secret};
use blockplex_drivers::file::{File, FileOptions, Locking, sys};
use blockplex_drivers::luks::{Luks, LuksOptions};
use blockplex_drivers::memory::Memory;
use blockplex_drivers::null::{self, Null};
use blockplex_drivers::open_gate::{FileIdentity, escape_bytes};
use blockplex_drivers::options::{OptionTree, Value};
use blockplex_drivers::raw::Raw;
use blockplex_graph::driver::Driver;
use blockplex_graph::{Error, ErrorKind, NodeId, NodeOptions, NodeView, Result, Role};
use std::path::PathBuf;
use std::time::Duration;

/// The children of a node, in its driver's order.
pub(super) type Children = [(Role, NodeId)];

/// A node to be opened: the options that are left are the driver's.
pub(super) struct Description {
    pub(super) driver: String,
    pub(super) tree: OptionTree,
    pub(super) options: NodeOptions,
    pub(super) inherited: Inherited,
    /// The `file` child, where it has been opened already to be probed.
    pub(super) file: Option<OpenNode>,
}

impl Opener<'_> {
    pub(super) async fn open_node(
        &mut self,
        name: Option<String>,
        description: Description,
    ) -> Result<OpenNode> {
        match description.driver.as_str() {
            "file" | "host_device" => self.open_file(name, description).await,
            "null-co" => {
                let Description { mut tree, options, .. } = description;
                let driver = null_of(&mut tree)?;
                tree.finish().map_err(invalid)?;
                self.add_leaf(name, Box::new(driver), options).await
            }
            "memory" => {
                let Description { mut tree, options, .. } = description;
                let size = tree.take_size("size").map_err(invalid)?;
                let size = size.ok_or_else(|| invalid(tree.missing("size")))?;
                tree.finish().map_err(invalid)?;
                self.add_leaf(name, Box::new(Memory::new(size)?), options).await
            }
            "luks" => self.open_luks(name, description).await,
            "raw" => self.open_raw(name, description).await,
            "blkdebug" => self.open_blkdebug(name, description).await,
            "qcow2" => self.open_qcow2(name, description).await,
            other => {
                let text = format!(
                    "driver '{}' is not supported (blkdebug, file, host_device, memory, null-co, \
                     qcow2 and raw are)",
                    other.escape_default()
                );
                Err(Error::new(ErrorKind::NotSupported, text))
            }
        }
    }

    async fn add_leaf(
        &mut self,
        name: Option<String>,
        driver: Box<dyn Driver>,
        options: NodeOptions,
    ) -> Result<OpenNode> {
        let id = self.add(name, driver, options, &[]).await?;
        Ok(OpenNode { id, path: None, given: None, identity: None })
    }

    async fn open_file(
        &mut self,
        name: Option<String>,
        description: Description,
    ) -> Result<OpenNode> {
        let Description { driver, mut tree, options, inherited, .. } = description;
        let filename = tree.require_str("filename").map_err(invalid)?;
        let words = [("auto", Locking::Auto), ("on", Locking::On), ("off", Locking::Off)];
        let locking = tree.take_enum("locking", &words).map_err(invalid)?.unwrap_or_default();
        tree.finish().map_err(invalid)?;
        let Inherited { direct, force_share, .. } = inherited;
        let how = FileOptions { write: !options.read_only, direct, locking, force_share };
        let path = PathBuf::from(filename);
        let opened = path.clone();
        let file = self.local.blocking(move || File::open(&opened, how)).await;
        let misplaced = || {
            let needs = match driver.as_str() {
                "host_device" => "either a character or block device",
                _ => "a regular file",
            };
            let path = escape_bytes(path.as_os_str().as_encoded_bytes());
            let text = format!("'{driver}' driver requires '{path}' to be {needs}");
            Error::new(ErrorKind::InvalidArgument, text)
        };
        let file = match file {
            // A directory can only be opened for reading: then that is not the error.
            Err(error) if how.write && path.is_dir() => return Err(error),
            Err(_) if sys::kind_at(&path).is_err() && path.exists() => return Err(misplaced()),
            other => other?,
        };
        let is_device = sys::kind(&*file.descriptor()?)? == sys::FileKind::BlockDevice;
        if is_device != (driver == "host_device") {
            return Err(misplaced());
        }
        self.add_file(name, file, options, path).await
    }

    pub(super) async fn add_file(
        &mut self,
        name: Option<String>,
        file: File,
        options: NodeOptions,
        path: PathBuf,
    ) -> Result<OpenNode> {
        let identity = FileIdentity::of(&*file.descriptor()?)?;
        let format = if sys::kind(&*file.descriptor()?)? == sys::FileKind::BlockDevice {
            "host_device"
        } else {
            "file"
        };
        let given = Some(file.path().to_owned());
        let id = self.add(name, Box::new(file), options, &[]).await?;
        let path = std::path::absolute(&path).unwrap_or(path);
        self.images.push((id, ImagePlace { path: path.clone(), format }));
        Ok(OpenNode { id, path: Some(path), given, identity: Some(identity) })
    }

    /// Where only metadata counts, a key that there is not is no obstacle.
    pub(super) fn drop_unneeded_key(&self, tree: &mut OptionTree) {
        let is_known = match tree.get("key-secret") {
            Some(Value::String(id)) => self.secrets.get(id).is_some(),
            _ => true,
        };
        if self.metadata_only && !is_known {
            // Known to be text.
            let _ = tree.take_str("key-secret");
        }
    }

    async fn open_luks(
        &mut self,
        name: Option<String>,
        description: Description,
    ) -> Result<OpenNode> {
        let Description { mut tree, options, inherited, file, .. } = description;
        self.drop_unneeded_key(&mut tree);
        let settings = LuksOptions {
            key: take_secret(&mut tree, "key-secret", &self.secrets)?,
            max_iterations: take_max_iterations(&mut tree)?,
            metadata_only: self.metadata_only,
        };
        let file = match file {
            Some(file) => file,
            None => self.open_child(&mut tree, "file", inherited).await?,
        };
        tree.finish().map_err(invalid)?;
        let (holder, child) = self.hold(file.id, options.read_only).await?;
        let added = match Luks::open(&child, settings, options.read_only).await {
            Ok(driver) => {
                let children = [(Role::File, file.id)];
                self.add_held(holder, name.as_deref(), Box::new(driver), options, &children).await
            }
            Err(error) => Err(error),
        };
        match added {
            Ok(id) => {
                let place = file.path.clone().map(|path| ImagePlace { path, format: "luks" });
                self.images.extend(place.map(|place| (id, place)));
                Ok(OpenNode { id, ..file })
            }
            Err(error) => {
                self.let_go(holder).await;
                Err(error)
            }
        }
    }

    async fn open_raw(
        &mut self,
        name: Option<String>,
        description: Description,
    ) -> Result<OpenNode> {
        let Description { mut tree, options, inherited, file, .. } = description;
        let window = take_window(&mut tree)?;
        let probed = file.is_some();
        let file = match file {
            Some(file) => file,
            None => self.open_child(&mut tree, "file", inherited).await?,
        };
        tree.finish().map_err(invalid)?;
        let length = self.layer.graph().topology().node(file.id).map_or(0, |view| view.length());
        let guarded = probed && !options.read_only && window == (0, None);
        let driver = if guarded { Raw::guarded() } else { Raw::new(window.0, window.1, length)? };
        let driver = if self.whole_sectors { driver.with_whole_sectors() } else { driver };
        let id = self.add(name, Box::new(driver), options, &[(Role::File, file.id)]).await?;
        // An overlay could only name the whole file, not a window of it.
        if let Some(path) = file.path.as_ref().filter(|_| window == (0, None)) {
            self.images.push((id, ImagePlace { path: path.clone(), format: "raw" }));
        }
        Ok(OpenNode { id, ..file })
    }
}

impl Opener<'_> {
    async fn open_blkdebug(
        &mut self,
        name: Option<String>,
        description: Description,
    ) -> Result<OpenNode> {
        let Description { mut tree, options, inherited, .. } = description;
        let (mut tree, config) = self
            .local
            .blocking(move || {
                let config = BlkdebugOptions::take_config(&mut tree);
                (tree, config)
            })
            .await;
        let settings = BlkdebugOptions::take(&mut tree, config?)?;
        let key = if tree.contains("file") { "file" } else { "image" };
        // As in QEMU, a file name stands for the child, too.
        let image = match tree.take_str("x-image").map_err(invalid)? {
            Some(filename) => {
                let mut image = OptionTree::new();
                image.set("driver", Value::String("file".into()));
                image.set("filename", Value::String(filename));
                self.open_tree(image, inherited).await?
            }
            None => self.open_child(&mut tree, key, inherited).await?,
        };
        tree.finish().map_err(invalid)?;
        let topology = self.layer.graph().topology();
        let alignment = topology.node(image.id).map_or(1, |view| view.limits().request_alignment);
        let driver = Blkdebug::new(settings, alignment)?;
        let children = [(Role::Filtered, image.id)];
        let id = self.add(name, Box::new(driver), options, &children).await?;
        Ok(OpenNode { id, ..image })
    }
}

/// A filter's driver, for [`Blockplex::insert_filter`](crate::Blockplex::insert_filter).
pub(super) fn filter(tree: &mut OptionTree, below: &NodeView) -> Result<Box<dyn Driver>> {
    match tree.require_str("driver").map_err(invalid)?.as_str() {
        "raw" => {
            let (offset, size) = take_window(tree)?;
            Ok(Box::new(Raw::new(offset, size, below.length())?))
        }
        // Without a configuration file: this runs on the control loop.
        "blkdebug" => {
            let settings = BlkdebugOptions::take(tree, None)?;
            Ok(Box::new(Blkdebug::new(settings, below.limits().request_alignment)?))
        }
        other => {
            let text =
                format!("driver '{}' is no filter (blkdebug and raw are)", other.escape_default());
            Err(Error::new(ErrorKind::NotSupported, text))
        }
    }
}

fn take_window(tree: &mut OptionTree) -> Result<(u64, Option<u64>)> {
    let offset = tree.take_size("offset").map_err(invalid)?.unwrap_or(0);
    Ok((offset, tree.take_size("size").map_err(invalid)?))
}

fn null_of(tree: &mut OptionTree) -> Result<Null> {
    let size = tree.take_size("size").map_err(invalid)?.unwrap_or(null::DEFAULT_SIZE);
    let latency = tree.take_u64("latency-ns").map_err(invalid)?.unwrap_or(0);
    let zeroes = tree.take_bool("read-zeroes").map_err(invalid)?.unwrap_or(false);
    Null::new(size, Duration::from_nanos(latency), zeroes)
}
