//! Opening qcow2 images, with the external data files and the chain of backing files that they name.

use super::driver::Description;
use super::{Inherited, OpenNode, Opener, take_generic};
use crate::file_name::FileName;
use crate::layer::ImagePlace;
use crate::options::invalid;
use blockplex_drivers::file::{File, FileOptions};
use blockplex_drivers::open_gate::{self, GateError, escape_bytes};
use blockplex_drivers::options::{OptionTree, Reference, Value};
use blockplex_drivers::qcow2::{
    BackingReference, EncryptionOptions, OverlapChecks, Qcow2, Qcow2Options, SnapshotSelector,
    Structure,
};
use blockplex_graph::{DiscardMode, Error, ErrorKind, NodeId, NodeOptions, OriginId, Result, Role};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// An image that has been read and not yet added: what is below it comes first.
struct Level {
    name: Option<String>,
    file: OpenNode,
    holder: OriginId,
    driver: Qcow2,
    options: NodeOptions,
    data: Option<NodeId>,
}

/// What the caller says of an image's external data file.
enum DataFile {
    /// Nothing: what the image names is opened, if the gate grants it.
    Stated,
    /// It is this one.
    Given(OpenNode),
    /// The image is opened without it.
    Nothing,
}

/// Where the reading of a chain goes on.
enum Step {
    /// At the image that was just added to the levels.
    Down,
    /// Nowhere: this is below the last of them.
    End(Option<NodeId>),
}

/// What stands below an image that names it.
enum Stated {
    /// A file, and the format in which it is to be read.
    File(OpenNode, String),
    /// A node that is whole.
    Node(OpenNode),
}

/// What a chain of images shares.
#[derive(Clone)]
struct ChainOptions {
    settings: Qcow2Options,
    inherited: Inherited,
}

