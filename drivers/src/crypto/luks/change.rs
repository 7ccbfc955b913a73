//! Key slots come and go while the payload stays as it is.
//!
//! A new slot's material is durable before the header names it. An old slot's material is
//! overwritten before the header gives it up: what is lost by a crash in between is only the slot
//! that was to go.

use super::header::LuksHeader;
use super::key_slot::MasterKey;
use super::{Place, SLOTS, create};
use crate::crypto::secret::Secret;
use crate::crypto::{SECTOR, fill_random};
use blockplex_graph::{Error, ErrorKind, RequestFlags, Result};
use blockplex_io::buffer::IoBuffer;
use std::time::Duration;

/// A change of key slots, as `amend` describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SlotChange {
    /// `state=active`: a password is added.
    Activate {
        /// `keyslot`; otherwise the first that is free.
        slot: Option<usize>,
        /// `new-secret`.
        password: Secret,
        /// `iter-time`; otherwise two seconds.
        iteration_time: Option<Duration>,
    },
    /// `state=inactive`: slots are erased.
    Erase {
        /// `keyslot`; otherwise all that the password opens.
        slot: Option<usize>,
        /// `old-secret`; with a slot, it must open that one.
        password: Option<Secret>,
    },
}

/// Changes the key slots of the header at `place`; durable on return. `key` is the payload's. With
/// `force`, an active slot may be overwritten and the last one erased, which loses the payload.
///
/// # Errors
///
/// A change that cannot be (nothing was written then); those of the file.
pub async fn change_slots(
    header: &mut LuksHeader,
    place: Place<'_>,
    key: &MasterKey,
    change: &SlotChange,
    (force, max_iterations): (bool, u32),
) -> Result<()> {
    match change {
        SlotChange::Activate { slot, password, iteration_time } => {
            let number = slot_to_activate(header, *slot, force)?;
            let time = iteration_time.unwrap_or(Duration::from_secs(2));
            activate(header, place, number, (key, password, time)).await
        }
        SlotChange::Erase { slot, password } => {
            header.check_iterations(max_iterations)?;
            let matching = slots_to_erase(header, place, (*slot, force), password.as_ref()).await?;
            refuse_last(header, &matching, (slot.is_some(), force))?;
            erase(header, place, &matching).await
        }
    }
}

fn refuse<T>(text: impl Into<String>) -> Result<T> {
    Err(Error::new(ErrorKind::InvalidArgument, text.into()))
}

fn check_number(number: usize) -> Result<()> {
    if number < SLOTS {
        return Ok(());
    }
    refuse(format!("Invalid keyslot {number} specified, must be between 0 and {}", SLOTS - 1))
}

fn is_active(header: &LuksHeader, number: usize) -> bool {
    header.slots.get(number).is_some_and(|slot| slot.active)
}

fn slot_to_activate(header: &LuksHeader, wanted: Option<usize>, force: bool) -> Result<usize> {
    let Some(number) = wanted else {
        let free = header.slots.iter().position(|slot| !slot.active);
        return match free {
            Some(number) => Ok(number),
            None => refuse("Can't add a keyslot - all keyslots are in use"),
        };
    };
    check_number(number)?;
    if is_active(header, number) && !force {
        return refuse(format!(
            "Refusing to overwrite active keyslot {number} - please erase it first"
        ));
    }
    Ok(number)
}

async fn activate(
    header: &mut LuksHeader,
    place: Place<'_>,
    number: usize,
    (key, password, time): (&MasterKey, &Secret, Duration),
) -> Result<()> {
    let (suite, hash) = (header.suite, header.hash);
    let (key, password) = (key.clone(), password.clone());
    let work = move || create::wrapped(suite, hash, &password, &key, time);
    let (salt, iterations, material) = place.file.local().blocking(work).await?;
    let mut next = header.clone();
    if let Some(slot) = next.slots.get_mut(number) {
        (slot.active, slot.salt, slot.iterations) = (true, salt, iterations);
        let start = u64::from(slot.material_sector) * SECTOR as u64;
        if start + material.len() as u64 > place.length {
            return refuse(format!("keyslot {number} lies outside of the LUKS header"));
        }
        write(place, start, &material).await?;
    }
    place.file.flush().await?;
    write(place, 0, &next.to_bytes()).await?;
    place.file.flush().await?;
    *header = next;
    Ok(())
}

/// The slots that an erasure means.
async fn slots_to_erase(
    header: &LuksHeader,
    place: Place<'_>,
    (slot, force): (Option<usize>, bool),
    password: Option<&Secret>,
) -> Result<Vec<usize>> {
    match (slot, password) {
        (None, None) => refuse(
            "To erase keyslot(s), either explicit keyslot index or the password currently contained \
             in them must be given",
        ),
        (Some(number), password) => {
            check_number(number)?;
            if !is_active(header, number) && !force {
                return refuse(format!("Given keyslot {number} is already erased (inactive)"));
            }
            if let Some(password) = password
                && header.try_slot(place, number, password).await?.is_none()
            {
                return refuse(format!(
                    "Given keyslot {number} doesn't contain the given old password for erase \
                     operation"
                ));
            }
            Ok(vec![number])
        }
        (None, Some(password)) => {
            let mut matching = Vec::new();
            for number in 0..SLOTS {
                if header.try_slot(place, number, password).await?.is_some() {
                    matching.push(number);
                }
            }
            if matching.is_empty() {
                return refuse("No keyslots match given (old) password for erase operation");
            }
            Ok(matching)
        }
    }
}

fn refuse_last(
    header: &LuksHeader,
    matching: &[usize],
    (by_number, force): (bool, bool),
) -> Result<()> {
    let active = header.slots.iter().filter(|slot| slot.active).count();
    if force || matching.len() < active {
        return Ok(());
    }
    match matching {
        [number] if by_number => refuse(format!(
            "Attempt to erase the only active keyslot {number} which will erase all the data in the \
             image irreversibly - refusing operation"
        )),
        _ => refuse(
            "All the active keyslots match the (old) password that was given and erasing them will \
             erase all the data in the image irreversibly - refusing operation",
        ),
    }
}

async fn erase(header: &mut LuksHeader, place: Place<'_>, numbers: &[usize]) -> Result<()> {
    let mut next = header.clone();
    let length = header.material_sectors() as usize * SECTOR;
    for number in numbers {
        let Some(slot) = next.slots.get_mut(*number) else { continue };
        let mut noise = vec![0; length];
        fill_random(&mut noise)?;
        write(place, u64::from(slot.material_sector) * SECTOR as u64, &noise).await?;
        (slot.active, slot.salt, slot.iterations) = (false, [0; 32], 0);
    }
    place.file.flush().await?;
    write(place, 0, &next.to_bytes()).await?;
    place.file.flush().await?;
    *header = next;
    Ok(())
}

async fn write(place: Place<'_>, start: u64, bytes: &[u8]) -> Result<()> {
    let memory = IoBuffer::from_slice(bytes);
    place.file.write(place.offset + start, memory, RequestFlags::default()).await
}
