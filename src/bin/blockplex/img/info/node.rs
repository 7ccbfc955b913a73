//! What is known of a node: an image, or a file below one.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;

use blockplex::NodeId;
use blockplex::drivers::blkdebug::Blkdebug;
use blockplex::drivers::file::File;
use blockplex::drivers::luks::Luks;
use blockplex::drivers::null::Null;
use blockplex::drivers::qcow2::entry::Version;
use blockplex::drivers::qcow2::header::CompressionType;
use blockplex::drivers::qcow2::{BitmapInformation, ImageInformation, Qcow2, Snapshot};
use blockplex::graph::NodeView;
use blockplex::graph::driver::Role;

use super::encryption;
use crate::img::snapshot_list;
use crate::tool::json::{Json, shown};
use crate::tool::names::{beside, of_files};
use crate::tool::open::Image;
use crate::tool::{Failure, size};

/// The backing file that an image names.
pub struct Backing {
    name: String,
    /// The name, seen from where we are.
    pub full_name: String,
    /// The format that the image states for it.
    pub format: Option<String>,
}

/// What is known of a node.
pub struct NodeInfo {
    filename: String,
    format: &'static str,
    virtual_size: u64,
    /// Bytes of storage; unknown for what is no file.
    actual_size: Option<u64>,
    cluster_size: Option<u64>,
    is_encrypted: bool,
    /// Whether it was not closed properly, where that is known.
    is_dirty: Option<bool>,
    /// The backing file.
    pub backing: Option<Backing>,
    snapshots: Vec<Snapshot>,
    /// What only this format has.
    specific: Option<Json>,
    children: Vec<(String, NodeInfo)>,
}

impl NodeInfo {
    /// What only its format has, for people, `level` deep.
    pub fn specific(&self, level: usize) -> String {
        self.specific.as_ref().map_or_else(String::new, |specific| specific.for_people(level))
    }

    /// Looks at an open image.
    ///
    /// # Errors
    ///
    /// A file cannot be looked at.
    pub fn of(image: &Image) -> Result<NodeInfo, Failure> {
        NodeInfo::of_node(&*image.view()?, &of_files(image))
    }

    fn of_node(view: &NodeView, names: &BTreeMap<NodeId, String>) -> Result<NodeInfo, Failure> {
        let mut children = Vec::new();
        for (index, edge) in view.edges().iter().enumerate() {
            if edge.role != Role::Backing
                && let Some(child) = view.child(index)
            {
                let name = match edge.role {
                    Role::Filtered if view.driver_as::<Blkdebug>().is_some() => "image".to_owned(),
                    _ => edge.name.clone(),
                };
                children.push((name, NodeInfo::of_node(child, names)?));
            }
        }
        let filename = names.get(&view.id()).cloned().unwrap_or_default();
        let mut info = NodeInfo {
            format: view.driver().driver_name(),
            // As in QEMU, whose disks end with a sector.
            virtual_size: view.length().next_multiple_of(512),
            actual_size: actual_size(view, &children)?,
            cluster_size: None,
            is_encrypted: false,
            is_dirty: children.first().and_then(|(_, child)| child.is_dirty),
            backing: None,
            snapshots: Vec::new(),
            specific: None,
            children,
            filename,
        };
        if view.driver_as::<File>().is_some() {
            info.is_dirty = Some(false);
            info.specific = Some(Json::Object(Vec::new()));
        }
        if let Some(image) = view.driver_as::<Qcow2>() {
            info.add_qcow2(image);
        }
        if let Some(disk) = view.driver_as::<Luks>() {
            info.is_encrypted = true;
            info.specific = Some(encryption::luks(disk.information(), None));
        }
        Ok(info)
    }

    /// The name of the file at the bottom, to which names in the image are relative.
    fn bottom_name(&self) -> &str {
        self.children.first().map_or(&self.filename, |(_, child)| child.bottom_name())
    }

    fn add_qcow2(&mut self, image: &Qcow2) {
        let told = image.information();
        self.cluster_size = Some(told.cluster_size);
        self.is_dirty = Some(told.dirty);
        self.is_encrypted = told.encryption.is_some();
        self.backing = told.backing.as_ref().map(|backing| {
            let name = String::from_utf8_lossy(&backing.name).into_owned();
            Backing {
                full_name: beside(self.bottom_name(), &name),
                name,
                format: backing.format.clone(),
            }
        });
        self.snapshots = image.snapshots();
        self.specific = Some(qcow2_specific(told));
    }

    /// As `--output=json` prints it.
    pub fn json(&self) -> Json {
        let children = self.children.iter().map(|(name, info)| {
            Json::Object(vec![("name", name.as_str().into()), ("info", info.json())])
        });
        let mut members = vec![("children", Json::List(children.collect()))];
        let backing = self.backing.as_ref();
        if let Some(format) = backing.and_then(|backing| backing.format.as_deref()) {
            members.push(("backing-filename-format", format.into()));
        }
        if !self.snapshots.is_empty() {
            let list = self.snapshots.iter().map(|snapshot| snapshot_list::json(&snapshot.entry));
            members.push(("snapshots", Json::List(list.collect())));
        }
        members.push(("virtual-size", self.virtual_size.into()));
        members.push(("filename", self.filename.as_str().into()));
        members.extend(self.cluster_size.map(|bytes| ("cluster-size", bytes.into())));
        members.push(("format", self.format.into()));
        members.extend(self.actual_size.map(|bytes| ("actual-size", bytes.into())));
        if let Some(specific) = &self.specific {
            let pair = vec![("type", self.format.into()), ("data", specific.clone())];
            members.push(("format-specific", Json::Object(pair)));
        }
        let full = backing.map(|backing| backing.full_name.as_str());
        members.extend(full.map(|name| ("full-backing-filename", name.into())));
        members.extend(self.is_encrypted.then(|| ("encrypted", true.into())));
        let name = backing.map(|backing| backing.name.as_str());
        members.extend(name.map(|name| ("backing-filename", name.into())));
        members.extend(self.is_dirty.map(|dirty| ("dirty-flag", dirty.into())));
        Json::Object(members)
    }