impl Opener<'_> {
    pub(super) async fn open_qcow2(
        &mut self,
        name: Option<String>,
        description: Description,
    ) -> Result<OpenNode> {
        let Description { mut tree, options, inherited, file, .. } = description;
        let mut settings = take_settings(&mut tree)?;
        settings.encryption = self.take_encryption(&mut tree)?;
        let backing = tree.take_reference("backing").map_err(invalid)?;
        let data = match self.image_alone && options.read_only {
            true => {
                tree.take_reference("data-file").map_err(invalid)?;
                DataFile::Nothing
            }
            false => self.explicit_data(&mut tree, inherited).await?,
        };
        let file = match file {
            Some(file) => file,
            None => self.open_child(&mut tree, "file", inherited).await?,
        };
        tree.finish().map_err(invalid)?;
        settings.without_data_file = matches!(data, DataFile::Nothing);
        let mut chain = ChainOptions { settings, inherited };
        let mut levels = vec![self.read_level(name, file.clone(), options, &chain, data).await?];
        // What follows is for the images below.
        chain.settings.without_data_file = false;
        chain.settings.snapshot = None;
        chain.settings.encryption =
            EncryptionOptions { metadata_only: self.metadata_only, ..EncryptionOptions::default() };
        chain.inherited.read_only = true;
        let below = match backing {
            Some(Reference::Tree(tree)) => {
                let stated = levels.first().and_then(|level| level.driver.backing());
                let opened = match stated.filter(|_| is_about_stated(&tree)) {
                    Some(stated) => self.open_stated_with(&file, stated, tree, &chain).await,
                    None => self.open_tree(tree, chain.inherited).await,
                };
                opened.map(|node| Some(node.id)).map_err(in_backing)
            }
            Some(Reference::Name(name)) => self.existing(&name).map(|node| Some(node.id)),
            Some(Reference::Nothing) => Ok(None),
            None if self.image_alone => Ok(None),
            None => self.descend(&mut levels, &chain).await,
        };
        let id = self.add_levels(levels, below).await?;
        // Its disk is not its file: another image may lie in it.
        Ok(OpenNode { id, identity: None, ..file })
    }

    fn take_encryption(&self, tree: &mut OptionTree) -> Result<EncryptionOptions> {
        let mut group = tree.take_subtree("encrypt").map_err(invalid)?.unwrap_or_default();
        self.drop_unneeded_key(&mut group);
        let options = EncryptionOptions::take(&mut group, &self.secrets)?;
        group.finish().map_err(invalid)?;
        Ok(EncryptionOptions { metadata_only: self.metadata_only, ..options })
    }

    /// Reads an image; its file is held from then on.
    async fn read_level(
        &mut self,
        name: Option<String>,
        file: OpenNode,
        options: NodeOptions,
        chain: &ChainOptions,
        data: DataFile,
    ) -> Result<Level> {
        if let Some(identity) = file.identity {
            self.chain.descend(identity).map_err(|error| refused(&file, error.to_string()))?;
        }
        let (holder, child) = self.hold(file.id, options.read_only).await?;
        match Qcow2::open(&child, chain.settings.clone(), options.read_only).await {
            Ok(driver) => {
                match self.data_of(&driver, &file, data, (options.read_only, chain)).await {
                    Ok(data) => Ok(Level { name, file, holder, driver, options, data }),
                    Err(error) => {
                        self.let_go(holder).await;
                        Err(error)
                    }
                }
            }
            Err(error) => {
                self.let_go(holder).await;
                let kind = error.kind();
                Err(Error::new(kind, format!("{}: {error}", place_of(&file))).caused_by(error))
            }
        }
    }

    /// The data file that the options give.
    async fn explicit_data(
        &mut self,
        tree: &mut OptionTree,
        inherited: Inherited,
    ) -> Result<DataFile> {
        Ok(match tree.take_reference("data-file").map_err(invalid)? {
            None => DataFile::Stated,
            Some(Reference::Nothing) => DataFile::Nothing,
            Some(Reference::Name(name)) => DataFile::Given(self.existing(&name)?),
            Some(Reference::Tree(tree)) => DataFile::Given(self.open_tree(tree, inherited).await?),
        })
    }

    /// The data file of an image that has been read: the one that the caller gives, or the one that
    /// the image names, through the caller's gate and as it is, without a format.
    async fn data_of(
        &mut self,
        image: &Qcow2,
        by: &OpenNode,
        given: DataFile,
        (read_only, chain): (bool, &ChainOptions),
    ) -> Result<Option<NodeId>> {
        let information = image.information();
        let data = match (given, information.data_file.clone()) {
            (DataFile::Nothing, _) => return Ok(None),
            (DataFile::Stated, None) if !information.has_data_file => return Ok(None),
            (DataFile::Stated, None) => {
                let text = format!("{}: 'data-file' is required for this image", place_of(by));
                return Err(Error::new(ErrorKind::InvalidArgument, text));
            }
            (DataFile::Given(_), _) if !information.has_data_file => {
                let text = format!(
                    "{}: 'data-file' can only be set for images with an external data file",
                    place_of(by)
                );
                return Err(Error::new(ErrorKind::InvalidArgument, text));
            }
            (DataFile::Given(node), _) => node,
            (DataFile::Stated, Some(name)) => {
                self.open_granted(by, name, "data file", read_only, chain).await?
            }
        };
        if let Some(identity) = data.identity {
            self.chain.claim(identity).map_err(|error| refused(by, error.to_string()))?;
        }
        Ok(Some(data.id))
    }

    /// Opens a file that an image names, through the caller's gate.
    async fn open_granted(
        &mut self,
        by: &OpenNode,
        name: Vec<u8>,
        what: &str,
        read_only: bool,
        chain: &ChainOptions,
    ) -> Result<OpenNode> {
        let mut directory = by.path.as_deref().and_then(Path::parent).map(Path::to_owned);
        let said = Path::new(OsStr::from_bytes(&name));
        let mut given =
            by.given.as_deref().and_then(Path::parent).map_or(said.into(), |base| base.join(said));
        let mut gate = self.gate.clone();
        match what {
            // As with QEMU, whose behaviour this is to be in full.
            "data file" if gate.trusts_images() => {
                (directory, given) = (std::env::current_dir().ok(), said.into());
            }
            "data file" => gate = gate.for_data_files(),
            _ => {}
        }
        let access = match read_only {
            true => open_gate::Access::ReadOnly,
            false => open_gate::Access::ReadWrite,
        };
        let opened =
            self.local.blocking(move || gate.open_named(directory.as_deref(), &name, access)).await;
        let (fd, path) = opened.map_err(|error| match error {
            GateError::Missing(_) => {
                let text = format!("Could not open '{}': No such file or directory", shown(&given));
                Error::new(ErrorKind::NotFound, text)
            }
            error => refused(by, format!("its {what} {error}")),
        })?;
        let Inherited { direct, force_share, .. } = chain.inherited;
        let how = FileOptions { write: !read_only, direct, force_share, ..FileOptions::default() };
        let file = File::from_fd(fd, &given, how)?;
        let options = NodeOptions {
            read_only,
            no_flush: chain.inherited.no_flush && !read_only,
            // The image decides what it gives back.
            discard: if read_only { DiscardMode::Ignore } else { DiscardMode::Unmap },
            ..NodeOptions::default()
        };
        self.add_file(None, file, options, path).await
    }

    /// Reads the images that the last of `levels` names, one below the other, until one names
    /// none, or one in another format, which is added and given.
    async fn descend(
        &mut self,
        levels: &mut Vec<Level>,
        chain: &ChainOptions,
    ) -> Result<Option<NodeId>> {
        loop {
            let depth = levels.len();
            match self.step_down(levels, chain).await {
                Ok(Step::Down) => {}
                Ok(Step::End(below)) => return Ok(below),
                Err(error) => return Err((0..depth).fold(error, |error, _| in_backing(error))),
            }
        }
    }

    async fn step_down(&mut self, levels: &mut Vec<Level>, chain: &ChainOptions) -> Result<Step> {
        let Some(last) = levels.last() else { return Ok(Step::End(None)) };
        let Some(stated) = last.driver.backing() else { return Ok(Step::End(None)) };
        let by = last.file.clone();
        let options = NodeOptions {
            read_only: true,
            no_flush: chain.inherited.no_flush,
            ..NodeOptions::default()
        };
        let (file, format) = match self.open_stated(&by, stated, chain).await? {
            Stated::File(file, format) => (file, format),
            Stated::Node(node) => return Ok(Step::End(Some(node.id))),
        };
        if format == "qcow2" {
            levels.push(self.read_level(None, file, options, chain, DataFile::Stated).await?);
            return Ok(Step::Down);
        }
        if let Some(identity) = file.identity {
            self.chain.descend(identity).map_err(|error| refused(&file, error.to_string()))?;
        }
        let description = Description {
            driver: format,
            tree: OptionTree::new(),
            options,
            inherited: chain.inherited,
            file: Some(file),
        };
        let node = Box::pin(self.open_node(None, description)).await?;
        Ok(Step::End(Some(node.id)))
    }

    /// Opens what an image names as its backing file, through the caller's gate.
    async fn open_stated(
        &mut self,
        by: &OpenNode,
        stated: BackingReference,
        chain: &ChainOptions,
    ) -> Result<Stated> {
        let BackingReference { name, format } = stated;
        let shown = escape_bytes(&name);
        match format.as_deref() {
            Some("raw" | "qcow2" | "luks") => {}
            Some(other) => {
                let other = other.escape_default();
                let text = format!(
                    "it names the backing file '{shown}' in format '{other}', which is not \
                     supported"
                );
                return Err(refused(by, text));
            }
            None if self.probing => {}
            None => {
                let text = format!("it names the backing file '{shown}' without its format");
                return Err(refused(by, text));
            }
        }
        let name = self.gate.without_prefix(&name).to_vec();
        let scheme = self.gate.granted_scheme(&name);
        if scheme.map_err(|error| refused(by, format!("its backing file {error}")))?.is_some() {
            return self.open_by_scheme(by, &name, format, chain).await;
        }
        let file = self.open_granted(by, name, "backing file", true, chain).await?;
        let format = match format {
            Some(format) => format,
            None => self.probe(&file).await?.to_owned(),
        };
        Ok(Stated::File(file, format))
    }

    /// Opens what an image names as its backing file with the caller's options for it.
    async fn open_stated_with(
        &mut self,
        by: &OpenNode,
        stated: BackingReference,
        mut tree: OptionTree,
        chain: &ChainOptions,
    ) -> Result<OpenNode> {
        let driver = tree.take_str("driver").map_err(invalid)?;
        let format = driver.or(stated.format);
        let stated = BackingReference { format, ..stated };
        let (file, driver) = match self.open_stated(by, stated, chain).await? {
            Stated::File(file, format) => (file, format),
            Stated::Node(node) => {
                tree.finish().map_err(invalid)?;
                return Ok(node);
            }
        };
        let name = tree.take_str("node-name").map_err(invalid)?;
        let (options, inherited) = take_generic(&mut tree, chain.inherited)?;
        let description = Description { driver, tree, options, inherited, file: Some(file) };
        Box::pin(self.open_node(name, description)).await
    }

    /// Opens a backing file whose name begins with a scheme that the caller granted.
    async fn open_by_scheme(
        &mut self,
        by: &OpenNode,
        name: &[u8],
        format: Option<String>,
        chain: &ChainOptions,
    ) -> Result<Stated> {
        let shown = escape_bytes(name);
        let text = std::str::from_utf8(name)
            .map_err(|_| refused(by, format!("its backing file '{shown}' is not text")))?;
        let mut tree = FileName::parse(text)?.into_tree();
        let whole = tree.get("driver").is_none() || tree.contains("file");
        if whole {
            if let Some(format) = format.filter(|_| tree.get("driver").is_none()) {
                tree.set("driver", format.into());
            }
            return self.open_tree(tree, chain.inherited).await.map(Stated::Node);
        }
        if let Some(Value::String(path)) = tree.get("filename")
            && let Some(directory) = by.path.as_deref().and_then(Path::parent)
        {
            let path = directory.join(path).to_string_lossy().into_owned();
            tree.set("filename", path.into());
        }
        let file = self.open_tree(tree, chain.inherited).await?;
        let format = match format {
            Some(format) => format,
            None => self.probe(&file).await?.to_owned(),
        };
        Ok(Stated::File(file, format))
    }

    /// Adds what has been read, from the bottom up; gives the top. When something fails, all files
    /// are let go of.
    async fn add_levels(
        &mut self,
        mut levels: Vec<Level>,
        below: Result<Option<NodeId>>,
    ) -> Result<NodeId> {
        let mut result = below;
        while let Some(level) = levels.pop() {
            let Level { name, file, holder, driver, options, data } = level;
            let backing = match &result {
                Ok(backing) => *backing,
                Err(_) => {
                    self.let_go(holder).await;
                    continue;
                }
            };
            let mut children = vec![(Role::File, file.id)];
            children.extend(data.map(|data| (Role::Data, data)));
            children.extend(backing.map(|backing| (Role::Backing, backing)));
            let driver = Box::new(driver);
            match self.add_held(holder, name.as_deref(), driver, options, &children).await {
                Ok(id) => {
                    let place = file.path.map(|path| ImagePlace { path, format: "qcow2" });
                    self.images.extend(place.map(|place| (id, place)));
                    result = Ok(Some(id));
                }
                Err(error) => {
                    self.let_go(holder).await;
                    result = Err(error);
                }
            }
        }
        result?.ok_or_else(|| Error::new(ErrorKind::NotFound, "a chain has at least one image"))
    }
}

