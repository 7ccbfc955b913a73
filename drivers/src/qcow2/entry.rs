//! One entry of an L1, L2 or refcount table: 64 bits and what they say.
//!
//! Decoding is strict, and every refusal says whether it means that the *metadata* is corrupt
//! ([`EntryError::is_corruption`]: the driver marks the image) or only that this cluster cannot
//! be read. What a decoder cannot know stays with the driver: whether an offset lies inside the
//! file, on top of other metadata, or has the refcount that COPIED promises.
//!
//! # Policy
//!
//! | entry | bits | decision |
//! |---|---|---|
//! | any | reserved bits set (T04, T09, T13f) | corrupt: a writer that knows these bits has set an incompatible feature bit, so here they are damage. Nothing is dropped silently, nothing needs to be preserved |
//! | any | offset not on a cluster boundary (T02, T13) | corrupt |
//! | L1, L2 | offset 0 but COPIED (T05, T07) | corrupt: no cluster, yet "its refcount is 1"; with an external data file: the cluster at its start |
//! | L2 | compressed, with an external data file | corrupt: such a file has nothing but plain clusters |
//! | L2 | zero bit in version 2 (T10) | corrupt: version 2 has no such bit |
//! | L2 | zero bit with extended L2 | corrupt: subclusters have their own, see [`subcluster`](super::subcluster) |
//! | L2 | compressed and COPIED (T15b) | corrupt: a compressed cluster is never written in place |
//! | L2 | compressed, inside the header cluster (T15d) | cluster unreadable |
//! | L2 | compressed, past what an offset may be (T15c) | cluster unreadable |

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

use super::geometry::{Geometry, HOST_OFFSET_LIMIT};
use std::fmt;

/// The refcount of the cluster is exactly 1: it may be written in place.
pub(super) const COPIED: u64 = 1 << 63;
/// The cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeros (version 3).
pub(super) const ZERO: u64 = 1;
/// Bits 9 to 55.
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// The unit in which a compressed cluster's length is counted.
const SECTOR: u64 = 512;

/// The format version, which decides what an L2 entry may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// Compatibility level 0.10: no zero clusters, no feature bits, 16-bit refcounts.
    V2,
    /// Compatibility level 1.1.
    V3,
}

/// A table whose entries this module knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// The L1 table: where the L2 tables are.
    L1,
    /// An L2 table: where the clusters are.
    L2,
    /// The refcount table: where the refcount blocks are.
    Refcount,
}

/// What an entry must be and was not. See the policy at the top of the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryRule {
    /// These reserved bits must be clear.
    Reserved(u64),
    /// The offset must be a cluster boundary.
    Unaligned,
    /// The offset must be less than 2^56.
    TooFar,
    /// Without a cluster there is no COPIED flag.
    CopiedNothing,
    /// The zero flag is for version 3 without extended L2 entries.
    ZeroFlag,
    /// A compressed cluster has no COPIED flag.
    CompressedCopied,
    /// An external data file has no compressed clusters.
    CompressedExternal,
    /// A compressed cluster has no subclusters; the second word.
    CompressedSubclusters(u64),
    /// A subcluster is allocated or zero, not both; the second word.
    SubclusterBoth(u64),
    /// A subcluster is allocated only where its cluster has a place; the second word.
    SubclusterNowhere(u64),
    /// A compressed cluster is not in the header cluster.
    CompressedInHeader,
    /// A compressed cluster has at least one byte and at most two clusters' worth of sectors.
    CompressedLength,
}

/// An entry that breaks a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryError {
    /// The table it is in.
    pub table: Table,
    /// The entry; when encoding, as far as it could be put together.
    pub raw: u64,
    /// The rule it breaks.
    pub rule: EntryRule,
}

