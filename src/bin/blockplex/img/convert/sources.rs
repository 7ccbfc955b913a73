//! The images to copy, as one disk.

use std::sync::Arc;

use blockplex::graph::{NodeView, Role};

use super::Options;
use super::copy::Source;
use crate::img::disk::Disk;
use crate::tool::open::{CacheMode, Image, ImageOpenOptions};
use crate::tool::{Failure, Tool};

/// The images to copy, open.
pub struct Sources {
    images: Vec<Image>,
    disks: Vec<Disk>,
}

impl Sources {
    /// Opens them.
    pub fn open(tool: &Tool, options: &Options, names: &[String]) -> Result<Sources, Failure> {
        let cache = CacheMode::parse(&options.source_cache).ok_or_else(|| {
            Failure::new(format!("Invalid source cache option: {}", options.source_cache))
        })?;
        let mut sources = Sources { images: Vec::new(), disks: Vec::new() };
        for name in names {
            let how = ImageOpenOptions {
                image_opts: options.source_image_opts,
                format: options.source_format.clone(),
                force_share: options.force_share,
                cache,
                ..ImageOpenOptions::new(name.clone())
            };
            let opened = tool.open(&how);
            if let Err(failure) = opened.and_then(|image| sources.add(image)) {
                sources.close()?;
                return Err(failure);
            }
        }
        if let Some(snapshot) = &options.snapshot
            && let Err(failure) = sources.show(tool, options, snapshot, cache)
        {
            sources.close()?;
            return Err(failure);
        }
        Ok(sources)
    }

    /// Opens the snapshot of the one image instead of its disk.
    fn show(
        &mut self,
        tool: &Tool,
        options: &Options,
        snapshot: &str,
        cache: CacheMode,
    ) -> Result<(), Failure> {
        if self.images.len() > 1 {
            return Err(Failure::new("No support for concatenating multiple snapshot"));
        }
        self.disks.clear();
        let Some(image) = self.images.pop() else { return Ok(()) };
        let (name, format) = (image.filename.clone(), image.format()?);
        image.close()?;
        if format != "qcow2" {
            return Err(Failure::new(format!(
                "Failed to load snapshot: Block format '{format}' used by device '' does not \
                 support temporarily loading internal snapshots"
            )));
        }
        let how = ImageOpenOptions {
            image_opts: options.source_image_opts,
            format: options.source_format.clone(),
            force_share: options.force_share,
            cache,
            options: vec![("internal-snapshot".to_owned(), snapshot.to_owned())],
            ..ImageOpenOptions::new(name)
        };
        let image = tool.open_quietly(&how);
        let image = image.map_err(|failure| {
            let text = failure.text().unwrap_or_default();
            let text = if text.contains("snapshot") { "Can't find snapshot" } else { text };
            Failure::new(format!("Failed to load snapshot: {text}"))
        })?;
        self.add(image)
    }

    fn add(&mut self, image: Image) -> Result<(), Failure> {
        let disk = Disk::new(image.backend.clone());
        self.images.push(image);
        self.disks.push(disk?);
        Ok(())
    }

    /// The images.
    pub fn images(&self) -> &[Image] {
        &self.images
    }

    /// The node of the only one; none when there are several.
    pub fn only_view(&self) -> Result<Option<Arc<NodeView>>, Failure> {
        match self.images.as_slice() {
            [image] => Ok(Some(image.view()?)),
            _ => Ok(None),
        }
    }

    /// The length of all together.
    pub fn length(&self) -> u64 {
        self.disks.iter().map(Disk::length).sum()
    }

    /// The sources of a copy.
    pub fn of_copy(&self) -> Result<Vec<Source>, Failure> {
        let mut start = 0;
        let mut sources = Vec::with_capacity(self.images.len());
        for (image, disk) in self.images.iter().zip(&self.disks) {
            let view = image.view()?;
            let backing = view.edge_in_role(Role::Backing).and_then(|edge| view.child(edge));
            let backing_length = backing.map_or(0, |backing| backing.length());
            let source = Source { disk: disk.clone(), start, backing_length };
            start = source.end();
            sources.push(source);
        }
        Ok(sources)
    }

    /// Closes them.
    pub fn close(self) -> Result<(), Failure> {
        let mut result = Ok(());
        for image in self.images {
            result = result.and(image.close());
        }
        result
    }
}
