//! To version 2, which has no zero clusters: one that nothing lies below is as good as none, any
//! other gets a cluster full of zeros.
//!
//! A zero cluster may keep a host cluster, and that may be the data of a snapshot: it is only used
//! when nobody else refers to it. Zeros are durable before an entry names them, and the counts of
//! new clusters before that; what is not used any more is found by the check that ends it all.

use super::{Progress, fit_for_version_2, write_header};
use crate::qcow2::check::Work;
use crate::qcow2::check::image::Image;
use crate::qcow2::check::rebuild::change_header;
use crate::qcow2::check::references::TableUse;
use crate::qcow2::check::{CheckOptions, Fix, check};
use crate::qcow2::header::encryption;
use crate::qcow2::snapshot;
use blockplex_graph::{Error, ErrorKind, RequestFlags, Result};

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What becomes of the entry of a zero cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Nothing lies below.
    Unallocated,
    /// It has a host cluster of its own, at this offset.
    Own(u64),
    /// It gets a new one.
    New,
}

/// An entry of a table and what becomes of it.
type Change = (usize, Fate);

/// See the page. The image has no features, and no snapshots, that forbid it.
pub(super) async fn downgrade(image: &Image<'_>, progress: Progress<'_>) -> Result<()> {
    let mut work = Work::of_sound(image).await?;
    let (parts, steps) = (work.references.tables.len() as u64 * 3 + 1, l1_entries(image).await?);
    let (mut done, mut told) = (0, 0);
    let mut advance = || {
        done += 1;
        while (told + 1) * parts <= done * steps {
            told += 1;
            progress(told, steps);
        }
    };
    // New clusters come behind all others.
    let first_new = work.references.counters.last_counted().map_or(1, |last| last + 1);
    let mut next_new = first_new;
    for (table, used) in work.references.tables.clone() {
        let (_, changes) = zeros_of(&work, table, used).await?;
        let filled = changes.iter().filter(|(_, fate)| *fate != Fate::Unallocated);
        if image.header.crypt_method != encryption::NONE && filled.count() > 0 {
            let text = "Cannot downgrade an encrypted image with zero clusters and a backing file";
            return Err(Error::new(ErrorKind::NotSupported, text));
        }
        for _ in changes.iter().filter(|(_, fate)| *fate == Fate::New) {
            work.references.counters.set(next_new, used.uses);
            next_new += 1;
        }
        advance();
    }
    if next_new > first_new {
        write_zeros(image, first_new, next_new - first_new).await?;
        let change = work.restructure(&image.geometry, false).await?;
        change_header(image, &change).await?;
    }
    for (&table, &used) in &work.references.tables {
        for (_, fate) in zeros_of(&work, table, used).await?.1 {
            if let Fate::Own(host) = fate {
                let size = image.geometry.cluster_size();
                image.file.write_zeroes(host, size, RequestFlags::default()).await?;
            }
        }
        advance();
    }
    image.file.flush().await?;
    let mut next_new = first_new;
    for (&table, &used) in &work.references.tables {
        change_table(&work, table, used, &mut next_new).await?;
        advance();
    }
    finish(image).await?;
    advance();
    Ok(())
}

/// The peer counts its progress in entries of L1 tables.
async fn l1_entries(image: &Image<'_>) -> Result<u64> {
    let table = snapshot::table::read(image.file, &image.header, image.length).await?;
    let of_snapshots: u64 = table.entries.iter().map(|entry| u64::from(entry.l1_size)).sum();
    Ok(u64::from(image.header.l1_size) + of_snapshots)
}

/// A table, and its entries of zero clusters.
async fn zeros_of(work: &Work<'_>, table: u64, used: TableUse) -> Result<(Vec<u8>, Vec<Change>)> {
    let Work { image, references, .. } = work;
    let bytes = image.read(table, image.geometry.cluster_size()).await?;
    let fate_of = |raw: u64| {
        let host = raw & OFFSET;
        if image.header.backing_name.is_none() {
            return Fate::Unallocated;
        }
        let references = references.counters.get(host >> image.geometry.cluster_bits());
        if host != 0 && references == used.uses { Fate::Own(host) } else { Fate::New }
    };
    let mut changes = Vec::new();
    for (index, raw) in entries(&bytes) {
        if raw & (COMPRESSED | ZERO) == ZERO {
            changes.push((index, fate_of(raw)));
        }
    }
    Ok((bytes, changes))
}

fn entries(table: &[u8]) -> impl Iterator<Item = (usize, u64)> + '_ {
    table.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word)).enumerate()
}

/// Makes new clusters zeros, durably with the next flush. They may lie in the file, unused.
async fn write_zeros(image: &Image<'_>, first: u64, count: u64) -> Result<()> {
    let bits = image.geometry.cluster_bits();
    let end = (first + count) << bits;
    if image.file.length() < end {
        image.file.truncate(end).await?;
    }
    image.file.write_zeroes(first << bits, count << bits, RequestFlags::default()).await
}

/// Writes a table whose zero clusters are data, or nothing.
async fn change_table(
    work: &Work<'_>,
    table: u64,
    used: TableUse,
    next_new: &mut u64,
) -> Result<()> {
    let (mut bytes, changes) = zeros_of(work, table, used).await?;
    if changes.is_empty() {
        return Ok(());
    }
    for (index, fate) in changes {
        let copied = if used.active > 0 && used.uses == 1 { COPIED } else { 0 };
        let raw = match fate {
            Fate::Unallocated => 0,
            Fate::Own(host) => host | copied,
            Fate::New => {
                *next_new += 1;
                (*next_new - 1) << work.image.geometry.cluster_bits() | copied
            }
        };
        if let Some(entry) = bytes.get_mut(index * 8..index * 8 + 8) {
            entry.copy_from_slice(&raw.to_be_bytes());
        }
    }
    work.image.write(table, &bytes).await
}

/// The header of version 2, and what is not used any more becomes free.
async fn finish(image: &Image<'_>) -> Result<()> {
    image.file.flush().await?;
    let mut header = Image::open(image.file).await?.header;
    fit_for_version_2(&mut header);
    write_header(image, &header).await?;
    let report = check(image.file, CheckOptions { fix: Fix::All }).await?;
    if report.is_clean() {
        return Ok(());
    }
    let text = "the image is of version 2, and what it does not use any more could not be freed";
    Err(Error::new(ErrorKind::Io, text))
}