/// Whether options of a backing file leave open which file it is: the one that the image names.
fn is_about_stated(tree: &OptionTree) -> bool {
    let names_format = match tree.get("driver") {
        Some(Value::String(driver)) => ["raw", "qcow2", "luks"].contains(&driver.as_str()),
        Some(_) => false,
        None => true,
    };
    names_format && !tree.contains("file") && !tree.contains("filename")
}

fn take_settings(tree: &mut OptionTree) -> Result<Qcow2Options> {
    let snapshot = tree.take_str("internal-snapshot").map_err(invalid)?;
    let snapshot = snapshot.map(|text| SnapshotSelector::parse(&text)).transpose()?;
    Ok(Qcow2Options {
        snapshot,
        encryption: EncryptionOptions::default(),
        cache_size: tree.take_size("cache-size").map_err(invalid)?,
        l2_cache_size: tree.take_size("l2-cache-size").map_err(invalid)?,
        l2_cache_entry_size: tree.take_size("l2-cache-entry-size").map_err(invalid)?,
        refcount_cache_size: tree.take_size("refcount-cache-size").map_err(invalid)?,
        pass_discard_request: tree.take_bool("pass-discard-request").map_err(invalid)?,
        pass_discard_snapshot: tree.take_bool("pass-discard-snapshot").map_err(invalid)?,
        pass_discard_other: tree.take_bool("pass-discard-other").map_err(invalid)?,
        discard_no_unref: tree.take_bool("discard-no-unref").map_err(invalid)?,
        cache_clean_interval: tree.take_u64("cache-clean-interval").map_err(invalid)?,
        overlap_check: take_overlap_checks(tree)?,
        lazy_refcounts: tree.take_bool("lazy-refcounts").map_err(invalid)?,
        without_data_file: false,
    })
}

