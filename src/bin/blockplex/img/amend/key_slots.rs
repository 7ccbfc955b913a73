//! `amend` of encrypted images: key slots come and go.

use blockplex::drivers::crypto::luks::SlotChange;
use blockplex::drivers::luks::Luks;
use blockplex::drivers::qcow2::Qcow2;
use blockplex::graph::NodeIo;

use crate::tool::create::encryption::{GROUP, finish, group};
use crate::tool::create::{CreationOption, Kind};
use crate::tool::open::Image;
use crate::tool::option_list::OptionList;
use crate::tool::{Failure, Tool, wait};

const fn option(name: &'static str, kind: Kind, help: &'static str) -> CreationOption {
    CreationOption { name, kind, help, default: None }
}

const STATE: &str = "Select new state of affected keyslots (active/inactive)";
const SLOT: &str = "Select a single keyslot to modify explicitly";
const OLD: &str = "Select all keyslots that match this password";
const NEW: &str = "New secret to set in the matching keyslots. Empty string to erase";
const TIME: &str = "Time to spend in PBKDF in milliseconds";

/// The options of a qcow2 image.
pub const OF_QCOW2: [CreationOption; 5] = [
    option("encrypt.iter-time", Kind::Number, TIME),
    option("encrypt.keyslot", Kind::Number, SLOT),
    option("encrypt.new-secret", Kind::Text, NEW),
    option("encrypt.old-secret", Kind::Text, OLD),
    option("encrypt.state", Kind::Text, STATE),
];

/// The options of a LUKS disk.
pub const OF_LUKS: [CreationOption; 5] = [
    option("iter-time", Kind::Number, TIME),
    option("keyslot", Kind::Number, SLOT),
    option("new-secret", Kind::Text, NEW),
    option("old-secret", Kind::Text, OLD),
    option("state", Kind::Text, STATE),
];

/// The change that the options ask for, if they do.
///
/// # Errors
///
/// Options that are wrong or do not go together.
pub fn wanted(
    tool: &Tool,
    format: &str,
    options: &OptionList,
) -> Result<Option<SlotChange>, Failure> {
    let prefix = if format == "luks" { "" } else { GROUP };
    let mut group = group(options, prefix);
    if group.is_empty() {
        return Ok(None);
    }
    let change = SlotChange::take(&mut group, &tool.secrets)?;
    finish(&group, prefix)?;
    Ok(Some(change))
}

/// Changes the key slots of an open image.
///
/// # Errors
///
/// An image that has none; a change that cannot be.
pub fn change(image: &Image, change: SlotChange, force: bool) -> Result<(), Failure> {
    let layer = image.layer();
    if image.format()? == "luks" {
        let work = async move |disk: &Luks, io: &NodeIo| {
            disk.change_key_slots(&io.child(0)?, &change, force).await
        };
        return wait(layer.manage::<Luks, ()>(image.root, work));
    }
    let work = async move |image: &Qcow2, io: &NodeIo| {
        image.change_key_slots(&io.child(0)?, &change, force).await
    };
    wait(layer.manage::<Qcow2, ()>(image.root, work))
}
