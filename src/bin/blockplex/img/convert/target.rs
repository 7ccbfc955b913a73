//! The image to write.

use std::sync::Arc;

use blockplex::drivers::qcow2::Qcow2;
use blockplex::graph::{NodeView, Role};
use blockplex::{ErrorKind, Limits, Request};

use super::copy::TargetBacking;
use super::sources::Sources;
use super::{Options, bitmaps};
use crate::img::disk::{Disk, SECTOR};
use crate::tool::create::{CreationFormat, check_options, format_named};
use crate::tool::open::{CacheMode, Image, ImageOpenOptions, is_driver};
use crate::tool::{Failure, Tool};

/// The target, open.
pub struct Target {
    image: Image,
    backing: Option<TargetBacking>,
    reads_as_zeros: bool,
}

impl Target {
    /// Makes the target, unless it is there, and opens it.
    pub fn prepare(
        tool: &Tool,
        options: &mut Options,
        sources: &Sources,
        name: &str,
    ) -> Result<Target, Failure> {
        let format = format_of(options)?;
        let has_backing = set_backing(options, sources, format)?;
        let cache = CacheMode::parse(&options.target_cache).ok_or_else(|| {
            Failure::new(format!("Invalid cache option: {}", options.target_cache))
        })?;
        if let Some(format) = format.filter(|_| options.create) {
            check_creation(options, format)?;
            options.target_options.set("size", sources.length().to_string());
            tool.create_image(name, format, &options.target_options).map_err(|failure| {
                failure.prefixed(&format!("{name}: error while converting {}: ", format.name))
            })?;
        }
        let how = ImageOpenOptions {
            image_opts: options.target_image_opts,
            format: options.target_format_name(),
            write: true,
            cache,
            unmap: options.sparse != Some(0),
            options: match format.filter(|_| options.create) {
                Some(format) => Tool::key_options(format.name, &options.target_options),
                None => Vec::new(),
            },
            ..ImageOpenOptions::new(name)
        };
        let image = tool.open(&how)?;
        let mut target = Target { image, backing: None, reads_as_zeros: false };
        match target.look(options, has_backing) {
            Ok(()) => Ok(target),
            Err(failure) => {
                target.close()?;
                Err(failure)
            }
        }
    }

    /// Finds out what shows where nothing is written.
    fn look(&mut self, options: &Options, has_backing: bool) -> Result<(), Failure> {
        let view = self.image.view()?;
        if options.compress && view.driver_as::<Qcow2>().is_none() {
            return Err(Failure::new("Compression not supported for this file format"));
        }
        if options.bitmaps {
            bitmaps::check_target(&self.image)?;
        }
        if has_backing {
            let below = view.edge_in_role(Role::Backing).and_then(|edge| view.child(edge));
            let length = below.map(|below| below.length().next_multiple_of(SECTOR));
            self.backing = Some(TargetBacking { length });
        }
        let is_device = {
            let mut bottom = view;
            while let Some(edge) = bottom.edge_in_role(Role::File) {
                let Some(child) = bottom.child(edge).cloned() else { break };
                bottom = child;
            }
            bottom.driver().driver_name() == "host_device"
        };
        // What was never written to a LUKS disk reads as noise.
        let is_noise = self.image.format()? == "luks";
        let is_new = options.create && options.sparse != Some(0) && !is_device && !is_noise;
        self.reads_as_zeros = !has_backing && (options.target_is_zero || is_new);
        Ok(())
    }

    /// The disk to write, of which `total` bytes are written; what is in the way is cleared.
    pub fn disk(&self, options: &Options, total: u64) -> Result<Disk, Failure> {
        let mut disk = Disk::new(self.image.backend.clone())?;
        if !options.create && disk.length() < total {
            return Err(Failure::new("output file is smaller than input file"));
        }
        if disk.length() >= total && self.image.length()? < total {
            // The last sector is written whole.
            self.image.disk().truncate(total)?;
            disk = Disk::new(self.image.backend.clone())?;
        }
        Ok(disk)
    }