/// `overlap-check`: a template's name, or a group of a template and single kinds.
fn take_overlap_checks(tree: &mut OptionTree) -> Result<Option<OverlapChecks>> {
    let templates = ["none", "constant", "cached", "all"];
    let choices = templates.map(|name| (name, OverlapChecks::template(name).unwrap_or_default()));
    if !matches!(tree.get("overlap-check"), Some(Value::Tree(_))) {
        return tree.take_enum("overlap-check", &choices).map_err(invalid);
    }
    let Some(mut group) = tree.take_subtree("overlap-check").map_err(invalid)? else {
        return Ok(None);
    };
    let template = group.take_enum("template", &choices).map_err(invalid)?;
    let mut checks = template.unwrap_or_default();
    for (name, structure) in Structure::NAMED {
        if let Some(watched) = group.take_bool(name).map_err(invalid)? {
            checks = checks.with(structure, watched);
        }
    }
    group.finish().map_err(invalid)?;
    Ok(Some(checks))
}

/// An error of an image, as the one above it tells it.
fn in_backing(error: Error) -> Error {
    Error::new(error.kind(), format!("Could not open backing file: {}", error.message()))
        .caused_by(error)
}

/// An image that may not open what it names.
fn refused(file: &OpenNode, text: String) -> Error {
    Error::new(ErrorKind::PermissionDenied, format!("{}: {text}", place_of(file)))
}

fn place_of(file: &OpenNode) -> String {
    file.path.as_deref().map_or("an image".into(), |path| format!("'{}'", shown(path)))
}

/// A path that may hold an image's words.
fn shown(path: &Path) -> String {
    escape_bytes(path.as_os_str().as_bytes())
}
