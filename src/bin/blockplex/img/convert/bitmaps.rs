//! The persistent bitmaps of the source, copied to the target (`--bitmaps`).

use blockplex::block_on;
use blockplex::drivers::open_gate::escape_bytes;
use blockplex::drivers::qcow2::entry::Version;
use blockplex::drivers::qcow2::{BitmapStatus, NewBitmap, Qcow2};
use blockplex::graph::NodeIo;

use crate::tool::message::describe;
use crate::tool::open::Image;
use crate::tool::{Failure, Tool};

/// Refuses a source without bitmaps, and one with a broken one, unless those are to be skipped.
pub fn check_source(tool: &Tool, image: &Image, skip_broken: bool) -> Result<(), Failure> {
    if !supports(image)? {
        return Err(Failure::new("Source lacks bitmap support"));
    }
    for bitmap in persistent(image)? {
        if bitmap.inconsistent && !skip_broken {
            let name = escape_bytes(&bitmap.name);
            tool.report(format!("Cannot copy inconsistent bitmap '{name}'"));
            eprintln!("Try --skip-broken-bitmaps, or use '{} bitmap --remove'", tool.name());
            return Err(Failure::silent(crate::tool::FAILED));
        }
    }
    Ok(())
}

/// Refuses a target that cannot have bitmaps.
pub fn check_target(image: &Image) -> Result<(), Failure> {
    if supports(image)? {
        return Ok(());
    }
    let format = image.format()?;
    Err(Failure::new(format!("Format driver '{format}' does not support bitmaps")))
}

/// Copies the bitmaps.
pub fn copy(tool: &Tool, source: &Image, target: &Image) -> Result<(), Failure> {
    let view = source.view()?;
    for bitmap in persistent(source)? {
        let name = escape_bytes(&bitmap.name);
        if bitmap.inconsistent {
            tool.warn(format!("Skipping inconsistent bitmap '{name}'"));
            continue;
        }
        let Some(driver) = view.driver_as::<Qcow2>() else { continue };
        let bits = driver.bitmap(&bitmap.name)?;
        let copy = async move |image: &Qcow2, io: &NodeIo| {
            let new = NewBitmap {
                name: bitmap.name.clone(),
                granularity: Some(bitmap.granularity),
                persistent: true,
                recording: false,
            };
            if let Err(error) = image.add_bitmap(io, new).await {
                return Ok(Err(("create", error)));
            }
            let mut filled = image.merge_bitmap(io, &bitmap.name, &bits).await;
            if filled.is_ok() && bitmap.recording {
                filled = image.set_bitmap_recording(io, &bitmap.name, true).await;
            }
            if let Err(error) = filled {
                image.remove_bitmap(io, &bitmap.name).await?;
                return Ok(Err(("populate", error)));
            }
            Ok(Ok(()))
        };
        let copied = block_on(target.layer().manage::<Qcow2, _>(target.root, copy));
        let copied = copied.map_err(|error| Failure::new(error.to_string()))?;
        if let Err((what, error)) = copied? {
            let why = describe(&error);
            return Err(Failure::new(format!("Failed to {what} bitmap {name}: {why}")));
        }
    }
    Ok(())
}

fn supports(image: &Image) -> Result<bool, Failure> {
    let view = image.view()?;
    let image = view.driver_as::<Qcow2>();
    Ok(image.is_some_and(|image| image.information().version >= Version::V3))
}

fn persistent(image: &Image) -> Result<Vec<BitmapStatus>, Failure> {
    let view = image.view()?;
    let list = view.driver_as::<Qcow2>().map(Qcow2::bitmaps).unwrap_or_default();
    Ok(list.into_iter().filter(|bitmap| bitmap.persistent).collect())
}