impl EntryError {
    /// Whether the metadata is damaged, so that the image should be marked corrupt before
    /// anything is written. Otherwise only this cluster cannot be read.
    pub fn is_corruption(&self) -> bool {
        let compressed = self.table == Table::L2 && self.raw & COMPRESSED != 0;
        match self.rule {
            EntryRule::CompressedInHeader | EntryRule::CompressedLength => false,
            EntryRule::TooFar => !compressed,
            _ => true,
        }
    }
}

impl fmt::Display for EntryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let table = match self.table {
            Table::L1 => "L1",
            Table::L2 => "L2",
            Table::Refcount => "refcount table",
        };
        write!(f, "{table} entry {:#018x} ", self.raw)?;
        match self.rule {
            EntryRule::Reserved(bits) => write!(f, "has reserved bits {bits:#x} set"),
            EntryRule::Unaligned => f.write_str("is not aligned to a cluster"),
            EntryRule::TooFar => f.write_str("points past 2^56"),
            EntryRule::CopiedNothing => f.write_str("has the COPIED flag but no cluster"),
            EntryRule::ZeroFlag => f.write_str("has a zero flag, which this image cannot have"),
            EntryRule::CompressedSubclusters(word) => {
                write!(f, "is compressed and has subclusters {word:#018x}")
            }
            EntryRule::SubclusterBoth(word) => {
                write!(f, "has subclusters {word:#018x} that are both allocated and zero")
            }
            EntryRule::SubclusterNowhere(word) => {
                write!(f, "has allocated subclusters {word:#018x} but no cluster")
            }
            EntryRule::CompressedExternal => {
                f.write_str("is compressed, which an external data file cannot have")
            }
            EntryRule::CompressedCopied => f.write_str("is compressed and has the COPIED flag"),
            EntryRule::CompressedInHeader => f.write_str("points into the header"),
            EntryRule::CompressedLength => f.write_str("has an impossible compressed length"),
        }
    }
}

impl std::error::Error for EntryError {}

/// A decoded L1 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L1Entry {
    /// There is no L2 table: none of its clusters is allocated.
    Unallocated,
    /// The L2 table.
    Table {
        /// Its host offset in bytes, a cluster boundary other than 0.
        host: u64,
        /// Whether its refcount is exactly 1.
        copied: bool,
    },
}

impl L1Entry {
    /// What `raw` says. Any thread may call this.
    ///
    /// # Errors
    ///
    /// The entry breaks a rule; see the policy at the top of the module.
    pub fn decode(raw: u64, geometry: &Geometry) -> Result<Self, EntryError> {
        let refuse = refusal(Table::L1, raw);
        let host = decode_offset(raw, COPIED, geometry).map_err(&refuse)?;
        let copied = raw & COPIED != 0;
        match host {
            0 if copied => Err(refuse(EntryRule::CopiedNothing)),
            0 => Ok(L1Entry::Unallocated),
            host => Ok(L1Entry::Table { host, copied }),
        }
    }

    /// The 64 bits that say this.
    ///
    /// # Errors
    ///
    /// The offset cannot be stored: unaligned, 0, or past 2^56.
    pub fn encode(self, geometry: &Geometry) -> Result<u64, EntryError> {
        match self {
            L1Entry::Unallocated => Ok(0),
            L1Entry::Table { host, copied } => encode_offset(host, flag(copied, COPIED), geometry)
                .map_err(|(raw, rule)| refusal(Table::L1, raw)(rule)),
        }
    }
}

/// A decoded L2 entry: where a guest cluster's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// Nowhere in this image: the backing file's, or zeros.
    Unallocated,
    /// It reads as zeros (version 3).
    Zero {
        /// A host cluster kept for it: byte offset, a cluster boundary; 0 only in an external
        /// data file.
        host: Option<u64>,
        /// Whether the refcount of the host cluster is exactly 1; false without one.
        copied: bool,
    },
    /// In a host cluster of its own.
    Normal {
        /// Its offset in bytes, a cluster boundary; 0 only in an external data file.
        host: u64,
        /// Whether its refcount is exactly 1.
        copied: bool,
    },
    /// Compressed, at any byte of the file.
    Compressed {
        /// The first byte.
        host: u64,
        /// The most bytes that it has: it ends in the sector (of 512 bytes) in which
        /// `host + length` ends. At most two clusters.
        length: u64,
    },
}