    /// As it is printed for people, `level` deep; `path` leads to its children.
    pub fn for_people(&self, path: &str, level: usize) -> String {
        let mut lines = Vec::new();
        let is_leaf = level > 0 && self.children.is_empty();
        let (name, format, length) = match is_leaf {
            true => ("filename", "protocol type", "file length"),
            false => ("image", "file format", "virtual size"),
        };
        lines.push(format!("{name}: {}", shown(&self.filename)));
        lines.push(format!("{format}: {}", self.format));
        let bytes = self.virtual_size;
        lines.push(format!("{length}: {} ({bytes} bytes)", size::human(bytes)));
        let actual = self.actual_size.map_or_else(|| "unavailable".to_owned(), size::human);
        lines.push(format!("disk size: {actual}"));
        lines.extend(self.is_encrypted.then(|| "encrypted: yes".to_owned()));
        lines.extend(self.cluster_size.map(|bytes| format!("cluster_size: {bytes}")));
        if self.is_dirty == Some(true) {
            lines.push("cleanly shut down: no".to_owned());
        }
        if let Some(backing) = &self.backing {
            let name = shown(&backing.name);
            lines.push(match backing.full_name == backing.name {
                true => format!("backing file: {name}"),
                false => {
                    format!("backing file: {name} (actual path: {})", shown(&backing.full_name))
                }
            });
            let format = backing.format.as_deref();
            lines.extend(format.map(|format| format!("backing file format: {}", shown(format))));
        }
        if !self.snapshots.is_empty() {
            lines.push("Snapshot list:".to_owned());
            lines.push(snapshot_list::HEADING.to_owned());
            let rows = self.snapshots.iter().map(|snapshot| snapshot_list::row(&snapshot.entry));
            lines.extend(rows);
        }
        let indent = "    ".repeat(level);
        let mut text: String = lines.iter().map(|line| format!("{indent}{line}\n")).collect();
        let specific = self.specific(level + 1);
        if !specific.is_empty() {
            text.push_str(&format!("{indent}Format specific information:\n{specific}"));
        }
        for (name, child) in &self.children {
            text.push_str(&format!("{indent}Child node '{path}{name}':\n"));
            text.push_str(&child.for_people(&format!("{path}{name}/"), level + 1));
        }
        text
    }
}

/// The storage that a node takes: a file's own, else what its children take together.
fn actual_size(view: &NodeView, children: &[(String, NodeInfo)]) -> Result<Option<u64>, Failure> {
    if let Some(file) = view.driver_as::<File>() {
        let descriptor = file.descriptor()?;
        let copy = descriptor.try_clone().map_err(|error| Failure::new(error.to_string()))?;
        let metadata = std::fs::File::from(copy).metadata();
        return Ok(metadata.ok().map(|metadata| metadata.blocks() * 512));
    }
    if view.driver_as::<Null>().is_some() {
        return Ok(Some(0));
    }
    if children.is_empty() || view.driver().driver_name() == "blkdebug" {
        return Ok(None);
    }
    Ok(children.iter().map(|(_, child)| child.actual_size).sum())
}

fn bitmap(told: &BitmapInformation) -> Json {
    let flags = [(told.in_use, "in-use"), (told.auto, "auto")];
    let flags = flags.into_iter().filter(|(is_set, _)| *is_set);
    Json::Object(vec![
        ("flags", Json::List(flags.map(|(_, name)| name.into()).collect())),
        ("name", String::from_utf8_lossy(&told.name).into_owned().into()),
        ("granularity", told.granularity.into()),
    ])
}

fn qcow2_specific(told: &ImageInformation) -> Json {
    let is_v3 = told.version == Version::V3;
    let mut members: Vec<(&'static str, Json)> = Vec::new();
    members.push(("compat", if is_v3 { "1.1" } else { "0.10" }.into()));
    let compression = match told.compression_type {
        CompressionType::Deflate => "zlib",
        CompressionType::Zstd => "zstd",
    };
    members.push(("compression-type", compression.into()));
    members.extend(is_v3.then(|| ("lazy-refcounts", told.lazy_refcounts.into())));
    if !told.bitmaps.is_empty() {
        members.push(("bitmaps", Json::List(told.bitmaps.iter().map(bitmap).collect())));
    }
    members.push(("refcount-bits", told.refcount_bits.into()));
    if let Some(name) = &told.data_file {
        members.push(("data-file", String::from_utf8_lossy(name).into_owned().into()));
    }
    let encrypt = told.encryption.as_ref();
    let encrypt = encrypt.map(|told| ("encrypt", encryption::of_qcow2(told)));
    if is_v3 {
        members.extend(told.has_data_file.then(|| ("data-file-raw", told.data_file_raw.into())));
        members.extend(encrypt);
        members.push(("corrupt", told.corrupt.into()));
        members.push(("extended-l2", told.extended_l2.into()));
    } else {
        members.extend(encrypt);
    }
    Json::Object(members)
}