    /// Makes the whole target read as zeros, if it does not and can do so without writing them.
    pub fn clear(&mut self) -> Result<(), Failure> {
        if self.reads_as_zeros || self.backing.is_some() {
            return Ok(());
        }
        let mut offset = 0;
        let length = self.image.length()?;
        while offset < length {
            let part = (length - offset).min(Limits::MAX_REQUEST & !(SECTOR - 1));
            let zeroes = Request::write_zeroes(offset, part).may_unmap().no_fallback();
            match self.image.disk().run(zeroes) {
                Ok(_) => offset += part,
                Err(error) if error.kind() == ErrorKind::NotSupported => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        self.reads_as_zeros = true;
        Ok(())
    }

    /// The image.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Its node.
    pub fn view(&self) -> Result<Arc<NodeView>, Failure> {
        self.image.view()
    }

    /// What is below it, if that shows where nothing is written.
    pub fn backing(&self) -> Option<TargetBacking> {
        self.backing
    }

    /// Whether it reads as zeros where nothing is written.
    pub fn reads_as_zeros(&self) -> bool {
        self.reads_as_zeros
    }

    /// The alignment that its file asks for.
    pub fn request_alignment(&self) -> Result<u32, Failure> {
        Ok(self.image.view()?.limits().request_alignment)
    }

    /// The bytes of its clusters.
    pub fn cluster_size(&self) -> Result<u64, Failure> {
        let view = self.image.view()?;
        let image = view.driver_as::<Qcow2>();
        let image = image.ok_or_else(|| Failure::new("could not get block driver info"))?;
        Ok(image.information().cluster_size)
    }

    /// Closes it; what was written is durable, unless the cache mode says otherwise.
    pub fn close(self) -> Result<(), Failure> {
        self.image.close()
    }
}

impl Options {
    /// The format in which the target is opened.
    fn target_format_name(&self) -> Option<String> {
        match (&self.target_format, self.target_image_opts) {
            (Some(format), _) => Some(format.clone()),
            (None, true) => None,
            (None, false) => Some("raw".to_owned()),
        }
    }
}

/// The format in which the target is made.
fn format_of(options: &Options) -> Result<Option<&'static CreationFormat>, Failure> {
    let Some(name) = options.target_format_name() else { return Ok(None) };
    match format_named(&name) {
        Ok(format) => Ok(Some(format)),
        Err(_) if !options.create && is_driver(&name) => Ok(None),
        Err(failure) => Err(failure),
    }
}

/// Puts `-B` and `-F` to the options; whether there is a backing file.
fn set_backing(
    options: &mut Options,
    sources: &Sources,
    format: Option<&CreationFormat>,
) -> Result<bool, Failure> {
    let takes_backing = format.is_some_and(|format| format.takes_backing);
    let name = format.map_or("", |format| format.name);
    for (key, what, value) in [
        ("backing_file", "Backing file", options.backing.clone()),
        ("backing_fmt", "Backing file format", options.backing_format.clone()),
    ] {
        let Some(value) = value else { continue };
        if !takes_backing {
            return Err(Failure::new(format!("{what} not supported for file format '{name}'")));
        }
        options.target_options.set(key, value);
    }
    if options.target_options.get("backing_file").is_none() {
        return Ok(false);
    }
    if sources.images().len() > 1 {
        return Err(Failure::new(
            "Having a backing file for the target makes no sense when concatenating multiple \
             input images",
        ));
    }
    if options.create && options.target_options.get("backing_fmt").is_none() {
        return Err(Failure::new("Use of backing file requires explicit backing format"));
    }
    if options.target_is_zero {
        return Err(Failure::new(
            "Cannot use --target-is-zero when the destination image has a backing file",
        ));
    }
    Ok(true)
}

fn check_creation(options: &Options, format: &CreationFormat) -> Result<(), Failure> {
    check_options(format, &options.target_options)?;
    if !options.compress {
        return Ok(());
    }
    if format.name != "qcow2" {
        return Err(Failure::new("Compression not supported for this file format"));
    }
    let given = |key| options.target_options.get(key).is_some();
    if given("encryption") || given("encrypt.format") {
        let text = "Compression and encryption not supported at the same time";
        return Err(Failure::new(text));
    }
    match options.target_options.get("preallocation") {
        None | Some("off") => Ok(()),
        Some(_) => {
            let text = "Compression and preallocation not supported at the same time";
            Err(Failure::new(text))
        }
    }
}