/// The codec of L2 entries: with extended L2, of the first word.
#[derive(Clone, Copy, Debug)]
pub struct L2Entry;

impl L2Entry {
    /// What `raw` says. Any thread may call this.
    ///
    /// # Errors
    ///
    /// The entry breaks a rule; see the policy at the top of the module.
    pub fn decode(raw: u64, geometry: &Geometry, version: Version) -> Result<Cluster, EntryError> {
        let refuse = refusal(Table::L2, raw);
        if raw & COMPRESSED != 0 {
            return decode_compressed(raw, geometry).map_err(refuse);
        }
        let zero = raw & ZERO != 0;
        if zero && !zero_flag_allowed(geometry, version) {
            return Err(refuse(EntryRule::ZeroFlag));
        }
        let host = decode_offset(raw, COPIED | ZERO, geometry).map_err(&refuse)?;
        let copied = raw & COPIED != 0;
        if host == 0 && copied {
            if !geometry.external_data() {
                return Err(refuse(EntryRule::CopiedNothing));
            }
            return Ok(match zero {
                true => Cluster::Zero { host: Some(0), copied },
                false => Cluster::Normal { host, copied },
            });
        }
        Ok(match (host, zero) {
            (0, false) => Cluster::Unallocated,
            (host, false) => Cluster::Normal { host, copied },
            (0, true) => Cluster::Zero { host: None, copied },
            (host, true) => Cluster::Zero { host: Some(host), copied },
        })
    }

    /// The host offset and the COPIED flag of most entries: those that [`decode`](Self::decode) takes
    /// for [`Cluster::Normal`], in an image whose entries are not extended. Never of another entry.
    #[inline]
    pub(super) fn plain(raw: u64, geometry: &Geometry) -> Option<(u64, bool)> {
        let host = raw & !COPIED;
        // No flag, no reserved bit, and not the file's first cluster.
        let places = OFFSET_MASK & !(geometry.cluster_size() - 1);
        let is_place = host & !places == 0 && host != 0 && !geometry.extended_l2();
        is_place.then_some((host, raw & COPIED != 0))
    }

    /// The 64 bits that say `cluster`. A compressed length is rounded up to whole sectors.
    ///
    /// # Errors
    ///
    /// The cluster cannot be stored: an offset that is unaligned, 0 or past 2^56, a zero cluster
    /// in version 2, COPIED without a host cluster, or an impossible compressed length.
    pub fn encode(
        cluster: Cluster,
        geometry: &Geometry,
        version: Version,
    ) -> Result<u64, EntryError> {
        let refused = |(raw, rule)| refusal(Table::L2, raw)(rule);
        match cluster {
            Cluster::Unallocated => Ok(0),
            Cluster::Normal { host: 0, copied: true } if geometry.external_data() => Ok(COPIED),
            Cluster::Zero { host: Some(0), copied: true }
                if geometry.external_data() && zero_flag_allowed(geometry, version) =>
            {
                Ok(COPIED | ZERO)
            }
            Cluster::Normal { host, copied } => {
                encode_offset(host, flag(copied, COPIED), geometry).map_err(refused)
            }
            Cluster::Zero { .. } if !zero_flag_allowed(geometry, version) => {
                Err(refused((ZERO, EntryRule::ZeroFlag)))
            }
            Cluster::Zero { host: None, copied } if copied => {
                Err(refused((COPIED | ZERO, EntryRule::CopiedNothing)))
            }
            Cluster::Zero { host: None, .. } => Ok(ZERO),
            Cluster::Zero { host: Some(host), copied } => {
                encode_offset(host, flag(copied, COPIED) | ZERO, geometry).map_err(refused)
            }
            Cluster::Compressed { host, length } => {
                encode_compressed(host, length, geometry).map_err(refused)
            }
        }
    }
}

/// What the refcount-table entry `raw` says: the host offset of a refcount block (a cluster
/// boundary other than 0), or `None` for no block. Any thread may call this.
///
/// # Errors
///
/// The offset is not a cluster boundary, reserved bits are set (T13f), or it is past 2^56.
pub fn decode_refcount_table_entry(
    raw: u64,
    geometry: &Geometry,
) -> Result<Option<u64>, EntryError> {
    let refuse = refusal(Table::Refcount, raw);
    if raw >= HOST_OFFSET_LIMIT {
        return Err(refuse(EntryRule::TooFar));
    }
    let host = decode_offset(raw, 0, geometry).map_err(refuse)?;
    Ok((host != 0).then_some(host))
}

fn refusal(table: Table, raw: u64) -> impl Fn(EntryRule) -> EntryError {
    move |rule| EntryError { table, raw, rule }
}

fn flag(set: bool, bit: u64) -> u64 {
    if set { bit } else { 0 }
}

fn zero_flag_allowed(geometry: &Geometry, version: Version) -> bool {
    version >= Version::V3 && !geometry.extended_l2()
}

/// The offset of an entry that may have the bits `flags` beside it.
fn decode_offset(raw: u64, flags: u64, geometry: &Geometry) -> Result<u64, EntryRule> {
    let reserved = raw & !(OFFSET_MASK | flags);
    if reserved != 0 {
        return Err(EntryRule::Reserved(reserved));
    }
    let host = raw & OFFSET_MASK;
    if !geometry.is_aligned(host) {
        return Err(EntryRule::Unaligned);
    }
    Ok(host)
}

fn encode_offset(host: u64, flags: u64, geometry: &Geometry) -> Result<u64, (u64, EntryRule)> {
    if host >= HOST_OFFSET_LIMIT {
        return Err((flags, EntryRule::TooFar));
    }
    if !geometry.is_aligned(host) {
        return Err((host | flags, EntryRule::Unaligned));
    }
    if host == 0 {
        return Err((flags, EntryRule::CopiedNothing));
    }
    Ok(host | flags)
}

fn decode_compressed(raw: u64, geometry: &Geometry) -> Result<Cluster, EntryRule> {
    if raw & COPIED != 0 {
        return Err(EntryRule::CompressedCopied);
    }
    if geometry.external_data() {
        return Err(EntryRule::CompressedExternal);
    }
    let shift = geometry.compressed_count_shift();
    let host = raw & ((1 << shift) - 1);
    let more_sectors = (raw & !COMPRESSED) >> shift;
    // At most 2^13 sectors. The first of them may begin before `host`.
    let length = (more_sectors + 1) * SECTOR - host % SECTOR;
    // With small clusters the offset has more than 56 bits.
    if host >= HOST_OFFSET_LIMIT || host + length > HOST_OFFSET_LIMIT {
        return Err(EntryRule::TooFar);
    }
    if host < geometry.cluster_size() {
        return Err(EntryRule::CompressedInHeader);
    }
    Ok(Cluster::Compressed { host, length })
}

fn encode_compressed(host: u64, length: u64, geometry: &Geometry) -> Result<u64, (u64, EntryRule)> {
    let shift = geometry.compressed_count_shift();
    if host >= HOST_OFFSET_LIMIT.min(1 << shift) {
        return Err((COMPRESSED, EntryRule::TooFar));
    }
    let raw = COMPRESSED | host;
    if host < geometry.cluster_size() {
        return Err((raw, EntryRule::CompressedInHeader));
    }
    let last = length.checked_sub(1).map(|last| last.saturating_add(host % SECTOR));
    match last.map(|last| last / SECTOR) {
        Some(more_sectors) if more_sectors < 1 << (62 - shift) => Ok(raw | more_sectors << shift),
        _ => Err((raw, EntryRule::CompressedLength)),
    }
}

#[cfg(test)]
mod tests;
